//! AVX-512 with products of words: some rows of activations in fixed point, as pairs (`fixed.rs`), times rows
//! of packed weights.
//!
//! A tile is 16 rows, one in each 32-bit lane of every vector, so that a pair of a token's activations meets
//! all of them as it lies in memory, and a block's sum of a token becomes a float once for 16 rows. A step
//! covers 128 weights of each row, 64 bytes of codes: 16 vectors, whose words are swapped between rows and
//! columns. A vector then holds eight weights of each row; for each two of them one instruction lays their
//! nibbles out, each twice, one bit tells the copies apart, and a permute looks up a byte of the level for
//! each copy.

use super::avx512_gemm::{store_transposed, transpose};
use super::avx512_linear::Codes;
use super::fixed::{LEVEL_PAIRS, PairStep, UNIT_SIZE};
use super::{PREPARED_MULTIPLE, Strip, fetch_ahead};
use crate::gemm::tile::{SIDE, Tile};
use std::arch::x86_64::*;

/// Tokens that share decoded weights.
const MOST_TOKENS: usize = 8;

/// See [`super::FewRowsFixed`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
pub(super) fn linear(x: &[PairStep], strip: &Strip<'_>, out: &mut [f32]) {
    let rows = out.len() / strip.tokens;
    assert!(out.len() == rows * strip.tokens);
    strip.check(x.len() * PREPARED_MULTIPLE, rows, 32);
    if strip.columns.is_multiple_of(PREPARED_MULTIPLE) {
        tiles::<false>(x, strip, rows, out);
    } else {
        tiles::<true>(x, strip, rows, out);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
fn tiles<const TAIL: bool>(x: &[PairStep], strip: &Strip<'_>, rows: usize, out: &mut [f32]) {
    let (tokens, steps) = (strip.tokens, x.len() / strip.tokens);
    // Each group decodes the rows anew: as few as can be, and none of them small.
    let groups = tokens.div_ceil(MOST_TOKENS);
    for first in (0..rows).step_by(SIDE) {
        let tile = RowTile::<TAIL>::new(strip, first, rows);
        for group in 0..groups {
            let token = group * tokens / groups;
            let (x, out) = (&x[token * steps..], &mut out[first * tokens + token..]);
            match (group + 1) * tokens / groups - token {
                1 => tile.times::<1, 2>(x, steps, tokens, out),
                2 => tile.times::<2, 2>(x, steps, tokens, out),
                3 => tile.times::<3, 2>(x, steps, tokens, out),
                4 => tile.times::<4, 2>(x, steps, tokens, out),
                5 => tile.times::<5, 2>(x, steps, tokens, out),
                6 => tile.times::<6, 2>(x, steps, tokens, out),
                7 => tile.times::<7, 1>(x, steps, tokens, out),
                _ => tile.times::<MOST_TOKENS, 1>(x, steps, tokens, out),
            }
        }
    }
}

/// 16 rows of a strip; the last one stands in for those past it.
struct RowTile<'a, const TAIL: bool> {
    codes: Codes<'a, SIDE, TAIL>,
    absmax: [&'a [f32]; SIDE],
    block_size: usize,
    /// Bytes from a row's codes to those of the same columns in the next tile.
    ahead: usize,
    /// Rows that are not past the strip.
    rows: usize,
}

impl<'a, const TAIL: bool> RowTile<'a, TAIL> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
    fn new(strip: &Strip<'a>, first: usize, rows: usize) -> Self {
        let blocks = strip.blocks();
        let at = std::array::from_fn(|r| (first + r).min(rows - 1));
        Self {
            codes: Codes::new(strip, at),
            absmax: at.map(|row| &strip.absmax[row * blocks..][..blocks]),
            block_size: strip.block_size,
            ahead: SIDE * strip.columns / 2,
            rows: rows - first,
        }
    }

    /// Each row's product with each of `M` tokens: `out[row * stride + token]`.
    ///
    /// `PARTS`: 2 sums the products of even and odd pairs apart. A product waits for the sum that it is added
    /// to; those of few tokens would wait longer than they take.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
    fn times<const M: usize, const PARTS: usize>(
        &self,
        x: &[PairStep],
        steps: usize,
        stride: usize,
        out: &mut [f32],
    ) {
        let levels = Levels::new();
        let x: [&[PairStep]; M] = std::array::from_fn(|m| &x[m * steps..][..steps]);
        let mut sums = [_mm512_setzero_ps(); M];
        let mut columns = Tile::ZERO;
        let mut scales = Tile::ZERO;
        // Vectors of eight weights whose sums have one unit and one scale.
        let run = self.block_size.min(UNIT_SIZE) / 8;
        let shift = self.block_size.trailing_zeros();
        let mut loaded = usize::MAX;
        for step in 0..steps {
            let mut rows = [_mm512_setzero_si512(); SIDE];
            for r in 0..SIDE {
                fetch_ahead(self.codes.place(r, step), self.ahead);
                rows[r] = self.codes.load(r, step);
            }
            store_transposed(rows, &mut columns);
            for first in (0..SIDE).step_by(run) {
                let block = (step * PREPARED_MULTIPLE + first * 8) >> shift;
                if block / SIDE != loaded {
                    loaded = block / SIDE;
                    self.load_scales(loaded * SIDE, &mut scales);
                }
                let mut products = [[_mm512_setzero_si512(); 2]; M];
                for c in first..first + run {
                    // SAFETY: the row holds the 16 words that are read; rows of tiles are aligned.
                    let codes = unsafe { _mm512_load_si512(columns.0[c].as_ptr().cast()) };
                    for pair in 0..4 {
                        let weights = levels.look_up(codes, pair);
                        for m in 0..M {
                            let x = _mm512_set1_epi32(x[m][step].pairs[4 * c + pair]);
                            multiply_add(&mut products[m][pair % PARTS], weights, x);
                        }
                    }
                }
                // SAFETY: as above.
                let scale = unsafe { _mm512_load_ps(scales.0[block % SIDE].as_ptr().cast()) };
                for m in 0..M {
                    let unit = _mm512_set1_ps(x[m][step].unit[first]);
                    let [even, odd] = products[m];
                    let total = if PARTS == 2 { _mm512_add_epi32(even, odd) } else { even };
                    let total = _mm512_mul_ps(_mm512_cvtepi32_ps(total), unit);
                    sums[m] = _mm512_fmadd_ps(total, scale, sums[m]);
                }
            }
        }
        for (m, sums) in sums.into_iter().enumerate() {
            let mut of_rows = [0.0; SIDE];
            // SAFETY: the array holds the 16 floats that are written.
            unsafe { _mm512_storeu_ps(of_rows.as_mut_ptr(), sums) };
            for (r, sum) in of_rows[..self.rows.min(SIDE)].iter().enumerate() {
                out[r * stride + m] = *sum;
            }
        }
    }

    /// The absmax of 16 blocks of all rows, a vector of rows for each block; zeros past the last block.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn load_scales(&self, first: usize, scales: &mut Tile) {
        for (absmax, out) in self.absmax.iter().zip(&mut scales.0) {
            let absmax = &absmax[first..];
            let mask = (u32::from(u16::MAX) >> (SIDE - absmax.len().min(SIDE))) as u16;
            // SAFETY: the mask admits what lies before the end of the row's absmax; 16 words are written to a
            // row of a tile, which is aligned.
            unsafe {
                let values = _mm512_maskz_loadu_ps(mask, absmax.as_ptr());
                _mm512_store_ps(out.as_mut_ptr().cast(), values);
            }
        }
        transpose(scales);
    }
}

