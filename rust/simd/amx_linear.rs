//! AMX: few rows of bf16 activations times rows of packed weights, decoded a tile at a time.
//!
//! Sixteen rows of W by 64 columns are decoded into two tiles: of each byte's two weights, the second
//! ones (low nibbles) go to the first tile, the first ones to the second. That order costs one shift
//! for 64 weights, and `prepare` puts the activations into it once. The sums of the two tiles stay in
//! registers over whole rows.

use super::amx::Configuration;
use super::{PREPARED_MULTIPLE, Strip, avx512_gemm};
use crate::codebook::LEVELS;
use crate::gemm::tile::{SIDE, Tile};
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;

/// Columns of W that are decoded at a time.
const CHUNK: usize = 64;

/// Tokens that the columns of one tile hold.
const TOKENS: usize = SIDE;

/// Bytes of a chunk of 64 values for `tokens` tokens: two tiles of 16 words for each.
const fn chunk_bytes(tokens: usize) -> usize {
    CHUNK * size_of::<bf16>() * tokens
}

/// For each group of up to 16 tokens, for each 64 columns: two tiles, `[word][token]` pairs of
/// neighbours among the odd columns, then among the even ones.
///
/// # Safety
/// The CPU must have AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn prepare(x: &[bf16], columns: usize, out: &mut [bf16]) {
    let width = columns.next_multiple_of(PREPARED_MULTIPLE);
    let mut tiles = [Tile::ZERO; 2];
    for (x, out) in x.chunks(TOKENS * columns).zip(out.chunks_mut(TOKENS * width)) {
        let tokens = x.len() / columns;
        for (i, out) in out.chunks_exact_mut(CHUNK * tokens).take(columns / CHUNK).enumerate() {
            for (token, row) in x.chunks_exact(columns).enumerate() {
                let Some(chunk) = row[i * CHUNK..].first_chunk() else { return };
                let [odd, even] = split(chunk);
                // SAFETY: a tile's row is 64 bytes.
                unsafe {
                    _mm512_store_si512(tiles[0].0[token].as_mut_ptr().cast(), odd);
                    _mm512_store_si512(tiles[1].0[token].as_mut_ptr().cast(), even);
                }
            }
            for (tile, out) in tiles.iter_mut().zip(out.chunks_exact_mut(CHUNK / 2 * tokens)) {
                avx512_gemm::transpose(tile);
                for (words, out) in tile.0.iter().zip(out.chunks_exact_mut(2 * tokens)) {
                    // SAFETY: a row of 16 words is read, and a word per token written: as many bytes
                    // as `out` has.
                    unsafe {
                        let words = _mm512_load_si512(words.as_ptr().cast());
                        let mask = ((1_u32 << tokens) - 1) as u16;
                        _mm512_mask_storeu_epi32(out.as_mut_ptr().cast(), mask, words);
                    }
                }
            }
        }
    }
}

/// The odd and the even ones of 64 values.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn split(values: &[bf16; CHUNK]) -> [__m512i; 2] {
    // SAFETY: the array holds the two vectors that are read.
    let [low, high] = unsafe {
        [_mm512_loadu_si512(values.as_ptr().cast()), _mm512_loadu_si512(values.as_ptr().add(32).cast())]
    };
    let even: [u16; 32] = std::array::from_fn(|i| 2 * i as u16);
    // SAFETY: the array holds the 32 indices that are read.
    let even = unsafe { _mm512_loadu_si512(even.as_ptr().cast()) };
    let odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    [_mm512_permutex2var_epi16(low, odd, high), _mm512_permutex2var_epi16(low, even, high)]
}

/// # Safety
/// The CPU must have AVX-512 with BF16 and AMX, and the process permission to use tile registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn linear(x: &[bf16], strip: &Strip<'_>, out: &mut [f32]) {
    let width = strip.columns.next_multiple_of(PREPARED_MULTIPLE);
    let rows = out.len() / strip.tokens;
    assert!(out.len() == rows * strip.tokens);
    strip.check(x.len(), rows, CHUNK);
    let mut token = 0;
    for pair in x.chunks(2 * TOKENS * width) {
        let (first, second) = pair.split_at(pair.len().min(TOKENS * width));
        let groups = [first.len() / width, second.len() / width];
        // Tiles 0..4 hold sums, 4 and 5 weights, 6 and 7 activations of either group.
        let [first_bytes, second_bytes] = groups.map(|tokens| (tokens.max(1) * 4) as u8);
        let shapes =
            [first_bytes, first_bytes, second_bytes, second_bytes, 64, 64, first_bytes, second_bytes];
        let work = || {
            for row in (0..rows).step_by(SIDE) {
                // SAFETY: the lengths were checked above; tiles are configured for these groups.
                let sums = unsafe { sixteen_rows(first, second, groups, strip, row, rows) };
                for (i, sums) in sums.0[..groups[0] + groups[1]].iter().enumerate() {
                    for (r, &sum) in sums[..SIDE.min(rows - row)].iter().enumerate() {
                        out[(row + r) * strip.tokens + token + i] = sum;
                    }
                }
            }
        };
        // SAFETY: the caller's promise.
        unsafe { Configuration::new(shapes).during(work) };
        token += groups[0] + groups[1];
    }
}

