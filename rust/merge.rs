//! A float target → NF4 codes and scales whose *outputs* stay close to it.
//!
//! W + scaling B A has to go back onto the NF4 grid. Rounding each weight to its nearest level
//! returns W, because the update is smaller than half a step. What counts is the output: with
//! H = XᵀX / tokens of the layer's inputs, the error of one row is e H eᵀ, e = target - quantized.
//! Codes are chosen one after another so that later ones make up for the errors of earlier ones.
//!
//! ```text
//! moment     Σ x xᵀ of calibration text           moment.rs
//! Curvature  H, damped, and its factor U             curvature.rs, cholesky.rs
//! Grid       the scales that the format can hold     grid.rs
//! Strip      48 rows of W, a vector lane per row     strip.rs
//!   nearest    the start that is given               strip.rs
//!   feedback   another: error feedback (GPTQ)        feedback.rs
//!   descend    coordinate descent from them          descent.rs
//!   anneal     once more, from a thermal start       descent.rs
//! coupling   rows that make up for each other      coupling.rs
//! ```
//!
//! Rows do not depend on each other, unless a coupling says so: strips are the unit of parallel work,
//! and each row keeps the best of all ends, so no row is ever worse than the start it was given, plain
//! rounding or better, in its own objective and for the target it was given.
//! Read next: `strip.rs`.

pub mod cholesky;
pub mod coupling;
pub mod curvature;
mod descent;
mod feedback;
pub mod grid;
pub mod moment;
pub mod strip;
#[cfg(test)]
mod tests;

use crate::error::Error;
use crate::packed_matrix::{PackedMatrix, Scales};
use crate::parallel;
use crate::quantize::check_length;
use crate::simd::merging::MergeKernels;
use curvature::Curvature;
use grid::Grid;
use std::ops::Range;
use strip::{ROWS, Strip};

/// How long the solver tries.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// At most so many passes of coordinate descent from the solution given.
    pub given: usize,
    /// At most so many from error feedback, and in the end.
    pub sweeps: usize,
    /// A strip is done when a pass changes less than this share of its codes.
    pub tolerance: f32,
    /// Whether error feedback is a start too, not only the solution given.
    pub feedback: bool,
    /// Sweeps at a falling temperature before the last descent.
    pub anneal: usize,
}

/// What one matrix is to become: the target, its plain rounding, and the curvature of its inputs.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// The weights wanted, [rows, columns].
    pub target: &'a [f32],
    /// The target rounded to nearest, or a better start; its second-level scales are the grid.
    pub nearest: PackedMatrix<'a>,
    /// H and its factor.
    pub curvature: Curvature<'a>,
    /// How long to try.
    pub effort: Effort,
}

impl Problem<'_> {
    fn check(&self, output: &Output<'_>) -> Result<(), Error> {
        let matrix = &self.nearest;
        let (rows, columns, block_size) = (matrix.rows(), matrix.columns(), matrix.block_size());
        if !matrix.rows_are_aligned() {
            return Err(Error::StraddlingBlocks { columns, block_size });
        }
        check_length("target", self.target.len(), rows * columns)?;
        check_length("codes", output.codes.len(), (rows * columns).div_ceil(2))?;
        check_length("objectives", output.objectives.len(), 2 * rows)?;
        self.curvature.check(columns, block_size)?;
        match self.target.iter().position(|value| !value.is_finite()) {
            Some(first) => Err(Error::NonFiniteStatistic { name: "target", first }),
            None => Ok(()),
        }
    }
}

/// Where the result goes: codes as [`PackedMatrix`] takes them, and scales of the same kind as the
/// ones that `nearest` has.
pub struct Output<'a> {
    /// Two codes per byte.
    pub codes: &'a mut [u8],
    /// One scale per block.
    pub scales: OutputScales<'a>,
    /// e H eᵀ of each row at the start and in the end, e from the target as the solver had it.
    pub objectives: &'a mut [f64],
}

