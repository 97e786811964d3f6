//! AVX-512: packed weights → tiles, without a buffer in between (layout in `gemm/tile.rs`).
//!
//! A shuffle puts each weight's byte into the weight's own lane, a shift per lane brings the nibble
//! down where it is the high one, and a permute looks the level up in the block's table.

use super::Run;
use crate::codebook::LEVELS;
use crate::gemm::tile::{SIDE, Tile};
use std::arch::x86_64::*;

/// Shuffle for lanes of `WIDTH` bytes: weight i's byte, i / 2, and zeros above it.
const fn spread<const WIDTH: usize>() -> [u8; 64] {
    let mut bytes = [0x80; 64];
    let mut weight = 0;
    while weight < 64 / WIDTH {
        bytes[weight * WIDTH] = (weight / 2) as u8;
        weight += 1;
    }
    bytes
}

/// Sixteen f32 from eight bytes; the other half of a 16-byte load is taken by the second table.
static SPREAD_F32: [[u8; 64]; 2] = {
    let first = spread::<4>();
    let mut second = first;
    let mut i = 0;
    while i < 64 {
        second[i] += if second[i] < 0x80 { 8 } else { 0 };
        i += 1;
    }
    [first, second]
};
pub(super) static SPREAD_WORDS: [u8; 64] = spread::<2>();

/// Two rows' bytes alternate by eights: word i is (first row's weight i, second row's weight i).
static SPREAD_PAIRS: [u8; 64] = {
    let mut bytes = [0x80; 64];
    let mut lane = 0;
    while lane < 32 {
        let weight = lane / 2;
        bytes[lane * 2] = (lane % 2 * 8 + weight / 2) as u8;
        lane += 1;
    }
    bytes
};

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the array holds the 64 bytes that are read.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn levels() -> __m512 {
    // SAFETY: the array holds the 16 floats that are read.
    unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) }
}

/// Two blocks' levels rounded to bf16, the first block's below. Subnormal values are flushed, as
/// products of bf16 flush them anyway.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_tables(levels: __m512, low: f32, high: f32) -> __m512i {
    let low = _mm512_mul_ps(levels, _mm512_set1_ps(low));
    let high = _mm512_mul_ps(levels, _mm512_set1_ps(high));
    // SAFETY: both are 512 plain bits.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// The 32 values of 16 bits for the codes of 16 bytes. The permute looks at five bits, the last of which may be anything:
/// the table holds its levels twice.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn decode_words(codes: &[u8; 16], spread: __m512i, table: __m512i) -> __m512i {
    // SAFETY: the array holds the 16 bytes that are read.
    let bytes = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
    let index = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), _mm512_set1_epi32(4));
    _mm512_permutexvar_epi16(index, table)
}

/// The 16 weights of eight of the 16 bytes in each quarter of `bytes`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn decode_f32(bytes: __m512i, spread: __m512i, table: __m512) -> __m512 {
    let index = _mm512_srlv_epi32(_mm512_shuffle_epi8(bytes, spread), _mm512_set1_epi64(4));
    _mm512_permutexvar_ps(index, table)
}

/// Row `row` of a left panel: steps of 32 weights go to consecutive pairs of tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) fn left_bf16(run: &Run<'_>, row: usize, tiles: &mut [Tile]) {
    let (half, row, levels, spread) = (row / SIDE, row % SIDE, levels(), load(&SPREAD_WORDS));
    let mut steps = tiles.as_chunks_mut::<2>().0.iter_mut();
    for (codes, absmax) in run.pieces() {
        let table = bf16_tables(levels, absmax, absmax);
        for (codes, tiles) in codes.iter().zip(&mut steps) {
            let weights = decode_words(codes, spread, table);
            // SAFETY: a tile's row is 64 bytes.
            unsafe { _mm512_store_si512(tiles[half].0[row].as_mut_ptr().cast(), weights) };
        }
    }
}

