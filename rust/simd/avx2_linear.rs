//! AVX2: products of activations with rows of packed weights, decoded in registers.
//!
//! One step covers 64 weights of a row, 32 bytes of codes, one vector. Unpacks work within 128-bit
//! halves, so the weights come out in another order than they lie in memory; the activations are put
//! into that order once, by `prepare_f32`.

use super::avx2_decode::Levels;
use super::{FETCH_DISTANCE, Strip, fetch_ahead};
use std::arch::x86_64::*;

/// Codes of a step.
pub(super) const STEP_BYTES: usize = 32;

/// Weights of a step, and of either half of its vector of codes.
const STEP: usize = 2 * STEP_BYTES;
const HALF: usize = STEP / 2;

/// Put each 64 values into the order in which a step's vectors of 8 weights come: first those in high
/// nibbles, vector q with bytes 4q..4q+4 of the codes' lower half and then of their upper half; then
/// those in low nibbles.
pub(super) fn prepare_f32(row: &[f32], out: &mut [f32]) {
    for (row, out) in row.chunks(STEP).zip(out.as_chunks_mut::<STEP>().0) {
        if row.len() < STEP {
            out.fill(0.0);
        }
        // Blocks have 32 weights or more: halves are whole.
        debug_assert!(row.len().is_multiple_of(HALF));
        for (half, row) in row.as_chunks::<HALF>().0.iter().enumerate() {
            for (q, weights) in row.as_chunks::<8>().0.iter().enumerate() {
                for i in 0..4 {
                    out[q * 8 + half * 4 + i] = weights[2 * i];
                    out[HALF + q * 8 + half * 4 + i] = weights[2 * i + 1];
                }
            }
        }
    }
    // A prepared row is whole steps of the widest path.
    let written = row.len().div_ceil(STEP) * STEP;
    out[written..].fill(0.0);
}

/// Define `$name`, products of rows of weights with prepared activations of one form, `$values` of them in
/// each `$form`: four rows at a time with up to eight tokens at a time by `Rows::$times`. A single token's
/// activations are near without that: its rows go by one by one.
macro_rules! linear {
    ($name:ident, $form:ty, $values:expr, $times:ident) => {
        #[target_feature(enable = "avx2,fma")]
        pub(super) fn $name(x: &[$form], strip: &Strip<'_>, out: &mut [f32]) {
            let rows = out.len() / strip.tokens;
            assert!(out.len() == rows * strip.tokens);
            strip.check(x.len() * $values, rows, 32);
            let mut row = 0;
            while row < rows {
                let out = &mut out[row * strip.tokens..];
                row += if strip.tokens > 1 && rows - row >= 4 {
                    rows_times_tokens::<4>(x, strip, row, out)
                } else {
                    rows_times_tokens::<1>(x, strip, row, out)
                };
            }
        }

        /// `R` rows from `row` on times all tokens; returns R.
        #[inline]
        #[target_feature(enable = "avx2,fma")]
        fn rows_times_tokens<const R: usize>(
            x: &[$form],
            strip: &Strip<'_>,
            row: usize,
            out: &mut [f32],
        ) -> usize {
            let rows = Rows::<R>::new(strip, row);
            let (tokens, prepared) = (strip.tokens, x.len() / strip.tokens);
            // Each group decodes the rows anew: as few as can be, and none of them small.
            let most = tokens.div_ceil(tokens.div_ceil(8));
            for first in (0..tokens).step_by(most) {
                let (x, out) = (&x[first * prepared..], &mut out[first..]);
                match most.min(tokens - first) {
                    1 => rows.$times::<1>(x, prepared, tokens, out),
                    2 => rows.$times::<2>(x, prepared, tokens, out),
                    3 => rows.$times::<3>(x, prepared, tokens, out),
                    4 => rows.$times::<4>(x, prepared, tokens, out),
                    5 => rows.$times::<5>(x, prepared, tokens, out),
                    6 => rows.$times::<6>(x, prepared, tokens, out),
                    7 => rows.$times::<7>(x, prepared, tokens, out),
                    // Partial sums of more would not stay in registers beside the decoding.
                    _ => rows.$times::<8>(x, prepared, tokens, out),
                }
            }
            R
        }
    };
}
pub(super) use linear;

linear!(linear_f32, f32, 1, times);

/// Rows of W that go by together, so that a step's activations are near for all but the first.
pub(super) struct Rows<'a, const R: usize> {
    pub(super) codes: [&'a [u8]; R],
    pub(super) absmax: [&'a [f32]; R],
    pub(super) block_size: usize,
}

impl<'a, const R: usize> Rows<'a, R> {
    /// Rows from `row` on.
    pub(super) fn new(strip: &Strip<'a>, row: usize) -> Self {
        let (bytes, blocks) = (strip.columns / 2, strip.blocks());
        Self {
            codes: std::array::from_fn(|r| &strip.codes[(row + r) * bytes..][..bytes]),
            absmax: std::array::from_fn(|r| &strip.absmax[(row + r) * blocks..][..blocks]),
            block_size: strip.block_size,
        }
    }
}

impl<const R: usize> Rows<'_, R> {
    /// Each row's product with each of `M` prepared tokens: `out[row * stride + token]`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn times<const M: usize>(&self, x: &[f32], prepared: usize, stride: usize, out: &mut [f32]) {
        let levels = Levels::new();
        let x: [&[[f32; STEP]]; M] = std::array::from_fn(|m| x[m * prepared..][..prepared].as_chunks().0);
        let mut sums = [[_mm256_setzero_ps(); M]; R];
        let steps: [&[[u8; STEP_BYTES]]; R] = self.codes.map(|codes| codes.as_chunks().0);
        let whole = steps[0].len();
        let shift = self.block_size.trailing_zeros() - 5;
        for step in 0..whole {
            // In the order of memory, see `fetch_ahead`; a line is two steps of a row.
            for line in 0..R.div_ceil(2) {
                let place = self.codes[0].as_ptr().wrapping_add(step * R * STEP_BYTES + line * 64);
                fetch_ahead(place, FETCH_DISTANCE);
            }
            let x = x.map(|x| &x[step]);
            for r in 0..R {
                let scale = scale_of(self.absmax[r], step, shift);
                add_step(levels, load(&steps[r][step]), scale, x, &mut sums[r]);
            }
        }
        if !self.codes[0].len().is_multiple_of(STEP_BYTES) {
            for r in 0..R {
                let half = &self.codes[r].as_chunks().0[2 * whole];
                let (codes, scale) = last_half(half, self.absmax[r]);
                add_step(levels, codes, scale, x.map(|x| &x[whole]), &mut sums[r]);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (m, &sum) in sums.iter().enumerate() {
                out[r * stride + m] = sum_of_lanes(sum);
            }
        }
    }
}

