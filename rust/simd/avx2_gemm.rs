//! AVX2 and FMA: microkernels on panels, layout in `gemm/tile.rs`.
//!
//! Four rows by 16 columns of sums stay in eight registers.

use crate::gemm::tile::{Block, SIDE, Tile};
use std::arch::x86_64::*;

/// Rows of sums in registers.
const ROWS: usize = 4;

#[target_feature(enable = "avx2,fma")]
pub(super) fn multiply_f32(block: &Block<'_>, sums: &mut [Tile]) {
    block.for_each_pair(sums, |left, right, sums, rows, columns| {
        for half in 0..columns.div_ceil(SIDE) {
            for first in (0..rows).step_by(ROWS) {
                multiply_half(left, right, &mut sums[first / SIDE * 2 + half], half, first, block.start);
            }
        }
    });
}

/// `ROWS` rows by one tile's columns.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn multiply_half(left: &[Tile], right: &[Tile], sums: &mut Tile, half: usize, first: usize, start: bool) {
    let (left_half, first) = (first / SIDE, first % SIDE);
    let mut registers = [[_mm256_setzero_ps(); 2]; ROWS];
    for (left, right) in left.as_chunks::<2>().0.iter().zip(right.as_chunks::<2>().0) {
        let Some(rows) = left[left_half].0[first..].first_chunk::<ROWS>() else { return };
        for word in 0..SIDE {
            let row = &right[half].0[word];
            // SAFETY: two vectors of 8 words are read from a row of 16.
            let columns = [0, 8].map(|i| unsafe { _mm256_load_ps(row.as_ptr().add(i).cast()) });
            for r in 0..ROWS {
                let value = _mm256_set1_ps(f32::from_bits(rows[r][word]));
                for c in 0..2 {
                    registers[r][c] = _mm256_fmadd_ps(value, columns[c], registers[r][c]);
                }
            }
        }
    }
    for (r, registers) in registers.iter().enumerate() {
        let row = &mut sums.0[first + r];
        for (c, register) in registers.iter().enumerate() {
            // A block's own sum is added to the sum so far: two short chains of roundings err less
            // than one long one.
            // SAFETY: c < 2, so 8 words from 8 * c lie in the row of 16.
            unsafe {
                let at = row.as_mut_ptr().add(8 * c).cast();
                let sum = if start { *register } else { _mm256_add_ps(*register, _mm256_load_ps(at)) };
                _mm256_store_ps(at, sum);
            }
        }
    }
}