/// Add the products of pairs of words to the sums in the lanes they lie in.
///
/// The compiler takes the intrinsic apart, into a product and a sum, to shorten the way from one sum to the
/// next; but there are as many such ways as tokens, and time is what instructions take.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) fn multiply_add(sums: &mut __m512i, a: __m512i, b: __m512i) {
    // SAFETY: one instruction, which the features include, on registers alone.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {sums}, {a}, {b}",
            sums = inout(zmm_reg) *sums,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}

/// Tables and constants of the look-up.
#[derive(Clone, Copy)]
struct Levels {
    table: __m512i,
    /// For each pair of a vector's eight weights, the bit at which each byte's nibble starts in its 64.
    nibbles: [__m512i; 4],
    mask: __m512i,
    plane: __m512i,
}

impl Levels {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
    fn new() -> Self {
        // SAFETY: the array holds the 32 bytes that are read.
        let table = unsafe { _mm256_loadu_si256(LEVEL_PAIRS.as_ptr().cast()) };
        let nibbles = std::array::from_fn(|pair| {
            // The even weight is in the high nibble of byte `pair` of either half.
            let [even, odd] = [8 * pair as u64 + 4, 8 * pair as u64];
            let half = even | even << 8 | odd << 16 | odd << 24;
            let other = half + 0x2020_2020;
            _mm512_set1_epi64((half | other << 32) as i64)
        });
        Self {
            table: _mm512_broadcast_i64x4(table),
            nibbles,
            mask: _mm512_set1_epi8(15),
            plane: _mm512_set1_epi16(0x1000),
        }
    }

    /// The levels of two weights of each row.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
    fn look_up(self, codes: __m512i, pair: usize) -> __m512i {
        const AND_OR: i32 = 0xea;
        let twice = _mm512_multishift_epi64_epi8(self.nibbles[pair], codes);
        let index = _mm512_ternarylogic_epi64::<AND_OR>(twice, self.mask, self.plane);
        _mm512_permutexvar_epi8(index, self.table)
    }
}
