//! Arguments of a product with a dense weight.

use super::arguments::{Argument, Scalar};
use super::functions::for_element;
use crate::dense_rows::DenseRows;
use crate::element::Element;
use crate::simd;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

/// `tokens` rows of `columns` activations times the transposed dense weight, plus a bias, into `out`.
#[pyfunction]
pub fn dense_rows(
    py: Python<'_>,
    x: &Bound<'_, PyCapsule>,
    tokens: usize,
    columns: usize,
    weight: &Bound<'_, PyCapsule>,
    bias: Option<Bound<'_, PyCapsule>>,
    out: &Bound<'_, PyCapsule>,
    threads: usize,
) -> PyResult<()> {
    let (x, weight) = (Argument::new("x", x)?, Argument::new("weight", weight)?);
    let bias = bias.map(|bias| Argument::new("bias", &bias)).transpose()?;
    let out = Argument::new("out", out)?;
    return for_element!(x, run(py, &x, (tokens, columns), &weight, bias.as_ref(), out, threads));

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        x: &Argument<'_>,
        (tokens, columns): (usize, usize),
        weight: &Argument<'_>,
        bias: Option<&Argument<'_>>,
        mut out: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let (x, weight) = (x.slice::<T>()?, weight.slice::<T>()?);
        let bias = bias.map(Argument::slice::<T>).transpose()?;
        let product = DenseRows { weight, x, bias, tokens, columns };
        let (kernels, out) = (simd::kernels()?, out.slice_mut::<T>()?);
        Ok(py.detach(|| product.write(kernels, out, threads))?)
    }
}
