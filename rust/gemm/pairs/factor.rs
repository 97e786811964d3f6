//! Factors of the low-rank part → right panels of pairs, compiled for CPU paths that have such panels.

use super::panel::{self, STEP, UNIT_STEPS};
use crate::gemm::tile::{PANEL, SIDE, Tile};
use crate::simd::PAIR_SCALE;

/// Right panels of `steps` steps from rows of `width` values: a unit is the largest magnitude of 64 rows in
/// one column.
#[inline(always)]
pub fn right(values: &[f32], width: usize, steps: usize, panels: &mut [Tile]) {
    let row = |k: usize, first: usize| {
        let mut out = [0.0; SIDE];
        let row = values.get(k * width..(k + 1) * width).unwrap_or_default();
        let rest = row.get(first..).unwrap_or_default();
        // A length that the compiler knows becomes a few moves instead of a call.
        match rest.first_chunk::<SIDE>() {
            Some(values) => out = *values,
            None => out[..rest.len()].copy_from_slice(rest),
        }
        out
    };
    for (i, panel) in panels.chunks_exact_mut(panel::tiles(steps)).enumerate() {
        for half in 0..2 {
            let first = i * PANEL + half * SIDE;
            for unit in 0..steps.div_ceil(UNIT_STEPS) {
                let steps_of_unit = unit * UNIT_STEPS..steps.min((unit + 1) * UNIT_STEPS);
                let mut largest = [0.0; SIDE];
                for k in steps_of_unit.start * STEP..steps_of_unit.end * STEP {
                    keep_largest(&mut largest, &row(k, first));
                }
                let divisors = largest.map(divisor);
                *panel::units_mut(panel, steps, unit, half) = largest.map(f32::to_bits);
                for word_row in steps_of_unit.start * SIDE..steps_of_unit.end * SIDE {
                    let (even, odd) = (row(2 * word_row, first), row(2 * word_row + 1, first));
                    panel[2 * (word_row / SIDE) + half].0[word_row % SIDE] = std::array::from_fn(|c| {
                        word(even[c] / divisors[c]) | word(odd[c] / divisors[c]) << 16
                    });
                }
            }
        }
    }
}

/// The larger of a magnitude and that of `value`; NaN if one of them is not finite.
#[inline(always)]
fn larger(largest: f32, value: f32) -> f32 {
    let size = value.abs();
    let size = if size < f32::INFINITY { size } else { f32::NAN };
    if size <= largest { largest } else { size + 0.0 * largest }
}

#[inline(always)]
fn keep_largest(largest: &mut [f32; SIDE], values: &[f32; SIDE]) {
    for (largest, value) in largest.iter_mut().zip(values) {
        *largest = larger(*largest, *value);
    }
}

/// What brings values of which this is the largest to 1 at most.
#[inline(always)]
fn divisor(largest: f32) -> f32 {
    if largest == 0.0 { 1.0 } else { largest }
}

/// `PAIR_SCALE` times a value of 1 at most, to nearest, as a word.
#[inline(always)]
fn word(value: f32) -> u32 {
    /// Where f32 are whole numbers, with zeros in their lower sixteen bits.
    const WHOLE: f32 = 1.5 * (1 << 23) as f32;
    (value * PAIR_SCALE + WHOLE).to_bits() & 0xffff
}
