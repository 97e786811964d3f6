//! How a tensor core adds up products: exactly, one after another in f32, or truncated as A100 and H100 do.
//!
//! The truncating models follow Fasi, Higham, Mikaitis and Pranesh ("Numerical behavior of NVIDIA tensor
//! cores", 2021) and Khattak and Mikaitis ("Accurate models of NVIDIA tensor cores", 2025): products are exact,
//! all terms of one step are aligned to the largest exponent with a few extra bits and truncated, and
//! their sum is truncated to f32.

use crate::options::MatrixModel;
use crate::rounding::{F32, Rounding, encode, odd_sum, power_of_two};

/// Terms that one hardware step adds, and the extra bits it keeps.
fn step(model: MatrixModel, operand_bytes: usize) -> (usize, i32) {
    match model {
        MatrixModel::H100 => (32 / operand_bytes, 2),
        _ => (16 / operand_bytes, 1),
    }
}

/// Σ a_i b_i + c as an f64 that holds at least the f32 result: for the exact model rounded to odd, for the
/// others already an f32.
pub(crate) fn dot(model: MatrixModel, a: &[f64], b: &[f64], c: f64, operand_bytes: usize) -> f64 {
    match model {
        MatrixModel::Exact => exact(a, b, c),
        MatrixModel::Sequential => {
            a.iter().zip(b).fold(c, |sum, (x, y)| f64::from(odd_sum(x * y, sum) as f32))
        }
        MatrixModel::A100 | MatrixModel::H100 => {
            let (terms, extra) = step(model, operand_bytes);
            a.chunks(terms).zip(b.chunks(terms)).fold(c, |sum, (x, y)| truncated(x, y, sum, extra))
        }
    }
}

fn exponent(x: f64) -> i32 {
    ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023
}

/// One step of a truncating tensor core.
fn truncated(a: &[f64], b: &[f64], c: f64, extra: i32) -> f64 {
    let plain: f64 = a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>() + c;
    if !plain.is_finite() {
        return plain;
    }
    // The exponent of a product is the sum of its factors' exponents, before normalisation.
    let products = a.iter().zip(b).filter(|(x, y)| **x != 0.0 && **y != 0.0);
    let largest = products.clone().map(|(x, y)| exponent(*x) + exponent(*y));
    let Some(largest) = largest.chain((c != 0.0).then(|| exponent(c))).max() else { return 0.0 };
    let quantum = largest - 23 - extra;
    let cut = |x: f64| (x * power_of_two_wide(-quantum)).trunc() as i64;
    let sum: i64 = products.map(|(x, y)| cut(x * y)).sum::<i64>() + cut(c);
    let bits = encode(sum as f64 * power_of_two_wide(quantum), F32, Rounding::Zero);
    f64::from(f32::from_bits(bits as u32))
}

/// 2^exponent for any exponent that products of f32 values reach.
fn power_of_two_wide(exponent: i32) -> f64 {
    power_of_two(exponent / 2) * power_of_two(exponent - exponent / 2)
}

fn exact(a: &[f64], b: &[f64], c: f64) -> f64 {
    let mut sum = c;
    let mut lost = false;
    for (x, y) in a.iter().zip(b) {
        let term = x * y;
        let next = sum + term;
        let rest = next - sum;
        lost |= (sum - (next - rest)) + (term - rest) != 0.0;
        sum = next;
    }
    if !lost || !sum.is_finite() { sum } else { wide_sum(a, b, c) }
}

/// Lowest bit of the wide accumulator: below the product of two subnormal bf16 or tf32 values.
const LOWEST: i32 = -320;
const LIMBS: usize = 21;

/// The sum in 672-bit fixed point, rounded to odd at the end.
fn wide_sum(a: &[f64], b: &[f64], c: f64) -> f64 {
    let mut limbs = [0i64; LIMBS];
    let terms = a.iter().zip(b).map(|(x, y)| x * y).chain(std::iter::once(c));
    for term in terms.filter(|term| *term != 0.0) {
        let bits = term.to_bits();
        let significand = (bits & ((1 << 52) - 1)) | (1 << 52);
        let position = (exponent(term) - 52 - LOWEST) as usize;
        let spread = u128::from(significand) << (position % 32);
        for i in 0..3 {
            let limb = (spread >> (32 * i)) as u32;
            limbs[position / 32 + i] += if term < 0.0 { -i64::from(limb) } else { i64::from(limb) };
        }
    }
    let normalise = |limbs: &mut [i64; LIMBS]| {
        let mut carry = 0;
        for limb in limbs.iter_mut() {
            let value = *limb + carry;
            *limb = value & 0xffff_ffff;
            carry = value >> 32;
        }
        carry
    };
    let negative = normalise(&mut limbs) < 0;
    if negative {
        for limb in &mut limbs {
            *limb = 0xffff_ffff - *limb;
        }
        limbs[0] += 1;
        normalise(&mut limbs);
    }
    let Some(top) = limbs.iter().rposition(|limb| *limb != 0) else { return 0.0 };
    let limb = |i: usize| top.checked_sub(i).map_or(0, |at| limbs[at] as u128);
    let window = limb(0) << 64 | limb(1) << 32 | limb(2);
    let below = top >= 3 && limbs[..top - 2].iter().any(|limb| *limb != 0);
    let length = 128 - window.leading_zeros() as i32;
    let drop = (length - 53).max(0);
    let mut kept = (window >> drop) as u64;
    if below || window & ((1u128 << drop) - 1) != 0 {
        kept |= 1;
    }
    let magnitude = kept as f64 * power_of_two_wide(32 * (top as i32 - 2) + LOWEST + drop);
    if negative { -magnitude } else { magnitude }
}

