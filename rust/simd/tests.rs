//! Every path against the portable one, on lengths and values chosen to hurt.

use super::fixed_tests::{check_products, prepared as in_fixed_point};
use super::{ABSMAX_PADDING, Kernels, PREPARED_MULTIPLE, Strip, available, choose, portable};
use crate::codebook::{BOUNDARIES, DYNAMIC_MAP};
use crate::packed_matrix::NestedScales;
use half::{bf16, f16};
use proptest::prelude::*;

fn others() -> impl Iterator<Item = &'static Kernels> {
    available().into_iter().filter(|path| path.name != "portable")
}

/// Any bit pattern, with boundaries of the format and their neighbours made likely.
fn weight() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => any::<u32>().prop_map(f32::from_bits),
        4 => -1.0_f32..1.0,
        1 => (0..15_usize, -1..=1_i32).prop_map(|(i, ulp)| {
            f32::from_bits((BOUNDARIES[i].to_bits() as i32 + ulp) as u32)
        }),
        1 => prop_oneof![Just(0.0), Just(-0.0), Just(f32::MIN_POSITIVE), Just(1e-45), Just(f32::MAX)],
    ]
}

fn finite_blocks() -> impl Strategy<Value = (usize, Vec<f32>)> {
    (prop_oneof![Just(32_usize), Just(64), Just(128), Just(512)], 1..5_usize).prop_flat_map(
        |(size, blocks)| {
            let finite = weight().prop_map(|w| if w.is_finite() { w } else { 1.0 });
            (Just(size), proptest::collection::vec(finite, size * blocks))
        },
    )
}

