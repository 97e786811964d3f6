//! The executable form of a kernel: an array of instructions whose operands are slots of a register file.
//!
//! Constants and special registers such as `%tid.x` have slots of their own, filled once per warp, so an
//! operand is always a slot.

use crate::compare::Combine;
use crate::convert::Convert;
use crate::lanes::Kernel;
use crate::layout::SharedNames;
use crate::syntax::SourceLine;
use crate::types::{Space, Type};

/// Index of a register in the warp's register file.
pub(crate) type Slot = u32;

/// No register: an absent guard or a result thrown away.
pub(crate) const NONE: Slot = u32::MAX;

/// What a special register holds; constant for a thread during a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    Lane,
    Warp,
    WarpCount,
    SmId,
    SmCount,
    LaneMaskEq,
    LaneMaskLe,
    LaneMaskLt,
    LaneMaskGe,
    LaneMaskGt,
    GridId,
    DynamicShared,
    TotalShared,
    Zero,
    One,
}

/// Classes of the instruction census.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    Integer,
    Logic,
    Float32,
    Float64,
    Half,
    SpecialFunction,
    Convert,
    Compare,
    Move,
    LoadGlobal,
    StoreGlobal,
    LoadShared,
    StoreShared,
    LoadConst,
    LoadLocal,
    StoreLocal,
    Atomic,
    AsyncCopy,
    Matrix,
    LoadMatrix,
    Shuffle,
    Vote,
    Barrier,
    WarpBarrier,
    Fence,
    Control,
    Other,
}

impl Class {
    pub(crate) const ALL: [Self; 27] = [
        Self::Integer,
        Self::Logic,
        Self::Float32,
        Self::Float64,
        Self::Half,
        Self::SpecialFunction,
        Self::Convert,
        Self::Compare,
        Self::Move,
        Self::LoadGlobal,
        Self::StoreGlobal,
        Self::LoadShared,
        Self::StoreShared,
        Self::LoadConst,
        Self::LoadLocal,
        Self::StoreLocal,
        Self::Atomic,
        Self::AsyncCopy,
        Self::Matrix,
        Self::LoadMatrix,
        Self::Shuffle,
        Self::Vote,
        Self::Barrier,
        Self::WarpBarrier,
        Self::Fence,
        Self::Control,
        Self::Other,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Integer => "integer",
            Self::Logic => "logic",
            Self::Float32 => "float32",
            Self::Float64 => "float64",
            Self::Half => "half",
            Self::SpecialFunction => "special_function",
            Self::Convert => "convert",
            Self::Compare => "compare",
            Self::Move => "move",
            Self::LoadGlobal => "load_global",
            Self::StoreGlobal => "store_global",
            Self::LoadShared => "load_shared",
            Self::StoreShared => "store_shared",
            Self::LoadConst => "load_const",
            Self::LoadLocal => "load_local",
            Self::StoreLocal => "store_local",
            Self::Atomic => "atomic",
            Self::AsyncCopy => "async_copy",
            Self::Matrix => "mma",
            Self::LoadMatrix => "load_matrix",
            Self::Shuffle => "shuffle",
            Self::Vote => "vote",
            Self::Barrier => "barrier",
            Self::WarpBarrier => "warp_barrier",
            Self::Fence => "fence",
            Self::Control => "control",
            Self::Other => "other",
        }
    }
}

/// How strongly a memory access is ordered against other threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Strength {
    Weak,
    Relaxed,
    Acquire,
    Release,
    AcquireRelease,
}

/// A load or store: address register, constant offset and elements.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub(crate) space: Space,
    pub(crate) address: Slot,
    pub(crate) offset: i64,
    pub(crate) element: Type,
    /// One slot per element; NONE for elements thrown away.
    pub(crate) registers: Box<[Slot]>,
    /// Width in bits of the registers, for sign extension.
    pub(crate) register_bits: u32,
    pub(crate) strength: Strength,
}

/// The operation of an atomic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomicOp {
    And,
    Or,
    Xor,
    Exchange,
    CompareAndSwap,
    Add,
    Increment,
    Decrement,
    Min,
    Max,
}

/// An atom or red.
#[derive(Clone, Debug)]
pub(crate) struct Atomic {
    pub(crate) op: AtomicOp,
    pub(crate) kind: Type,
    pub(crate) space: Space,
    pub(crate) address: Slot,
    pub(crate) offset: i64,
    /// Result slots, NONE for `red`; several for vector forms.
    pub(crate) results: Box<[Slot]>,
    pub(crate) values: Box<[Slot]>,
    pub(crate) swap: Slot,
    pub(crate) strength: Strength,
}

/// Which value a lane receives in a shuffle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

/// Reductions over the members of a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reduction {
    All,
    Any,
    Uniform,
    Ballot,
    MatchAny,
    MatchAll,
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Elect,
}

/// The shape and types of a matrix product of one warp.
#[derive(Clone, Debug)]
pub(crate) struct Multiply {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a_kind: Type,
    pub(crate) b_kind: Type,
    pub(crate) c_kind: Type,
    pub(crate) d_kind: Type,
    /// Where each element of the fragments stands (see `matrix::places`).
    pub(crate) a_places: Box<[u16]>,
    pub(crate) b_places: Box<[u16]>,
    pub(crate) c_places: Box<[u16]>,
    pub(crate) d_places: Box<[u16]>,
    /// Saturating integer accumulation.
    pub(crate) satfinite: bool,
    pub(crate) a: Box<[Slot]>,
    pub(crate) b: Box<[Slot]>,
    pub(crate) c: Box<[Slot]>,
    pub(crate) d: Box<[Slot]>,
}

