//! AVX-512 (F, BW, VL, DQ): quantize, dequantize and conversions. Products: `avx512_linear.rs`.
//!
//! All functions here are reached through [`KERNELS`] alone, and [`detect`] hands that table out
//! only where the CPU has the features: that is the argument of every `unsafe` call below.

use super::{
    Bf16Kernels, ByteStep, FewRowsBf16, FewRowsFixed, Interleave, Kernels, PairPanels, PairStep, PanelKernels,
};
use super::{
    avx2_fixed, avx512_absmax, avx512_bf16_linear, avx512_bytes, avx512_bytes_linear, avx512_decode,
    avx512_gemm, avx512_linear, avx512_pairs_gemm, avx512_pairs_linear, crossover, gated, portable, softmax,
};
use crate::codebook::{BOUNDARIES, LEVELS};
use crate::quantize::SMALLEST_ABSMAX;
use half::{bf16, f16};
use std::arch::x86_64::*;

static KERNELS: Kernels = Kernels {
    name: "avx512",
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
    // SAFETY: as above.
    decode_absmax: |nested, first, out| unsafe { avx512_absmax::gather(nested, first, out) },
    // SAFETY: as above.
    matrix_vector: |matrix, x, out| unsafe { avx512_linear::matrix_vector(matrix, x, out) },
    prepare_f32: avx512_linear::prepare_f32,
    // SAFETY: as above.
    linear_f32: |x, strip, out| unsafe { avx512_linear::linear_f32(x, strip, out) },
    panels_f32: PanelKernels {
        // SAFETY: as above.
        multiply: |block, sums| unsafe { avx512_gemm::multiply_f32(block, sums) },
        decode: Some((
            // SAFETY: as above.
            |run, row, panel| unsafe { avx512_decode::left_f32(run, row, panel) },
            // SAFETY: as above.
            |runs, word, steps, panels| unsafe { avx512_decode::right_f32(runs, word, steps, panels) },
        )),
    },
    panels_pairs: None,
    // SAFETY: as above.
    transpose: |tile| unsafe { avx512_gemm::transpose(tile) },
    // SAFETY: as above.
    finish_f32: |sums, transpose, bias, out| unsafe { avx512_gemm::finish_f32(sums, transpose, bias, out) },
    // SAFETY: as above.
    finish_bf16: |sums, transpose, bias, out| unsafe { avx512_gemm::finish_bf16(sums, transpose, bias, out) },
    few_rows: crossover::AVX512,
    few_rows_bytes: None,
    few_rows_words: None,
    few_rows_pairs: None,
    bf16: None,
};

pub(super) const PANELS_BF16: PanelKernels = PanelKernels {
    // SAFETY: as above, with avx512bf16.
    multiply: |block, sums| unsafe { avx512_gemm::multiply_bf16(block, sums) },
    decode: Some((
        // SAFETY: as above, with avx512bf16.
        |run, row, panel| unsafe { avx512_decode::left_bf16(run, row, panel) },
        // SAFETY: as above, with avx512bf16.
        |runs, word, steps, panels| unsafe { avx512_decode::right_bf16(runs, word, steps, panels) },
    )),
};

// SAFETY: as above.
pub(super) const INTERLEAVE: Interleave = |even, odd, out| unsafe { avx512_gemm::interleave(even, odd, out) };

/// Few rows in fixed point, where there are products and permutes of bytes.
pub(super) const FEW_ROWS_BYTES: FewRowsFixed<ByteStep> = FewRowsFixed {
    most: avx512_bytes_linear::MOST_TOKENS,
    // SAFETY: as above, with avx512vnni and avx512vbmi.
    prepare: |x, tolerance, out| unsafe { avx512_bytes::prepare(x, tolerance, out) },
    // SAFETY: as above, with avx512vnni and avx512vbmi.
    linear: |x, strip, out| unsafe { avx512_bytes_linear::linear(x, strip, out) },
};

