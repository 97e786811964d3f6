//! AVX-512: products of activations with rows of packed weights, decoded in registers.
//!
//! One step covers 128 weights of a row, 64 bytes of codes, one vector. Shifting that vector by
//! 0, 4, 8, ... bits brings one nibble of every lane into the low bits, where the permute that
//! looks up its level reads them. The weights then come out in another order than they lie in
//! memory, so the activations are put into that order once, by `prepare_f32`: lane d (32 bits) holds
//! weights 8d .. 8d+7, and a shift by 4j shows weight 8d + (j ^ 1), for the first weight of a byte sits
//! in its high nibble. For few tokens, the shifts by whole bytes are loads instead, from one, two and three
//! bytes on. A last step of fewer than 128 weights reads zeros past the row's end; its
//! activations are padded with zeros. Products of bf16 as such: `avx512_bf16_linear.rs`.

use super::{FETCH_DISTANCE, PREPARED_MULTIPLE, Strip, avx512_many_tokens, fetch_ahead};
use crate::codebook::LEVELS;
use std::arch::x86_64::*;

/// Codes of a step.
const STEP_BYTES: usize = PREPARED_MULTIPLE / 2;

/// Tokens of a tile, at most: the sums of four rows and their weights fit in 32 registers. More tokens:
/// `avx512_many_tokens.rs`.
const MOST_TOKENS: usize = 4;

/// Bytes ahead of their use at which a stream's codes are asked for.
const STREAM_DISTANCE: usize = 1 << 10;

/// Transpose each 128 values from [lane][nibble] to [nibble][lane].
pub(super) fn prepare_f32(row: &[f32], out: &mut [f32]) {
    const NIBBLES: usize = 8;
    let lanes = PREPARED_MULTIPLE / NIBBLES;
    for (row, out) in row.chunks(PREPARED_MULTIPLE).zip(out.chunks_exact_mut(PREPARED_MULTIPLE)) {
        if row.len() < PREPARED_MULTIPLE {
            out.fill(0.0);
        }
        for (lane, weights) in row.chunks_exact(NIBBLES).enumerate() {
            for nibble in 0..NIBBLES {
                out[nibble * lanes + lane] = weights[nibble ^ 1];
            }
        }
    }
}

/// See [`super::Kernels::matrix_vector`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
pub(super) fn matrix_vector(matrix: &[f32], x: &[f32], out: &mut [f32]) {
    assert_eq!(matrix.len(), out.len() * x.len(), "a row per result");
    let (fours, rest) = out.as_chunks_mut::<4>();
    for (i, out) in fours.iter_mut().enumerate() {
        let rows = &matrix[i * 4 * x.len()..][..4 * x.len()];
        *out = sums_of_four(row_sums::<4, 2>(rows, x));
    }
    let matrix = &matrix[matrix.len() - rest.len() * x.len()..];
    for (i, out) in rest.iter_mut().enumerate() {
        let [sum] = row_sums::<1, 8>(&matrix[i * x.len()..][..x.len()], x);
        *out = _mm512_reduce_add_ps(sum);
    }
}

/// `R` rows times x, a vector of partial sums each. `U` vectors of a row are summed apart: a
/// multiply-add takes four cycles, and two can begin in each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn row_sums<const R: usize, const U: usize>(rows: &[f32], x: &[f32]) -> [__m512; R] {
    assert_eq!(rows.len(), R * x.len());
    let mut sums = [[_mm512_setzero_ps(); U]; R];
    let whole = x.len() / (16 * U) * (16 * U);
    for start in (0..whole).step_by(16 * U) {
        for u in 0..U {
            let at = start + 16 * u;
            // SAFETY: at + 16 <= x.len(), and each of the R rows is as long as x.
            let factor = unsafe { _mm512_loadu_ps(x.as_ptr().add(at)) };
            for r in 0..R {
                // SAFETY: as above.
                let row = unsafe { _mm512_loadu_ps(rows.as_ptr().add(r * x.len() + at)) };
                sums[r][u] = _mm512_fmadd_ps(row, factor, sums[r][u]);
            }
        }
    }
    for at in (whole..x.len()).step_by(16) {
        let mask = (u32::from(u16::MAX) >> (16 - (x.len() - at).min(16))) as u16;
        // SAFETY: the mask admits what lies before the end of x, or of a row, which is as long.
        let factor = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at)) };
        for r in 0..R {
            // SAFETY: as above.
            let row = unsafe { _mm512_maskz_loadu_ps(mask, rows.as_ptr().add(r * x.len() + at)) };
            sums[r][0] = _mm512_fmadd_ps(row, factor, sums[r][0]);
        }
    }
    sums.map(|parts| parts.into_iter().fold(_mm512_setzero_ps(), |sum, part| _mm512_add_ps(sum, part)))
}

