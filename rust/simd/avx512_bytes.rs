//! AVX-512 with byte products: activations brought into fixed point (`fixed.rs`).

use super::PREPARED_MULTIPLE;
use super::fixed::{BYTE_SCALE, ByteStep, EXPONENTS, LARGEST_BYTES, LOW_ERROR, Loss, UNIT_SIZE, ZERO_LOW};
use super::fixed::{prepare_steps, unit_exponent};
use std::arch::x86_64::*;

/// See [`super::FewRowsFixed`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
pub(super) fn prepare(x: &[f32], tolerance: f32, out: &mut [ByteStep]) -> bool {
    prepare_steps(x, out, |step, out| prepare_step(step, out)).is_within(tolerance)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,fma")]
fn prepare_step(step: &[f32; PREPARED_MULTIPLE], out: &mut ByteStep) -> Loss {
    let mut loss = Loss::default();
    let mut units = [0.0; 2];
    for (half, values) in step.as_chunks::<UNIT_SIZE>().0.iter().enumerate() {
        let values: [__m512; 4] = std::array::from_fn(|i| {
            // SAFETY: i < 4, so 16 floats from 16 * i lie in the array of 64.
            unsafe { _mm512_loadu_ps(values.as_ptr().add(16 * i)) }
        });
        let sizes = values.map(|value| _mm512_abs_ps(value));
        let pairs = [_mm512_max_ps(sizes[0], sizes[1]), _mm512_max_ps(sizes[2], sizes[3])];
        let largest = _mm512_reduce_max_ps(_mm512_max_ps(pairs[0], pairs[1]));
        let exponent = unit_exponent::<LARGEST_BYTES>(largest.to_bits());
        let (unit, inverse) = (f32::from_bits(exponent << 23), f32::from_bits((254 - exponent) << 23));
        let scaled = values.map(|value| _mm512_mul_ps(value, _mm512_set1_ps(inverse)));
        let integers = scaled.map(|value| _mm512_cvtps_epi32(value));
        let mut error = _mm512_setzero_ps();
        for (value, integer) in scaled.iter().zip(integers) {
            let lost = _mm512_sub_ps(*value, _mm512_cvtepi32_ps(integer));
            error = _mm512_fmadd_ps(lost, lost, error);
            let low = _mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(integer));
            let missed = _mm512_mul_ps(_mm512_cvtepi32_ps(low), _mm512_set1_ps(LOW_ERROR));
            error = _mm512_fmadd_ps(missed, missed, error);
        }
        // Of four values the larger one of the smaller pair: about as large as they are, unless both pairs
        // hold one that is too large.
        let typical = _mm512_min_ps(pairs[0], pairs[1]);
        // The same of two such groups: values 16, 32 or 48 apart are in one.
        let typical = _mm512_min_ps(typical, _mm512_shuffle_f32x4::<0b00_11_10_01>(typical, typical));
        let typical = _mm512_mul_ps(typical, _mm512_set1_ps(inverse));
        let square = f64::from(unit).powi(2);
        loss += Loss {
            error: square * f64::from(_mm512_reduce_add_ps(error)),
            size: square * 4.0 * f64::from(_mm512_reduce_add_ps(_mm512_mul_ps(typical, typical))),
        };
        if exponent > *EXPONENTS.end() {
            // NaN, unlike infinity, is refused however large the row is.
            loss.error = f64::NAN;
        }
        units[half] = unit;
        store_bytes(&integers, half, out);
    }
    finish(units, out);
    loss
}

/// The bytes of 64 integers: the high byte of q + 128, and its low byte less 128.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn store_bytes(integers: &[__m512i; 4], half: usize, out: &mut ByteStep) {
    /// From 32 integers: high bytes of the odd and of the even ones, then the low bytes.
    static PICK: [u8; 64] = {
        let mut pick = [0; 64];
        let mut i = 0;
        while i < 64 {
            let (odd, high) = (i / 16 % 2 == 0, i < 32);
            pick[i] = (4 * (2 * (i % 16) + odd as usize) + high as usize) as u8;
            i += 1;
        }
        pick
    };
    // SAFETY: the array holds the 64 bytes that are read.
    let pick = unsafe { _mm512_loadu_si512(PICK.as_ptr().cast()) };
    let shifted = integers.map(|integer| _mm512_add_epi32(integer, _mm512_set1_epi32(128)));
    let low = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi8(-128));
    for (i, pair) in shifted.as_chunks::<2>().0.iter().enumerate() {
        let bytes = _mm512_xor_si512(_mm512_permutex2var_epi8(pair[0], pick, pair[1]), low);
        let at = 32 * half + 16 * i;
        // SAFETY: at <= 48, so 16 bytes from there lie in each array of 64.
        unsafe {
            _mm_storeu_si128(out.high[0].as_mut_ptr().add(at).cast(), _mm512_extracti32x4_epi32::<0>(bytes));
            _mm_storeu_si128(out.high[1].as_mut_ptr().add(at).cast(), _mm512_extracti32x4_epi32::<1>(bytes));
            _mm_storeu_si128(out.low[0].as_mut_ptr().add(at).cast(), _mm512_extracti32x4_epi32::<2>(bytes));
            _mm_storeu_si128(out.low[1].as_mut_ptr().add(at).cast(), _mm512_extracti32x4_epi32::<3>(bytes));
        }
    }
}

/// Units and offsets of a step whose bytes are there.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn finish(units: [f32; 2], out: &mut ByteStep) {
    let units = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(units[0]), _mm512_set1_ps(units[1]));
    let units = _mm512_mul_ps(units, _mm512_set1_ps(1.0 / BYTE_SCALE));
    let sum = |bytes: &[[i8; 64]; 2]| {
        let ones = _mm512_set1_epi8(1);
        // SAFETY: each array holds the 64 bytes that are read.
        let [odd, even] = [0, 1].map(|i| unsafe { _mm512_loadu_si512(bytes[i].as_ptr().cast()) });
        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, odd), ones, even)
    };
    let (high, low) = (_mm512_cvtepi32_ps(sum(&out.high)), _mm512_cvtepi32_ps(sum(&out.low)));
    // v low - S (256 high + low)
    let offset = _mm512_mul_ps(low, _mm512_set1_ps(ZERO_LOW - BYTE_SCALE));
    let offset = _mm512_fmadd_ps(high, _mm512_set1_ps(-256.0 * BYTE_SCALE), offset);
    // SAFETY: each array holds the 16 floats that are written.
    unsafe {
        _mm512_storeu_ps(out.unit.as_mut_ptr(), _mm512_mul_ps(units, _mm512_set1_ps(256.0)));
        _mm512_storeu_ps(out.offset.as_mut_ptr(), _mm512_mul_ps(units, offset));
    }
}
