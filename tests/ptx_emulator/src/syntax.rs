//! What the parser produces: a module's variables and functions, names resolved inside functions.

use crate::types::{Space, Type};
use std::collections::HashMap;

/// One entry of a variable's initial value.
#[derive(Clone, Debug)]
pub(crate) enum Initial {
    Bits(u64),
    /// The address of another variable plus an offset.
    Address(String, i64),
}

/// A variable: of the module, of a function, or a parameter.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) space: Space,
    pub(crate) align: usize,
    pub(crate) element: Type,
    /// Size in bytes; 0 for `extern` arrays without a length (dynamic shared memory).
    pub(crate) bytes: usize,
    pub(crate) initial: Vec<Initial>,
}

/// An operand, with registers as indices into `Function::registers`.
#[derive(Clone, Debug)]
pub(crate) enum Operand {
    Register(u32),
    /// A variable of the function, as an index into `Function::variables`.
    Variable(u32, i64),
    /// A variable of the module, a function or a special register, and an offset.
    Symbol(String, i64),
    Integer(u64),
    Float32(u32),
    Float64(u64),
    Vector(Vec<Operand>),
    Address(Box<Operand>, i64),
    Not(Box<Operand>),
    Pair(Box<Operand>, Box<Operand>),
    /// `_`: a result that is thrown away.
    Sink,
    /// A branch target, as a label of the function.
    Label(u32),
    /// The parenthesised lists of a call.
    List(Vec<Operand>),
}

/// A place in the CUDA source, as `.loc` gives it: index of the file and line; 0 when unknown.
pub(crate) type SourceLine = (u32, u32);

/// One instruction.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    /// Guard predicate register, and whether it is negated.
    pub(crate) guard: Option<(u32, bool)>,
    pub(crate) opcode: String,
    pub(crate) operands: Vec<Operand>,
    pub(crate) line: u32,
    pub(crate) source: SourceLine,
}

#[derive(Clone, Debug)]
pub(crate) enum Statement {
    Label(u32),
    Instruction(Instruction),
}

/// An entry or a device function.
#[derive(Clone, Debug, Default)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) is_entry: bool,
    pub(crate) has_body: bool,
    /// Parameters and results, as indices into `variables` (or, with `.reg`, into `registers`).
    pub(crate) parameters: Vec<Formal>,
    pub(crate) results: Vec<Formal>,
    pub(crate) registers: Vec<(String, Type)>,
    pub(crate) variables: Vec<Variable>,
    pub(crate) labels: Vec<String>,
    pub(crate) body: Vec<Statement>,
    /// `.maxntid` / `.reqntid` as a product, when given.
    pub(crate) max_threads: Option<u32>,
}

/// A formal parameter of a function.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Formal {
    Variable(u32),
    Register(u32),
}

/// A parsed module.
#[derive(Clone, Debug, Default)]
pub(crate) struct Module {
    pub(crate) target: String,
    pub(crate) variables: Vec<Variable>,
    pub(crate) functions: HashMap<String, Function>,
    pub(crate) entries: Vec<String>,
    pub(crate) files: HashMap<u32, String>,
}
