//! AVX2: packed weights → floats, in order (layout of tiles in `gemm/tile.rs`).
//!
//! There is no permute that looks up one of 16 floats, but a byte shuffle looks up 32 of 16 bytes. So
//! the levels lie in tables, one for each byte of a float: four shuffles look up the bytes of 32
//! weights, eight unpacks put them together. CPUs since 2019 run two shuffles per cycle, where a permute
//! of floats from two tables of eight would take one of these two places alone and a blend after it.

use super::Run;
use crate::codebook::LEVELS;
use crate::gemm::tile::{SIDE, Tile};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// The 16 levels, taken apart: table b holds byte b of each, once for either half of a vector.
#[derive(Clone, Copy)]
pub(super) struct Levels([__m256i; 4]);

impl Levels {
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn new() -> Self {
        Self(std::array::from_fn(|byte| {
            let table = LEVELS.map(|level| level.to_le_bytes()[byte]);
            // SAFETY: the array holds the 16 bytes that are read.
            _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) })
        }))
    }

    /// The levels of 32 codes, one in each byte: vector q holds those of bytes 4q..4q+4 of both halves.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) fn look_up(self, codes: __m256i) -> [__m256; 4] {
        let [a, b, c, d] = self.0.map(|table| _mm256_shuffle_epi8(table, codes));
        let low = [_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)];
        let high = [_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d)];
        [
            _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[0], high[0])),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[0], high[0])),
            _mm256_castsi256_ps(_mm256_unpacklo_epi16(low[1], high[1])),
            _mm256_castsi256_ps(_mm256_unpackhi_epi16(low[1], high[1])),
        ]
    }
}

/// Shuffle of 16 bytes of codes, twice: each byte where its two weights go, so that the vectors which
/// [`Levels::look_up`] returns hold 8 weights each in order.
static SPREAD: [u8; 32] = {
    let mut bytes = [0; 32];
    let mut i = 0;
    while i < 32 {
        // Four weights of a vector in either half.
        let (half, vector, weight) = (i / 16, i % 16 / 4, i % 4);
        bytes[i] = ((vector * 8 + half * 4 + weight) / 2) as u8;
        i += 1;
    }
    bytes
};

/// Decodes 32 weights at a time, in order.
#[derive(Clone, Copy)]
struct Decoder {
    levels: Levels,
    spread: __m256i,
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        // SAFETY: the array holds the 32 bytes that are read.
        let spread = unsafe { _mm256_loadu_si256(SPREAD.as_ptr().cast()) };
        Self { levels: Levels::new(), spread }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn decode(self, codes: &[u8; 16], absmax: __m256) -> [__m256; 4] {
        // SAFETY: the array holds the 16 bytes that are read.
        let bytes = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
        let pairs = _mm256_shuffle_epi8(bytes, self.spread);
        let even = _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), _mm256_set1_epi16(0x000f));
        let odd = _mm256_and_si256(pairs, _mm256_set1_epi16(0x0f00));
        self.levels.look_up(_mm256_or_si256(even, odd)).map(|level| _mm256_mul_ps(level, absmax))
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn dequantize_f32(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [f32]) {
    let decoder = Decoder::new();
    let blocks = codes.chunks_exact(block_size / 2).zip(out.chunks_exact_mut(block_size));
    for ((codes, out), &absmax) in blocks.zip(absmax) {
        let absmax = _mm256_set1_ps(absmax);
        for (codes, out) in codes.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            for (i, weights) in decoder.decode(codes, absmax).into_iter().enumerate() {
                // SAFETY: i < 4, so 8 floats from 8 * i lie in the array of 32.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * i), weights) };
            }
        }
    }
}

