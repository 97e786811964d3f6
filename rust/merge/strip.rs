//! The state of 48 rows of W while they are solved: one vector lane per row.
//!
//! Element k of a strip holds column k of all its rows, so that a step on one column is a step on
//! three 16-lane registers, whatever the row's neighbours do. Rows past the matrix's end are zero.
//! Read next: `feedback.rs`, `descent.rs`.

use super::Problem;
use super::curvature::Curvature;
use super::grid::Grid;
use crate::codebook::{BOUNDARIES, LEVELS};
use crate::quantize::nearest_code;
use crate::simd::merging::MergeKernels;

/// Rows per strip: three registers of 16 lanes leave room for eight columns of sums.
pub const ROWS: usize = 48;

/// One value per row.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub struct Lane(pub [f32; ROWS]);

impl Lane {
    /// Zero in every row.
    pub const ZERO: Self = Self([0.0; ROWS]);
}

/// Targets, levels, scales and errors of the strip's rows.
#[derive(Clone, Debug)]
pub struct Strip {
    pub(super) target: Vec<Lane>,
    /// The level of each weight, one of `LEVELS`.
    pub(super) levels: Vec<Lane>,
    /// target - level * scale.
    pub(super) errors: Vec<Lane>,
    /// One scale per block of the row.
    pub(super) scales: Vec<Lane>,
    /// The codes of those scales on the grid; zero where the grid is free.
    pub(super) scale_codes: Vec<[u8; ROWS]>,
    pub(super) block_size: usize,
    pub(super) rows: usize,
    pub(super) first: usize,
}

impl Strip {
    /// The strip that starts at row `first`, rounded to nearest.
    pub(super) fn nearest(problem: &Problem<'_>, grid: &Grid<'_>, first: usize) -> Self {
        let matrix = &problem.nearest;
        let (columns, block_size) = (matrix.columns(), matrix.block_size());
        let blocks = columns / block_size;
        let rows = ROWS.min(matrix.rows() - first);
        let mut strip = Self {
            target: vec![Lane::ZERO; columns],
            levels: vec![Lane::ZERO; columns],
            errors: vec![Lane::ZERO; columns],
            scales: vec![Lane::ZERO; blocks],
            scale_codes: vec![[0; ROWS]; blocks],
            block_size,
            rows,
            first,
        };
        for row in 0..rows {
            let start = (first + row) * columns;
            for block in 0..blocks {
                let (scale, code) = grid.stored((first + row) * blocks + block);
                strip.scales[block].0[row] = scale;
                strip.scale_codes[block][row] = code;
            }
            for column in 0..columns {
                let index = start + column;
                let byte = matrix.codes()[index / 2];
                let code = if index.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
                let level = LEVELS[usize::from(code)];
                let target = problem.target[start + column];
                strip.target[column].0[row] = target;
                strip.levels[column].0[row] = level;
                strip.errors[column].0[row] = target - level * strip.scales[column / block_size].0[row];
            }
        }
        strip
    }

    /// e H eᵀ of each row, with H damped; summed in f64.
    pub(super) fn objectives(&self, kernels: &MergeKernels, curvature: &Curvature<'_>) -> [f64; ROWS] {
        let mut total = [0.0; ROWS];
        let mut sums = vec![Lane::ZERO; self.block_size];
        for block in 0..self.scales.len() {
            (kernels.gather)(&self.errors, curvature.hessian(block), &mut sums);
            let errors = &self.errors[block * self.block_size..];
            for (error, sum) in errors.iter().zip(&sums) {
                for row in 0..ROWS {
                    total[row] += f64::from(error.0[row]) * f64::from(sum.0[row]);
                }
            }
        }
        total
    }

    /// Copy the solution of one row.
    pub(super) fn take_row(&mut self, other: &Self, row: usize) {
        for (mine, theirs) in [(&mut self.levels, &other.levels), (&mut self.errors, &other.errors)]
            .into_iter()
            .chain([(&mut self.scales, &other.scales)])
        {
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                mine.0[row] = theirs.0[row];
            }
        }
        for (mine, theirs) in self.scale_codes.iter_mut().zip(&other.scale_codes) {
            mine[row] = theirs[row];
        }
    }

    /// Pack the codes, and hand each block's scale and its code on the grid to `scale`.
    pub(super) fn write(&self, codes: &mut [u8], mut scale: impl FnMut(usize, f32, u8)) {
        let (columns, blocks) = (self.target.len(), self.scales.len());
        // Blocks do not straddle rows and hold an even number of weights, so rows start at a byte.
        for (row, bytes) in codes.chunks_exact_mut(columns / 2).take(self.rows).enumerate() {
            for (byte, pair) in bytes.iter_mut().zip(self.levels.chunks_exact(2)) {
                *byte = nearest_code(pair[0].0[row]) << 4 | nearest_code(pair[1].0[row]);
            }
            for block in 0..blocks {
                let (value, code) = (self.scales[block].0[row], self.scale_codes[block][row]);
                scale(row * blocks + block, value, code);
            }
        }
    }
}

/// The level nearest to a weight in units of its scale, ties going down as everywhere in the format.
#[inline(always)]
pub(crate) fn nearest_level(scaled: f32) -> f32 {
    let mut level = LEVELS[0];
    for (boundary, above) in BOUNDARIES.iter().zip(&LEVELS[1..]) {
        level = if scaled > *boundary { *above } else { level };
    }
    level
}
