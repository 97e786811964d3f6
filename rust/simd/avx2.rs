//! AVX2, FMA and F16C: what nearly every x86 CPU since 2013 has.
//!
//! All functions here are reached through [`KERNELS`] alone, and [`detect`] hands that table out
//! only where the CPU has the features: that is the argument of every `unsafe` call below.

use super::{Kernels, PREPARED_MULTIPLE, PanelKernels, Strip};
use super::{avx2_gemm, crossover, fetch_ahead, gated, portable, softmax};
use crate::codebook::{BOUNDARIES, LEVELS};
use crate::quantize::SMALLEST_ABSMAX;
use half::{bf16, f16};
use std::arch::x86_64::*;

static KERNELS: Kernels = Kernels {
    name: "avx2",
    // SAFETY: (each closure) the table exists for callers only after `detect` found the features.
    widen_f16: |values, out| unsafe { widen_f16(values, out) },
    // SAFETY: as above.
    widen_bf16: |values, out| unsafe { widen_bf16(values, out) },
    // SAFETY: as above.
    narrow_f16: |values, out| unsafe { narrow_f16(values, out) },
    // SAFETY: as above.
    narrow_bf16: |values, out| unsafe { narrow_bf16(values, out) },
    // SAFETY: as above.
    largest: |values| unsafe { largest(values) },
    // SAFETY: as above.
    exponentials: |values, shift, scale| unsafe { exponentials(values, shift, scale) },
    // SAFETY: as above.
    gated: |gate, up| unsafe { gated(gate, up) },
    // SAFETY: as above.
    gated_gradients: |gate, up, grad| unsafe { gated_gradients(gate, up, grad) },
    // SAFETY: as above.
    quantize_blocks: |w, block_size, codes, absmax| unsafe { quantize_blocks(w, block_size, codes, absmax) },
    // SAFETY: as above.
    dequantize_f32: |codes, absmax, block_size, out| unsafe {
        dequantize_f32(codes, absmax, block_size, out);
    },
    // SAFETY: as above.
    dequantize_f16: |codes, absmax, block_size, out| unsafe {
        dequantize_f16(codes, absmax, block_size, out);
    },
    // SAFETY: as above.
    dequantize_bf16: |codes, absmax, block_size, out| unsafe {
        dequantize_bf16(codes, absmax, block_size, out);
    },
    decode_absmax: portable::decode_absmax,
    // SAFETY: as above.
    matrix_vector: |matrix, x, out| unsafe { matrix_vector(matrix, x, out) },
    prepare_f32: portable::KERNELS.prepare_f32,
    // SAFETY: as above.
    linear_f32: |x, strip, out| unsafe { linear_f32(x, strip, out) },
    panels_f32: PanelKernels {
        // SAFETY: as above.
        multiply: |block, sums| unsafe { avx2_gemm::multiply_f32(block, sums) },
        decode: None,
    },
    transpose: portable::KERNELS.transpose,
    finish_f32: portable::KERNELS.finish_f32,
    finish_bf16: portable::KERNELS.finish_bf16,
    few_rows: crossover::AVX2,
    bf16: None,
};

/// The table, if this CPU has the features.
pub(super) fn detect() -> Option<&'static Kernels> {
    let found = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    found.then_some(&KERNELS)
}

#[target_feature(enable = "avx2,f16c")]
fn widen_f16(values: &[f16], out: &mut [f32]) {
    let (values, values_tail) = values.as_chunks::<8>();
    let (out, out_tail) = out.as_chunks_mut::<8>();
    for (values, out) in values.iter().zip(out) {
        // SAFETY: both arrays hold exactly the 8 values that are read and written.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(values.as_ptr().cast())));
        };
    }
    (portable::KERNELS.widen_f16)(values_tail, out_tail);
}

#[target_feature(enable = "avx2")]
fn widen_bf16(values: &[bf16], out: &mut [f32]) {
    // A shift per value: the compiler vectorizes this loop for the features of this function.
    for (value, out) in values.iter().zip(out) {
        *out = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
}

#[target_feature(enable = "avx2,f16c")]
fn narrow_f16(values: &[f32], out: &mut [f16]) {
    let (values, values_tail) = values.as_chunks::<8>();
    let (out, out_tail) = out.as_chunks_mut::<8>();
    for (values, out) in values.iter().zip(out) {
        // SAFETY: both arrays hold exactly the 8 values that are read and written.
        unsafe {
            let narrow = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(values.as_ptr()));
            _mm_storeu_si128(out.as_mut_ptr().cast(), narrow);
        };
    }
    (portable::KERNELS.narrow_f16)(values_tail, out_tail);
}

