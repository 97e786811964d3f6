//! Products with a packed matrix: the choice between the two ways to compute them.

use crate::element::Element;
use crate::error::Error;
use crate::few_rows;
use crate::gemm::{Direction, LowRank, Product};
use crate::simd::Kernels;
use half::{bf16, f16};

/// A float type of activations and gradients.
pub trait Activation: Element {
    /// Write the product by decoding blocks of weights (`gemm.rs`).
    ///
    /// # Errors
    /// [`Error::Operand`] when an operand has another length than the shapes ask for.
    fn write_blocks(
        product: &Product<'_, Self>,
        kernels: &Kernels,
        out: &mut [Self],
        threads: usize,
    ) -> Result<(), Error>;
    /// Up to how many rows of activations the few-row kernel is the faster one.
    fn few_rows(kernels: &Kernels) -> usize;
}

/// Write `product` to `out`, by the faster way for its number of rows.
///
/// # Errors
/// [`Error::Operand`] when an operand has another length than the shapes ask for.
pub fn write<T: Activation>(
    product: &Product<'_, T>,
    kernels: &Kernels,
    out: &mut [T],
    threads: usize,
) -> Result<(), Error> {
    if product.direction == Direction::Forward && product.tokens <= T::few_rows(kernels) {
        few_rows::write(product, kernels, out, threads)
    } else {
        T::write_blocks(product, kernels, out, threads)
    }
}

impl Activation for f32 {
    fn write_blocks(
        product: &Product<'_, Self>,
        kernels: &Kernels,
        out: &mut [Self],
        threads: usize,
    ) -> Result<(), Error> {
        product.write(kernels, out, threads)
    }
    fn few_rows(kernels: &Kernels) -> usize {
        kernels.few_rows[0]
    }
}

impl Activation for bf16 {
    fn write_blocks(
        product: &Product<'_, Self>,
        kernels: &Kernels,
        out: &mut [Self],
        threads: usize,
    ) -> Result<(), Error> {
        product.write(kernels, out, threads)
    }
    fn few_rows(kernels: &Kernels) -> usize {
        kernels.few_rows[1]
    }
}

/// No instruction set here multiplies f16 panels, so they are computed in f32, some tokens at a time.
impl Activation for f16 {
    fn write_blocks(
        product: &Product<'_, Self>,
        kernels: &Kernels,
        out: &mut [Self],
        threads: usize,
    ) -> Result<(), Error> {
        /// f32 values that a step may hold beyond its operands: 4 MiB.
        const VALUES: usize = 1 << 20;
        product.check(out.len())?;
        let (outputs, depth) = (product.outputs(), product.depth());
        if out.is_empty() {
            return Ok(());
        }
        let widen = |values: &[f16]| {
            let mut wide = vec![0.0_f32; values.len()];
            f16::widen(kernels, values, &mut wide);
            wide
        };
        let bias = product.bias.map(widen);
        let factor = product.low_rank.map(|low_rank| widen(low_rank.factor));
        let step = (VALUES / (outputs + depth)).max(1);
        for (i, out) in out.chunks_mut(step * outputs).enumerate() {
            let (first, tokens) = (i * step, out.len() / outputs);
            let activations = widen(&product.activations[first * depth..(first + tokens) * depth]);
            let hidden =
                product.low_rank.map(|l| widen(&l.hidden[first * l.rank..(first + tokens) * l.rank]));
            let low_rank = match (&hidden, &factor, product.low_rank) {
                (Some(hidden), Some(factor), Some(l)) => Some(LowRank { hidden, factor, rank: l.rank }),
                _ => None,
            };
            let wide = Product {
                direction: product.direction,
                matrix: product.matrix,
                activations: &activations,
                tokens,
                low_rank,
                bias: bias.as_deref(),
            };
            let mut result = vec![0.0_f32; out.len()];
            wide.write(kernels, &mut result, threads)?;
            for (out, result) in out.iter_mut().zip(result) {
                *out = f16::from_f32(result);
            }
        }
        Ok(())
    }
    fn few_rows(kernels: &Kernels) -> usize {
        kernels.few_rows[0]
    }
}
