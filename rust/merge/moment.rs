//! Σ x xᵀ over rows of activations: half of it, since it is symmetric, in f32.
//!
//! Columns are packed in lanes of 48; the product of two groups of columns is then what the solver's
//! `gather` computes, with one group as lanes and the other as its panel.

use super::strip::{Lane, ROWS};
use crate::element::Element;
use crate::error::Error;
use crate::parallel;
use crate::quantize::check_length;
use crate::simd::Kernels;
use crate::simd::merging::MergeKernels;

/// Rows that are packed at a time: with 4096 columns, 4 MiB.
const TOKENS: usize = 256;

/// Add the lower triangle of `xᵀ x` to `total` [columns, columns]; x is [tokens, columns].
///
/// # Errors
/// [`Error::Operand`] when a length does not fit.
pub fn accumulate<T: Element>(
    kernels: &Kernels,
    merge: &MergeKernels,
    x: &[T],
    columns: usize,
    total: &mut [f32],
    threads: usize,
) -> Result<(), Error> {
    check_length("total", total.len(), columns * columns)?;
    if columns == 0 || x.is_empty() {
        return Ok(());
    }
    check_length("x", x.len(), x.len() / columns * columns)?;
    let groups = columns.div_ceil(ROWS);
    let mut lanes = vec![Lane::ZERO; groups * TOKENS];
    let mut wide = vec![0.0_f32; columns];
    for x in x.chunks(TOKENS * columns) {
        let tokens = x.len() / columns;
        for (t, row) in x.chunks_exact(columns).enumerate() {
            T::widen(kernels, row, &mut wide);
            for (group, values) in wide.chunks(ROWS).enumerate() {
                lanes[group * tokens + t].0[..values.len()].copy_from_slice(values);
            }
        }
        let lanes = &lanes[..groups * tokens];
        // The longest rows first, so that no thread is left with them at the end.
        let rows: Vec<_> = total.chunks_mut(ROWS * columns).enumerate().collect();
        parallel::for_each(rows.into_iter().rev(), threads, |(group, rows)| {
            let panel: Vec<f32> = lanes[group * tokens..][..tokens].iter().flat_map(|lane| lane.0).collect();
            let mut sums = [Lane::ZERO; ROWS];
            for (other, left) in lanes.chunks_exact(tokens).take(group + 1).enumerate() {
                (merge.gather)(left, &panel, &mut sums);
                let first = other * ROWS;
                let length = ROWS.min(columns - first);
                for (row, sum) in rows.chunks_exact_mut(columns).zip(&sums) {
                    for (out, value) in row[first..first + length].iter_mut().zip(&sum.0) {
                        *out += value;
                    }
                }
            }
        });
    }
    Ok(())
}