/// Highest and lowest bit positions of the non-zero values, or None when one is not finite.
fn bit_range(values: &[f64]) -> Option<(i32, i32)> {
    let (mut high, mut low) = (i32::MIN / 4, i32::MAX / 4);
    for &x in values {
        if !x.is_finite() {
            return None;
        }
        if x != 0.0 {
            let trailing = (x.to_bits() & ((1 << 52) - 1) | (1 << 52)).trailing_zeros() as i32;
            high = high.max(exponent(x));
            low = low.min(exponent(x) - 52 + trailing);
        }
    }
    Some((high, low))
}

/// Whether every sum of products of `a` and `b` plus one of `c` is exact in f64, in any order.
pub(crate) fn sums_are_exact(a: &[f64], b: &[f64], c: &[f64], k: usize) -> bool {
    let (Some(a), Some(b), Some(c)) = (bit_range(a), bit_range(b), bit_range(c)) else { return false };
    // A product of values below 2^(e+1) each is below 2^(ea+eb+2); k of them and c need log2(k) + 1 more.
    let high = (a.0 + b.0 + 2).max(c.0 + 1) + k.ilog2() as i32 + 1;
    high - (a.1 + b.1).min(c.1) <= 53
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exact_model_rounds_once() {
        // 2^100 + 1 - 2^100 = 1, which f32 and f64 sums in order would lose.
        let big = power_of_two(50);
        let sum = dot(MatrixModel::Exact, &[big, 1.0, -big], &[big, 1.0, big], 0.0, 2);
        assert_eq!(sum, 1.0);
        let sum = dot(MatrixModel::Sequential, &[big, 1.0, -big], &[big, 1.0, big], 0.0, 2);
        assert_eq!(sum, 0.0);
    }

    #[test]
    fn the_wide_sum_agrees_with_integers() {
        let mut state = 7u64;
        for _ in 0..2_000 {
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 40) as i64 - (1 << 23)
            };
            let a: [i64; 8] = std::array::from_fn(|_| next());
            let b: [i64; 8] = std::array::from_fn(|_| next());
            let c = next();
            let expected: i64 = a.iter().zip(&b).map(|(x, y)| x * y).sum::<i64>() + c;
            let scale = power_of_two(-30);
            let a = a.map(|x| x as f64 * scale);
            let b = b.map(|x| x as f64 * scale);
            let sum = wide_sum(&a, &b, c as f64 * power_of_two(-60));
            assert_eq!(sum, expected as f64 * power_of_two(-60));
        }
    }

    #[test]
    fn truncation_keeps_the_bits_that_the_hardware_keeps() {
        // 1 + 2^-24: A100 aligns with one extra bit, so the term survives alignment but not the result.
        assert_eq!(truncated(&[1.0, power_of_two(-24)], &[1.0, 1.0], 0.0, 1), 1.0);
        // Two of them add up to 2^-23, which the result holds.
        let a = [1.0, power_of_two(-24), power_of_two(-24)];
        assert_eq!(truncated(&a, &[1.0; 3], 0.0, 1), 1.0 + power_of_two(-23));
        // Four of 2^-25 need two extra bits.
        let a = [1.0, power_of_two(-25), power_of_two(-25), power_of_two(-25), power_of_two(-25)];
        assert_eq!(truncated(&a, &[1.0; 5], 0.0, 1), 1.0);
        assert_eq!(truncated(&a, &[1.0; 5], 0.0, 2), 1.0 + power_of_two(-23));
        // Truncation is towards zero on both sides.
        assert_eq!(truncated(&[-1.0, power_of_two(-26)], &[1.0, 1.0], 0.0, 1), -1.0);
        assert_eq!(truncated(&[1.0, -power_of_two(-30)], &[1.0, 1.0], 0.0, 1), 1.0);
    }
}
