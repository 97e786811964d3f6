//! Fixed point: what is refused, what is kept, and products to be equal to.

use super::fixed::{
    BYTE_SCALE, ByteStep, LARGEST_BYTES, LARGEST_WORD, UNIT_SIZE, WORD_SCALE, WordStep, ZERO_LOW,
};
use super::fixed::{LARGEST_SUM, PAIR_SCALE, PairStep, level, word};
use super::{ABSMAX_PADDING, FewRowsFixed, PREPARED_MULTIPLE, Strip, available};
use crate::codebook::LEVELS;
use half::{bf16, f16};
use proptest::prelude::*;

/// A form of 128 activations, as `fixed.rs` defines it.
pub(super) trait Step: Copy {
    const ZERO: Self;
    /// Activation `k` in units.
    fn integer(&self, k: usize) -> i32;
    /// The unit of activation `k`.
    fn unit(&self, k: usize) -> f64;
    /// The terms, in units, of its product with a code's level.
    fn terms(&self, k: usize, code: usize) -> [f64; 4];
}

impl Step for ByteStep {
    const ZERO: Self = Self { high: [[0; 64]; 2], low: [[0; 64]; 2], unit: [0.0; 16], offset: [0.0; 16] };

    fn integer(&self, k: usize) -> i32 {
        let (odd, at) = (1 - k % 2, k / 2);
        256 * i32::from(self.high[odd][at]) + i32::from(self.low[odd][at])
    }

    fn unit(&self, k: usize) -> f64 {
        f64::from(self.unit[k / 8]) / 256.0 * f64::from(BYTE_SCALE)
    }

    fn terms(&self, k: usize, code: usize) -> [f64; 4] {
        let q = f64::from(self.integer(k));
        let low = f64::from(self.low[1 - k % 2][k / 2]);
        let [u, v] = level(code).to_be_bytes().map(f64::from);
        let terms = [(256.0 * u + v) * q, -v * low, f64::from(ZERO_LOW) * low, -f64::from(BYTE_SCALE) * q];
        terms.map(|term| term / f64::from(BYTE_SCALE))
    }
}

impl Step for WordStep {
    const ZERO: Self = Self { words: [0; PREPARED_MULTIPLE], unit: [[0.0; 8]; 2] };

    fn integer(&self, k: usize) -> i32 {
        // 64 at a time: even ones before odd ones, of each the first eight of either half of 32, then the
        // others.
        let (unit, k) = (k / UNIT_SIZE, k % UNIT_SIZE);
        let (half, byte, odd) = (k / 32, k % 32 / 2, k % 2);
        i32::from(self.words[unit * UNIT_SIZE + odd * 32 + byte / 8 * 16 + half * 8 + byte % 8])
    }

    fn unit(&self, k: usize) -> f64 {
        f64::from(self.unit[k / UNIT_SIZE][0]) * f64::from(WORD_SCALE)
    }

    fn terms(&self, k: usize, code: usize) -> [f64; 4] {
        [
            f64::from(word(code, WORD_SCALE)) / f64::from(WORD_SCALE) * f64::from(self.integer(k)),
            0.0,
            0.0,
            0.0,
        ]
    }
}

impl Step for PairStep {
    const ZERO: Self = Self { pairs: [0; PREPARED_MULTIPLE / 2], unit: [0.0; 16] };

    fn integer(&self, k: usize) -> i32 {
        self.pairs[k / 2] << (16 * (1 - k % 2)) >> 16
    }

    fn unit(&self, k: usize) -> f64 {
        f64::from(self.unit[k / 8]) * f64::from(PAIR_SCALE)
    }

    fn terms(&self, k: usize, code: usize) -> [f64; 4] {
        let level = f64::from(word(code, PAIR_SCALE)) / f64::from(PAIR_SCALE);
        [level * f64::from(self.integer(k)), 0.0, 0.0, 0.0]
    }
}

/// One row of packed weights times one prepared row of activations, and the sum of the sizes of its terms.
fn exact_product<S: Step>(steps: &[S], codes: &[u8], absmax: &[f32], block_size: usize) -> (f64, f64) {
    let (mut sum, mut size) = (0.0, 0.0);
    for k in 0..2 * codes.len() {
        let (step, at) = (&steps[k / PREPARED_MULTIPLE], k % PREPARED_MULTIPLE);
        let byte = codes[k / 2];
        let terms = step.terms(at, usize::from(if k % 2 == 0 { byte >> 4 } else { byte & 15 }));
        let unit = step.unit(at) * f64::from(absmax[k / block_size]);
        sum += unit * terms.iter().sum::<f64>();
        size += unit * terms.iter().map(|term| term.abs()).sum::<f64>();
    }
    (sum, size)
}

