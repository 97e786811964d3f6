//! Products of many activation rows with a packed matrix, blocked for the caches.
//!
//! ```text
//! forward     y [tokens, out]  = x  [tokens, in]  Wᵀ  + hidden [tokens, r] Bᵀ + bias
//! backward    dX [tokens, in]  = dY [tokens, out] W   + hidden [tokens, r] A
//! ```
//!
//! The shape is that of Goto & van de Geijn (2008, "Anatomy of high-performance matrix
//! multiplication"): activations are packed once into panels of 32 tokens; a block of weights, 256
//! outputs by half a thousand of the summed dimension, is decoded into panels that stay in the
//! second-level cache; a microkernel multiplies panel by panel. The low-rank operand is more of the
//! summed dimension, so LoRA needs no second pass over y. Panels are made of tiles, see `tile.rs`.

pub mod tile;

use crate::dequantize::dequantize_run;
use crate::element::Element;
use crate::error::Error;
use crate::packed_matrix::PackedMatrix;
use crate::parallel::{self, Columns};
use crate::quantize::check_length;
use crate::simd::Kernels;
use tile::{Block, PANEL, Packable, SIDE, Tile};

/// Outputs of a block of decoded weights.
const BLOCK_OUTPUTS: usize = 256;

/// Steps of the summed dimension in a block: 16 tiles, so that a panel fits the first-level cache.
const BLOCK_STEPS: usize = 16;

/// Packed activations and running sums may take this much per thread.
const BYTES_PER_THREAD: usize = 4 << 20;

/// Tokens multiplied at a time: their running sums for a block are half a megabyte of f32.
const MOST_TOKENS: usize = 512;

/// Which of the two products to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Activations times Wᵀ: one output per row of W.
    Forward,
    /// Gradients times W: one output per column of W.
    Backward,
}

/// The low-rank part: `hidden [tokens, rank]` times `factor`, which is B [out, rank] for the forward
/// product and A [rank, in] for the backward one.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a, T> {
    /// Activations of the bottleneck, scaling included.
    pub hidden: &'a [T],
    /// B or A.
    pub factor: &'a [T],
    /// r.
    pub rank: usize,
}

/// Operands of one product; `T` is f32 or bf16.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a, T> {
    /// Forward or backward.
    pub direction: Direction,
    /// The weight.
    pub matrix: PackedMatrix<'a>,
    /// x or dY, row-major.
    pub activations: &'a [T],
    /// Rows of `activations`.
    pub tokens: usize,
    /// LoRA, if there is any.
    pub low_rank: Option<LowRank<'a, T>>,
    /// Added to each row of the result.
    pub bias: Option<&'a [T]>,
}

impl<T: Element> Product<'_, T> {
    /// Elements of one row of the result.
    #[must_use]
    pub fn outputs(&self) -> usize {
        match self.direction {
            Direction::Forward => self.matrix.rows(),
            Direction::Backward => self.matrix.columns(),
        }
    }

    /// Length of the summed dimension without the low-rank part.
    #[must_use]
    pub fn depth(&self) -> usize {
        match self.direction {
            Direction::Forward => self.matrix.columns(),
            Direction::Backward => self.matrix.rows(),
        }
    }

    /// Check every operand's length against the shapes.
    ///
    /// # Errors
    /// [`Error::Operand`] naming the one at fault.
    pub fn check(&self, out: usize) -> Result<(), Error> {
        let (outputs, depth) = (self.outputs(), self.depth());
        check_length("x", self.activations.len(), self.tokens * depth)?;
        check_length("y", out, self.tokens * outputs)?;
        if let Some(bias) = self.bias {
            check_length("bias", bias.len(), outputs)?;
        }
        if let Some(low_rank) = self.low_rank {
            check_length("hidden", low_rank.hidden.len(), self.tokens * low_rank.rank)?;
            check_length("factor", low_rank.factor.len(), outputs * low_rank.rank)?;
        }
        Ok(())
    }
}

