//! y = x Wᵀ + hidden Bᵀ + b for few rows of x: weights are decoded in registers and never stored.
//!
//! Rows of W are cut into strips, one unit of parallel work each. The bound is memory: about half a
//! byte per weight, read once. Many rows of x: see `gemm.rs`.

use crate::element::Element;
use crate::error::Error;
use crate::gemm::{LowRank, Product};
use crate::packed_matrix::PackedMatrix;
use crate::parallel::{self, Columns};
use crate::simd::{ABSMAX_PADDING, Bf16Kernels, Kernels, PREPARED_MULTIPLE, Strip};
use half::bf16;

/// Rows of W per unit of parallel work: a multiple of the kernels' four-row tiles, and small enough
/// that two cores finish together on a layer of 576 rows.
const STRIP_ROWS: usize = 16;

/// Activations in the form that the chosen kernel reads.
enum Prepared {
    /// Widened to f32 and reordered.
    F32(Vec<f32>),
    /// Reordered bf16.
    Bf16(Vec<bf16>, Bf16Kernels),
}

/// Write a forward product whose operands' lengths were checked (`Product::check`).
///
/// Products are summed in f32. Weights are exact, or rounded to bf16 once where the CPU multiplies
/// bf16 and x is bf16. Allocates a reordered copy of x, at most four bytes per activation.
///
/// # Errors
/// [`Error::Operand`] when an operand has another length than the shapes ask for.
pub fn write<T: Element>(
    product: &Product<'_, T>,
    kernels: &Kernels,
    y: &mut [T],
    threads: usize,
) -> Result<(), Error> {
    product.check(y.len())?;
    if y.is_empty() {
        return Ok(());
    }
    let Product { matrix, tokens, bias, .. } = product;
    let (rows, columns) = (matrix.rows(), matrix.columns());
    let fused = matrix.rows_are_aligned() && columns > 0;
    let prepared = prepare(kernels, product.activations, *tokens, matrix, fused);
    let low_rank = product.low_rank.map(|low_rank| Wide::new(kernels, low_rank));
    let y = Columns::new(y, rows);
    let strips = (0..rows).step_by(STRIP_ROWS);
    parallel::for_each(strips, threads, |first| {
        let height = STRIP_ROWS.min(rows - first);
        let mut products = vec![0.0_f32; height * tokens];
        if fused {
            strip_fused(kernels, &prepared, *tokens, matrix, first, &mut products);
        } else {
            strip_decoded(kernels, &prepared, *tokens, matrix, first, &mut products);
        }
        if let Some(low_rank) = &low_rank {
            low_rank.add(kernels, first, *tokens, &mut products);
        }
        let mut y = y.take(first..first + height);
        for token in 0..*tokens {
            for (i, out) in y.row_mut(token, 0, height).iter_mut().enumerate() {
                let bias = bias.map_or(0.0, |bias| bias[first + i].to_f32());
                *out = T::from_f32(products[i * tokens + token] + bias);
            }
        }
    });
    Ok(())
}

/// The low-rank part, its activations widened.
struct Wide<'a, T> {
    hidden: Vec<f32>,
    factor: &'a [T],
    rank: usize,
}

impl<'a, T: Element> Wide<'a, T> {
    fn new(kernels: &Kernels, low_rank: LowRank<'a, T>) -> Self {
        let mut hidden = vec![0.0; low_rank.hidden.len()];
        T::widen(kernels, low_rank.hidden, &mut hidden);
        Self { hidden, factor: low_rank.factor, rank: low_rank.rank }
    }

    /// Add B's rows from `first` on times the hidden activations.
    fn add(&self, kernels: &Kernels, first: usize, tokens: usize, products: &mut [f32]) {
        let mut row = vec![0.0; self.rank];
        for (i, products) in products.chunks_exact_mut(tokens).enumerate() {
            T::widen(kernels, &self.factor[(first + i) * self.rank..][..self.rank], &mut row);
            for (token, product) in products.iter_mut().enumerate() {
                *product += (kernels.dot)(&row, &self.hidden[token * self.rank..][..self.rank]);
            }
        }
    }
}

fn prepare<T: Element>(
    kernels: &Kernels,
    x: &[T],
    tokens: usize,
    matrix: &PackedMatrix<'_>,
    fused: bool,
) -> Prepared {
    let columns = matrix.columns();
    if !fused {
        let mut wide = vec![0.0; x.len()];
        T::widen(kernels, x, &mut wide);
        return Prepared::F32(wide);
    }
    let width = columns.next_multiple_of(PREPARED_MULTIPLE);
    let bf16_kernels = kernels.bf16.filter(|_| matrix.block_size() >= 64);
    if let (Some(kernels), Some(x)) = (bf16_kernels, T::as_bf16(x)) {
        let mut prepared = vec![bf16::ZERO; tokens * width];
        for (row, out) in x.chunks_exact(columns).zip(prepared.chunks_exact_mut(width)) {
            (kernels.prepare)(row, out);
        }
        return Prepared::Bf16(prepared, kernels);
    }
    let mut wide = vec![0.0; columns];
    let mut prepared = vec![0.0; tokens * width];
    for (row, out) in x.chunks_exact(columns).zip(prepared.chunks_exact_mut(width)) {
        T::widen(kernels, row, &mut wide);
        (kernels.prepare_f32)(&wide, out);
    }
    Prepared::F32(prepared)
}

/// Rows that start at block boundaries: the kernels decode them in registers.
fn strip_fused(
    kernels: &Kernels,
    prepared: &Prepared,
    tokens: usize,
    matrix: &PackedMatrix<'_>,
    first: usize,
    products: &mut [f32],
) {
    let columns = matrix.columns();
    let blocks = columns / matrix.block_size();
    let height = products.len() / tokens;
    let absmax_stride = blocks + ABSMAX_PADDING;
    let mut absmax = vec![0.0; height * absmax_stride];
    for (i, absmax) in absmax.chunks_exact_mut(absmax_stride).enumerate() {
        matrix.decode_absmax(kernels, (first + i) * blocks, &mut absmax[..blocks]);
    }
    let codes = &matrix.codes()[first * columns / 2..(first + height) * columns / 2];
    let block_size = matrix.block_size();
    let strip = Strip { codes, absmax: &absmax, absmax_stride, columns, block_size, tokens };
    match prepared {
        Prepared::F32(x) => (kernels.linear_f32)(x, &strip, products),
        Prepared::Bf16(x, kernels) => (kernels.linear)(x, &strip, products),
    }
}

/// Rows that share blocks with their neighbours: decode a row at a time.
fn strip_decoded(
    kernels: &Kernels,
    prepared: &Prepared,
    tokens: usize,
    matrix: &PackedMatrix<'_>,
    first: usize,
    products: &mut [f32],
) {
    let Prepared::F32(x) = prepared else { return };
    let columns = matrix.columns();
    let mut weights = vec![0.0_f32; columns];
    for (i, products) in products.chunks_exact_mut(tokens).enumerate() {
        crate::dequantize::dequantize_run(kernels, matrix, (first + i) * columns, &mut weights);
        for (token, product) in products.iter_mut().enumerate() {
            *product = (kernels.dot)(&weights, &x[token * columns..][..columns]);
        }
    }
}
