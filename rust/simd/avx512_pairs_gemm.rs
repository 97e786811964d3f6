//! AVX-512 with products of words: the microkernel on panels of pairs, and what decodes weights into them
//! (layout in `gemm/pairs/panel.rs`).
//!
//! The loop is that of `avx512_gemm.rs`. A lane multiplies two values of the summed dimension at a time, and
//! twice as many instructions do so per cycle as products of pairs of bf16 on Intel's CPUs.

use super::Run;
use super::avx512_decode::{SPREAD_WORDS, decode_words, levels, load, right_pairs};
use super::avx512_pairs_linear::multiply_add;
use super::fixed::{PAIR_SCALE, PAIR_WORDS};
use crate::gemm::Direction;
use crate::gemm::pairs::panel::{PairBlock, UNIT_STEPS, tiles, units};
use crate::gemm::tile::{Group, SIDE, Tile};
use std::arch::x86_64::*;

/// See [`super::PairPanels::multiply`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
pub(super) fn multiply(block: &PairBlock<'_>, sums: &mut [Tile]) {
    let rows_first = block.direction == Direction::Backward;
    block.for_each_group(sums, |mut group| match (group.columns.div_ceil(SIDE), rows_first) {
        (1, false) => pieces::<8, 8, 1, false>(&mut group, block),
        (2, false) => pieces::<8, 8, 2, false>(&mut group, block),
        (3, false) => pieces::<8, 8, 3, false>(&mut group, block),
        (_, false) => pieces::<6, 4, 4, false>(&mut group, block),
        (1, true) => pieces::<8, 8, 1, true>(&mut group, block),
        (2, true) => pieces::<8, 8, 2, true>(&mut group, block),
        (3, true) => pieces::<8, 8, 3, true>(&mut group, block),
        (_, true) => pieces::<6, 4, 4, true>(&mut group, block),
    });
}

/// Pieces of `MOST` rows, in each tile's last rows of `FEWEST`, by `VECTORS` times 16 columns. `ROWS_FIRST`:
/// whether rows are activations. Sums are multiplied by the units of those first: that brings them to a size
/// where no weight's unit makes infinity of what is none.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
fn pieces<const MOST: usize, const FEWEST: usize, const VECTORS: usize, const ROWS_FIRST: bool>(
    group: &mut Group<'_>,
    block: &PairBlock<'_>,
) {
    let mut first = 0;
    while first < group.rows {
        // Rows left in this tile.
        let rest = SIDE - first % SIDE;
        if rest >= MOST {
            piece::<MOST, VECTORS, ROWS_FIRST>(group, first, block);
            first += MOST;
        } else {
            piece::<FEWEST, VECTORS, ROWS_FIRST>(group, first, block);
            first += FEWEST;
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
fn piece<const ROWS: usize, const VECTORS: usize, const ROWS_FIRST: bool>(
    group: &mut Group<'_>,
    first: usize,
    block: &PairBlock<'_>,
) {
    let (left_half, first, steps) = (first / SIDE, first % SIDE, block.steps);
    let (left, near) = (&group.left[..tiles(steps)], &group.right[0][..tiles(steps)]);
    // Where there is one right panel, nothing is read of the other.
    let far = if VECTORS > 2 { &group.right[1][..tiles(steps)] } else { near };
    let right = |v: usize| if v < 2 { near } else { far };
    let mut totals = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    for unit in 0..steps.div_ceil(UNIT_STEPS) {
        let mut products = [[_mm512_setzero_si512(); VECTORS]; ROWS];
        for step in unit * UNIT_STEPS..steps.min((unit + 1) * UNIT_STEPS) {
            let Some(rows) = left[2 * step + left_half].0[first..].first_chunk::<ROWS>() else { return };
            for word in 0..SIDE {
                let mut columns = [_mm512_setzero_si512(); VECTORS];
                for (v, columns) in columns.iter_mut().enumerate() {
                    let row = &right(v)[2 * step + v % 2].0[word];
                    // SAFETY: the row holds the 16 words that are read; rows of tiles are aligned.
                    *columns = unsafe { _mm512_load_si512(row.as_ptr().cast()) };
                }
                for r in 0..ROWS {
                    let value = _mm512_set1_epi32(rows[r][word] as i32);
                    for v in 0..VECTORS {
                        multiply_add(&mut products[r][v], value, columns[v]);
                    }
                }
            }
        }
        let Some(left_units) = units(left, steps, unit, left_half)[first..].first_chunk::<ROWS>() else {
            return;
        };
        for v in 0..VECTORS {
            // SAFETY: as above.
            let of_columns = unsafe { _mm512_load_ps(units(right(v), steps, unit, v % 2).as_ptr().cast()) };
            for r in 0..ROWS {
                let of_row = _mm512_set1_ps(f32::from_bits(left_units[r]));
                let (first, second) = if ROWS_FIRST { (of_row, of_columns) } else { (of_columns, of_row) };
                let total = _mm512_mul_ps(_mm512_cvtepi32_ps(products[r][v]), first);
                totals[r][v] = _mm512_fmadd_ps(total, second, totals[r][v]);
            }
        }
    }
    for v in 0..VECTORS {
        let Some(sums) = &mut group.sums[v / 2] else { return };
        let tile = &mut sums[left_half * 2 + v % 2];
        for (row, totals) in tile.0[first..].iter_mut().zip(&totals) {
            // SAFETY: the row holds the 16 words that are read and written.
            unsafe {
                let at = row.as_mut_ptr().cast();
                let sum = totals[v];
                let sum = if block.start { sum } else { _mm512_add_ps(sum, _mm512_load_ps(at)) };
                _mm512_store_ps(at, sum);
            }
        }
    }
}

/// See [`super::PairPanels::decode_left`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn left(codes: &[u8], row: usize, panel: &mut [Tile]) {
    let (half, row, spread) = (row / SIDE, row % SIDE, load(&SPREAD_WORDS));
    // SAFETY: the array holds the 32 bytes that are read.
    let table = _mm512_broadcast_i64x4(unsafe { _mm256_loadu_si256(PAIR_WORDS.as_ptr().cast()) });
    for (codes, step) in codes.as_chunks::<16>().0.iter().zip(panel.as_chunks_mut::<2>().0) {
        let weights = decode_words(codes, spread, table);
        // SAFETY: a tile's row is 64 bytes.
        unsafe { _mm512_store_si512(step[half].0[row].as_mut_ptr().cast(), weights) };
    }
}

/// See [`super::PairPanels::decode_right`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn right(runs: &[Run<'_>; 2], word: usize, panel_tiles: usize, panels: &mut [Tile]) {
    let scaled = _mm512_mul_ps(levels(), _mm512_set1_ps(PAIR_SCALE));
    right_pairs(runs.each_ref(), word, panel_tiles, panels, |low, high| {
        let words = [low, high].map(|absmax| {
            let weights = _mm512_mul_ps(scaled, _mm512_set1_ps(absmax));
            _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(weights))
        });
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(words[0]), words[1])
    });
}
