//! Operands → tiles: activations as they are, weights decoded on the way.

use super::tile::{self, PANEL, Packable, SIDE, Tile};
use super::{BLOCK_OUTPUTS, Direction, Product, Span};
use crate::dequantize::dequantize_run;
use crate::simd::{Kernels, Run};
use half::bf16;
use std::ops::Range;

/// Weights of a row that are decoded at a time, at most.
const LONGEST_RUN: usize = 256;
const _: () = assert!(
    BLOCK_OUTPUTS <= LONGEST_RUN
        && f32::BLOCK_STEPS * f32::STEP <= LONGEST_RUN
        && bf16::BLOCK_STEPS * bf16::STEP <= LONGEST_RUN,
    "a run is as long as a block is wide or deep"
);

/// Codes and absmax of a run of zeros.
static ZERO_CODES: [u8; LONGEST_RUN / 2] = [0x77; LONGEST_RUN / 2];
static ZERO_ABSMAX: [f32; LONGEST_RUN / 32] = [0.0; LONGEST_RUN / 32];

impl<T: Packable> Product<'_, T> {
    /// A span of the activations of tokens `first..first + tokens`, panel by panel, in the form that
    /// their side of the microkernel reads.
    pub(super) fn pack(
        &self,
        kernels: &Kernels,
        first: usize,
        tokens: usize,
        span: &Span,
        tiles: &mut [Tile],
    ) {
        let (values, width) = match self.low_rank {
            Some(low_rank) if span.low_rank => (low_rank.hidden, low_rank.rank),
            _ => (self.activations, self.depth()),
        };
        let steps = span.steps::<T>();
        for token in 0..tokens {
            let row = &values[(first + token) * width..][..width][span.depth.clone()];
            tile::put_row(row, token % PANEL, &mut tiles[token / PANEL * steps * 2..][..steps * 2]);
        }
        if self.direction == Direction::Forward {
            for tile in tiles {
                (kernels.transpose)(tile);
            }
        }
    }

    /// A span of the weights of outputs `start..start + width` → panels.
    pub(super) fn fill(
        &self,
        kernels: &Kernels,
        start: usize,
        width: usize,
        span: &Span,
        scratch: &mut [T],
        panels: &mut [Tile],
    ) {
        if span.low_rank {
            self.pack_factor(kernels, start, width, span.depth.clone(), scratch, panels);
        } else {
            self.decode(kernels, start, width, span.depth.clone(), scratch, panels);
        }
    }

    /// Weights of W.
    fn decode(
        &self,
        kernels: &Kernels,
        start: usize,
        width: usize,
        depth: Range<usize>,
        scratch: &mut [T],
        panels: &mut [Tile],
    ) {
        let matrix = &self.matrix;
        let columns = matrix.columns();
        let (rows, run) = match self.direction {
            Direction::Forward => (start..start + width, depth.clone()),
            Direction::Backward => (depth.clone(), start..start + width),
        };
        let piece = matrix.block_size().min(64);
        let whole = matrix.rows_are_aligned() && (run.start | run.len()).is_multiple_of(piece);
        let Some((left, right)) = T::decode(kernels).filter(|_| whole) else {
            let fill = |row: usize, first: usize, out: &mut [T]| {
                dequantize_run(kernels, matrix, row * columns + first, out);
            };
            return self.fill_panels(kernels, start, width, depth, scratch, panels, fill);
        };
        let steps = depth.len().div_ceil(T::STEP);
        let pieces = run.len() / piece;
        // A word's worth of rows at a time: one of f32, two of bf16; left panels take single rows.
        // Right panels have words past the last row, which must hold zeros.
        let (group, count) = match self.direction {
            Direction::Forward => (1, width),
            Direction::Backward => (T::PER_WORD, steps * SIDE),
        };
        let mut absmax = [0.0; 2 * LONGEST_RUN / 32];
        for i in 0..count {
            let (low, high) = absmax[..2 * pieces].split_at_mut(pieces);
            let mut runs = [Run {
                codes: &ZERO_CODES[..run.len() / 2],
                absmax: &ZERO_ABSMAX[..pieces],
                block_size: piece,
            }; 2];
            let group_rows = (rows.start + i * group..rows.end).take(group);
            for (row, (decoded, absmax)) in group_rows.zip(runs.iter_mut().zip([low, high])) {
                let at = row * columns + run.start;
                matrix.decode_absmax_pieces(kernels, at, piece, absmax);
                decoded.codes = &matrix.codes()[at / 2..][..run.len() / 2];
                decoded.absmax = absmax;
            }
            match self.direction {
                Direction::Forward => {
                    left(&runs[0], i % PANEL, &mut panels[i / PANEL * steps * 2..][..steps * 2]);
                }
                Direction::Backward => right(&runs[..group], i, steps, panels),
            }
        }
    }

    /// The low-rank factor, which is dense.
    fn pack_factor(
        &self,
        kernels: &Kernels,
        start: usize,
        width: usize,
        rank: Range<usize>,
        scratch: &mut [T],
        panels: &mut [Tile],
    ) {
        let Some(low_rank) = self.low_rank else { return };
        let columns = match self.direction {
            Direction::Forward => low_rank.rank,
            Direction::Backward => self.outputs(),
        };
        let fill = |row: usize, first: usize, out: &mut [T]| {
            out.copy_from_slice(&low_rank.factor[row * columns + first..][..out.len()]);
        };
        self.fill_panels(kernels, start, width, rank, scratch, panels, fill);
    }

    /// `fill(row, first column, out)` reads a run of a row of W (or of the factor in its place).
    fn fill_panels(
        &self,
        kernels: &Kernels,
        start: usize,
        width: usize,
        depth: Range<usize>,
        scratch: &mut [T],
        panels: &mut [Tile],
        fill: impl Fn(usize, usize, &mut [T]),
    ) {
        let steps = depth.len().div_ceil(T::STEP);
        match self.direction {
            Direction::Forward => {
                let run = &mut scratch[..steps * T::STEP];
                run.fill(T::default());
                for i in 0..width.next_multiple_of(PANEL) {
                    if i < width {
                        fill(start + i, depth.start, &mut run[..depth.len()]);
                    } else if i == width {
                        run.fill(T::default());
                    }
                    let panel = &mut panels[i / PANEL * steps * 2..][..steps * 2];
                    tile::put_row(run, i % PANEL, panel);
                }
            }
            Direction::Backward => {
                let padded = width.next_multiple_of(PANEL);
                let (group, _) = scratch.split_at_mut(T::PER_WORD * padded);
                group.fill(T::default());
                for word in 0..steps * SIDE {
                    for (j, run) in group.chunks_exact_mut(padded).enumerate() {
                        let row = depth.start + word * T::PER_WORD + j;
                        if row < depth.end {
                            fill(row, start, &mut run[..width]);
                        } else {
                            run.fill(T::default());
                        }
                    }
                    T::put_group(kernels, group, word, steps, panels);
                }
            }
        }
    }
}
