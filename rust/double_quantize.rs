//! Double quantization: one f32 absmax per block → one 8-bit code per block.
//!
//! The mean of all absmax is subtracted, groups of 256 are scaled by their own largest magnitude,
//! and each value takes the nearest entry of the dynamic map (QLoRA, arXiv 2305.14314, section 3;
//! layout as bitsandbytes stores it). Read next: `packed_matrix.rs`, which decodes it.

use crate::codebook::{DYNAMIC_MAP, NESTED_BLOCK};
use crate::error::Error;
use crate::parallel;
use crate::quantize::check_length;

/// Groups per unit of parallel work.
const GROUPS: usize = 16;

/// Exponents of finite float32 numbers, subnormal ones counted with the smallest normal ones.
const EXPONENTS: usize = 254;

/// 32-bit digits of a sum: 254 exponents, 24 bits of mantissa and 32 bits of count are below 320.
const DIGITS: usize = 10;

/// The mean of `absmax` (none negative), rounded once: the same on every device and for every order of
/// summation.
///
/// The sum is exact, as integers: one bin of mantissas per exponent, then binary digits, then a
/// division by hand. Values that are not finite are left out; [`double_quantize`] refuses them. At
/// most 2^32 - 1 values.
#[must_use]
pub fn mean(absmax: &[f32]) -> f32 {
    let mut bins = [0_u64; EXPONENTS];
    for absmax in absmax {
        let (exponent, fraction) = (absmax.to_bits() >> 23 & 255, absmax.to_bits() & 0x7f_ffff);
        let hidden_bit = u32::from(exponent > 0) << 23;
        if let Some(bin) = bins.get_mut(exponent.saturating_sub(1) as usize) {
            *bin += u64::from(fraction | hidden_bit);
        }
    }
    rounded_quotient(&digits(&bins), absmax.len() as u64)
}

/// The sum of `bins[s] * 2^s` in base 2^32, lowest digit first.
fn digits(bins: &[u64; EXPONENTS]) -> [u64; DIGITS] {
    let mut digits = [0; DIGITS];
    let mut carry = 0_u128;
    for (digit, bins) in digits.iter_mut().zip(bins.chunks(32)) {
        // Bins are below 2^56, so the sum is below 2^89.
        carry += bins.iter().enumerate().map(|(s, &bin)| u128::from(bin) << s).sum::<u128>();
        *digit = carry as u64 & 0xffff_ffff;
        carry >>= 32;
    }
    for digit in &mut digits[EXPONENTS.div_ceil(32)..] {
        *digit = carry as u64 & 0xffff_ffff;
        carry >>= 32;
    }
    digits
}

/// digits * 2^-149 / count, rounded to nearest, ties to even.
fn rounded_quotient(digits: &[u64; DIGITS], count: u64) -> f32 {
    let (mut quotient, mut remainder) = (0_u64, 0_u64);
    let mut sticky = false;
    // Exponent of the quotient's last bit, counted from 2^-149. Two digits hold at least 33 bits, 24 are
    // wanted; what follows can only break a tie. One digit after the point: a sum of 1 is a tie at most.
    let mut last = 32 * DIGITS as i32;
    for digit in digits.iter().rev().copied().chain([0]) {
        if quotient >> 32 > 0 {
            sticky |= digit > 0;
            continue;
        }
        let dividend = remainder << 32 | digit;
        quotient = quotient << 32 | dividend.checked_div(count).unwrap_or(0);
        remainder = dividend.checked_rem(count).unwrap_or(0);
        last -= 32;
    }
    sticky |= remainder > 0;
    if quotient == 0 {
        return 0.0;
    }
    let scale = (quotient.ilog2() as i32 + last - 23).max(0);
    let drop = scale - last;
    let half = 1_u64 << (drop - 1);
    let rest = quotient & (2 * half - 1);
    let mantissa = quotient >> drop;
    let up = rest > half || (rest == half && (sticky || mantissa % 2 == 1));
    // The mantissa's leading bit, if it has one, adds 1 to the exponent field; so does its overflow.
    f32::from_bits(((scale as u32) << 23) + mantissa as u32 + u32::from(up))
}

