//! Float weights → 4-bit codes and one absmax per block.
//!
//! A block is `block_size` consecutive weights of the flattened matrix. Its absmax is their largest
//! magnitude; each weight times 1/absmax takes the code of the nearest level, ties going down
//! (QLoRA, arXiv 2305.14314, equation 2; rounding as bitsandbytes' CPU backend does it, so that the
//! bytes are the same). Read next: `double_quantize.rs`, then `dequantize.rs`.

use crate::codebook::{BOUNDARIES, ZERO_CODE};
use crate::element::Element;
use crate::error::Error;
use crate::packed_matrix::check_block_size;
use crate::parallel;
use crate::simd::Kernels;
use std::sync::atomic::{AtomicBool, Ordering};

/// bitsandbytes divides by at least this, so a block below it packs as zeros.
pub const SMALLEST_ABSMAX: f32 = 1e-38;

/// Weights per unit of parallel work: a multiple of every block size, and 256 KiB of f32.
const CHUNK: usize = 1 << 16;

/// Weights widened to f32 at a time; they stay in the first-level cache between the two passes.
const STRIP: usize = 4096;

/// Quantize `weights`, a matrix with `columns` columns, into `codes` (two per byte) and `absmax`
/// (one per block). `columns` only serves to say where a refused weight is.
///
/// # Errors
/// [`Error::BlockSize`]; [`Error::Operand`] when an output has the wrong length;
/// [`Error::NonFinite`] with the count and first index when a weight is NaN or infinite. The
/// contents of the outputs are unspecified after an error.
pub fn quantize<T: Element>(
    kernels: &Kernels,
    weights: &[T],
    columns: usize,
    block_size: usize,
    codes: &mut [u8],
    absmax: &mut [f32],
    threads: usize,
) -> Result<(), Error> {
    check_block_size(block_size)?;
    check_length("codes", codes.len(), weights.len().div_ceil(2))?;
    check_length("absmax", absmax.len(), weights.len().div_ceil(block_size))?;
    let finite = AtomicBool::new(true);
    let chunks =
        weights.chunks(CHUNK).zip(codes.chunks_mut(CHUNK / 2)).zip(absmax.chunks_mut(CHUNK / block_size));
    parallel::for_each(chunks, threads, |((weights, codes), absmax)| {
        quantize_chunk(kernels, weights, block_size, codes, absmax);
        if !absmax.iter().all(|a| a.is_finite()) {
            finite.store(false, Ordering::Relaxed);
        }
    });
    if finite.into_inner() { Ok(()) } else { Err(non_finite(weights, columns.max(1))) }
}

pub(crate) fn check_length(name: &'static str, got: usize, expected: usize) -> Result<(), Error> {
    if got == expected { Ok(()) } else { Err(Error::Operand { name, got, expected }) }
}

fn quantize_chunk<T: Element>(
    kernels: &Kernels,
    weights: &[T],
    block_size: usize,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    let mut wide = [0.0_f32; STRIP];
    let strips =
        weights.chunks(STRIP).zip(codes.chunks_mut(STRIP / 2)).zip(absmax.chunks_mut(STRIP / block_size));
    for ((weights, codes), absmax) in strips {
        let wide = &mut wide[..weights.len()];
        T::widen(kernels, weights, wide);
        let blocks = wide.len() / block_size;
        let (whole, tail) = wide.split_at(blocks * block_size);
        let (whole_codes, tail_codes) = codes.split_at_mut(whole.len() / 2);
        (kernels.quantize_blocks)(whole, block_size, whole_codes, &mut absmax[..blocks]);
        if !tail.is_empty() {
            absmax[blocks] = quantize_tail(tail, tail_codes);
        }
    }
}

/// The last, incomplete block of a matrix: bitsandbytes divides here instead of multiplying by the
/// reciprocal, and raises the stored absmax to its smallest divisor.
fn quantize_tail(weights: &[f32], codes: &mut [u8]) -> f32 {
    let largest = weights.iter().fold(0.0_f32, |a, w| if w.is_nan() { f32::NAN } else { a.max(w.abs()) });
    if !largest.is_finite() || weights.iter().any(|w| w.is_nan()) {
        return f32::NAN;
    }
    let absmax = largest.max(SMALLEST_ABSMAX);
    for (pair, byte) in weights.chunks(2).zip(codes) {
        let low = pair.get(1).map_or(ZERO_CODE, |&w| nearest_code(w / absmax));
        *byte = nearest_code(pair[0] / absmax) << 4 | low;
    }
    absmax
}

/// The code of a weight already divided by its block's absmax: how many boundaries lie strictly below.
#[must_use]
pub fn nearest_code(scaled: f32) -> u8 {
    BOUNDARIES.iter().map(|&boundary| u8::from(scaled > boundary)).sum()
}

/// Describe what is wrong with `weights`, which hold at least one NaN or infinity.
fn non_finite<T: Element>(weights: &[T], columns: usize) -> Error {
    let mut bad = weights.iter().enumerate().filter(|(_, w)| !w.to_f32().is_finite()).map(|(i, _)| i);
    let first = bad.next().unwrap_or(weights.len());
    Error::NonFinite { count: 1 + bad.count(), rows: weights.len() / columns, columns, first }
}
