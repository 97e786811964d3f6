//! AVX-512: products of five and more prepared tokens with rows of packed weights, decoded in registers.
//!
//! Up to eight tokens share decoded weights. Their activations are read for every pair of rows, so they
//! should lie in the first-level cache: rows are cut into pieces of columns whose activations fit there,
//! and a piece's products are added to those of the pieces before it.

use super::avx512_linear::{Codes, Scales, sums_of_four};
use super::{PREPARED_MULTIPLE, Strip};
use crate::codebook::LEVELS;
use std::arch::x86_64::*;

/// Tokens of a tile, at most: two rows' sums, codes, scales and weights fit in 32 registers.
const MOST_TOKENS: usize = 8;

/// Steps of a piece: 4 KiB of activations per token, two thirds of a first-level cache of 48 KiB.
const PIECE: usize = 8;

/// Rows ahead of their use at which a piece's codes are asked for: they do not lie in the order of memory.
const ROWS_AHEAD: usize = 2;

/// As `avx512_linear::linear_f32`, for more than four tokens.
///
/// # Safety
/// `linear_f32` must have checked the lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
pub(super) unsafe fn linear<const TAIL: bool>(x: &[f32], strip: &Strip<'_>, rows: usize, out: &mut [f32]) {
    let prepared = strip.columns.next_multiple_of(PREPARED_MULTIPLE);
    let steps = prepared / PREPARED_MULTIPLE;
    // Groups of nearly the same size: nine tokens are five and four, not eight and one.
    let groups = strip.tokens.div_ceil(MOST_TOKENS);
    if rows == 0 {
        return;
    }
    out.fill(0.0);
    for first in (0..steps).step_by(PIECE) {
        let piece = first..steps.min(first + PIECE);
        for group in 0..groups {
            let token = group * strip.tokens / groups;
            let tokens = (group + 1) * strip.tokens / groups - token;
            let (x, out) = (&x[token * prepared..], &mut out[token..]);
            for i in 0..rows / 2 {
                // SAFETY: the caller has checked the lengths; both rows are below their number.
                unsafe { tile_of_tokens::<2, TAIL>(tokens, x, strip, [i, i + rows / 2], piece.clone(), out) };
            }
            if rows % 2 == 1 {
                // SAFETY: as above.
                unsafe { tile_of_tokens::<1, TAIL>(tokens, x, strip, [rows - 1], piece.clone(), out) };
            }
        }
    }
}

/// # Safety
/// As [`tile`], for `tokens` tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn tile_of_tokens<const R: usize, const TAIL: bool>(
    tokens: usize,
    x: &[f32],
    strip: &Strip<'_>,
    rows: [usize; R],
    steps: std::ops::Range<usize>,
    out: &mut [f32],
) {
    // SAFETY: the caller's.
    unsafe {
        match tokens {
            4 => tile::<R, 4, TAIL>(x, strip, rows, steps, out),
            5 => tile::<R, 5, TAIL>(x, strip, rows, steps, out),
            6 => tile::<R, 6, TAIL>(x, strip, rows, steps, out),
            7 => tile::<R, 7, TAIL>(x, strip, rows, steps, out),
            8 => tile::<R, 8, TAIL>(x, strip, rows, steps, out),
            _ => unreachable!("five and more tokens are cut into groups of four to eight"),
        }
    }
}

/// Add to `out` the products of some steps of `R` rows with `M` tokens.
///
/// # Safety
/// The lengths that `avx512_linear::linear_f32` checks, for these rows, steps and tokens `0..M` of x.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn tile<const R: usize, const M: usize, const TAIL: bool>(
    x: &[f32],
    strip: &Strip<'_>,
    rows: [usize; R],
    steps: std::ops::Range<usize>,
    out: &mut [f32],
) {
    // SAFETY: the array holds the 16 floats that are read.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    let (codes_of, scales_of) = (Codes::<R, TAIL>::new(strip, rows), Scales::<R, TAIL>::new(strip, rows));
    let prepared = strip.columns.next_multiple_of(PREPARED_MULTIPLE);
    let mut sums = [[_mm512_setzero_ps(); 8]; R];
    for step in steps {
        codes_of.fetch_rows_on(ROWS_AHEAD, step);
        let mut codes: [__m512i; R] = std::array::from_fn(|r| codes_of.load(r, step));
        let scales: [__m512; R] = std::array::from_fn(|r| {
            // SAFETY: the caller's lengths, and a step of the rows.
            unsafe { scales_of.load(r, step) }
        });
        for nibble in 0..8 {
            let mut weights = [_mm512_setzero_ps(); R];
            for r in 0..R {
                weights[r] = _mm512_mul_ps(_mm512_permutexvar_ps(codes[r], levels), scales[r]);
                codes[r] = _mm512_srli_epi32::<4>(codes[r]);
            }
            for m in 0..M {
                // SAFETY: token m's prepared row holds this step's 128 floats.
                let at = unsafe { x.as_ptr().add(m * prepared + step * PREPARED_MULTIPLE + nibble * 16) };
                // SAFETY: as above.
                let activations = unsafe { _mm512_loadu_ps(at) };
                for r in 0..R {
                    sums[r][m] = _mm512_fmadd_ps(weights[r], activations, sums[r][m]);
                }
            }
        }
    }
    for (row, sums) in rows.into_iter().zip(sums) {
        let [low, high] = [0, 4].map(|i| sums_of_four([sums[i], sums[i + 1], sums[i + 2], sums[i + 3]]));
        for (out, sum) in out[row * strip.tokens..][..M].iter_mut().zip(low.into_iter().chain(high)) {
            *out += sum;
        }
    }
}