proptest! {
    #[test]
    fn every_path_packs_and_decodes_the_same_bytes((block_size, weights) in finite_blocks()) {
        let blocks = weights.len() / block_size;
        let pack = |path: &Kernels| {
            let (mut codes, mut absmax) = (vec![0; weights.len() / 2], vec![0.0; blocks]);
            (path.quantize_blocks)(&weights, block_size, &mut codes, &mut absmax);
            let mut wide = vec![0.0_f32; weights.len()];
            (path.dequantize_f32)(&codes, &absmax, block_size, &mut wide);
            let mut half = vec![f16::ZERO; weights.len()];
            (path.dequantize_f16)(&codes, &absmax, block_size, &mut half);
            let mut brain = vec![bf16::ZERO; weights.len()];
            (path.dequantize_bf16)(&codes, &absmax, block_size, &mut brain);
            let bits: (Vec<_>, Vec<_>, Vec<_>) = (
                wide.iter().map(|v| v.to_bits()).collect(),
                half.iter().map(|v| v.to_bits()).collect(),
                brain.iter().map(|v| v.to_bits()).collect(),
            );
            (codes, absmax.iter().map(|a| a.to_bits()).collect::<Vec<_>>(), bits)
        };
        let expected = pack(&portable::KERNELS);
        for path in others() {
            prop_assert!(pack(path) == expected, "{} differs from portable", path.name);
        }
    }

    #[test]
    fn a_block_with_a_bad_weight_gets_an_absmax_that_is_not_finite(
        at in 0..64_usize, bad in prop_oneof![Just(f32::NAN), Just(-f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)],
    ) {
        let mut weights = [0.5_f32; 64];
        weights[at] = bad;
        for path in available() {
            let (mut codes, mut absmax) = ([0; 32], [0.0]);
            (path.quantize_blocks)(&weights, 64, &mut codes, &mut absmax);
            prop_assert!(!absmax[0].is_finite(), "{} missed {bad} at {at}", path.name);
        }
    }

    #[test]
    fn every_path_decodes_nested_absmax_to_the_same_bits(
        codes in proptest::collection::vec(any::<u8>(), 1..900), first in 0..600_usize, offset in -1.0_f32..1.0,
    ) {
        let absmax: Vec<f32> = (0..codes.len().div_ceil(256)).map(|i| 0.1 + i as f32 * 0.3).collect();
        let nested = NestedScales { codes: &codes, absmax: &absmax, offset, map: &DYNAMIC_MAP };
        let first = first % codes.len();
        let expected: Vec<u32> = (first..codes.len())
            .map(|i| (DYNAMIC_MAP[usize::from(codes[i])] * absmax[i / 256] + offset).to_bits())
            .collect();
        for path in available() {
            let mut out = vec![f32::NAN; codes.len() - first];
            (path.decode_absmax)(&nested, first, &mut out);
            let bits: Vec<u32> = out.iter().map(|v| v.to_bits()).collect();
            prop_assert!(bits == expected, "{} differs", path.name);
        }
    }

    #[test]
    fn widening_is_exact_on_every_path(bits in proptest::collection::vec(any::<u16>(), 0..70)) {
        let half: Vec<f16> = bits.iter().map(|&b| f16::from_bits(b)).collect();
        let brain: Vec<bf16> = bits.iter().map(|&b| bf16::from_bits(b)).collect();
        for path in available() {
            let mut wide = vec![0.0; bits.len()];
            (path.widen_f16)(&half, &mut wide);
            prop_assert!(half.iter().zip(&wide).all(|(h, w)| h.to_f32() == *w || (h.is_nan() && w.is_nan())));
            (path.widen_bf16)(&brain, &mut wide);
            prop_assert!(brain.iter().zip(&wide).all(|(h, w)| h.to_f32() == *w || (h.is_nan() && w.is_nan())));
        }
    }

    #[test]
    fn narrowing_rounds_to_nearest_even_on_every_path(values in proptest::collection::vec(weight(), 0..70)) {
        let same = |got: f32, expected: f32| got == expected || (got.is_nan() && expected.is_nan());
        for path in available() {
            let mut half = vec![f16::ZERO; values.len()];
            (path.narrow_f16)(&values, &mut half);
            prop_assert!(values.iter().zip(&half).all(|(&v, h)| same(h.to_f32(), f16::from_f32(v).to_f32())));
            let mut brain = vec![bf16::ZERO; values.len()];
            (path.narrow_bf16)(&values, &mut brain);
            prop_assert!(values.iter().zip(&brain).all(|(&v, b)| same(b.to_f32(), bf16::from_f32(v).to_f32())));
        }
    }

    #[test]
    fn exponentials_are_within_a_unit_of_exact_and_the_same_on_every_path(
        values in proptest::collection::vec(prop_oneof![
            4 => -90.0_f32..1e-30, 1 => weight(), 1 => Just(f32::NEG_INFINITY),
        ], 0..100),
    ) {
        let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let shift = if largest.is_finite() { largest } else { 0.0 };
        let values: Vec<f32> = values.into_iter().map(|v| if v > shift { shift } else { v }).collect();
        let mut expected = None;
        for path in available() {
            prop_assert_eq!((path.largest)(&values), values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut out = values.clone();
            let sum = (path.exponentials)(&mut out, shift, 1.0);
            for (value, out) in values.iter().zip(&out) {
                let exact = f64::from(value - shift).exp();
                let unit = f64::from(f32::EPSILON) * exact;
                let close = (f64::from(*out) - exact).abs() <= unit || (exact < 1.2e-38 && *out == 0.0);
                prop_assert!(close || (value.is_nan() && out.is_nan()), "{}: {out} for {exact}", path.name);
            }
            let exact: f64 = out.iter().map(|&v| f64::from(v)).sum();
            prop_assert!((sum - exact).abs() <= 1e-6 * exact || (sum.is_nan() && exact.is_nan()));
            let bits: Vec<u32> = out.iter().map(|v| if v.is_nan() { 0 } else { v.to_bits() }).collect();
            let expected = expected.get_or_insert_with(|| bits.clone());
            prop_assert!(*expected == bits, "{} differs", path.name);
        }
    }

    #[test]
    fn products_agree_with_f64_on_every_path(
        seed in any::<u64>(), rows in 1..40_usize, tokens in 1..70_usize, blocks in 1..6_usize,
        block_size in prop_oneof![Just(32_usize), Just(64), Just(128), Just(4096)],
    ) {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        };
        let columns = blocks * block_size;
        let codes: Vec<u8> = (0..rows * columns / 2).map(|_| ((next() + 1.0) * 127.9) as u8).collect();
        let absmax: Vec<f32> = (0..rows * blocks).map(|_| next().abs()).collect();
        let x: Vec<f32> = (0..tokens * columns).map(|_| bf16::from_f32(next()).to_f32()).collect();
        let mut weights = vec![0.0_f32; rows * columns];
        portable::dequantize_blocks(&codes, &absmax, block_size, &mut weights);
        // What lies past the last row must not matter.
        let padded = [&absmax[..], &[f32::NAN; ABSMAX_PADDING]].concat();
        let strip = Strip { codes: &codes, absmax: &padded, columns, block_size, tokens };
        let width = columns.next_multiple_of(PREPARED_MULTIPLE);
        let check = |name: &str, out: &[f32], tolerance: f64| {
            for (i, got) in out.iter().enumerate() {
                let (row, token) = (i / tokens, i % tokens);
                let terms = weights[row * columns..][..columns].iter().zip(&x[token * columns..]);
                let (exact, size) = terms.fold((0.0, 0.0), |(sum, size), (w, x)| {
                    let term = f64::from(*w) * f64::from(*x);
                    (sum + term, size + term.abs())
                });
                prop_assert!((f64::from(*got) - exact).abs() <= tolerance * size, "{name}: {got} for {exact}");
            }
            Ok(())
        };
        for path in available() {
            let mut out = vec![f32::NAN; rows * tokens];
            let mut prepared = vec![f32::NAN; tokens * width];
            for (row, out) in x.chunks(columns).zip(prepared.chunks_mut(width)) {
                (path.prepare_f32)(row, out);
            }
            (path.linear_f32)(&prepared, &strip, &mut out);
            check(path.name, &out, 1e-6)?;
            check_products(path.name, path.few_rows_bytes, &x, &strip, rows)?;
            check_products(path.name, path.few_rows_words, &x, &strip, rows)?;
            check_products(path.name, path.few_rows_pairs, &x, &strip, rows)?;
            if let Some(few_rows) = path.bf16.and_then(|bf16| bf16.few_rows).filter(|_| block_size >= 64) {
                let mut prepared = vec![bf16::NAN; tokens * width];
                let brain: Vec<bf16> = x.iter().map(|&v| bf16::from_f32(v)).collect();
                (few_rows.prepare)(&brain, columns, &mut prepared);
                (few_rows.linear)(&prepared, &strip, &mut out);
                // Each weight is rounded to bf16 once: half a unit in the eighth bit.
                check("bf16", &out, 2.0_f64.powi(-9) + 1e-6)?;
            }
        }
    }
}

