//! Products of many rows of 16-bit activations with a packed matrix, in fixed point (`simd/fixed.rs`): on
//! CPUs without fast products of bf16, those of words are twice as many per cycle as those of f32.
//!
//! The shape is that of `gemm.rs`, panels are made of pairs of words (`pairs/panel.rs`). A row of activations
//! that would lose too much is carried by two rows, whose products are added. Panels that have many of those,
//! and rows that are not finite, are computed in f32 afterwards; which those are depends on the rows alone, not
//! on the number of threads.

pub mod factor;
mod hidden;
mod pack;
pub mod panel;

use super::scales::{self, DecodedScales};
use super::tile::{BLOCK_STEPS, PANEL, SIDE, Tile};
use super::{BYTES_PER_THREAD, Direction, MOST_TOKENS, Product, blocks};
use crate::element::Element;
use crate::error::Error;
use crate::memory::{Scratch, advise_huge_pages};
use crate::parallel::{self, ColumnRange, Columns};
use crate::simd::{Kernels, PairPanels};
use pack::{Packed, RowState, Task, WhichFactor::Second};
use panel::PairBlock;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Rows of a panel that may be carried twice; with more, all of the panel's rows are computed in f32, which
/// takes as long.
const MOST_TWICE: usize = PANEL / 2;

/// What rows that are computed in f32 at a time, and their results, may take per thread.
const APART_BYTES: usize = 2 << 20;

/// The summed dimension in pieces of whole units, of nearly one length and [`BLOCK_STEPS`] at most.
fn cut(length: usize) -> Vec<Range<usize>> {
    let units = length.div_ceil(panel::UNIT);
    let pieces = units.div_ceil(BLOCK_STEPS / panel::UNIT_STEPS).max(1);
    let piece = units.div_ceil(pieces).max(1) * panel::UNIT;
    (0..length).step_by(piece).map(|start| start..length.min(start + piece)).collect()
}

/// Steps of a piece.
fn steps(piece: &Range<usize>) -> usize {
    piece.len().div_ceil(panel::STEP)
}

/// Tiles of a panel's pieces.
fn tiles(pieces: &[Range<usize>]) -> usize {
    pieces.iter().map(|piece| panel::tiles(steps(piece))).sum()
}

