//! y = x Wᵀ + hidden Bᵀ + b for few rows of x: weights are decoded in registers and never stored.
//!
//! Rows of W are cut into strips, one unit of parallel work each. The bound is memory: about half a
//! byte per weight, read once. Many rows of x: see `gemm.rs`.

mod low_rank;
mod prepared;

use crate::element::Element;
use crate::error::Error;
use crate::gemm::Product;
use crate::memory::{Plain, Scratch};
use crate::packed_matrix::PackedMatrix;
use crate::parallel::{self, ColumnRange, Columns};
use crate::simd::{ABSMAX_PADDING, FewRowsFixed, Kernels, PREPARED_MULTIPLE, Strip};
use prepared::Prepared;
use std::ops::Range;

/// Rows of W are multiplied in strips of a multiple of this many: a multiple of the kernels' tiles of up
/// to 16 rows.
const STRIP_ROWS: usize = 16;

/// Rows of a strip, at most: some kernels read it as four streams, which should be long.
const LONGEST_STRIP: usize = 192;

/// Rows of a run that it would not pay to cut further.
const SHORT_RUN: usize = 48;

/// Write a forward product to `y` [tokens, out] and x Aᵀ times scaling to `hidden` [tokens, rank].
///
/// Products are summed in f32. Weights are exact where x is f32. Else, where that is faster, they may be
/// rounded to bf16 once, or weights and x to 14 to 16 bits (`simd/fixed.rs`). Allocates a reordered copy of
/// x, at most four bytes per activation.
///
/// # Errors
/// [`Error::Operand`] when an operand has another length than the shapes ask for.
pub fn write<T: Element>(
    product: &Product<'_, T>,
    kernels: &Kernels,
    y: &mut [T],
    hidden: &mut [T],
    threads: usize,
) -> Result<(), Error> {
    product.check(y.len(), hidden.len())?;
    let prepared = Prepared::new(product, kernels, threads);
    write_prepared(product, &prepared, kernels, y, hidden, threads);
    Ok(())
}

/// The same if activations are multiplied in 16 bits; else returns false, with nothing written.
///
/// # Errors
/// As [`write`].
pub fn write_in_16_bits<T: Element>(
    product: &Product<'_, T>,
    kernels: &Kernels,
    y: &mut [T],
    hidden: &mut [T],
    threads: usize,
) -> Result<bool, Error> {
    product.check(y.len(), hidden.len())?;
    let prepared = Prepared::in_16_bits(product, kernels, threads);
    if let Some(prepared) = &prepared {
        write_prepared(product, prepared, kernels, y, hidden, threads);
    }
    Ok(prepared.is_some())
}

fn write_prepared<T: Element>(
    product: &Product<'_, T>,
    prepared: &Prepared,
    kernels: &Kernels,
    y: &mut [T],
    hidden: &mut [T],
    threads: usize,
) {
    let Product { matrix, tokens, bias, .. } = product;
    let rows = matrix.rows();
    if *tokens == 0 {
        return;
    }
    let fused = is_fused(matrix);
    low_rank::write_hidden(product, kernels, hidden, threads);
    let outer =
        product.factors().map(|(_, b)| low_rank::Outer::new(kernels, b.values, hidden, product.rank()));
    let y = Columns::new(y, rows);
    // One strip of a run of rows, whose results start in column `column` of `y`.
    let one_strip = |strip: Range<usize>, products: &mut [f32], y: &mut ColumnRange<'_, T>, column| {
        let (first, height) = (strip.start, strip.len());
        let products = &mut products[..height * tokens];
        if fused {
            strip_fused(kernels, prepared, *tokens, matrix, first, products);
        } else {
            strip_decoded(kernels, prepared, *tokens, matrix, first, products);
        }
        if let Some(outer) = &outer {
            outer.add(kernels, first, *tokens, products);
        }
        let mut addend = [0.0; LONGEST_STRIP];
        if let Some(bias) = bias {
            T::widen(kernels, &bias[first..first + height], &mut addend[..height]);
        }
        let mut sums = [0.0; LONGEST_STRIP];
        for token in 0..*tokens {
            for (i, sum) in sums[..height].iter_mut().enumerate() {
                *sum = products[i * tokens + token] + addend[i];
            }
            T::narrow(kernels, &sums[..height], y.row_mut(token, column, height));
        }
    };
    // What the strip reads beside codes, which the kernels ask for as they go.
    let fetch = |strip: Range<usize>| {
        if let Some(outer) = &outer {
            outer.fetch(&strip);
        }
        if fused {
            fetch_absmax(matrix, strip);
        }
    };
    parallel::for_each(runs(rows, threads), threads, |run| {
        fetch(strip_of(&run, run.start));
        let mut y = y.take(run.clone());
        let mut products = Scratch::of::<f32>(run.len().min(LONGEST_STRIP) * tokens);
        for first in run.clone().step_by(LONGEST_STRIP) {
            fetch(strip_of(&run, first + LONGEST_STRIP));
            one_strip(strip_of(&run, first), products.values_mut(), &mut y, first - run.start);
        }
    });
}

