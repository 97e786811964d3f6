//! Up to how many rows of activations weights are decoded in registers (`few_rows.rs`), not in blocks
//! (`gemm.rs`): for f32 and f16, then for bf16.
//!
//! Data: `python -m benches.tune --write` measures both ways and writes this file. Each line names the
//! record of its measurement.

/// Not measured yet.
pub(super) const AMX: [usize; 2] = [8, 32];
/// Not measured yet.
pub(super) const AVX512: [usize; 2] = [8, 8];
/// Not measured yet.
pub(super) const AVX512_BF16: [usize; 2] = [8, 32];
/// Not measured yet.
pub(super) const AVX2: [usize; 2] = [6, 6];
/// Not measured yet.
pub(super) const PORTABLE: [usize; 2] = [4, 4];