impl<T: Element> Product<'_, T> {
    /// Write the product as [`Self::write`] does, from activations in fixed point. Returns false where that
    /// cannot be done, what was written then being worth nothing: where there is nothing to sum or write, for
    /// this element type, on this CPU, for blocks of 32 or rows that do not start with a block, or where what
    /// would share a unit has little in common (`pairs/pack.rs`): values of a factor, or, backward, the absmax
    /// of 64 rows of W.
    ///
    /// Errors are small beside typical results of a row, and beside its large activations even where weights
    /// of zero hide those. The bottleneck's activations are taken as they are: of one, what is less than 2^-15
    /// of the largest may be lost.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_pairs(
        &self,
        kernels: &Kernels,
        out: &mut [T],
        hidden: &mut [T],
        threads: usize,
    ) -> Result<bool, Error> {
        self.check(out.len(), hidden.len())?;
        let (outputs, rank, depth, threads) = (self.outputs(), self.rank(), self.depth(), threads.max(1));
        let fits = size_of::<T>() == 2 && self.matrix.block_size() >= 64 && self.matrix.rows_are_aligned();
        let Some(pairs) = kernels.panels_pairs.as_ref().filter(|_| fits) else { return Ok(false) };
        if self.tokens * outputs * depth == 0 || !self.factors_are_even(kernels) {
            return Ok(false);
        }
        // With the room that rows which are carried twice may take.
        let panel_bytes = tiles(&cut(depth)) * size_of::<Tile>() * (PANEL + MOST_TWICE) / PANEL;
        let most = (BYTES_PER_THREAD * threads / panel_bytes).clamp(1, MOST_TOKENS / PANEL);
        // Every pass decodes all weights: as few as memory allows, and none of them for a small rest.
        let panels = self.tokens.div_ceil(PANEL);
        let panels = panels.div_ceil(panels.div_ceil(most));
        for first in (0..self.tokens).step_by(panels * PANEL) {
            let tokens = first..self.tokens.min(first + panels * PANEL);
            let out = &mut out[tokens.start * outputs..tokens.end * outputs];
            let hidden = &mut hidden[tokens.start * rank..tokens.end * rank];
            if !self.part(tokens).write_pass(kernels, pairs, out, hidden, threads)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The product for some tokens.
    fn part(&self, tokens: Range<usize>) -> Self {
        let activations = &self.activations[tokens.start * self.depth()..tokens.end * self.depth()];
        Self { activations, tokens: tokens.len(), ..*self }
    }

    /// The same for tokens few enough that they can be packed whole.
    fn write_pass(
        &self,
        kernels: &Kernels,
        pairs: &PairPanels,
        out: &mut [T],
        hidden: &mut [T],
        threads: usize,
    ) -> Result<bool, Error> {
        advise_huge_pages(out);
        let panels = self.tokens.div_ceil(PANEL);
        let mut activations = Packed::new(cut(self.depth()), panels);
        let mut states = vec![RowState::Once; panels * PANEL];
        let unit = scales::unit(self, threads);
        let ranges = scales::ranges(self, unit, threads);
        let mut scales = DecodedScales::new(self, ranges[0].clone(), unit);
        let uneven = AtomicBool::new(false);
        let mut tasks: Vec<_> = scales.tasks().into_iter().map(Task::Scales).collect();
        tasks.extend(activations.tasks(&mut states));
        parallel::for_each(tasks, threads, |task| self.do_task(kernels, pairs, task, &uneven));
        if uneven.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let mut kept = Vec::new();
        for (panel, states) in states.chunks_exact_mut(PANEL).enumerate() {
            if states.iter().filter(|state| **state == RowState::Twice).count() <= MOST_TWICE {
                kept.push(panel);
            } else {
                states.fill(RowState::Apart);
            }
        }
        if !kept.is_empty() {
            let twice: Vec<_> = (0..self.tokens).filter(|&token| states[token] == RowState::Twice).collect();
            let losses = self.pack_all_losses(kernels, pairs, &twice, &mut states, threads);
            // The hidden activations of rows include those of their losses, whose panels thus have none: zeros.
            let mut low_rank = Packed::new(cut(self.rank()), panels + 1);
            low_rank.clear(panels);
            let carried = Carried { activations: &activations, losses: &losses, twice: &twice };
            self.write_hidden_pairs(
                kernels,
                pairs,
                (carried, &kept),
                (hidden, &mut low_rank, &mut states),
                threads,
            );
            let pass = Pass::new(carried, &low_rank, &kept, self.tokens);
            let columns = Columns::new(&mut *out, self.outputs());
            for (i, range) in ranges.into_iter().enumerate() {
                if i > 0 {
                    scales = DecodedScales::new(self, range.clone(), unit);
                    let tasks: Vec<_> = scales.tasks().into_iter().map(Task::Scales).collect();
                    parallel::for_each(tasks, threads, |task| self.do_task(kernels, pairs, task, &uneven));
                }
                if uneven.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                parallel::for_each(blocks::blocks(range, unit, threads), threads, |block| {
                    let mut out = columns.take(block.clone());
                    self.write_pair_block(kernels, pairs, &pass, &scales, block, &mut out);
                });
            }
        }
        // Their memory serves the next product.
        drop((activations, scales));
        let apart: Vec<_> = (0..self.tokens).filter(|&token| states[token] == RowState::Apart).collect();
        self.write_apart(kernels, &apart, out, hidden, threads)?;
        Ok(true)
    }

    /// What the rows `twice` lose, packed; rows that this fails for are to be computed apart.
    fn pack_all_losses(
        &self,
        kernels: &Kernels,
        pairs: &PairPanels,
        twice: &[usize],
        states: &mut [RowState],
        threads: usize,
    ) -> Packed {
        let mut losses = Packed::new(cut(self.depth()), twice.len().div_ceil(PANEL));
        let mut found = vec![RowState::Twice; twice.len()];
        let tiles = losses.tiles.chunks_exact_mut(tiles(&losses.pieces));
        let tasks: Vec<_> = tiles.zip(twice.chunks(PANEL).zip(found.chunks_mut(PANEL))).collect();
        parallel::for_each(tasks, threads, |(tiles, (tokens, states))| {
            self.pack_losses(kernels, pairs, tokens, &losses.pieces, (tiles, states));
        });
        for (token, state) in twice.iter().zip(found) {
            states[*token] = state;
        }
        losses
    }

    /// A block of outputs for all tokens, as [`Self::write_block`].
    fn write_pair_block(
        &self,
        kernels: &Kernels,
        pairs: &PairPanels,
        pass: &Pass<'_>,
        scales: &DecodedScales,
        outputs: Range<usize>,
        out: &mut ColumnRange<'_, T>,
    ) {
        let (panels, weight_panels) = (pass.panels(), outputs.len().div_ceil(PANEL));
        let mut sums = Scratch::take(weight_panels * panels * 4);
        let mut weights = Scratch::take(weight_panels * pass.most_tiles());
        let mut rows = [[T::default(); PANEL]; PANEL];
        for (i, summand) in pass.summands.iter().enumerate() {
            let steps = steps(&summand.piece);
            let panel_tiles = panel::tiles(steps);
            let weights = &mut weights[..weight_panels * panel_tiles];
            if summand.of_rank {
                self.fill_factor(kernels, pairs, Second, &outputs, &summand.piece, weights);
            } else {
                self.fill_pairs(pairs, scales, &outputs, &summand.piece, weights);
            }
            let next = pass.summands.get(i + 1).map_or(&[][..], |next| &next.panels);
            let mut block = PairBlock {
                weights,
                activations: &summand.panels,
                next,
                steps,
                width: outputs.len(),
                tokens: pass.tokens,
                start: i == 0,
                direction: self.direction,
            };
            if i + 1 < pass.summands.len() {
                (pairs.multiply)(&block, &mut sums);
                continue;
            }
            // The last piece goes by two panels of weights: what becomes a result is still at hand.
            for (pair, sums) in sums.chunks_mut(2 * panels * 4).enumerate() {
                let first = 2 * pair * PANEL;
                block.width = (outputs.len() - first).min(2 * PANEL);
                block.weights =
                    &weights[2 * pair * panel_tiles..][..block.width.div_ceil(PANEL) * panel_tiles];
                (pairs.multiply)(&block, sums);
                sums.chunks_exact_mut(panels * 4)
                    .for_each(|sums| pass.carried.add_losses(self.direction, pass.kept, sums));
                for (i, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let Some(panel) = pass.kept.get(i % panels) else { continue };
                    let first = first + i / panels * PANEL;
                    let bias = self.bias.map(|bias| &bias[outputs.start + first..]);
                    let first_token = panel * PANEL;
                    let size = ((outputs.len() - first).min(PANEL), (self.tokens - first_token).min(PANEL));
                    self.store(kernels, sums, first, first_token, size, bias, &mut rows, out);
                }
            }
        }
    }

    /// Some rows in f32.
    fn write_apart(
        &self,
        kernels: &Kernels,
        apart: &[usize],
        out: &mut [T],
        hidden: &mut [T],
        threads: usize,
    ) -> Result<(), Error> {
        let (outputs, depth, rank) = (self.outputs(), self.depth(), self.rank());
        if apart.len() == self.tokens {
            return self.write::<f32>(kernels, out, hidden, threads);
        }
        let row_bytes = (depth + outputs + rank) * size_of::<T>();
        let most = (APART_BYTES * threads / row_bytes).next_multiple_of(PANEL).max(PANEL);
        for apart in apart.chunks(most) {
            let rows = apart.iter().flat_map(|&row| &self.activations[row * depth..][..depth]);
            let rows: Vec<T> = rows.copied().collect();
            let part = Product { activations: &rows, tokens: apart.len(), ..*self };
            let mut of_rows = vec![T::default(); apart.len() * outputs];
            let mut hidden_of_rows = vec![T::default(); apart.len() * rank];
            part.write::<f32>(kernels, &mut of_rows, &mut hidden_of_rows, threads)?;
            for (i, row) in apart.iter().enumerate() {
                out[row * outputs..][..outputs].copy_from_slice(&of_rows[i * outputs..][..outputs]);
                hidden[row * rank..][..rank].copy_from_slice(&hidden_of_rows[i * rank..][..rank]);
            }
        }
        Ok(())
    }
}

/// A piece of what is summed, and its activations.
struct Summand<'a> {
    piece: Range<usize>,
    /// Of the rank, not of the weight's dimension.
    of_rank: bool,
    panels: Vec<&'a [Tile]>,
}

