//! AVX2 with products of words: the microkernel on panels of pairs, and what decodes weights into them
//! (layout in `gemm/pairs/panel.rs`).
//!
//! Pieces are those of `avx2_gemm.rs`. A lane multiplies two values of the summed dimension at a time. The sum
//! takes an instruction of its own, but any of three ports; with AVX-VNNI (Intel since 2021, AMD since 2024),
//! none.

use super::Run;
use super::fixed::{LEVEL_PAIRS, PAIR_SCALE};
use crate::codebook::LEVELS;
use crate::gemm::Direction;
use crate::gemm::pairs::panel::{PairBlock, UNIT_STEPS, tiles, units};
use crate::gemm::tile::{SIDE, Tile};
use std::arch::x86_64::*;

macro_rules! define_multiply {
    ($name:ident, $features:literal, $piece:ident, $multiply_add:expr) => {
        /// See [`super::PairPanels::multiply`].
        #[target_feature(enable = $features)]
        pub(super) fn $name(block: &PairBlock<'_>, sums: &mut [Tile]) {
            block.for_each_group(sums, |mut group| {
                for right in 0..group.columns.div_ceil(2 * SIDE) {
                    let Some(sums) = &mut group.sums[right] else { return };
                    let columns = group.columns - right * 2 * SIDE;
                    for half in 0..columns.div_ceil(SIDE).min(2) {
                        for tile in 0..group.rows.div_ceil(SIDE) {
                            let wanted = group.rows - tile * SIDE;
                            let sums = &mut sums[tile * 2 + half];
                            let panels = [group.left, group.right[right]];
                            $piece::<6>(panels, sums, [tile, half], 0, block);
                            if wanted > 6 {
                                $piece::<5>(panels, sums, [tile, half], 6, block);
                            }
                            if wanted > 11 {
                                $piece::<5>(panels, sums, [tile, half], 11, block);
                            }
                        }
                    }
                }
            });
        }

        /// `ROWS` rows of a left panel's tiles from `first` on by the columns of a right panel's; `halves` says
        /// which tiles of the panels.
        #[inline]
        #[target_feature(enable = $features)]
        fn $piece<const ROWS: usize>(
            panels: [&[Tile]; 2],
            sums: &mut Tile,
            halves: [usize; 2],
            first: usize,
            block: &PairBlock<'_>,
        ) {
            let steps = block.steps;
            let [left, right] = panels.map(|panel| &panel[..tiles(steps)]);
            let mut totals = [[_mm256_setzero_ps(); 2]; ROWS];
            // Sums are multiplied by units of activations first, see `avx512_pairs_gemm.rs`.
            let rows_first = block.direction == Direction::Backward;
            for unit in 0..steps.div_ceil(UNIT_STEPS) {
                let mut products = [[_mm256_setzero_si256(); 2]; ROWS];
                for step in unit * UNIT_STEPS..steps.min((unit + 1) * UNIT_STEPS) {
                    let Some(rows) = left[2 * step + halves[0]].0[first..].first_chunk::<ROWS>() else {
                        return;
                    };
                    // Unrolled by four: the loop's own counter and branch would take issue slots.
                    for group in (0..SIDE).step_by(4) {
                        for word in group..group + 4 {
                            let row = &right[2 * step + halves[1]].0[word];
                            // SAFETY: two vectors of 8 words are read from a row of 16.
                            let load = |i: usize| unsafe { _mm256_load_si256(row.as_ptr().add(i).cast()) };
                            let columns = [load(0), load(8)];
                            for r in 0..ROWS {
                                let value = _mm256_set1_epi32(rows[r][word] as i32);
                                for c in 0..2 {
                                    products[r][c] = $multiply_add(products[r][c], value, columns[c]);
                                }
                            }
                        }
                    }
                }
                let Some(left_units) = units(left, steps, unit, halves[0])[first..].first_chunk::<ROWS>()
                else {
                    return;
                };
                let of_columns = units(right, steps, unit, halves[1]);
                for c in 0..2 {
                    // SAFETY: c < 2, so 8 words from 8 * c lie in the row of 16.
                    let of_columns = unsafe { _mm256_load_ps(of_columns.as_ptr().add(8 * c).cast()) };
                    for r in 0..ROWS {
                        let of_row = _mm256_set1_ps(f32::from_bits(left_units[r]));
                        let (first, second) =
                            if rows_first { (of_row, of_columns) } else { (of_columns, of_row) };
                        let total = _mm256_mul_ps(_mm256_cvtepi32_ps(products[r][c]), first);
                        totals[r][c] = _mm256_fmadd_ps(total, second, totals[r][c]);
                    }
                }
            }
            for (row, totals) in sums.0[first..].iter_mut().zip(&totals) {
                for (c, total) in totals.iter().enumerate() {
                    // SAFETY: c < 2, so 8 words from 8 * c lie in the row of 16.
                    unsafe {
                        let at = row.as_mut_ptr().add(8 * c).cast();
                        let sum =
                            if block.start { *total } else { _mm256_add_ps(*total, _mm256_load_ps(at)) };
                        _mm256_store_ps(at, sum);
                    }
                }
            }
        }
    };
}