#[target_feature(enable = "avx2")]
fn narrow_bf16(values: &[f32], out: &mut [bf16]) {
    softmax::narrow_bf16(values, out);
}

#[target_feature(enable = "avx2")]
fn largest(values: &[f32]) -> f32 {
    softmax::largest(values)
}

#[target_feature(enable = "avx2")]
fn exponentials(values: &mut [f32], shift: f32, scale: f32) -> f64 {
    softmax::exponentials(values, shift, scale)
}

#[target_feature(enable = "avx2")]
fn gated(gate: &mut [f32], up: &[f32]) {
    gated::gated(gate, up);
}

#[target_feature(enable = "avx2")]
fn gated_gradients(gate: &mut [f32], up: &mut [f32], grad: &mut [f32]) {
    gated::gated_gradients(gate, up, grad);
}

#[target_feature(enable = "avx2")]
fn quantize_blocks(weights: &[f32], block_size: usize, codes: &mut [u8], absmax: &mut [f32]) {
    let blocks = weights.chunks_exact(block_size).zip(codes.chunks_exact_mut(block_size / 2));
    for ((block, codes), absmax) in blocks.zip(absmax) {
        // Magnitudes order like their bit patterns, NaN and infinity above all numbers; the
        // compiler vectorizes this maximum.
        let largest = block.iter().map(|w| (w.to_bits() & 0x7fff_ffff) as i32).max().unwrap_or(0);
        *absmax = f32::from_bits(largest as u32);
        let inverse = _mm256_set1_ps(1.0 / absmax.max(SMALLEST_ABSMAX));
        for (weights, codes) in block.as_chunks::<8>().0.iter().zip(codes.as_chunks_mut::<4>().0) {
            // SAFETY: the array holds the 8 floats that are read.
            let scaled = _mm256_mul_ps(unsafe { _mm256_loadu_ps(weights.as_ptr()) }, inverse);
            let mut code = _mm256_setzero_si256();
            for boundary in BOUNDARIES {
                let above = _mm256_cmp_ps::<_CMP_GT_OQ>(scaled, _mm256_set1_ps(boundary));
                // A true comparison is -1 in every lane.
                code = _mm256_sub_epi32(code, _mm256_castps_si256(above));
            }
            // Each 64-bit lane holds an even weight's code below an odd one's: even << 4 | odd.
            let pairs = _mm256_or_si256(_mm256_slli_epi64::<4>(code), _mm256_srli_epi64::<32>(code));
            let low = _mm256_castsi256_si128(pairs);
            let high = _mm256_extracti128_si256::<1>(pairs);
            codes[0] = _mm_extract_epi8::<0>(low) as u8;
            codes[1] = _mm_extract_epi8::<8>(low) as u8;
            codes[2] = _mm_extract_epi8::<0>(high) as u8;
            codes[3] = _mm_extract_epi8::<8>(high) as u8;
        }
    }
}

/// A table of 16 floats, looked up by the low four bits of each 32-bit lane.
#[derive(Clone, Copy)]
struct Table {
    low: __m256,
    high: __m256,
}

impl Table {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn scaled(absmax: f32) -> Self {
        // SAFETY: eight floats are read from each half of an array of 16.
        let [low, high] = [0, 8].map(|i| unsafe { _mm256_loadu_ps(LEVELS.as_ptr().add(i)) });
        let scale = _mm256_set1_ps(absmax);
        Self { low: _mm256_mul_ps(low, scale), high: _mm256_mul_ps(high, scale) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up(self, index: __m256i) -> __m256 {
        // The permute looks at three bits; the fourth, moved to the sign, chooses the half.
        let low = _mm256_permutevar8x32_ps(self.low, index);
        let high = _mm256_permutevar8x32_ps(self.high, index);
        _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
    }

    /// The 16 weights of eight bytes, in order.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn decode(self, codes: &[u8; 8]) -> [__m256; 2] {
        // SAFETY: the array holds the 8 bytes that are read.
        let bytes = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(codes.as_ptr().cast()) });
        let even = self.look_up(_mm256_srli_epi32::<4>(bytes));
        let odd = self.look_up(bytes);
        let (low, high) = (_mm256_unpacklo_ps(even, odd), _mm256_unpackhi_ps(even, odd));
        [_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high)]
    }
}