/// The sums over lanes of four vectors, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn sums_of_four([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
    let pair = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let (ab, cd) = (pair(a, b), pair(c, d));
    let quarters =
        _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(ab, cd), _mm512_shuffle_ps::<0b11_10_11_10>(ab, cd));
    let halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps::<1>(quarters));
    let sum = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
    let mut sums = [0.0; 4];
    // SAFETY: the array holds the four floats that are written.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), sum) };
    sums
}

/// Which of four neighbouring absmax each 32-bit lane takes, for lanes of 8 weights: in whole steps,
/// and in one inside which rows end. There, lanes past the end repeat the last block's, lest the next
/// row's matter, were it NaN: zeros are what they multiply.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn absmax_lanes(strip: &Strip<'_>) -> [__m512i; 2] {
    let lanes = match strip.block_size {
        32 => _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
        64 => _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
        _ => _mm512_setzero_si512(),
    };
    let last = (strip.columns % PREPARED_MULTIPLE / strip.block_size).saturating_sub(1);
    [lanes, _mm512_min_epu32(lanes, _mm512_set1_epi32(last as i32))]
}

/// Whether the strip's rows end inside a step.
#[inline]
pub(super) fn ends_inside(strip: &Strip<'_>, step: usize) -> bool {
    (step + 1) * PREPARED_MULTIPLE > strip.columns
}

/// The codes of a tile's rows, a step at a time. `TAIL`: whether rows may end inside a step.
pub(super) struct Codes<'a, const R: usize, const TAIL: bool> {
    rows: [&'a [u8]; R],
}

impl<'a, const R: usize, const TAIL: bool> Codes<'a, R, TAIL> {
    pub(super) fn new(strip: &Strip<'a>, rows: [usize; R]) -> Self {
        let bytes = strip.columns / 2;
        Self { rows: rows.map(|row| &strip.codes[row * bytes..][..bytes]) }
    }

    /// Where row `r`'s codes of a step lie.
    #[inline]
    pub(super) fn place(&self, r: usize, step: usize) -> *const u8 {
        self.rows[r].as_ptr().wrapping_add(step * STEP_BYTES)
    }

    /// The codes of row `r`'s 128 weights in a step; zeros past the row's end. All steps are masked
    /// where one has to be: a branch here would keep the compiler from mixing the rows' instructions.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn load(&self, r: usize, step: usize) -> __m512i {
        let (row, at) = (self.rows[r], step * STEP_BYTES);
        let left = row.len().saturating_sub(at).min(STEP_BYTES);
        let from = row.as_ptr().wrapping_add(at).cast();
        if TAIL {
            let mask = u64::MAX.unbounded_shr((STEP_BYTES - left) as u32);
            // SAFETY: the mask admits the bytes up to the row's end.
            return unsafe { _mm512_maskz_loadu_epi8(mask, from) };
        }
        assert!(left == STEP_BYTES, "rows are whole steps");
        // SAFETY: 64 bytes are left in the row.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    /// Ask for the line of codes of each row that a tile of [`rows_apart`] will need soon.
    #[inline]
    pub(super) fn fetch_streams(&self, step: usize) {
        for row in self.rows {
            fetch_ahead(row.as_ptr().wrapping_add(step * STEP_BYTES), STREAM_DISTANCE);
        }
    }

    /// Ask for each row's line of codes `rows` rows on.
    #[inline]
    pub(super) fn fetch_rows_on(&self, rows: usize, step: usize) {
        for row in self.rows {
            fetch_ahead(row.as_ptr().wrapping_add(step * STEP_BYTES), rows * row.len());
        }
    }

    /// Ask for one line of codes per row, in the order of memory: see [`fetch_ahead`].
    #[inline]
    pub(super) fn fetch_ahead(&self, step: usize) {
        for line in step * R..(step + 1) * R {
            fetch_ahead(self.rows[0].as_ptr().wrapping_add(line * STEP_BYTES), FETCH_DISTANCE);
        }
    }
}

