//! Operands of products for the measuring programs, and the check of a result before it is measured.

use half::bf16;
use qlora_rs_core::codebook::{DYNAMIC_MAP, NESTED_BLOCK};
use qlora_rs_core::dequantize::dequantize_tile;
use qlora_rs_core::element::Element;
use qlora_rs_core::gemm::{Direction, Product};
use qlora_rs_core::simd::{Kernels, portable};
use qlora_rs_core::{Error, PackedMatrix, Scales};

/// The block size that models come in.
pub const BLOCK_SIZE: usize = 64;

/// An activation type whose products are measured.
pub trait Measured: Element {
    /// Largest error of a sum, divided by the sum of its terms' magnitudes: bf16 weights, products
    /// and results are rounded to eight bits.
    const TOLERANCE: f64;
}

impl Measured for f32 {
    const TOLERANCE: f64 = 1e-5;
}

impl Measured for bf16 {
    const TOLERANCE: f64 = 1e-2;
}

/// One of the two ways to compute a product: `few_rows::write` or `matmul::write_blocks`.
pub type Write<T> = fn(&Product<'_, T>, &Kernels, &mut [T], &mut [T], usize) -> Result<(), Error>;

/// The same numbers in [-1, 1) every time, from Knuth's linear congruential generator.
pub fn numbers(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed | 1;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    }
}

/// `count` of these numbers in the type T.
pub fn values<T: Element>(count: usize, seed: u64) -> Vec<T> {
    let mut next = numbers(seed);
    (0..count).map(|_| T::from_f32(next())).collect()
}

/// A double-quantized weight of random codes, whose products take the time of any other's.
pub struct Weight {
    codes: Vec<u8>,
    absmax: Vec<u8>,
    nested_absmax: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Weight {
    /// A weight of `rows` outputs and `columns` inputs.
    pub fn new(rows: usize, columns: usize) -> Self {
        let mut next = numbers(1);
        let mut bytes = |count: usize| (0..count).map(|_| ((next() + 1.0) * 128.0) as u8).collect();
        let blocks = (rows * columns).div_ceil(BLOCK_SIZE);
        Self {
            codes: bytes((rows * columns).div_ceil(2)),
            absmax: bytes(blocks),
            nested_absmax: vec![0.5; blocks.div_ceil(NESTED_BLOCK)],
            rows,
            columns,
        }
    }

    /// The matrix that kernels take.
    pub fn matrix(&self) -> PackedMatrix<'_> {
        let scales = Scales::Nested {
            codes: &self.absmax,
            absmax: &self.nested_absmax,
            offset: 1.0,
            map: &DYNAMIC_MAP,
        };
        PackedMatrix::new(&self.codes, scales, self.rows, self.columns, BLOCK_SIZE).expect("lengths fit")
    }

    /// All weights, decoded by the portable path.
    pub fn dense(&self) -> Vec<f32> {
        let mut dense = vec![0.0; self.rows * self.columns];
        let (rows, columns) = (0..self.rows, 0..self.columns);
        dequantize_tile(&portable::KERNELS, &self.matrix(), rows, columns, &mut dense, 1)
            .expect("lengths fit");
        dense
    }
}

/// Stop unless results at the corners and in the middle are those of f64 sums.
///
/// The crate's tests check every element on every path; this keeps a broken build from being
/// measured.
pub fn check<T: Measured>(product: &Product<'_, T>, dense: &[f32], out: &[T]) {
    let (outputs, depth, columns) = (product.outputs(), product.depth(), product.matrix.columns());
    for (token, output) in [(0, 0), (product.tokens / 2, outputs / 2), (product.tokens - 1, outputs - 1)] {
        let (mut sum, mut size) = (0.0, 0.0);
        for k in 0..depth {
            let weight = match product.direction {
                Direction::Forward => dense[output * columns + k],
                Direction::Backward => dense[k * columns + output],
            };
            let term = f64::from(product.activations[token * depth + k].to_f32()) * f64::from(weight);
            sum += term;
            size += term.abs();
        }
        let got = f64::from(out[token * outputs + output].to_f32());
        assert!(
            (got - sum).abs() <= T::TOLERANCE * size,
            "row {token}, output {output} is {got}, must be {sum}: not measured"
        );
    }
}
