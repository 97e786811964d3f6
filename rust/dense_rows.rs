//! y = x Wᵀ + b for few rows of x and a dense W, of which every weight is read once.
//!
//! This is a model's output layer, mostly in generation. The bound is memory; W's rows are widened a few
//! at a time, in the first-level cache. Many rows of x: see `gemm/dense.rs`.

use crate::element::Element;
use crate::error::Error;
use crate::gemm::dense::DenseProduct;
use crate::memory::Scratch;
use crate::parallel::{self, Columns};
use crate::simd::Kernels;

/// Rows of x, at most, for which the bound is memory.
pub const MOST_TOKENS: usize = 8;

/// Rows of W that are widened at a time, at most: of a small model, they fit a first-level cache.
const STRIP_ROWS: usize = 8;

/// Rows of W that are one unit of parallel work.
const RUN_ROWS: usize = 512;

/// Write a forward product to `y` [tokens, rows], summed in f32 and rounded once.
///
/// # Errors
/// [`Error::Operand`] when an operand has another length than the shapes ask for.
pub fn write<T: Element>(
    product: &DenseProduct<'_, T>,
    kernels: &Kernels,
    y: &mut [T],
    threads: usize,
) -> Result<(), Error> {
    product.check(y.len())?;
    let DenseProduct { weight, rows, columns, activations: x, tokens, bias, .. } = *product;
    let mut wide = Scratch::of::<f32>(x.len());
    let wide = &mut wide.values_mut()[..x.len()];
    T::widen(kernels, x, wide);
    let wide = &*wide;
    let y = Columns::new(y, rows);
    parallel::for_each((0..rows).step_by(RUN_ROWS), threads, |start| {
        let run = start..rows.min(start + RUN_ROWS);
        let mut y = y.take(run.clone());
        let mut scratch = Scratch::of::<f32>(STRIP_ROWS * columns);
        for first in run.clone().step_by(STRIP_ROWS) {
            let height = (run.end - first).min(STRIP_ROWS);
            let strip = first * columns..(first + height) * columns;
            let strip = weight.widened(kernels, strip, scratch.values_mut());
            let mut sums = [0.0; STRIP_ROWS];
            for token in 0..tokens {
                (kernels.matrix_vector)(strip, &wide[token * columns..][..columns], &mut sums[..height]);
                if let Some(bias) = bias {
                    for (sum, bias) in sums.iter_mut().zip(&bias[first..first + height]) {
                        *sum += bias.to_f32();
                    }
                }
                T::narrow(kernels, &sums[..height], y.row_mut(token, first - run.start, height));
            }
        }
    });
    Ok(())
}
