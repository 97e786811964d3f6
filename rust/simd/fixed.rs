//! Activations in fixed point, for CPUs that multiply and add bytes four at a time.
//!
//! Activations of 16 bits carry 8 or 11 significant bits, and so do the results. A product of 16 by 16
//! bits, put together from products of bytes, which are exact, costs these CPUs less than looking up
//! levels as floats and multiplying those. An activation becomes q = 256 high + low, both signed, times a
//! unit that 64 neighbours share; a level L becomes U = S (L + 1) = 256 u + v, both unsigned: the
//! instruction wants one factor of each kind. Summed over weights of one block,
//!
//! ```text
//! S sum L q = sum U q - S sum q
//!           = 256 (256 sum u high + sum (u low + v high)) + sum v low - S sum q
//! ```
//!
//! The weights are needed for what stands in parentheses alone: in the next sum, v is replaced by what it
//! is for the level zero, so that weights of zero contribute nothing. For others that misses about 2^-14
//! of a typical product.

// Without such kernels only what is shared between them is used.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

use super::Linear;
use crate::codebook::{LEVELS, ZERO_CODE};
use crate::memory::Plain;

/// Activations that share a unit.
pub(super) const UNIT_SIZE: usize = 64;

/// The largest q: both its bytes are 127.
pub(super) const LARGEST: u32 = 0x7f7f;

/// S. Of all whole numbers that make v's mean what v is for zero (to one, with codes as frequent as
/// normally distributed weights have them in blocks of 64), that with which v differs least from it:
/// 0.0020 S, root mean square.
pub(super) const LEVEL_SCALE: f32 = 29058.0;

/// v of the level zero.
pub(super) const ZERO_LOW: f32 = level(ZERO_CODE as usize).to_be_bytes()[1] as f32;

/// What v misses by, of a typical product with the activation low, in blocks of 128 (longer ones hold
/// smaller levels: up to 0.0070).
pub(super) const LOW_ERROR: f32 = 0.0055;

/// The bytes u, then v, of each level, four times over: an index's bits above the fourth may be anything.
pub(super) static LEVEL_BYTES: [[u8; 64]; 2] = {
    let mut bytes = [[0; 64]; 2];
    let mut i = 0;
    while i < 64 {
        [bytes[0][i], bytes[1][i]] = level(i % 16).to_be_bytes();
        i += 1;
    }
    bytes
};

/// U of a code's level, rounded to nearest.
pub(super) const fn level(code: usize) -> u16 {
    ((LEVELS[code] as f64 + 1.0) * LEVEL_SCALE as f64 + 0.5) as u16
}

/// 128 activations. Byte i of as many codes holds weights 2i (high nibble) and 2i + 1.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct FixedStep {
    /// High bytes of the odd activations, then of the even ones.
    pub(super) high: [[i8; 64]; 2],
    /// Low bytes.
    pub(super) low: [[i8; 64]; 2],
    /// For each eight activations: what the parentheses are multiplied by.
    pub(super) unit: [f32; 16],
    /// For each eight activations: what is added then, the terms without weights.
    pub(super) offset: [f32; 16],
}

#[cfg(test)]
impl FixedStep {
    pub(super) const ZERO: Self =
        Self { high: [[0; 64]; 2], low: [[0; 64]; 2], unit: [0.0; 16], offset: [0.0; 16] };
}

// SAFETY: bytes and floats, no padding; tiles are aligned to cache lines too.
unsafe impl Plain for FixedStep {}

/// Products of few rows of 16-bit activations, in fixed point, with rows of packed weights.
#[derive(Clone, Copy, Debug)]
pub struct FewRowsFixed {
    /// With more rows than this, other kernels are faster.
    pub most: usize,
    /// Bring a row into fixed point: a step for each 128 activations, the last one filled up with zeros.
    ///
    /// Returns whether that lost little: false where a value is not finite, or where large values leave
    /// those beside them too few bits. To be exact, the errors of all activations (their root mean
    /// square) may be `tolerance` of the row's size, for which the few largest activations of each unit
    /// do not count: weights of zero may hide those, and what is left should be right even then.
    pub prepare: fn(x: &[f32], tolerance: f32, out: &mut [FixedStep]) -> bool,
    /// As [`super::Kernels::linear_f32`], for up to `most` rows, one after the other.
    pub linear: Linear<FixedStep>,
}
