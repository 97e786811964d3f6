//! AVX2 and FMA: microkernels on panels and what packs them, layout in `gemm/tile.rs`.
//!
//! A tile's 16 rows go by in pieces of six, five and five, each by 16 columns: ten or twelve of the 16
//! registers hold sums. Eight would do for two multiply-adds per cycle of four cycles each, were every
//! operand always there in time.

use super::softmax;
use crate::gemm::tile::{Block, PANEL, SIDE, Tile};
use half::bf16;
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma")]
pub(super) fn multiply_f32(block: &Block<'_>, sums: &mut [Tile]) {
    block.for_each_pair(sums, |left, right, sums, rows, columns| {
        for half in 0..columns.div_ceil(SIDE) {
            for tile in 0..rows.div_ceil(SIDE) {
                let wanted = rows - tile * SIDE;
                let sums = &mut sums[tile * 2 + half];
                piece::<6>(left, right, sums, [tile, half], 0, block.start);
                if wanted > 6 {
                    piece::<5>(left, right, sums, [tile, half], 6, block.start);
                }
                if wanted > 11 {
                    piece::<5>(left, right, sums, [tile, half], 11, block.start);
                }
            }
        }
    });
}

/// `ROWS` rows of a left panel's tiles from `first` on by the columns of a right panel's; `halves` says
/// which tiles of the panels.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn piece<const ROWS: usize>(
    left: &[Tile],
    right: &[Tile],
    sums: &mut Tile,
    halves: [usize; 2],
    first: usize,
    start: bool,
) {
    let mut registers = [[_mm256_setzero_ps(); 2]; ROWS];
    for (left, right) in left.as_chunks::<2>().0.iter().zip(right.as_chunks::<2>().0) {
        let Some(rows) = left[halves[0]].0[first..].first_chunk::<ROWS>() else { return };
        // Unrolled by four: the loop's own counter and branch would take issue slots from multiply-adds.
        for group in (0..SIDE).step_by(4) {
            for word in group..group + 4 {
                let row = &right[halves[1]].0[word];
                // SAFETY: two vectors of 8 words are read from a row of 16.
                let columns = [0, 8].map(|i| unsafe { _mm256_load_ps(row.as_ptr().add(i).cast()) });
                for r in 0..ROWS {
                    let value = _mm256_set1_ps(f32::from_bits(rows[r][word]));
                    for c in 0..2 {
                        registers[r][c] = _mm256_fmadd_ps(value, columns[c], registers[r][c]);
                    }
                }
            }
        }
    }
    for (row, registers) in sums.0[first..].iter_mut().zip(&registers) {
        for (c, register) in registers.iter().enumerate() {
            // A block's own sum is added to the sum so far: two short chains of roundings err less
            // than one long one.
            // SAFETY: c < 2, so 8 words from 8 * c lie in the row of 16.
            unsafe {
                let at = row.as_mut_ptr().add(8 * c).cast();
                let sum = if start { *register } else { _mm256_add_ps(*register, _mm256_load_ps(at)) };
                _mm256_store_ps(at, sum);
            }
        }
    }
}

/// Rows and columns swapped, 8 x 8 words at a time.
#[target_feature(enable = "avx2")]
pub(super) fn transpose(tile: &mut Tile) {
    for i in 0..2 {
        let diagonal = columns_of(tile, 8 * i, i);
        store(tile, 8 * i, i, diagonal);
    }
    let (above, below) = (columns_of(tile, 0, 1), columns_of(tile, 8, 0));
    store(tile, 8, 0, above);
    store(tile, 0, 1, below);
}

/// The columns of 8 rows from `row` on, of one half of each.
#[inline]
#[target_feature(enable = "avx2")]
fn columns_of(tile: &Tile, row: usize, half: usize) -> [__m256; 8] {
    let rows: [__m256; 8] = std::array::from_fn(|i| {
        let words = &tile.0[row + i].as_chunks::<8>().0[half];
        // SAFETY: the array holds the 8 words that are read, halves of an aligned row.
        unsafe { _mm256_load_ps(words.as_ptr().cast()) }
    });
    // Of rows i and i + 4, the halves belong together: 4 x 8 words, twice.
    let halves: [[__m256; 4]; 2] = [
        std::array::from_fn(|i| _mm256_permute2f128_ps::<0x20>(rows[i], rows[i + 4])),
        std::array::from_fn(|i| _mm256_permute2f128_ps::<0x31>(rows[i], rows[i + 4])),
    ];
    let mut columns = rows;
    for (half, [a, b, c, d]) in halves.into_iter().enumerate() {
        let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let (low_2, high_2) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        columns[4 * half] = _mm256_shuffle_ps::<0b0100_0100>(low, low_2);
        columns[4 * half + 1] = _mm256_shuffle_ps::<0b1110_1110>(low, low_2);
        columns[4 * half + 2] = _mm256_shuffle_ps::<0b0100_0100>(high, high_2);
        columns[4 * half + 3] = _mm256_shuffle_ps::<0b1110_1110>(high, high_2);
    }
    columns
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(tile: &mut Tile, row: usize, half: usize, rows: [__m256; 8]) {
    for (i, words) in rows.into_iter().enumerate() {
        let place = &mut tile.0[row + i].as_chunks_mut::<8>().0[half];
        // SAFETY: the array holds the 8 words that are written, halves of an aligned row.
        unsafe { _mm256_store_ps(place.as_mut_ptr().cast(), words) };
    }
}

/// Sums plus bias, 16 outputs of a token at a time: `put(token, first output, values)`; see
/// [`super::Finish`], whose `transpose` is `swap` here.
#[inline]
#[target_feature(enable = "avx2")]
fn finish(
    sums: &mut [Tile; 4],
    swap: bool,
    bias: &[f32; PANEL],
    mut put: impl FnMut(usize, usize, &[f32; SIDE]),
) {
    for (i, tile) in sums.iter_mut().enumerate() {
        if swap {
            transpose(tile);
        }
        // Four tiles [left half][right half]; the left side is outputs if they are to be transposed.
        let (first_token, half) = if swap { (i % 2, i / 2) } else { (i / 2, i % 2) };
        let bias = &bias.as_chunks::<SIDE>().0[half];
        for (row, words) in tile.0.iter().enumerate() {
            // The compiler vectorizes this loop for the features of this function.
            let values = std::array::from_fn(|i| f32::from_bits(words[i]) + bias[i]);
            put(first_token * SIDE + row, half * SIDE, &values);
        }
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn finish_f32(
    sums: &mut [Tile; 4],
    swap: bool,
    bias: &[f32; PANEL],
    out: &mut [[f32; PANEL]; PANEL],
) {
    finish(sums, swap, bias, |token, first, values| {
        out[token][first..first + SIDE].copy_from_slice(values);
    });
}

#[target_feature(enable = "avx2")]
pub(super) fn finish_bf16(
    sums: &mut [Tile; 4],
    swap: bool,
    bias: &[f32; PANEL],
    out: &mut [[bf16; PANEL]; PANEL],
) {
    finish(sums, swap, bias, |token, first, values| {
        softmax::narrow_bf16(values, &mut out[token][first..first + SIDE]);
    });
}
