//! Arguments of normalization.

use super::arguments::{Argument, Scalar};
use super::functions::for_element;
use crate::element::Element;
use crate::rms_norm::RmsNorm;
use crate::simd;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

/// Rows of `x` normalized by their root mean square, times `weight`, into `out`; with `grad`, that of
/// the result, the gradient over x instead.
#[pyfunction]
pub fn rms_norm(
    py: Python<'_>,
    x: &Bound<'_, PyCapsule>,
    weight: &Bound<'_, PyCapsule>,
    epsilon: f32,
    grad: Option<Bound<'_, PyCapsule>>,
    out: &Bound<'_, PyCapsule>,
    threads: usize,
) -> PyResult<()> {
    let (x, weight) = (Argument::new("x", x)?, Argument::new("weight", weight)?);
    let grad = grad.map(|grad| Argument::new("grad", &grad)).transpose()?;
    let out = Argument::new("out", out)?;
    return for_element!(x, run(py, &x, &weight, epsilon, grad.as_ref(), out, threads));

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        x: &Argument<'_>,
        weight: &Argument<'_>,
        epsilon: f32,
        grad: Option<&Argument<'_>>,
        mut out: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let (x, norm) = (x.slice::<T>()?, RmsNorm { weight: weight.slice::<T>()?, epsilon });
        let grad = grad.map(Argument::slice::<T>).transpose()?;
        let (kernels, out) = (simd::kernels()?, out.slice_mut::<T>()?);
        Ok(py.detach(|| match grad {
            None => norm.forward(kernels, x, out, threads),
            Some(grad) => norm.backward(kernels, x, grad, out, threads),
        })?)
    }
}
