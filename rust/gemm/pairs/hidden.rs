//! The low-rank part's first product, from packed activations, and its result packed in turn.

use super::pack::{Packed, RowState, WhichFactor::First};
use super::panel::{self, PairBlock};
use super::{Carried, steps};
use crate::element::Element;
use crate::gemm::Product;
use crate::gemm::tile::{PANEL, Tile};
use crate::memory::Scratch;
use crate::parallel;
use crate::simd::{Kernels, PairPanels};

/// A panel of tokens.
struct HiddenPanel<'a, T> {
    /// Which one.
    index: usize,
    /// Its bottleneck activations [tokens, rank].
    hidden: &'a mut [T],
    /// The same packed.
    tiles: &'a mut [Tile],
    states: &'a mut [RowState],
}

impl<T: Element> Product<'_, T> {
    /// Write `hidden` [tokens, rank] = scaling × activations × factor for the panels `kept`, and the same
    /// packed; rows that are not finite or too large are to be computed apart.
    pub(super) fn write_hidden_pairs(
        &self,
        kernels: &Kernels,
        pairs: &PairPanels,
        (carried, kept): (Carried<'_>, &[usize]),
        (hidden, packed, states): (&mut [T], &mut Packed, &mut [RowState]),
        threads: usize,
    ) {
        if self.rank() == 0 {
            return;
        }
        let tiles = packed.tiles_per_panel();
        let parts = hidden.chunks_mut(PANEL * self.rank()).zip(packed.tiles.chunks_exact_mut(tiles));
        let parts = parts.zip(states.chunks_exact_mut(PANEL)).enumerate();
        let panels =
            parts.map(|(index, ((hidden, tiles), states))| HiddenPanel { index, hidden, tiles, states });
        let mut panels: Vec<_> = panels.filter(|panel| kept.binary_search(&panel.index).is_ok()).collect();
        let share = panels.len().div_ceil(threads).max(1);
        let pieces = &packed.pieces;
        parallel::for_each(panels.chunks_mut(share), threads, |panels| {
            self.write_hidden_share(kernels, pairs, carried, panels);
            let rank = self.rank();
            for HiddenPanel { hidden, tiles, states, .. } in panels {
                self.pack_panel(
                    kernels,
                    hidden.chunks_exact(rank),
                    rank,
                    pieces,
                    tiles,
                    |token, row, prepared| {
                        let finite = (pairs.prepare)(row, f32::INFINITY, prepared);
                        if !finite {
                            states[token] = RowState::Apart;
                        }
                        finite
                    },
                );
            }
        });
    }

    fn write_hidden_share(
        &self,
        kernels: &Kernels,
        pairs: &PairPanels,
        carried: Carried<'_>,
        panels: &mut [HiddenPanel<'_, T>],
    ) {
        let Some(low_rank) = self.low_rank else { return };
        let rank = low_rank.rank;
        let chosen: Vec<_> = panels.iter().map(|panel| panel.index).collect();
        let (count, rank_panels) = (panels.len() + carried.loss_panels(), rank.div_ceil(PANEL));
        let tokens = panels.iter().map(|panel| panel.hidden.len() / rank).sum();
        let mut sums = Scratch::take(rank_panels * count * 4);
        let most_tiles = carried.activations.pieces.iter().map(|piece| panel::tiles(steps(piece))).max();
        let mut weights = Scratch::take(rank_panels * most_tiles.unwrap_or(0));
        for (i, piece) in carried.activations.pieces.iter().enumerate() {
            let weights = &mut weights[..rank_panels * panel::tiles(steps(piece))];
            self.fill_factor(kernels, pairs, First, &(0..rank), piece, weights);
            let block = PairBlock {
                weights,
                activations: &carried.panels(chosen.iter().copied(), i),
                next: &[],
                steps: steps(piece),
                width: rank,
                tokens: carried.tokens(panels.len(), tokens),
                start: i == 0,
                direction: self.direction,
            };
            (pairs.multiply)(&block, &mut sums);
        }
        sums.chunks_exact_mut(count * 4).for_each(|sums| carried.add_losses(self.direction, &chosen, sums));
        let mut rows = [[T::default(); PANEL]; PANEL];
        for (i, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let Some(panel) = panels.get_mut(i % count) else { continue };
            self.store_hidden(kernels, sums, low_rank.scaling, &mut rows);
            let first = i / count * PANEL;
            let width = (rank - first).min(PANEL);
            for (out, row) in panel.hidden.chunks_exact_mut(rank).zip(&rows) {
                out[first..first + width].copy_from_slice(&row[..width]);
            }
        }
    }
}
