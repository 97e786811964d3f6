//! AVX2: activations brought into fixed point (`fixed.rs`), as words and as pairs; factors, as pairs.

use super::PREPARED_MULTIPLE;
use super::avx2_linear::sum_of_lanes;
use super::fixed::{EXPONENTS, LARGEST_SUM, LARGEST_WORD, PAIR_SCALE, UNIT_SIZE, WORD_SCALE};
use super::fixed::{Loss, PairStep, WordStep, prepare_steps, unit_exponent};
use crate::gemm::pairs::factor;
use crate::gemm::pairs::panel::{self, UNIT_STEPS};
use crate::gemm::tile::{SIDE, Tile};
use std::arch::x86_64::*;

/// Words of a vector.
pub(super) const WORDS: usize = 16;

/// See [`super::FewRowsFixed`].
#[target_feature(enable = "avx2,fma")]
pub(super) fn prepare(x: &[f32], tolerance: f32, out: &mut [WordStep]) -> bool {
    prepare_steps(x, out, |step, out| prepare_step(step, out)).is_within(tolerance)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn prepare_step(step: &[f32; PREPARED_MULTIPLE], out: &mut WordStep) -> Loss {
    let mut loss = Loss::default();
    let units = step.as_chunks::<UNIT_SIZE>().0.iter().zip(out.words.as_chunks_mut::<UNIT_SIZE>().0);
    for ((values, words), out_unit) in units.zip(&mut out.unit) {
        let (unit, integers, of_unit) = prepare_unit::<false>(values);
        store_words(&integers, words);
        *out_unit = [unit / WORD_SCALE; 8];
        loss += of_unit;
    }
    loss
}

/// See [`super::FewRowsFixed`].
#[target_feature(enable = "avx2,fma")]
pub(super) fn prepare_pairs(x: &[f32], tolerance: f32, out: &mut [PairStep]) -> bool {
    prepare_steps(x, out, |step, out| prepare_pair_step(step, out)).is_within(tolerance)
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn prepare_pair_step(step: &[f32; PREPARED_MULTIPLE], out: &mut PairStep) -> Loss {
    let mut loss = Loss::default();
    let units = step.as_chunks::<UNIT_SIZE>().0.iter().zip(out.pairs.as_chunks_mut::<{ UNIT_SIZE / 2 }>().0);
    for ((values, pairs), out_unit) in units.zip(out.unit.as_chunks_mut::<{ UNIT_SIZE / 8 }>().0) {
        let (unit, integers, of_unit) = prepare_unit::<true>(values);
        for (integers, pairs) in integers.as_chunks::<2>().0.iter().zip(pairs.as_chunks_mut::<8>().0) {
            store_pairs(integers, pairs);
        }
        out_unit.fill(unit / PAIR_SCALE);
        loss += of_unit;
    }
    loss
}

/// See [`super::PairPanels::factor_left`].
#[target_feature(enable = "avx2,fma")]
pub(super) fn factor_left(values: &[f32], row: usize, steps: usize, panel: &mut [Tile]) {
    let (half, row) = (row / SIDE, row % SIDE);
    for unit in 0..steps.div_ceil(UNIT_STEPS) {
        let of_unit = values.get(unit * UNIT_SIZE..).unwrap_or_default();
        if of_unit.is_empty() {
            // Words of a unit that is zero may be anything.
            panel::units_mut(panel, steps, unit, half)[row] = 0;
            continue;
        }
        let mut padded = [0.0; UNIT_SIZE];
        let of_unit = of_unit.first_chunk::<UNIT_SIZE>().unwrap_or_else(|| {
            padded[..of_unit.len()].copy_from_slice(of_unit);
            &padded
        });
        let values: [__m256; 8] = std::array::from_fn(|i| {
            // SAFETY: i < 8, so 8 floats from 8 * i lie in the array of 64.
            unsafe { _mm256_loadu_ps(of_unit.as_ptr().add(8 * i)) }
        });
        let sign = _mm256_set1_ps(-0.0);
        // Magnitudes order like their bits, NaN and infinity above all numbers.
        let sizes = values.map(|value| _mm256_castps_si256(_mm256_andnot_ps(sign, value)));
        let most = sizes.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_max_epi32(a, b));
        let largest = f32::from_bits(largest_lane(most));
        let kept = if largest.is_finite() { largest } else { f32::NAN };
        panel::units_mut(panel, steps, unit, half)[row] = kept.to_bits();
        let divisor = _mm256_set1_ps(if largest == 0.0 { 1.0 } else { largest });
        let integers = values.map(|value| {
            let share = _mm256_div_ps(value, divisor);
            _mm256_cvtps_epi32(_mm256_mul_ps(share, _mm256_set1_ps(PAIR_SCALE)))
        });
        for (step, integers) in (unit * UNIT_STEPS..steps).zip(integers.as_chunks::<4>().0) {
            let words = panel[2 * step + half].0[row].as_chunks_mut::<8>().0;
            for (integers, words) in integers.as_chunks::<2>().0.iter().zip(words) {
                store_pairs(integers, words);
            }
        }
    }
}

/// See [`super::PairPanels::factor_right`].
#[target_feature(enable = "avx2,fma")]
pub(super) fn factor_right(values: &[f32], width: usize, steps: usize, panels: &mut [Tile]) {
    factor::right(values, width, steps, panels);
}

/// 16 integers as words, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn store_pairs<T>(integers: &[__m256i; 2], pairs: &mut [T; 8]) {
    const { assert!(size_of::<T>() == size_of::<u32>(), "a pair of words has 32 bits") };
    // Packing works within 128-bit halves: back in order.
    let packed = _mm256_packs_epi32(integers[0], integers[1]);
    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
    // SAFETY: the array holds the 8 pairs that are written.
    unsafe { _mm256_storeu_si256(pairs.as_mut_ptr().cast(), words) };
}

