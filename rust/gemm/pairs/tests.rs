//! What fixed point refuses, and the panels that products in it are made of; products of all shapes are
//! compared with sums in f64 in `gemm/tests.rs`.

use super::panel::{self, PairBlock, UNIT, UNIT_STEPS};
use crate::element::Floats;
use crate::gemm::tests::numbers;
use crate::gemm::tile::{PANEL, SIDE, Tile};
use crate::gemm::{Direction, LowRank, Product};
use crate::packed_matrix::{PackedMatrix, Scales};
use crate::simd::{Kernels, PAIR_SCALE, PairPanels, Run, available};
use half::bf16;
use proptest::prelude::*;

const ROWS: usize = 96;
const COLUMNS: usize = 320;
const RANK: usize = 5;

fn paths() -> impl Iterator<Item = (&'static Kernels, PairPanels)> {
    available().into_iter().filter_map(|path| Some((path, path.panels_pairs?)))
}

/// A matrix of random codes, and a low-rank part.
struct Layer {
    codes: Vec<u8>,
    absmax: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Layer {
    fn new() -> Self {
        let mut next = numbers(3);
        let codes = (0..ROWS * COLUMNS / 2).map(|_| (next() * 128.0) as i8 as u8).collect();
        let absmax = (0..ROWS * COLUMNS / 64).map(|_| 1.5 + next()).collect();
        let mut take = |count: usize| (0..count).map(|_| next()).collect::<Vec<f32>>();
        let (mut a, mut b) = (take(RANK * COLUMNS), take(RANK * ROWS));
        // Nothing for a row's first activation.
        (0..RANK).for_each(|r| (a[r * COLUMNS], b[r]) = (0.0, 0.0));
        Self { codes, absmax, a, b }
    }

    fn product<'a>(&'a self, direction: Direction, x: &'a [bf16]) -> Product<'a, bf16> {
        let scales = Scales::Single(&self.absmax);
        let matrix = PackedMatrix::new(&self.codes, scales, ROWS, COLUMNS, 64).expect("it fits");
        let (a, b) = (Floats::F32(&self.a), Floats::F32(&self.b));
        let low_rank = Some(LowRank { a, b, rank: RANK, scaling: 1.0 / 64.0 });
        let depth = if direction == Direction::Forward { COLUMNS } else { ROWS };
        Product { direction, matrix, activations: x, tokens: x.len() / depth, low_rank, bias: None }
    }
}

/// Whether `write_pairs` did it, the results, and the bottleneck's activations, as bits.
fn in_pairs(product: &Product<'_, bf16>, path: &Kernels, threads: usize) -> (bool, Vec<u16>, Vec<u16>) {
    let mut out = vec![bf16::ZERO; product.tokens * product.outputs()];
    let mut hidden = vec![bf16::ZERO; product.tokens * RANK];
    let done = product.write_pairs(path, &mut out, &mut hidden, threads).expect("lengths fit");
    let bits = |values: Vec<bf16>| values.into_iter().map(bf16::to_bits).collect();
    (done, bits(out), bits(hidden))
}

fn in_f32(product: &Product<'_, bf16>, path: &Kernels) -> (Vec<u16>, Vec<u16>) {
    let mut out = vec![bf16::ZERO; product.tokens * product.outputs()];
    let mut hidden = vec![bf16::ZERO; product.tokens * RANK];
    product.write::<f32>(path, &mut out, &mut hidden, 2).expect("lengths fit");
    let bits = |values: Vec<bf16>| values.into_iter().map(bf16::to_bits).collect();
    (bits(out), bits(hidden))
}

#[test]
fn rows_that_would_lose_too_much_are_carried_twice_or_computed_in_f32() {
    let layer = Layer::new();
    for direction in [Direction::Forward, Direction::Backward] {
        let depth = if direction == Direction::Forward { COLUMNS } else { ROWS };
        let mut next = numbers(7);
        let mut x: Vec<bf16> = (0..150 * depth).map(|_| bf16::from_f32(next())).collect();
        // Some rows hide all others beside a large value, which weights of zero hide in turn: the first panel and
        // the last one have a few of them, the third one many. One row is not finite.
        let apart = [40].into_iter().chain(64..96).collect::<Vec<_>>();
        for row in [3, 17, 31, 149].into_iter().chain(64..85) {
            x[row * depth] = bf16::from_f32(1e5);
        }
        x[40 * depth + 1] = bf16::NAN;
        let product = layer.product(direction, &x);
        for (path, _) in paths() {
            let (done, out, hidden) = in_pairs(&product, path, 1);
            assert!(done);
            assert_eq!((done, out.clone(), hidden.clone()), in_pairs(&product, path, 3), "{}", path.name);
            let (exact, exact_hidden) = in_f32(&product, path);
            let (width, mut hiding) = (product.outputs(), 0);
            let float = |bits: u16| f64::from(bf16::from_bits(bits).to_f32());
            let squares = exact[..width].iter().map(|v| float(*v).powi(2)).sum::<f64>();
            let size = (squares / width as f64).sqrt();
            for row in 0..product.tokens {
                let of_row = |values: &[u16], width: usize| values[row * width..][..width].to_vec();
                let (got, exact) = (of_row(&out, width), of_row(&exact, width));
                if apart.contains(&row) {
                    assert_eq!(got, exact, "{} row {row}", path.name);
                    assert_eq!(of_row(&hidden, RANK), of_row(&exact_hidden, RANK), "{} row {row}", path.name);
                    continue;
                }
                for (got, exact) in got.into_iter().zip(exact).map(|(got, exact)| (float(got), float(exact)))
                {
                    let bound = exact.abs() * 2.0_f64.powi(-7) + size * 1e-3;
                    assert!((got - exact).abs() <= bound, "{} row {row}: {got} for {exact}", path.name);
                    hiding += usize::from(row == 3 && exact.abs() < 10.0 * size);
                }
            }
            assert!(hiding > 0, "some weights are zero where the activation is large");
        }
    }
}

#[test]
fn rows_of_weights_that_have_little_in_common_are_no_pairs() {
    let mut layer = Layer::new();
    let x = vec![bf16::ONE; 40 * COLUMNS];
    // One row a hundred times and more as large as those beside it; it has units of its own only in forward products.
    layer.absmax[COLUMNS / 64..2 * COLUMNS / 64].fill(200.0);
    for (path, _) in paths() {
        assert!(in_pairs(&layer.product(Direction::Forward, &x), path, 2).0, "{}", path.name);
        assert!(!in_pairs(&layer.product(Direction::Backward, &x[..40 * ROWS]), path, 2).0, "{}", path.name);
    }
    for damage in [f32::NAN, f32::INFINITY] {
        layer.absmax.fill(1.0);
        for (path, _) in paths() {
            assert!(
                in_pairs(&layer.product(Direction::Backward, &x[..40 * ROWS]), path, 2).0,
                "{}",
                path.name
            );
        }
        layer.absmax[7] = damage;
        for (path, _) in paths() {
            assert!(!in_pairs(&layer.product(Direction::Backward, &x[..40 * ROWS]), path, 2).0);
        }
    }
    // Of nine rows' absmax, two may not be small, and of a factor's values not all but one.
    let few = |absmax: &[f32], a: &[f32], b: &[f32], path| {
        let matrix =
            PackedMatrix::new(&layer.codes[..9 * 32], Scales::Single(absmax), 9, 64, 64).expect("it fits");
        let low_rank = LowRank { a: Floats::F32(a), b: Floats::F32(b), rank: 2, scaling: 1.0 };
        [(Direction::Forward, 64), (Direction::Backward, 9)].map(|(direction, depth)| {
            let (activations, low_rank) = (&x[..40 * depth], Some(low_rank));
            let product = Product { direction, matrix, activations, tokens: 40, low_rank, bias: None };
            let (mut out, mut hidden) = (vec![bf16::ZERO; 40 * product.outputs()], vec![bf16::ZERO; 80]);
            product.write_pairs(path, &mut out, &mut hidden, 2).expect("lengths fit")
        })
    };
    let (even, mut uneven, ones) = ([1.0; 9], [1.0; 9], [1.0; 128]);
    uneven[..2].fill(1e-3);
    let mut outliers = ones;
    outliers[0] = 1e4;
    for (path, _) in paths() {
        assert_eq!(few(&even, &ones, &ones[..18], path), [true, true], "{}", path.name);
        assert_eq!(few(&uneven, &ones, &ones[..18], path), [true, false], "{}", path.name);
        assert_eq!(few(&even, &outliers, &ones[..18], path), [false, true], "{}", path.name);
        assert_eq!(few(&even, &ones, &outliers[..18], path), [true, false], "{}", path.name);
    }
    // Rows of zeros have a unit like any others.
    let mut layer = Layer::new();
    layer.absmax.fill(0.0);
    for (path, _) in paths() {
        assert!(in_pairs(&layer.product(Direction::Backward, &x[..40 * ROWS]), path, 2).0, "{}", path.name);
    }
}

#[test]
fn huge_weights_times_small_activations_are_finite() {
    let mut layer = Layer::new();
    layer.absmax.fill(1e32);
    for direction in [Direction::Forward, Direction::Backward] {
        let depth = if direction == Direction::Forward { COLUMNS } else { ROWS };
        let x = vec![bf16::from_f32(1e-6); 40 * depth];
        let product = layer.product(direction, &x);
        for (path, _) in paths() {
            let (done, out, _) = in_pairs(&product, path, 2);
            assert!(done, "{}", path.name);
            let largest = |values: &[u16]| {
                values.iter().map(|bits| bf16::from_bits(*bits).to_f32().abs()).fold(0.0, f32::max)
            };
            let (got, exact) = (largest(&out), largest(&in_f32(&product, path).0));
            assert!(
                exact.is_finite() && (got / exact - 1.0).abs() < 0.01,
                "{}: {got} for {exact}",
                path.name
            );
        }
    }
}

fn signed(word: u32) -> [f64; 2] {
    [word as u16, (word >> 16) as u16].map(|half| f64::from(half.cast_signed()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    #[test]
    fn panels_are_multiplied_as_integers(
        forward in any::<bool>(), steps in 1..9_usize, width in 1..100_usize, tokens in 1..100_usize,
        start in any::<bool>(), seed in any::<u64>(),
    ) {
        let (count, mut next) = (panel::tiles(steps), numbers(seed));
        let mut panels = |rows: usize| -> Vec<Vec<Tile>> {
            let mut panel = || {
                let mut tiles = vec![Tile::ZERO; count];
                for tile in &mut tiles[..2 * steps] {
                    // Sums of 64 products stay within 32 bits.
                    let mut word = || ((next() * 5000.0) as i16).cast_unsigned();
                    tile.0 = [[0; SIDE]; SIDE].map(|row| row.map(|_| u32::from(word()) | u32::from(word()) << 16));
                }
                for unit in 0..steps.div_ceil(UNIT_STEPS) {
                    for half in 0..2 {
                        *panel::units_mut(&mut tiles, steps, unit, half) = [0; SIDE].map(|_| (next() * 1e-3).to_bits());
                    }
                }
                tiles
            };
            (0..rows.div_ceil(PANEL)).map(|_| panel()).collect()
        };
        let (weights, activations) = (panels(width), panels(tokens));
        let (flat, activations): (Vec<Tile>, Vec<&[Tile]>) =
            (weights.concat(), activations.iter().map(Vec::as_slice).collect());
        let direction = if forward { Direction::Forward } else { Direction::Backward };
        let block = PairBlock {
            weights: &flat, activations: &activations, next: &activations, steps, width, tokens, start, direction,
        };
        let before = Tile([[1.0_f32.to_bits(); SIDE]; SIDE]);
        for (path, pairs) in paths() {
            let mut sums = vec![before; weights.len() * activations.len() * 4];
            (pairs.multiply)(&block, &mut sums);
            for (w, t) in (0..width).flat_map(|w| (0..tokens).map(move |t| (w, t))) {
                let (left, right, row, column) = if forward {
                    (&weights[w / PANEL][..], activations[t / PANEL], w % PANEL, t % PANEL)
                } else {
                    (activations[t / PANEL], &weights[w / PANEL][..], t % PANEL, w % PANEL)
                };
                let (mut exact, mut size) = (if start { 0.0 } else { 1.0 }, 1.0);
                for step in 0..steps {
                    let unit = [(left, row), (right, column)].map(|(panel, i)| {
                        f64::from(f32::from_bits(panel::units(panel, steps, step / UNIT_STEPS, i / SIDE)[i % SIDE]))
                    });
                    for word in 0..SIDE {
                        let a = signed(left[2 * step + row / SIDE].0[row % SIDE][word]);
                        let b = signed(right[2 * step + column / SIDE].0[word][column % SIDE]);
                        let products = [a[0] * b[0], a[1] * b[1]].map(|product| product * unit[0] * unit[1]);
                        exact += products[0] + products[1];
                        size += products[0].abs() + products[1].abs();
                    }
                }
                let tile = &sums[(w / PANEL * activations.len() + t / PANEL) * 4 + row / SIDE * 2 + column / SIDE];
                let got = f64::from(f32::from_bits(tile.0[row % SIDE][column % SIDE]));
                prop_assert!((got - exact).abs() <= 1e-6 * size, "{}: {got} for {exact}", path.name);
            }
        }
    }

    #[test]
    fn weights_are_decoded_to_words(
        block_size in prop_oneof![Just(32_usize), Just(64)], blocks in 1..5_usize, row in 0..PANEL, seed in any::<u64>(),
    ) {
        let (length, mut next) = (blocks * block_size, numbers(seed));
        let mut take = || f32::midpoint(next(), 1.0);
        let codes: [Vec<u8>; 2] = [0, 1].map(|_| (0..length / 2).map(|_| (take() * 256.0) as u8).collect());
        let absmax: [Vec<f32>; 2] = [0, 1].map(|_| (0..blocks).map(|_| take()).collect());
        let runs = [0, 1].map(|i| Run { codes: &codes[i], absmax: &absmax[i], block_size });
        let level = |codes: &[u8], i: usize| {
            let nibble = codes[i / 2] >> if i.is_multiple_of(2) { 4 } else { 0 } & 15;
            f64::from(crate::codebook::LEVELS[usize::from(nibble & 15)]) * f64::from(PAIR_SCALE)
        };
        let (count, panels) = (panel::tiles(2), length / PANEL);
        for (path, pairs) in paths() {
            let mut left = vec![Tile::ZERO; length.div_ceil(PANEL) * 2];
            (pairs.decode_left)(&codes[0], row, &mut left);
            let mut right = vec![Tile::ZERO; panels * count];
            (pairs.decode_right)(&runs, row, count, &mut right);
            for i in 0..length {
                let word = left[i / PANEL * 2 + row / SIDE].0[row % SIDE][i % PANEL / 2];
                let (got, exact) = (signed(word)[i % 2], level(&codes[0], i));
                prop_assert!((got - exact).abs() <= 0.5 + 1e-3, "{}: {got} for {exact}", path.name);
                let tile = i / PANEL * count + row / SIDE * 2 + i % PANEL / SIDE;
                let got = signed(right[tile].0[row % SIDE][i % SIDE]);
                for j in 0..2 {
                    let exact = level(&codes[j], i) * f64::from(absmax[j][i / block_size]);
                    prop_assert!((got[j] - exact).abs() <= 0.5 + 1e-3, "{}: {} for {exact}", path.name, got[j]);
                }
            }
        }
    }

    #[test]
    fn factors_keep_what_units_allow(
        steps in 1..9_usize, width in 1..70_usize, missing in 0..40_usize, row in 0..PANEL, seed in any::<u64>(),
    ) {
        let depth = (steps * panel::STEP).saturating_sub(missing).max(1);
        let mut next = numbers(seed);
        let values: Vec<f32> = (0..width * depth).map(|_| next() * 10.0_f32.powf(20.0 * next())).collect();
        let count = panel::tiles(steps);
        for (path, pairs) in paths() {
            let mut left = vec![Tile::ZERO; count];
            (pairs.factor_left)(&values[..depth], row, steps, &mut left);
            let mut right = vec![Tile::ZERO; width.div_ceil(PANEL) * count];
            (pairs.factor_right)(&values, width, steps, &mut right);
            let check = |value: f32, unit: u32, word: f64| {
                let unit = f64::from(f32::from_bits(unit)) / f64::from(PAIR_SCALE);
                let (got, exact) = (word * unit, f64::from(value));
                prop_assert!((got - exact).abs() <= 0.501 * unit, "{}: {got} for {exact}", path.name);
                Ok(())
            };
            for k in 0..depth {
                let (step, word) = (k / panel::STEP, k % panel::STEP / 2);
                let unit = panel::units(&left, steps, k / UNIT, row / SIDE)[row % SIDE];
                let pair = left[2 * step + row / SIDE].0[row % SIDE][word];
                check(values[k], unit, signed(pair)[k % 2])?;
                for column in 0..width {
                    let panel = &right[column / PANEL * count..][..count];
                    let half = column % PANEL / SIDE;
                    let unit = panel::units(panel, steps, k / UNIT, half)[column % SIDE];
                    let pair = panel[2 * step + half].0[word][column % SIDE];
                    check(values[k * width + column], unit, signed(pair)[k % 2])?;
                }
            }
        }
    }
}
