//! The Python face: one class, one exception. The package `ptx_emulator` wraps it for numpy.

use crate::launch::{Argument, BufferArgument, Module};
use crate::options::{AsyncTiming, MatrixModel, Options, Schedule};
use crate::refusal::Refusal as CoreRefusal;
use pyo3::create_exception;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

create_exception!(ptx_emulator, NativeRefusal, PyRuntimeError, "A refused kernel: (complaint, message).");

fn refused(refusal: CoreRefusal) -> PyErr {
    NativeRefusal::new_err((refusal.complaint.name(), refusal.message))
}

/// An argument from Python: bytes of a value, or a buffer as (name, bytes, offset, defined, read_only).
#[derive(FromPyObject)]
enum PythonArgument {
    Value(Vec<u8>),
    Buffer((String, Vec<u8>, u64, bool, bool)),
}

#[pyclass(name = "Module", frozen)]
struct PythonModule {
    module: Module,
}

#[pymethods]
impl PythonModule {
    #[new]
    fn new(ptx: &str) -> PyResult<Self> {
        Ok(Self { module: Module::parse(ptx).map_err(refused)? })
    }

    fn kernels(&self) -> Vec<String> {
        self.module.kernels().to_vec()
    }

    fn target(&self) -> &str {
        self.module.target()
    }

    fn parameters(&self, kernel: &str) -> PyResult<Vec<(String, usize, bool)>> {
        self.module.parameters(kernel).map_err(refused)
    }

    /// Returns the buffers' bytes, (number, first offset) of those never written, the module's variables, the report as JSON and as a table.
    #[pyo3(signature = (kernel, arguments, grid, block, shared, schedule, seed, timing, model, workers, limit, blocks, resident, races, barriers))]
    #[allow(clippy::type_complexity, clippy::too_many_arguments, clippy::needless_pass_by_value)]
    fn launch<'py>(
        &self,
        py: Python<'py>,
        kernel: &str,
        arguments: Vec<PythonArgument>,
        grid: [u32; 3],
        block: [u32; 3],
        shared: usize,
        schedule: &str,
        seed: u64,
        timing: &str,
        model: &str,
        workers: usize,
        limit: u64,
        blocks: Option<Vec<u64>>,
        resident: usize,
        races: bool,
        barriers: bool,
    ) -> PyResult<(
        Vec<Bound<'py, PyBytes>>,
        Vec<Option<(usize, usize)>>,
        Vec<(String, Bound<'py, PyBytes>)>,
        String,
        String,
    )> {
        let options = Options {
            schedule: match schedule {
                "ascending" => Schedule::Ascending,
                "descending" => Schedule::Descending,
                "ahead" => Schedule::Ahead,
                "random" => Schedule::Random(seed),
                other => {
                    return Err(PyValueError::new_err(format!(
                        "no schedule `{other}`: use ascending, descending, ahead or random:SEED"
                    )));
                }
            },
            async_timing: match timing {
                "latest" => AsyncTiming::Latest,
                "earliest" => AsyncTiming::Earliest,
                other => {
                    return Err(PyValueError::new_err(format!(
                        "no async timing `{other}`: use latest or earliest"
                    )));
                }
            },
            matrix_model: match model {
                "exact" => MatrixModel::Exact,
                "sequential" => MatrixModel::Sequential,
                "a100" => MatrixModel::A100,
                "h100" => MatrixModel::H100,
                other => {
                    return Err(PyValueError::new_err(format!(
                        "no matrix model `{other}`: use exact, sequential, a100 or h100"
                    )));
                }
            },
            workers,
            instruction_limit: limit,
            blocks,
            resident,
            races,
            barriers,
        };
        let arguments: Vec<Argument> = arguments
            .into_iter()
            .map(|argument| match argument {
                PythonArgument::Value(bytes) => Argument::Value(bytes),
                PythonArgument::Buffer((name, bytes, offset, defined, read_only)) => {
                    Argument::Buffer(BufferArgument { name, bytes, offset, defined, read_only })
                }
            })
            .collect();
        let outcome = py
            .detach(|| self.module.launch(kernel, &arguments, grid, block, shared, &options))
            .map_err(refused)?;
        let buffers = outcome.buffers.iter().map(|bytes| PyBytes::new(py, bytes)).collect();
        let variables =
            outcome.variables.iter().map(|(name, bytes)| (name.clone(), PyBytes::new(py, bytes))).collect();
        let unwritten =
            outcome.unwritten.iter().map(|part| part.map(|part| (part.bytes, part.first))).collect();
        Ok((buffers, unwritten, variables, outcome.report.json(), outcome.report.table(20)))
    }
}

/// The extension module.
#[pymodule(name = "_native", gil_used = false)]
mod extension {
    #[pymodule_export]
    use super::PythonModule;

    use super::{Bound, NativeRefusal, PyModule, PyModuleMethods, PyResult};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("NativeRefusal", module.py().get_type::<NativeRefusal>())
    }
}
