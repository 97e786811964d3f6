//! What packs panels and takes results out of them, on every path: bits that do not depend on the path.

use super::{Kernels, Run, available, portable};
use crate::gemm::tile::{PANEL, SIDE, Tile};
use half::bf16;
use proptest::prelude::*;

/// No decoded weight has these bits: a place that holds them was not written.
const UNTOUCHED: u32 = 0x7fc0_1234;

/// Words of any bits, with those that rounding may trip over made likely.
fn words() -> impl Strategy<Value = Vec<u32>> {
    let word = prop_oneof![
        4 => (-4.0_f32..4.0).prop_map(f32::to_bits),
        1 => any::<u32>(),
        // Halfway between two bf16, above an even and above an odd one.
        1 => any::<u16>().prop_map(|high| u32::from(high) << 16 | 0x8000),
        1 => prop_oneof![Just(f32::INFINITY), Just(f32::NAN), Just(1e-45), Just(-0.0)].prop_map(f32::to_bits),
    ];
    proptest::collection::vec(word, 4 * SIDE * SIDE)
}

fn tiles(words: &[u32]) -> [Tile; 4] {
    std::array::from_fn(|tile| {
        Tile(std::array::from_fn(|row| {
            std::array::from_fn(|column| words[(tile * SIDE + row) * SIDE + column])
        }))
    })
}

/// NaN is NaN, whatever its other bits.
fn bits<T: Copy + Into<f32>>(rows: &[[T; PANEL]; PANEL]) -> Vec<u32> {
    let bits = |value: f32| if value.is_nan() { u32::MAX } else { value.to_bits() };
    rows.as_flattened().iter().map(|&value| bits(value.into())).collect()
}

proptest! {
    #[test]
    fn every_path_transposes_and_finishes_to_the_same_bits(
        words in words(), swap in any::<bool>(), first_bias in -2.0_f32..2.0,
    ) {
        let bias = std::array::from_fn(|output| first_bias + output as f32 * 0.125);
        let finished = |path: &Kernels| {
            let mut wide = [[0.0; PANEL]; PANEL];
            (path.finish_f32)(&mut tiles(&words), swap, &bias, &mut wide);
            let mut narrow = [[bf16::ZERO; PANEL]; PANEL];
            (path.finish_bf16)(&mut tiles(&words), swap, &bias, &mut narrow);
            (bits(&wide), bits(&narrow))
        };
        let expected = finished(&portable::KERNELS);
        for path in available() {
            for tile in tiles(&words) {
                let (mut ours, mut plain) = (tile, tile);
                (path.transpose)(&mut ours);
                plain.transpose();
                prop_assert!(ours.0 == plain.0, "{} transposes otherwise", path.name);
            }
            prop_assert!(finished(path) == expected, "{} finishes otherwise", path.name);
        }
    }

    #[test]
    fn weights_decoded_into_panels_are_the_dequantized_ones(
        block_size in prop_oneof![Just(32_usize), Just(64)], blocks in 1..5_usize,
        row in 0..PANEL, seed in any::<u32>(),
    ) {
        let length = blocks * block_size;
        let codes: Vec<u8> =
            (0..length / 2).map(|i| (seed.wrapping_mul(2 * i as u32 + 1) >> 13) as u8).collect();
        let absmax: Vec<f32> = (0..blocks).map(|i| 0.01 + i as f32).collect();
        let run = Run { codes: &codes, absmax: &absmax, block_size };
        let mut weights = vec![0.0_f32; length];
        portable::dequantize_blocks(&codes, &absmax, block_size, &mut weights);
        let steps = length.div_ceil(SIDE);
        for path in available() {
            let Some((left, right)) = path.panels_f32.decode else { continue };
            // Left: row `row` of a panel of `steps` steps. Right: word `row` of panels of two steps.
            let mut panel = vec![Tile([[UNTOUCHED; SIDE]; SIDE]); steps * 2];
            left(&run, row, &mut panel);
            let mut panels = vec![Tile([[UNTOUCHED; SIDE]; SIDE]); length / PANEL * 4];
            right(&[run], row, 2, &mut panels);
            let mut expected = vec![Tile([[UNTOUCHED; SIDE]; SIDE]); steps * 2];
            let mut expected_right = vec![Tile([[UNTOUCHED; SIDE]; SIDE]); length / PANEL * 4];
            for (i, weight) in weights.iter().enumerate() {
                expected[i / SIDE * 2 + row / SIDE].0[row % SIDE][i % SIDE] = weight.to_bits();
                let tile = i / PANEL * 4 + row / SIDE * 2 + i % PANEL / SIDE;
                expected_right[tile].0[row % SIDE][i % SIDE] = weight.to_bits();
            }
            let same = |a: &[Tile], b: &[Tile]| a.iter().zip(b).all(|(a, b)| a.0 == b.0);
            prop_assert!(same(&panel, &expected), "{}: left panel", path.name);
            prop_assert!(same(&panels, &expected_right), "{}: right panels", path.name);
        }
    }
}
