//! The three float types that weights and activations come in.

use crate::simd::Kernels;
use half::{bf16, f16};

/// A float that the format reads and writes: f32, f16 or bf16.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// Exact: every value of the three types is an f32.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// The same values if this type is bf16, whose products some CPUs compute directly.
    #[must_use]
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
    /// Convert a run of values to f32.
    fn widen(kernels: &Kernels, values: &[Self], out: &mut [f32]);
    /// Round a run of f32 to this type, to nearest, ties to even.
    fn narrow(kernels: &Kernels, values: &[f32], out: &mut [Self]);
    /// Decode whole blocks: see [`Kernels::dequantize_f32`].
    fn dequantize_blocks(
        kernels: &Kernels,
        codes: &[u8],
        absmax: &[f32],
        block_size: usize,
        out: &mut [Self],
    );
}

impl Element for f32 {
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
    fn widen(_: &Kernels, values: &[Self], out: &mut [f32]) {
        out.copy_from_slice(values);
    }
    fn narrow(_: &Kernels, values: &[f32], out: &mut [Self]) {
        out.copy_from_slice(values);
    }
    fn dequantize_blocks(k: &Kernels, codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [Self]) {
        (k.dequantize_f32)(codes, absmax, block_size, out);
    }
}

impl Element for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
    fn widen(kernels: &Kernels, values: &[Self], out: &mut [f32]) {
        (kernels.widen_f16)(values, out);
    }
    fn narrow(kernels: &Kernels, values: &[f32], out: &mut [Self]) {
        (kernels.narrow_f16)(values, out);
    }
    fn dequantize_blocks(k: &Kernels, codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [Self]) {
        (k.dequantize_f16)(codes, absmax, block_size, out);
    }
}

impl Element for bf16 {
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn as_bf16(values: &[Self]) -> Option<&[bf16]> {
        Some(values)
    }
    fn widen(kernels: &Kernels, values: &[Self], out: &mut [f32]) {
        (kernels.widen_bf16)(values, out);
    }
    fn narrow(kernels: &Kernels, values: &[f32], out: &mut [Self]) {
        (kernels.narrow_bf16)(values, out);
    }
    fn dequantize_blocks(k: &Kernels, codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [Self]) {
        (k.dequantize_bf16)(codes, absmax, block_size, out);
    }
}
