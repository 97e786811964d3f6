//! AVX-512: microkernels on panels (layout in `gemm/tile.rs`) and what packs them.
//!
//! Up to 24 vectors of sums stay in registers while the panels' steps go by; a word of the left operand
//! is broadcast, a row of two right panels is four vectors. Wide pieces load least per multiply-add, 0.42
//! vectors: with eight rows by two vectors it is 0.63, which shows where another thread of the same core
//! wants its cache, too.

use crate::gemm::tile::{Block, Group, PANEL, SIDE, Tile};
use half::bf16;
use std::arch::x86_64::*;

/// Of the activations that the next block reads, the cache lines that a step brings to the second-level cache.
const LINES_PER_STEP: usize = 2;

macro_rules! define_multiply {
    ($name:ident, $features:literal, $group:ident, $piece:ident, $multiply_add:expr) => {
        #[target_feature(enable = $features)]
        pub(super) fn $name(block: &Block<'_>, sums: &mut [Tile]) {
            let mut next = block.next.iter().flat_map(|tile| &tile.0);
            block.for_each_group(sums, |mut group| match group.columns.div_ceil(SIDE) {
                1 => $group::<8, 8, 1>(&mut group, block.start, &mut next),
                2 => $group::<8, 8, 2>(&mut group, block.start, &mut next),
                3 => $group::<8, 8, 3>(&mut group, block.start, &mut next),
                _ => $group::<6, 4, 4>(&mut group, block.start, &mut next),
            });
        }

        /// Pieces of `MOST` rows, in each tile's last rows of `FEWEST`, by `VECTORS` times 16 columns.
        #[inline]
        #[target_feature(enable = $features)]
        fn $group<'a, const MOST: usize, const FEWEST: usize, const VECTORS: usize>(
            group: &mut Group<'_>,
            start: bool,
            next: &mut impl Iterator<Item = &'a [u32; SIDE]>,
        ) {
            let mut first = 0;
            while first < group.rows {
                // Rows left in this tile.
                let rest = SIDE - first % SIDE;
                if rest >= MOST {
                    $piece::<MOST, VECTORS>(group, first, start, next);
                    first += MOST;
                } else {
                    $piece::<FEWEST, VECTORS>(group, first, start, next);
                    first += FEWEST;
                }
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn $piece<'a, const ROWS: usize, const VECTORS: usize>(
            group: &mut Group<'_>,
            first: usize,
            start: bool,
            next: &mut impl Iterator<Item = &'a [u32; SIDE]>,
        ) {
            let (left_half, first) = (first / SIDE, first % SIDE);
            let mut registers = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            let near = group.right[0].as_chunks::<2>().0;
            // Where there is one right panel, nothing is read of the other.
            let far = group.right[if VECTORS > 2 { 1 } else { 0 }].as_chunks::<2>().0;
            let left = group.left.as_chunks::<2>().0;
            for ((left, near), far) in left.iter().zip(near).zip(far) {
                // A few lines with each step: more at once would keep this step's own reads waiting.
                for line in next.by_ref().take(LINES_PER_STEP) {
                    _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
                }
                let Some(rows) = left[left_half].0[first..].first_chunk::<ROWS>() else { return };
                for word in 0..SIDE {
                    let mut columns = [_mm512_setzero_ps(); VECTORS];
                    for (v, columns) in columns.iter_mut().enumerate() {
                        let tile = if v < 2 { &near[v] } else { &far[v - 2] };
                        // SAFETY: the row holds the 16 words that are read.
                        *columns = unsafe { _mm512_load_ps(tile.0[word].as_ptr().cast()) };
                    }
                    for r in 0..ROWS {
                        let value = _mm512_set1_ps(f32::from_bits(rows[r][word]));
                        for v in 0..VECTORS {
                            registers[r][v] = $multiply_add(registers[r][v], value, columns[v]);
                        }
                    }
                }
            }
            for v in 0..VECTORS {
                let Some(sums) = &mut group.sums[v / 2] else { return };
                let tile = &mut sums[left_half * 2 + v % 2];
                for (row, registers) in tile.0[first..].iter_mut().zip(&registers) {
                    // A block's own sum is added to the sum so far: two short chains of roundings
                    // err less than one long one.
                    // SAFETY: the row holds the 16 words that are read and written.
                    unsafe {
                        let at = row.as_mut_ptr().cast();
                        let sum = registers[v];
                        let sum = if start { sum } else { _mm512_add_ps(sum, _mm512_load_ps(at)) };
                        _mm512_store_ps(at, sum);
                    }
                }
            }
        }
    };
}

define_multiply!(
    multiply_f32,
    "avx512f,avx512bw,avx512vl,avx512dq,fma",
    group_f32,
    piece_f32,
    |sum, value, column| _mm512_fmadd_ps(value, column, sum)
);

define_multiply!(
    multiply_bf16,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma",
    group_bf16,
    piece_bf16,
    |sum, value, column| {
        // SAFETY: all are 512 plain bits.
        let (value, column) = unsafe {
            (std::mem::transmute::<__m512, __m512bh>(value), std::mem::transmute::<__m512, __m512bh>(column))
        };
        _mm512_dpbf16_ps(sum, value, column)
    }
);