/// A step's codes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load(codes: &[u8; STEP_BYTES]) -> __m256i {
    // SAFETY: the array holds the 32 bytes that are read.
    unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) }
}

/// What a step of a row is scaled by, for blocks of 32 << shift weights.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn scale_of(absmax: &[f32], step: usize, shift: u32) -> __m256 {
    if shift == 0 {
        // The two halves are of two blocks.
        _mm256_set_m128(_mm_set1_ps(absmax[2 * step + 1]), _mm_set1_ps(absmax[2 * step]))
    } else {
        _mm256_set1_ps(absmax[(2 * step) >> shift])
    }
}

/// A row's last block of 32 weights where it is alone: its absmax is for the lower half, and the upper
/// half's activations are zeros.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn last_half(codes: &[u8; STEP_BYTES / 2], absmax: &[f32]) -> (__m256i, __m256) {
    // SAFETY: the array holds the 16 bytes that are read.
    let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
    let scale = _mm_set1_ps(absmax[absmax.len() - 1]);
    (_mm256_zextsi128_si256(codes), _mm256_zextps128_ps256(scale))
}

/// Add a step's products to the sums. The scale multiplies their partial sum: once for 64 weights.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_step<const M: usize>(
    levels: Levels,
    codes: __m256i,
    scale: __m256,
    x: [&[f32; STEP]; M],
    sums: &mut [__m256; M],
) {
    let nibble = _mm256_set1_epi8(15);
    let halves = [_mm256_and_si256(_mm256_srli_epi16::<4>(codes), nibble), _mm256_and_si256(codes, nibble)];
    let mut partial = [_mm256_setzero_ps(); M];
    for (half, codes) in halves.into_iter().enumerate() {
        for (q, weights) in levels.look_up(codes).into_iter().enumerate() {
            for m in 0..M {
                // SAFETY: half < 2 and q < 4, so 8 floats from there lie in the 64.
                let x = unsafe { _mm256_loadu_ps(x[m].as_ptr().add(half * HALF + q * 8)) };
                partial[m] = _mm256_fmadd_ps(weights, x, partial[m]);
            }
        }
    }
    for m in 0..M {
        sums[m] = _mm256_fmadd_ps(partial[m], scale, sums[m]);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum_of_lanes(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[target_feature(enable = "avx2,fma")]
pub(super) fn matrix_vector(matrix: &[f32], x: &[f32], out: &mut [f32]) {
    assert_eq!(matrix.len(), out.len() * x.len(), "a row per result");
    let (fours, rest) = out.as_chunks_mut::<4>();
    for (i, out) in fours.iter_mut().enumerate() {
        *out = row_sums::<4, 2>(&matrix[i * 4 * x.len()..][..4 * x.len()], x);
    }
    let matrix = &matrix[matrix.len() - rest.len() * x.len()..];
    for (i, out) in rest.iter_mut().enumerate() {
        [*out] = row_sums::<1, 4>(&matrix[i * x.len()..][..x.len()], x);
    }
}

/// `R` rows times x; `U` vectors of a row are summed apart, since a multiply-add takes some cycles.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn row_sums<const R: usize, const U: usize>(rows: &[f32], x: &[f32]) -> [f32; R] {
    assert_eq!(rows.len(), R * x.len());
    let mut sums = [[_mm256_setzero_ps(); U]; R];
    let (unrolled, whole) = (x.len() / (8 * U) * (8 * U), x.len() / 8 * 8);
    // SAFETY: both callers below stay 8 floats inside x, and each of the R rows is as long as x.
    let load = |values: &[f32], at: usize| unsafe { _mm256_loadu_ps(values.as_ptr().add(at)) };
    for start in (0..unrolled).step_by(8 * U) {
        for u in 0..U {
            let factor = load(x, start + 8 * u);
            for r in 0..R {
                sums[r][u] = _mm256_fmadd_ps(load(rows, r * x.len() + start + 8 * u), factor, sums[r][u]);
            }
        }
    }
    for start in (unrolled..whole).step_by(8) {
        let factor = load(x, start);
        for r in 0..R {
            sums[r][0] = _mm256_fmadd_ps(load(rows, r * x.len() + start), factor, sums[r][0]);
        }
    }
    std::array::from_fn(|r| {
        let row = &rows[r * x.len()..][whole..x.len()];
        let rest: f32 = row.iter().zip(&x[whole..]).map(|(a, b)| a * b).sum();
        sum_of_lanes(sums[r].into_iter().fold(_mm256_setzero_ps(), |sum, part| _mm256_add_ps(sum, part)))
            + rest
    })
}
