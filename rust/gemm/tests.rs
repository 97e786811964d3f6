//! Both products on every path, against sums in f64, on shapes that leave tails everywhere.

use super::{Direction, LowRank, Product};
use crate::element::{Element, Floats};
use crate::packed_matrix::{PackedMatrix, Scales};
use crate::simd::{Kernels, available};
use half::{bf16, f16};
use proptest::prelude::*;

/// Numbers in [-1, 1) from a seed.
pub(super) fn numbers(seed: u64) -> impl FnMut() -> f32 {
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
    block_size: usize,
    rank: usize,
    with_bias: bool,
    seed: u64,
}

/// A product in the given element type of panels.
type Write<T> = fn(&Product<'_, T>, &Kernels, &mut [T], &mut [T], usize) -> Result<(), crate::Error>;

/// `rounding` is half a unit in the last place of T, `error` that of a sum of products.
fn check<T: Element>(case: Case, write: Write<T>, rounding: f64, error: f64) -> Result<(), TestCaseError> {
    let Case { direction, tokens, rows, columns, block_size, rank, with_bias, seed } = case;
    let mut next = numbers(seed);
    let mut take = |count: usize| -> Vec<T> { (0..count).map(|_| T::from_f32(next())).collect() };
    let blocks = (rows * columns).div_ceil(block_size);
    // Any, or of a size, as those of rows of real weights are; of both signs, as double quantization may make them.
    let absmax = |a: f32| if seed.is_multiple_of(3) { a.abs() } else { a.signum() * (0.75 + 0.25 * a.abs()) };
    let absmax: Vec<f32> = take(blocks).iter().map(|a| absmax(a.to_f32())).collect();
    let codes: Vec<u8> =
        take((rows * columns).div_ceil(2)).iter().map(|c| ((c.to_f32() + 1.0) * 127.0) as u8).collect();
    let matrix =
        PackedMatrix::new(&codes, Scales::Single(&absmax), rows, columns, block_size).expect("it fits");
    let forward = direction == Direction::Forward;
    let (outputs, depth) = if forward { (rows, columns) } else { (columns, rows) };
    let (x, bias) = (take(tokens * depth), take(outputs));
    // Values of bf16, whatever type they are handed over in: all paths use them unrounded.
    let mut factor = |count: usize| -> Vec<f32> {
        take(count).iter().map(|v| bf16::from_f32(v.to_f32()).to_f32()).collect()
    };
    let (a, b) = (factor(rank * columns), factor(rank * rows));
    let b_half: Vec<bf16> = b.iter().map(|&v| bf16::from_f32(v)).collect();
    // Half the step between subnormal numbers of f16; the other types' are far below all results here.
    let tiny = 2.0_f32.powi(-25);
    let underflow = f64::from(tiny - T::from_f32(tiny).to_f32());
    let scaling = 0.375;
    let low_rank = LowRank { a: Floats::F32(&a), b: Floats::Bf16(&b_half), rank, scaling };
    let product = Product {
        direction,
        matrix,
        activations: &x,
        tokens,
        // A part of rank 0 adds nothing, like none.
        low_rank: (rank > 0 || seed.is_multiple_of(2)).then_some(low_rank),
        bias: with_bias.then_some(&bias),
    };
    for path in available() {
        let mut weights = vec![T::default(); rows * columns];
        crate::dequantize::dequantize_run(path, &matrix, 0, &mut weights);
        let run = |threads| {
            let (mut out, mut hidden) =
                (vec![T::default(); tokens * outputs], vec![T::default(); tokens * rank]);
            write(&product, path, &mut out, &mut hidden, threads).expect("lengths fit");
            let wide = |values: &[T]| values.iter().map(|v| v.to_f32()).collect::<Vec<_>>();
            (wide(&out), wide(&hidden))
        };
        let (out, hidden) = run(1);
        prop_assert!((&out, &hidden) == (&run(3).0, &run(3).1), "{} depends on the thread count", path.name);
        let near = |got: f32, terms: &mut dyn Iterator<Item = f64>, what: &str| {
            let (exact, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            let bound = error * size + (rounding * exact.abs()).max(underflow);
            prop_assert!((f64::from(got) - exact).abs() <= bound, "{} {what}: {got} for {exact}", path.name);
            Ok(())
        };
        let times = |x: f32, y: f32| f64::from(x) * f64::from(y);
        for (i, got) in hidden.iter().enumerate() {
            let (token, r) = (i / rank, i % rank);
            let factor = |k: usize| if forward { a[r * columns + k] } else { b[k * rank + r] };
            let mut terms =
                (0..depth).map(|k| f64::from(scaling) * times(x[token * depth + k].to_f32(), factor(k)));
            near(*got, &mut terms, "hidden")?;
        }
        for (i, got) in out.iter().enumerate() {
            let (token, output) = (i / outputs, i % outputs);
            let weight =
                |k: usize| weights[if forward { output * columns + k } else { k * columns + output }];
            let factor = |r: usize| if forward { b[output * rank + r] } else { a[r * columns + output] };
            let base = (0..depth).map(|k| times(x[token * depth + k].to_f32(), weight(k).to_f32()));
            let delta = (0..rank).map(|r| times(hidden[token * rank + r], factor(r)));
            let bias = with_bias.then(|| f64::from(bias[output].to_f32()));
            near(*got, &mut base.chain(delta).chain(bias), "out")?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn both_products_agree_with_f64_on_every_path(
        forward in any::<bool>(),
        tokens in prop_oneof![12 => 1..70_usize, 1 => Just(513)],
        rows in prop_oneof![3 => 1..80_usize, 1 => 1..300_usize],
        columns in prop_oneof![2 => 1..80_usize, 1 => 1..300_usize, 1 => Just(64), 1 => Just(576), 1 => Just(704)],
        block_size in prop_oneof![3 => Just(64_usize), 2 => Just(32), 1 => Just(128), 1 => Just(4096)],
        rank in prop_oneof![Just(0_usize), Just(1), 2..40_usize],
        with_bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let direction = if forward { Direction::Forward } else { Direction::Backward };
        let case = Case { direction, tokens, rows, columns, block_size, rank, with_bias, seed };
        let f32_rounding = 2.0_f64.powi(-24);
        let blocks: Write<f32> = |product, path, out, hidden, threads| product.write::<f32>(path, out, hidden, threads);
        check::<f32>(case, blocks, f32_rounding, 2e-6)?;
        check::<f32>(case, crate::matmul::write, f32_rounding, 2e-6)?;
        // Half a unit in the last of eight bits; weights are compared rounded, and may be used so or exact.
        let bf16_rounding = 2.0_f64.powi(-8);
        check::<bf16>(case, crate::matmul::write, bf16_rounding, bf16_rounding + 2e-6)?;
        check::<f16>(case, crate::matmul::write, 2.0_f64.powi(-11), 2.0_f64.powi(-11))?;
    }
}