impl<T: Packable> Product<'_, T> {
    /// Write the product to `out` [tokens, outputs].
    ///
    /// Allocates at most 8 MiB per thread, whatever the sizes.
    ///
    /// # Errors
    /// [`Error::Operand`] when an operand has another length than the shapes ask for.
    pub fn write(&self, kernels: &Kernels, out: &mut [T], threads: usize) -> Result<(), Error> {
        self.check(out.len())?;
        let (outputs, depth) = (self.outputs(), self.depth());
        if out.is_empty() {
            return Ok(());
        }
        let steps = depth.div_ceil(T::STEP) + self.low_rank.map_or(0, |l| l.rank.div_ceil(T::STEP));
        let panel_bytes = steps.max(1) * 2 * size_of::<Tile>();
        let panels = (BYTES_PER_THREAD * threads.max(1) / panel_bytes).clamp(1, MOST_TOKENS / PANEL);
        for (i, out) in out.chunks_mut(panels * PANEL * outputs).enumerate() {
            let first = i * panels * PANEL;
            self.write_tokens(kernels, first, out.len() / outputs, out, threads);
        }
        Ok(())
    }

    /// The same for tokens `first..first + tokens`, few enough that they can be packed whole.
    fn write_tokens(&self, kernels: &Kernels, first: usize, tokens: usize, out: &mut [T], threads: usize) {
        let (outputs, depth) = (self.outputs(), self.depth());
        let main_steps = depth.div_ceil(T::STEP);
        let steps = main_steps + self.low_rank.map_or(0, |l| l.rank.div_ceil(T::STEP));
        let panels = tokens.div_ceil(PANEL);
        let mut activations = Tile::zeros(panels * steps * 2);
        let chunks = activations.chunks_mut(steps * 2).enumerate();
        parallel::for_each(chunks, threads, |(panel, tiles)| {
            let rows = first + panel * PANEL..first + tokens.min((panel + 1) * PANEL);
            let (main, extra) = tiles.split_at_mut(main_steps * 2);
            self.pack(kernels, &self.activations[rows.start * depth..rows.end * depth], depth, main);
            if let Some(LowRank { hidden, rank, .. }) = self.low_rank {
                self.pack(kernels, &hidden[rows.start * rank..rows.end * rank], rank, extra);
            }
        });
        let wide = outputs.div_ceil(4 * threads.max(1)).next_multiple_of(PANEL).min(BLOCK_OUTPUTS);
        let columns = Columns::new(out, outputs);
        parallel::for_each((0..outputs).step_by(wide), threads, |start| {
            let width = wide.min(outputs - start);
            let sums = self.sum_block(kernels, &activations, panels, steps, start, width, tokens);
            let mut range = columns.take(start..start + width);
            for (i, sums) in sums.chunks_exact(4).enumerate() {
                let (weights, tokens_at) = (i / panels * PANEL, i % panels * PANEL);
                let bias = self.bias.map(|bias| &bias[start + weights..]);
                let size = ((width - weights).min(PANEL), (tokens - tokens_at).min(PANEL));
                self.store(kernels, sums, weights, tokens_at, size, bias, &mut range);
            }
        });
    }

    /// Rows of activations → tiles, in the form that their side of the microkernel reads.
    fn pack(&self, kernels: &Kernels, rows: &[T], width: usize, tiles: &mut [Tile]) {
        if width == 0 {
            return;
        }
        for (i, row) in rows.chunks_exact(width).enumerate() {
            tile::put_row(row, i, tiles);
        }
        if self.direction == Direction::Forward {
            for tile in tiles {
                (kernels.transpose)(tile);
            }
        }
    }

    /// All sums of a block of outputs: four tiles of f32 per panel of weights and panel of tokens.
    #[allow(clippy::too_many_arguments)]
    fn sum_block(
        &self,
        kernels: &Kernels,
        activations: &[Tile],
        panels: usize,
        steps: usize,
        start: usize,
        width: usize,
        tokens: usize,
    ) -> Vec<Tile> {
        let main_steps = self.depth().div_ceil(T::STEP);
        let weight_panels = width.div_ceil(PANEL);
        let mut sums = Tile::zeros(weight_panels * panels * 4);
        let mut weights = Tile::zeros(weight_panels * BLOCK_STEPS * 2);
        let mut scratch = vec![T::default(); (BLOCK_STEPS * T::STEP).max(2 * BLOCK_OUTPUTS)];
        let mut first = 0;
        while first < steps {
            let limit = if first < main_steps { main_steps } else { steps };
            let count = BLOCK_STEPS.min(limit - first);
            let weights = &mut weights[..weight_panels * count * 2];
            if first < main_steps {
                let depth = first * T::STEP..((first + count) * T::STEP).min(self.depth());
                self.decode(kernels, start, width, depth, &mut scratch, weights);
            } else if let Some(low_rank) = self.low_rank {
                let rank = (first - main_steps) * T::STEP;
                let end = (rank + count * T::STEP).min(low_rank.rank);
                self.pack_factor(kernels, low_rank, start, width, rank..end, &mut scratch, weights);
            }
            let block = Block {
                weights,
                activations,
                activation_steps: steps,
                first,
                steps: count,
                width,
                tokens,
                direction: self.direction,
            };
            T::multiply(kernels)(&block, &mut sums);
            first += count;
        }
        sums
    }

    /// Weights of outputs `start..start + width` over a range of the summed dimension → panels.
    fn decode(
        &self,
        kernels: &Kernels,
        start: usize,
        width: usize,
        depth: std::ops::Range<usize>,
        scratch: &mut [T],
        panels: &mut [Tile],
    ) {
        let matrix = &self.matrix;
        let fill = |row: usize, first: usize, out: &mut [T]| {
            dequantize_run(kernels, matrix, row * matrix.columns() + first, out);
        };
        self.fill_panels(kernels, start, width, depth, scratch, panels, fill);
    }

    /// The same for the low-rank factor, which is dense.
    fn pack_factor(
        &self,
        kernels: &Kernels,
        low_rank: LowRank<'_, T>,
        start: usize,
        width: usize,
        rank: std::ops::Range<usize>,
        scratch: &mut [T],
        panels: &mut [Tile],
    ) {
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
    #[allow(clippy::too_many_arguments)]
    fn fill_panels(
        &self,
        kernels: &Kernels,
        start: usize,
        width: usize,
        depth: std::ops::Range<usize>,
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

    /// Four tiles of sums → a PANEL x PANEL piece of the result.
    #[allow(clippy::too_many_arguments)]
    fn store(
        &self,
        kernels: &Kernels,
        sums: &[Tile],
        weights: usize,
        tokens: usize,
        size: (usize, usize),
        bias: Option<&[T]>,
        out: &mut parallel::ColumnRange<'_, T>,
    ) {
        for (i, sums) in sums.iter().enumerate() {
            // Tiles lie [left half, right half] of the microkernel's left operand, then of its right.
            let (left, right) = (i / 2 * SIDE, i % 2 * SIDE);
            let (w, t) = match self.direction {
                Direction::Forward => (left, right),
                Direction::Backward => (right, left),
            };
            let mut sums = *sums;
            if self.direction == Direction::Forward {
                (kernels.transpose)(&mut sums);
            }
            let outputs = size.0.saturating_sub(w).min(SIDE);
            for token in 0..size.1.saturating_sub(t).min(SIDE) {
                if outputs == 0 {
                    continue;
                }
                let mut row: [f32; SIDE] = sums.row_f32(token);
                if let Some(bias) = bias {
                    for (sum, bias) in row.iter_mut().zip(&bias[w..w + outputs]) {
                        *sum += bias.to_f32();
                    }
                }
                T::narrow(kernels, &row[..outputs], out.row_mut(tokens + t + token, weights + w, outputs));
            }
        }
    }
}

#[cfg(test)]
mod tests;
