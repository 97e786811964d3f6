//! y = x Wᵀ + hidden Bᵀ + b for few rows of x: weights are decoded in registers and never stored.
//!
//! Rows of W are cut into strips, one unit of parallel work each. The bound is memory: about half a
//! byte per weight, read once. Many rows of x: see `gemm.rs`.

use crate::element::{Element, Floats};
use crate::error::Error;
use crate::gemm::Product;
use crate::memory::Scratch;
use crate::packed_matrix::PackedMatrix;
use crate::parallel::{self, Columns};
use crate::simd::{ABSMAX_PADDING, FewRowsBf16, Kernels, PREPARED_MULTIPLE, Strip};
use half::bf16;
use std::ops::Range;

/// Rows of W are multiplied in strips of a multiple of this many: a multiple of the kernels' tiles of up
/// to 16 rows, small enough that two cores finish together on a layer of 576 rows.
const STRIP_ROWS: usize = 16;

/// Rows of a strip, at most.
const LONGEST_STRIP: usize = 48;

/// Fewer multiplications than this are not worth a second thread.
const SMALL_PRODUCT: usize = 1 << 15;

/// Tokens whose activations are held widened at a time.
const WIDENED_TOKENS: usize = 8;

/// Activations in the form that the chosen kernel reads.
enum Prepared {
    /// Widened to f32 and reordered.
    F32(Scratch),
    /// Reordered bf16.
    Bf16(Scratch, FewRowsBf16),
}

/// Write a forward product to `y` [tokens, out] and x Aᵀ times scaling to `hidden` [tokens, rank].
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
    hidden: &mut [T],
    threads: usize,
) -> Result<(), Error> {
    product.check(y.len(), hidden.len())?;
    let Product { matrix, tokens, bias, .. } = product;
    let (rows, columns) = (matrix.rows(), matrix.columns());
    if *tokens == 0 {
        return Ok(());
    }
    write_hidden(product, kernels, hidden, threads);
    let fused = matrix.rows_are_aligned() && columns > 0;
    let prepared = prepare(kernels, product.activations, *tokens, matrix, fused);
    let outer = product.factors().map(|(_, b)| Outer::new(kernels, b.values, hidden, product.rank()));
    let y = Columns::new(y, rows);
    let one_strip = |strip: Range<usize>, next: Range<usize>| {
        let (first, height) = (strip.start, strip.len());
        if fused {
            fetch_absmax(matrix, next);
        }
        let mut products = Scratch::of::<f32>(height * tokens);
        let products = &mut products.values_mut()[..height * tokens];
        if fused {
            strip_fused(kernels, &prepared, *tokens, matrix, first, products);
        } else {
            strip_decoded(kernels, &prepared, *tokens, matrix, first, products);
        }
        if let Some(outer) = &outer {
            outer.add(kernels, first, *tokens, products);
        }
        let mut addend = [0.0; LONGEST_STRIP];
        if let Some(bias) = bias {
            T::widen(kernels, &bias[first..first + height], &mut addend[..height]);
        }
        let mut y = y.take(first..first + height);
        let mut sums = [0.0; LONGEST_STRIP];
        for token in 0..*tokens {
            for (i, sum) in sums[..height].iter_mut().enumerate() {
                *sum = products[i * tokens + token] + addend[i];
            }
            T::narrow(kernels, &sums[..height], y.row_mut(token, 0, height));
        }
    };
    parallel::for_each(runs(rows, threads), threads, |run| {
        if fused {
            fetch_absmax(matrix, strip_of(&run, run.start));
        }
        for first in run.clone().step_by(LONGEST_STRIP) {
            one_strip(strip_of(&run, first), strip_of(&run, first + LONGEST_STRIP));
        }
    });
    Ok(())
}

/// The strip of a run that starts at row `first`; empty past the run's end.
fn strip_of(run: &Range<usize>, first: usize) -> Range<usize> {
    first.min(run.end)..(first + LONGEST_STRIP).min(run.end)
}

