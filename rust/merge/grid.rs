//! The scales that a matrix in this format can hold.
//!
//! With double quantization a block's scale is `map[code] * absmax[group] + offset`; the offset and
//! the absmax of each group stay as plain rounding of the target left them, so whatever code is
//! chosen here is a valid file, and plain rounding itself is among the choices.

use crate::codebook::{NESTED_BLOCK, NESTED_ZERO_CODE};
use crate::packed_matrix::{PackedMatrix, Scales};

/// The values a block's scale may take.
#[derive(Clone, Copy, Debug)]
pub struct Grid<'a> {
    scales: Scales<'a>,
}

impl<'a> Grid<'a> {
    /// The grid of `matrix`.
    #[must_use]
    pub fn new(matrix: &PackedMatrix<'a>) -> Self {
        Self { scales: matrix.scales() }
    }

    /// The scale of a block as the matrix holds it, and its code.
    #[must_use]
    pub fn stored(&self, block: usize) -> (f32, u8) {
        match self.scales {
            Scales::Single(absmax) => (absmax[block], 0),
            Scales::Nested { codes, .. } => (self.decode(block, codes[block]), codes[block]),
        }
    }

    /// The scale nearest to `wanted` that block `block` can take, and its code.
    #[must_use]
    pub fn nearest(&self, block: usize, wanted: f32) -> (f32, u8) {
        match self.scales {
            Scales::Single(_) => (wanted, 0),
            Scales::Nested { absmax, offset, map, .. } => {
                let range = absmax[block / NESTED_BLOCK];
                if range == 0.0 {
                    return (offset, NESTED_ZERO_CODE);
                }
                let scaled = (wanted - offset) / range;
                let above = map.partition_point(|&value| value < scaled).min(255);
                let below = above.saturating_sub(1);
                // Both neighbours are decoded: what counts is the scale that the file will give.
                let (low, high) = (self.decode(block, below as u8), self.decode(block, above as u8));
                if (wanted - low).abs() <= (high - wanted).abs() {
                    (low, below as u8)
                } else {
                    (high, above as u8)
                }
            }
        }
    }

    fn decode(&self, block: usize, code: u8) -> f32 {
        match self.scales {
            Scales::Single(absmax) => absmax[block],
            // Two roundings, as every decoder of the format has them.
            Scales::Nested { absmax, offset, map, .. } => {
                map[usize::from(code)] * absmax[block / NESTED_BLOCK] + offset
            }
        }
    }
}
