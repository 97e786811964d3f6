//! A = L Lᵀ in f64, in place, blocked so that nearly all of it is a product of matrices.
//!
//! Only the lower triangle is read and written. Block by block: the block on the diagonal, the rows
//! below it, then the product that these rows take off the rest (each thread its own rows, so the
//! result does not depend on their number).

use crate::parallel;
use crate::simd::merging::{F64_TILE, MergeKernels};

/// Columns per step.
pub const STEP: usize = 64;

/// Rows per unit of parallel work.
const CHUNK: usize = 32;

/// Replace the lower triangle of `matrix` [n, n] by L; false when it is not positive definite (the
/// contents are then of no use).
///
/// # Panics
/// When `matrix` has another length than n².
#[must_use]
pub fn factorize(kernels: &MergeKernels, matrix: &mut [f64], n: usize, threads: usize) -> bool {
    assert_eq!(matrix.len(), n * n, "the matrix is square");
    for first in (0..n).step_by(STEP) {
        let width = STEP.min(n - first);
        let last = first + width;
        let (above, below) = matrix.split_at_mut(last * n);
        let diagonal = &mut above[first * n..];
        if !factorize_block(diagonal, n, first, width) {
            return false;
        }
        // The block's inverse would be less exact; rows are solved one by one.
        let rows = below.chunks_mut(CHUNK * n);
        parallel::for_each(rows, threads, |rows| {
            for row in rows.chunks_exact_mut(n) {
                solve_row(&mut row[first..last], diagonal, n, first);
            }
        });
        // The rows below, transposed: [width][n - last], padded so that whole vectors are read.
        let count = n - last;
        let stride = count.next_multiple_of(F64_TILE);
        let mut transposed = vec![0.0; width * stride];
        for (i, row) in below.chunks_exact(n).enumerate() {
            for (k, &value) in row[first..last].iter().enumerate() {
                transposed[k * stride + i] = value;
            }
        }
        let chunks = below.chunks_mut(CHUNK * n).enumerate();
        parallel::for_each(chunks, threads, |(chunk, rows)| {
            (kernels.subtract_product)(rows, n, first..last, chunk * CHUNK, &transposed, stride);
        });
    }
    true
}

/// Unblocked, on rows `first..first + width`, of which `rows` are the slice.
fn factorize_block(rows: &mut [f64], n: usize, first: usize, width: usize) -> bool {
    for j in 0..width {
        let (done, rest) = rows.split_at_mut(j * n);
        let row = &mut rest[first..n];
        for k in 0..j {
            let earlier = &done[k * n + first..][..=k];
            let dot: f64 = row[..k].iter().zip(&earlier[..k]).map(|(a, b)| a * b).sum();
            row[k] = (row[k] - dot) / earlier[k];
        }
        let square = row[j] - row[..j].iter().map(|value| value * value).sum::<f64>();
        if square.is_nan() || square <= 0.0 {
            return false;
        }
        row[j] = square.sqrt();
    }
    true
}

/// row := row L⁻ᵀ for the block L on the diagonal.
fn solve_row(row: &mut [f64], diagonal: &[f64], n: usize, first: usize) {
    for k in 0..row.len() {
        let factor = &diagonal[k * n + first..][..=k];
        let dot: f64 = row[..k].iter().zip(&factor[..k]).map(|(a, b)| a * b).sum();
        row[k] = (row[k] - dot) / factor[k];
    }
}