/// More rows, where words are multiplied and added too.
const FEW_ROWS_PAIRS: FewRowsFixed<PairStep> = FewRowsFixed {
    most: usize::MAX,
    // SAFETY: as above, and AVX2 is part of AVX-512.
    prepare: |x, tolerance, out| unsafe { avx2_fixed::prepare_pairs(x, tolerance, out) },
    // SAFETY: as above, with avx512vnni and avx512vbmi.
    linear: |x, strip, out| unsafe { avx512_pairs_linear::linear(x, strip, out) },
};

/// Many rows, where words are multiplied and added.
const PANELS_PAIRS: PairPanels = PairPanels {
    prepare: FEW_ROWS_PAIRS.prepare,
    // SAFETY: as above, with avx512vnni.
    multiply: |block, sums| unsafe { avx512_pairs_gemm::multiply(block, sums) },
    // SAFETY: as above.
    decode_left: |codes, row, panel| unsafe { avx512_pairs_gemm::left(codes, row, panel) },
    // SAFETY: as above.
    decode_right: |runs, word, tiles, panels| unsafe { avx512_pairs_gemm::right(runs, word, tiles, panels) },
    // SAFETY: as above, and AVX2 is part of AVX-512.
    factor_left: |values, row, steps, panel| unsafe { avx2_fixed::factor_left(values, row, steps, panel) },
    // SAFETY: as above, and AVX2 is part of AVX-512.
    factor_right: |values, width, steps, panels| unsafe {
        avx2_fixed::factor_right(values, width, steps, panels);
    },
};

/// [`KERNELS`] with products of bytes and words.
static KERNELS_WITH_VNNI: Kernels = Kernels {
    name: "avx512_vnni",
    // SAFETY: as above, with avx512vbmi.
    decode_absmax: |nested, first, out| unsafe { avx512_absmax::permute(nested, first, out) },
    few_rows: crossover::AVX512_VNNI,
    few_rows_bytes: Some(FEW_ROWS_BYTES),
    few_rows_pairs: Some(FEW_ROWS_PAIRS),
    panels_pairs: Some(PANELS_PAIRS),
    ..KERNELS
};

/// [`KERNELS`] with products of bf16 as such.
pub(super) static KERNELS_WITH_BF16: Kernels = Kernels {
    name: "avx512_bf16",
    bf16: Some(Bf16Kernels {
        panels: PANELS_BF16,
        interleave: INTERLEAVE,
        few_rows: Some(FewRowsBf16 {
            fewest: 1,
            // SAFETY: as above, with avx512bf16.
            prepare: |x, columns, out| unsafe { avx512_bf16_linear::prepare(x, columns, out) },
            // SAFETY: as above, with avx512bf16.
            linear: |x, strip, out| unsafe { avx512_bf16_linear::linear(x, strip, out) },
        }),
    }),
    // SAFETY: as above, with avx512vbmi.
    decode_absmax: |nested, first, out| unsafe { avx512_absmax::permute(nested, first, out) },
    few_rows: crossover::AVX512_BF16,
    ..KERNELS
};

/// The table, if this CPU has AVX-512 as server and desktop CPUs since 2017 have it.
pub(super) fn detect() -> Option<&'static Kernels> {
    let found = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("fma");
    found.then_some(&KERNELS)
}

/// The table with products of bytes, if the CPU has them too.
pub(super) fn detect_vnni() -> Option<&'static Kernels> {
    detect()?;
    let found = is_x86_feature_detected!("avx512vnni") && is_x86_feature_detected!("avx512vbmi");
    found.then_some(&KERNELS_WITH_VNNI)
}

/// The table with products of bf16, if the CPU has them too. (Of the CPUs that do, only Intel's Cooper
/// Lake lacks permutes of bytes; it takes the path without both.)
pub(super) fn detect_bf16() -> Option<&'static Kernels> {
    detect()?;
    let found = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vbmi");
    found.then_some(&KERNELS_WITH_BF16)
}

