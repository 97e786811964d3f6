//! AVX-512: the second level of double quantization, decoded.
//!
//! Every block needs one look-up in a map of 256 floats. Gathering them costs two cycles each on AMD's
//! CPUs; where bytes can be permuted (VBMI), the four bytes of a float are looked up apart instead, 64
//! codes at a time, in tables that stay in registers.

use crate::packed_matrix::NestedScales;
use std::arch::x86_64::*;

/// See [`super::Kernels::decode_absmax`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn gather(nested: &NestedScales<'_>, first: usize, out: &mut [f32]) {
    nested.for_each_group(first, out, |codes, absmax, out| gather_group(codes, absmax, nested, out));
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn gather_group(codes: &[u8], absmax: f32, nested: &NestedScales<'_>, out: &mut [f32]) {
    assert_eq!(codes.len(), out.len(), "one absmax per code");
    let (map, offset) = (nested.map, nested.offset);
    let (codes, codes_tail) = codes.as_chunks::<16>();
    let (out, out_tail) = out.as_chunks_mut::<16>();
    for (codes, out) in codes.iter().zip(out) {
        // SAFETY: 16 bytes are read; each is an index into a map of 256; 16 floats are written.
        unsafe {
            let index = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            let value = _mm512_i32gather_ps::<4>(index, map.as_ptr());
            // Two roundings, as bitsandbytes has them: a fused multiply-add would have one.
            let scaled = _mm512_mul_ps(value, _mm512_set1_ps(absmax));
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_add_ps(scaled, _mm512_set1_ps(offset)));
        }
    }
    if !codes_tail.is_empty() {
        let mask = ((1_u32 << codes_tail.len()) - 1) as u16;
        // SAFETY: the masks admit only what the tails hold.
        unsafe {
            let index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes_tail.as_ptr().cast()));
            let value = _mm512_mask_i32gather_ps::<4>(_mm512_setzero_ps(), mask, index, map.as_ptr());
            let scaled = _mm512_mul_ps(value, _mm512_set1_ps(absmax));
            let sum = _mm512_add_ps(scaled, _mm512_set1_ps(offset));
            _mm512_mask_storeu_ps(out_tail.as_mut_ptr(), mask, sum);
        }
    }
}

/// The same by permutes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
pub(super) fn permute(nested: &NestedScales<'_>, first: usize, out: &mut [f32]) {
    // Tables for fewer would cost more than they save.
    if out.len() <= 64 {
        return gather(nested, first, out);
    }
    let planes = Planes::new(nested.map);
    let offset = _mm512_set1_ps(nested.offset);
    nested.for_each_group(first, out, |codes, absmax, out| {
        let absmax = _mm512_set1_ps(absmax);
        let decode = |codes: &[u8; 64], out: &mut [f32; 64]| {
            for (i, value) in planes.look_up(codes).into_iter().enumerate() {
                // Two roundings, as bitsandbytes has them: a fused multiply-add would have one.
                let sum = _mm512_add_ps(_mm512_mul_ps(value, absmax), offset);
                // SAFETY: i < 4, so 16 floats from 16 * i lie in the array of 64.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(16 * i), sum) };
            }
        };
        let (codes, codes_rest) = codes.as_chunks::<64>();
        let (out, out_rest) = out.as_chunks_mut::<64>();
        for (codes, out) in codes.iter().zip(out) {
            decode(codes, out);
        }
        if !codes_rest.is_empty() {
            let (mut padded, mut decoded) = ([0; 64], [0.0; 64]);
            padded[..codes_rest.len()].copy_from_slice(codes_rest);
            decode(&padded, &mut decoded);
            out_rest.copy_from_slice(&decoded[..out_rest.len()]);
        }
    });
}

/// A map of 256 floats, byte by byte: `bytes[p][i]` holds byte p of floats 64 i .. 64 i + 63.
struct Planes {
    bytes: [[__m512i; 4]; 4],
}

impl Planes {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    fn new(map: &[f32; 256]) -> Self {
        let mut bytes = [[_mm512_setzero_si512(); 4]; 4];
        for (p, plane) in bytes.iter_mut().enumerate() {
            let shift = _mm_cvtsi32_si128(8 * p as i32);
            for (plane, floats) in plane.iter_mut().zip(map.as_chunks::<64>().0) {
                let mut low = [0_u8; 64];
                for (low, floats) in low.as_chunks_mut::<16>().0.iter_mut().zip(floats.as_chunks::<16>().0) {
                    // SAFETY: 16 floats are read from an array of 16, 16 bytes written to one of 16.
                    unsafe {
                        let words = _mm512_loadu_si512(floats.as_ptr().cast());
                        let narrow = _mm512_cvtepi32_epi8(_mm512_srl_epi32(words, shift));
                        _mm_storeu_si128(low.as_mut_ptr().cast(), narrow);
                    }
                }
                // SAFETY: the array holds the 64 bytes that are read.
                *plane = unsafe { _mm512_loadu_si512(low.as_ptr().cast()) };
            }
        }
        Self { bytes }
    }

    /// The floats of 64 codes, in order.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    fn look_up(&self, codes: &[u8; 64]) -> [__m512; 4] {
        // Unpacking bytes to floats works within quarters of a vector: it turns groups of four codes
        // from [quarter][vector] to [vector][quarter].
        let quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        // SAFETY: the array holds the 64 bytes that are read.
        let codes = unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) };
        let codes = _mm512_permutexvar_epi32(quarters, codes);
        let upper = _mm512_movepi8_mask(codes);
        let byte = |p: usize| {
            let [a, b, c, d] = self.bytes[p];
            let (low, high) = (_mm512_permutex2var_epi8(a, codes, b), _mm512_permutex2var_epi8(c, codes, d));
            _mm512_mask_blend_epi8(upper, low, high)
        };
        let (b0, b1, b2, b3) = (byte(0), byte(1), byte(2), byte(3));
        let (low, high) = (_mm512_unpacklo_epi8(b0, b1), _mm512_unpackhi_epi8(b0, b1));
        let (low_2, high_2) = (_mm512_unpacklo_epi8(b2, b3), _mm512_unpackhi_epi8(b2, b3));
        [
            _mm512_unpacklo_epi16(low, low_2),
            _mm512_unpackhi_epi16(low, low_2),
            _mm512_unpacklo_epi16(high, high_2),
            _mm512_unpackhi_epi16(high, high_2),
        ]
        .map(|bits| _mm512_castsi512_ps(bits))
    }
}
