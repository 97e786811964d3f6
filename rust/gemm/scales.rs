//! The decoded absmax of a range of outputs: what one level of scales needs while blocks are decoded.

use super::blocks::{self, BLOCK_OUTPUTS};
use super::pack::Task;
use super::tile::{PANEL, SIDE};
use super::{Direction, Product};
use crate::element::Element;
use crate::memory::Scratch;
use crate::simd::Kernels;
use std::ops::Range;

/// Decoded absmax may take this much per thread. Little in tests, so that small products have several ranges.
const BYTES_PER_THREAD: usize = if cfg!(test) { 1 << 10 } else { 1 << 19 };

/// Rows of W whose absmax are decoded by one task.
const TASK_ROWS: usize = 256;

/// One absmax per piece of a row of W, for the pieces that a range of outputs meets.
pub(super) struct DecodedScales {
    values: Scratch,
    /// Weights per entry: 64, or 32 where blocks of weights are or outputs may be cut at other multiples of 32.
    piece: usize,
    rows: Range<usize>,
    columns: Range<usize>,
}

/// How many outputs stay together where a product's are cut: a panel; two in a backward product, for which
/// one absmax per 64 weights is then enough, unless that would leave threads without work.
pub(super) fn unit<T: Element>(product: &Product<'_, T>, threads: usize) -> usize {
    let (outputs, pair) = (product.outputs(), 2 * PANEL);
    // Where threads have a block or two each, some of these would be a pair larger.
    let even = outputs > BLOCK_OUTPUTS * threads || outputs.div_ceil(pair).is_multiple_of(threads);
    // Deeper ones have less than a pair for each thread in a range.
    let shallow = product.depth() * size_of::<f32>() <= BYTES_PER_THREAD;
    if product.direction == Direction::Backward && even && shallow { pair } else { PANEL }
}

/// Cut a product's outputs, between units, such that the scales of each range fit the budget.
pub(super) fn ranges<T: Element>(product: &Product<'_, T>, unit: usize, threads: usize) -> Vec<Range<usize>> {
    let outputs = product.outputs();
    let bytes_per_output = (product.depth() * size_of::<f32>()).div_ceil(piece(product, unit, outputs));
    let most = (BYTES_PER_THREAD * threads / bytes_per_output.max(1)).max(BLOCK_OUTPUTS);
    // One at least: without outputs, too, there may be hidden activations to compute.
    blocks::ranges(outputs.max(1), unit, most).map(|range| range.start..range.end.min(outputs)).collect()
}

/// Weights per entry, where ranges and blocks start between units and the last ones end at `end`.
fn piece<T: Element>(product: &Product<'_, T>, unit: usize, end: usize) -> usize {
    let cuts = match product.direction {
        Direction::Forward => product.matrix.columns(),
        Direction::Backward => unit | end,
    };
    if product.matrix.block_size() >= 64 && cuts.is_multiple_of(64) { 64 } else { 32 }
}

impl DecodedScales {
    /// Room for the scales of one of the product's ranges of outputs, whose blocks are cut between units; none
    /// where rows do not start at block boundaries, since such weights are decoded elsewhere.
    pub(super) fn new<T: Element>(product: &Product<'_, T>, outputs: Range<usize>, unit: usize) -> Self {
        let (matrix, piece) = (&product.matrix, piece(product, unit, outputs.end));
        let (rows, columns) = match product.direction {
            Direction::Forward => (outputs, 0..matrix.columns()),
            Direction::Backward => (0..matrix.rows(), outputs),
        };
        let usable = matrix.rows_are_aligned() && (columns.start | columns.end).is_multiple_of(piece);
        let rows = if usable { rows } else { 0..0 };
        let count = rows.len() * (columns.len() / piece);
        Self { values: Scratch::take(count.div_ceil(SIDE * SIDE)), piece, rows, columns }
    }

    /// What is to be decoded, as tasks for several threads.
    pub(super) fn tasks(&mut self) -> Vec<Task<'_>> {
        let (piece, first, columns) = (self.piece, self.rows.start, self.columns.clone());
        let pieces = columns.len() / piece;
        let count = self.rows.len() * pieces;
        let chunks =
            self.values.values_mut::<f32>()[..count].chunks_mut((TASK_ROWS * pieces).max(1)).enumerate();
        chunks
            .map(|(i, out)| Task::Scales { row: first + i * TASK_ROWS, columns: columns.clone(), piece, out })
            .collect()
    }

    /// The absmax of the weights of rows in `columns`, if they are here.
    pub(super) fn of(&self, rows: &Range<usize>, columns: &Range<usize>) -> Option<RowScales<'_>> {
        if rows.start < self.rows.start || rows.end > self.rows.end || rows.is_empty() {
            return None;
        }
        let stride = self.columns.len() / self.piece;
        let first =
            (rows.start - self.rows.start) * stride + (columns.start - self.columns.start) / self.piece;
        let (values, count) = (&self.values.values()[first..], columns.len() / self.piece);
        Some(RowScales { values, stride, count, piece: self.piece })
    }
}

/// The absmax of a run of weights of several rows: what is asked for each row, found without a division.
#[derive(Clone, Copy)]
pub(super) struct RowScales<'a> {
    values: &'a [f32],
    stride: usize,
    count: usize,
    /// Weights per entry.
    pub(super) piece: usize,
}

impl<'a> RowScales<'a> {
    /// Those of row `i`.
    pub(super) fn row(&self, i: usize) -> &'a [f32] {
        &self.values[i * self.stride..][..self.count]
    }
}

/// Write the absmax of consecutive rows' pieces in `columns`.
pub(super) fn decode<T: Element>(
    product: &Product<'_, T>,
    kernels: &Kernels,
    row: usize,
    columns: &Range<usize>,
    piece: usize,
    out: &mut [f32],
) {
    let matrix = &product.matrix;
    let first = row * matrix.columns() + columns.start;
    if columns.len() == matrix.columns() {
        // Rows follow each other without a gap.
        return matrix.decode_absmax_pieces(kernels, first, piece, out);
    }
    for (i, out) in out.chunks_exact_mut(columns.len() / piece).enumerate() {
        matrix.decode_absmax_pieces(kernels, first + i * matrix.columns(), piece, out);
    }
}
