//! The public face: load a module, launch a kernel, get buffers and counts back.

use crate::block::Launch;
use crate::decode::decode;
use crate::global::{Buffer, Memory, Unwritten};
use crate::grid;
use crate::layout::{BUFFER_BASE, GUARD_BYTES, ModuleBuffer, module_buffers};
use crate::options::Options;
use crate::parser::parse;
use crate::program::Program;
use crate::refusal::{Complaint, Refusal};
use crate::report::Report;
use crate::syntax;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A kernel argument.
#[derive(Clone, Debug)]
pub enum Argument {
    /// A value passed by copy, as its little-endian bytes.
    Value(Vec<u8>),
    /// A pointer to a buffer.
    Buffer(BufferArgument),
}

/// A buffer in global memory.
#[derive(Clone, Debug, Default)]
pub struct BufferArgument {
    /// Its name in messages.
    pub name: String,
    /// Its bytes at the start of the launch.
    pub bytes: Vec<u8>,
    /// Where these bytes stand behind the pointer that the kernel receives. Bytes before and after them
    /// belong to nobody; so a window into a huge tensor, or a misaligned view, can be lent.
    pub offset: u64,
    /// False: nothing has been written yet, and reading before writing is refused.
    pub defined: bool,
    /// True: writing is refused.
    pub read_only: bool,
}

/// What a launch leaves behind.
#[derive(Debug)]
pub struct Outcome {
    /// The bytes of the buffer arguments, in the order of the arguments.
    pub buffers: Vec<Vec<u8>>,
    /// For each of them what nothing has written, if it was lent as undefined.
    pub unwritten: Vec<Option<Unwritten>>,
    /// Variables of the module in global memory, by name.
    pub variables: HashMap<String, Vec<u8>>,
    /// What was executed and moved.
    pub report: Report,
}

/// A module of PTX, parsed; its kernels are decoded when they are first launched.
#[derive(Debug)]
pub struct Module {
    syntax: syntax::Module,
    variables: Vec<ModuleBuffer>,
    addresses: HashMap<String, u64>,
    lines: Arc<Vec<String>>,
    programs: Mutex<HashMap<String, Arc<Program>>>,
}

impl Module {
    /// Parses PTX.
    ///
    /// # Errors
    /// A refusal that names the line, when the text is not understood.
    pub fn parse(ptx: &str) -> Result<Self, Refusal> {
        let syntax = parse(ptx)?;
        let variables = module_buffers(&syntax)?;
        let addresses = variables.iter().map(|variable| (variable.name.clone(), variable.address)).collect();
        let lines = Arc::new(ptx.lines().map(str::to_owned).collect());
        Ok(Self { syntax, variables, addresses, lines, programs: Mutex::new(HashMap::new()) })
    }

    /// Names of the kernels, in the order of the text.
    #[must_use]
    pub fn kernels(&self) -> &[String] {
        &self.syntax.entries
    }

