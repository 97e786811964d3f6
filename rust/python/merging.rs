//! The merge solver for Python: the same duties as `functions.rs`.

use super::arguments::{Argument, Scalar};
use super::functions::{Packed, PackedArguments};
use crate::element::Element;
use crate::merge::coupling::{self, Coupling};
use crate::merge::curvature::{self, Buffers, Curvature};
use crate::merge::{self, Effort, Output, OutputScales, Problem, moment};
use crate::simd::{self, merging::merge_kernels};
use half::{bf16, f16};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

type Capsule<'py> = Bound<'py, PyCapsule>;

/// Floats that the factor of `columns` inputs takes.
#[pyfunction]
pub fn merge_factor_length(columns: usize, block_size: usize) -> usize {
    curvature::factor_length(columns, block_size)
}

/// Damp, order and factorize the statistics of a layer's inputs, into the given tensors; returns
/// what was added to the diagonal.
#[pyfunction]
pub fn merge_curvature(
    py: Python<'_>,
    statistics: &Capsule<'_>,
    columns: usize,
    block_size: usize,
    damping: f64,
    order: &Capsule<'_>,
    hessian: &Capsule<'_>,
    factor: &Capsule<'_>,
    threads: usize,
) -> PyResult<f64> {
    let statistics = Argument::new("statistics", statistics)?;
    let mut order = Argument::new("order", order)?;
    let mut hessian = Argument::new("hessian", hessian)?;
    let mut factor = Argument::new("factor", factor)?;
    let buffers =
        Buffers { order: order.slice_mut()?, hessian: hessian.slice_mut()?, factor: factor.slice_mut()? };
    let (kernels, statistics) = (merge_kernels()?, statistics.slice()?);
    Ok(py
        .detach(|| curvature::prepare(kernels, statistics, columns, block_size, damping, buffers, threads))?)
}

/// Add the lower triangle of xᵀ x to `total`; x is [tokens, columns].
#[pyfunction]
pub fn merge_moment(
    py: Python<'_>,
    x: &Capsule<'_>,
    columns: usize,
    total: &Capsule<'_>,
    threads: usize,
) -> PyResult<()> {
    let (x, total) = (Argument::new("x", x)?, Argument::new("total", total)?);
    return match x.element() {
        <f32 as Scalar>::ELEMENT => run::<f32>(py, &x, columns, total, threads),
        <f16 as Scalar>::ELEMENT => run::<f16>(py, &x, columns, total, threads),
        <bf16 as Scalar>::ELEMENT => run::<bf16>(py, &x, columns, total, threads),
        _ => Err(x.wrong_type("float32, float16 or bfloat16")),
    };

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        x: &Argument<'_>,
        columns: usize,
        mut total: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let (x, total) = (x.slice::<T>()?, total.slice_mut()?);
        let (kernels, merge) = (simd::kernels()?, merge_kernels()?);
        Ok(py.detach(|| moment::accumulate(kernels, merge, x, columns, total, threads))?)
    }
}

/// Codes and scales for `target`, starting from its plain rounding `nearest`, into the given
/// tensors; returns two numbers (start, end) per row. coupling: (first row, rows, F, what to add to
/// its diagonal); then those rows alone are solved.
#[pyfunction]
pub fn merge_calibrate(
    py: Python<'_>,
    target: &Capsule<'_>,
    nearest: Packed<'_>,
    shape: (usize, usize),
    block_size: usize,
    curvature: (Capsule<'_>, Capsule<'_>, Capsule<'_>),
    given: usize,
    sweeps: usize,
    tolerance: f32,
    feedback: bool,
    anneal: usize,
    codes: &Capsule<'_>,
    absmax: &Capsule<'_>,
    coupling: Option<(usize, usize, Capsule<'_>, f64)>,
    threads: usize,
) -> PyResult<Vec<f64>> {
    let target = Argument::new("target", target)?;
    let order = Argument::new("order", &curvature.0)?;
    let hessian = Argument::new("hessian", &curvature.1)?;
    let factor = Argument::new("factor", &curvature.2)?;
    let packed = PackedArguments::new(&nearest)?;
    let problem = Problem {
        target: target.slice()?,
        nearest: packed.matrix(shape, block_size)?,
        curvature: Curvature::new(order.slice()?, hessian.slice()?, factor.slice()?, shape.1, block_size),
        effort: Effort { given, sweeps, tolerance, feedback, anneal },
    };
    let mut codes = Argument::new("codes", codes)?;
    let mut absmax = Argument::new("absmax", absmax)?;
    let scales = if packed.is_nested() {
        OutputScales::Nested(absmax.slice_mut()?)
    } else {
        OutputScales::Single(absmax.slice_mut()?)
    };
    let mut objectives = vec![0.0; 2 * shape.0];
    let output = Output { codes: codes.slice_mut()?, scales, objectives: &mut objectives };
    let kernels = merge_kernels()?;
    if let Some((first, rows, moment, damping)) = &coupling {
        let moment = Argument::new("moment", moment)?;
        let coupling = Coupling { first: *first, rows: *rows, moment: moment.slice()?, damping: *damping };
        py.detach(|| coupling::calibrate(kernels, &problem, coupling, output, threads))?;
    } else {
        py.detach(|| merge::calibrate(kernels, &problem, output, threads))?;
    }
    Ok(objectives)
}
