//! Both ways to compute a dense product on every path, against sums in f64.

use super::{DenseProduct, Direction};
use crate::dense_rows;
use crate::element::{Element, Floats};
use crate::error::Error;
use crate::gemm::tests::numbers;
use crate::simd::available;
use half::{bf16, f16};

fn agrees_with_f64<T: Element>(view: fn(&[T]) -> Floats<'_>, epsilon: f64) {
    // Backward, 4,100 rows and more are summed in segments; 600 tokens take several passes.
    for (tokens, rows, columns) in [
        (0, 3, 4),
        (1, 1, 1),
        (3, 17, 5),
        (1, 1030, 64),
        (8, 530, 577),
        (70, 330, 64),
        (33, 5, 577),
        (40, 40_000, 3),
        (600, 4100, 40),
        (2, 4, 0),
        (2, 0, 4),
    ] {
        let mut next = numbers(1);
        let mut take = |count: usize| -> Vec<T> { (0..count).map(|_| T::from_f32(next())).collect() };
        let (weight, bias) = (take(rows * columns), take(rows.max(columns)));
        let wide: Vec<f64> = weight.iter().map(|w| f64::from(w.to_f32())).collect();
        for direction in [Direction::Forward, Direction::Backward] {
            let forward = direction == Direction::Forward;
            let (depth, outputs) = if forward { (columns, rows) } else { (rows, columns) };
            let activations = take(tokens * depth);
            let product = DenseProduct {
                direction,
                weight: view(&weight),
                rows,
                columns,
                activations: &activations,
                tokens,
                bias: Some(&bias[..outputs]),
            };
            let exact: Vec<f64> = (0..tokens * outputs)
                .map(|i| {
                    let (token, output) = (i / outputs, i % outputs);
                    let weight =
                        |k: usize| wide[if forward { output * columns + k } else { k * columns + output }];
                    let x = |k: usize| f64::from(activations[token * depth + k].to_f32());
                    let sum: f64 = (0..depth).map(|k| weight(k) * x(k)).sum();
                    sum + f64::from(bias[output].to_f32())
                })
                .collect();
            for path in available() {
                let mut answers = Vec::new();
                for threads in [1, 2] {
                    let mut out = vec![T::default(); tokens * outputs];
                    product.write(path, &mut out, threads).expect("lengths fit");
                    answers.push(("blocks", out));
                }
                if forward {
                    for threads in [1, 2] {
                        let mut out = vec![T::default(); tokens * outputs];
                        dense_rows::write(&product, path, &mut out, threads).expect("lengths fit");
                        answers.push(("few rows", out));
                    }
                }
                for pair in answers.chunks(2) {
                    let bits = |i: usize| pair[i].1.iter().map(|v| v.to_f32().to_bits());
                    assert!(bits(0).eq(bits(1)), "{} {}: two threads", path.name, pair[0].0);
                }
                for (way, out) in &answers {
                    for (got, exact) in out.iter().zip(&exact) {
                        let bound = epsilon * exact.abs() + 3e-7 * (depth as f64 + 10.0);
                        let close = (f64::from(got.to_f32()) - exact).abs() <= bound;
                        assert!(close, "{} {way} {tokens} {rows} {columns}", path.name);
                    }
                }
            }
        }
    }
}

#[test]
fn products_agree_with_f64() {
    agrees_with_f64::<f32>(|values| Floats::F32(values), 1e-6);
    agrees_with_f64::<f16>(|values| Floats::F16(values), 1e-3);
    agrees_with_f64::<bf16>(|values| Floats::Bf16(values), 5e-3);
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let (path, weight) = (available()[0], [0.0_f32; 16]);
    for (direction, depth, outputs) in [(Direction::Forward, 4, 3), (Direction::Backward, 3, 4)] {
        let product = DenseProduct {
            direction,
            weight: Floats::F32(&weight[..12]),
            rows: 3,
            columns: 4,
            activations: &weight[..2 * depth],
            tokens: 2,
            bias: Some(&weight[..outputs]),
        };
        let refused = |product: DenseProduct<'_, f32>, out: usize| {
            let mut ways = vec![product.write(path, &mut vec![0.0; out], 1)];
            if direction == Direction::Forward {
                ways.push(dense_rows::write(&product, path, &mut vec![0.0; out], 1));
            }
            ways.iter().all(|way| matches!(way, Err(Error::Operand { .. })))
        };
        assert!(product.write(path, &mut vec![0.0; 2 * outputs], 1).is_ok());
        assert!(refused(product, 2 * outputs - 1));
        assert!(refused(DenseProduct { activations: &weight[..5], ..product }, 2 * outputs));
        assert!(refused(DenseProduct { weight: Floats::F32(&weight[..11]), ..product }, 2 * outputs));
        assert!(refused(DenseProduct { bias: Some(&weight[..2]), ..product }, 2 * outputs));
    }
}