    /// The `.target` of the module, such as `sm_80`.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.syntax.target
    }

    /// Name and size in bytes of a kernel's parameters, and whether each is a float.
    ///
    /// # Errors
    /// A refusal when the module has no such kernel or the kernel cannot be decoded.
    pub fn parameters(&self, kernel: &str) -> Result<Vec<(String, usize, bool)>, Refusal> {
        let program = self.program(kernel)?;
        Ok(program.parameters.iter().map(|p| (p.name.clone(), p.bytes, p.is_float)).collect())
    }

    fn program(&self, kernel: &str) -> Result<Arc<Program>, Refusal> {
        let mut programs = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = programs.get(kernel) {
            return Ok(program.clone());
        }
        let program = Arc::new(decode(&self.syntax, &self.addresses, &self.lines, kernel)?);
        programs.insert(kernel.to_owned(), program.clone());
        Ok(program)
    }

    /// Runs a kernel over a grid.
    ///
    /// # Errors
    /// A refusal when the launch is impossible or the kernel does what a GPU would corrupt.
    pub fn launch(
        &self,
        kernel: &str,
        arguments: &[Argument],
        grid: [u32; 3],
        block: [u32; 3],
        dynamic_shared: usize,
        options: &Options,
    ) -> Result<Outcome, Refusal> {
        let program = self.program(kernel)?;
        let impossible = |text: String| {
            Err(Refusal::new(Complaint::Launch, format!("kernel `{kernel}` cannot be launched: {text}")))
        };
        let threads: u64 = block.iter().map(|&size| u64::from(size)).product();
        let limit = u64::from(program.max_threads.unwrap_or(1024).min(1024));
        if threads == 0 || threads > limit || grid.contains(&0) {
            return impossible(format!(
                "grid {grid:?} of blocks {block:?} ({threads} threads); a block has 1 to {limit}"
            ));
        }
        if arguments.len() != program.parameters.len() {
            return impossible(format!(
                "{} arguments for {} parameters",
                arguments.len(),
                program.parameters.len()
            ));
        }
        let shared = program.dynamic_shared + dynamic_shared;
        if shared > 227 * 1024 {
            return impossible(format!("{shared} bytes of shared memory; a block has at most 232448"));
        }
        let blocks: u64 = grid.iter().map(|&size| u64::from(size)).product();
        if let Some(index) = options.blocks.iter().flatten().find(|&&index| index >= blocks) {
            return impossible(format!("block {index} of {blocks}"));
        }
        let mut parameters = vec![0; program.parameter_bytes];
        let mut buffers = Vec::new();
        let mut names = Vec::new();
        let mut next = BUFFER_BASE;
        for (argument, parameter) in arguments.iter().zip(&program.parameters) {
            let place = parameter.offset..parameter.offset + parameter.bytes;
            match argument {
                Argument::Value(bytes) if bytes.len() == parameter.bytes => {
                    parameters[place].copy_from_slice(bytes);
                }
                Argument::Value(bytes) => {
                    return impossible(format!(
                        "parameter `{}` has {} bytes, the argument {}",
                        parameter.name,
                        parameter.bytes,
                        bytes.len()
                    ));
                }
                Argument::Buffer(_) if parameter.bytes != 8 => {
                    return impossible(format!("parameter `{}` is no pointer", parameter.name));
                }
                Argument::Buffer(buffer) => {
                    let name =
                        if buffer.name.is_empty() { parameter.name.clone() } else { buffer.name.clone() };
                    parameters[place].copy_from_slice(&next.to_le_bytes());
                    let base = next + buffer.offset;
                    let end = buffer.offset + buffer.bytes.len() as u64;
                    next += end.next_multiple_of(512) + GUARD_BYTES;
                    names.push(base);
                    buffers.push(Buffer::new(name, base, &buffer.bytes, buffer.defined, buffer.read_only));
                }
            }
        }
        for variable in &self.variables {
            buffers.push(Buffer::new(
                variable.name.clone(),
                variable.address,
                &variable.bytes,
                true,
                variable.read_only,
            ));
        }
        let memory = Memory::new(buffers);
        let launch = Launch {
            program: &program,
            memory: &memory,
            parameters: &parameters,
            options,
            grid,
            block,
            dynamic_shared,
        };
        let counters = grid::run(&launch)?;
        let report = Report::new(&program, &counters, &memory);
        let lent: Vec<Option<&Buffer>> =
            names.iter().map(|base| memory.buffers().iter().find(|buffer| buffer.base == *base)).collect();
        let variables = self.variables.iter().filter(|variable| !variable.read_only);
        Ok(Outcome {
            buffers: lent.iter().map(|buffer| buffer.map_or(Vec::new(), Buffer::content)).collect(),
            unwritten: lent.iter().map(|buffer| buffer.and_then(Buffer::unwritten)).collect(),
            variables: variables
                .filter_map(|variable| memory.by_name(&variable.name))
                .map(|buffer| (buffer.name.clone(), buffer.content()))
                .collect(),
            report,
        })
    }
}