#[target_feature(enable = "avx2")]
fn dequantize_f32(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [f32]) {
    let blocks = codes.chunks_exact(block_size / 2).zip(out.chunks_exact_mut(block_size));
    for ((codes, out), &absmax) in blocks.zip(absmax) {
        let table = Table::scaled(absmax);
        for (codes, out) in codes.as_chunks::<8>().0.iter().zip(out.as_chunks_mut::<16>().0) {
            let [first, second] = table.decode(codes);
            // SAFETY: two vectors of 8 floats are written to an array of 16.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), first);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), second);
            }
        }
    }
}

#[target_feature(enable = "avx2")]
fn dequantize_bf16(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [bf16]) {
    let blocks = codes.chunks_exact(block_size / 2).zip(out.chunks_exact_mut(block_size));
    for ((codes, out), &absmax) in blocks.zip(absmax) {
        let table = LEVELS.map(|level| bf16::from_f32(level * absmax).to_bits());
        // SAFETY: bf16 is a transparent u16, and the slice covers the whole block.
        let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u16>(), out.len()) };
        look_up_16_bit(codes, &table, out);
    }
}

#[target_feature(enable = "avx2,f16c")]
fn dequantize_f16(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [f16]) {
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

#[inline]
#[target_feature(enable = "avx2")]
fn sum_of_lanes(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

#[target_feature(enable = "avx2,fma")]
fn matrix_vector(matrix: &[f32], x: &[f32], out: &mut [f32]) {
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

/// One row at a time, its weights decoded in registers and used for up to four tokens.
#[target_feature(enable = "avx2,fma")]
fn linear_f32(x: &[f32], strip: &Strip<'_>, out: &mut [f32]) {
    let prepared = strip.columns.next_multiple_of(PREPARED_MULTIPLE);
    assert!(x.len() == prepared * strip.tokens);
    let rows = strip.codes.chunks_exact(strip.columns / 2).zip(strip.absmax.chunks_exact(strip.blocks()));
    for ((codes, absmax), out) in rows.zip(out.chunks_exact_mut(strip.tokens)) {
        for (x, out) in x.chunks(4 * prepared).zip(out.chunks_mut(4)) {
            match out.len() {
                1 => row_of_products::<1>(x, prepared, codes, absmax, strip.block_size, out),
                2 => row_of_products::<2>(x, prepared, codes, absmax, strip.block_size, out),
                3 => row_of_products::<3>(x, prepared, codes, absmax, strip.block_size, out),
                _ => row_of_products::<4>(x, prepared, codes, absmax, strip.block_size, out),
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn row_of_products<const M: usize>(
    x: &[f32],
    prepared: usize,
    codes: &[u8],
    absmax: &[f32],
    block_size: usize,
    out: &mut [f32],
) {
    let mut sums = [[_mm256_setzero_ps(); 2]; M];
    for (block, (codes, &absmax)) in codes.chunks_exact(block_size / 2).zip(absmax).enumerate() {
        let table = Table::scaled(absmax);
        fetch_ahead(codes.as_ptr());
        for (i, codes) in codes.as_chunks::<8>().0.iter().enumerate() {
            let [first, second] = table.decode(codes);
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = &x[m * prepared + block * block_size + i * 16..][..16];
                // SAFETY: two vectors of 8 floats are read from a slice of 16.
                let [x_first, x_second] = [0, 8].map(|i| unsafe { _mm256_loadu_ps(x.as_ptr().add(i)) });
                sums[0] = _mm256_fmadd_ps(first, x_first, sums[0]);
                sums[1] = _mm256_fmadd_ps(second, x_second, sums[1]);
            }
        }
    }
    for (sums, out) in sums.iter().zip(out) {
        *out = sum_of_lanes(_mm256_add_ps(sums[0], sums[1]));
    }
}
