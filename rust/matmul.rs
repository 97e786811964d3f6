//! Products with a packed matrix: the choice between the ways to compute them.

use crate::element::Element;
use crate::error::Error;
use crate::few_rows;
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
    // bf16 is multiplied as such where the CPU has a fast instruction for that.
    let in_bf16 = kernels.bf16.is_some() && T::as_bf16(product.activations).is_some();
    let few = product.tokens <= kernels.few_rows[usize::from(in_bf16)];
    if few && product.direction == Direction::Forward {
        few_rows::write(product, kernels, out, hidden, threads)
    } else if in_bf16 {
        product.write::<bf16>(kernels, out, hidden, threads)
    } else {
        product.write::<f32>(kernels, out, hidden, threads)
    }
}