/// A unit, 64 activations as multiples of it, and what that loses. `SUMMED`: whether all their products are
/// summed in one lane.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn prepare_unit<const SUMMED: bool>(values: &[f32; UNIT_SIZE]) -> (f32, [__m256i; 8], Loss) {
    let values: [__m256; 8] = std::array::from_fn(|i| {
        // SAFETY: i < 8, so 8 floats from 8 * i lie in the array of 64.
        unsafe { _mm256_loadu_ps(values.as_ptr().add(8 * i)) }
    });
    let sign = _mm256_set1_ps(-0.0);
    let sizes = values.map(|value| _mm256_andnot_ps(sign, value));
    // Magnitudes order like their bits, NaN and infinity above all numbers.
    let most = sizes.map(|size| _mm256_castps_si256(size));
    let most = most.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_max_epi32(a, b));
    let mut exponent = unit_exponent::<LARGEST_WORD>(largest_lane(most));
    if SUMMED {
        let sum = sizes.into_iter().fold(_mm256_setzero_ps(), |a, b| _mm256_add_ps(a, b));
        exponent = exponent.max(unit_exponent::<LARGEST_SUM>(sum_of_lanes(sum).to_bits()));
    }
    let (unit, inverse) = (f32::from_bits(exponent << 23), f32::from_bits((254 - exponent) << 23));
    let scaled = values.map(|value| _mm256_mul_ps(value, _mm256_set1_ps(inverse)));
    let integers = scaled.map(|value| _mm256_cvtps_epi32(value));
    let mut error = _mm256_setzero_ps();
    for (value, integer) in scaled.iter().zip(integers) {
        let lost = _mm256_sub_ps(*value, _mm256_cvtepi32_ps(integer));
        error = _mm256_fmadd_ps(lost, lost, error);
    }
    // Of eight values, in four pairs, the smallest of the pairs' larger ones: about as large as they are,
    // unless every pair holds one that is too large. Lanes are turned by distances that have nothing in
    // common, so that no such values at equal distances meet every pair, but for each third one.
    let mut typical = _mm256_set1_ps(f32::INFINITY);
    for (i, turn) in [0, 3, 1, 6].into_iter().enumerate() {
        let pair = _mm256_castps_si256(_mm256_max_ps(sizes[i], sizes[i + 4]));
        let lanes = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(turn));
        let turned = _mm256_permutevar8x32_epi32(pair, lanes);
        typical = _mm256_min_ps(typical, _mm256_castsi256_ps(turned));
    }
    let typical = _mm256_mul_ps(typical, _mm256_set1_ps(inverse));
    let square = f64::from(unit).powi(2);
    let mut loss = Loss {
        error: square * f64::from(sum_of_lanes(error)),
        size: square * 8.0 * f64::from(sum_of_lanes(_mm256_mul_ps(typical, typical))),
    };
    if exponent > *EXPONENTS.end() {
        // NaN, unlike infinity, is refused however large the row is.
        loss.error = f64::NAN;
    }
    (unit, integers, loss)
}

/// 64 integers as words, in the order in which a step's levels are unpacked: those of high nibbles, first
/// of bytes 0..8 of either half of the codes, then of bytes 8..16; then those of low nibbles.
#[inline]
#[target_feature(enable = "avx2")]
fn store_words(integers: &[__m256i; 8], words: &mut [i16; UNIT_SIZE]) {
    let (words, _) = words.as_chunks_mut::<WORDS>();
    for first in 0..2 {
        // 16 weights of the codes' lower half, as many of the upper half.
        let [a, b] = [2 * first, 2 * first + 4].map(|i| _mm256_packs_epi32(integers[i], integers[i + 1]));
        // Packing works within 128-bit halves: back in order.
        let [a, b] = [a, b].map(|v| _mm256_permute4x64_epi64::<0b11_01_10_00>(v));
        // Even words to the lower 8 bytes of each half, odd ones to the upper.
        let apart = _mm256_setr_epi8(
            0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10,
            11, 14, 15,
        );
        let [a, b] = [a, b].map(|v| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_shuffle_epi8(v, apart)));
        let even = _mm256_permute2x128_si256::<0x20>(a, b);
        let odd = _mm256_permute2x128_si256::<0x31>(a, b);
        // SAFETY: first < 2, and there are four arrays of the 16 words that are written.
        unsafe {
            _mm256_storeu_si256(words[first].as_mut_ptr().cast(), even);
            _mm256_storeu_si256(words[2 + first].as_mut_ptr().cast(), odd);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn largest_lane(v: __m256i) -> u32 {
    let four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
    _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two))) as u32
}
