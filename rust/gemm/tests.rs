//! Both products on every path, against sums in f64, on shapes that leave tails everywhere.

use super::{Direction, LowRank, Product, tile::Packable};
use crate::packed_matrix::{PackedMatrix, Scales};
use crate::simd::available;
use half::bf16;
use proptest::prelude::*;

/// Numbers in [-1, 1) from a seed.
fn numbers(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed | 1;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    direction: Direction,
    tokens: usize,
    rows: usize,
    columns: usize,
    rank: usize,
    with_bias: bool,
    seed: u64,
}

fn check<T: Packable>(case: Case, tolerance: f64) -> Result<(), TestCaseError> {
    let Case { direction, tokens, rows, columns, rank, with_bias, seed } = case;
    let mut next = numbers(seed);
    let mut take = |count: usize| -> Vec<T> { (0..count).map(|_| T::from_f32(next())).collect() };
    let blocks = (rows * columns).div_ceil(64);
    let absmax: Vec<f32> = take(blocks).iter().map(|a| a.to_f32().abs()).collect();
    let codes: Vec<u8> =
        take((rows * columns).div_ceil(2)).iter().map(|c| ((c.to_f32() + 1.0) * 127.0) as u8).collect();
    let matrix = PackedMatrix::new(&codes, Scales::Single(&absmax), rows, columns, 64).expect("it fits");
    let (outputs, depth) = if direction == Direction::Forward { (rows, columns) } else { (columns, rows) };
    let (x, hidden, factor) = (take(tokens * depth), take(tokens * rank), take(outputs * rank));
    let bias = take(outputs);
    let product = Product {
        direction,
        matrix,
        activations: &x,
        tokens,
        low_rank: (rank > 0).then_some(LowRank { hidden: &hidden, factor: &factor, rank }),
        bias: with_bias.then_some(&bias),
    };
    for path in available() {
        let mut weights = vec![T::default(); rows * columns];
        crate::dequantize::dequantize_run(path, &matrix, 0, &mut weights);
        let run = |threads| {
            let mut out = vec![T::default(); tokens * outputs];
            product.write(path, &mut out, threads).expect("lengths fit");
            out.iter().map(|v| v.to_f32()).collect::<Vec<_>>()
        };
        let out = run(1);
        prop_assert_eq!(&out, &run(3), "{} depends on the thread count", path.name);
        for (i, got) in out.iter().enumerate() {
            let (token, output) = (i / outputs, i % outputs);
            let (mut exact, mut size) = (0.0, 0.0);
            let mut add = |a: T, b: T| {
                let term = f64::from(a.to_f32()) * f64::from(b.to_f32());
                exact += term;
                size += term.abs();
            };
            for k in 0..depth {
                let at =
                    if direction == Direction::Forward { output * columns + k } else { k * columns + output };
                add(x[token * depth + k], weights[at]);
            }
            for k in 0..rank {
                let at =
                    if direction == Direction::Forward { output * rank + k } else { k * outputs + output };
                add(hidden[token * rank + k], factor[at]);
            }
            if with_bias {
                add(bias[output], T::from_f32(1.0));
            }
            let error = (f64::from(*got) - exact).abs();
            prop_assert!(error <= tolerance * (size + exact.abs()), "{}: {got} for {exact}", path.name);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn both_products_agree_with_f64_on_every_path(
        forward in any::<bool>(),
        tokens in prop_oneof![1..70_usize, Just(513)],
        rows in 1..300_usize,
        columns in prop_oneof![1..300_usize, Just(64), Just(576)],
        rank in prop_oneof![Just(0_usize), Just(1), 2..40_usize],
        with_bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let direction = if forward { Direction::Forward } else { Direction::Backward };
        let case = Case { direction, tokens, rows, columns, rank, with_bias, seed };
        check::<f32>(case, 2e-6)?;
        // The result is rounded to bf16 once: half a unit in the eighth bit.
        check::<bf16>(case, 2.0_f64.powi(-9) + 2e-6)?;
    }
}