/// What the weights of a tile's rows are multiplied by, a step at a time; `TAIL` as in [`Codes`].
pub(super) struct Scales<'a, const R: usize, const TAIL: bool> {
    absmax: &'a [f32],
    /// Where each row's begin.
    rows: [usize; R],
    /// Block sizes are powers of two; a division in a step would cost as much as the step.
    block_shift: u32,
    lanes: [__m512i; 2],
    /// The first step inside which rows end.
    last: usize,
}

impl<'a, const R: usize, const TAIL: bool> Scales<'a, R, TAIL> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(strip: &Strip<'a>, rows: [usize; R]) -> Self {
        Self {
            absmax: strip.absmax,
            rows: rows.map(|row| row * strip.blocks()),
            block_shift: strip.block_size.trailing_zeros(),
            lanes: absmax_lanes(strip),
            last: strip.columns / PREPARED_MULTIPLE,
        }
    }

    /// The scale of each eight weights of row `r` in a step.
    ///
    /// # Safety
    /// `Strip::check` must have passed, the rows be the strip's and the step one of theirs.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn load(&self, r: usize, step: usize) -> __m512 {
        let first = self.rows[r] + ((step * PREPARED_MULTIPLE) >> self.block_shift);
        // SAFETY: a step's first block is one of the row's, and four values follow the last row.
        let absmax = unsafe { _mm_loadu_ps(self.absmax.as_ptr().add(first)) };
        let lanes = self.lanes[usize::from(TAIL && step == self.last)];
        _mm512_permutexvar_ps(lanes, _mm512_broadcast_f32x4(absmax))
    }
}

/// Tile `i` of four rows, a quarter of the strip apart.
///
/// Each of the four is a stream of its own then, read in the order of memory from tile to tile, which is
/// what CPUs recognize and fetch ahead by themselves; neighbouring rows, that begin in one page, they
/// take for one stream out of order (`python -m benches.bandwidth` shows it).
#[inline]
pub(super) fn rows_apart(rows: usize, i: usize) -> [usize; 4] {
    std::array::from_fn(|r| i + r * (rows / 4))
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
pub(super) fn linear_f32(x: &[f32], strip: &Strip<'_>, out: &mut [f32]) {
    let rows = out.len() / strip.tokens;
    assert!(out.len() == rows * strip.tokens);
    strip.check(x.len(), rows, 32);
    if strip.columns.is_multiple_of(PREPARED_MULTIPLE) {
        tiles::<false>(x, strip, rows, out);
    } else {
        tiles::<true>(x, strip, rows, out);
    }
}

/// What `linear_f32` has checked, a tile of rows at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn tiles<const TAIL: bool>(x: &[f32], strip: &Strip<'_>, rows: usize, out: &mut [f32]) {
    if strip.tokens > MOST_TOKENS {
        // SAFETY: `linear_f32` has checked the lengths.
        return unsafe { avx512_many_tokens::linear::<TAIL>(x, strip, rows, out) };
    }
    for i in 0..rows / 4 {
        // SAFETY: `linear_f32` has checked the lengths, and the rows are below their number.
        unsafe { tile_of_tokens::<4, TAIL>(x, strip, rows_apart(rows, i), out) };
    }
    for row in rows / 4 * 4..rows {
        // SAFETY: as above.
        unsafe { tile_of_tokens::<1, TAIL>(x, strip, [row], out) };
    }
}

/// `R` rows times all tokens, up to [`MOST_TOKENS`].
///
/// # Safety
/// The lengths that `linear_f32` checks, for these rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn tile_of_tokens<const R: usize, const TAIL: bool>(
    x: &[f32],
    strip: &Strip<'_>,
    rows: [usize; R],
    out: &mut [f32],
) {
    // SAFETY: the caller's, for as many tokens.
    unsafe {
        match strip.tokens {
            1 => tile::<R, 1, TAIL>(x, strip, rows, out),
            2 => tile::<R, 2, TAIL>(x, strip, rows, out),
            3 => tile::<R, 3, TAIL>(x, strip, rows, out),
            _ => tile::<R, 4, TAIL>(x, strip, rows, out),
        }
    }
}

