//! Products of many activation rows with a dense matrix, computed in f32: a low-rank part whose hidden
//! activations are given, beside a packed matrix that is not there.
//!
//! ```text
//! forward     y [tokens, rows]      = x  [tokens, columns] Wᵀ + bias     "hidden Bᵀ", B = W
//! backward    dX [tokens, columns]  = dY [tokens, rows]    W             "hidden A",  A = W
//! ```
//!
//! Weights of a half type are widened block by block, in the cache. That is a model's output layer in
//! training, on CPUs that multiply f32 faster than what the weights are stored in. Few rows: see
//! `dense_rows.rs`.

use super::tile::PANEL;
use super::{Direction, Hidden, LowRank, MOST_TOKENS, Product};
use crate::element::{Element, Floats};
use crate::error::Error;
use crate::memory::Scratch;
use crate::packed_matrix::{PackedMatrix, Scales};
use crate::parallel;
use crate::quantize::check_length;
use crate::simd::Kernels;

/// Rows of W that a backward product sums over at a time. Deeper ones would leave room for few tokens
/// in a pass, and each pass widens all weights.
const SEGMENT_ROWS: usize = 2048;

/// What some tokens' running sums, those of the next segment, its activations and their packed copy may
/// take together.
const SEGMENT_BYTES: usize = 6 << 20;

/// Tokens whose activations one task copies.
const TASK_TOKENS: usize = 16;

/// Operands of one product.
#[derive(Clone, Copy, Debug)]
pub struct DenseProduct<'a, T> {
    /// Forward or backward.
    pub direction: Direction,
    /// W [rows, columns], row-major.
    pub weight: Floats<'a>,
    /// Rows of W.
    pub rows: usize,
    /// Columns of W.
    pub columns: usize,
    /// x or dY, row-major.
    pub activations: &'a [T],
    /// Rows of `activations`.
    pub tokens: usize,
    /// Added to each row of the result.
    pub bias: Option<&'a [T]>,
}

impl<T: Element> DenseProduct<'_, T> {
    /// Check every operand's length against the shapes, and that of the result.
    ///
    /// # Errors
    /// [`Error::Operand`] naming the one at fault.
    pub fn check(&self, out: usize) -> Result<(), Error> {
        let (outputs, depth) = match self.direction {
            Direction::Forward => (self.rows, self.columns),
            Direction::Backward => (self.columns, self.rows),
        };
        check_length("x", self.activations.len(), self.tokens * depth)?;
        check_length("y", out, self.tokens * outputs)?;
        check_length("weight", self.weight.len(), self.rows * self.columns)?;
        self.bias.map_or(Ok(()), |bias| check_length("bias", bias.len(), outputs))
    }

    /// Write the product, summed in f32 and rounded once, to `out` [tokens, outputs].
    ///
    /// Scratch: about 8 MiB per thread, as [`Product::write`].
    ///
    /// # Errors
    /// [`Error::Operand`] when an operand has another length than the shapes ask for.
    pub fn write(&self, kernels: &Kernels, out: &mut [T], threads: usize) -> Result<(), Error> {
        let Self { direction, weight, rows, columns, activations, tokens, bias } = *self;
        self.check(out.len())?;
        let nothing = Floats::F32(&[]);
        let (a, b, rank, shape) = match direction {
            Direction::Forward => (nothing, weight, columns, (rows, 0)),
            Direction::Backward => (weight, nothing, rows, (0, columns)),
        };
        if direction == Direction::Backward && rows > SEGMENT_ROWS {
            return self.write_in_segments(kernels, out, threads);
        }
        let product = Product {
            direction,
            matrix: PackedMatrix::new(&[], Scales::Single(&[]), shape.0, shape.1, 64)?,
            activations: &[],
            tokens,
            low_rank: Some(LowRank { a, b, rank, scaling: 1.0 }),
            bias,
        };
        product.write_passes::<f32>(kernels, out, Hidden::Given(activations), threads.max(1));
        Ok(())
    }

    /// A deep backward product as a sum, in f32, of shallower ones.
    fn write_in_segments(&self, kernels: &Kernels, out: &mut [T], threads: usize) -> Result<(), Error> {
        let Self { weight, rows, columns, activations, tokens, .. } = *self;
        if out.is_empty() {
            return Ok(());
        }
        let values_per_token = 2 * (columns + SEGMENT_ROWS);
        let most = (SEGMENT_BYTES / size_of::<f32>() / values_per_token).clamp(PANEL, MOST_TOKENS);
        let room_for = |count: usize| Scratch::of::<f32>(most.min(tokens) * count);
        let (mut total, mut part, mut segment) =
            (room_for(columns), room_for(columns), room_for(SEGMENT_ROWS));
        for (activations, out) in activations.chunks(most * rows).zip(out.chunks_mut(most * columns)) {
            let tokens = activations.len() / rows;
            let total = &mut total.values_mut()[..out.len()];
            let part = &mut part.values_mut()[..out.len()];
            total.fill(0.0);
            for start in (0..rows).step_by(SEGMENT_ROWS) {
                let height = (rows - start).min(SEGMENT_ROWS);
                let segment = &mut segment.values_mut()[..tokens * height];
                let tasks = segment.chunks_mut(TASK_TOKENS * height);
                let tasks = tasks.zip(activations.chunks(TASK_TOKENS * rows)).collect::<Vec<_>>();
                parallel::for_each(tasks, threads, |(segment, activations)| {
                    let rows = activations.chunks_exact(rows).map(|row| &row[start..start + height]);
                    for (row, out) in rows.zip(segment.chunks_exact_mut(height)) {
                        T::widen(kernels, row, out);
                    }
                });
                let product = DenseProduct {
                    direction: Direction::Backward,
                    weight: weight.part(start * columns..(start + height) * columns),
                    rows: height,
                    columns,
                    activations: &*segment,
                    tokens,
                    bias: None,
                };
                product.write(kernels, part, threads)?;
                for (total, part) in total.iter_mut().zip(&*part) {
                    *total += part;
                }
            }
            if let Some(bias) = self.bias {
                for (total, bias) in total.iter_mut().zip(bias.iter().cycle()) {
                    *total += bias.to_f32();
                }
            }
            T::narrow(kernels, total, out);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
