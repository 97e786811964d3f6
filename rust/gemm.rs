//! Products of many activation rows with a packed matrix, blocked for the caches.
//!
//! ```text
//! forward     y [tokens, out]  = x  [tokens, in]  Wᵀ  + hidden [tokens, r] Bᵀ + bias
//! backward    dX [tokens, in]  = dY [tokens, out] W   + hidden [tokens, r] A
//! ```
//!
//! The shape is that of Goto & van de Geijn (2008, "Anatomy of high-performance matrix
//! multiplication"): activations are packed once into panels of 32 tokens; a block of weights, 256
//! outputs by 128 (f32) or 256 (bf16) of the summed dimension, is decoded into panels that stay in the
//! second-level cache; a microkernel multiplies panel by panel. The low-rank operand is more of the
//! summed dimension, so LoRA needs no second pass over y. Panels are made of tiles, see `tile.rs`.

mod pack;
pub mod tile;

use crate::element::Element;
use crate::error::Error;
use crate::memory::{Scratch, advise_huge_pages};
use crate::packed_matrix::PackedMatrix;
use crate::parallel::{self, Columns};
use crate::quantize::check_length;
use crate::simd::Kernels;
use std::ops::Range;
use tile::{Block, PANEL, Packable, Tile};

/// Outputs of a block of decoded weights.
const BLOCK_OUTPUTS: usize = 256;

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

/// Operands of one product.
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

/// A piece of the summed dimension: at most [`Packable::BLOCK_STEPS`] steps.
#[derive(Clone, Debug)]
struct Span {
    low_rank: bool,
    depth: Range<usize>,
}

impl Span {
    fn steps<T: Packable>(&self) -> usize {
        self.depth.len().div_ceil(T::STEP)
    }
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
    /// Uses about 8 MiB of scratch per thread; more only where one panel of 32 tokens is larger
    /// than that, beyond 32,768 summed values per thread.
    ///
    /// # Errors
    /// [`Error::Operand`] when an operand has another length than the shapes ask for.
    pub fn write(&self, kernels: &Kernels, out: &mut [T], threads: usize) -> Result<(), Error> {
        self.check(out.len())?;
        let outputs = self.outputs();
        if out.is_empty() {
            return Ok(());
        }
        let steps: usize = self.spans().iter().map(Span::steps::<T>).sum();
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
        let outputs = self.outputs();
        let panels = tokens.div_ceil(PANEL);
        let spans = self.spans();
        advise_huge_pages(out);
        let steps: usize = spans.iter().map(Span::steps::<T>).sum();
        let mut activations = Scratch::take(panels * steps * 2);
        // A span's panels lie together: panels a power of two apart would share cache sets.
        let mut rest = &mut activations[..];
        let mut parts = Vec::with_capacity(spans.len());
        for span in &spans {
            let (part, after) = rest.split_at_mut(panels * span.steps::<T>() * 2);
            parts.push((span, part));
            rest = after;
        }
        parallel::for_each(parts, threads, |(span, part)| self.pack(kernels, first, tokens, span, part));
        let wide = outputs.div_ceil(4 * threads.max(1)).next_multiple_of(2 * PANEL).min(BLOCK_OUTPUTS);
        let columns = Columns::new(out, outputs);
        parallel::for_each((0..outputs).step_by(wide), threads, |start| {
            let width = wide.min(outputs - start);
            let mut sums = Scratch::take(width.div_ceil(PANEL) * panels * 4);
            self.sum_block(kernels, &activations, &spans, start, width, tokens, &mut sums);
            let mut range = columns.take(start..start + width);
            for (i, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let (weights, tokens_at) = (i / panels * PANEL, i % panels * PANEL);
                let bias = self.bias.map(|bias| &bias[start + weights..]);
                let size = ((width - weights).min(PANEL), (tokens - tokens_at).min(PANEL));
                self.store(kernels, sums, weights, tokens_at, size, bias, &mut range);
            }
        });
    }

    /// The summed dimension in pieces: that of W, then that of the low-rank part.
    fn spans(&self) -> Vec<Span> {
        let cut = |depth: usize, low_rank: bool| {
            let length = T::BLOCK_STEPS * T::STEP;
            let starts = (0..depth).step_by(length);
            starts.map(move |start| Span { low_rank, depth: start..depth.min(start + length) })
        };
        let rank = self.low_rank.map_or(0, |low_rank| low_rank.rank);
        cut(self.depth(), false).chain(cut(rank, true)).collect()
    }

    /// All sums of a block of outputs: four tiles of f32 per panel of weights and panel of tokens.
    fn sum_block(
        &self,
        kernels: &Kernels,
        activations: &[Tile],
        spans: &[Span],
        start: usize,
        width: usize,
        tokens: usize,
        sums: &mut [Tile],
    ) {
        if spans.is_empty() {
            sums.fill(Tile::ZERO);
        }
        let (panels, weight_panels) = (tokens.div_ceil(PANEL), width.div_ceil(PANEL));
        let mut weights = Scratch::take(weight_panels * T::BLOCK_STEPS * 2);
        let mut scratch = vec![T::default(); (T::BLOCK_STEPS * T::STEP).max(2 * BLOCK_OUTPUTS)];
        let all = activations;
        let mut rest = activations;
        for (i, span) in spans.iter().enumerate() {
            let steps = span.steps::<T>();
            let weights = &mut weights[..weight_panels * steps * 2];
            self.fill(kernels, start, width, span, &mut scratch, weights);
            let (activations, after) = rest.split_at(panels * steps * 2);
            // After the last span, this thread's next block of outputs starts over with the first.
            rest = after;
            let next = if rest.is_empty() { all } else { rest };
            let direction = self.direction;
            let block = Block { weights, activations, next, steps, width, tokens, start: i == 0, direction };
            T::multiply(kernels)(&block, sums);
        }
    }

    /// Four tiles of sums → a PANEL x PANEL piece of the result.
    #[allow(clippy::too_many_arguments)]
    fn store(
        &self,
        kernels: &Kernels,
        sums: &mut [Tile; 4],
        weights: usize,
        tokens: usize,
        size: (usize, usize),
        bias: Option<&[T]>,
        out: &mut parallel::ColumnRange<'_, T>,
    ) {
        let mut addend = [0.0; PANEL];
        if let Some(bias) = bias {
            for (addend, bias) in addend.iter_mut().zip(&bias[..size.0]) {
                *addend = bias.to_f32();
            }
        }
        let mut rows = [[T::default(); PANEL]; PANEL];
        T::finish(kernels)(sums, self.direction == Direction::Forward, &addend, &mut rows);
        for (token, row) in rows[..size.1].iter().enumerate() {
            out.row_mut(tokens + token, weights, size.0).copy_from_slice(&row[..size.0]);
        }
    }
}

#[cfg(test)]
mod tests;