#[test]
fn a_row_that_is_not_finite_leaves_its_neighbours_alone() {
    let rows = 9;
    let shapes = [(32_usize, 5, 1), (32, 3, 5), (64, 9, 1), (64, 3, 2), (64, 1, 7), (64, 5, 20)];
    for (block_size, blocks, tokens) in shapes {
        let columns = block_size * blocks;
        let codes: Vec<u8> = (0..rows * columns / 2).map(|i| (i * 37 % 256) as u8).collect();
        let x: Vec<bf16> = (0..tokens * columns).map(|i| bf16::from_f32((i % 13) as f32 - 6.0)).collect();
        let wide: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        let width = columns.next_multiple_of(PREPARED_MULTIPLE);
        for path in available() {
            let product = |absmax: &[f32]| {
                let strip = Strip { codes: &codes, absmax, columns, block_size, tokens };
                let mut prepared = vec![0.0; tokens * width];
                for (row, out) in wide.chunks(columns).zip(prepared.chunks_mut(width)) {
                    (path.prepare_f32)(row, out);
                }
                let mut out = vec![0.0; 5 * rows * tokens];
                if let Some(few) = path.few_rows_bytes.filter(|few| tokens <= few.most) {
                    let prepared = in_fixed_point(&few, &wide, columns);
                    (few.linear)(&prepared, &strip, &mut out[2 * rows * tokens..3 * rows * tokens]);
                }
                if let Some(few) = path.few_rows_words.filter(|few| tokens <= few.most) {
                    let prepared = in_fixed_point(&few, &wide, columns);
                    (few.linear)(&prepared, &strip, &mut out[3 * rows * tokens..4 * rows * tokens]);
                }
                if let Some(few) = path.few_rows_pairs.filter(|few| tokens <= few.most) {
                    let prepared = in_fixed_point(&few, &wide, columns);
                    (few.linear)(&prepared, &strip, &mut out[4 * rows * tokens..]);
                }
                (path.linear_f32)(&prepared, &strip, &mut out[..rows * tokens]);
                if let Some(few) = path.bf16.and_then(|bf16| bf16.few_rows).filter(|_| block_size >= 64) {
                    let mut prepared = vec![bf16::ZERO; tokens * width];
                    (few.prepare)(&x, columns, &mut prepared);
                    (few.linear)(&prepared, &strip, &mut out[rows * tokens..2 * rows * tokens]);
                }
                out
            };
            let mut absmax = vec![0.5; rows * blocks + ABSMAX_PADDING];
            let expected = product(&absmax);
            absmax[4 * blocks..5 * blocks].fill(f32::NAN);
            absmax[rows * blocks..].fill(f32::NAN);
            let got = product(&absmax);
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let hit = i / tokens % rows == 4;
                assert!(hit || got.to_bits() == expected.to_bits(), "{}: {got} for {expected}", path.name);
            }
            assert!(got[4 * tokens].is_nan(), "{}: the row itself", path.name);
        }
    }
}

#[test]
fn a_matrix_times_a_vector_is_exact_on_small_integers() {
    for path in available() {
        for (rows, columns) in [(0, 5), (3, 0), (1, 1), (4, 16), (5, 31), (7, 64), (8, 129), (13, 300)] {
            let value = |i: usize| (i * 7 % 11) as f32 - 5.0;
            let matrix: Vec<f32> = (0..rows * columns).map(value).collect();
            let x: Vec<f32> = (0..columns).map(|i| value(i + 3)).collect();
            let mut out = vec![f32::NAN; rows];
            (path.matrix_vector)(&matrix, &x, &mut out);
            for (row, out) in out.iter().enumerate() {
                let exact: f32 = (0..columns).map(|i| matrix[row * columns + i] * x[i]).sum();
                assert_eq!(*out, exact, "{}: {rows} x {columns}", path.name);
            }
        }
    }
}

#[test]
fn a_path_is_forced_by_name_and_refused_by_sentence() {
    assert_eq!(choose(Some("portable")).expect("always there").name, "portable");
    assert_eq!(choose(None), choose(Some("")));
    let refused = choose(Some("sse9")).expect_err("no such path").to_string();
    assert!(
        refused.contains("sse9")
            && refused.contains("portable, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16 or amx")
    );
}

impl PartialEq for Kernels {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}
