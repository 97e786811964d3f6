//! One variant per way an input can be wrong, each carrying the numbers and naming the remedy.

/// Everything the core refuses. The text reaches Python users as the message of `QloraError`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The block size is not one of the format's sizes.
    #[error(
        "block_size must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got {0} (64 is the usual choice)"
    )]
    BlockSize(usize),
    /// rows * columns does not fit in memory's address range.
    #[error("a matrix of {rows} x {columns} weights does not fit in 64-bit sizes")]
    TooLarge {
        /// Number of output features.
        rows: usize,
        /// Number of input features.
        columns: usize,
    },
    /// A buffer has another length than the shape asks for.
    #[error(
        "{name} has {got} elements, but a {rows} x {columns} matrix in blocks of {block_size} needs {expected}"
    )]
    Length {
        /// Which buffer.
        name: &'static str,
        /// Its length.
        got: usize,
        /// The length the shape asks for.
        expected: usize,
        /// Number of output features.
        rows: usize,
        /// Number of input features.
        columns: usize,
        /// Weights per absmax.
        block_size: usize,
    },
    /// An operand of a product has another length than its shape asks for.
    #[error("{name} has {got} elements, expected {expected}")]
    Operand {
        /// Which operand.
        name: &'static str,
        /// Its length.
        got: usize,
        /// The length the shapes ask for.
        expected: usize,
    },
    /// A weight is NaN or infinite: no code can represent it.
    #[error(
        "weight holds {count} NaN or infinite value(s), the first at [{}, {}] of the {rows} x {columns} matrix; NF4 has no code for them, so clean the weight first",
        first / columns, first % columns
    )]
    NonFinite {
        /// How many values are not finite.
        count: usize,
        /// Number of output features.
        rows: usize,
        /// Number of input features, not 0.
        columns: usize,
        /// Flat index of the first one.
        first: usize,
    },
    /// A statistic is NaN or infinite.
    #[error(
        "{name} holds a NaN or infinite value at index {first}; the statistics are damaged, so load them again from their source"
    )]
    NonFiniteStatistic {
        /// Which statistic.
        name: &'static str,
        /// Index of the first such value.
        first: usize,
    },
    /// Blocks span rows, so a row has no scales of its own.
    #[error(
        "{columns} columns are no multiple of the block size {block_size}, so blocks span rows, which only method \"nearest\" can merge"
    )]
    StraddlingBlocks {
        /// Number of input features.
        columns: usize,
        /// Weights per absmax.
        block_size: usize,
    },
    /// Statistics that no damping makes positive definite.
    #[error(
        "the statistics of {columns} features are not those of real activations or gradients: with {damping:e} added to the diagonal they are still not positive definite"
    )]
    NotPositive {
        /// Number of features.
        columns: usize,
        /// What was added in the last attempt.
        damping: f64,
    },
    /// A target names a class that does not exist.
    #[error("target {row} is {target}, but a vocabulary of {vocabulary} has classes 0 to {vocabulary} - 1")]
    Target {
        /// Which row.
        row: usize,
        /// Its target.
        target: i64,
        /// Logits per row.
        vocabulary: usize,
    },
    /// A forced CPU path needs instructions that this CPU lacks.
    #[error(
        "QLORA_RS_CPU={requested} asks for a path this CPU cannot run; it has: {available} (unset QLORA_RS_CPU to take the fastest)"
    )]
    CpuPathMissing {
        /// The requested path.
        requested: String,
        /// The paths that this CPU runs, fastest first.
        available: String,
    },
    /// A forced CPU path has no such name.
    #[error(
        "QLORA_RS_CPU={0} is not a path; use portable, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16 or amx, or unset it to take the fastest"
    )]
    CpuPathUnknown(String),
}