/// Whether a dot product of 32 bf16 takes as long as four of 16 f32 do. On Intel's CPUs it does
/// (Sapphire Rapids: 102 GFLOP/s a core against 175), so widening to f32 is faster there; AMD's
/// compute it at twice the rate of f32.
pub(super) fn bf16_is_slow() -> bool {
    let leaf = __cpuid(0);
    // "GenuineIntel", in the order in which CPUID spreads it over registers.
    [leaf.ebx, leaf.edx, leaf.ecx] == [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn widen_f16(values: &[f16], out: &mut [f32]) {
    let (values, values_tail) = values.as_chunks::<16>();
    let (out, out_tail) = out.as_chunks_mut::<16>();
    for (values, out) in values.iter().zip(out) {
        // SAFETY: both arrays hold exactly the 16 values that are read and written.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast())));
        };
    }
    (portable::KERNELS.widen_f16)(values_tail, out_tail);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn widen_bf16(values: &[bf16], out: &mut [f32]) {
    // A shift per value: the compiler vectorizes this loop for the features of this function.
    for (value, out) in values.iter().zip(out) {
        *out = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn narrow_f16(values: &[f32], out: &mut [f16]) {
    let (values, values_tail) = values.as_chunks::<16>();
    let (out, out_tail) = out.as_chunks_mut::<16>();
    for (values, out) in values.iter().zip(out) {
        // SAFETY: both arrays hold exactly the 16 values that are read and written.
        unsafe {
            let narrow = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
                _mm512_loadu_ps(values.as_ptr()),
            );
            _mm256_storeu_si256(out.as_mut_ptr().cast(), narrow);
        };
    }
    (portable::KERNELS.narrow_f16)(values_tail, out_tail);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn narrow_bf16(values: &[f32], out: &mut [bf16]) {
    softmax::narrow_bf16(values, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn largest(values: &[f32]) -> f32 {
    softmax::largest(values)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn exponentials(values: &mut [f32], shift: f32, scale: f32) -> f64 {
    softmax::exponentials(values, shift, scale)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn gated(gate: &mut [f32], up: &[f32]) {
    gated::gated(gate, up);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn gated_gradients(gate: &mut [f32], up: &mut [f32], grad: &mut [f32]) {
    gated::gated_gradients(gate, up, grad);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn quantize_blocks(weights: &[f32], block_size: usize, codes: &mut [u8], absmax: &mut [f32]) {
    let search = Search::new();
    let blocks = weights.chunks_exact(block_size).zip(codes.chunks_exact_mut(block_size / 2));
    for ((block, codes), absmax) in blocks.zip(absmax) {
        // Block sizes are multiples of 32, so no tail is left.
        let (block, _) = block.as_chunks::<16>();
        let (codes, _) = codes.as_chunks_mut::<8>();
        let mut largest = _mm512_setzero_si512();
        for weights in block {
            // SAFETY: the array holds the 16 floats that are read.
            let bits = unsafe { _mm512_loadu_si512(weights.as_ptr().cast()) };
            // Magnitudes order like their bit patterns, NaN and infinity above all numbers.
            largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fff_ffff)));
        }
        *absmax = f32::from_bits(_mm512_reduce_max_epi32(largest) as u32);
        let inverse = _mm512_set1_ps(1.0 / absmax.max(SMALLEST_ABSMAX));
        for (weights, codes) in block.iter().zip(codes) {
            // SAFETY: the array holds the 16 floats that are read.
            let scaled = _mm512_mul_ps(unsafe { _mm512_loadu_ps(weights.as_ptr()) }, inverse);
            let code = search.codes(scaled);
            // Each 64-bit lane holds an even weight's code below an odd one's: even << 4 | odd.
            let pairs = _mm512_or_si512(_mm512_slli_epi64::<4>(code), _mm512_srli_epi64::<32>(code));
            // SAFETY: eight bytes are written to an array of eight.
            unsafe { _mm_storel_epi64(codes.as_mut_ptr().cast(), _mm512_cvtepi64_epi8(pairs)) };
        }
    }
}

/// Binary search over the 15 boundaries, 16 weights at a time.
struct Search {
    /// `at[s][i]` is the boundary to compare with after the steps before left code `i`.
    at: [__m512; 3],
}

impl Search {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn new() -> Self {
        let table = |offset: usize| {
            let at: [f32; 16] =
                std::array::from_fn(|i| BOUNDARIES.get(i + offset).copied().unwrap_or(f32::MAX));
            // SAFETY: the array holds the 16 floats that are read.
            unsafe { _mm512_loadu_ps(at.as_ptr()) }
        };
        Self { at: [table(3), table(1), table(0)] }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn codes(&self, scaled: __m512) -> __m512i {
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(scaled, _mm512_set1_ps(BOUNDARIES[7]));
        let mut code = _mm512_maskz_set1_epi32(above, 8);
        for (at, step) in self.at.iter().zip([4, 2, 1]) {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(scaled, _mm512_permutexvar_ps(code, *at));
            code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(step));
        }
        code
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn dequantize_f32(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [f32]) {
    // SAFETY: the array holds the 16 floats that are read.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    let blocks = codes.chunks_exact(block_size / 2).zip(out.chunks_exact_mut(block_size));
    for ((codes, out), &absmax) in blocks.zip(absmax) {
        let levels = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
        for (codes, out) in codes.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            // SAFETY: the array holds the 16 bytes that are read.
            let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
            let even = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), levels);
            // The permute looks at the low four bits of an index only.
            let odd = _mm512_permutexvar_ps(bytes, levels);
            // SAFETY: two vectors of 16 floats are written to an array of 32.
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutex2var_ps(even, first, odd));
                _mm512_storeu_ps(out.as_mut_ptr().add(16), _mm512_permutex2var_ps(even, second, odd));
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn dequantize_bf16(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [bf16]) {
    // SAFETY: the array holds the 16 floats that are read.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    let blocks = codes.chunks_exact(block_size / 2).zip(out.chunks_exact_mut(block_size));
    for ((codes, out), absmax) in blocks.zip(absmax) {
        if !absmax.is_finite() {
            // NaN needs care when it is narrowed; such a block is damaged anyway, so speed is no concern.
            portable::dequantize_blocks(codes, std::slice::from_ref(absmax), block_size, out);
            continue;
        }
        // Round to nearest, ties to even. Not VCVTNEPS2BF16: it flushes subnormal numbers to zero.
        let bits = _mm512_castps_si512(_mm512_mul_ps(levels, _mm512_set1_ps(*absmax)));
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
        let table = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
        // SAFETY: bf16 is a transparent u16, and the slice covers the whole block.
        let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u16>(), out.len()) };
        look_up_16_bit(codes, table, out);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn dequantize_f16(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [f16]) {
    // SAFETY: the array holds the 16 floats that are read.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    let blocks = codes.chunks_exact(block_size / 2).zip(out.chunks_exact_mut(block_size));
    for ((codes, out), absmax) in blocks.zip(absmax) {
        if !absmax.is_finite() {
            portable::dequantize_blocks(codes, std::slice::from_ref(absmax), block_size, out);
            continue;
        }
        let scaled = _mm512_mul_ps(levels, _mm512_set1_ps(*absmax));
        let table = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(scaled);
        // SAFETY: f16 is a transparent u16, and the slice covers the whole block.
        let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u16>(), out.len()) };
        look_up_16_bit(codes, table, out);
    }
}

/// Write `table[code]` for each code; 32 weights per step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn look_up_16_bit(codes: &[u8], table: __m256i, out: &mut [u16]) {
    // Twice the table: the permute looks at five bits of an index, and the fifth may be anything.
    let table = _mm512_broadcast_i64x4(table);
    for (codes, out) in codes.as_chunks::<16>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        // SAFETY: the array holds the 16 bytes that are read.
        let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
        // Each 32-bit lane: high nibble in its lower half, whole byte in its upper half.
        let indices = _mm512_or_si512(_mm512_srli_epi32::<4>(bytes), _mm512_slli_epi32::<16>(bytes));
        // SAFETY: 32 values of 16 bits are written to an array of 32.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi16(indices, table)) };
    }
}
