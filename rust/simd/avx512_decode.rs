//! AVX-512: packed weights → tiles, without a buffer in between (layout in `gemm/tile.rs`).

use super::Run;
use crate::codebook::LEVELS;
use crate::gemm::tile::{SIDE, Tile};
use std::arch::x86_64::*;

/// A block's 16 levels rounded to bf16, twice: the permute looks at five bits of an index, and the
/// fifth may be anything. Subnormal values may be flushed: products flush them anyway.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn bf16_table(levels: __m512, absmax: f32) -> __m512i {
    let bits = _mm512_castps_si512(_mm512_mul_ps(levels, _mm512_set1_ps(absmax)));
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)))
}

/// The 32 weights of 16 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn decode_bf16(codes: &[u8; 16], table: __m512i) -> __m512i {
    // SAFETY: the array holds the 16 bytes that are read.
    let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
    // Each 32-bit lane: high nibble in its lower half, whole byte in its upper half.
    let index = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
    _mm512_permutexvar_epi16(index, table)
}

/// The 16 weights of eight bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn decode_f32(codes: &[u8; 8], table: __m512) -> __m512 {
    // SAFETY: the array holds the 8 bytes that are read.
    let bytes = _mm512_cvtepu8_epi64(unsafe { _mm_loadl_epi64(codes.as_ptr().cast()) });
    // Each 64-bit lane: high nibble in its lower half, whole byte in its upper half.
    let index = _mm512_or_si512(_mm512_srli_epi64::<4>(bytes), _mm512_slli_epi64::<32>(bytes));
    _mm512_permutexvar_ps(index, table)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn levels() -> __m512 {
    // SAFETY: the array holds the 16 floats that are read.
    unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) }
}

/// Row `row` of a left panel: steps of 32 weights go to consecutive pairs of tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn left_bf16(run: &Run<'_>, row: usize, tiles: &mut [Tile]) {
    let (half, row, levels) = (row / SIDE, row % SIDE, levels());
    let mut steps = tiles.as_chunks_mut::<2>().0.iter_mut();
    for (codes, &absmax) in run.codes.chunks_exact(run.block_size / 2).zip(run.absmax) {
        let table = bf16_table(levels, absmax);
        for (codes, tiles) in codes.as_chunks::<16>().0.iter().zip(&mut steps) {
            // SAFETY: a tile's row is 64 bytes.
            unsafe { _mm512_store_si512(tiles[half].0[row].as_mut_ptr().cast(), decode_bf16(codes, table)) };
        }
    }
}

/// The same for f32: steps of 16 weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn left_f32(run: &Run<'_>, row: usize, tiles: &mut [Tile]) {
    let (half, row, levels) = (row / SIDE, row % SIDE, levels());
    let mut steps = tiles.as_chunks_mut::<2>().0.iter_mut();
    for (codes, &absmax) in run.codes.chunks_exact(run.block_size / 2).zip(run.absmax) {
        let table = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
        for (codes, tiles) in codes.as_chunks::<8>().0.iter().zip(&mut steps) {
            // SAFETY: a tile's row is 64 bytes.
            unsafe { _mm512_store_ps(tiles[half].0[row].as_mut_ptr().cast(), decode_f32(codes, table)) };
        }
    }
}

/// Two rows of W → row `word` of right panels of `steps` steps, the first row in the lower halves.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn right_bf16(runs: &[Run<'_>], word: usize, steps: usize, tiles: &mut [Tile]) {
    let [even, odd] = runs else { return };
    let levels = levels();
    let (step, row) = (word / SIDE * 2, word % SIDE);
    let low: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 32) as u16);
    // SAFETY: the array holds the 32 indices that are read.
    let low = unsafe { _mm512_loadu_si512(low.as_ptr().cast()) };
    let high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    let mut panels = tiles.chunks_exact_mut(steps * 2);
    let bytes = even.block_size / 2;
    let blocks = even.codes.chunks_exact(bytes).zip(even.absmax);
    for ((codes, absmax), (odd_codes, odd_absmax)) in
        blocks.zip(odd.codes.chunks_exact(bytes).zip(odd.absmax))
    {
        let (table, odd_table) = (bf16_table(levels, *absmax), bf16_table(levels, *odd_absmax));
        let pairs = codes.as_chunks::<16>().0.iter().zip(odd_codes.as_chunks::<16>().0);
        for ((codes, odd_codes), panel) in pairs.zip(&mut panels) {
            let (even, odd) = (decode_bf16(codes, table), decode_bf16(odd_codes, odd_table));
            // SAFETY: a tile's row is 64 bytes.
            unsafe {
                let first = panel[step].0[row].as_mut_ptr();
                _mm512_store_si512(first.cast(), _mm512_permutex2var_epi16(even, low, odd));
                let second = panel[step + 1].0[row].as_mut_ptr();
                _mm512_store_si512(second.cast(), _mm512_permutex2var_epi16(even, high, odd));
            }
        }
    }
}

/// One row of W → row `word` of right panels of `steps` steps.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn right_f32(runs: &[Run<'_>], word: usize, steps: usize, tiles: &mut [Tile]) {
    let [run] = runs else { return };
    let levels = levels();
    let (step, row) = (word / SIDE * 2, word % SIDE);
    let mut panels = tiles.chunks_exact_mut(steps * 2);
    for (codes, &absmax) in run.codes.chunks_exact(run.block_size / 2).zip(run.absmax) {
        let table = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
        for (codes, panel) in codes.as_chunks::<16>().0.iter().zip(&mut panels) {
            for (half, codes) in codes.as_chunks::<8>().0.iter().enumerate() {
                let out = panel[step + half].0[row].as_mut_ptr();
                // SAFETY: a tile's row is 64 bytes.
                unsafe { _mm512_store_ps(out.cast(), decode_f32(codes, table)) };
            }
        }
    }
}