/// The same for f32: steps of 16 weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn left_f32(run: &Run<'_>, row: usize, tiles: &mut [Tile]) {
    let (half, row, levels, spread) =
        (row / SIDE, row % SIDE, levels(), SPREAD_F32.each_ref().map(|s| load(s)));
    let mut steps = tiles.as_chunks_mut::<4>().0.iter_mut();
    for (codes, absmax) in run.pieces() {
        let table = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
        for (codes, tiles) in codes.iter().zip(&mut steps) {
            // SAFETY: the array holds the 16 bytes that are read.
            let bytes = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
            for (i, spread) in spread.iter().enumerate() {
                let weights = decode_f32(bytes, *spread, table);
                // SAFETY: a tile's row is 64 bytes.
                unsafe { _mm512_store_ps(tiles[2 * i + half].0[row].as_mut_ptr().cast(), weights) };
            }
        }
    }
}

/// Two rows of W → row `word` of right panels of `steps` steps, the first row in the lower halves.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) fn right_bf16(runs: &[Run<'_>], word: usize, steps: usize, tiles: &mut [Tile]) {
    let [even, odd] = runs else { return };
    let levels = levels();
    right_pairs([even, odd], word, steps * 2, tiles, |low, high| bf16_tables(levels, low, high));
}

/// Two rows of W → row `word` of right panels of `panel_tiles` tiles, the first row in the lower halves.
/// `tables(first absmax, second absmax)`: both blocks' weights of 16 bits, the first one's below.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn right_pairs(
    [even, odd]: [&Run<'_>; 2],
    word: usize,
    panel_tiles: usize,
    panels: &mut [Tile],
    tables: impl Fn(f32, f32) -> __m512i,
) {
    let (step, row) = (word / SIDE * 2, word % SIDE);
    let mut panels = panels.chunks_exact_mut(panel_tiles);
    for ((codes, absmax), (odd_codes, odd_absmax)) in even.pieces().zip(odd.pieces()) {
        let table = tables(absmax, odd_absmax);
        let pairs = codes.iter().zip(odd_codes);
        for ((codes, odd_codes), panel) in pairs.zip(&mut panels) {
            for (half, index) in pair_indices(codes, odd_codes).into_iter().enumerate() {
                let weights = _mm512_permutexvar_epi16(index, table);
                let out = panel[step + half].0[row].as_mut_ptr();
                // SAFETY: a tile's row is 64 bytes.
                unsafe { _mm512_store_si512(out.cast(), weights) };
            }
        }
    }
}

/// Of two rows' 32 weights each, the indices into a table of both rows' levels, the first row's below: word i
/// of a vector is (first row's weight i, second row's weight i).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn pair_indices(codes: &[u8; 16], odd_codes: &[u8; 16]) -> [__m512i; 2] {
    let spread = load(&SPREAD_PAIRS);
    // Four weights to a quarter, their shifts: 4, 4 (both rows), 0, 0.
    let shifts = _mm512_set1_epi64(0x4_0004);
    // Odd lanes belong to the second row, whose levels fill the upper half of the table.
    let (second, nibble) = (_mm512_set1_epi32(16 << 16), _mm512_set1_epi16(15));
    std::array::from_fn(|half| {
        let [codes, odd_codes] = [codes, odd_codes].map(|codes| codes.as_chunks::<8>().0[half]);
        let even = _mm512_set1_epi64(i64::from_le_bytes(codes));
        let both = _mm512_mask_set1_epi64(even, 0b1010_1010, i64::from_le_bytes(odd_codes));
        let index = _mm512_srlv_epi16(_mm512_shuffle_epi8(both, spread), shifts);
        // second | (index & 15)
        _mm512_ternarylogic_epi64::<0xF8>(second, index, nibble)
    })
}

/// One row of W → row `word` of right panels of `steps` steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn right_f32(runs: &[Run<'_>], word: usize, steps: usize, tiles: &mut [Tile]) {
    let [run] = runs else { return };
    let (levels, spread) = (levels(), SPREAD_F32.each_ref().map(|s| load(s)));
    let (step, row) = (word / SIDE * 2, word % SIDE);
    let mut panels = tiles.chunks_exact_mut(steps * 2);
    for (codes, absmax) in run.pieces() {
        let table = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
        for (codes, panel) in codes.iter().zip(&mut panels) {
            // SAFETY: the array holds the 16 bytes that are read.
            let bytes = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
            for (half, spread) in spread.iter().enumerate() {
                let out = panel[step + half].0[row].as_mut_ptr();
                // SAFETY: a tile's row is 64 bytes.
                unsafe { _mm512_store_ps(out.cast(), decode_f32(bytes, *spread, table)) };
            }
        }
    }
}