/// Quantize `absmax` around `offset` into `codes` (one per block) and `nested_absmax` (one per 256).
///
/// # Errors
/// [`Error::Operand`] when an output has the wrong length; [`Error::NonFiniteStatistic`] when an
/// absmax or the offset is not finite.
pub fn double_quantize(
    absmax: &[f32],
    offset: f32,
    codes: &mut [u8],
    nested_absmax: &mut [f32],
    threads: usize,
) -> Result<(), Error> {
    check_length("codes", codes.len(), absmax.len())?;
    check_length("nested_absmax", nested_absmax.len(), absmax.len().div_ceil(NESTED_BLOCK))?;
    if let Some(first) = absmax.iter().position(|a| !a.is_finite()) {
        return Err(Error::NonFiniteStatistic { name: "absmax", first });
    }
    if !offset.is_finite() {
        return Err(Error::NonFiniteStatistic { name: "offset", first: 0 });
    }
    let midpoints = midpoints();
    let chunks = absmax
        .chunks(GROUPS * NESTED_BLOCK)
        .zip(codes.chunks_mut(GROUPS * NESTED_BLOCK))
        .zip(nested_absmax.chunks_mut(GROUPS));
    parallel::for_each(chunks, threads, |((absmax, codes), nested)| {
        let groups = absmax.chunks(NESTED_BLOCK).zip(codes.chunks_mut(NESTED_BLOCK)).zip(nested);
        for ((absmax, codes), nested) in groups {
            *nested = quantize_group(absmax, offset, codes, &midpoints);
        }
    });
    Ok(())
}

fn quantize_group(absmax: &[f32], offset: f32, codes: &mut [u8], midpoints: &[f32; 256]) -> f32 {
    let largest = absmax.iter().fold(0.0_f32, |a, &v| a.max((v - offset).abs()));
    // A group that equals the mean everywhere: any finite factor maps it to the code of zero.
    let inverse = if largest > 0.0 { 1.0 / largest.max(f32::MIN_POSITIVE) } else { 0.0 };
    for (&value, code) in absmax.iter().zip(codes) {
        *code = nearest_code(((value - offset) * inverse).clamp(-1.0, 1.0), midpoints);
    }
    largest
}

/// For each code but the last, the largest f32 that is still nearest to it (ties go down).
///
/// The true midpoint of two f32 values may fall between two f32 values; rounding it down makes the
/// f32 comparison `value > midpoint` agree with exact arithmetic.
pub(crate) fn midpoints() -> [f32; 256] {
    let mut midpoints = [f32::INFINITY; 256];
    for (midpoint, pair) in midpoints.iter_mut().zip(DYNAMIC_MAP.windows(2)) {
        // Exact: the sum of two f32 within a factor 2^28 of each other fits in an f64.
        let exact = f64::midpoint(f64::from(pair[0]), f64::from(pair[1]));
        let rounded = exact as f32;
        *midpoint = if f64::from(rounded) > exact { rounded.next_down() } else { rounded };
    }
    midpoints
}

/// Binary search without branches: the number of midpoints below `scaled`.
fn nearest_code(scaled: f32, midpoints: &[f32; 256]) -> u8 {
    let mut code = 0_usize;
    for half in [128, 64, 32, 16, 8, 4, 2, 1] {
        code += if scaled > midpoints[code + half - 1] { half } else { 0 };
    }
    code as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_decodes_to_the_nearest_entry_of_the_map() {
        let midpoints = midpoints();
        let probes = (-4000..=4000).map(|i| i as f32 / 4000.0);
        let near_ties = midpoints[..255].iter().flat_map(|m| [m.next_down(), *m, m.next_up()]);
        for value in probes.chain(near_ties) {
            let code = usize::from(nearest_code(value, &midpoints));
            let distance = |c: usize| (f64::from(DYNAMIC_MAP[c]) - f64::from(value)).abs();
            assert!((0..256).all(|other| distance(code) <= distance(other)), "{value} took {code}");
        }
    }

    #[test]
    fn the_mean_is_rounded_once() {
        assert_eq!(mean(&[]), 0.0);
        assert_eq!(mean(&[0.0; 9]), 0.0);
        assert_eq!(mean(&[f32::MAX; 1000]), f32::MAX);
        assert_eq!(mean(&[f32::from_bits(1); 7]), f32::from_bits(1));
        // Half of the smallest subnormal is a tie and goes to zero; a little more does not.
        assert_eq!(mean(&[0.0, f32::from_bits(1)]), 0.0);
        assert_eq!(mean(&[0.0, f32::from_bits(1), f32::from_bits(1)]), f32::from_bits(1));
        // f64 loses these ones; together they lift the mean over a tie.
        let mut values = vec![1.0_f32; 1 << 10];
        values[0] = 2.0_f32.powi(64);
        values[1] = 2.0_f32.powi(64) * (1.0 + f32::EPSILON);
        assert_eq!(mean(&values), (2.0_f32.powi(64) * (1.0 + f32::EPSILON)) / 512.0);
    }

    #[test]
    fn equal_absmax_round_trip_exactly() {
        let absmax = [0.3_f32; 300];
        let (mut codes, mut nested) = ([9; 300], [9.0; 2]);
        double_quantize(&absmax, mean(&absmax), &mut codes, &mut nested, 1).expect("finite");
        assert_eq!((codes, nested), ([crate::codebook::NESTED_ZERO_CODE; 300], [0.0; 2]));
    }
}
