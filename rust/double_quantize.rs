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

/// The mean of `absmax`, summed exactly enough that the order of summation cannot show: f64 over
/// fewer than 2^29 f32 values rounds to the same f32 as the exact mean but for ties.
#[must_use]
pub fn mean(absmax: &[f32]) -> f32 {
    if absmax.is_empty() {
        return 0.0;
    }
    let sum: f64 = absmax.iter().map(|&a| f64::from(a)).sum();
    (sum / absmax.len() as f64) as f32
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
fn midpoints() -> [f32; 256] {
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
    fn equal_absmax_round_trip_exactly() {
        let absmax = [0.3_f32; 300];
        let (mut codes, mut nested) = ([9; 300], [9.0; 2]);
        double_quantize(&absmax, mean(&absmax), &mut codes, &mut nested, 1).expect("finite");
        assert_eq!((codes, nested), ([crate::codebook::NESTED_ZERO_CODE; 300], [0.0; 2]));
    }
}
