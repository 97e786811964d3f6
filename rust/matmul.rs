//! Products with a packed or a dense matrix: the choice between the ways to compute them.

use crate::dense_rows;
use crate::element::Element;
use crate::error::Error;
use crate::few_rows;
use crate::gemm::dense::DenseProduct;
use crate::gemm::{Direction, Product};
use crate::simd::Kernels;
use half::bf16;

/// Write `product` to `out` [tokens, outputs] and the bottleneck's activations to `hidden`
/// [tokens, rank], by the faster way for its number of rows.
///
/// # Errors
/// [`Error::Operand`] when an operand has another length than the shapes ask for.
pub fn write<T: Element>(
    product: &Product<'_, T>,
    kernels: &Kernels,
    out: &mut [T],
    hidden: &mut [T],
    threads: usize,
) -> Result<(), Error> {
    let [few, few_in_16_bits] = kernels.few_rows;
    let in_16_bits = in_bf16::<T>(kernels) || size_of::<T>() == 2 && kernels.panels_pairs.is_some();
    if product.direction == Direction::Forward {
        if product.tokens <= if in_16_bits { few.min(few_in_16_bits) } else { few } {
            return few_rows::write(product, kernels, out, hidden, threads);
        }
        // Activations that are refused there would be multiplied as f32, which does not pay here.
        if in_16_bits
            && product.tokens <= few_in_16_bits
            && few_rows::write_in_16_bits(product, kernels, out, hidden, threads)?
        {
            return Ok(());
        }
    }
    write_blocks(product, kernels, out, hidden, threads)
}

/// The same by decoding blocks of weights (`gemm.rs`), whatever the number of rows.
///
/// # Errors
/// As [`write`].
pub fn write_blocks<T: Element>(
    product: &Product<'_, T>,
    kernels: &Kernels,
    out: &mut [T],
    hidden: &mut [T],
    threads: usize,
) -> Result<(), Error> {
    if product.write_pairs(kernels, out, hidden, threads)? {
        return Ok(());
    }
    if in_bf16::<T>(kernels) {
        product.write::<bf16>(kernels, out, hidden, threads)
    } else {
        product.write::<f32>(kernels, out, hidden, threads)
    }
}

/// Write a product with a dense matrix to `out`, by the faster way for its number of rows.
///
/// # Errors
/// As [`write`].
pub fn write_dense<T: Element>(
    product: &DenseProduct<'_, T>,
    kernels: &Kernels,
    out: &mut [T],
    threads: usize,
) -> Result<(), Error> {
    if product.direction == Direction::Forward && product.tokens <= dense_rows::MOST_TOKENS {
        dense_rows::write(product, kernels, out, threads)
    } else {
        product.write(kernels, out, threads)
    }
}

/// Whether activations of type T are multiplied as bf16: where the CPU has a fast instruction for it.
fn in_bf16<T: Element>(kernels: &Kernels) -> bool {
    kernels.bf16.is_some() && T::as_bf16(&[]).is_some()
}
