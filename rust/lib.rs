//! NF4 quantization and quantized LoRA compute.
//!
//! The modules follow the path of a weight: float weights are quantized to codes and absmax,
//! the absmax can be quantized again, the result is a [`PackedMatrix`], and products are
//! computed straight from it. No operation holds a whole dequantized matrix.

pub mod codebook;
pub mod cross_entropy;
pub mod cuda;
pub mod dense_rows;
pub mod dequantize;
pub mod double_quantize;
pub mod element;
pub mod error;
pub mod few_rows;
pub mod gated;
pub mod gemm;
pub mod matmul;
pub mod memory;
pub mod merge;
pub mod packed_matrix;
pub mod parallel;
pub mod quantize;
pub mod rms_norm;
pub mod rotary;
pub mod simd;

#[cfg(feature = "python")]
mod python;

pub use error::Error;
pub use packed_matrix::{PackedMatrix, Scales};