/// Packed rows of activations, and rows of what some of them lose.
#[derive(Clone, Copy)]
struct Carried<'a> {
    activations: &'a Packed,
    losses: &'a Packed,
    /// The rows that the losses are of.
    twice: &'a [usize],
}

impl<'a> Carried<'a> {
    /// Panels of losses.
    fn loss_panels(&self) -> usize {
        self.twice.len().div_ceil(PANEL)
    }

    /// Piece `i` of some panels of activations, then of those of losses.
    fn panels(&self, chosen: impl Iterator<Item = usize>, i: usize) -> Vec<&'a [Tile]> {
        let Self { activations, losses, .. } = *self;
        let panels = chosen.map(|panel| activations.piece(panel, i));
        panels.chain((0..self.loss_panels()).map(|panel| losses.piece(panel, i))).collect()
    }

    /// Rows of all those panels, of which there are `chosen` before the losses, with `tokens` rows.
    fn tokens(&self, chosen: usize, tokens: usize) -> usize {
        if self.twice.is_empty() { tokens } else { chosen * PANEL + self.twice.len() }
    }

    /// Add the products of what rows lose to those of the rows: the sums of one panel of weights, for the
    /// panels `chosen` (in order), then for the losses.
    fn add_losses(&self, direction: Direction, chosen: &[usize], sums: &mut [Tile]) {
        let (sums, losses) = sums.split_at_mut(chosen.len() * 4);
        for (i, row) in self.twice.iter().enumerate() {
            let Ok(panel) = chosen.binary_search(&(row / PANEL)) else { continue };
            let (from, from_half) = (&losses[i / PANEL * 4..][..4], i % PANEL / SIDE);
            let (to, to_half) = (&mut sums[panel * 4..][..4], row % PANEL / SIDE);
            let (from_lane, to_lane) = (i % SIDE, row % SIDE);
            for half in 0..2 {
                if direction == Direction::Forward {
                    let (from, to) = (&from[half * 2 + from_half], &mut to[half * 2 + to_half]);
                    for (from, to) in from.0.iter().zip(&mut to.0) {
                        add(&mut to[to_lane], from[from_lane]);
                    }
                } else {
                    let (from, to) = (&from[from_half * 2 + half], &mut to[to_half * 2 + half]);
                    for (from, to) in from.0[from_lane].iter().zip(&mut to.0[to_lane]) {
                        add(to, *from);
                    }
                }
            }
        }
    }
}