/// Whether rows start at block boundaries: the kernels decode such in registers.
fn is_fused(matrix: &PackedMatrix<'_>) -> bool {
    matrix.rows_are_aligned() && matrix.columns() > 0
}

/// The strip of a run that starts at row `first`; empty past the run's end.
fn strip_of(run: &Range<usize>, first: usize) -> Range<usize> {
    first.min(run.end)..(first + LONGEST_STRIP).min(run.end)
}

/// All rows as runs, one unit of parallel work each: long ones first, so that a thread reads memory in
/// order, then ever shorter ones, so that all threads finish together even if one is slower.
fn runs(rows: usize, threads: usize) -> Vec<Range<usize>> {
    let parts = 2 * threads.max(1);
    // Shorter ones would cost more to hand out than they let threads wait less.
    let shortest = (rows / parts).next_multiple_of(STRIP_ROWS).clamp(STRIP_ROWS, SHORT_RUN);
    let mut runs = Vec::new();
    let mut first = 0;
    while first < rows {
        let length = ((rows - first) / parts).next_multiple_of(STRIP_ROWS).max(shortest);
        runs.push(first..(first + length).min(rows));
        first += length;
    }
    runs
}

/// Ask for the absmax of some rows: decoding them starts with all of them, and would wait for each.
fn fetch_absmax(matrix: &PackedMatrix<'_>, rows: Range<usize>) {
    let blocks = matrix.columns() / matrix.block_size();
    matrix.fetch_absmax(rows.start * blocks..rows.end * blocks);
}

/// Rows that start at block boundaries.
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
    let count = height * blocks;
    let mut absmax = Scratch::of::<f32>(count + ABSMAX_PADDING);
    let absmax = &mut absmax.values_mut()[..count + ABSMAX_PADDING];
    absmax[count..].fill(0.0);
    matrix.decode_absmax(kernels, first * blocks, &mut absmax[..count]);
    let codes = &matrix.codes()[first * columns / 2..(first + height) * columns / 2];
    let block_size = matrix.block_size();
    let strip = Strip { codes, absmax, columns, block_size, tokens };
    let prepared_values = tokens * columns.next_multiple_of(PREPARED_MULTIPLE);
    match prepared {
        Prepared::F32(x) => (kernels.linear_f32)(&x.values()[..prepared_values], &strip, products),
        Prepared::Bf16(x, kernels) => (kernels.linear)(&x.values()[..prepared_values], &strip, products),
        Prepared::Bytes(x, kernels) => fixed(kernels, x, &strip, products),
        Prepared::Pairs(x, kernels) => fixed(kernels, x, &strip, products),
        Prepared::Words(x, kernels) => fixed(kernels, x, &strip, products),
    }
}

fn fixed<Step: Plain>(kernels: &FewRowsFixed<Step>, x: &Scratch, strip: &Strip<'_>, products: &mut [f32]) {
    let steps = strip.tokens * strip.columns.div_ceil(PREPARED_MULTIPLE);
    (kernels.linear)(&x.values()[..steps], strip, products);
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
    let x = x.values::<f32>();
    let columns = matrix.columns();
    let mut weights = vec![0.0_f32; columns];
    for (i, products) in products.chunks_exact_mut(tokens).enumerate() {
        crate::dequantize::dequantize_run(kernels, matrix, (first + i) * columns, &mut weights);
        for (token, product) in products.iter_mut().enumerate() {
            let x = &x[token * columns..][..columns];
            (kernels.matrix_vector)(&weights, x, std::slice::from_mut(product));
        }
    }
}
