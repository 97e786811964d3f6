//! Arguments of a gated activation.

use super::arguments::{Argument, Scalar};
use super::functions::for_element;
use crate::element::Element;
use crate::gated::Gated;
use crate::simd;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

type Capsule<'py> = Bound<'py, PyCapsule>;

/// silu(gate) up into `out`.
#[pyfunction]
pub fn gated(
    py: Python<'_>,
    gate: &Capsule<'_>,
    up: &Capsule<'_>,
    out: &Capsule<'_>,
    threads: usize,
) -> PyResult<()> {
    let (gate, up, out) =
        (Argument::new("gate", gate)?, Argument::new("up", up)?, Argument::new("out", out)?);
    return for_element!(gate, run(py, &gate, &up, out, threads));

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        gate: &Argument<'_>,
        up: &Argument<'_>,
        mut out: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let gated = Gated { gate: gate.slice::<T>()?, up: up.slice::<T>()? };
        let (kernels, out) = (simd::kernels()?, out.slice_mut::<T>()?);
        Ok(py.detach(|| gated.forward(kernels, out, threads))?)
    }
}

/// The gradients over gate and up into `grad_gate` and `grad_up`; `grad`, that of the result, becomes
/// the result.
#[pyfunction]
pub fn gated_gradients(
    py: Python<'_>,
    gate: &Capsule<'_>,
    up: &Capsule<'_>,
    grad: &Capsule<'_>,
    grad_gate: &Capsule<'_>,
    grad_up: &Capsule<'_>,
    threads: usize,
) -> PyResult<()> {
    let (gate, up) = (Argument::new("gate", gate)?, Argument::new("up", up)?);
    let outputs = [
        Argument::new("grad", grad)?,
        Argument::new("grad_gate", grad_gate)?,
        Argument::new("grad_up", grad_up)?,
    ];
    return for_element!(gate, run(py, &gate, &up, outputs, threads));

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        gate: &Argument<'_>,
        up: &Argument<'_>,
        [mut grad, mut grad_gate, mut grad_up]: [Argument<'_>; 3],
        threads: usize,
    ) -> PyResult<()> {
        let gated = Gated { gate: gate.slice::<T>()?, up: up.slice::<T>()? };
        let (grad, grad_gate) = (grad.slice_mut::<T>()?, grad_gate.slice_mut::<T>()?);
        let (kernels, grad_up) = (simd::kernels()?, grad_up.slice_mut::<T>()?);
        Ok(py.detach(|| gated.backward(kernels, grad, grad_gate, grad_up, threads))?)
    }
}
