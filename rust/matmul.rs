//! y = x Wᵀ + b straight from packed weights, for few rows of x.
//!
//! Weights are decoded in registers and never stored. Rows of W are cut into strips, one unit of
//! parallel work each. Many rows of x are better served by decoding a tile once
//! (`dequantize.rs`) and multiplying it with a dense product; `ops.py` chooses.

use crate::element::Element;
use crate::error::Error;
use crate::packed_matrix::PackedMatrix;
use crate::parallel::{self, Columns};
use crate::quantize::check_length;
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

/// Write `y[m, n] = sum over k of x[m, k] * W[n, k] + bias[n]`.
///
/// x is `tokens` x columns, y is `tokens` x rows, both row-major. Products are summed in f32.
/// Weights are exact, or rounded to bf16 once where the CPU multiplies bf16 and x is bf16.
/// Allocates a reordered copy of x, at most four bytes per activation.
///
/// # Errors
/// [`Error::Operand`] when x, bias or y has another length than the shapes ask for.
pub fn linear<T: Element>(
    kernels: &Kernels,
    x: &[T],
    tokens: usize,
    matrix: &PackedMatrix<'_>,
    bias: Option<&[T]>,
    y: &mut [T],
    threads: usize,
) -> Result<(), Error> {
    let (rows, columns) = (matrix.rows(), matrix.columns());
    check_length("x", x.len(), tokens * columns)?;
    check_length("y", y.len(), tokens * rows)?;
    if let Some(bias) = bias {
        check_length("bias", bias.len(), rows)?;
    }
    if y.is_empty() {
        return Ok(());
    }
    let fused = matrix.rows_are_aligned() && columns > 0;
    let prepared = prepare(kernels, x, tokens, matrix, fused);
    let y = Columns::new(y, rows);
    let strips = (0..rows).step_by(STRIP_ROWS);
    parallel::for_each(strips, threads, |first| {
        let height = STRIP_ROWS.min(rows - first);
        let mut products = vec![0.0_f32; height * tokens];
        if fused {
            strip_fused(kernels, &prepared, tokens, matrix, first, &mut products);
        } else {
            strip_decoded(kernels, &prepared, tokens, matrix, first, &mut products);
        }
        let mut y = y.take(first..first + height);
        for (i, products) in products.chunks_exact(tokens).enumerate() {
            let bias = bias.map_or(0.0, |bias| bias[first + i].to_f32());
            for (token, product) in products.iter().enumerate() {
                y.set(token, i, T::from_f32(product + bias));
            }
        }
    });
    Ok(())
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
