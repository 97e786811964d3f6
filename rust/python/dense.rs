//! Arguments of a product with a dense weight.

use super::arguments::{Argument, Scalar};
use super::functions::for_element;
use crate::element::Element;
use crate::gemm::Direction;
use crate::gemm::dense::DenseProduct;
use crate::{matmul, simd};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

/// `tokens` rows of activations times the dense weight [rows, columns], transposed unless `backward`,
/// plus a bias, into `out`.
#[pyfunction]
pub fn multiply_dense(
    py: Python<'_>,
    backward: bool,
    activations: &Bound<'_, PyCapsule>,
    tokens: usize,
    weight: &Bound<'_, PyCapsule>,
    shape: (usize, usize),
    bias: Option<Bound<'_, PyCapsule>>,
    out: &Bound<'_, PyCapsule>,
    threads: usize,
) -> PyResult<()> {
    let operands = Operands {
        direction: if backward { Direction::Backward } else { Direction::Forward },
        activations: Argument::new("activations", activations)?,
        tokens,
        weight: Argument::new("weight", weight)?,
        shape,
        bias: bias.map(|bias| Argument::new("bias", &bias)).transpose()?,
    };
    let out = Argument::new("out", out)?;
    return for_element!(out, run(py, &operands, out, threads));

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        operands: &Operands<'_>,
        mut out: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let Operands { direction, tokens, shape: (rows, columns), .. } = *operands;
        let product = DenseProduct {
            direction,
            weight: operands.weight.floats()?,
            rows,
            columns,
            activations: operands.activations.slice::<T>()?,
            tokens,
            bias: operands.bias.as_ref().map(Argument::slice::<T>).transpose()?,
        };
        let (kernels, out) = (simd::kernels()?, out.slice_mut::<T>()?);
        Ok(py.detach(|| matmul::write_dense(&product, kernels, out, threads))?)
    }
}

/// The operands before their element type is known.
struct Operands<'py> {
    direction: Direction,
    activations: Argument<'py>,
    tokens: usize,
    weight: Argument<'py>,
    shape: (usize, usize),
    bias: Option<Argument<'py>>,
}
