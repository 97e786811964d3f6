//! The second start: scales that suit the inputs, then rounding with error feedback (GPTQ).

use super::curvature::Curvature;
use super::grid::Grid;
use super::strip::{Lane, ROWS, Strip};
use crate::simd::merging::MergeKernels;

/// Shares of a block's largest magnitude that are tried as its scale.
const SHARES: [f32; 9] = [0.82, 0.86, 0.90, 0.94, 0.97, 1.0, 1.03, 1.07, 1.12];

/// Give each block the scale of least error, each weight counting by its input's mean square.
pub(super) fn choose_scales(
    kernels: &MergeKernels,
    strip: &mut Strip,
    grid: &Grid<'_>,
    curvature: &Curvature<'_>,
) {
    let blocks = strip.scales.len();
    let mut importance = vec![0.0; strip.block_size];
    for block in 0..blocks {
        let first = block * strip.block_size;
        let target = &strip.target[first..first + strip.block_size];
        for (j, importance) in importance.iter_mut().enumerate() {
            *importance = curvature.diagonal(first + j);
        }
        let mut largest = [0.0_f32; ROWS];
        for lane in target {
            for row in 0..ROWS {
                largest[row] = largest[row].max(lane.0[row].abs());
            }
        }
        let mut least = [f32::INFINITY; ROWS];
        let mut tried = (Lane::ZERO, [0_u8; ROWS]);
        for share in SHARES {
            for row in 0..strip.rows {
                let index = (strip.first + row) * blocks + block;
                (tried.0.0[row], tried.1[row]) = grid.nearest(index, share * largest[row]);
            }
            let errors = (kernels.rounding_errors)(target, &importance, &tried.0);
            for row in 0..strip.rows {
                if tried.0.0[row] > 0.0 && errors.0[row] < least[row] {
                    least[row] = errors.0[row];
                    strip.scales[block].0[row] = tried.0.0[row];
                    strip.scale_codes[block][row] = tried.1[row];
                }
            }
        }
    }
}

/// Round column by column, by falling diagonal of H; what one column loses, later ones make up for.
pub(super) fn round(kernels: &MergeKernels, strip: &mut Strip, curvature: &Curvature<'_>) {
    let (columns, block_size) = (strip.target.len(), strip.block_size);
    let mut errors = vec![Lane::ZERO; columns];
    let mut sums = vec![Lane::ZERO; block_size];
    for block in 0..columns / block_size {
        let first = block * block_size;
        let panel = curvature.factor(block);
        let (before, within) = panel.split_at(first * block_size);
        (kernels.gather)(&errors[..first], before, &mut sums);
        for j in 0..block_size {
            let column = curvature.column(first + j);
            let scale = &strip.scales[column / block_size];
            let error =
                (kernels.round_column)(&strip.target[column], &sums[j], scale, &mut strip.levels[column]);
            errors[first + j] = error;
            strip.errors[column] = error;
            (kernels.spread)(
                &error,
                &within[j * block_size + j + 1..][..block_size - j - 1],
                &mut sums[j + 1..],
            );
        }
    }
}