/// See [`super::Kernels::transpose`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn transpose(tile: &mut Tile) {
    let mut rows = [_mm512_setzero_si512(); SIDE];
    for (row, words) in rows.iter_mut().zip(&tile.0) {
        // SAFETY: a row holds the 16 words that are read.
        *row = unsafe { _mm512_load_si512(words.as_ptr().cast()) };
    }
    store_transposed(rows, tile);
}

/// Rows and columns swapped in four rounds: words, pairs, then groups of four and eight.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn store_transposed(mut rows: [__m512i; SIDE], tile: &mut Tile) {
    let mut next = rows;
    for i in 0..8 {
        next[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        next[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for i in 0..4 {
        for j in 0..2 {
            let (a, b) = (next[4 * i + j], next[4 * i + 2 + j]);
            rows[4 * i + 2 * j] = _mm512_unpacklo_epi64(a, b);
            rows[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a, b);
        }
    }
    // rows[4 i + c] now holds, in each 128-bit lane l, column 4 l + c of rows 4 i .. 4 i + 3.
    for c in 0..4 {
        let low = _mm512_shuffle_i32x4::<0b1000_1000>(rows[c], rows[4 + c]);
        let high = _mm512_shuffle_i32x4::<0b1101_1101>(rows[c], rows[4 + c]);
        let low_2 = _mm512_shuffle_i32x4::<0b1000_1000>(rows[8 + c], rows[12 + c]);
        let high_2 = _mm512_shuffle_i32x4::<0b1101_1101>(rows[8 + c], rows[12 + c]);
        next[c] = _mm512_shuffle_i32x4::<0b1000_1000>(low, low_2);
        next[8 + c] = _mm512_shuffle_i32x4::<0b1101_1101>(low, low_2);
        next[4 + c] = _mm512_shuffle_i32x4::<0b1000_1000>(high, high_2);
        next[12 + c] = _mm512_shuffle_i32x4::<0b1101_1101>(high, high_2);
    }
    for (row, words) in next.iter().zip(&mut tile.0) {
        // SAFETY: a row holds the 16 words that are written.
        unsafe { _mm512_store_si512(words.as_mut_ptr().cast(), *row) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn interleave(even: &[bf16; 16], odd: &[bf16; 16], out: &mut [u32; 16]) {
    // SAFETY: 16 values of 16 bits are read from each array, 16 words are written.
    unsafe {
        let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even.as_ptr().cast()));
        let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(odd.as_ptr().cast()));
        _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_or_si512(low, _mm512_slli_epi32::<16>(high)));
    }
}

/// Two tiles of a token's outputs, biased: `half(vector, which half)` takes 16 outputs at a time.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn finish(
    sums: &mut [Tile; 4],
    transposed: bool,
    bias: &[f32; PANEL],
    mut put: impl FnMut(usize, usize, __m512),
) {
    for (i, tile) in sums.iter_mut().enumerate() {
        if transposed {
            transpose(tile);
        }
        let (first_token, half) = if transposed { (i % 2, i / 2) } else { (i / 2, i % 2) };
        // SAFETY: half < 2, so 16 floats from 16 * half lie in the array of 32.
        let bias = unsafe { _mm512_loadu_ps(bias.as_ptr().add(half * SIDE)) };
        for (row, words) in tile.0.iter().enumerate() {
            // SAFETY: a row holds the 16 words that are read.
            let sum = unsafe { _mm512_load_ps(words.as_ptr().cast()) };
            put(first_token * SIDE + row, half, _mm512_add_ps(sum, bias));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn finish_f32(
    sums: &mut [Tile; 4],
    transposed: bool,
    bias: &[f32; PANEL],
    out: &mut [[f32; PANEL]; PANEL],
) {
    finish(sums, transposed, bias, |token, half, value| {
        // SAFETY: half < 2, so 16 floats from 16 * half lie in the row of 32.
        unsafe { _mm512_storeu_ps(out[token].as_mut_ptr().add(half * SIDE), value) };
    });
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn finish_bf16(
    sums: &mut [Tile; 4],
    transposed: bool,
    bias: &[f32; PANEL],
    out: &mut [[bf16; PANEL]; PANEL],
) {
    finish(sums, transposed, bias, |token, half, value| {
        let narrow = round_to_bf16(value);
        // SAFETY: half < 2, so 16 values from 16 * half lie in the row of 32.
        unsafe { _mm256_storeu_si256(out[token].as_mut_ptr().add(half * SIDE).cast(), narrow) };
    });
}

/// To nearest, ties to even; subnormal numbers are kept, NaN stays NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn round_to_bf16(value: __m512) -> __m256i {
    let bits = _mm512_castps_si512(value);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
    // Set a bit that survives the cut.
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
    let chosen = _mm512_mask_blend_epi32(nan, rounded, quiet);
    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(chosen))
}
