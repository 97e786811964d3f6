//! Plain Rust: always compiled, always the oracle of the other paths.

use super::{Kernels, PREPARED_MULTIPLE, PanelKernels, Strip, crossover, gated, softmax};
use crate::codebook::LEVELS;
use crate::element::Element;
use crate::gemm::tile::{PANEL, SIDE, Tile};
use crate::packed_matrix::NestedScales;
use crate::quantize::{SMALLEST_ABSMAX, nearest_code};

/// The path that every CPU runs.
pub static KERNELS: Kernels = Kernels {
    name: "portable",
    widen_f16: |values, out| widen(values, out),
    widen_bf16: |values, out| widen(values, out),
    narrow_f16: |values, out| {
        for (value, out) in values.iter().zip(out) {
            *out = half::f16::from_f32(*value);
        }
    },
    narrow_bf16: softmax::narrow_bf16,
    largest: softmax::largest,
    exponentials: softmax::exponentials,
    gated: gated::gated,
    gated_gradients: gated::gated_gradients,
    quantize_blocks,
    dequantize_f32: dequantize_blocks,
    dequantize_f16: dequantize_blocks,
    dequantize_bf16: dequantize_blocks,
    decode_absmax,
    matrix_vector,
    prepare_f32: |row, out| {
        out[..row.len()].copy_from_slice(row);
        out[row.len()..].fill(0.0);
    },
    linear_f32,
    panels_f32: PanelKernels {
        multiply: |block, sums| {
            block.for_each_pair(sums, |left, right, sums, rows, _| {
                if block.start {
                    *sums = [Tile::ZERO; 4];
                }
                multiply(left, right, sums, rows);
            });
        },
        decode: None,
    },
    panels_pairs: None,
    transpose: Tile::transpose,
    finish_f32: finish,
    finish_bf16: finish,
    few_rows: crossover::PORTABLE,
    few_rows_bytes: None,
    few_rows_words: None,
    few_rows_pairs: None,
    bf16: None,
};

fn widen<T: Element>(values: &[T], out: &mut [f32]) {
    for (value, out) in values.iter().zip(out) {
        *out = value.to_f32();
    }
}

pub(super) fn quantize_blocks(weights: &[f32], block_size: usize, codes: &mut [u8], absmax: &mut [f32]) {
    let blocks = weights.chunks_exact(block_size).zip(codes.chunks_exact_mut(block_size / 2));
    for ((block, codes), absmax) in blocks.zip(absmax) {
        // Magnitudes order like their bit patterns, and NaN and infinity order above all numbers.
        let largest = block.iter().map(|w| w.to_bits() & 0x7fff_ffff).max().unwrap_or(0);
        *absmax = f32::from_bits(largest);
        let inverse = 1.0 / absmax.max(SMALLEST_ABSMAX);
        for (pair, byte) in block.chunks_exact(2).zip(codes) {
            *byte = nearest_code(pair[0] * inverse) << 4 | nearest_code(pair[1] * inverse);
        }
    }
}

pub(super) fn dequantize_blocks<T: Element>(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [T]) {
    let blocks = codes.chunks_exact(block_size / 2).zip(out.chunks_exact_mut(block_size));
    for ((codes, out), &absmax) in blocks.zip(absmax) {
        let levels = LEVELS.map(|level| T::from_f32(level * absmax));
        for (byte, pair) in codes.iter().zip(out.chunks_exact_mut(2)) {
            pair[0] = levels[usize::from(byte >> 4)];
            pair[1] = levels[usize::from(byte & 15)];
        }
    }
}

pub(super) fn decode_absmax(nested: &NestedScales<'_>, first: usize, out: &mut [f32]) {
    nested.for_each_group(first, out, |codes, absmax, out| {
        for (code, out) in codes.iter().zip(out) {
            *out = nested.map[usize::from(*code)] * absmax + nested.offset;
        }
    });
}

fn matrix_vector(matrix: &[f32], x: &[f32], out: &mut [f32]) {
    assert_eq!(matrix.len(), out.len() * x.len(), "a row per result");
    for (i, out) in out.iter_mut().enumerate() {
        *out = dot(&matrix[i * x.len()..][..x.len()], x);
    }
}

/// Sixteen partial sums: the compiler keeps them in vector registers, and the rounding error grows
/// with a sixteenth of the length.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    let (a, a_tail) = a.as_chunks::<16>();
    let (b, b_tail) = b.as_chunks::<16>();
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_tail).zip(b_tail) {
        *sum += a * b;
    }
    sums.iter().sum()
}

/// Two panels; 16 columns in a row vectorize.
fn multiply(left: &[Tile], right: &[Tile], sums: &mut [Tile; 4], rows: usize) {
    for (left, right) in left.chunks_exact(2).zip(right.chunks_exact(2)) {
        for row in 0..rows {
            for half in 0..2 {
                let sums = &mut sums[row / SIDE * 2 + half].0[row % SIDE];
                for (&word, columns) in left[row / SIDE].0[row % SIDE].iter().zip(&right[half].0) {
                    let weight = f32::from_bits(word);
                    for (sum, &column) in sums.iter_mut().zip(columns) {
                        *sum = (f32::from_bits(*sum) + weight * f32::from_bits(column)).to_bits();
                    }
                }
            }
        }
    }
}

/// Sums → results: see [`super::Finish`].
fn finish<T: Element>(
    sums: &mut [Tile; 4],
    transpose: bool,
    bias: &[f32; PANEL],
    out: &mut [[T; PANEL]; PANEL],
) {
    for (i, tile) in sums.iter_mut().enumerate() {
        if transpose {
            tile.transpose();
        }
        // Four tiles [left half][right half]; the left side is outputs if they are to be transposed.
        let (first_token, first) = if transpose { (i % 2, i / 2) } else { (i / 2, i % 2) };
        for (row, out) in tile.0.iter().zip(&mut out[first_token * SIDE..]) {
            let places = out[first * SIDE..].iter_mut().zip(&bias[first * SIDE..]);
            for (&sum, (out, bias)) in row.iter().zip(places) {
                *out = T::from_f32(f32::from_bits(sum) + bias);
            }
        }
    }
}

fn linear_f32(x: &[f32], strip: &Strip<'_>, out: &mut [f32]) {
    let prepared = strip.columns.next_multiple_of(PREPARED_MULTIPLE);
    let mut weights = [0.0_f32; 4096];
    let rows = strip.codes.chunks_exact(strip.columns / 2).zip(strip.absmax.chunks_exact(strip.blocks()));
    out.fill(0.0);
    for ((codes, absmax), out) in rows.zip(out.chunks_exact_mut(strip.tokens)) {
        let parts = codes.chunks(2048).zip(absmax.chunks(4096 / strip.block_size));
        for (part, (codes, absmax)) in parts.enumerate() {
            let weights = &mut weights[..codes.len() * 2];
            dequantize_blocks(codes, absmax, strip.block_size, weights);
            for (token, out) in out.iter_mut().enumerate() {
                *out += dot(weights, &x[token * prepared + part * 4096..][..weights.len()]);
            }
        }
    }
}
