//! AVX2, FMA and F16C, what nearly every x86 CPU since 2013 has: quantize and conversions. Decoding:
//! `avx2_decode.rs`. Products: `avx2_linear.rs`, `avx2_words_linear.rs`, `avx2_gemm.rs`.
//!
//! All functions here are reached through [`KERNELS`] alone, and [`detect`] hands that table out
//! only where the CPU has the features: that is the argument of every `unsafe` call below.

use super::{FewRowsFixed, Kernels, PairPanels, PanelKernels, crossover, gated, portable, softmax};
use super::{avx2_decode, avx2_fixed, avx2_gemm, avx2_linear, avx2_pairs_gemm, avx2_words_linear};
use crate::codebook::BOUNDARIES;
use crate::packed_matrix::NestedScales;
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
        avx2_decode::dequantize_f32(codes, absmax, block_size, out);
    },
    // SAFETY: as above.
    dequantize_f16: |codes, absmax, block_size, out| unsafe {
        avx2_decode::dequantize_f16(codes, absmax, block_size, out);
    },
    // SAFETY: as above.
    dequantize_bf16: |codes, absmax, block_size, out| unsafe {
        avx2_decode::dequantize_bf16(codes, absmax, block_size, out);
    },
    // SAFETY: as above.
    decode_absmax: |nested, first, out| unsafe { decode_absmax(nested, first, out) },
    // SAFETY: as above.
    matrix_vector: |matrix, x, out| unsafe { avx2_linear::matrix_vector(matrix, x, out) },
    prepare_f32: avx2_linear::prepare_f32,
    // SAFETY: as above.
    linear_f32: |x, strip, out| unsafe { avx2_linear::linear_f32(x, strip, out) },
    panels_f32: PanelKernels {
        // SAFETY: as above.
        multiply: |block, sums| unsafe { avx2_gemm::multiply_f32(block, sums) },
        decode: Some((
            // SAFETY: as above.
            |run, row, tiles| unsafe { avx2_decode::left_f32(run, row, tiles) },
            // SAFETY: as above.
            |runs, word, steps, tiles| unsafe { avx2_decode::right_f32(runs, word, steps, tiles) },
        )),
    },
    panels_pairs: Some(PANELS_PAIRS),
    // SAFETY: as above.
    transpose: |tile| unsafe { avx2_gemm::transpose(tile) },
    // SAFETY: as above.
    finish_f32: |sums, transpose, bias, out| unsafe { avx2_gemm::finish_f32(sums, transpose, bias, out) },
    // SAFETY: as above.
    finish_bf16: |sums, transpose, bias, out| unsafe { avx2_gemm::finish_bf16(sums, transpose, bias, out) },
    few_rows: crossover::AVX2,
    few_rows_bytes: None,
    few_rows_pairs: None,
    few_rows_words: Some(FewRowsFixed {
        most: usize::MAX,
        // SAFETY: as above.
        prepare: |x, tolerance, out| unsafe { avx2_fixed::prepare(x, tolerance, out) },
        // SAFETY: as above.
        linear: |x, strip, out| unsafe { avx2_words_linear::linear(x, strip, out) },
    }),
    bf16: None,
};

/// Many rows of 16-bit activations in fixed point.
const PANELS_PAIRS: PairPanels = PairPanels {
    // SAFETY: as above.
    prepare: |x, tolerance, out| unsafe { avx2_fixed::prepare_pairs(x, tolerance, out) },
    // SAFETY: as above.
    multiply: |block, sums| unsafe { avx2_pairs_gemm::multiply(block, sums) },
    // SAFETY: as above.
    decode_left: |codes, row, panel| unsafe { avx2_pairs_gemm::left(codes, row, panel) },
    // SAFETY: as above.
    decode_right: |runs, word, tiles, panels| unsafe {
        avx2_pairs_gemm::right(runs, word, tiles, panels);
    },
    // SAFETY: as above.
    factor_left: |values, row, steps, panel| unsafe {
        avx2_fixed::factor_left(values, row, steps, panel);
    },
    // SAFETY: as above.
    factor_right: |values, width, steps, panels| unsafe {
        avx2_fixed::factor_right(values, width, steps, panels);
    },
};

/// [`KERNELS`] with sums of products of words in one instruction.
static KERNELS_WITH_VNNI: Kernels = Kernels {
    name: "avx2_vnni",
    few_rows: crossover::AVX2_VNNI,
    panels_pairs: Some(PairPanels {
        // SAFETY: as above, with avxvnni.
        multiply: |block, sums| unsafe { avx2_pairs_gemm::multiply_vnni(block, sums) },
        ..PANELS_PAIRS
    }),
    ..KERNELS
};

/// The table, if this CPU has the features.
pub(super) fn detect() -> Option<&'static Kernels> {
    let found = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    found.then_some(&KERNELS)
}

/// The table with sums of products of words, if the CPU has them too.
pub(super) fn detect_vnni() -> Option<&'static Kernels> {
    detect()?;
    is_x86_feature_detected!("avxvnni").then_some(&KERNELS_WITH_VNNI)
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

/// Eight look-ups beside each other; a gather would be no faster, and on some CPUs far slower.
#[target_feature(enable = "avx2")]
fn decode_absmax(nested: &NestedScales<'_>, first: usize, out: &mut [f32]) {
    let (map, offset) = (nested.map, _mm256_set1_ps(nested.offset));
    nested.for_each_group(first, out, |codes, absmax, out| {
        let (eights, codes_tail) = codes.as_chunks::<8>();
        let (out, out_tail) = out.as_chunks_mut::<8>();
        for (codes, out) in eights.iter().zip(out) {
            let [a, b, c, d, e, f, g, h] = codes.map(|code| map[usize::from(code)]);
            let values = _mm256_setr_ps(a, b, c, d, e, f, g, h);
            // Two roundings, as bitsandbytes has them: a fused multiply-add would have one.
            let sum = _mm256_add_ps(_mm256_mul_ps(values, _mm256_set1_ps(absmax)), offset);
            // SAFETY: the array holds the 8 floats that are written.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), sum) };
        }
        for (code, out) in codes_tail.iter().zip(out_tail) {
            *out = map[usize::from(*code)] * absmax + nested.offset;
        }
    });
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
