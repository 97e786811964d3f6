//! Why a kernel was refused: one kind per sort of mistake, and a whole sentence.

use std::fmt;

/// The sorts of mistakes that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Complaint {
    /// The text is no PTX that this parser understands.
    Syntax,
    /// An opcode, or a form of one, that is not implemented.
    UnknownInstruction,
    /// The launch itself is impossible: arguments, grid or block.
    Launch,
    /// An access outside every buffer, or beyond the shared memory of the block.
    OutOfBounds,
    /// An address that is no multiple of the access's size.
    Misaligned,
    /// A write into a buffer that the launch lent as read-only.
    ReadOnly,
    /// A read of memory or of a register that nothing has written.
    Uninitialised,
    /// Two threads touch the same bytes, one writes, and nothing orders them.
    Race,
    /// Threads of one warp wait at different barriers, or a barrier can never be complete.
    DivergentBarrier,
    /// Threads of one warp wait at different collectives, or a member will never come.
    DivergentCollective,
    /// A collective whose mask or operands break its contract.
    Collective,
    /// Bytes of a `cp.async` were read before its wait, or overwritten while it was in flight.
    AsyncInFlight,
    /// A thread ended while its `cp.async` copies were uncommitted or not waited for.
    AsyncPendingAtExit,
    /// Every thread that remains waits for something that nobody will do.
    Deadlock,
    /// More instructions than the launch allows.
    Limit,
    /// The kernel ran into `trap` or a failed assertion.
    Trap,
}

impl Complaint {
    /// A short stable name for tables and tests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Syntax => "syntax",
            Self::UnknownInstruction => "unknown-instruction",
            Self::Launch => "launch",
            Self::OutOfBounds => "out-of-bounds",
            Self::Misaligned => "misaligned",
            Self::ReadOnly => "read-only",
            Self::Uninitialised => "uninitialised",
            Self::Race => "race",
            Self::DivergentBarrier => "divergent-barrier",
            Self::DivergentCollective => "divergent-collective",
            Self::Collective => "collective",
            Self::AsyncInFlight => "async-in-flight",
            Self::AsyncPendingAtExit => "async-pending-at-exit",
            Self::Deadlock => "deadlock",
            Self::Limit => "limit",
            Self::Trap => "trap",
        }
    }
}

/// A kernel, or a launch, that is not run to its end, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The sort of mistake.
    pub complaint: Complaint,
    /// A sentence with the kernel, the line, the thread and the numbers.
    pub message: String,
}

impl Refusal {
    pub(crate) fn new(complaint: Complaint, message: impl Into<String>) -> Self {
        Self { complaint, message: message.into() }
    }

    pub(crate) fn syntax(line: u32, message: impl fmt::Display) -> Self {
        Self::new(Complaint::Syntax, format!("line {line} of the PTX: {message}"))
    }

    pub(crate) fn unknown(line: u32, message: impl fmt::Display) -> Self {
        Self::new(Complaint::UnknownInstruction, format!("line {line} of the PTX: {message}"))
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.complaint.name(), self.message)
    }
}

impl std::error::Error for Refusal {}
