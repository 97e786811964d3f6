//! AVX-512 with bf16: products of few rows of bf16 with rows of packed weights, decoded in registers.
//!
//! A step is 128 weights of a row, 64 bytes of codes, one vector: lane d (16 bits) holds weights
//! 4d .. 4d+3, and a shift by 4j bits brings weight 4d + (j ^ 1) down to where the permute that looks
//! up its level reads it (the first weight of a byte sits in its high nibble). Activations are put
//! into that order once, step by step, so that a step's activations of all tokens lie together:
//!
//! ```text
//! prepared[step][token][j][d] = x[token][128 step + 4d + (j ^ 1)]
//! ```
//!
//! A last step of fewer than 128 weights reads zeros past the row's end; its activations are padded
//! with zeros.

use super::avx512_bf16_rows;
use super::avx512_linear::{Codes, absmax_lanes, ends_inside, store_sums};
use super::{PREPARED_MULTIPLE, Strip};
use crate::codebook::LEVELS;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;

/// Tokens of a tile, at most. Two rows by eight tokens: 16 sums, and the compiler manages to keep
/// everything else in the other 16 registers too. (Three rows leave it too few; it then does not gain.)
/// More tokens are worth storing decoded weights for: `avx512_bf16_rows.rs`.
pub(super) const MOST_TOKENS: usize = 8;

/// Levels are multiplied by this before they are rounded to bf16, and absmax divided by it: of all
/// factors it lets the 16 levels lose least, 8.5e-4 of their size (root mean square) instead of
/// 1.4e-3. Used for one token, where scaling the sum of a block is cheaper than scaling its levels.
const LEVEL_FACTOR: f32 = 1.43675;

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn prepare(x: &[bf16], columns: usize, out: &mut [bf16]) {
    let tokens = x.len() / columns;
    assert!(out.len() == tokens * columns.next_multiple_of(PREPARED_MULTIPLE), "as the kernels read it");
    for (token, row) in x.chunks_exact(columns).enumerate() {
        let (steps, rest) = row.as_chunks::<PREPARED_MULTIPLE>();
        let mut outs = out.as_chunks_mut::<PREPARED_MULTIPLE>().0[token..].iter_mut().step_by(tokens);
        for (values, out) in steps.iter().zip(&mut outs) {
            prepare_step(values, out);
        }
        if let Some(out) = outs.next().filter(|_| !rest.is_empty()) {
            let mut values = [bf16::ZERO; PREPARED_MULTIPLE];
            values[..rest.len()].copy_from_slice(rest);
            prepare_step(&values, out);
        }
    }
}

/// Transpose 128 values from [lane][nibble] to [nibble][lane].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn prepare_step(values: &[bf16; PREPARED_MULTIPLE], out: &mut [bf16; PREPARED_MULTIPLE]) {
    /// Nibbles `first` and `first + 1` of the 16 lanes in two vectors.
    const fn pick(first: u16) -> [u16; 32] {
        let mut index = [0; 32];
        let mut i = 0;
        while i < 32 {
            index[i] = (i as u16 % 16) * 4 + ((first + i as u16 / 16) ^ 1);
            i += 1;
        }
        index
    }
    static PICK: [[u16; 32]; 2] = [pick(0), pick(2)];
    let from = values.as_ptr();
    let to = out.as_mut_ptr();
    for (half, index) in PICK.iter().enumerate() {
        // SAFETY: four vectors of 32 values are read from the array of 128, one of 32 from the index;
        // two are written to the array of 128 at 64 * half, half < 2.
        unsafe {
            let index = _mm512_loadu_si512(index.as_ptr().cast());
            let load = |i: usize| _mm512_loadu_si512(from.add(32 * i).cast());
            let low = _mm512_permutex2var_epi16(load(0), index, load(1));
            let high = _mm512_permutex2var_epi16(load(2), index, load(3));
            let first = _mm512_inserti64x4::<1>(low, _mm512_castsi512_si256(high));
            let second = _mm512_shuffle_i64x2::<0b1110_1110>(low, high);
            _mm512_storeu_si512(to.add(64 * half).cast(), first);
            _mm512_storeu_si512(to.add(64 * half + 32).cast(), second);
        }
    }
}

