//! Activations in the form that the chosen kernel of few rows reads.

use super::is_fused;
use crate::element::Element;
use crate::gemm::Product;
use crate::memory::{Plain, Scratch};
use crate::parallel;
use crate::simd::{
    ByteStep, FIXED_TOLERANCE, FewRowsBf16, FewRowsFixed, Kernels, PREPARED_MULTIPLE, PairStep, WordStep,
};
use half::bf16;
use std::sync::atomic::{AtomicBool, Ordering};

/// Activations that one thread alone brings into fixed point in less time than waking others takes.
const FEW_ACTIVATIONS: usize = 1 << 14;

/// Activations in one of the forms.
pub(super) enum Prepared {
    /// Widened to f32 and reordered.
    F32(Scratch),
    /// Reordered bf16.
    Bf16(Scratch, FewRowsBf16),
    /// In fixed point, as bytes.
    Bytes(Scratch, FewRowsFixed<ByteStep>),
    /// In fixed point, as pairs of words.
    Pairs(Scratch, FewRowsFixed<PairStep>),
    /// In fixed point, as words.
    Words(Scratch, FewRowsFixed<WordStep>),
}

impl Prepared {
    /// A forward product's activations for the fastest kernel that is exact enough for them.
    pub(super) fn new<T: Element>(product: &Product<'_, T>, kernels: &Kernels, threads: usize) -> Self {
        Self::in_16_bits(product, kernels, threads).unwrap_or_else(|| Self::in_f32(product, kernels))
    }

    /// The same if that kernel multiplies 16-bit activations as such or in fixed point.
    pub(super) fn in_16_bits<T: Element>(
        product: &Product<'_, T>,
        kernels: &Kernels,
        threads: usize,
    ) -> Option<Self> {
        let Product { matrix, activations: x, tokens, .. } = product;
        if size_of::<T>() != 2 || !is_fused(matrix) {
            return None;
        }
        let columns = matrix.columns();
        let few = kernels.bf16.and_then(|bf16| bf16.few_rows);
        let few = few.filter(|few| *tokens >= few.fewest && matrix.block_size() >= 64);
        if let (Some(few), Some(x)) = (few, T::as_bf16(x)) {
            let count = tokens * columns.next_multiple_of(PREPARED_MULTIPLE);
            let mut prepared = Scratch::of::<bf16>(count);
            (few.prepare)(x, columns, &mut prepared.values_mut()[..count]);
            return Some(Self::Bf16(prepared, few));
        }
        // What one form refuses, the others would hardly take.
        if let Some(few) = kernels.few_rows_bytes.filter(|few| *tokens <= few.most) {
            return Some(Self::Bytes(fixed(kernels, few, x, columns, threads)?, few));
        }
        if let Some(few) = kernels.few_rows_pairs.filter(|few| *tokens <= few.most) {
            return Some(Self::Pairs(fixed(kernels, few, x, columns, threads)?, few));
        }
        let few = kernels.few_rows_words.filter(|few| *tokens <= few.most)?;
        Some(Self::Words(fixed(kernels, few, x, columns, threads)?, few))
    }

    /// Widened; reordered too, unless rows are decoded one by one.
    fn in_f32<T: Element>(product: &Product<'_, T>, kernels: &Kernels) -> Self {
        let Product { matrix, activations: x, tokens, .. } = product;
        if !is_fused(matrix) {
            let mut wide = Scratch::of::<f32>(x.len());
            T::widen(kernels, x, &mut wide.values_mut()[..x.len()]);
            return Self::F32(wide);
        }
        let columns = matrix.columns();
        let width = columns.next_multiple_of(PREPARED_MULTIPLE);
        let mut wide = Scratch::of::<f32>(columns);
        let wide = &mut wide.values_mut()[..columns];
        let mut prepared = Scratch::of::<f32>(tokens * width);
        for (row, out) in x.chunks_exact(columns).zip(prepared.values_mut().chunks_exact_mut(width)) {
            T::widen(kernels, row, wide);
            (kernels.prepare_f32)(wide, out);
        }
        Self::F32(prepared)
    }
}

/// Rows of activations in fixed point, if all of them are exact enough.
fn fixed<T: Element, Step: Plain + Send>(
    kernels: &Kernels,
    few: FewRowsFixed<Step>,
    x: &[T],
    columns: usize,
    threads: usize,
) -> Option<Scratch> {
    let steps = columns.div_ceil(PREPARED_MULTIPLE);
    let mut prepared = Scratch::of::<Step>(x.len() / columns * steps);
    let refused = AtomicBool::new(false);
    let rows = x.chunks_exact(columns).zip(prepared.values_mut().chunks_exact_mut(steps));
    let threads = if x.len() <= FEW_ACTIVATIONS { 1 } else { threads };
    parallel::for_each(rows, threads, |(row, out)| {
        if refused.load(Ordering::Relaxed) {
            return;
        }
        let mut wide = Scratch::of::<f32>(columns);
        let wide = &mut wide.values_mut()[..columns];
        T::widen(kernels, row, wide);
        if !(few.prepare)(wide, T::EPSILON * FIXED_TOLERANCE, out) {
            refused.store(true, Ordering::Relaxed);
        }
    });
    (!refused.into_inner()).then_some(prepared)
}
