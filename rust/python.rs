//! The private extension module `qlora_rs._rust`: its list of exports, nothing else.

mod arguments;
mod dense;
mod exceptions;
mod functions;
mod gated;
mod merging;
mod norms;
mod rotary;

use pyo3::prelude::*;

/// Compute core of `qlora_rs`; use the public names of the package instead.
#[pymodule(name = "_rust", gil_used = false)]
mod extension {
    #[pymodule_export]
    use super::dense::multiply_dense;
    #[pymodule_export]
    use super::functions::{
        cpu_path, cpu_paths, cross_entropy, cuda_source, dequantize, double_quantize, dynamic_map,
        factor_gradients, levels, multiply, quantize, refuse_non_finite,
    };
    #[pymodule_export]
    use super::gated::{gated, gated_gradients};
    #[pymodule_export]
    use super::merging::{merge_calibrate, merge_curvature, merge_factor_length, merge_moment};
    #[pymodule_export]
    use super::norms::rms_norm;
    #[pymodule_export]
    use super::rotary::rotate;

    use super::{Bound, PyModule, PyModuleMethods, PyResult, exceptions};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::parallel::remember_process();
        exceptions::register(module)?;
        module.add("FEW_DENSE_TOKENS", crate::dense_rows::MOST_TOKENS)?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
