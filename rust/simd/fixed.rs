//! Activations in fixed point, for CPUs whose tables hold bytes and that multiply and add integers.
//!
//! Activations of 16 bits carry 8 or 11 significant bits, and so do the results. Products of integers of
//! about as many bits, which are exact, cost less than looking up levels as floats and multiplying those.
//! An activation becomes q times a unit that 64 neighbours share.
//!
//! # Words
//!
//! A level L becomes S L, rounded. Products of 16 by 16 bits are summed two at a time, which 32 bits hold
//! for eight of them, all that 64 weights bring to a lane. Weights of zero contribute nothing.
//!
//! # Pairs
//!
//! Words again, where a lane sums all 64: S is half as large, and a unit is large enough that the sum of its
//! activations' sizes leaves room.
//!
//! # Bytes
//!
//! Where bytes are multiplied four at a time, the same is put together from products of bytes. q becomes
//! 256 high + low, both signed; a level becomes U = S (L + 1) = 256 u + v, both unsigned: the instruction
//! wants one factor of each kind. Summed over weights of one block,
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

use super::{Linear, PREPARED_MULTIPLE};
use crate::codebook::{LEVELS, ZERO_CODE};
use crate::memory::Plain;
use std::ops::AddAssign;

/// What fixed point may lose, in units of the last place of activations and results: see
/// [`FewRowsFixed::prepare`]. Rounding the results loses 0.29 (root mean square).
pub const FIXED_TOLERANCE: f32 = 0.25;

/// Activations that share a unit.
pub(super) const UNIT_SIZE: usize = 64;

/// The largest q as bytes: both are 127.
pub(super) const LARGEST_BYTES: u32 = 0x7f7f;

/// The largest q as a word: eight products with the largest level fit 32 bits.
pub(super) const LARGEST_WORD: u32 = 0x3fff;
const _: () = assert!(8 * LARGEST_WORD as u64 * WORD_SCALE as u64 <= i32::MAX as u64);

/// S of words: of all whole numbers up to 2^14 that for which rounding S L loses least (root mean square,
/// with codes as frequent as normally distributed weights have them in blocks of 64).
pub(super) const WORD_SCALE: f32 = 15684.0;

/// S where a whole unit's products are summed in one lane: the same for whole numbers up to 2^13.
pub const PAIR_SCALE: f32 = 7854.0;

/// What the sizes of a unit's q may add up to there, so that its products fit 32 bits. Rounding each to
/// nearest, and their sum as f32, is allowed for.
pub(super) const LARGEST_SUM: u32 = i32::MAX as u32 / PAIR_SCALE as u32 - UNIT_SIZE as u32;

const _: () = assert!((LARGEST_SUM + UNIT_SIZE as u32) as u64 * PAIR_SCALE as u64 <= i32::MAX as u64);

/// The low bytes, then the high ones, of S L of each level.
pub(super) static LEVEL_WORDS: [[u8; 16]; 2] = word_bytes(WORD_SCALE);
pub(super) static LEVEL_PAIRS: [[u8; 16]; 2] = word_bytes(PAIR_SCALE);

/// S L of each level where a whole unit's products are summed in one lane.
pub(super) static PAIR_WORDS: [i16; 16] = {
    let mut words = [0; 16];
    let mut i = 0;
    while i < 16 {
        words[i] = word(i, PAIR_SCALE);
        i += 1;
    }
    words
};

const fn word_bytes(scale: f32) -> [[u8; 16]; 2] {
    let mut bytes = [[0; 16]; 2];
    let mut i = 0;
    while i < 16 {
        [bytes[0][i], bytes[1][i]] = word(i, scale).to_le_bytes();
        i += 1;
    }
    bytes
}

/// S L of a code's level, rounded to nearest.
pub(super) const fn word(code: usize, scale: f32) -> i16 {
    let scaled = LEVELS[code] as f64 * scale as f64;
    (scaled + if scaled < 0.0 { -0.5 } else { 0.5 }) as i16
}

/// S of bytes: of all whole numbers that make v's mean what v is for zero (to one, with codes as frequent as
/// normally distributed weights have them in blocks of 64), that with which v differs least from it:
/// 0.0020 S, root mean square.
pub(super) const BYTE_SCALE: f32 = 29058.0;

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
    ((LEVELS[code] as f64 + 1.0) * BYTE_SCALE as f64 + 0.5) as u16
}

/// 128 activations as bytes. Byte i of as many codes holds weights 2i (high nibble) and 2i + 1.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct ByteStep {
    /// High bytes of the odd activations, then of the even ones.
    pub(super) high: [[i8; 64]; 2],
    /// Low bytes.
    pub(super) low: [[i8; 64]; 2],
    /// For each eight activations: what the parentheses are multiplied by.
    pub(super) unit: [f32; 16],
    /// For each eight activations: what is added then, the terms without weights.
    pub(super) offset: [f32; 16],
}

