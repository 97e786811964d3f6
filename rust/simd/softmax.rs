//! The loops of the cross-entropy, written once: each path compiles them for its instructions.
//!
//! Nothing here is fused or reordered by the compiler, and sums have a fixed number of lanes, so
//! every path gives the same bits. The exponential is Cephes' `expf` (Stephen Moshier, Cephes Math
//! Library 2.2): x = n ln 2 + r, and exp x = 2ⁿ exp r by a polynomial; less than one unit in the
//! last place away.

use half::bf16;

/// Partial sums or maxima that are kept at a time: two vectors of AVX-512, four of AVX2.
const LANES: usize = 32;

/// ln 2 in two parts; the first has few enough bits that n times it is exact.
const LN_2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];

/// (exp r - 1 - r) / r² on |r| <= ln 2 / 2, highest power first.
const POLYNOMIAL: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// ln 2⁻¹²⁶: what is smaller has a subnormal exponential, which counts as zero here.
const LOWEST: f32 = -87.336_54;

/// Added to a small number, leaves it rounded to an integer in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// exp x for x <= 0; NaN for NaN.
#[inline(always)]
pub(super) fn exponential(x: f32) -> f32 {
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN_2[0] - n * LN_2[1];
    let mut sum = POLYNOMIAL[0];
    for coefficient in &POLYNOMIAL[1..] {
        sum = sum * r + coefficient;
    }
    // The bits of `rounded` above the ninth leave with the shift; 127 is the exponent of one.
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    let value = (sum * r * r + r + 1.0) * power;
    if x < LOWEST { 0.0 } else { value }
}

/// See [`super::Kernels::exponentials`].
#[inline(always)]
pub(super) fn exponentials(values: &mut [f32], shift: f32, scale: f32) -> f64 {
    let mut sums = [0.0_f32; LANES];
    let mut add = |values: &mut [f32; LANES]| {
        for (value, sum) in values.iter_mut().zip(&mut sums) {
            *value = exponential(*value - shift) * scale;
            *sum += *value;
        }
    };
    let (whole, tail) = values.as_chunks_mut::<LANES>();
    whole.iter_mut().for_each(&mut add);
    if !tail.is_empty() {
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..tail.len()].copy_from_slice(tail);
        add(&mut last);
        tail.copy_from_slice(&last[..tail.len()]);
    }
    sums.iter().map(|&sum| f64::from(sum)).sum()
}

/// See [`super::Kernels::largest`].
#[inline(always)]
pub(super) fn largest(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, tail) = values.as_chunks::<LANES>();
    for values in whole {
        for (lane, &value) in lanes.iter_mut().zip(values) {
            *lane = larger(*lane, value);
        }
    }
    lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, larger)
}

/// See [`super::Kernels::narrow_bf16`].
#[inline(always)]
pub(super) fn narrow_bf16(values: &[f32], out: &mut [bf16]) {
    for (value, out) in values.iter().zip(out) {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        // Rounding could carry NaN into infinity: cut it instead, with a bit set that survives.
        let bits = if value.is_nan() { bits | 0x40_0000 } else { rounded };
        *out = bf16::from_bits((bits >> 16) as u16);
    }
}