/// `R` rows times `M` tokens.
///
/// # Safety
/// The lengths that `linear_f32` checks, for these rows and tokens `0..M` of x.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn tile<const R: usize, const M: usize, const TAIL: bool>(
    x: &[f32],
    strip: &Strip<'_>,
    rows: [usize; R],
    out: &mut [f32],
) {
    // SAFETY: the array holds the 16 floats that are read.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    let (codes_of, scales_of) = (Codes::<R, TAIL>::new(strip, rows), Scales::<R, TAIL>::new(strip, rows));
    let steps = strip.columns.div_ceil(PREPARED_MULTIPLE);
    let mut sums = [[_mm512_setzero_ps(); M]; R];
    // Behind the codes of all steps but the last are more of the row's.
    let followed = if TAIL { 0 } else { steps.saturating_sub(1) };
    for step in 0..followed {
        // SAFETY: the caller's lengths, and a step that another follows.
        unsafe { add_step::<R, M, TAIL, true>(x, (&codes_of, &scales_of), levels, step..steps, &mut sums) };
    }
    for step in followed..steps {
        // SAFETY: the caller's lengths.
        unsafe { add_step::<R, M, TAIL, false>(x, (&codes_of, &scales_of), levels, step..steps, &mut sums) };
    }
    store_sums(&sums, rows, strip.tokens, out);
}

/// Adds the products of the first of the `steps` that are left, out of all whose number is the range's
/// end. `FOLLOWED`: another one follows, so that the codes can be read from one, two and three bytes further
/// on, too: this brings the low nibble of another byte into the low bits without a shift.
///
/// # Safety
/// As [`tile`], for a step of the rows; one that is `FOLLOWED` is not the last.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
unsafe fn add_step<const R: usize, const M: usize, const TAIL: bool, const FOLLOWED: bool>(
    x: &[f32],
    (codes_of, scales_of): (&Codes<'_, R, TAIL>, &Scales<'_, R, TAIL>),
    levels: __m512,
    steps: std::ops::Range<usize>,
    sums: &mut [[__m512; M]; R],
) {
    let (step, prepared) = (steps.start, steps.end * PREPARED_MULTIPLE);
    codes_of.fetch_streams(step);
    let mut codes: [__m512i; R] = std::array::from_fn(|r| codes_of.load(r, step));
    let scales: [__m512; R] = std::array::from_fn(|r| {
        // SAFETY: the caller's lengths, and a step of the rows.
        unsafe { scales_of.load(r, step) }
    });
    // Scaling a step's sums is cheaper than scaling its weights, where registers hold both.
    let sums_are_scaled = M < MOST_TOKENS;
    let mut partial = [[_mm512_setzero_ps(); M]; R];
    for nibble in 0..8 {
        let mut activations = [_mm512_setzero_ps(); M];
        for m in 0..M {
            // SAFETY: token m's prepared row holds this step's 128 floats.
            let at = unsafe { x.as_ptr().add(m * prepared + step * PREPARED_MULTIPLE + nibble * 16) };
            // SAFETY: as above.
            activations[m] = unsafe { _mm512_loadu_ps(at) };
        }
        for r in 0..R {
            if FOLLOWED && nibble > 0 && nibble % 2 == 0 {
                // SAFETY: up to three of the 64 bytes are the next step's, which has as many.
                codes[r] = unsafe { _mm512_loadu_si512(codes_of.place(r, step).add(nibble / 2).cast()) };
            }
            let mut weights = _mm512_permutexvar_ps(codes[r], levels);
            if !FOLLOWED || nibble % 2 == 0 {
                codes[r] = _mm512_srli_epi32::<4>(codes[r]);
            }
            let sums = if sums_are_scaled { &mut partial[r] } else { &mut sums[r] };
            if !sums_are_scaled {
                weights = _mm512_mul_ps(weights, scales[r]);
            }
            for m in 0..M {
                sums[m] = _mm512_fmadd_ps(weights, activations[m], sums[m]);
            }
        }
    }
    if sums_are_scaled {
        for r in 0..R {
            for m in 0..M {
                sums[r][m] = _mm512_fmadd_ps(partial[r][m], scales[r], sums[r][m]);
            }
        }
    }
}

/// Write `sums[r][token]`, summed over their lanes, to row `rows[r]` of `out`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn store_sums<const R: usize, const M: usize>(
    sums: &[[__m512; M]; R],
    rows: [usize; R],
    tokens: usize,
    out: &mut [f32],
) {
    for (row, sums) in rows.into_iter().zip(sums) {
        for (m, sum) in sums.iter().enumerate() {
            out[row * tokens + m] = _mm512_reduce_add_ps(*sum);
        }
    }
}