/// All rows as runs, one unit of parallel work each: long ones first, so that a thread reads memory in
/// order, then ever shorter ones, so that all threads finish together even if one is slower.
fn runs(rows: usize, threads: usize) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let mut first = 0;
    while first < rows {
        let length = ((rows - first) / (2 * threads.max(1))).next_multiple_of(STRIP_ROWS).max(STRIP_ROWS);
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

/// `hidden` [tokens, rank] = scaling x Aᵀ.
fn write_hidden<T: Element>(product: &Product<'_, T>, kernels: &Kernels, hidden: &mut [T], threads: usize) {
    let (Some(low_rank), Some((factor, _))) = (product.low_rank, product.factors()) else { return };
    let (rank, columns) = (low_rank.rank, factor.columns);
    if columns == 0 {
        return hidden.fill(T::default());
    }
    let threads = if rank * columns * product.tokens < SMALL_PRODUCT { 1 } else { threads };
    let groups = product.activations.chunks(WIDENED_TOKENS * columns);
    for (activations, hidden) in groups.zip(hidden.chunks_mut(WIDENED_TOKENS * rank.max(1))) {
        let mut x = vec![0.0; activations.len()];
        T::widen(kernels, activations, &mut x);
        let hidden = Columns::new(hidden, rank);
        parallel::for_each(0..rank, threads, |row| {
            let mut wide = vec![0.0; columns];
            factor.values.widen(kernels, row * columns, &mut wide);
            let mut column = hidden.take(row..row + 1);
            for (token, x) in x.chunks_exact(columns).enumerate() {
                let sum = (kernels.dot)(&wide, x);
                column.row_mut(token, 0, 1)[0] = T::from_f32(low_rank.scaling * sum);
            }
        });
    }
}

/// The low-rank part's second product, hidden Bᵀ.
struct Outer<'a> {
    hidden: Vec<f32>,
    factor: Floats<'a>,
    rank: usize,
}

impl<'a> Outer<'a> {
    fn new<T: Element>(kernels: &Kernels, factor: Floats<'a>, hidden: &[T], rank: usize) -> Self {
        let mut wide = vec![0.0; hidden.len()];
        T::widen(kernels, hidden, &mut wide);
        Self { hidden: wide, factor, rank }
    }

    /// Add B's rows from `first` on times the hidden activations.
    fn add(&self, kernels: &Kernels, first: usize, tokens: usize, products: &mut [f32]) {
        let mut rows = vec![0.0; products.len() / tokens * self.rank];
        self.factor.widen(kernels, first * self.rank, &mut rows);
        for (row, products) in rows.chunks_exact(self.rank).zip(products.chunks_exact_mut(tokens)) {
            for (hidden, product) in self.hidden.chunks_exact(self.rank).zip(products) {
                *product += (kernels.dot)(row, hidden);
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
        let mut wide = Scratch::of::<f32>(x.len());
        T::widen(kernels, x, &mut wide.values_mut()[..x.len()]);
        return Prepared::F32(wide);
    }
    let width = columns.next_multiple_of(PREPARED_MULTIPLE);
    let bf16_kernels = kernels.bf16.and_then(|bf16| bf16.few_rows);
    let bf16_kernels = bf16_kernels.filter(|few| tokens >= few.fewest && matrix.block_size() >= 64);
    if let (Some(kernels), Some(x)) = (bf16_kernels, T::as_bf16(x)) {
        let mut prepared = Scratch::of::<bf16>(tokens * width);
        (kernels.prepare)(x, columns, &mut prepared.values_mut()[..tokens * width]);
        return Prepared::Bf16(prepared, kernels);
    }
    let mut wide = vec![0.0; columns];
    let mut prepared = Scratch::of::<f32>(tokens * width);
    for (row, out) in x.chunks_exact(columns).zip(prepared.values_mut().chunks_exact_mut(width)) {
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
    let padding = if columns.is_multiple_of(PREPARED_MULTIPLE) { 0 } else { ABSMAX_PADDING };
    let absmax_stride = blocks + padding;
    let count = height * absmax_stride;
    let mut absmax = Scratch::of::<f32>(count + ABSMAX_PADDING);
    let absmax = &mut absmax.values_mut()[..count + ABSMAX_PADDING];
    absmax[count..].fill(0.0);
    // All rows at once: what a decoder sets up serves them all. Then apart, the last row first.
    matrix.decode_absmax(kernels, first * blocks, &mut absmax[..height * blocks]);
    if padding > 0 {
        for i in (0..height).rev() {
            absmax.copy_within(i * blocks..(i + 1) * blocks, i * absmax_stride);
            absmax[i * absmax_stride + blocks..(i + 1) * absmax_stride].fill(0.0);
        }
    }
    let codes = &matrix.codes()[first * columns / 2..(first + height) * columns / 2];
    let block_size = matrix.block_size();
    let strip = Strip { codes, absmax, absmax_stride, columns, block_size, tokens };
    let prepared_values = tokens * columns.next_multiple_of(PREPARED_MULTIPLE);
    match prepared {
        Prepared::F32(x) => (kernels.linear_f32)(&x.values()[..prepared_values], &strip, products),
        Prepared::Bf16(x, kernels) => (kernels.linear)(&x.values()[..prepared_values], &strip, products),
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
    let x = x.values::<f32>();
    let columns = matrix.columns();
    let mut weights = vec![0.0_f32; columns];
    for (i, products) in products.chunks_exact_mut(tokens).enumerate() {
        crate::dequantize::dequantize_run(kernels, matrix, (first + i) * columns, &mut weights);
        for (token, product) in products.iter_mut().enumerate() {
            *product = (kernels.dot)(&weights, &x[token * columns..][..columns]);
        }
    }
}