/// See [`super::Linear`]; `x` as `prepare` leaves it. Needs blocks of 64 or more.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
pub(super) fn linear(x: &[bf16], strip: &Strip<'_>, out: &mut [f32]) {
    let rows = out.len() / strip.tokens;
    assert!(out.len() == rows * strip.tokens);
    strip.check(x.len(), rows, 64);
    if strip.tokens > MOST_TOKENS {
        return avx512_bf16_rows::linear(x, strip, out);
    }
    if strip.columns.is_multiple_of(PREPARED_MULTIPLE) {
        tiles::<false>(x, strip, rows, out);
    } else {
        tiles::<true>(x, strip, rows, out);
    }
}

/// What `linear` has checked, a tile of rows at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
fn tiles<const TAIL: bool>(x: &[bf16], strip: &Strip<'_>, rows: usize, out: &mut [f32]) {
    let tall = if strip.tokens > 4 { 2 } else { 4 };
    let mut row = 0;
    while row < rows {
        // SAFETY: `linear` has checked the lengths; `row + R <= rows`, `M == strip.tokens`.
        row += unsafe {
            match (strip.tokens, rows - row >= tall) {
                (1, true) => row_tile::<4, TAIL>(x, strip, row, out),
                (1, false) => row_tile::<1, TAIL>(x, strip, row, out),
                (2, true) => tile::<4, 2, TAIL>(x, strip, row, out),
                (2, false) => tile::<1, 2, TAIL>(x, strip, row, out),
                (3, true) => tile::<4, 3, TAIL>(x, strip, row, out),
                (3, false) => tile::<1, 3, TAIL>(x, strip, row, out),
                (4, true) => tile::<4, 4, TAIL>(x, strip, row, out),
                (4, false) => tile::<1, 4, TAIL>(x, strip, row, out),
                (5, true) => tile::<2, 5, TAIL>(x, strip, row, out),
                (5, false) => tile::<1, 5, TAIL>(x, strip, row, out),
                (6, true) => tile::<2, 6, TAIL>(x, strip, row, out),
                (6, false) => tile::<1, 6, TAIL>(x, strip, row, out),
                (7, true) => tile::<2, 7, TAIL>(x, strip, row, out),
                (7, false) => tile::<1, 7, TAIL>(x, strip, row, out),
                (_, true) => tile::<2, 8, TAIL>(x, strip, row, out),
                (_, false) => tile::<1, 8, TAIL>(x, strip, row, out),
            }
        };
    }
}

/// 512 plain bits as a vector of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn bf16s(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 plain bits.
    unsafe { std::mem::transmute(bits) }
}

/// `value`, computed after `first`, in spite of a compiler that moves everything next to its use.
#[inline]
#[target_feature(enable = "avx512f")]
fn not_before(first: __m512i, mut value: __m512i) -> __m512i {
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {0} {1} */", in(zmm_reg) first, inout(zmm_reg) value, options(nomem, nostack, preserves_flags));
    }
    value
}

/// Two runs of 16 f32, rounded to bf16: the table that a permute with five-bit indices reads.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn table(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both are 512 plain bits.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

/// `R` rows times one token; returns R. Codes index unscaled levels; the sum of each block is scaled in f32.
///
/// # Safety
/// The lengths that `linear` checks, for rows `row..row + R` and a single token.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
unsafe fn row_tile<const R: usize, const TAIL: bool>(
    x: &[bf16],
    strip: &Strip<'_>,
    row: usize,
    out: &mut [f32],
) -> usize {
    // SAFETY: the array holds the 16 floats that are read.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    let levels = _mm512_mul_ps(levels, _mm512_set1_ps(LEVEL_FACTOR));
    // Twice the same levels: the fifth bit of an index may be anything.
    let levels = table(levels, levels);
    // Lanes of a sum cover eight weights each, as those of `linear_f32` do.
    let lanes = absmax_lanes(strip);
    let (blocks, block_shift) = (strip.blocks(), strip.block_size.trailing_zeros());
    let rows = Codes::<R, TAIL>::new(strip, std::array::from_fn(|r| row + r));
    let mut sums = [[_mm512_setzero_ps(); 1]; R];
    for step in 0..strip.columns.div_ceil(PREPARED_MULTIPLE) {
        let mut activations = [_mm512_setzero_si512(); 4];
        for (nibble, activations) in activations.iter_mut().enumerate() {
            let from = step * PREPARED_MULTIPLE + nibble * 32;
            // SAFETY: the token's step holds 128 values.
            *activations = unsafe { _mm512_loadu_si512(x.as_ptr().add(from).cast()) };
        }
        rows.fetch_ahead(step);
        for r in 0..R {
            let mut codes = rows.load(r, step);
            let first = (row + r) * blocks + ((step * PREPARED_MULTIPLE) >> block_shift);
            // SAFETY: a step's first block is below columns / block_size, and four values follow the last row.
            let absmax = unsafe { _mm_loadl_epi64(strip.absmax.as_ptr().add(first).cast()) };
            let lanes = lanes[usize::from(ends_inside(strip, step))];
            let scales = _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(_mm_castsi128_ps(absmax)));
            let mut partial = _mm512_setzero_ps();
            for activations in &activations {
                let weights = _mm512_permutexvar_epi16(codes, levels);
                codes = _mm512_srli_epi16::<4>(codes);
                partial = _mm512_dpbf16_ps(partial, bf16s(weights), bf16s(*activations));
            }
            sums[r][0] = _mm512_fmadd_ps(partial, scales, sums[r][0]);
        }
    }
    for sum in sums.as_flattened_mut() {
        *sum = _mm512_mul_ps(*sum, _mm512_set1_ps(1.0 / LEVEL_FACTOR));
    }
    store_sums(&sums, std::array::from_fn(|r| row + r), strip.tokens, out);
    R
}

