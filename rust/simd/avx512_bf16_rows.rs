//! AVX-512 with bf16: products of nine and more tokens with rows of packed weights. A few rows are
//! decoded into a buffer in the first-level cache, in the order of `avx512_bf16_linear.rs`, and then
//! multiplied with eight tokens at a time: the more tokens, the less decoding costs each.

use super::avx512_bf16_linear::{MOST_TOKENS, bf16s, table};
use super::avx512_linear::{Codes, ends_inside, store_sums};
use super::{PREPARED_MULTIPLE, Strip, fetch_next};
use crate::codebook::LEVELS;
use crate::memory::Scratch;
use half::bf16;
use std::arch::x86_64::*;

/// Rows of a tile: with eight tokens, 24 sums in registers; loads of activations, which come from the
/// second-level cache, serve three rows.
const ROWS: usize = 3;

/// A step of the weights of a tile's rows.
type Decoded<const R: usize> = [[[bf16; 32]; R]; 4];

/// As `avx512_bf16_linear::linear`, which has checked the lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
pub(super) fn linear(x: &[bf16], strip: &Strip<'_>, out: &mut [f32]) {
    let rows = out.len() / strip.tokens;
    let steps = strip.columns.div_ceil(PREPARED_MULTIPLE);
    let mut buffer = Scratch::of::<bf16>(steps * PREPARED_MULTIPLE * ROWS);
    let whole = rows / ROWS * ROWS;
    for row in (0..whole).step_by(ROWS) {
        rows_of_products::<ROWS>(x, strip, row, buffer.values_mut(), out);
    }
    for row in whole..rows {
        rows_of_products::<1>(x, strip, row, buffer.values_mut(), out);
    }
}

/// `R` rows times all tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
fn rows_of_products<const R: usize>(
    x: &[bf16],
    strip: &Strip<'_>,
    row: usize,
    buffer: &mut [bf16],
    out: &mut [f32],
) {
    let steps = strip.columns.div_ceil(PREPARED_MULTIPLE);
    let (runs, _) = buffer.as_chunks_mut::<32>();
    let (runs, _) = runs.as_chunks_mut::<R>();
    let weights = &mut runs.as_chunks_mut::<4>().0[..steps];
    decode::<R>(strip, row, weights);
    // Groups of nearly the same size: nine tokens are five and four, not eight and one.
    let groups = strip.tokens.div_ceil(MOST_TOKENS);
    for group in 0..groups {
        let first = group * strip.tokens / groups;
        let tokens = (group + 1) * strip.tokens / groups - first;
        let x = &x[first * PREPARED_MULTIPLE..];
        // The next rows' codes, a part of them during each group's products: asked for all at once,
        // they would fill the buffers for misses and stop everything else.
        let after = &strip.codes[((row + R) * strip.columns / 2).min(strip.codes.len())..];
        let after = &after[..after.len().min(R * strip.columns / 2)];
        let ahead = &after[group * after.len() / groups..(group + 1) * after.len() / groups];
        let out = &mut out[row * strip.tokens + first..];
        match tokens {
            4 => tile::<R, 4>(x, strip.tokens, weights, ahead, out),
            5 => tile::<R, 5>(x, strip.tokens, weights, ahead, out),
            6 => tile::<R, 6>(x, strip.tokens, weights, ahead, out),
            7 => tile::<R, 7>(x, strip.tokens, weights, ahead, out),
            8 => tile::<R, 8>(x, strip.tokens, weights, ahead, out),
            _ => unreachable!("nine and more tokens are cut into groups of four to eight"),
        }
    }
}

/// `R` rows of weights, rounded to bf16 once, in the order in which permutes meet them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn decode<const R: usize>(strip: &Strip<'_>, row: usize, out: &mut [Decoded<R>]) {
    // SAFETY: the array holds the 16 floats that are read.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    let rows = Codes::<R, true>::new(strip, std::array::from_fn(|r| row + r));
    let block_shift = strip.block_size.trailing_zeros();
    // As in `avx512_bf16_linear::tile`.
    let second = |step: usize| usize::from(strip.block_size == 64 && !ends_inside(strip, step));
    let half = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(16));
    let nibble_mask = _mm512_set1_epi16(15);
    for r in 0..R {
        let absmax = &strip.absmax[(row + r) * strip.blocks()..];
        for (step, out) in out.iter_mut().enumerate() {
            let block = (step * PREPARED_MULTIPLE) >> block_shift;
            let low = _mm512_mul_ps(levels, _mm512_set1_ps(absmax[block]));
            let high = _mm512_mul_ps(levels, _mm512_set1_ps(absmax[block + second(step)]));
            let scaled = table(low, high);
            let mut codes = rows.load(r, step);
            for out in out {
                // half | (codes & 15)
                let index = _mm512_ternarylogic_epi64::<0xF8>(half, codes, nibble_mask);
                codes = _mm512_srli_epi16::<4>(codes);
                let weights = _mm512_permutexvar_epi16(index, scaled);
                // SAFETY: a run holds the 32 values that are written.
                unsafe { _mm512_storeu_si512(out[r].as_mut_ptr().cast(), weights) };
            }
        }
    }
}

/// `R` rows of decoded weights times the first `M` of `tokens` tokens; meanwhile `ahead` is fetched.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
fn tile<const R: usize, const M: usize>(
    x: &[bf16],
    tokens: usize,
    weights: &[Decoded<R>],
    ahead: &[u8],
    out: &mut [f32],
) {
    let mut ahead = ahead.chunks(64 * R);
    let mut sums = [[_mm512_setzero_ps(); M]; R];
    let steps = x.as_chunks::<PREPARED_MULTIPLE>().0.chunks(tokens);
    for (weights, x) in weights.iter().zip(steps) {
        let Some(x) = x.first_chunk::<M>() else { return };
        ahead.next().into_iter().for_each(fetch_next);
        for (nibble, weights) in weights.iter().enumerate() {
            let weights = weights.each_ref().map(|run| load(run));
            for m in 0..M {
                let Some(run) = x[m][nibble * 32..].first_chunk() else { return };
                let activations = load(run);
                for r in 0..R {
                    sums[r][m] = _mm512_dpbf16_ps(sums[r][m], weights[r], activations);
                }
            }
        }
    }
    store_sums(&sums, std::array::from_fn(|r| r), tokens, out);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn load(run: &[bf16; 32]) -> __m512bh {
    // SAFETY: the array holds the 32 values that are read.
    bf16s(unsafe { _mm512_loadu_si512(run.as_ptr().cast()) })
}
