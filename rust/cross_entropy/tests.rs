//! Against a plain f64 computation, on every path and type, on logits chosen to hurt.

use super::{STRIP, cross_entropy};
use crate::element::Element;
use crate::error::Error;
use crate::simd::available;
use half::{bf16, f16};
use proptest::prelude::*;

/// Loss and gradient of one row, as a textbook has them.
fn reference(logits: &[f64], target: usize) -> (f64, Vec<f64>) {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exponentials: Vec<f64> = logits.iter().map(|z| (z - largest).exp()).collect();
    let sum: f64 = exponentials.iter().sum();
    let one_hot = |i| if i == target { 1.0 } else { 0.0 };
    let gradient = exponentials.iter().enumerate().map(|(i, e)| e / sum - one_hot(i)).collect();
    (sum.ln() + largest - logits[target], gradient)
}

fn logit() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -20.0_f32..20.0,
        2 => -3e4_f32..3e4,
        1 => prop_oneof![Just(f32::NEG_INFINITY), Just(0.0), Just(-0.0), Just(1e-40), Just(-65504.0)],
    ]
}

/// Vocabularies around the sizes at which the loops change.
fn vocabulary() -> impl Strategy<Value = usize> {
    prop_oneof![1..70_usize, Just(STRIP - 1), Just(STRIP), Just(STRIP + 1), Just(2 * STRIP + 33)]
}

fn rows() -> impl Strategy<Value = (usize, Vec<f32>, Vec<i64>)> {
    (vocabulary(), 0..4_usize).prop_flat_map(|(vocabulary, rows)| {
        let logits = proptest::collection::vec(logit(), rows * vocabulary).prop_map(move |mut logits| {
            // One finite logit per row at least: rows without any have a test of their own.
            logits.iter_mut().step_by(vocabulary).for_each(|z| *z = z.max(-65504.0));
            logits
        });
        (Just(vocabulary), logits, proptest::collection::vec(0..vocabulary as i64, rows))
    })
}

