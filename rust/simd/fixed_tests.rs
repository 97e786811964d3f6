//! Fixed point: what is refused, what is kept, and products to be equal to.

use super::fixed::{FixedStep, LEVEL_SCALE, ZERO_LOW, level};
use super::{PREPARED_MULTIPLE, available};
use crate::codebook::LEVELS;
use half::{bf16, f16};
use proptest::prelude::*;

/// q of activation `k` of a step.
fn integer(step: &FixedStep, k: usize) -> i32 {
    let (odd, at) = (1 - k % 2, k / 2);
    256 * i32::from(step.high[odd][at]) + i32::from(step.low[odd][at])
}

/// One row of packed weights times one prepared row of activations, as `fixed.rs` defines it, and the sum of
/// the sizes of its terms.
pub(super) fn exact_product(
    steps: &[FixedStep],
    codes: &[u8],
    absmax: &[f32],
    block_size: usize,
) -> (f64, f64) {
    let (mut sum, mut size) = (0.0, 0.0);
    for k in 0..2 * codes.len() {
        let step = &steps[k / PREPARED_MULTIPLE];
        let q = f64::from(integer(step, k % PREPARED_MULTIPLE));
        let low = f64::from(step.low[1 - k % 2][k % PREPARED_MULTIPLE / 2]);
        let byte = codes[k / 2];
        let [u, v] =
            level(usize::from(if k % 2 == 0 { byte >> 4 } else { byte & 15 })).to_be_bytes().map(f64::from);
        // The unit that `unit` is 256 / S of.
        let unit =
            f64::from(step.unit[k % PREPARED_MULTIPLE / 8]) / 256.0 * f64::from(absmax[k / block_size]);
        let terms = [(256.0 * u + v) * q, -v * low, f64::from(ZERO_LOW) * low, -f64::from(LEVEL_SCALE) * q];
        sum += unit * terms.iter().sum::<f64>();
        size += unit * terms.iter().map(|term| term.abs()).sum::<f64>();
    }
    (sum, size)
}

#[test]
fn levels_are_rounded_to_nearest_and_zero_is_exact() {
    for (code, exact) in LEVELS.iter().enumerate() {
        let scaled = (f64::from(*exact) + 1.0) * f64::from(LEVEL_SCALE);
        assert!((f64::from(level(code)) - scaled).abs() <= 0.5, "{code}");
    }
    assert_eq!(level(7) % 256, ZERO_LOW as u16);
}

proptest! {
    #[test]
    fn activations_are_rounded_to_nearest(
        x in proptest::collection::vec(prop_oneof![
            8 => -4.0_f32..4.0, 1 => -500.0_f32..500.0, 1 => -1e-6_f32..1e-6, 1 => Just(0.0)
        ], 1..300),
    ) {
        for fixed in available().iter().filter_map(|path| path.few_rows_fixed) {
            let mut steps = vec![FixedStep::ZERO; x.len().div_ceil(PREPARED_MULTIPLE)];
            (fixed.prepare)(&x, 1.0, &mut steps);
            for (k, value) in x.iter().enumerate() {
                let step = &steps[k / PREPARED_MULTIPLE];
                let unit = f64::from(step.unit[k % PREPARED_MULTIPLE / 8]) * f64::from(LEVEL_SCALE) / 256.0;
                let error = f64::from(integer(step, k % PREPARED_MULTIPLE)) * unit - f64::from(*value);
                prop_assert!(error.abs() <= 0.501 * unit, "{value} in units of {unit}");
                let largest = x[k / 64 * 64..x.len().min(k / 64 * 64 + 64)].iter().fold(0.0_f32, |m, v| m.max(v.abs()));
                prop_assert!(unit * 16_300.0 <= f64::from(largest).max(1e-25), "no unit is larger than needed");
            }
        }
    }
}

#[test]
fn fixed_point_says_where_it_would_lose_too_much() {
    for fixed in available().iter().filter_map(|path| path.few_rows_fixed) {
        let takes = |x: &[f32], epsilon: f32| {
            let mut out = vec![FixedStep::ZERO; x.len().div_ceil(PREPARED_MULTIPLE)];
            (fixed.prepare)(x, epsilon / 4.0, &mut out)
        };
        let (brain, half) = (bf16::EPSILON.to_f32(), f16::EPSILON.to_f32());
        let row: Vec<f32> =
            (0..4160).map(|i| bf16::from_f32((i * 7 % 19) as f32 * 0.33 - 3.0).to_f32()).collect();
        let with = |at: &[usize], value: f32| {
            let mut row = row.clone();
            for &at in at {
                row[at] = value;
            }
            row
        };
        assert!(takes(&row, brain) && takes(&row, half) && takes(&[0.0; 192], half));
        for at in [0, 63, 64, 4100, 4159] {
            assert!(takes(&with(&[at], 300.0), brain), "its neighbours keep enough bits");
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e5, -1e30, f32::MAX] {
                assert!(!takes(&with(&[at], value), brain), "{value} at {at}");
            }
            assert!(!takes(&with(&[at], 1001.0), half));
        }
        assert!(!takes(&with(&[70, 71, 72], 3e4), brain), "several beside each other");
        for other in 71..128 {
            assert!(!takes(&with(&[70, other], -3e4), brain), "two of them, {other}");
            assert!(!takes(&with(&[70, other], f32::INFINITY), brain), "{other}");
        }
        assert!(!takes(&[f32::INFINITY; 128], brain) && !takes(&[f32::NAN; 128], brain));
        let mut mixed = with(&[64, 96], f32::NEG_INFINITY);
        mixed[80] = f32::NAN;
        assert!(!takes(&mixed, brain));
        let ones: Vec<f32> = (0..1024).map(|i| if i % 64 == 9 { 8192.0 } else { 1.0 }).collect();
        assert!(!takes(&ones, half), "exact as integers, but all of them low bytes");
        assert!(!takes(&[1e37; 128], brain), "terms that cancel each other could overflow");
        assert!(!takes(&(0..128).map(|i| 1e-36 * i as f32).collect::<Vec<_>>(), brain), "nearly subnormal");
    }
}
