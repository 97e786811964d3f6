//! Products of many activation rows with a packed matrix, blocked for the caches.
//!
//! ```text
//! forward     y [tokens, out]  = x  [tokens, in]  Wᵀ  + hidden Bᵀ + bias     hidden = scaling x Aᵀ
//! backward    dX [tokens, in]  = dY [tokens, out] W   + hidden A             hidden = scaling dY B
//! ```
//!
//! The shape is that of Goto & van de Geijn (2008, "Anatomy of high-performance matrix
//! multiplication"): activations are packed once into panels of 32 tokens; a block of weights, at most
//! 288 outputs by 128 (f32) or 256 (bf16) of the summed dimension, is decoded into panels that stay in
//! the second-level cache; a microkernel multiplies panel by panel. The low-rank part is more of the
//! summed dimension, so LoRA needs no second pass over y. Panels are made of tiles, see `tile.rs`. For 16-bit
//! activations on CPUs that multiply words faster than floats, the same in fixed point: `pairs.rs`.

mod blocks;
pub mod dense;
pub mod factors;
mod hidden;
mod pack;
pub mod pairs;
mod scales;
pub mod tile;

use crate::element::{Element, Floats};
use crate::error::Error;
use crate::memory::{Scratch, advise_huge_pages};
use crate::packed_matrix::PackedMatrix;
use crate::parallel::{self, Columns};
use crate::quantize::check_length;
use crate::simd::Kernels;
use blocks::BLOCK_OUTPUTS;
use pack::Packing;
use scales::DecodedScales;
use std::ops::Range;
use tile::{BLOCK_STEPS, Block, MOST_STEPS, PANEL, Packable, Tile};

/// Packed activations may take this much per thread: what is left of 8 MiB beside sums, scales and weights, for
/// each pass over the tokens decodes all weights. Half of 512 tokens of 11,008 values are as much on two threads.
const BYTES_PER_THREAD: usize = (5 << 20) + (3 << 18);

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

/// A low-rank adapter (LoRA, arXiv 2106.09685): scaling B A is added to W.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// A [rank, in].
    pub a: Floats<'a>,
    /// B [out, rank].
    pub b: Floats<'a>,
    /// r.
    pub rank: usize,
    /// alpha / r.
    pub scaling: f32,
}

/// A or B with the length of its rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factor<'a> {
    pub(crate) values: Floats<'a>,
    pub(crate) columns: usize,
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
    pub low_rank: Option<LowRank<'a>>,
    /// Added to each row of the result.
    pub bias: Option<&'a [T]>,
}

/// The bottleneck's activations [tokens, rank].
enum Hidden<'a, T> {
    /// To be computed from the activations and the factor they meet first.
    Wanted(&'a mut [T]),
    /// Known.
    Given(&'a [T]),
}

impl<T> Hidden<'_, T> {
    fn part(&mut self, range: Range<usize>) -> Hidden<'_, T> {
        match self {
            Hidden::Wanted(hidden) => Hidden::Wanted(&mut hidden[range]),
            Hidden::Given(hidden) => Hidden::Given(&hidden[range]),
        }
    }
}

/// A piece of the summed dimension, as much as a block of decoded weights holds of it: first a piece
/// of W's, then one of the rank. Either may be empty.
#[derive(Clone, Debug, PartialEq)]
struct Span {
    depth: Range<usize>,
    rank: Range<usize>,
}

impl Span {
    /// Steps of W's part.
    fn depth_steps<C: Packable>(&self) -> usize {
        self.depth.len().div_ceil(C::STEP)
    }

    /// Steps of both.
    fn steps<C: Packable>(&self) -> usize {
        self.depth_steps::<C>() + self.rank.len().div_ceil(C::STEP)
    }

    /// Cut the summed dimension: whole if it is short, so that sums are stored once; else into
    /// pieces of [`BLOCK_STEPS`]. The rank goes with the last piece if it fits.
    fn cut<C: Packable>(depth: usize, rank: usize) -> Vec<Span> {
        let (depth_steps, rank_steps) = (depth.div_ceil(C::STEP), rank.div_ceil(C::STEP));
        let steps = if depth_steps + rank_steps <= MOST_STEPS { MOST_STEPS } else { BLOCK_STEPS };
        let length = steps * C::STEP;
        let pieces =
            |total: usize| (0..total).step_by(length).map(move |start| start..total.min(start + length));
        let mut spans: Vec<_> = pieces(depth).map(|depth| Span { depth, rank: 0..0 }).collect();
        let last = spans.last_mut().filter(|last| last.steps::<C>() + rank_steps <= MOST_STEPS);
        match last {
            Some(last) if rank <= BLOCK_STEPS * C::STEP => last.rank = 0..rank,
            _ => spans.extend(pieces(rank).map(|rank| Span { depth: depth..depth, rank })),
        }
        spans
    }
}

