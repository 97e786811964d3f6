//! Against a plain f64 computation, on every path and type.

use super::{Gated, SMALL, STRIP};
use crate::element::Element;
use crate::error::Error;
use crate::simd::available;
use half::{bf16, f16};

/// h, dG and dU for one value of each, as a textbook has them.
fn reference(gate: f64, up: f64, grad: f64) -> [f64; 3] {
    let sigmoid = 1.0 / (1.0 + (-gate).exp());
    [gate * sigmoid * up, grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), grad * gate * sigmoid]
}

/// Gates over the range where σ is neither 0 nor 1 in f32, and beyond.
fn values<T: Element>(count: usize, step: f32) -> Vec<T> {
    (0..count).map(|i| T::from_f32(((i as f32 * step).sin() * 6.0).powi(3))).collect()
}

/// h, dG and dU by the path.
fn results<T: Element>(path: &crate::simd::Kernels, operands: [&[T]; 3], threads: usize) -> [Vec<T>; 3] {
    let [gate, up, grad] = operands;
    let gated = Gated { gate, up };
    let [mut h, mut grad_gate, mut grad_up] = [(); 3].map(|()| vec![T::default(); gate.len()]);
    gated.forward(path, &mut h, threads).expect("lengths fit");
    let mut again = grad.to_vec();
    gated.backward(path, &mut again, &mut grad_gate, &mut grad_up, threads).expect("lengths fit");
    assert!(h.iter().zip(&again).all(|(h, again)| h.to_f32().to_bits() == again.to_f32().to_bits()));
    [h, grad_gate, grad_up]
}

fn agrees_with_f64<T: Element>(epsilon: f64, smallest: f64) {
    for count in [0, 1, 31, 33, STRIP + 5, SMALL + STRIP + 7] {
        let operands: [Vec<T>; 3] = [values(count, 0.37), values(count, 1.1), values(count, 2.3)];
        let slices = operands.each_ref().map(Vec::as_slice);
        let expected = results(available()[0], slices, 1);
        for path in available() {
            let found = results(path, slices, 3);
            for (found, expected) in found.iter().zip(&expected) {
                let same = |(a, b): (&T, &T)| a.to_f32().to_bits() == b.to_f32().to_bits();
                assert!(found.iter().zip(expected).all(same), "{} differs", path.name);
            }
            for i in 0..count {
                let [gate, up, grad] = slices.map(|operand| f64::from(operand[i].to_f32()));
                let exact = reference(gate, up, grad);
                // Where 1 + g (1 - σ) is near zero, it is a difference of what f32 has rounded.
                let differences = [0.0, 4.0 * f64::from(f32::EPSILON) * (grad * up).abs(), 0.0];
                for ((found, exact), difference) in found.iter().zip(exact).zip(differences) {
                    let error = (f64::from(found[i].to_f32()) - exact).abs();
                    let close = error <= epsilon * exact.abs() + difference + smallest;
                    assert!(close, "{}: {error} of {exact} at {gate}", path.name);
                }
            }
        }
    }
}

#[test]
fn both_directions_agree_with_f64_in_every_type() {
    agrees_with_f64::<f32>(4.0 * f64::from(f32::EPSILON), 1e-30);
    agrees_with_f64::<bf16>(2.0_f64.powi(-8) * 1.01, 1e-30);
    agrees_with_f64::<f16>(2.0_f64.powi(-11) * 1.01, 1e-7);
}

#[test]
fn values_that_are_not_finite_stay_so() {
    for path in available() {
        for gate in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut out = [0.0];
            Gated { gate: &[gate], up: &[1.0] }.forward(path, &mut out, 1).expect("lengths fit");
            assert!(!out[0].is_finite(), "{gate} becomes {}", out[0]);
        }
    }
}

#[test]
fn other_lengths_are_refused() {
    let path = available()[0];
    let refused = Gated { gate: &[1.0_f32; 3], up: &[1.0; 2] }.forward(path, &mut [0.0; 3], 1);
    assert!(matches!(refused, Err(Error::Operand { .. })));
    let gated = Gated { gate: &[1.0_f32; 3], up: &[1.0; 3] };
    assert!(gated.forward(path, &mut [0.0; 4], 1).is_err());
    assert!(gated.backward(path, &mut [0.0; 3], &mut [0.0; 2], &mut [0.0; 3], 1).is_err());
}