/// Scales of a result.
pub enum OutputScales<'a> {
    /// One f32 per block.
    Single(&'a mut [f32]),
    /// One 8-bit code per block, on the grid of the plain rounding.
    Nested(&'a mut [u8]),
}

/// Solve the problem.
///
/// # Errors
/// [`Error::Operand`] when a length does not fit; [`Error::StraddlingBlocks`] when blocks span rows;
/// [`Error::NonFiniteStatistic`] for a target that is not finite.
pub fn calibrate(
    kernels: &MergeKernels,
    problem: &Problem<'_>,
    output: Output<'_>,
    threads: usize,
) -> Result<(), Error> {
    problem.check(&output)?;
    let rows = problem.nearest.rows();
    if problem.target.is_empty() {
        return Ok(());
    }
    let strips = rows.div_ceil(ROWS);
    solve_strips(
        problem,
        output,
        0..rows,
        std::iter::repeat_n((), strips),
        threads,
        |first, objectives, ()| {
            let grid = Grid::new(&problem.nearest);
            solve_strip(kernels, problem, &grid, Strip::nearest(problem, &grid, first), objectives)
        },
    )
}

/// Solve the strips of some rows, whose first is a multiple of [`ROWS`], each with one of `extras`:
/// `solve(first row, objectives, extra)`.
fn solve_strips<E: Send>(
    problem: &Problem<'_>,
    output: Output<'_>,
    rows: Range<usize>,
    extras: impl ExactSizeIterator<Item = E> + Send,
    threads: usize,
    solve: impl Fn(usize, &mut [f64], E) -> Strip + Sync,
) -> Result<(), Error> {
    let matrix = &problem.nearest;
    let (columns, blocks) = (matrix.columns(), matrix.columns() / matrix.block_size());
    let (skipped, count) = (rows.start / ROWS, rows.len().div_ceil(ROWS));
    let codes = output.codes.chunks_mut(ROWS * columns / 2).skip(skipped).take(count);
    let objectives = output.objectives.chunks_mut(2 * ROWS).skip(skipped);
    let strips = codes.zip(objectives).zip(extras).enumerate();
    let first = |strip: usize| (skipped + strip) * ROWS;
    match (matrix.scales(), output.scales) {
        (Scales::Single(_), OutputScales::Single(scales)) => {
            check_length("absmax", scales.len(), matrix.rows() * blocks)?;
            let strips = strips.zip(scales.chunks_mut(ROWS * blocks).skip(skipped));
            parallel::for_each(strips, threads, |((i, ((codes, objectives), extra)), scales)| {
                let strip = solve(first(i), objectives, extra);
                strip.write(codes, |index, scale, _| scales[index] = scale);
            });
        }
        (Scales::Nested { .. }, OutputScales::Nested(scales)) => {
            check_length("absmax", scales.len(), matrix.rows() * blocks)?;
            let strips = strips.zip(scales.chunks_mut(ROWS * blocks).skip(skipped));
            parallel::for_each(strips, threads, |((i, ((codes, objectives), extra)), scales)| {
                let strip = solve(first(i), objectives, extra);
                strip.write(codes, |index, _, code| scales[index] = code);
            });
        }
        _ => return Err(Error::Operand { name: "absmax", got: 0, expected: matrix.rows() * blocks }),
    }
    Ok(())
}

/// The starts that the effort names, descended; the best of each row, the given one among them.
fn solve_strip(
    kernels: &MergeKernels,
    problem: &Problem<'_>,
    grid: &Grid<'_>,
    nearest: Strip,
    objectives: &mut [f64],
) -> Strip {
    let curvature = &problem.curvature;
    let start = nearest.objectives(kernels, curvature);
    let ahead = problem.effort.feedback.then(|| {
        let mut ahead = nearest.clone();
        feedback::choose_scales(kernels, &mut ahead, grid, curvature);
        feedback::round(kernels, &mut ahead, curvature);
        ahead
    });
    let mut best = nearest.clone();
    let mut best_objectives = start;
    let mut settle = |mut strip: Strip, sweeps: usize| {
        descent::descend(kernels, &mut strip, grid, curvature, Effort { sweeps, ..problem.effort });
        let end = strip.objectives(kernels, curvature);
        for row in 0..ROWS {
            if end[row] < best_objectives[row] {
                best.take_row(&strip, row);
                best_objectives[row] = end[row];
            }
        }
        (best.clone(), best_objectives)
    };
    let (mut found, mut reached) = match problem.effort.given {
        0 => (nearest, start),
        sweeps => settle(nearest, sweeps),
    };
    let sweeps = problem.effort.sweeps;
    if let Some(ahead) = ahead {
        (found, reached) = settle(ahead, sweeps);
    }
    if problem.effort.anneal > 0 {
        descent::anneal(kernels, &mut found, grid, curvature, &reached, problem.effort.anneal);
        settle(found, sweeps);
    }
    let pairs = start.into_iter().zip(best_objectives);
    for (out, (before, after)) in objectives.chunks_exact_mut(2).zip(pairs) {
        out.copy_from_slice(&[before, after]);
    }
    best
}