define_multiply!(multiply, "avx2,fma", piece, |sum, value, column| {
    _mm256_add_epi32(sum, _mm256_madd_epi16(value, column))
});

define_multiply!(multiply_vnni, "avx2,fma,avxvnni", piece_vnni, |sum, value, column| {
    let mut sum: __m256i = sum;
    let (value, column): (__m256i, __m256i) = (value, column);
    // Not the intrinsic, which the compiler takes apart: see `avx512_pairs_linear::multiply_add`.
    // SAFETY: one instruction, which the features include, on registers alone.
    unsafe {
        std::arch::asm!(
            "{{vex}} vpdpwssd {sum}, {value}, {column}",
            sum = inout(ymm_reg) sum,
            value = in(ymm_reg) value,
            column = in(ymm_reg) column,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
});

/// The 16 words of a table, taken apart: their low bytes and their high bytes, once for either half.
#[derive(Clone, Copy)]
struct Table([__m256i; 2]);

impl Table {
    /// Those of the levels.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn of_levels() -> Self {
        Self(LEVEL_PAIRS.each_ref().map(|bytes| {
            // SAFETY: the array holds the 16 bytes that are read.
            _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
        }))
    }

    /// Those of the levels times `absmax`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn of_weights(absmax: f32) -> Self {
        let scale = _mm256_set1_ps(absmax * PAIR_SCALE);
        let words = [0, 8].map(|first| {
            // SAFETY: first + 8 <= 16, so 8 floats from there lie in the array of 16.
            let levels = unsafe { _mm256_loadu_ps(LEVELS.as_ptr().add(first)) };
            _mm256_cvtps_epi32(_mm256_mul_ps(levels, scale))
        });
        // Packing works within 128-bit halves: back in order.
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(words[0], words[1]));
        let low = _mm256_and_si256(words, _mm256_set1_epi16(0xff));
        let bytes = _mm256_packus_epi16(low, _mm256_srli_epi16::<8>(words));
        // Low and high bytes of words 0..8, then of words 8..16.
        let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(bytes);
        Self([
            _mm256_permute2x128_si256::<0x00>(bytes, bytes),
            _mm256_permute2x128_si256::<0x11>(bytes, bytes),
        ])
    }

    /// The words of the 32 weights of 16 bytes: weights 0..8 and 16..24, then 8..16 and 24..32.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up(self, codes: &[u8; 16]) -> [__m256i; 2] {
        // SAFETY: the array holds the 16 bytes that are read.
        let bytes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
        let nibble = _mm_set1_epi8(15);
        let even = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
        let odd = _mm_and_si128(bytes, nibble);
        let index = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
        let [low, high] = self.0.map(|table| _mm256_shuffle_epi8(table, index));
        [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]
    }
}

/// See [`super::PairPanels::decode_left`].
#[target_feature(enable = "avx2")]
pub(super) fn left(codes: &[u8], row: usize, panel: &mut [Tile]) {
    let (half, row, table) = (row / SIDE, row % SIDE, Table::of_levels());
    for (codes, step) in codes.as_chunks::<16>().0.iter().zip(panel.as_chunks_mut::<2>().0) {
        let [first, second] = table.look_up(codes);
        store(in_order(first, second), &mut step[half].0[row]);
    }
}

/// See [`super::PairPanels::decode_right`].
#[target_feature(enable = "avx2")]
pub(super) fn right(runs: &[Run<'_>; 2], word: usize, panel_tiles: usize, panels: &mut [Tile]) {
    let [even, odd] = runs;
    let (step, row) = (word / SIDE * 2, word % SIDE);
    let mut panels = panels.chunks_exact_mut(panel_tiles);
    for ((codes, absmax), (odd_codes, odd_absmax)) in even.pieces().zip(odd.pieces()) {
        let (table, odd_table) = (Table::of_weights(absmax), Table::of_weights(odd_absmax));
        for ((codes, odd_codes), panel) in codes.iter().zip(odd_codes).zip(&mut panels) {
            let (even, odd) = (table.look_up(codes), odd_table.look_up(odd_codes));
            // Of eight neighbours in either half, pairs of the first four, then of the others.
            let [a, b] = [0, 1].map(|i| {
                let low = _mm256_unpacklo_epi16(even[i], odd[i]);
                (low, _mm256_unpackhi_epi16(even[i], odd[i]))
            });
            let quarters = [in_order(a.0, a.1), in_order(b.0, b.1)];
            // Weights 0..8 and 16..24 are in the first, 8..16 and 24..32 in the second.
            store([quarters[0][0], quarters[1][0]], &mut panel[step].0[row]);
            store([quarters[0][1], quarters[1][1]], &mut panel[step + 1].0[row]);
        }
    }
}

/// Lower halves, then upper halves.
#[inline]
#[target_feature(enable = "avx2")]
fn in_order(a: __m256i, b: __m256i) -> [__m256i; 2] {
    [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(values: [__m256i; 2], row: &mut [u32; SIDE]) {
    for (value, words) in values.into_iter().zip(row.as_chunks_mut::<8>().0) {
        // SAFETY: the array holds the 8 words that are written, half of an aligned row.
        unsafe { _mm256_store_si256(words.as_mut_ptr().cast(), value) };
    }
}