/// What a block of outputs is computed from.
struct Pass<'a> {
    carried: Carried<'a>,
    summands: Vec<Summand<'a>>,
    /// The panels that are not computed apart.
    kept: &'a [usize],
    /// Rows of all panels.
    tokens: usize,
}

impl<'a> Pass<'a> {
    fn new(carried: Carried<'a>, low_rank: &'a Packed, kept: &'a [usize], tokens: usize) -> Self {
        let zeros = tokens.div_ceil(PANEL);
        let of_depth = carried.activations.pieces.iter().enumerate().map(|(i, piece)| {
            let panels = carried.panels(kept.iter().copied(), i);
            Summand { piece: piece.clone(), of_rank: false, panels }
        });
        let of_rank = low_rank.pieces.iter().enumerate().map(|(i, piece)| {
            let panels = kept.iter().copied().chain((0..carried.loss_panels()).map(|_| zeros));
            let panels = panels.map(|panel| low_rank.piece(panel, i)).collect();
            Summand { piece: piece.clone(), of_rank: true, panels }
        });
        let summands = of_depth.chain(of_rank).collect();
        let tokens = kept.iter().map(|&panel| (tokens - panel * PANEL).min(PANEL)).sum();
        Self { carried, summands, kept, tokens: carried.tokens(kept.len(), tokens) }
    }

    /// Panels of activations and losses.
    fn panels(&self) -> usize {
        self.kept.len() + self.carried.loss_panels()
    }

    /// Tiles of the longest piece's panels.
    fn most_tiles(&self) -> usize {
        self.summands.iter().map(|summand| panel::tiles(steps(&summand.piece))).max().unwrap_or(0)
    }
}

/// Add f32 as bits.
fn add(to: &mut u32, from: u32) {
    *to = (f32::from_bits(*to) + f32::from_bits(from)).to_bits();
}

#[cfg(test)]
mod tests;