/// Row `row` of a left panel: steps of 16 weights go to consecutive pairs of tiles.
#[target_feature(enable = "avx2")]
pub(super) fn left_f32(run: &Run<'_>, row: usize, tiles: &mut [Tile]) {
    let (half, row) = (row / SIDE, row % SIDE);
    let mut steps = tiles.as_chunks_mut::<2>().0.iter_mut();
    decode_steps(run, |weights| {
        if let Some(tiles) = steps.next() {
            store_row(weights, &mut tiles[half].0[row]);
        }
    });
}

/// One row of W → row `word` of right panels of `steps` steps.
#[target_feature(enable = "avx2")]
pub(super) fn right_f32(runs: &[Run<'_>], word: usize, steps: usize, tiles: &mut [Tile]) {
    let [run] = runs else { return };
    let (step, row) = (word / SIDE * 2, word % SIDE);
    let mut halves = tiles.chunks_exact_mut(steps * 2).flat_map(|panel| panel[step..].iter_mut().take(2));
    decode_steps(run, |weights| {
        if let Some(tile) = halves.next() {
            store_row(weights, &mut tile.0[row]);
        }
    });
}

/// Call `put` with each 16 weights of the run.
#[inline]
#[target_feature(enable = "avx2")]
fn decode_steps(run: &Run<'_>, mut put: impl FnMut([__m256; 2])) {
    let decoder = Decoder::new();
    for (codes, absmax) in run.pieces() {
        let absmax = _mm256_set1_ps(absmax);
        for codes in codes {
            let [a, b, c, d] = decoder.decode(codes, absmax);
            put([a, b]);
            put([c, d]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_row(weights: [__m256; 2], row: &mut [u32; SIDE]) {
    for (i, weights) in weights.into_iter().enumerate() {
        // SAFETY: i < 2, so 8 words from 8 * i lie in the row of 16; rows of tiles are aligned.
        unsafe { _mm256_store_ps(row.as_mut_ptr().add(8 * i).cast(), weights) };
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn dequantize_bf16(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [bf16]) {
    let blocks = codes.chunks_exact(block_size / 2).zip(out.chunks_exact_mut(block_size));
    for ((codes, out), &absmax) in blocks.zip(absmax) {
        let table = LEVELS.map(|level| bf16::from_f32(level * absmax).to_bits());
        // SAFETY: bf16 is a transparent u16, and the slice covers the whole block.
        let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u16>(), out.len()) };
        look_up_16_bit(codes, &table, out);
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn dequantize_f16(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [f16]) {
    let blocks = codes.chunks_exact(block_size / 2).zip(out.chunks_exact_mut(block_size));
    for ((codes, out), &absmax) in blocks.zip(absmax) {
        let table = LEVELS.map(|level| f16::from_f32(level * absmax).to_bits());
        // SAFETY: f16 is a transparent u16, and the slice covers the whole block.
        let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u16>(), out.len()) };
        look_up_16_bit(codes, &table, out);
    }
}

/// Write `table[code]` for each code, 32 weights per step: one byte shuffle per half of an entry.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up_16_bit(codes: &[u8], table: &[u16; 16], out: &mut [u16]) {
    let half = |shift: u32| {
        let bytes = table.map(|entry| (entry >> shift) as u8);
        // SAFETY: the array holds the 16 bytes that are read.
        _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
    };
    let (low_bytes, high_bytes) = (half(0), half(8));
    let nibble = _mm_set1_epi8(15);
    for (codes, out) in codes.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        // SAFETY: the array holds the 16 bytes that are read.
        let bytes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
        let even = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
        let odd = _mm_and_si128(bytes, nibble);
        let index = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
        let (low, high) = (_mm256_shuffle_epi8(low_bytes, index), _mm256_shuffle_epi8(high_bytes, index));
        // Interleaving works within 128-bit halves: put them back in order.
        let (first, second) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
        // SAFETY: two vectors of 16 values are written to an array of 32.
        unsafe {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permute2x128_si256::<0x20>(first, second));
            _mm256_storeu_si256(
                out.as_mut_ptr().add(16).cast(),
                _mm256_permute2x128_si256::<0x31>(first, second),
            );
        }
    }
}
