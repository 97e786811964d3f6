//! Where things live: address windows, and the module's variables as memory.

use crate::refusal::{Complaint, Refusal};
use crate::syntax::{Function, Initial, Module, Operand, Statement, Variable};
use crate::types::Space;
use std::collections::{HashMap, HashSet};

/// Shared memory in the generic address space.
pub(crate) const SHARED_WINDOW: u64 = 0x7000_0000_0000;
/// Local memory (and parameters of device functions) in the generic address space.
pub(crate) const LOCAL_WINDOW: u64 = 0x7100_0000_0000;
/// Kernel parameters in the generic address space.
pub(crate) const PARAM_WINDOW: u64 = 0x7200_0000_0000;
/// Size of each window.
pub(crate) const WINDOW_BYTES: u64 = 1 << 32;
/// Variables of the module.
const MODULE_BASE: u64 = 0x7e00_0000_0000;
/// First address of shared memory. As on recent GPUs it is not zero, so that a forgotten base is caught.
pub(crate) const SHARED_BASE: u64 = 1024;
/// First address of local memory.
pub(crate) const LOCAL_BASE: u64 = 16;
/// Buffers of the launch.
pub(crate) const BUFFER_BASE: u64 = 0x1000_0000_0000;
/// Bytes between buffers that belong to nobody: more than a 32-bit index of 16-byte elements can reach.
pub(crate) const GUARD_BYTES: u64 = 1 << 36;

/// A variable of the module in global or constant memory.
#[derive(Clone, Debug)]
pub(crate) struct ModuleBuffer {
    pub(crate) name: String,
    pub(crate) address: u64,
    pub(crate) bytes: Vec<u8>,
    pub(crate) read_only: bool,
}

pub(crate) fn align_up(value: usize, align: usize) -> usize {
    value.div_ceil(align.max(1)) * align.max(1)
}

/// Addresses and initial contents of all global and constant variables.
pub(crate) fn module_buffers(module: &Module) -> Result<Vec<ModuleBuffer>, Refusal> {
    let mut address = MODULE_BASE;
    let mut addresses = HashMap::new();
    let globals: Vec<&Variable> =
        module.variables.iter().filter(|variable| variable.space != Space::Shared).collect();
    for variable in &globals {
        addresses.insert(variable.name.as_str(), address);
        address += (align_up(variable.bytes, 256) as u64) + GUARD_BYTES;
    }
    let mut buffers = Vec::new();
    for variable in globals {
        let mut bytes = Vec::with_capacity(variable.bytes);
        for item in &variable.initial {
            let value = match item {
                Initial::Bits(bits) => *bits,
                Initial::Address(name, offset) => {
                    let base = addresses.get(name.as_str()).ok_or_else(|| {
                        let text = format!(
                            "`{}` holds the address of `{name}`, which is no variable of the module",
                            variable.name
                        );
                        Refusal::new(Complaint::Syntax, text)
                    })?;
                    base.wrapping_add(*offset as u64)
                }
            };
            bytes.extend_from_slice(&value.to_le_bytes()[..variable.element.bytes().min(8)]);
        }
        bytes.resize(variable.bytes, 0);
        buffers.push(ModuleBuffer {
            name: variable.name.clone(),
            address: addresses[variable.name.as_str()],
            bytes,
            read_only: variable.space == Space::Const,
        });
    }
    Ok(buffers)
}

/// Names of module variables and functions that a function mentions.
fn mentioned<'a>(operand: &'a Operand, into: &mut HashSet<&'a str>) {
    match operand {
        Operand::Symbol(name, _) => {
            into.insert(name);
        }
        Operand::Vector(list) | Operand::List(list) => list.iter().for_each(|item| mentioned(item, into)),
        Operand::Address(base, _) | Operand::Not(base) => mentioned(base, into),
        Operand::Pair(a, b) => {
            mentioned(a, into);
            mentioned(b, into);
        }
        _ => {}
    }
}

/// A variable in shared memory.
#[derive(Clone, Debug)]
struct SharedName {
    name: String,
    offset: usize,
    /// None: to the end, as `extern __shared__` arrays reach.
    bytes: Option<usize>,
}

/// Names of the places in a kernel's shared memory, for messages.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedNames(Vec<SharedName>);