/// `R` rows times `M` tokens; returns R. Codes index scaled levels, rounded to bf16 once.
///
/// # Safety
/// The lengths that `linear` checks, for rows `row..row + R` and M tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")]
unsafe fn tile<const R: usize, const M: usize, const TAIL: bool>(
    x: &[bf16],
    strip: &Strip<'_>,
    row: usize,
    out: &mut [f32],
) -> usize {
    // SAFETY: the array holds the 16 floats that are read.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    // Block sizes are powers of two; a division here would cost as much as the step.
    let (blocks, block_shift) = (strip.blocks(), strip.block_size.trailing_zeros());
    let rows = Codes::<R, TAIL>::new(strip, std::array::from_fn(|r| row + r));
    // Blocks of 64: the upper 16 lanes belong to a second block, whose levels fill the upper half
    // of the table. Longer blocks: both halves hold the same levels.
    let second = |step: usize| usize::from(strip.block_size == 64 && !ends_inside(strip, step));
    let half = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(16));
    let nibble_mask = _mm512_set1_epi16(15);
    let scaled = |r: usize, step: usize| {
        let first = (row + r) * blocks + ((step * PREPARED_MULTIPLE) >> block_shift);
        // SAFETY: up to one step past the row's last one, `first` is at most two blocks past the row's
        // last one, and four values follow the last row.
        let (low, high) = unsafe {
            let absmax = strip.absmax.as_ptr().add(first);
            (_mm512_set1_ps(*absmax), _mm512_set1_ps(*absmax.add(second(step))))
        };
        table(_mm512_mul_ps(levels, low), _mm512_mul_ps(levels, high))
    };
    let mut tables: [__m512i; R] = std::array::from_fn(|r| scaled(r, 0));
    let mut sums = [[_mm512_setzero_ps(); M]; R];
    for step in 0..strip.columns.div_ceil(PREPARED_MULTIPLE) {
        // The next step's tables come before this step's products: the multiplications share their
        // ports with those, the oldest instruction goes first, and so they would come last.
        let next: [__m512i; R] = std::array::from_fn(|r| scaled(r, step + 1));
        let mut codes: [__m512i; R] = std::array::from_fn(|r| not_before(next[r], rows.load(r, step)));
        rows.fetch_ahead(step);
        for nibble in 0..4 {
            let mut weights = [_mm512_setzero_si512(); R];
            for r in 0..R {
                // half | (codes & 15)
                let index = _mm512_ternarylogic_epi64::<0xF8>(half, codes[r], nibble_mask);
                codes[r] = _mm512_srli_epi16::<4>(codes[r]);
                weights[r] = _mm512_permutexvar_epi16(index, tables[r]);
            }
            for m in 0..M {
                let from = (step * M + m) * PREPARED_MULTIPLE + nibble * 32;
                // SAFETY: the token's step holds 128 values.
                let activations = unsafe { _mm512_loadu_si512(x.as_ptr().add(from).cast()) };
                for r in 0..R {
                    sums[r][m] = _mm512_dpbf16_ps(sums[r][m], bf16s(weights[r]), bf16s(activations));
                }
            }
        }
        tables = next;
    }
    store_sums(&sums, std::array::from_fn(|r| row + r), strip.tokens, out);
    R
}
