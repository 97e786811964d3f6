//! Rows that make up for each other's errors: the objective is tr(F E H Eᵀ), not tr(E H Eᵀ).
//!
//! F, of a layer's outputs, says how their errors add up in what the model answers. With F = U Uᵀ, U
//! upper triangular, the objective is Σ ‖(Uᵀ E)_i‖² in the metric H, and (Uᵀ E)_i depends on rows up
//! to i alone. So rows are solved in order: those of a part together (their errors are not known yet,
//! and in parallel), each with a target moved by what the parts before it left,
//!
//! ```text
//! Uᵀ_rr (E_r + shift),   shift = U_rr⁻ᵀ U_Drᵀ E_D      r the part, D the rows before it
//! ```
//!
//! Sums are formed in one order whatever the number of threads.

use super::grid::Grid;
use super::strip::{Lane, ROWS, Strip};
use super::{Output, OutputScales, Problem, cholesky, solve_strip, solve_strips};
use crate::error::Error;
use crate::quantize::check_length;
use crate::simd::merging::MergeKernels;
use std::ops::Range;

/// Parts of the rows, at most.
const PARTS: usize = 6;

/// Each adds ten times as much to F's diagonal as the one before.
const ATTEMPTS: usize = 3;

/// F of some rows of a matrix.
#[derive(Clone, Copy, Debug)]
pub struct Coupling<'a> {
    /// The first of its rows, a multiple of [`ROWS`].
    pub first: usize,
    /// How many rows: a multiple of [`ROWS`], or up to the matrix's end.
    pub rows: usize,
    /// F [rows, rows].
    pub moment: &'a [f32],
    /// Added to F's diagonal.
    pub damping: f64,
}

/// Solve the rows of a coupling; the others' results stay as they are.
///
/// # Errors
/// As [`super::calibrate`]; [`Error::Operand`] for a coupling of other rows than the matrix has, and
/// [`Error::NotPositive`] for an F that is not positive definite.
pub fn calibrate(
    kernels: &MergeKernels,
    problem: &Problem<'_>,
    coupling: Coupling<'_>,
    mut output: Output<'_>,
    threads: usize,
) -> Result<(), Error> {
    problem.check(&output)?;
    let Coupling { first, rows: count, .. } = coupling;
    let (matrix, columns) = (&problem.nearest, problem.nearest.columns());
    check_length("moment", coupling.moment.len(), count * count)?;
    let end = first + count;
    let whole = first.is_multiple_of(ROWS) && (count.is_multiple_of(ROWS) || end == matrix.rows());
    if !whole || end > matrix.rows() {
        return Err(Error::Operand { name: "rows", got: end, expected: matrix.rows() });
    }
    if count * columns == 0 {
        return Ok(());
    }
    let upper = factorize(kernels, coupling, threads)?;
    let mut errors = vec![0.0; count * columns];
    let grid = Grid::new(matrix);
    let length = count.div_ceil(PARTS * ROWS).max(1) * ROWS;
    for start in (0..count).step_by(length) {
        let part = start..count.min(start + length);
        let shares = shares(&upper, count, part.clone());
        let (done, rest) = errors.split_at_mut(start * columns);
        let own = &mut rest[..part.len() * columns];
        let scales = match &mut output.scales {
            OutputScales::Single(scales) => OutputScales::Single(scales),
            OutputScales::Nested(scales) => OutputScales::Nested(scales),
        };
        let output = Output { codes: &mut *output.codes, scales, objectives: &mut *output.objectives };
        let rows = first + part.start..first + part.end;
        let extras = own.chunks_mut(ROWS * columns).zip(shares.chunks(ROWS * start.max(1)));
        solve_strips(problem, output, rows, extras, threads, |first, objectives, (own, shares)| {
            let mut strip = Strip::nearest(problem, &grid, first);
            let shift = shift(kernels, &strip, done, &shares[..strip.rows * start], columns);
            for ((target, error), shift) in strip.target.iter_mut().zip(&mut strip.errors).zip(&shift) {
                for row in 0..ROWS {
                    target.0[row] += shift.0[row];
                    error.0[row] += shift.0[row];
                }
            }
            let strip = solve_strip(kernels, problem, &grid, strip, objectives);
            for (column, (error, shift)) in strip.errors.iter().zip(&shift).enumerate() {
                for row in 0..strip.rows {
                    own[row * columns + column] = error.0[row] - shift.0[row];
                }
            }
            strip
        })?;
    }
    Ok(())
}

/// U [n, n] of F = U Uᵀ: the lower factor of F with both axes reversed.
fn factorize(kernels: &MergeKernels, coupling: Coupling<'_>, threads: usize) -> Result<Vec<f64>, Error> {
    let n = coupling.rows;
    let mut damping = coupling.damping;
    for _ in 0..ATTEMPTS {
        let mut matrix: Vec<f64> = coupling.moment.iter().rev().map(|&value| f64::from(value)).collect();
        for i in 0..n {
            matrix[i * n + i] += damping;
        }
        if cholesky::factorize(kernels, &mut matrix, n, threads) {
            matrix.reverse();
            return Ok(matrix);
        }
        damping *= 10.0;
    }
    Err(Error::NotPositive { columns: n, damping: damping / 10.0 })
}

/// U_rr⁻ᵀ U_Drᵀ [part, part.start], by forward substitution; at least one value per row.
fn shares(upper: &[f64], n: usize, part: Range<usize>) -> Vec<f32> {
    let before = part.start;
    let mut rows = vec![0.0; part.len() * before];
    for (i, column) in part.clone().enumerate() {
        let (earlier, rest) = rows.split_at_mut(i * before);
        let row = &mut rest[..before];
        for (j, value) in row.iter_mut().enumerate() {
            *value = upper[j * n + column];
        }
        for (k, earlier) in earlier.chunks_exact(before.max(1)).enumerate() {
            let factor = upper[(before + k) * n + column];
            for (value, earlier) in row.iter_mut().zip(earlier) {
                *value -= factor * earlier;
            }
        }
        let diagonal = upper[column * n + column];
        for value in row {
            *value /= diagonal;
        }
    }
    if before == 0 {
        return vec![0.0; part.len()];
    }
    rows.into_iter().map(|value| value as f32).collect()
}

/// shares [rows of the strip, done rows] times the errors of the rows before, a lane per row.
fn shift(kernels: &MergeKernels, strip: &Strip, done: &[f32], shares: &[f32], columns: usize) -> Vec<Lane> {
    let mut shift = vec![Lane::ZERO; columns];
    let before = done.len() / columns.max(1);
    if before == 0 {
        return shift;
    }
    let mut lanes = vec![Lane::ZERO; before];
    for (row, shares) in shares.chunks_exact(before).enumerate() {
        for (lane, &share) in lanes.iter_mut().zip(shares) {
            lane.0[row] = share;
        }
    }
    let width = strip.block_size;
    let mut panel = vec![0.0; before * width];
    for (block, shift) in shift.chunks_exact_mut(width).enumerate() {
        for (row, panel) in done.chunks_exact(columns).zip(panel.chunks_exact_mut(width)) {
            panel.copy_from_slice(&row[block * width..][..width]);
        }
        (kernels.gather)(&lanes, &panel, shift);
    }
    shift
}
