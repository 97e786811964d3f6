//! Up to how many rows of activations weights are decoded in registers (`few_rows.rs`), not in blocks
//! (`gemm.rs`): for f32, then for 16-bit types that are multiplied as such or in fixed point (measured: bf16).
//!
//! Data: `python -m benches.tune --write` measures both ways and writes this file. Each line names the
//! record of its measurement.

/// Not measured on such a CPU yet.
pub(super) const AMX: [usize; 2] = [8, 32];
/// benches/record/amd-epyc-avx512-bf16-2-cores/2026-11-25-tune.txt
pub(super) const AVX512: [usize; 2] = [24, 24];
/// benches/record/intel-r-xeon-r-processor-avx512-vnni-2-cores/2026-11-27-tune.txt
pub(super) const AVX512_VNNI: [usize; 2] = [24, 16];
/// benches/record/amd-epyc-avx512-bf16-2-cores/2026-11-25-tune.txt
pub(super) const AVX512_BF16: [usize; 2] = [24, 48];
/// benches/record/intel-r-xeon-r-processor-avx512-vnni-2-cores/2026-11-27-tune.txt
pub(super) const AVX2: [usize; 2] = [24, 24];
/// benches/record/intel-r-xeon-r-processor-avx512-vnni-2-cores/2026-11-27-tune.txt
pub(super) const AVX2_VNNI: [usize; 2] = [24, 8];
/// benches/record/amd-epyc-avx512-bf16-2-cores/2026-11-25-tune.txt
pub(super) const PORTABLE: [usize; 2] = [24, 24];
