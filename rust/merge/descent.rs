//! Coordinate descent on e H eᵀ: a block's scale, then each of its codes, takes its best value.
//!
//! With G = e H, moving weight j by d changes the objective by H_jj d² - 2 G_j d, so the best move is
//! G_j / H_jj, rounded to a level; a scale moves along the block's levels c, by (c Gᵀ) / (c H cᵀ),
//! rounded to the grid. A move is made only if it comes closer to the best one, so every step
//! lowers the objective or leaves it. G of a block is computed anew when its turn comes.

use super::Effort;
use super::curvature::Curvature;
use super::grid::Grid;
use super::strip::{Lane, ROWS, Strip};
use crate::simd::merging::MergeKernels;

/// Sweep over all blocks until little changes.
pub(super) fn descend(
    kernels: &MergeKernels,
    strip: &mut Strip,
    grid: &Grid<'_>,
    curvature: &Curvature<'_>,
    effort: Effort,
) {
    let mut sums = vec![Lane::ZERO; strip.block_size];
    let mut products = vec![Lane::ZERO; strip.block_size];
    let few = effort.tolerance * (strip.rows * strip.target.len()) as f32;
    for _ in 0..effort.sweeps {
        let mut changed = 0;
        for block in 0..strip.scales.len() {
            let panel = curvature.hessian(block);
            (kernels.gather)(&strip.errors, panel, &mut sums);
            let first = block * strip.block_size;
            let square = &panel[first * strip.block_size..][..strip.block_size * strip.block_size];
            move_scale(kernels, strip, grid, block, square, &mut sums, &mut products);
            let range = first..first + strip.block_size;
            changed += (kernels.move_codes)(
                &strip.scales[block],
                square,
                &mut sums,
                &mut strip.levels[range.clone()],
                &mut strip.errors[range],
            );
        }
        if (changed as f32) < few {
            break;
        }
    }
}

/// Sweeps at a falling temperature, so that rows leave the dead end that descent took them to.
///
/// A code is drawn from its conditional distribution at the temperature, which starts at what one
/// weight contributes to `objectives`, e H eᵀ of each row as the strip stands.
pub(super) fn anneal(
    kernels: &MergeKernels,
    strip: &mut Strip,
    grid: &Grid<'_>,
    curvature: &Curvature<'_>,
    objectives: &[f64; ROWS],
    sweeps: usize,
) {
    let mut sums = vec![Lane::ZERO; strip.block_size];
    let mut products = vec![Lane::ZERO; strip.block_size];
    // Seeded by the row's place in the matrix: the same for any number of threads.
    let seed = |row: usize| (((strip.first + row) as u32).wrapping_mul(0x9E37_79B9) ^ 0x85EB_CA6B) | 1;
    let mut state: [u32; ROWS] = std::array::from_fn(seed);
    for sweep in 0..sweeps {
        let left = 1.0 - sweep as f64 / sweeps as f64;
        let mut noise = Lane::ZERO;
        for row in 0..ROWS {
            noise.0[row] = (left * (objectives[row] / strip.target.len() as f64).sqrt()) as f32;
        }
        for block in 0..strip.scales.len() {
            let panel = curvature.hessian(block);
            (kernels.gather)(&strip.errors, panel, &mut sums);
            let first = block * strip.block_size;
            let square = &panel[first * strip.block_size..][..strip.block_size * strip.block_size];
            move_scale(kernels, strip, grid, block, square, &mut sums, &mut products);
            let range = first..first + strip.block_size;
            (kernels.shake_codes)(
                &strip.scales[block],
                square,
                &noise,
                &mut state,
                &mut sums,
                &mut strip.levels[range.clone()],
                &mut strip.errors[range],
            );
        }
    }
}

/// One scale per row: the best on the grid for the codes as they are.
fn move_scale(
    kernels: &MergeKernels,
    strip: &mut Strip,
    grid: &Grid<'_>,
    block: usize,
    square: &[f32],
    sums: &mut [Lane],
    products: &mut [Lane],
) {
    let blocks = strip.scales.len();
    let range = block * strip.block_size..(block + 1) * strip.block_size;
    let levels = &strip.levels[range.clone()];
    (kernels.gather)(levels, square, products);
    let (mut slope, mut curve) = ([0.0_f32; ROWS], [0.0_f32; ROWS]);
    for ((level, sum), product) in levels.iter().zip(&*sums).zip(&*products) {
        for row in 0..ROWS {
            slope[row] += level.0[row] * sum.0[row];
            curve[row] += level.0[row] * product.0[row];
        }
    }
    let mut step = Lane::ZERO;
    for row in 0..strip.rows {
        let scale = strip.scales[block].0[row];
        let best = scale + slope[row] / curve[row];
        // A block of zeros has no best scale, and a negative one is legal but of no use.
        if !(curve[row] > 0.0 && best > 0.0 && best.is_finite()) {
            continue;
        }
        let (new, code) = grid.nearest((strip.first + row) * blocks + block, best);
        if new > 0.0 && (new - best).abs() < (scale - best).abs() {
            step.0[row] = new - scale;
            strip.scales[block].0[row] = new;
            strip.scale_codes[block][row] = code;
        }
    }
    let state = strip.errors[range.clone()].iter_mut().zip(&strip.target[range]);
    for ((((error, target), level), sum), product) in state.zip(levels).zip(&mut *sums).zip(&*products) {
        for row in 0..ROWS {
            error.0[row] = target.0[row] - level.0[row] * strip.scales[block].0[row];
            sum.0[row] -= step.0[row] * product.0[row];
        }
    }
}
