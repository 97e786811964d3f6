//! The low-rank part's first product: activations times the factor they meet first.

use super::pack::Packing;
use super::{Block, Product, Span};
use crate::element::Element;
use crate::gemm::tile::{PANEL, Packable, Tile};
use crate::memory::Scratch;
use crate::parallel;
use crate::simd::Kernels;

impl<T: Element> Product<'_, T> {
    /// `hidden` [tokens, rank] = scaling × activations × factor, from the packed activations.
    pub(super) fn write_hidden<C: Packable>(
        &self,
        kernels: &Kernels,
        activations: &Packing<'_, C>,
        tokens: usize,
        hidden: &mut [T],
        threads: usize,
    ) {
        let panels = tokens.div_ceil(PANEL).div_ceil(threads).max(1);
        let groups = hidden.chunks_mut(panels * PANEL * self.rank()).enumerate();
        parallel::for_each(groups, threads, |(i, hidden)| {
            self.write_hidden_panels::<C>(kernels, activations, i * panels, hidden);
        });
    }

    /// The same for the tokens of some panels, from panel `first_panel` on.
    fn write_hidden_panels<C: Packable>(
        &self,
        kernels: &Kernels,
        activations: &Packing<'_, C>,
        first_panel: usize,
        hidden: &mut [T],
    ) {
        let (Some(low_rank), Some((factor, _)), Some(loops)) =
            (self.low_rank, self.factors(), C::panels(kernels))
        else {
            return;
        };
        let rank = low_rank.rank;
        let tokens = hidden.len() / rank;
        let (panels, rank_panels) = (tokens.div_ceil(PANEL), rank.div_ceil(PANEL));
        let mut sums = Scratch::take(rank_panels * panels * 4);
        let most_steps = activations.spans().iter().map(Span::depth_steps::<C>).max().unwrap_or(0);
        let mut weights = Scratch::take(rank_panels * most_steps * 2);
        let longest = most_steps * C::STEP;
        let mut scratch = vec![C::default(); longest.max(C::PER_WORD * rank.next_multiple_of(PANEL))];
        if activations.spans().iter().all(|span| span.depth.is_empty()) {
            sums.fill(Tile::ZERO);
        }
        let spans = activations.spans().iter().enumerate().filter(|(_, span)| !span.depth.is_empty());
        for (i, span) in spans {
            let (steps, activation_steps) = (span.depth_steps::<C>(), span.steps::<C>());
            let weights = &mut weights[..rank_panels * steps * 2];
            self.pack_factor(kernels, &factor, 0..rank, span.depth.clone(), 0..steps, &mut scratch, weights);
            let activations =
                &activations.span(i)[first_panel * activation_steps * 2..][..panels * activation_steps * 2];
            let block = Block {
                weights,
                activations,
                activation_steps,
                next: activations,
                steps,
                width: rank,
                tokens,
                start: i == 0,
                direction: self.direction,
            };
            (loops.multiply)(&block, &mut sums);
        }
        let mut rows = [[T::default(); PANEL]; PANEL];
        for (i, sums) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            self.store_hidden(kernels, sums, low_rank.scaling, &mut rows);
            let (first, token) = (i / panels * PANEL, i % panels * PANEL);
            let width = (rank - first).min(PANEL);
            for (out, row) in hidden[token * rank..].chunks_exact_mut(rank).zip(&rows) {
                out[first..first + width].copy_from_slice(&row[..width]);
            }
        }
    }

    /// Four tiles of sums → a PANEL x PANEL piece of `hidden`.
    pub(super) fn store_hidden(
        &self,
        kernels: &Kernels,
        sums: &mut [Tile; 4],
        scaling: f32,
        rows: &mut [[T; PANEL]; PANEL],
    ) {
        for word in sums.iter_mut().flat_map(|tile| tile.0.as_flattened_mut()) {
            *word = (f32::from_bits(*word) * scaling).to_bits();
        }
        T::finish(kernels, sums, self.weights_are_left(), &[0.0; PANEL], rows);
    }
}
