//! Against a plain f64 computation, on every path and type.

use super::{RmsNorm, SMALL};
use crate::element::Element;
use crate::error::Error;
use crate::simd::available;
use half::{bf16, f16};

/// y and dX of one row, as a textbook has them.
fn reference(x: &[f64], weight: &[f64], grad: &[f64], epsilon: f64) -> (Vec<f64>, Vec<f64>) {
    let count = x.len() as f64;
    let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / count + epsilon).sqrt();
    let y = x.iter().zip(weight).map(|(x, w)| w * x * scale).collect();
    let grad: Vec<f64> = grad.iter().zip(weight).map(|(g, w)| g * w).collect();
    let mean = grad.iter().zip(x).map(|(g, x)| g * x * scale).sum::<f64>() / count;
    let dx = grad.iter().zip(x).map(|(g, x)| scale * (g - x * scale * mean)).collect();
    (y, dx)
}

fn values<T: Element>(count: usize, seed: u64, size: f32) -> Vec<T> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / 8_388_608.0 - 1.0) * size
    };
    (0..count).map(|_| T::from_f32(next())).collect()
}

fn agrees_with_f64<T: Element>(epsilon_of_type: f64) {
    for path in available() {
        for (rows, columns, size) in [(1, 1, 1.0), (3, 5, 1e-3), (4, 64, 1.0), (7, 577, 20.0), (70, 512, 1.0)]
        {
            let x: Vec<T> = values(rows * columns, 1, size);
            let (weight, grad): (Vec<T>, Vec<T>) = (values(columns, 2, 2.0), values(rows * columns, 3, 1.0));
            let norm = RmsNorm { weight: &weight, epsilon: 1e-5 };
            let (mut y, mut dx) = (vec![T::default(); rows * columns], vec![T::default(); rows * columns]);
            norm.forward(path, &x, &mut y, 2).expect("lengths fit");
            norm.backward(path, &x, &grad, &mut dx, 2).expect("lengths fit");
            let wide = |values: &[T]| values.iter().map(|v| f64::from(v.to_f32())).collect::<Vec<_>>();
            let (x, weight, grad) = (wide(&x), wide(&weight), wide(&grad));
            let rows = x.chunks(columns).zip(grad.chunks(columns));
            let results = wide(&y).into_iter().zip(wide(&dx)).collect::<Vec<_>>();
            for ((x, grad), results) in rows.zip(results.chunks(columns)) {
                let (exact_y, exact_dx) = reference(x, &weight, grad, 1e-5);
                let largest = |values: &[f64]| values.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
                // dX is a difference: what is rounded on the way is as large as its two terms.
                let scale = largest(&exact_dx).max(largest(grad) * 2.0 * largest(&exact_y) / largest(x));
                for (i, (y, dx)) in results.iter().enumerate() {
                    let close = (y - exact_y[i]).abs() <= 2.0 * epsilon_of_type * exact_y[i].abs() + 1e-7;
                    assert!(close, "{}: y {y} for {}", path.name, exact_y[i]);
                    let close = (dx - exact_dx[i]).abs() <= 2.0 * epsilon_of_type * scale + 1e-7;
                    assert!(close, "{}: dX {dx} for {}", path.name, exact_dx[i]);
                }
            }
        }
    }
}

#[test]
fn both_directions_agree_with_f64_in_every_type() {
    agrees_with_f64::<f32>(1e-6);
    agrees_with_f64::<f16>(1.0 / 1024.0);
    agrees_with_f64::<bf16>(1.0 / 128.0);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let columns = 96;
    let x: Vec<bf16> = values(columns * (2 * SMALL / columns), 1, 1.0);
    let (weight, grad): (Vec<bf16>, Vec<bf16>) = (values(columns, 2, 1.0), values(x.len(), 3, 1.0));
    let norm = RmsNorm { weight: &weight, epsilon: 1e-6 };
    for path in available() {
        let run = |threads| {
            let mut out = vec![bf16::ZERO; 2 * x.len()];
            let (y, dx) = out.split_at_mut(x.len());
            norm.forward(path, &x, y, threads).expect("lengths fit");
            norm.backward(path, &x, &grad, dx, threads).expect("lengths fit");
            out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
        };
        let one = run(1);
        assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one), "{}", path.name);
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused_and_nothing_is_written() {
    let norm = RmsNorm { weight: &[1.0_f32; 4], epsilon: 1e-6 };
    let path = available()[0];
    let mut out = [7.0; 8];
    let refused = |result: Result<(), Error>| matches!(result, Err(Error::Operand { .. }));
    assert!(refused(norm.forward(path, &[1.0; 7], &mut out[..7], 1)));
    assert!(refused(norm.forward(path, &[1.0; 8], &mut out[..4], 1)));
    assert!(refused(norm.backward(path, &[1.0; 8], &[1.0; 4], &mut out, 1)));
    assert_eq!(out, [7.0; 8]);
    assert!(norm.forward(path, &[], &mut [], 1).is_ok());
}
