//! The low-rank part of a product of few rows: hidden = scaling x Aᵀ, then hidden Bᵀ.

use crate::element::{Element, Floats};
use crate::gemm::Product;
use crate::memory::Scratch;
use crate::parallel::{self, Columns};
use crate::simd::Kernels;
use std::ops::Range;

/// Fewer multiplications than this are not worth a second thread.
const SMALL_PRODUCT: usize = 1 << 15;

/// Tokens whose activations are held widened at a time.
const WIDENED_TOKENS: usize = 8;

/// Rows of A that are multiplied at a time: one unit of parallel work.
const FACTOR_ROWS: usize = 8;

/// `hidden` [tokens, rank] = scaling x Aᵀ.
pub(super) fn write_hidden<T: Element>(
    product: &Product<'_, T>,
    kernels: &Kernels,
    hidden: &mut [T],
    threads: usize,
) {
    let (Some(low_rank), Some((factor, _))) = (product.low_rank, product.factors()) else { return };
    let (rank, columns) = (low_rank.rank, factor.columns);
    if columns == 0 {
        return hidden.fill(T::default());
    }
    let threads = if rank * columns * product.tokens < SMALL_PRODUCT { 1 } else { threads };
    let mut x = Scratch::of::<f32>(product.tokens.min(WIDENED_TOKENS) * columns);
    let groups = product.activations.chunks(WIDENED_TOKENS * columns);
    for (activations, hidden) in groups.zip(hidden.chunks_mut(WIDENED_TOKENS * rank)) {
        let x = &mut x.values_mut()[..activations.len()];
        T::widen(kernels, activations, x);
        let hidden = Columns::new(hidden, rank);
        parallel::for_each((0..rank).step_by(FACTOR_ROWS), threads, |first| {
            let height = (rank - first).min(FACTOR_ROWS);
            let mut scratch = Scratch::of::<f32>(height * columns);
            let range = first * columns..(first + height) * columns;
            let rows = factor.values.widened(kernels, range, scratch.values_mut());
            let mut hidden = hidden.take(first..first + height);
            let mut sums = [0.0; FACTOR_ROWS];
            for (token, x) in x.chunks_exact(columns).enumerate() {
                (kernels.matrix_vector)(rows, x, &mut sums[..height]);
                for (out, sum) in hidden.row_mut(token, 0, height).iter_mut().zip(sums) {
                    *out = T::from_f32(low_rank.scaling * sum);
                }
            }
        });
    }
}

/// hidden Bᵀ.
pub(super) struct Outer<'a> {
    hidden: Scratch,
    factor: Floats<'a>,
    rank: usize,
}

impl<'a> Outer<'a> {
    pub(super) fn new<T: Element>(kernels: &Kernels, factor: Floats<'a>, hidden: &[T], rank: usize) -> Self {
        let mut wide = Scratch::of::<f32>(hidden.len());
        T::widen(kernels, hidden, &mut wide.values_mut()[..hidden.len()]);
        Self { hidden: wide, factor, rank }
    }

    /// Ask for some rows of B.
    pub(super) fn fetch(&self, rows: &Range<usize>) {
        self.factor.fetch(rows.start * self.rank..rows.end * self.rank);
    }

    /// Add B's rows from `first` on times the hidden activations to `products` [rows, tokens].
    ///
    /// # Panics
    /// With more than [`super::LONGEST_STRIP`] rows.
    pub(super) fn add(&self, kernels: &Kernels, first: usize, tokens: usize, products: &mut [f32]) {
        let height = products.len() / tokens;
        let mut scratch = Scratch::of::<f32>(height * self.rank);
        let range = first * self.rank..(first + height) * self.rank;
        let rows = self.factor.widened(kernels, range, scratch.values_mut());
        let mut sums = [0.0; super::LONGEST_STRIP];
        for (token, hidden) in self.hidden.values().chunks_exact(self.rank).take(tokens).enumerate() {
            (kernels.matrix_vector)(rows, hidden, &mut sums[..height]);
            for (product, sum) in products[token..].iter_mut().step_by(tokens).zip(sums) {
                *product += sum;
            }
        }
    }
}
