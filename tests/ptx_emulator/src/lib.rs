//! Runs the PTX of CUDA kernels on a CPU: the very text that a GPU's driver would get.
//!
//! It refuses what a GPU would corrupt (bounds, alignment, uninitialised reads, races, divergence, copies in
//! flight, deadlock) and counts what a profiler would count. Modules stand in the order in which PTX passes
//! through them.

// Text → syntax.
mod lexer;
mod parser;
mod syntax;
mod types;

// Syntax → program.
mod bypass;
mod decode;
mod layout;
mod program;

// What instructions compute.
mod accumulate;
mod carry;
mod compare;
mod convert;
mod float;
mod half;
mod integer;
mod lanes;
mod rounding;

// Machine state.
mod async_copy;
mod block;
mod global;
mod order;
mod shared;
mod warp;

// Execution.
mod access;
mod atomics;
mod barrier;
mod collectives;
mod grid;
mod matrix;
mod step;

// What comes out.
mod counters;
mod fault;
mod launch;
mod options;
mod refusal;
mod report;

#[cfg(feature = "python")]
mod python;

pub use global::Unwritten;
pub use launch::{Argument, BufferArgument, Module, Outcome};
pub use options::{AsyncTiming, MatrixModel, Options, Schedule};
pub use refusal::{Complaint, Refusal};
pub use report::Report;