/// Rows of activations in fixed point, whatever that loses.
pub(super) fn prepared<S: Step>(few: &FewRowsFixed<S>, x: &[f32], columns: usize) -> Vec<S> {
    let rows = x.chunks(columns).flat_map(|row| {
        let mut steps = vec![S::ZERO; columns.div_ceil(PREPARED_MULTIPLE)];
        (few.prepare)(row, 1.0, &mut steps);
        steps
    });
    rows.collect()
}

/// Compare the products of a strip's rows with as many tokens of x as the kernel takes.
pub(super) fn check_products<S: Step>(
    name: &str,
    few: Option<FewRowsFixed<S>>,
    x: &[f32],
    strip: &Strip<'_>,
    rows: usize,
) -> Result<(), TestCaseError> {
    let Some(few) = few else { return Ok(()) };
    let Strip { codes, absmax, columns, block_size, .. } = *strip;
    let tokens = strip.tokens.min(few.most);
    let steps = columns.div_ceil(PREPARED_MULTIPLE);
    let prepared = prepared(&few, &x[..tokens * columns], columns);
    let mut out = vec![f32::NAN; rows * tokens];
    (few.linear)(&prepared, &Strip { tokens, ..*strip }, &mut out);
    for (i, got) in out.iter().enumerate() {
        let (row, token) = (i / tokens, i % tokens);
        let codes = &codes[row * columns / 2..][..columns / 2];
        let absmax = &absmax[row * strip.blocks()..][..strip.blocks()];
        let (exact, size) = exact_product(&prepared[token * steps..][..steps], codes, absmax, block_size);
        prop_assert!((f64::from(*got) - exact).abs() <= 1e-6 * size, "{name}: {got} for {exact}");
    }
    Ok(())
}

#[test]
fn levels_are_rounded_to_nearest_and_zero_is_exact() {
    for (code, exact) in LEVELS.iter().enumerate() {
        let scaled = (f64::from(*exact) + 1.0) * f64::from(BYTE_SCALE);
        assert!((f64::from(level(code)) - scaled).abs() <= 0.5, "{code}");
    }
    assert_eq!(level(7) % 256, ZERO_LOW as u16);
    for scale in [WORD_SCALE, PAIR_SCALE] {
        for (code, exact) in LEVELS.iter().enumerate() {
            let scaled = f64::from(*exact) * f64::from(scale);
            assert!((f64::from(word(code, scale)) - scaled).abs() <= 0.5, "{code}");
        }
        assert_eq!(word(7, scale), 0);
    }
}

proptest! {
    #[test]
    fn activations_are_rounded_to_nearest(
        x in proptest::collection::vec(prop_oneof![
            8 => -4.0_f32..4.0, 1 => -500.0_f32..500.0, 1 => -1e-6_f32..1e-6, 1 => Just(0.0)
        ], 1..300),
    ) {
        for path in available() {
            // The unit that a unit's activations need, by the largest one and the sum of all.
            if let Some(few) = path.few_rows_bytes {
                check_rounding(&few, &x, |largest, _| largest / f64::from(LARGEST_BYTES))?;
            }
            if let Some(few) = path.few_rows_words {
                check_rounding(&few, &x, |largest, _| largest / f64::from(LARGEST_WORD))?;
            }
            if let Some(few) = path.few_rows_pairs {
                check_rounding(&few, &x, |largest, sum| {
                    (largest / f64::from(LARGEST_WORD)).max(sum / f64::from(LARGEST_SUM))
                })?;
            }
        }
    }
}

fn check_rounding<S: Step>(
    few: &FewRowsFixed<S>,
    x: &[f32],
    needed: impl Fn(f64, f64) -> f64,
) -> Result<(), TestCaseError> {
    let steps = prepared(few, x, x.len());
    for (k, value) in x.iter().enumerate() {
        let (step, at) = (&steps[k / PREPARED_MULTIPLE], k % PREPARED_MULTIPLE);
        let unit = step.unit(at);
        let error = f64::from(step.integer(at)) * unit - f64::from(*value);
        prop_assert!(error.abs() <= 0.501 * unit, "{value} in units of {unit}");
        let first = k / UNIT_SIZE * UNIT_SIZE;
        let neighbours = &x[first..x.len().min(first + UNIT_SIZE)];
        let sizes = neighbours.iter().map(|value| f64::from(value.abs()));
        let needed = needed(sizes.clone().fold(0.0, f64::max), sizes.sum());
        prop_assert!(unit <= 2.001 * needed.max(1e-30), "units of {unit} where {needed} would do");
    }
    Ok(())
}

