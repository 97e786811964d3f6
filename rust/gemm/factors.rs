//! Gradients of the low-rank factors: sums over tokens of two rows' outer product.
//!
//! ```text
//! dA [r, in]  = (scaling dY B)ᵀ x        left: [tokens, r], right: [tokens, in]
//! dB [out, r] = dYᵀ (scaling x Aᵀ)       left: [tokens, r], right: [tokens, out], transposed
//! ```
//!
//! (LoRA, arXiv 2106.09685, differentiated by hand.) Neither operand is copied or transposed as a
//! whole: a block of columns of the right one is packed at a time.

use super::Direction;
use super::blocks::{self, BLOCK_OUTPUTS};
use super::tile::{BLOCK_STEPS, Block, PANEL, Packable, SIDE, Tile};
use crate::element::Element;
use crate::error::Error;
use crate::memory::Scratch;
use crate::parallel::{self, Columns};
use crate::quantize::check_length;
use crate::simd::Kernels;
use half::bf16;
use std::ops::Range;

/// Operands of one gradient.
#[derive(Clone, Copy, Debug)]
pub struct FactorGradient<'a, T> {
    /// The bottleneck's activations or gradients [tokens, rank], scaling included.
    pub left: &'a [T],
    /// x or dY [tokens, width].
    pub right: &'a [T],
    /// Rows of both.
    pub tokens: usize,
    /// r.
    pub rank: usize,
    /// in or out.
    pub width: usize,
    /// Whether the result is [width, rank], as B is, and not [rank, width], as A is.
    pub transposed: bool,
}

