//! A packed matrix: 4-bit codes, their scales and a shape, checked once when it is built.
//!
//! Blocks run over the flattened, row-major matrix, so a block may span two rows when the number of
//! columns is not a multiple of the block size. Byte i holds weight 2i in its high nibble and
//! weight 2i + 1 in its low nibble.

use crate::codebook::NESTED_BLOCK;
use crate::error::Error;
use crate::simd::{Kernels, fetch_soon};
use std::ops::Range;

/// The largest magnitude of each block, as floats or quantized a second time.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// One f32 per block.
    Single(&'a [f32]),
    /// Double quantization: block b's absmax is `map[codes[b]] * absmax[b / 256] + offset`.
    Nested {
        /// One 8-bit code per block.
        codes: &'a [u8],
        /// One f32 per 256 blocks.
        absmax: &'a [f32],
        /// The mean that was subtracted before the second quantization.
        offset: f32,
        /// The 256 values that a code can take.
        map: &'a [f32; 256],
    },
}

/// The parts of [`Scales::Nested`], as the kernels that decode them take them.
#[derive(Clone, Copy, Debug)]
pub struct NestedScales<'a> {
    /// One 8-bit code per block.
    pub codes: &'a [u8],
    /// One f32 per 256 blocks.
    pub absmax: &'a [f32],
    /// The mean that was subtracted before the second quantization.
    pub offset: f32,
    /// The 256 values that a code can take.
    pub map: &'a [f32; 256],
}

impl NestedScales<'_> {
    /// Call `decode(codes, absmax, out)` for the blocks `first..first + out.len()`, those of one group
    /// of 256 at a time.
    #[inline]
    pub fn for_each_group(
        &self,
        first: usize,
        mut out: &mut [f32],
        mut decode: impl FnMut(&[u8], f32, &mut [f32]),
    ) {
        let mut block = first;
        while !out.is_empty() {
            let group = block / NESTED_BLOCK;
            let length = ((group + 1) * NESTED_BLOCK - block).min(out.len());
            let (head, rest) = out.split_at_mut(length);
            decode(&self.codes[block..block + length], self.absmax[group], head);
            block += length;
            out = rest;
        }
    }
}

/// Borrowed parts of a quantized matrix whose lengths are known to fit together.
#[derive(Clone, Copy, Debug)]
pub struct PackedMatrix<'a> {
    codes: &'a [u8],
    scales: Scales<'a>,
    rows: usize,
    columns: usize,
    block_size: usize,
}

/// Refuse block sizes that the format does not know.
///
/// # Errors
/// [`Error::BlockSize`] unless `block_size` is a power of two in 32..=4096.
pub fn check_block_size(block_size: usize) -> Result<(), Error> {
    if block_size.is_power_of_two() && (32..=4096).contains(&block_size) {
        Ok(())
    } else {
        Err(Error::BlockSize(block_size))
    }
}

impl<'a> PackedMatrix<'a> {
    /// Check every length once; all later code relies on it.
    ///
    /// # Errors
    /// [`Error::BlockSize`], [`Error::TooLarge`] or [`Error::Length`] naming the buffer at fault.
    pub fn new(
        codes: &'a [u8],
        scales: Scales<'a>,
        rows: usize,
        columns: usize,
        block_size: usize,
    ) -> Result<Self, Error> {
        check_block_size(block_size)?;
        let count = rows.checked_mul(columns).ok_or(Error::TooLarge { rows, columns })?;
        let expect = |name, got, expected| {
            if got == expected {
                Ok(())
            } else {
                Err(Error::Length { name, got, expected, rows, columns, block_size })
            }
        };
        let blocks = count.div_ceil(block_size);
        expect("codes", codes.len(), count.div_ceil(2))?;
        match scales {
            Scales::Single(absmax) => expect("absmax", absmax.len(), blocks)?,
            Scales::Nested { codes, absmax, .. } => {
                expect("absmax", codes.len(), blocks)?;
                expect("nested_absmax", absmax.len(), blocks.div_ceil(NESTED_BLOCK))?;
            }
        }
        Ok(Self { codes, scales, rows, columns, block_size })
    }

    /// Number of output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of input features.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Weights per absmax.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// All codes, two per byte.
    #[must_use]
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// The scales, still in the form they are stored in.
    #[must_use]
    pub fn scales(&self) -> Scales<'a> {
        self.scales
    }

    /// Number of blocks.
    #[must_use]
    pub fn blocks(&self) -> usize {
        (self.rows * self.columns).div_ceil(self.block_size)
    }

    /// Whether every row starts at a block boundary, which the fused kernels need.
    #[must_use]
    pub fn rows_are_aligned(&self) -> bool {
        self.columns.is_multiple_of(self.block_size)
    }

    /// Write the absmax of blocks `first..first + out.len()`, decoding the second level if there is one.
    pub fn decode_absmax(&self, kernels: &Kernels, first: usize, out: &mut [f32]) {
        match self.scales {
            Scales::Single(absmax) => out.copy_from_slice(&absmax[first..first + out.len()]),
            Scales::Nested { codes, absmax, offset, map } => {
                let nested = NestedScales { codes, absmax, offset, map };
                (kernels.decode_absmax)(&nested, first, out);
            }
        }
    }

    /// Ask memory for the absmax of some blocks, as they are stored.
    pub fn fetch_absmax(&self, blocks: Range<usize>) {
        match self.scales {
            Scales::Single(absmax) => fetch_soon(&absmax[blocks]),
            Scales::Nested { codes, .. } => fetch_soon(&codes[blocks]),
        }
    }

    /// Write the absmax of consecutive pieces of blocks, the first of which starts at weight `first`.
    ///
    /// `piece` must divide the block size, and `first` must be a multiple of it.
    pub fn decode_absmax_pieces(&self, kernels: &Kernels, first: usize, piece: usize, out: &mut [f32]) {
        if piece == self.block_size {
            return self.decode_absmax(kernels, first / piece, out);
        }
        // Blocks are decoded some at a time and then repeated for each of their pieces. Sizes are powers
        // of two: shifts, where divisions would cost more than the decoding.
        let shift = self.block_size.trailing_zeros() - piece.trailing_zeros();
        let mut blocks = [0.0; 256];
        let mut next = first / piece;
        let mut out = out;
        while !out.is_empty() {
            let block = next >> shift;
            let count = out.len().min(((block + blocks.len()) << shift) - next);
            let last = (next + count - 1) >> shift;
            self.decode_absmax(kernels, block, &mut blocks[..=last - block]);
            let (head, rest) = out.split_at_mut(count);
            for (i, out) in head.iter_mut().enumerate() {
                *out = blocks[((next + i) >> shift) - block];
            }
            next += count;
            out = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_lengths_and_block_sizes_are_refused_with_the_numbers() {
        let codes = [0_u8; 64];
        let absmax = [1.0_f32; 2];
        let build =
            |rows, block_size| PackedMatrix::new(&codes, Scales::Single(&absmax), rows, 64, block_size);
        assert!(build(2, 64).is_ok());
        assert_eq!(build(2, 96).unwrap_err(), Error::BlockSize(96));
        assert!(build(3, 64).unwrap_err().to_string().contains("needs 96"));
        assert!(build(2, 32).unwrap_err().to_string().starts_with("absmax has 2"));
        assert!(matches!(build(usize::MAX, 64).unwrap_err(), Error::TooLarge { .. }));
    }
}