impl SharedNames {
    fn add(&mut self, variable: &Variable, offset: usize) {
        let bytes = (variable.bytes > 0).then_some(variable.bytes);
        self.0.push(SharedName { name: source_name(&variable.name).to_owned(), offset, bytes });
    }

    /// A place as a variable and an offset in it.
    pub(crate) fn place(&self, offset: usize) -> String {
        let holds = |found: &&SharedName| {
            let end = found.bytes.map_or(usize::MAX, |bytes| found.offset + bytes);
            (found.offset..end).contains(&offset)
        };
        match self.0.iter().find(holds) {
            Some(found) => format!("`{}` + {} in shared memory", found.name, offset - found.offset),
            None => format!("shared offset {offset}"),
        }
    }
}

/// The variable's own name in a mangled one: `part` of `_ZZ9block_sumE4part`. Names of the Itanium ABI end in the
/// length of the last part and that part, then perhaps `E` or the number of a twin.
fn source_name(mangled: &str) -> &str {
    if !mangled.starts_with("_Z") {
        return mangled;
    }
    let twin = mangled.trim_end_matches(|c: char| c.is_ascii_digit());
    let ends = [mangled, twin.strip_suffix('_').unwrap_or(mangled), mangled.trim_end_matches('E')];
    let parts = ends.iter().flat_map(|end| {
        (1..end.len()).filter_map(move |length| {
            let (before, part) = end.split_at_checked(end.len() - length)?;
            let starts = part.starts_with(|c: char| c == '_' || c.is_ascii_alphabetic());
            (starts && before.ends_with(&length.to_string())).then_some(part)
        })
    });
    parts.max_by_key(|part| part.len()).unwrap_or(mangled)
}

/// The shared memory of one kernel.
#[derive(Debug, Default)]
pub(crate) struct SharedLayout {
    /// Module variables by name.
    pub(crate) named: HashMap<String, u64>,
    /// Variables of functions by function name and index.
    pub(crate) scoped: HashMap<(String, u32), u64>,
    pub(crate) names: SharedNames,
    pub(crate) static_bytes: usize,
    pub(crate) dynamic_offset: usize,
}

/// Lays out the shared variables that the kernel, or a function it calls, names.
pub(crate) fn shared_layout(module: &Module, entry: &Function) -> SharedLayout {
    let mut layout = SharedLayout::default();
    let mut functions = vec![entry];
    let mut names: HashSet<&str> = HashSet::new();
    let mut next = 0;
    while next < functions.len() {
        let mut found = HashSet::new();
        for statement in &functions[next].body {
            if let Statement::Instruction(instruction) = statement {
                instruction.operands.iter().for_each(|operand| mentioned(operand, &mut found));
            }
        }
        for name in found {
            if let Some(function) = module.functions.get(name)
                && !functions.iter().any(|known| known.name == function.name)
            {
                functions.push(function);
            }
            names.insert(name);
        }
        next += 1;
    }
    let mut offset = 0;
    let mut shared_names = SharedNames::default();
    let mut place = |variable: &Variable| {
        offset = align_up(offset, variable.align);
        let address = SHARED_BASE + offset as u64;
        shared_names.add(variable, offset);
        offset += variable.bytes;
        address
    };
    let used =
        |variable: &&Variable| variable.space == Space::Shared && names.contains(variable.name.as_str());
    let mut dynamic_align = 16;
    for variable in module.variables.iter().filter(used) {
        if variable.bytes > 0 {
            let address = place(variable);
            layout.named.insert(variable.name.clone(), address);
        } else {
            dynamic_align = dynamic_align.max(variable.align);
        }
    }
    for function in functions {
        for (index, variable) in function.variables.iter().enumerate() {
            if variable.space == Space::Shared {
                layout.scoped.insert((function.name.clone(), index as u32), place(variable));
            }
        }
    }
    layout.static_bytes = offset;
    layout.dynamic_offset = align_up(offset, dynamic_align);
    for variable in module.variables.iter().filter(used) {
        if variable.bytes == 0 {
            shared_names.add(variable, layout.dynamic_offset);
            layout.named.insert(variable.name.clone(), SHARED_BASE + layout.dynamic_offset as u64);
        }
    }
    layout.names = shared_names;
    layout
}