/// Write the gradients of A and B, summed in f32, to `out_a` [rank, in] and `out_b` [out, rank], in one
/// parallel region: entering a team of threads costs as much as a small layer's gradient.
///
/// # Errors
/// [`Error::Operand`] when an operand has another length than the shapes ask for.
pub fn write<T: Element, A: Element, B: Element>(
    (a, out_a): (&FactorGradient<'_, T>, &mut [A]),
    (b, out_b): (&FactorGradient<'_, T>, &mut [B]),
    kernels: &Kernels,
    threads: usize,
) -> Result<(), Error> {
    let threads = threads.max(1);
    let (out_a, out_b) = (a.outputs(out_a)?, b.outputs(out_b)?);
    let blocks_of_a = a.blocks(threads).map(|block| (true, block));
    let blocks = blocks_of_a.chain(b.blocks(threads).map(|block| (false, block))).collect::<Vec<_>>();
    parallel::for_each(blocks, threads, |(of_a, columns)| {
        if of_a {
            a.write_columns(kernels, &out_a, columns);
        } else {
            b.write_columns(kernels, &out_b, columns);
        }
    });
    Ok(())
}

impl<T: Element> FactorGradient<'_, T> {
    /// Check the operands; the result as something that blocks of columns write to. Transposed, a
    /// block's part of it is some whole rows: the columns of one long row.
    fn outputs<'o, P>(&self, out: &'o mut [P]) -> Result<Columns<'o, P>, Error> {
        let (left, right) = if self.transposed { ("hidden", "grad") } else { ("grad_hidden", "x") };
        check_length(left, self.left.len(), self.tokens * self.rank)?;
        check_length(right, self.right.len(), self.tokens * self.width)?;
        check_length("gradient", out.len(), self.rank * self.width)?;
        Ok(Columns::new(out, if self.transposed { self.width * self.rank } else { self.width }))
    }

    /// Blocks of the right operand's columns.
    fn blocks(&self, threads: usize) -> impl Iterator<Item = Range<usize>> {
        blocks::blocks(0..self.width, PANEL, threads)
    }

    /// The gradient for a block of columns of the right operand.
    fn write_columns<P: Element>(&self, kernels: &Kernels, out: &Columns<'_, P>, columns: Range<usize>) {
        let rank = self.rank;
        let range = if self.transposed { columns.start * rank..columns.end * rank } else { columns.clone() };
        let mut out = out.take(range);
        let put = |row: usize, first: usize, values: &[P]| {
            let (row, first) = if self.transposed { (0, row * rank + first) } else { (row, first) };
            out.row_mut(row, first, values.len()).copy_from_slice(values);
        };
        if kernels.bf16.is_some() && T::as_bf16(self.right).is_some() {
            self.write_block::<P, bf16>(kernels, columns, put);
        } else {
            self.write_block::<P, f32>(kernels, columns, put);
        }
    }

    /// The gradient for some columns of the right operand; `put(row, first column, values)` takes
    /// pieces of rows of the block's result.
    fn write_block<P: Element, C: Packable>(
        &self,
        kernels: &Kernels,
        columns: Range<usize>,
        mut put: impl FnMut(usize, usize, &[P]),
    ) {
        let Some(loops) = C::panels(kernels) else { return };
        let (rank_panels, panels) = (self.rank.div_ceil(PANEL), columns.len().div_ceil(PANEL));
        let mut sums = Scratch::take(rank_panels * panels * 4);
        sums.fill(Tile::ZERO);
        let mut left = Scratch::take(rank_panels * BLOCK_STEPS * 2);
        let mut right = Scratch::take(panels * BLOCK_STEPS * 2);
        let longest = BLOCK_OUTPUTS.max(self.rank.next_multiple_of(PANEL));
        let mut scratch = vec![C::default(); 2 * C::PER_WORD * longest];
        for first in (0..self.tokens).step_by(BLOCK_STEPS * C::STEP) {
            let tokens = first..self.tokens.min(first + BLOCK_STEPS * C::STEP);
            let steps = tokens.len().div_ceil(C::STEP);
            let left = &mut left[..rank_panels * steps * 2];
            let right = &mut right[..panels * steps * 2];
            pack(kernels, self.left, self.rank, 0..self.rank, &tokens, &mut scratch, left);
            for tile in &mut *left {
                (kernels.transpose)(tile);
            }
            pack(kernels, self.right, self.width, columns.clone(), &tokens, &mut scratch, right);
            let block = Block {
                weights: right,
                activations: left,
                activation_steps: steps,
                next: left,
                steps,
                width: columns.len(),
                tokens: self.rank,
                start: false,
                direction: Direction::Backward,
            };
            (loops.multiply)(&block, &mut sums);
        }
        let mut rows = [[P::default(); PANEL]; PANEL];
        for (i, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            P::finish(kernels, sums, self.transposed, &[0.0; PANEL], &mut rows);
            let (column, rank) = (i / rank_panels * PANEL, i % rank_panels * PANEL);
            let size = ((columns.len() - column).min(PANEL), (self.rank - rank).min(PANEL));
            let (first_row, first, height, length) =
                if self.transposed { (column, rank, size.0, size.1) } else { (rank, column, size.1, size.0) };
            for (i, row) in rows[..height].iter().enumerate() {
                put(first_row + i, first, &row[..length]);
            }
        }
    }
}

/// Some columns of some rows → panels of a right operand whose summed dimension is the rows.
fn pack<T: Element, C: Packable>(
    kernels: &Kernels,
    values: &[T],
    width: usize,
    columns: Range<usize>,
    tokens: &Range<usize>,
    scratch: &mut [C],
    panels: &mut [Tile],
) {
    let steps = tokens.len().div_ceil(C::STEP);
    let padded = columns.len().next_multiple_of(PANEL);
    let (group, cast) = scratch.split_at_mut(C::PER_WORD * padded);
    group.fill(C::default());
    for word in 0..steps * SIDE {
        for (j, run) in group.chunks_exact_mut(padded).enumerate() {
            let token = tokens.start + word * C::PER_WORD + j;
            if token < tokens.end {
                let row = &values[token * width..][columns.clone()];
                run[..row.len()].copy_from_slice(C::cast(kernels, row, cast));
            } else {
                run.fill(C::default());
            }
        }
        C::put_group(kernels, group, word, steps, panels);
    }
}
