//! How a launch is run: the choices a GPU would make by itself.

/// The order in which warps and diverged lanes run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Warps in turn, first to last.
    Ascending,
    /// Warps in turn, last to first.
    Descending,
    /// One warp runs as far as it can before the next one starts.
    Ahead,
    /// Warps, diverged lanes and the lengths of their turns at random, from a seed.
    Random(u64),
}

/// When a cp.async lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsyncTiming {
    /// In the wait that asks for it.
    Latest,
    /// At once.
    Earliest,
}

/// How tensor cores add up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixModel {
    /// The exact sum, rounded once.
    Exact,
    /// One f32 fused multiply-add after another, in ascending k.
    Sequential,
    /// A100: steps of 8 products, aligned to the largest with one extra bit, truncated.
    A100,
    /// H100: steps of 16 products, aligned to the largest with two extra bits, truncated.
    H100,
}

/// The options of one launch.
#[derive(Clone, Debug)]
pub struct Options {
    /// The order in which warps and diverged lanes run; also the order of blocks.
    pub schedule: Schedule,
    /// When a cp.async lands.
    pub async_timing: AsyncTiming,
    /// How tensor cores add up.
    pub matrix_model: MatrixModel,
    /// CPU threads; 0 for all cores.
    pub workers: usize,
    /// Warp instructions a block may execute before it is called endless.
    pub instruction_limit: u64,
    /// Linear indices of the blocks to run; None for all.
    pub blocks: Option<Vec<u64>>,
    /// Blocks that are resident at once.
    pub resident: usize,
    /// Refuse races on shared memory.
    pub races: bool,
    /// Refuse barriers that threads went round and completed by ending.
    pub barriers: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            schedule: Schedule::Ascending,
            async_timing: AsyncTiming::Latest,
            matrix_model: MatrixModel::Exact,
            workers: 0,
            instruction_limit: 2_000_000_000,
            blocks: None,
            resident: 128,
            races: true,
            barriers: true,
        }
    }
}