/// 128 activations as words.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct WordStep {
    /// In the order in which the kernel looks up levels.
    pub(super) words: [i16; PREPARED_MULTIPLE],
    /// For each 64 activations: what their sums are multiplied by, eight times over.
    pub(super) unit: [[f32; 8]; 2],
}

/// 128 activations as pairs of words, in order.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct PairStep {
    /// Two activations each, the first one in the lower half.
    pub(crate) pairs: [i32; PREPARED_MULTIPLE / 2],
    /// For each eight activations: what their sums are multiplied by.
    pub(crate) unit: [f32; 16],
}

// SAFETY: integers and floats, no padding; tiles are aligned to cache lines too.
unsafe impl Plain for ByteStep {}
// SAFETY: as above.
unsafe impl Plain for PairStep {}
// SAFETY: as above.
unsafe impl Plain for WordStep {}

/// Products of few rows of 16-bit activations, in fixed point, with rows of packed weights.
#[derive(Clone, Copy, Debug)]
pub struct FewRowsFixed<Step> {
    /// With more rows than this, other kernels are faster.
    pub most: usize,
    /// Bring a row into fixed point: a step for each 128 activations, the last one filled up with zeros.
    ///
    /// Returns whether that lost little: false where a value is not finite, or where large values leave
    /// those beside them too few bits. To be exact, the errors of all activations (their root mean
    /// square) may be `tolerance` of the row's size, for which the few largest activations of each unit
    /// do not count: weights of zero may hide those, and what is left should be right even then. (Units that
    /// are small beside the others count little, as they do in the results unless weights are zero for all
    /// others.) With an infinite tolerance, nothing is refused but what is not finite or too large for a unit.
    pub prepare: fn(x: &[f32], tolerance: f32, out: &mut [Step]) -> bool,
    /// As [`super::Kernels::linear_f32`], for up to `most` rows, one after the other.
    pub linear: Linear<Step>,
}

/// What bringing activations into fixed point loses, as sums of squares.
#[derive(Clone, Copy, Default)]
pub(super) struct Loss {
    /// Of the errors.
    pub(super) error: f64,
    /// Of the activations but for each unit's few largest, estimated.
    pub(super) size: f64,
}

impl AddAssign for Loss {
    fn add_assign(&mut self, other: Self) {
        self.error += other.error;
        self.size += other.size;
    }
}

impl Loss {
    /// Whether the errors are within `tolerance` of the row's size: false too where one of them is NaN.
    pub(super) fn is_within(self, tolerance: f32) -> bool {
        // An infinite tolerance is one even of nothing.
        self.error <= f64::from(tolerance).powi(2) * self.size
            || tolerance == f32::INFINITY && self.error.is_finite()
    }
}

/// Bring a row into fixed point, a step of 128 at a time, the last one filled up with zeros.
#[inline(always)]
pub(super) fn prepare_steps<Step>(
    x: &[f32],
    out: &mut [Step],
    prepare_step: impl Fn(&[f32; PREPARED_MULTIPLE], &mut Step) -> Loss,
) -> Loss {
    assert_eq!(out.len(), x.len().div_ceil(PREPARED_MULTIPLE), "a step for each 128 activations");
    let mut loss = Loss::default();
    let (steps, rest) = x.as_chunks();
    for (step, out) in steps.iter().zip(&mut *out) {
        loss += prepare_step(step, out);
    }
    if let Some(out) = out.get_mut(steps.len()) {
        let mut step = [0.0; PREPARED_MULTIPLE];
        step[..rest.len()].copy_from_slice(rest);
        loss += prepare_step(&step, out);
    }
    loss
}

/// Exponents of units, as f32 has them in its bits, that are kept well inside those of f32: what units are
/// multiplied and divided by, and sums that cancel each other, must not overflow or become subnormal.
pub(super) const EXPONENTS: std::ops::RangeInclusive<u32> = 127 - 100..=127 + 100;

/// The exponent of a unit, as f32 has it in its bits: the smallest power of two of which the largest
/// activation, given as its magnitude's bits, holds at most `LARGEST`, if that is not too small.
#[inline(always)]
pub(super) fn unit_exponent<const LARGEST: u32>(largest: u32) -> u32 {
    let exponent = LARGEST.ilog2();
    // Mantissas above that of LARGEST carry into the exponent.
    let carry = ((2 << exponent) - 1 - LARGEST) << (23 - exponent) | ((1 << (23 - exponent)) - 1);
    (((largest + carry) >> 23) & 0xff).saturating_sub(exponent).max(*EXPONENTS.start())
}
