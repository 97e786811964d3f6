//! The CUDA sources of `cuda/`, carried inside the extension, and the tables that they include.
//!
//! `python/qlora_rs/kernels.py` compiles them at run time. `codebook.cuh` is written from
//! `codebook.rs` by the test below, so that the format's numbers are typed once.

/// File name and text of each source.
pub const SOURCES: [(&str, &str); 7] = [
    ("codebook.cuh", include_str!("../cuda/codebook.cuh")),
    ("dequantize_nf4.cu", include_str!("../cuda/dequantize_nf4.cu")),
    ("double_quantize.cu", include_str!("../cuda/double_quantize.cu")),
    ("few_rows_nf4.cu", include_str!("../cuda/few_rows_nf4.cu")),
    ("floats.cuh", include_str!("../cuda/floats.cuh")),
    ("quantize_nf4.cu", include_str!("../cuda/quantize_nf4.cu")),
    ("tensor_cores_nf4.cu", include_str!("../cuda/tensor_cores_nf4.cu")),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codebook::{BOUNDARIES, LEVELS, ZERO_CODE};
    use crate::double_quantize::midpoints;
    use crate::quantize::{SMALLEST_ABSMAX, nearest_code};
    use std::fmt::Write;

    /// Quarters of a cell per unit: 32 cells of 1/15 cover [-1.01, 1.01], what a weight times
    /// 1/absmax can be, and no two boundaries are closer than 1/15.
    const CELL_SCALE: f32 = 60.0;
    /// 2^23, where the sum's last bits are an integer, plus the middle of the cells.
    const CELL_OFFSET: f32 = 8_388_672.0;

    /// The cell of a scaled weight, computed as `quantize_nf4.cu` does. Never decreasing in x.
    fn cell(x: f32) -> usize {
        (x.mul_add(CELL_SCALE, CELL_OFFSET).to_bits() & 0x7c) as usize / 4
    }

    /// For each cell its boundary (infinity if it has none) and the code below that boundary.
    fn cells() -> ([f32; 32], [u32; 32]) {
        let (mut boundaries, mut codes) = ([f32::INFINITY; 32], [0; 32]);
        for boundary in BOUNDARIES {
            assert!(boundaries[cell(boundary)].is_infinite(), "two boundaries share a cell");
            boundaries[cell(boundary)] = boundary;
            for code in &mut codes[cell(boundary) + 1..] {
                *code += 1;
            }
        }
        (boundaries, codes)
    }

    /// Sorted values as a search tree: node i has the children 2i and 2i + 1, the root is node 1.
    fn tree(sorted: &[f32], node: usize, out: &mut [f32; 256]) {
        if !sorted.is_empty() {
            let (left, rest) = sorted.split_at(sorted.len() / 2);
            out[node] = rest[0];
            tree(left, 2 * node, out);
            tree(&rest[1..], 2 * node + 1, out);
        }
    }

    fn table(name: &str, about: &str, values: impl Iterator<Item = u32>) -> String {
        let words: Vec<_> = values.map(|bits| format!("{bits:#010x}u")).collect();
        let lines: Vec<_> = words.chunks(8).map(|line| format!("    {},\n", line.join(", "))).collect();
        let (count, lines) = (words.len(), lines.concat());
        format!("\n// {about}\nstatic __device__ const unsigned {name}[{count}] = {{\n{lines}}};\n")
    }

    fn codebook() -> String {
        let mut text = String::from(
            "// The tables of rust/codebook.rs, written by `WRITE_CODEBOOK=1 cargo test codebook`: do not edit.\n\
             // Floats are given by their bits.\n#pragma once\n\n",
        );
        let _ = writeln!(text, "#define ZERO_CODE {ZERO_CODE}u");
        let _ =
            writeln!(text, "#define SMALLEST_ABSMAX __uint_as_float({:#010x}u)", SMALLEST_ABSMAX.to_bits());
        let _ = writeln!(text, "#define CELL_SCALE {CELL_SCALE:.1}f\n#define CELL_OFFSET {CELL_OFFSET:.1}f");
        let (boundaries, codes) = cells();
        let mut midpoints_tree = [f32::INFINITY; 256];
        tree(&midpoints()[..255], 1, &mut midpoints_tree);
        text += &table("LEVELS", "The 16 NF4 levels.", LEVELS.map(f32::to_bits).into_iter());
        text += &table(
            "CELLS",
            "32 boundaries between codes, one per cell of [-1, 1]; then the 32 codes below them.",
            boundaries.map(f32::to_bits).into_iter().chain(codes),
        );
        text += &table(
            "NESTED_MIDPOINTS",
            "Midpoints of the dynamic map as a search tree: children of node i are 2i and 2i + 1.",
            midpoints_tree.map(f32::to_bits).into_iter(),
        );
        text
    }

    #[test]
    fn codebook_cuh_is_written_from_codebook_rs() {
        if std::env::var_os("WRITE_CODEBOOK").is_some() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/codebook.cuh");
            std::fs::write(path, codebook()).expect("cuda/ is writable");
            return;
        }
        let found = SOURCES.iter().find(|(name, _)| *name == "codebook.cuh").map(|(_, text)| *text);
        assert_eq!(found, Some(codebook().as_str()), "run WRITE_CODEBOOK=1 cargo test codebook");
    }

    #[test]
    fn a_cell_and_one_comparison_give_the_nearest_code() {
        let (boundaries, codes) = cells();
        let near = BOUNDARIES.iter().flat_map(|b| [b.next_down(), *b, b.next_up()]);
        let even = (-1_010_000..=1_010_000).map(|i| i as f32 / 1e6);
        for x in even.chain(near) {
            let code = codes[cell(x)] + u32::from(x > boundaries[cell(x)]);
            assert_eq!(code, u32::from(nearest_code(x)), "{x}");
        }
    }
}
