//! Arguments of a rotation.

use super::arguments::{Argument, Scalar};
use super::functions::for_element;
use crate::element::Element;
use crate::gemm::Direction;
use crate::rotary::Rotary;
use crate::simd;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

type Capsule<'py> = Bound<'py, PyCapsule>;

/// Rotate each x [tokens, heads, dimensions] of `parts`, (x, heads, result), by the cosines and sines of
/// its positions; `backward`, a gradient.
#[pyfunction]
pub fn rotate(
    py: Python<'_>,
    backward: bool,
    cosine: &Capsule<'_>,
    sine: &Capsule<'_>,
    dimensions: usize,
    parts: Vec<(Capsule<'_>, usize, Capsule<'_>)>,
    threads: usize,
) -> PyResult<()> {
    let direction = if backward { Direction::Backward } else { Direction::Forward };
    let (cosine, sine) = (Argument::new("cosine", cosine)?, Argument::new("sine", sine)?);
    for (x, heads, out) in parts {
        let (x, out) = (Argument::new("x", &x)?, Argument::new("out", &out)?);
        for_element!(x, run(py, direction, (&cosine, &sine, dimensions), &x, heads, out, threads))?;
    }
    return Ok(());

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        direction: Direction,
        (cosine, sine, dimensions): (&Argument<'_>, &Argument<'_>, usize),
        x: &Argument<'_>,
        heads: usize,
        mut out: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let rotary = Rotary { cosine: cosine.slice::<T>()?, sine: sine.slice::<T>()?, dimensions };
        let (kernels, x, out) = (simd::kernels()?, x.slice::<T>()?, out.slice_mut::<T>()?);
        Ok(py.detach(|| rotary.rotate(kernels, direction, x, heads, out, threads))?)
    }
}
