//! The number format's tables: the only place where they are written.
//!
//! NF4 levels: quantiles of N(0, 1) scaled to [-1, 1], as published with QLoRA
//! (Dettmers et al. 2023, arXiv 2305.14314, appendix E) and stored by bitsandbytes.
//! Dynamic map: the signed 8-bit dynamic data type of arXiv 1511.04561, which holds the absmax of
//! double quantization.

/// The 16 NF4 levels; a code is an index into this table.
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Decision boundaries: a scaled weight takes the code that counts the boundaries strictly below it.
pub const BOUNDARIES: [f32; 15] = {
    let mut boundaries = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        boundaries[i] = f32::midpoint(LEVELS[i], LEVELS[i + 1]);
        i += 1;
    }
    boundaries
};

/// The code whose level is exactly zero; zero blocks and the padding nibble of an odd count hold it.
pub const ZERO_CODE: u8 = 7;

/// Absmax values per second-level block: bitsandbytes' kernels know no other number.
pub const NESTED_BLOCK: usize = 256;

/// The code whose dynamic-map value is exactly zero.
pub const NESTED_ZERO_CODE: u8 = 127;

/// The signed dynamic 8-bit map, ascending.
///
/// Seven decades; decade i holds 2^i equal intervals of [0.1, 1], represented by their midpoints,
/// and their negatives; then 0 and 1. bitsandbytes builds it with torch.linspace, whose vectorized
/// kernel rounds start + step * i once (a fused multiply-add), so this does too; a test compares
/// all 256 values.
pub static DYNAMIC_MAP: [f32; 256] = {
    let decades = [1e-6_f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut map = [0.0_f32; 256];
    map[255] = 1.0;
    let mut decade = 0;
    while decade < 7 {
        let intervals = 1 << decade;
        let mut i = 0;
        while i < intervals {
            let mean = f32::midpoint(linspace(i, intervals), linspace(i + 1, intervals));
            // Ascending: decade d's positives sit above those of the decades below it.
            let rank = intervals - 1 + i;
            map[128 + rank] = decades[decade] * mean;
            map[126 - rank] = -decades[decade] * mean;
            i += 1;
        }
        decade += 1;
    }
    map
};

/// Point `i` of `intervals` equal steps from 0.1 to 1, rounded as a fused multiply-add rounds.
const fn linspace(i: usize, intervals: usize) -> f32 {
    let step = ((1.0_f32 - 0.1_f32) / intervals as f32) as f64;
    if i < intervals.div_ceil(2) {
        (0.1_f32 as f64 + step * i as f64) as f32
    } else {
        (1.0 - step * (intervals - i) as f64) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_ascend_and_hold_their_exact_points() {
        assert!(LEVELS.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(DYNAMIC_MAP.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(LEVELS[usize::from(ZERO_CODE)], 0.0);
        assert_eq!(DYNAMIC_MAP[usize::from(NESTED_ZERO_CODE)], 0.0);
        assert_eq!((LEVELS[0], LEVELS[15], DYNAMIC_MAP[255]), (-1.0, 1.0, 1.0));
    }
}
