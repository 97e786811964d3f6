//! Activations in fixed point, for CPUs that multiply and add bytes four at a time.
//!
//! Activations of 16 bits carry 8 or 11 significant bits, and so do the results. A product of 16 by 16
//! bits, put together from products of bytes, which are exact, costs these CPUs less than looking up
//! levels as floats and multiplying those. An activation becomes q = 256 high + low, both signed, times a
//! unit that 64 neighbours share; a level L becomes U = S L + O = 256 u + v, both unsigned: the
//! instruction wants one factor of each kind. Summed over weights of one block,
//!
//! ```text
//! S sum L q = sum U q - O sum q
//!           = 256 (256 sum u high + sum (u low + v high)) + sum v low - O sum q
//! ```
//!
//! The weights are needed for what stands in parentheses alone. In the next sum v is replaced by its mean;
//! what that misses is about 2^-14 of a product, less than rounding to q costs.

use super::Linear;
use crate::codebook::LEVELS;
use crate::memory::Plain;

/// Activations that share a unit.
pub(super) const UNIT_SIZE: usize = 64;

/// The largest q: both its bytes are 127.
pub(super) const LARGEST: u32 = 0x7f7f;

/// What levels are multiplied by, and what is added lest one be negative: of all choices, those with which
/// v differs least from level to level, by 41 (standard deviation, codes as normally distributed weights
/// have them) where chance would have it by 74.
pub(super) const LEVEL_SCALE: f32 = 31773.0;
pub(super) const LEVEL_OFFSET: f32 = 31861.0;

/// The mean of v, for the same weights.
pub(super) const MEAN_LOW: f32 = 76.0;

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

/// A level as U, rounded to nearest.
const fn level(code: usize) -> u16 {
    (LEVELS[code] as f64 * LEVEL_SCALE as f64 + LEVEL_OFFSET as f64 + 0.5) as u16
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
    /// square) may be `tolerance` of the row's size, of which the largest activation of each unit does
    /// not count: weights of zero may hide those, and what is left should be right even then.
    pub prepare: fn(x: &[f32], tolerance: f32, out: &mut [FixedStep]) -> bool,
    /// As [`super::Kernels::linear_f32`], for up to `most` rows, one after the other.
    pub linear: Linear<FixedStep>,
}
