//! The low-rank part's first product, from packed activations, and its result packed in turn.

use super::pack::{Packed, WhichFactor::First};
use super::panel::{self, PairBlock};
use super::steps;
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
    refused: &'a mut [bool],
}

impl<T: Element> Product<'_, T> {
    /// Write `hidden` [tokens, rank] = scaling × activations × factor for the panels `left`, and the same
    /// packed, refusing rows that are not finite or too large.
    pub(super) fn write_hidden_pairs(
        &self,
        kernels: &Kernels,
        pairs: &PairPanels,
        (activations, left): (&Packed, &[usize]),
        (hidden, packed, refused): (&mut [T], &mut Packed, &mut [bool]),
        threads: usize,
    ) {
        if self.rank() == 0 {
            return;
        }
        let tiles = packed.tiles_per_panel();
        let parts = hidden.chunks_mut(PANEL * self.rank()).zip(packed.tiles.chunks_exact_mut(tiles));
        let parts = parts.zip(refused.chunks_exact_mut(PANEL)).enumerate();
        let panels =
            parts.map(|(index, ((hidden, tiles), refused))| HiddenPanel { index, hidden, tiles, refused });
        let mut panels: Vec<_> = panels.filter(|panel| left.binary_search(&panel.index).is_ok()).collect();
        let share = panels.len().div_ceil(threads).max(1);
        let pieces = &packed.pieces;
        parallel::for_each(panels.chunks_mut(share), threads, |panels| {
            self.write_hidden_share(kernels, pairs, activations, panels);
            for HiddenPanel { hidden, tiles, refused, .. } in panels {
                self.pack_panel(
                    kernels,
                    pairs,
                    (hidden, self.rank()),
                    pieces,
                    f32::INFINITY,
                    (tiles, refused),
                );
            }
        });
    }

    fn write_hidden_share(
        &self,
        kernels: &Kernels,
        pairs: &PairPanels,
        activations: &Packed,
        panels: &mut [HiddenPanel<'_, T>],
    ) {
        let Some(low_rank) = self.low_rank else { return };
        let rank = low_rank.rank;
        let (count, rank_panels) = (panels.len(), rank.div_ceil(PANEL));
        let mut sums = Scratch::take(rank_panels * count * 4);
        let most_tiles = activations.pieces.iter().map(|piece| panel::tiles(steps(piece))).max();
        let mut weights = Scratch::take(rank_panels * most_tiles.unwrap_or(0));
        for (i, piece) in activations.pieces.iter().enumerate() {
            let weights = &mut weights[..rank_panels * panel::tiles(steps(piece))];
            self.fill_factor(kernels, pairs, First, &(0..rank), piece, weights);
            let of_panels: Vec<_> = panels.iter().map(|panel| activations.piece(panel.index, i)).collect();
            let block = PairBlock {
                weights,
                activations: &of_panels,
                next: &[],
                steps: steps(piece),
                width: rank,
                tokens: panels.iter().map(|panel| panel.hidden.len() / rank).sum(),
                start: i == 0,
                direction: self.direction,
            };
            (pairs.multiply)(&block, &mut sums);
        }
        let mut rows = [[T::default(); PANEL]; PANEL];
        for (i, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            self.store_hidden(kernels, sums, low_rank.scaling, &mut rows);
            let first = i / count * PANEL;
            let width = (rank - first).min(PANEL);
            for (out, row) in panels[i % count].hidden.chunks_exact_mut(rank).zip(&rows) {
                out[first..first + width].copy_from_slice(&row[..width]);
            }
        }
    }
}