impl<'a, T: Element> Product<'a, T> {
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

    /// r, or zero.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.low_rank.map_or(0, |low_rank| low_rank.rank)
    }

    /// The factor that activations meet first, and the one that leads to the result; none of rank 0.
    #[must_use]
    pub(crate) fn factors(&self) -> Option<(Factor<'a>, Factor<'a>)> {
        let LowRank { a, b, rank, .. } = self.low_rank.filter(|low_rank| low_rank.rank > 0)?;
        let (a, b) =
            (Factor { values: a, columns: self.matrix.columns() }, Factor { values: b, columns: rank });
        Some(if self.direction == Direction::Forward { (a, b) } else { (b, a) })
    }

    /// Check every operand's length against the shapes, and those of the two results.
    ///
    /// # Errors
    /// [`Error::Operand`] naming the one at fault.
    pub fn check(&self, out: usize, hidden: usize) -> Result<(), Error> {
        let (outputs, depth, rank) = (self.outputs(), self.depth(), self.rank());
        check_length("x", self.activations.len(), self.tokens * depth)?;
        check_length("y", out, self.tokens * outputs)?;
        check_length("hidden", hidden, self.tokens * rank)?;
        if let Some(bias) = self.bias {
            check_length("bias", bias.len(), outputs)?;
        }
        if let Some(LowRank { a, b, .. }) = self.low_rank {
            check_length("lora_a", a.len(), rank * self.matrix.columns())?;
            check_length("lora_b", b.len(), rank * self.matrix.rows())?;
        }
        Ok(())
    }

    /// Write the product to `out` [tokens, outputs] and the bottleneck's activations to `hidden`
    /// [tokens, rank], computing in `C`.
    ///
    /// Uses about 8 MiB of scratch per thread; more only where one panel of 32 tokens is larger
    /// than most of that, beyond 47,104 summed values per thread.
    ///
    /// # Errors
    /// [`Error::Operand`] when an operand has another length than the shapes ask for.
    pub fn write<C: Packable>(
        &self,
        kernels: &Kernels,
        out: &mut [T],
        hidden: &mut [T],
        threads: usize,
    ) -> Result<(), Error> {
        self.check(out.len(), hidden.len())?;
        self.write_passes::<C>(kernels, out, Hidden::Wanted(hidden), threads.max(1));
        Ok(())
    }

    /// The same in as few passes over the tokens as the scratch allows.
    fn write_passes<C: Packable>(
        &self,
        kernels: &Kernels,
        out: &mut [T],
        mut hidden: Hidden<'_, T>,
        threads: usize,
    ) {
        let (outputs, rank) = (self.outputs(), self.rank());
        if self.tokens * (outputs + rank) == 0 {
            return;
        }
        let steps: usize = Span::cut::<C>(self.depth(), rank).iter().map(Span::steps::<C>).sum();
        let panel_bytes = steps.max(1) * 2 * size_of::<Tile>();
        let most = (BYTES_PER_THREAD * threads / panel_bytes).clamp(1, MOST_TOKENS / PANEL);
        // Every pass decodes all weights: as few as memory allows, and none of them for a small rest.
        let panels = self.tokens.div_ceil(PANEL);
        let panels = panels.div_ceil(panels.div_ceil(most).max(1)).max(1);
        for first in (0..self.tokens).step_by(panels * PANEL) {
            let tokens = first..self.tokens.min(first + panels * PANEL);
            let out = &mut out[tokens.start * outputs..tokens.end * outputs];
            let hidden = hidden.part(tokens.start * rank..tokens.end * rank);
            self.write_tokens::<C>(kernels, tokens, out, hidden, threads);
        }
    }

    /// The same for some tokens, few enough that they can be packed whole.
    fn write_tokens<C: Packable>(
        &self,
        kernels: &Kernels,
        tokens: Range<usize>,
        out: &mut [T],
        hidden: Hidden<'_, T>,
        threads: usize,
    ) {
        advise_huge_pages(out);
        let (outputs, count) = (self.outputs(), tokens.len());
        let spans = Span::cut::<C>(self.depth(), self.rank());
        let unit = scales::unit(self, threads);
        let ranges = scales::ranges(self, unit, threads);
        let mut activations = Packing::<C>::new(&spans, count);
        let mut scales = DecodedScales::new(self, ranges[0].clone(), unit);
        // One region for both: entering a team of threads costs as much as a small layer's packing.
        let mut tasks = activations.tasks(false);
        tasks.extend(scales.tasks());
        parallel::for_each(tasks, threads, |task| self.prepare::<C>(kernels, tokens.start, task));
        if self.rank() > 0 {
            let hidden = match hidden {
                Hidden::Wanted(hidden) => {
                    self.write_hidden::<C>(kernels, &activations, count, hidden, threads);
                    &*hidden
                }
                Hidden::Given(hidden) => hidden,
            };
            let tasks = activations.tasks(true);
            parallel::for_each(tasks, threads, |task| self.pack_hidden::<C>(kernels, hidden, task));
        }
        let columns = Columns::new(out, outputs);
        for (i, range) in ranges.into_iter().enumerate() {
            if i > 0 {
                scales = DecodedScales::new(self, range.clone(), unit);
                parallel::for_each(scales.tasks(), threads, |task| self.prepare::<C>(kernels, 0, task));
            }
            parallel::for_each(blocks::blocks(range, unit, threads), threads, |block| {
                let mut out = columns.take(block.clone());
                self.write_block::<C>(kernels, &activations, &scales, block, count, &mut out);
            });
        }
    }

    /// A block of outputs for all tokens: sums in four tiles of f32 per panel of weights and panel of
    /// tokens, then results.
    fn write_block<C: Packable>(
        &self,
        kernels: &Kernels,
        activations: &Packing<'_, C>,
        scales: &DecodedScales,
        outputs: Range<usize>,
        tokens: usize,
        out: &mut parallel::ColumnRange<'_, T>,
    ) {
        let (panels, weight_panels) = (tokens.div_ceil(PANEL), outputs.len().div_ceil(PANEL));
        let mut sums = Scratch::take(weight_panels * panels * 4);
        let spans = activations.spans();
        let most_steps = spans.iter().map(Span::steps::<C>).max().unwrap_or(0);
        let mut weights = Scratch::take(weight_panels * most_steps * 2);
        let mut scratch = vec![C::default(); (most_steps * C::STEP).max(2 * BLOCK_OUTPUTS)];
        let Some(loops) = C::panels(kernels) else { return };
        let mut rows = [[T::default(); PANEL]; PANEL];
        if spans.is_empty() {
            sums.fill(Tile::ZERO);
        }
        for (i, span) in spans.iter().enumerate() {
            let steps = span.steps::<C>();
            let weights = &mut weights[..weight_panels * steps * 2];
            self.fill(kernels, scales, outputs.clone(), span, &mut scratch, weights);
            let block = Block {
                weights,
                activations: activations.span(i),
                activation_steps: steps,
                // After the last span, this thread's next block of outputs starts with the first.
                next: activations.span((i + 1) % spans.len()),
                steps,
                width: outputs.len(),
                tokens,
                start: i == 0,
                direction: self.direction,
            };
            if i + 1 < spans.len() {
                (loops.multiply)(&block, &mut sums);
            }
        }
        // The last span goes by two panels of weights: what becomes a result is still at hand.
        let last = spans.len().saturating_sub(1);
        for (pair, sums) in sums.chunks_mut(2 * panels * 4).enumerate() {
            let first = 2 * pair * PANEL;
            let width = (outputs.len() - first).min(2 * PANEL);
            if let Some(span) = spans.last() {
                let tiles = span.steps::<C>() * 2;
                let block = Block {
                    weights: &weights[2 * pair * tiles..][..width.div_ceil(PANEL) * tiles],
                    activations: activations.span(last),
                    activation_steps: span.steps::<C>(),
                    next: &activations.span(0)[..0],
                    steps: span.steps::<C>(),
                    width,
                    tokens,
                    start: last == 0,
                    direction: self.direction,
                };
                (loops.multiply)(&block, sums);
            }
            for (i, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let first = first + i / panels * PANEL;
                let bias = self.bias.map(|bias| &bias[outputs.start + first..]);
                let (first_token, width) = (i % panels * PANEL, (outputs.len() - first).min(PANEL));
                let size = (width, (tokens - first_token).min(PANEL));
                self.store(kernels, sums, first, first_token, size, bias, &mut rows, out);
            }
        }
    }

    /// Four tiles of sums → a PANEL x PANEL piece of the result.
    #[allow(clippy::too_many_arguments)]
    fn store(
        &self,
        kernels: &Kernels,
        sums: &mut [Tile; 4],
        first: usize,
        first_token: usize,
        (width, tokens): (usize, usize),
        bias: Option<&[T]>,
        rows: &mut [[T; PANEL]; PANEL],
        out: &mut parallel::ColumnRange<'_, T>,
    ) {
        let mut addend = [0.0; PANEL];
        if let Some(bias) = bias {
            for (addend, bias) in addend.iter_mut().zip(&bias[..width]) {
                *addend = bias.to_f32();
            }
        }
        T::finish(kernels, sums, self.weights_are_left(), &addend, rows);
        for (token, row) in rows[..tokens].iter().enumerate() {
            let out = out.row_mut(first_token + token, first, width);
            // A length that the compiler knows becomes a few moves instead of a call.
            match <&mut [T; PANEL]>::try_from(&mut *out) {
                Ok(out) => *out = *row,
                Err(_) => out.copy_from_slice(&row[..width]),
            }
        }
    }
}

#[cfg(test)]
mod tests;