/// wmma.load and wmma.store.
#[derive(Clone, Debug)]
pub(crate) struct WmmaAccess {
    /// `a`, `b`, `c` or `d`.
    pub(crate) role: char,
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) row_major: bool,
    pub(crate) kind: Type,
    pub(crate) space: Space,
    pub(crate) address: Slot,
    pub(crate) offset: i64,
    /// Leading dimension in elements; NONE for the tile's own width.
    pub(crate) stride: Slot,
    pub(crate) registers: Box<[Slot]>,
}

/// cp.async.
#[derive(Clone, Debug)]
pub(crate) struct AsyncCopy {
    pub(crate) destination: Slot,
    pub(crate) destination_offset: i64,
    pub(crate) source: Slot,
    pub(crate) source_offset: i64,
    pub(crate) bytes: usize,
    /// Bytes to read; the rest is filled with zeros. NONE: all of them.
    pub(crate) source_bytes: Slot,
    /// `ignore-src` predicate; NONE: never.
    pub(crate) ignore: Slot,
    pub(crate) ignore_negated: bool,
}

/// A barrier of the block.
#[derive(Clone, Debug)]
pub(crate) struct Barrier {
    pub(crate) id: Slot,
    /// Threads expected; NONE for all of the block.
    pub(crate) count: Slot,
    pub(crate) aligned: bool,
    /// `bar.arrive`: does not wait.
    pub(crate) arrive: bool,
    /// The bypass that lanes take whose guard is false, or NONE.
    pub(crate) bypass: u32,
    /// `bar.red`: reduction, predicate slot and its negation, result slot.
    pub(crate) reduction: Option<(Reduction, Slot, bool, Slot)>,
}

/// What an instruction does.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Lanewise {
        kernel: Kernel,
        dst: Slot,
        dst2: Slot,
        src: [Slot; 4],
    },
    Convert {
        convert: Convert,
        dst: Slot,
        a: Slot,
        b: Slot,
    },
    Compare {
        kernel: Kernel,
        accepted: u8,
        combine: Option<(Combine, Slot, bool)>,
        dst: Slot,
        dst2: Slot,
        a: Slot,
        b: Slot,
        /// `set`: the result is this value where true, instead of a predicate.
        set: Option<u64>,
        /// Compare both halves (f16x2): second predicate for the high halves.
        packed: bool,
    },
    Select {
        dst: Slot,
        a: Slot,
        b: Slot,
        predicate: Slot,
    },
    Pack {
        dst: Slot,
        parts: Box<[Slot]>,
        bits: u32,
    },
    Unpack {
        parts: Box<[Slot]>,
        src: Slot,
        bits: u32,
    },
    Branch {
        target: u32,
        /// The bypasses that lanes take where the guard is true, and where it is false; NONE for none.
        bypasses: [u32; 2],
    },
    BranchTable {
        index: Slot,
        targets: Box<[u32]>,
    },
    Exit,
    Trap(String),
    Nothing,
    Clock {
        dst: Slot,
        bits: u32,
    },
    ActiveMask {
        dst: Slot,
    },
    IsSpace {
        dst: Slot,
        src: Slot,
        space: Space,
    },
    Load(Access),
    Store(Access),
    Atomic(Atomic),
    AsyncCopy(AsyncCopy),
    AsyncCommit,
    /// Waits until at most this many groups are pending; None waits for everything, committed or not.
    AsyncWait(Option<u32>),
    Barrier(Barrier),
    WarpBarrier {
        mask: Slot,
    },
    Fence,
    Shuffle {
        mode: ShuffleMode,
        dst: Slot,
        predicate: Slot,
        src: Slot,
        lane: Slot,
        clamp: Slot,
        mask: Slot,
    },
    Collective {
        reduction: Reduction,
        kind: Type,
        dst: Slot,
        predicate: Slot,
        src: Slot,
        negate: bool,
        mask: Slot,
    },
    LoadMatrix {
        address: Slot,
        offset: i64,
        space: Space,
        transpose: bool,
        dst: Box<[Slot]>,
    },
    StoreMatrix {
        address: Slot,
        offset: i64,
        space: Space,
        transpose: bool,
        src: Box<[Slot]>,
    },
    MoveMatrix {
        dst: Slot,
        src: Slot,
    },
    Multiply(Multiply),
    WmmaLoad(WmmaAccess),
    WmmaStore(WmmaAccess),
}

/// One instruction, decoded.
#[derive(Clone, Debug)]
pub(crate) struct Inst {
    pub(crate) op: Op,
    pub(crate) guard: Slot,
    pub(crate) negate: bool,
    pub(crate) class: Class,
    pub(crate) line: u32,
    pub(crate) source: SourceLine,
}

/// A kernel parameter in the parameter buffer.
#[derive(Clone, Debug)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
    pub(crate) is_float: bool,
}

/// A kernel ready to run.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) name: String,
    pub(crate) insts: Vec<Inst>,
    /// Text of each PTX line, for messages.
    pub(crate) lines: std::sync::Arc<Vec<String>>,
    pub(crate) files: std::collections::HashMap<u32, String>,
    pub(crate) slot_names: Vec<String>,
    pub(crate) constants: Vec<(Slot, u64)>,
    pub(crate) specials: Vec<(Slot, Special)>,
    pub(crate) parameters: Vec<Parameter>,
    pub(crate) parameter_bytes: usize,
    pub(crate) static_shared: usize,
    /// Where dynamic shared memory begins, after the static part and its alignment.
    pub(crate) dynamic_shared: usize,
    pub(crate) local_bytes: usize,
    /// Smallest access to shared memory in bytes: the granule of the race checks.
    pub(crate) granule: usize,
    pub(crate) max_threads: Option<u32>,
    /// Ways round barriers: the program counter of each one's branch.
    pub(crate) bypasses: Vec<u32>,
    pub(crate) shared_names: std::sync::Arc<SharedNames>,
}