#[test]
fn fixed_point_says_where_it_would_lose_too_much() {
    for path in available() {
        if let Some(few) = path.few_rows_bytes {
            check_refusals(&few);
            let mixed: Vec<f32> = (0..1024).map(|i| if i % 64 == 9 { 8192.0 } else { 1.0 }).collect();
            assert!(
                !takes(&few, &mixed, f16::EPSILON.to_f32()),
                "exact as integers, but all of them low bytes"
            );
        }
        if let Some(few) = path.few_rows_pairs {
            check_refusals(&few);
        }
        if let Some(few) = path.few_rows_words {
            check_refusals(&few);
            let mixed: Vec<f32> = (0..1024).map(|i| if i % 64 == 9 { 8191.0 } else { 1.0 }).collect();
            assert!(takes(&few, &mixed, f16::EPSILON.to_f32()), "exact as integers");
        }
    }
}

fn takes<S: Step>(few: &FewRowsFixed<S>, x: &[f32], epsilon: f32) -> bool {
    let mut out = vec![S::ZERO; x.len().div_ceil(PREPARED_MULTIPLE)];
    (few.prepare)(x, epsilon / 4.0, &mut out)
}

fn check_refusals<S: Step>(few: &FewRowsFixed<S>) {
    let takes = |x: &[f32], epsilon: f32| takes(few, x, epsilon);
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
    for stride in [8, 16] {
        let at: Vec<usize> = (0..4160).step_by(stride).filter(|at| at % 64 < 32).collect();
        assert!(!takes(&with(&at, 3e4), brain), "every {stride}th");
    }
    assert!(!takes(&[f32::INFINITY; 128], brain) && !takes(&[f32::NAN; 128], brain));
    let mut mixed = with(&[64, 96], f32::NEG_INFINITY);
    mixed[80] = f32::NAN;
    assert!(!takes(&mixed, brain));
    assert!(!takes(&[1e37; 128], brain), "terms that cancel each other could overflow");
    assert!(!takes(&(0..128).map(|i| 1e-36 * i as f32).collect::<Vec<_>>(), brain), "nearly subnormal");
}

#[test]
fn the_largest_sums_fit() {
    let (columns, absmax) = (192, [1.0; 3 + ABSMAX_PADDING]);
    for (x, byte) in [(1.0_f32, 0xff), (-1.0, 0xff), (1.0, 0x00), (-1.0, 0x00)] {
        let codes = vec![byte; columns / 2];
        let strip = Strip { codes: &codes, absmax: &absmax, columns, block_size: 64, tokens: 1 };
        for path in available() {
            let row = |largest: u32| vec![x * largest as f32; columns];
            check_products(path.name, path.few_rows_bytes, &row(LARGEST_BYTES), &strip, 1).expect(path.name);
            check_products(path.name, path.few_rows_words, &row(LARGEST_WORD), &strip, 1).expect(path.name);
            check_products(path.name, path.few_rows_pairs, &row(LARGEST_SUM / 64), &strip, 1)
                .expect(path.name);
            let mut few_large = row(0);
            for large in few_large.iter_mut().step_by(4) {
                *large = x * LARGEST_WORD as f32;
            }
            check_products(path.name, path.few_rows_pairs, &few_large, &strip, 1).expect(path.name);
            // Rounded up, in units of one, these would add up to more than 32 bits hold.
            let rounded = [vec![x * 4272.6; columns / 2], vec![x * 4271.6; columns / 2]].concat();
            let mixed: Vec<f32> = (0..columns).map(|k| rounded[k % 2 * (columns / 2)]).collect();
            check_products(path.name, path.few_rows_pairs, &mixed, &strip, 1).expect(path.name);
        }
    }
}

#[test]
fn rows_of_many_blocks_and_of_large_weights() {
    let (rows, tokens) = (17, 5);
    for (block_size, blocks) in [(32, 35), (64, 17), (64, 33), (256, 3)] {
        let columns = block_size * blocks;
        let codes: Vec<u8> = (0..rows * columns / 2).map(|i| (i * 37 % 251) as u8).collect();
        let absmax = |i: usize| [1e-3, 0.5, 3.0, 4e29][i * 7 % 4];
        let absmax: Vec<f32> = (0..rows * blocks + ABSMAX_PADDING).map(absmax).collect();
        let x: Vec<f32> = (0..tokens * columns).map(|i| (i * 13 % 29) as f32 - 14.0).collect();
        let strip = Strip { codes: &codes, absmax: &absmax, columns, block_size, tokens };
        for path in available() {
            check_products(path.name, path.few_rows_bytes, &x, &strip, rows).expect(path.name);
            check_products(path.name, path.few_rows_words, &x, &strip, rows).expect(path.name);
            check_products(path.name, path.few_rows_pairs, &x, &strip, rows).expect(path.name);
        }
    }
}
