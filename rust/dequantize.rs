//! 4-bit codes → floats: `LEVELS[code] * absmax[block]` in f32, rounded once to the output type.
//!
//! The unit is a tile: a range of rows and a range of columns, so that a caller never needs the
//! whole matrix. Read next: `matmul.rs`, the products.

use crate::codebook::LEVELS;
use crate::element::Element;
use crate::error::Error;
use crate::memory;
use crate::packed_matrix::PackedMatrix;
use crate::parallel;
use crate::quantize::check_length;
use crate::simd::Kernels;
use std::ops::Range;

/// Weights per unit of parallel work.
const CHUNK: usize = 1 << 16;

/// Blocks whose absmax is decoded at a time, on the stack.
const ABSMAX_STRIP: usize = 256;

/// Decode `rows` x `columns` of the matrix into `out`, row-major and dense.
///
/// # Errors
/// [`Error::Operand`] when a range leaves the matrix or `out` has the wrong length.
pub fn dequantize_tile<T: Element>(
    kernels: &Kernels,
    matrix: &PackedMatrix<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    out: &mut [T],
    threads: usize,
) -> Result<(), Error> {
    for (name, range, limit) in [("rows", &rows, matrix.rows()), ("columns", &columns, matrix.columns())] {
        if range.start > range.end || range.end > limit {
            return Err(Error::Operand { name, got: range.end, expected: limit });
        }
    }
    check_length("out", out.len(), rows.len() * columns.len())?;
    if out.is_empty() {
        return Ok(());
    }
    memory::advise_huge_pages(out);
    if columns.len() == matrix.columns() {
        // Whole rows are one run of weights: cut it by size, so that a few long rows balance too.
        let first = rows.start * matrix.columns();
        let chunks = out.chunks_mut(CHUNK).enumerate();
        parallel::for_each(chunks, threads, |(i, out)| {
            dequantize_run(kernels, matrix, first + i * CHUNK, out);
        });
    } else {
        let rows_per_chunk = (CHUNK / columns.len()).max(1);
        let chunks = out.chunks_mut(rows_per_chunk * columns.len()).enumerate();
        parallel::for_each(chunks, threads, |(i, out)| {
            for (j, out) in out.chunks_exact_mut(columns.len()).enumerate() {
                let row = rows.start + i * rows_per_chunk + j;
                dequantize_run(kernels, matrix, row * matrix.columns() + columns.start, out);
            }
        });
    }
    Ok(())
}

/// Decode `out.len()` consecutive weights of the flattened matrix, starting at weight `first`.
pub(crate) fn dequantize_run<T: Element>(
    kernels: &Kernels,
    matrix: &PackedMatrix<'_>,
    first: usize,
    out: &mut [T],
) {
    let block_size = matrix.block_size();
    let end = first + out.len();
    let whole = first.next_multiple_of(block_size).min(end)..(end / block_size * block_size).max(first);
    if whole.start >= whole.end {
        return dequantize_slowly(kernels, matrix, first, out);
    }
    let (head, rest) = out.split_at_mut(whole.start - first);
    let (middle, tail) = rest.split_at_mut(whole.len());
    dequantize_slowly(kernels, matrix, first, head);
    dequantize_slowly(kernels, matrix, whole.end, tail);
    let mut absmax = [0.0_f32; ABSMAX_STRIP];
    let mut block = whole.start / block_size;
    for out in middle.chunks_mut(ABSMAX_STRIP * block_size) {
        let absmax = &mut absmax[..out.len() / block_size];
        matrix.decode_absmax(kernels, block, absmax);
        let codes = &matrix.codes()[block * block_size / 2..][..out.len() / 2];
        T::dequantize_blocks(kernels, codes, absmax, block_size, out);
        block += absmax.len();
    }
}

/// Parts of blocks at the ends of a run, one weight at a time.
fn dequantize_slowly<T: Element>(kernels: &Kernels, matrix: &PackedMatrix<'_>, first: usize, out: &mut [T]) {
    let mut absmax = [0.0];
    let mut decoded = usize::MAX;
    for (i, value) in (first..).zip(out) {
        if i / matrix.block_size() != decoded {
            decoded = i / matrix.block_size();
            matrix.decode_absmax(kernels, decoded, &mut absmax);
        }
        let byte = matrix.codes()[i / 2];
        let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
        *value = T::from_f32(LEVELS[usize::from(code)] * absmax[0]);
    }
}
