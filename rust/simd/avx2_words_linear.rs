//! AVX2: activations in fixed point, as words, times rows of packed weights.
//!
//! A vector of codes covers 64 weights of a row, a step two of them. Two byte shuffles look up 32 levels, two
//! unpacks put their bytes together: a third of what floats take (`avx2_decode.rs`), whose levels have four
//! bytes. One instruction multiplies 16 levels and adds neighbours. What the words are: `fixed.rs`.

use super::avx2_fixed::WORDS;
use super::avx2_linear::{Rows, STEP_BYTES, last_half, linear, load, scale_of, sum_of_lanes};
use super::fixed::{LEVEL_WORDS, UNIT_SIZE, WordStep};
use super::{FETCH_DISTANCE, PREPARED_MULTIPLE, Strip, fetch_ahead};
use std::arch::x86_64::*;

linear!(linear, WordStep, PREPARED_MULTIPLE, times_words);

impl<const R: usize> Rows<'_, R> {
    /// Each row's product with each of `M` tokens: `out[row * stride + token]`.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn times_words<const M: usize>(&self, x: &[WordStep], steps: usize, stride: usize, out: &mut [f32]) {
        let levels = Levels::new();
        let x: [&[WordStep]; M] = std::array::from_fn(|m| &x[m * steps..][..steps]);
        let shift = self.block_size.trailing_zeros() - 5;
        let mut sums = [[_mm256_setzero_ps(); M]; R];
        let lines: [&[[u8; 2 * STEP_BYTES]]; R] = self.codes.map(|codes| codes.as_chunks().0);
        for step in 0..lines[0].len() {
            // In the order of memory, see `fetch_ahead`.
            for r in 0..R {
                let place = self.codes[0].as_ptr().wrapping_add((step * R + r) * 2 * STEP_BYTES);
                fetch_ahead(place, FETCH_DISTANCE);
            }
            for r in 0..R {
                let halves = lines[r][step].as_chunks::<STEP_BYTES>().0;
                for half in 0..2 {
                    let scale = scale_of(self.absmax[r], 2 * step + half, shift);
                    add_products(levels, load(&halves[half]), scale, &x, (step, half), &mut sums[r]);
                }
            }
        }
        // What is left of rows that are not whole steps.
        let (step, rest) = (lines[0].len(), self.codes[0].len() % (2 * STEP_BYTES));
        for r in 0..R {
            let (whole, part) = self.codes[r][self.codes[r].len() - rest..].as_chunks();
            for codes in whole {
                let scale = scale_of(self.absmax[r], 2 * step, shift);
                add_products(levels, load(codes), scale, &x, (step, 0), &mut sums[r]);
            }
            if let [half] = part.as_chunks().0 {
                let (codes, scale) = last_half(half, self.absmax[r]);
                add_products(levels, codes, scale, &x, (step, whole.len()), &mut sums[r]);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (m, &sum) in sums.iter().enumerate() {
                out[r * stride + m] = sum_of_lanes(sum);
            }
        }
    }
}

/// Tables of a level's lower and upper byte, once for either half of a vector.
#[derive(Clone, Copy)]
struct Levels([__m256i; 2]);

impl Levels {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        Self([0, 1].map(|byte| {
            // SAFETY: the array holds the 16 bytes that are read.
            _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(LEVEL_WORDS[byte].as_ptr().cast()) })
        }))
    }

    /// The levels of 32 codes, one in each byte: of bytes 0..8 of both halves, then of bytes 8..16.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up(self, codes: __m256i) -> [__m256i; 2] {
        let [low, high] = self.0.map(|table| _mm256_shuffle_epi8(table, codes));
        [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]
    }
}

/// Add the products of 64 weights, half `half` of step `step`, to the sums.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_products<const M: usize>(
    levels: Levels,
    codes: __m256i,
    scale: __m256,
    x: &[&[WordStep]; M],
    (step, half): (usize, usize),
    sums: &mut [__m256; M],
) {
    let nibble = _mm256_set1_epi8(15);
    let even = levels.look_up(_mm256_and_si256(_mm256_srli_epi16::<4>(codes), nibble));
    let odd = levels.look_up(_mm256_and_si256(codes, nibble));
    for m in 0..M {
        let x = &x[m][step];
        let words = x.words.as_chunks::<UNIT_SIZE>().0[half].as_chunks::<WORDS>().0;
        let first = add(multiply(even[0], &words[0]), multiply(even[1], &words[1]));
        let second = add(multiply(odd[0], &words[2]), multiply(odd[1], &words[3]));
        let total = _mm256_cvtepi32_ps(add(first, second));
        // SAFETY: the array holds the 8 floats that are read.
        let unit = unsafe { _mm256_loadu_ps(x.unit[half].as_ptr()) };
        sums[m] = _mm256_fmadd_ps(_mm256_mul_ps(total, unit), scale, sums[m]);
    }
}

/// Sums of the products of neighbours.
#[inline]
#[target_feature(enable = "avx2")]
fn multiply(levels: __m256i, words: &[i16; WORDS]) -> __m256i {
    // SAFETY: the array holds the 16 words that are read.
    _mm256_madd_epi16(levels, unsafe { _mm256_loadu_si256(words.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx2")]
fn add(a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi32(a, b)
}