/// Every path and thread count; `half_unit` is the relative error of rounding to `T`.
fn check<T: Element>(
    vocabulary: usize,
    logits: &[f32],
    targets: &[i64],
    half_unit: f64,
) -> Result<(), TestCaseError> {
    let logits: Vec<T> = logits.iter().map(|&z| T::from_f32(z)).collect();
    let mut first: Option<(Vec<u32>, Vec<u32>)> = None;
    for path in available() {
        for (threads, gradient) in [(1, false), (1, true), (2, true)] {
            let (mut losses, mut gradients) = (vec![f32::NAN; targets.len()], logits.clone());
            cross_entropy(path, &mut gradients, vocabulary, targets, &mut losses, gradient, threads)
                .map_err(|error| TestCaseError::fail(error.to_string()))?;
            let bits = (
                losses.iter().map(|loss| loss.to_bits()).collect::<Vec<_>>(),
                gradients.iter().map(|g| g.to_f32().to_bits()).collect::<Vec<_>>(),
            );
            if !gradient {
                prop_assert!(gradients.iter().zip(&logits).all(|(g, z)| g.to_f32() == z.to_f32()));
                continue;
            }
            let first = first.get_or_insert_with(|| bits.clone());
            prop_assert!(*first == bits, "{} with {threads} threads differs", path.name);
            let rows = logits.chunks(vocabulary).zip(gradients.chunks(vocabulary));
            for ((row, gradients), (&target, &loss)) in rows.zip(targets.iter().zip(&losses)) {
                let wide: Vec<f64> = row.iter().map(|z| f64::from(z.to_f32())).collect();
                let (expected, exact) = reference(&wide, target as usize);
                let allowed = 2e-6 + 1e-7 * expected.abs();
                let close = f64::from(loss) == expected || (f64::from(loss) - expected).abs() <= allowed;
                prop_assert!(close, "{}: loss {loss} for {expected}", path.name);
                for (got, exact) in gradients.iter().zip(exact) {
                    let error = (f64::from(got.to_f32()) - exact).abs();
                    // 6e-8: the smallest step of f16.
                    let allowed = exact.abs() * (half_unit + 2e-6) + 1.2e-7;
                    prop_assert!(error <= allowed, "{}: gradient {} for {exact}", path.name, got.to_f32());
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn losses_and_gradients_agree_with_f64_in_every_type((vocabulary, logits, targets) in rows()) {
        check::<f32>(vocabulary, &logits, &targets, 0.0)?;
        check::<f16>(vocabulary, &logits, &targets, 2.0_f64.powi(-11))?;
        check::<bf16>(vocabulary, &logits, &targets, 2.0_f64.powi(-8))?;
    }

    #[test]
    fn a_row_without_a_finite_answer_is_nan_and_its_neighbours_are_not(
        bad in prop_oneof![Just(f32::NAN), Just(-f32::NAN), Just(f32::INFINITY)],
        vocabulary in vocabulary(), at in any::<usize>(),
    ) {
        for path in available() {
            let mut logits = vec![0.5_f32; 3 * vocabulary];
            logits[vocabulary + at % vocabulary] = bad;
            let mut losses = [0.0; 3];
            cross_entropy(path, &mut logits, vocabulary, &[0; 3], &mut losses, true, 1)
                .map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(losses.map(f32::is_nan), [false, true, false], "{}", path.name);
            let nan = logits.chunks(vocabulary).map(|row| row.iter().all(|g| g.is_nan()));
            prop_assert_eq!(nan.collect::<Vec<_>>(), [false, true, false], "{}", path.name);
        }
    }
}

#[test]
fn minus_infinity_is_no_probability_and_nothing_else_is_no_answer() {
    for path in available() {
        // The first strip holds nothing but minus infinity: there is nothing to rescale yet.
        let mut logits = vec![f32::NEG_INFINITY; STRIP + 2];
        logits[STRIP] = 3.0;
        let mut losses = [f32::NAN; 2];
        let mut rows = [logits.clone(), logits].concat();
        cross_entropy(path, &mut rows, STRIP + 2, &[STRIP as i64, 0], &mut losses, true, 1)
            .expect("lengths fit");
        assert_eq!(losses, [0.0, f32::INFINITY], "{}", path.name);
        assert!(rows[..STRIP + 2].iter().all(|&g| g == 0.0));
        assert_eq!((rows[STRIP + 2], rows[2 * STRIP + 2]), (-1.0, 1.0));

        let mut empty = vec![f32::NEG_INFINITY; 40];
        cross_entropy(path, &mut empty, 40, &[3], &mut losses[..1], true, 1).expect("lengths fit");
        assert!(losses[0].is_nan() && empty.iter().all(|g| g.is_nan()));
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let path = available()[0];
    let mut logits = [1.0_f32; 6];
    for target in [-1, -100, 3, i64::MIN, i64::MAX] {
        let refused = cross_entropy(path, &mut logits, 3, &[0, target], &mut [0.0; 2], true, 1);
        assert_eq!(refused, Err(Error::Target { row: 1, target, vocabulary: 3 }));
    }
    assert_eq!(logits, [1.0; 6]);
    let refused = cross_entropy(path, &mut logits, 4, &[0, 0], &mut [0.0; 2], true, 1);
    assert_eq!(refused, Err(Error::Operand { name: "logits", got: 6, expected: 8 }));
    let refused = cross_entropy(path, &mut logits, 3, &[0, 0], &mut [0.0; 1], true, 1);
    assert_eq!(refused, Err(Error::Operand { name: "losses", got: 1, expected: 2 }));
    let refused = cross_entropy::<f32>(path, &mut [], 0, &[0], &mut [0.0; 1], true, 1);
    assert_eq!(refused, Err(Error::Target { row: 0, target: 0, vocabulary: 0 }));
    assert_eq!(cross_entropy::<f32>(path, &mut [], 0, &[], &mut [], true, 1), Ok(()));
}
