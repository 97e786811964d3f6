//! AVX-512 with byte products: activations in fixed point times rows of packed weights.
//!
//! A step covers 128 weights of a row, 64 bytes of codes, one vector. A permute of bytes reads the low bits
//! of each of its indices, so one look-up for the vector as it is and one for it shifted by a nibble give a
//! byte of all 128 levels. Lane d of a sum (32 bits) covers weights 8d .. 8d+7. What the bytes are:
//! `fixed.rs`.

use super::avx512_linear::{Codes, Scales, rows_apart, store_sums};
use super::fixed::{ByteStep, LEVEL_BYTES};
use super::{PREPARED_MULTIPLE, Strip};
use std::arch::x86_64::*;

/// With more tokens, pairs of words (`avx512_pairs_linear.rs`) are faster: bytes cost each token ten instructions a
/// step and row, words fewer than five after those that tokens share.
pub(super) const MOST_TOKENS: usize = 3;

/// See [`super::FewRowsFixed`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
pub(super) fn linear(x: &[ByteStep], strip: &Strip<'_>, out: &mut [f32]) {
    let rows = out.len() / strip.tokens;
    assert!(out.len() == rows * strip.tokens && strip.tokens <= MOST_TOKENS);
    strip.check(x.len() * PREPARED_MULTIPLE, rows, 32);
    if strip.columns.is_multiple_of(PREPARED_MULTIPLE) {
        tiles::<false>(x, strip, rows, out);
    } else {
        tiles::<true>(x, strip, rows, out);
    }
}

/// What `linear` has checked, a tile of rows at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
fn tiles<const TAIL: bool>(x: &[ByteStep], strip: &Strip<'_>, rows: usize, out: &mut [f32]) {
    for i in 0..rows / 4 {
        let rows = rows_apart(rows, i);
        // SAFETY: `linear` has checked the lengths; the rows are below their number, `M == strip.tokens`.
        unsafe {
            match strip.tokens {
                1 => tile::<4, 1, TAIL>(x, strip, rows, out),
                2 => tile::<4, 2, TAIL>(x, strip, rows, out),
                _ => tile::<4, 3, TAIL>(x, strip, rows, out),
            }
        }
    }
    for row in rows / 4 * 4..rows {
        // SAFETY: as above.
        unsafe {
            match strip.tokens {
                1 => tile::<1, 1, TAIL>(x, strip, [row], out),
                2 => tile::<1, 2, TAIL>(x, strip, [row], out),
                _ => tile::<1, 3, TAIL>(x, strip, [row], out),
            }
        }
    }
}

/// `R` rows times `M` tokens.
///
/// # Safety
/// The lengths that `linear` checks, for these rows and M tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
unsafe fn tile<const R: usize, const M: usize, const TAIL: bool>(
    x: &[ByteStep],
    strip: &Strip<'_>,
    rows: [usize; R],
    out: &mut [f32],
) {
    let [high_bytes, low_bytes] = [0, 1].map(|i| bytes(&LEVEL_BYTES[i]));
    let (codes, scales_of) = (Codes::<R, TAIL>::new(strip, rows), Scales::<R, TAIL>::new(strip, rows));
    let steps = strip.columns.div_ceil(PREPARED_MULTIPLE);
    let mut sums = [[_mm512_setzero_ps(); M]; R];
    for step in 0..steps {
        codes.fetch_streams(step);
        for r in 0..R {
            // Odd weights are in the low nibbles.
            let odd = codes.load(r, step);
            let even = _mm512_srli_epi16::<4>(odd);
            let high = [_mm512_permutexvar_epi8(odd, high_bytes), _mm512_permutexvar_epi8(even, high_bytes)];
            let low = [_mm512_permutexvar_epi8(odd, low_bytes), _mm512_permutexvar_epi8(even, low_bytes)];
            // SAFETY: the caller's lengths, and a step of the rows.
            let scales = unsafe { scales_of.load(r, step) };
            for m in 0..M {
                // SAFETY: each of M tokens has as many steps.
                let x = unsafe { x.get_unchecked(m * steps + step) };
                let mut sum = _mm512_setzero_si512();
                for i in 0..2 {
                    sum = _mm512_dpbusd_epi32(sum, high[i], bytes(&x.high[i]));
                }
                sum = _mm512_slli_epi32::<8>(sum);
                for i in 0..2 {
                    sum = _mm512_dpbusd_epi32(sum, high[i], bytes(&x.low[i]));
                    sum = _mm512_dpbusd_epi32(sum, low[i], bytes(&x.high[i]));
                }
                let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), floats(&x.unit), floats(&x.offset));
                sums[r][m] = _mm512_fmadd_ps(sum, scales, sums[r][m]);
            }
        }
    }
    store_sums(&sums, rows, strip.tokens, out);
}

#[inline]
#[target_feature(enable = "avx512f")]
fn bytes<T>(bytes: &[T; 64]) -> __m512i {
    const { assert!(size_of::<T>() == 1) };
    // SAFETY: the array holds the 64 bytes that are read.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn floats(floats: &[f32; 16]) -> __m512 {
    // SAFETY: the array holds the 16 floats that are read.
    unsafe { _mm512_loadu_ps(floats.as_ptr()) }
}
