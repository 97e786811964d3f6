//! The three float types that weights and activations come in.

use crate::gemm::tile::{PANEL, Tile};
use crate::simd::{self, Kernels};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::Range;

/// A float that the format reads and writes: f32, f16 or bf16.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// The distance from 1 to the next value.
    const EPSILON: f32;
    /// Exact: every value of the three types is an f32.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// The same values if this type is bf16, whose products some CPUs compute directly.
    #[must_use]
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
    /// The same values if this type is f32.
    #[must_use]
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
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
    /// Sums → results: see [`crate::simd::Finish`].
    fn finish(
        kernels: &Kernels,
        sums: &mut [Tile; 4],
        transpose: bool,
        bias: &[f32; PANEL],
        out: &mut [[Self; PANEL]; PANEL],
    );
}

/// Floats of one of the three types.
#[derive(Clone, Copy, Debug)]
pub enum Floats<'a> {
    /// float32
    F32(&'a [f32]),
    /// float16
    F16(&'a [f16]),
    /// bfloat16
    Bf16(&'a [bf16]),
}

impl<'a> Floats<'a> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Floats::F32(values) => values.len(),
            Floats::F16(values) => values.len(),
            Floats::Bf16(values) => values.len(),
        }
    }

    /// Whether there are no values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values in `range`.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Floats<'a> {
        match self {
            Floats::F32(values) => Floats::F32(&values[range]),
            Floats::F16(values) => Floats::F16(&values[range]),
            Floats::Bf16(values) => Floats::Bf16(&values[range]),
        }
    }

    /// Ask for values that will be read soon.
    pub fn fetch(&self, range: Range<usize>) {
        match self {
            Floats::F32(values) => simd::fetch_soon(&values[range]),
            Floats::F16(values) => simd::fetch_soon(&values[range]),
            Floats::Bf16(values) => simd::fetch_soon(&values[range]),
        }
    }

    /// Write the values from `first` on as f32.
    pub fn widen(&self, kernels: &Kernels, first: usize, out: &mut [f32]) {
        let range = first..first + out.len();
        match self {
            Floats::F32(values) => out.copy_from_slice(&values[range]),
            Floats::F16(values) => f16::widen(kernels, &values[range], out),
            Floats::Bf16(values) => bf16::widen(kernels, &values[range], out),
        }
    }

    /// The values in `range` as f32: themselves, or converted into `scratch`, which is as long at least.
    pub fn widened<'b>(
        &'b self,
        kernels: &Kernels,
        range: Range<usize>,
        scratch: &'b mut [f32],
    ) -> &'b [f32] {
        if let Floats::F32(values) = self {
            return &values[range];
        }
        let scratch = &mut scratch[..range.len()];
        self.widen(kernels, range.start, scratch);
        scratch
    }

    /// Write the values from `first` on as bf16, rounded to nearest, ties to even.
    pub fn narrow(&self, first: usize, out: &mut [bf16]) {
        let range = first..first + out.len();
        match self {
            Floats::F32(values) => round(&values[range], out),
            Floats::F16(values) => round(&values[range], out),
            Floats::Bf16(values) => out.copy_from_slice(&values[range]),
        }
    }
}

fn round<T: Element>(values: &[T], out: &mut [bf16]) {
    for (value, out) in values.iter().zip(out) {
        *out = bf16::from_f32(value.to_f32());
    }
}

impl Element for f32 {
    const EPSILON: f32 = f32::EPSILON;
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
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
    fn finish(
        k: &Kernels,
        sums: &mut [Tile; 4],
        transpose: bool,
        bias: &[f32; PANEL],
        out: &mut [[Self; PANEL]; PANEL],
    ) {
        (k.finish_f32)(sums, transpose, bias, out);
    }
}

impl Element for f16 {
    const EPSILON: f32 = f16::EPSILON.to_f32_const();
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
    fn finish(
        k: &Kernels,
        sums: &mut [Tile; 4],
        transpose: bool,
        bias: &[f32; PANEL],
        out: &mut [[Self; PANEL]; PANEL],
    ) {
        let mut wide = [[0.0; PANEL]; PANEL];
        (k.finish_f32)(sums, transpose, bias, &mut wide);
        out.as_flattened_mut().convert_from_f32_slice(wide.as_flattened());
    }
}

impl Element for bf16 {
    const EPSILON: f32 = bf16::EPSILON.to_f32_const();
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
    fn finish(
        k: &Kernels,
        sums: &mut [Tile; 4],
        transpose: bool,
        bias: &[f32; PANEL],
        out: &mut [[Self; PANEL]; PANEL],
    ) {
        (k.finish_bf16)(sums, transpose, bias, out);
    }
}