/// `[token][row]`.
struct Sums([[f32; SIDE]; 2 * TOKENS]);

/// Rows `row..row + 16` (fewer at the end) times the prepared activations of both groups.
///
/// # Safety
/// Tiles must be configured for the groups; `strip` must hold `rows` rows, of whole chunks, and
/// `first` and `second` their groups' activations for each chunk.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn sixteen_rows(
    first: &[bf16],
    second: &[bf16],
    groups: [usize; 2],
    strip: &Strip<'_>,
    row: usize,
    rows: usize,
) -> Sums {
    // SAFETY: the array holds the 16 floats that are read.
    let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
    let row_bytes = strip.columns / 2;
    let height = SIDE.min(rows - row);
    let block_shift = strip.block_size.trailing_zeros() - CHUNK.trailing_zeros();
    let blocks = strip.blocks();
    let mut weights = [[Tile::ZERO; 2]; 2];
    let strides = groups.map(|tokens| tokens * 4);
    let mut at = [first.as_ptr().cast::<u8>(), second.as_ptr().cast::<u8>()];
    // SAFETY: tiles are configured (the caller's promise).
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nostack, nomem));
    }
    let chunks = strip.columns / CHUNK;
    for chunk in 0..=chunks {
        if chunk < chunks {
            let block = chunk >> block_shift;
            let weights = &mut weights[chunk % 2];
            for r in 0..height {
                // SAFETY: the row lies inside the strip, and the chunk's 32 bytes inside the row;
                // the prefetch may point past it, which is allowed.
                unsafe {
                    let codes = strip.codes.as_ptr().add((row + r) * row_bytes + chunk * CHUNK / 2);
                    if chunk % 2 == 0 {
                        _mm_prefetch::<_MM_HINT_T1>(codes.wrapping_add(SIDE * row_bytes).cast());
                    }
                    let absmax = *strip.absmax.as_ptr().add((row + r) * blocks + block);
                    let scaled = _mm512_mul_ps(levels, _mm512_set1_ps(absmax));
                    let table = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(scaled));
                    // The permute looks at five bits, the last of which may be anything.
                    let table = _mm512_broadcast_i64x4(table);
                    let bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.cast()));
                    let odd = _mm512_permutexvar_epi16(bytes, table);
                    let even = _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(bytes), table);
                    _mm512_store_si512(weights[0].0[r].as_mut_ptr().cast(), odd);
                    _mm512_store_si512(weights[1].0[r].as_mut_ptr().cast(), even);
                }
            }
        }
        if chunk == 0 {
            continue;
        }
        // The chunk before: a tile is loaded faster some time after its rows were stored.
        let weights = &weights[(chunk - 1) % 2];
        // SAFETY: the weights are two tiles; each group holds two tiles of `stride` bytes a row for
        // every chunk.
        unsafe {
            asm!(
                "tileloadd tmm4, [{weights} + {row}]",
                "tileloadd tmm6, [{x} + {stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{weights} + {row} + 1024]",
                "tileloadd tmm6, [{x_even} + {stride}]",
                "tdpbf16ps tmm1, tmm5, tmm6",
                weights = in(reg) weights.as_ptr(),
                row = in(reg) 64_usize,
                x = in(reg) at[0],
                x_even = in(reg) at[0].wrapping_add(chunk_bytes(groups[0]) / 2),
                stride = in(reg) strides[0],
                out("tmm4") _, out("tmm5") _, out("tmm6") _, options(nostack),
            );
            if groups[1] > 0 {
                asm!(
                    "tileloadd tmm7, [{x} + {stride}]",
                    "tdpbf16ps tmm2, tmm4, tmm7",
                    "tileloadd tmm7, [{x_even} + {stride}]",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    x = in(reg) at[1],
                    x_even = in(reg) at[1].wrapping_add(chunk_bytes(groups[1]) / 2),
                    stride = in(reg) strides[1],
                    out("tmm7") _, options(nostack),
                );
            }
        }
        for (at, tokens) in at.iter_mut().zip(groups) {
            *at = at.wrapping_add(chunk_bytes(tokens));
        }
    }
    let mut tiles = [Tile::ZERO; 4];
    // SAFETY: four tiles of at most 16 rows of 64 bytes are written.
    unsafe {
        asm!(
            "tilestored [{sums} + {row}], tmm0",
            "tilestored [{sums} + {row} + 1024], tmm1",
            "tilestored [{sums} + {row} + 2048], tmm2",
            "tilestored [{sums} + {row} + 3072], tmm3",
            sums = in(reg) tiles.as_mut_ptr(),
            row = in(reg) 64_usize,
            options(nostack),
        );
    }
    let mut sums = Sums([[0.0; SIDE]; 2 * TOKENS]);
    for token in 0..groups[0] + groups[1] {
        let (tile, column) = (token / TOKENS * 2, token % TOKENS);
        for r in 0..height {
            let parts = [tile, tile + 1].map(|tile| f32::from_bits(tiles[tile].0[r][column]));
            sums.0[token][r] = parts[0] + parts[1];
        }
    }
    sums
}
