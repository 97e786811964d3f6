//! Core errors → the Python class `QloraError(ValueError)`.

use crate::error::Error;
use pyo3::create_exception;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

create_exception!(
    qlora_rs,
    QloraError,
    PyValueError,
    "An input that qlora_rs refuses; the message says what is wrong and how to mend it."
);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        QloraError::new_err(error.to_string())
    }
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("QloraError", module.py().get_type::<QloraError>())
}
