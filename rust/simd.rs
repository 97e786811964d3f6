//! The table of inner loops, chosen once for the CPU this process runs on.
//!
//! Every path gives the same bytes for codes, absmax and decoded weights. Products may differ in
//! their last bits between paths (another order of summation), never between thread counts.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_linear;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_decode;
#[cfg(target_arch = "x86_64")]
mod avx2_fixed;
#[cfg(target_arch = "x86_64")]
mod avx2_gemm;
#[cfg(target_arch = "x86_64")]
mod avx2_linear;
#[cfg(target_arch = "x86_64")]
mod avx2_pairs_gemm;
#[cfg(target_arch = "x86_64")]
mod avx2_words_linear;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_absmax;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16_linear;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16_rows;
#[cfg(target_arch = "x86_64")]
mod avx512_bytes;
#[cfg(target_arch = "x86_64")]
mod avx512_bytes_linear;
#[cfg(target_arch = "x86_64")]
mod avx512_decode;
#[cfg(target_arch = "x86_64")]
mod avx512_gemm;
#[cfg(target_arch = "x86_64")]
mod avx512_linear;
#[cfg(target_arch = "x86_64")]
mod avx512_many_tokens;
#[cfg(target_arch = "x86_64")]
mod avx512_pairs_gemm;
#[cfg(target_arch = "x86_64")]
mod avx512_pairs_linear;
mod crossover;
mod fixed;
mod gated;
pub mod merging;
pub mod portable;
mod softmax;

use crate::error::Error;
#[cfg(doc)]
use crate::gemm::pairs::factor;
use crate::gemm::pairs::panel::MultiplyPairs;
use crate::gemm::tile::{MultiplyBlock, PANEL, Tile};
use crate::packed_matrix::NestedScales;
use half::{bf16, f16};
use std::sync::OnceLock;

pub use fixed::{ByteStep, FIXED_TOLERANCE, FewRowsFixed, PAIR_SCALE, PairStep, WordStep};

/// Prepared activations and decoded scales for a strip of weight rows; see [`Kernels::linear_f32`].
#[derive(Clone, Copy, Debug)]
pub struct Strip<'a> {
    /// Codes of the strip's rows, `columns / 2` bytes each.
    pub codes: &'a [u8],
    /// Decoded absmax of the strip's rows, `columns / block_size` values each, and
    /// [`ABSMAX_PADDING`] more.
    pub absmax: &'a [f32],
    /// Weights per row, a multiple of `block_size`.
    pub columns: usize,
    /// Weights per absmax.
    pub block_size: usize,
    /// Number of activation rows.
    pub tokens: usize,
}

/// Kernels read absmax in groups of four, so they may look at four past the end of the last row.
pub const ABSMAX_PADDING: usize = 4;

/// Prepared rows of activations are padded with zeros to a multiple of this.
pub const PREPARED_MULTIPLE: usize = 128;

impl Strip<'_> {
    /// Number of absmax per row.
    #[inline]
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.columns / self.block_size
    }

    /// Check what kernels without bounds checks rely on, for `rows` rows and prepared activations of
    /// `x` values.
    ///
    /// # Panics
    /// When a length is not what the other numbers ask for.
    #[inline]
    pub fn check(&self, x: usize, rows: usize, smallest_block: usize) {
        assert!(x == self.columns.next_multiple_of(PREPARED_MULTIPLE) * self.tokens);
        assert!(self.codes.len() == rows * self.columns / 2);
        assert!(self.block_size.is_power_of_two() && self.block_size >= smallest_block);
        assert!(self.columns.is_multiple_of(self.block_size));
        assert!(self.absmax.len() >= rows * self.blocks() + ABSMAX_PADDING);
    }
}

/// `out[row * tokens + token] = sum over k of x[token, k] * weight[row, k]`, in f32.
pub type Linear<T> = fn(x: &[T], strip: &Strip<'_>, out: &mut [f32]);

/// Inner loops of one CPU path. Whoever holds a table may call everything in it: tables are only
/// handed out after the instructions they use were found.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    /// `portable`, `avx2`, `avx2_vnni`, `avx512`, `avx512_vnni`, `avx512_bf16` or `amx`.
    pub name: &'static str,
    /// f16 → f32, exact; both slices have the same length.
    pub widen_f16: fn(&[f16], &mut [f32]),
    /// bf16 → f32, exact; both slices have the same length.
    pub widen_bf16: fn(&[bf16], &mut [f32]),
    /// f32 → f16, to nearest, ties to even; both slices have the same length.
    pub narrow_f16: fn(&[f32], &mut [f16]),
    /// f32 → bf16, to nearest, ties to even; both slices have the same length.
    pub narrow_bf16: fn(&[f32], &mut [bf16]),
    /// The largest value; NaN counts for nothing, and so does an empty run: minus infinity.
    pub largest: fn(&[f32]) -> f32,
    /// `value = exp(value - shift) * scale` for each, where no value is above `shift`; returns the
    /// sum of the results. NaN stays NaN.
    pub exponentials: fn(values: &mut [f32], shift: f32, scale: f32) -> f64,
    /// `gate = silu(gate) * up`; slices of one length.
    pub gated: fn(gate: &mut [f32], up: &[f32]),
    /// `gate` and `up` become their gradients, `grad`, that of [`Self::gated`]'s result, that result;
    /// slices of one length.
    pub gated_gradients: fn(gate: &mut [f32], up: &mut [f32], grad: &mut [f32]),
    /// Whole blocks of weights → two codes per byte and one absmax per block. A block that holds a
    /// NaN or an infinity gets an absmax that is not finite.
    pub quantize_blocks: fn(weights: &[f32], block_size: usize, codes: &mut [u8], absmax: &mut [f32]),
    /// Whole blocks of codes → f32.
    pub dequantize_f32: fn(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [f32]),
    /// Whole blocks of codes → f16.
    pub dequantize_f16: fn(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [f16]),
    /// Whole blocks of codes → bf16.
    pub dequantize_bf16: fn(codes: &[u8], absmax: &[f32], block_size: usize, out: &mut [bf16]),
    /// The absmax of the blocks from `first` on, `map[code] * absmax of its group + offset` each: the
    /// second level of double quantization.
    pub decode_absmax: fn(nested: &NestedScales<'_>, first: usize, out: &mut [f32]),
    /// `out[i]` = the i-th row of `matrix` [out.len(), x.len()] times x.
    pub matrix_vector: fn(matrix: &[f32], x: &[f32], out: &mut [f32]),
    /// Reorder one row of activations into the order in which `linear_f32` meets the weights; the
    /// output is padded with zeros to [`PREPARED_MULTIPLE`].
    pub prepare_f32: fn(&[f32], &mut [f32]),
    /// Products with rows of packed weights, activations prepared by `prepare_f32`. An absmax may multiply
    /// the sum of a block's products, so activations from 1e36 on may give infinity or NaN where each
    /// product by itself is finite.
    pub linear_f32: Linear<f32>,
    /// Products of panels of f32.
    pub panels_f32: PanelKernels,
    /// Products of panels of 16-bit activations in fixed point, where this CPU multiplies words faster.
    pub panels_pairs: Option<PairPanels>,
    /// Swap a tile's rows and columns.
    pub transpose: fn(&mut Tile),
    /// Four tiles of sums plus a bias per output → 32 tokens by 32 outputs.
    pub finish_f32: Finish<f32>,
    /// The same, rounded to bf16, to nearest, ties to even.
    pub finish_bf16: Finish<bf16>,
    /// Up to how many rows of activations `linear_f32` beats panels (f32, then 16-bit types): `crossover.rs`.
    pub few_rows: [usize; 2],
    /// One to a few rows of 16-bit activations, where this CPU has an instruction for products of bytes.
    pub few_rows_bytes: Option<FewRowsFixed<ByteStep>>,
    /// The same by products of 16-bit words, where levels are looked up as bytes.
    pub few_rows_words: Option<FewRowsFixed<WordStep>>,
    /// The same where products of words are summed in one instruction and bytes permuted across vectors.
    pub few_rows_pairs: Option<FewRowsFixed<PairStep>>,
    /// Products of bf16 as such, where this path has an instruction for that; elsewhere bf16 is
    /// widened to f32.
    pub bf16: Option<Bf16Kernels>,
}

/// `sums` lie as `gemm/tile.rs` says; `transpose` says whether their rows are outputs (true) or
/// tokens. `out[token][output]`.
pub type Finish<T> =
    fn(sums: &mut [Tile; 4], transpose: bool, bias: &[f32; PANEL], out: &mut [[T; PANEL]; PANEL]);

/// A run of a row of W: whole pieces of blocks, each with its absmax.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// Two codes per byte.
    pub codes: &'a [u8],
    /// One per `block_size` weights.
    pub absmax: &'a [f32],
    /// 32 or 64: a block of the format, or a piece of one.
    pub block_size: usize,
}

impl<'a> Run<'a> {
    /// The codes that share an absmax, 16 bytes at a time, and the absmax. Cut without a division: a run is
    /// decoded in little more time than one takes.
    #[inline]
    pub fn pieces(&self) -> impl Iterator<Item = (&'a [[u8; 16]], f32)> {
        debug_assert!(self.block_size == 32 || self.block_size == 64, "blocks of {}", self.block_size);
        let (groups, shift) = (self.codes.as_chunks::<16>().0, self.block_size / 64);
        self.absmax
            .iter()
            .enumerate()
            .map(move |(i, absmax)| (&groups[i << shift..(i + 1) << shift], *absmax))
    }
}

/// One run → row `row` of a left panel.
pub type DecodeLeft = fn(run: &Run<'_>, row: usize, panel: &mut [Tile]);

/// As many runs as a word has values → row `word` of right panels of `steps` steps each.
pub type DecodeRight = fn(runs: &[Run<'_>], word: usize, steps: usize, panels: &mut [Tile]);

/// Two runs of 16 bf16 → 16 words, the first run in the lower halves.
pub type Interleave = fn(&[bf16; 16], &[bf16; 16], &mut [u32; 16]);

/// Loops for panels of one element type; layout in `gemm/tile.rs`.
#[derive(Clone, Copy, Debug)]
pub struct PanelKernels {
    /// The product of two panels, summed in f32.
    pub multiply: MultiplyBlock,
    /// Decoding straight into tiles; without it, weights go through a buffer.
    pub decode: Option<(DecodeLeft, DecodeRight)>,
}

/// Loops for panels of pairs of words; layout in `gemm/pairs/panel.rs`.
#[derive(Clone, Copy, Debug)]
pub struct PairPanels {
    /// As [`FewRowsFixed::prepare`].
    pub prepare: fn(x: &[f32], tolerance: f32, out: &mut [PairStep]) -> bool,
    /// The product of two panels, summed as integers in each unit, in f32 over units.
    pub multiply: MultiplyPairs,
    /// A run of codes → row `row` of a left panel: words of their levels, [`PAIR_SCALE`] for 1.
    pub decode_left: fn(codes: &[u8], row: usize, panel: &mut [Tile]),
    /// Two runs of W → row `word` of right panels of `tiles` tiles each: words of weights, `PAIR_SCALE`
    /// for 1, the first run's in the lower halves; no absmax may be above 1.
    pub decode_right: fn(runs: &[Run<'_>; 2], word: usize, tiles: usize, panels: &mut [Tile]),
    /// A row of a factor → row `row` of a left panel of `steps` steps: a unit is the largest magnitude of its 64
    /// values (NaN if one is not finite), words are `PAIR_SCALE` for it.
    pub factor_left: fn(values: &[f32], row: usize, steps: usize, panel: &mut [Tile]),
    /// As [`factor::right`].
    pub factor_right: fn(values: &[f32], width: usize, steps: usize, panels: &mut [Tile]),
}

/// Loops for CPUs with a bf16 dot product.
#[derive(Clone, Copy, Debug)]
pub struct Bf16Kernels {
    /// Products of panels of bf16.
    pub panels: PanelKernels,
    /// For tiles of pairs.
    pub interleave: Interleave,
    /// Few rows of activations; `None` where `linear_f32` is faster.
    pub few_rows: Option<FewRowsBf16>,
}

/// Products of few rows of bf16 with rows of packed weights.
#[derive(Clone, Copy, Debug)]
pub struct FewRowsBf16 {
    /// With fewer rows than this, `linear_f32` or fixed point is faster: decoding is all the work then.
    pub fewest: usize,
    /// Reorder rows of activations, `columns` values each, into the order in which `linear` meets
    /// the weights; the output holds `columns.next_multiple_of(PREPARED_MULTIPLE)` values per row.
    pub prepare: fn(x: &[bf16], columns: usize, out: &mut [bf16]),
    /// As [`Kernels::linear_f32`]; weights are rounded to bf16, products summed in f32. Needs blocks
    /// of 64 or more.
    pub linear: Linear<bf16>,
}

/// Bytes ahead of their use at which kernels that read a strip in the order of memory ask for codes.
///
/// Far enough that memory answers in time, near enough that the second-level cache still holds them
/// and that few of a thread's requests fall beyond its run of rows.
const FETCH_DISTANCE: usize = 16 << 10;

/// Ask for the cache line `distance` bytes after `place` to be brought to the second-level cache.
///
/// A kernel calls this for every line of codes, either in the order in which they lie in memory, even
/// where it reads several rows side by side, or for a few rows that are streams of their own: order is
/// what lets the hardware's own fetching join in. A request for the second-level cache is given up by
/// the first level at once, which has room for two dozen of those that it waits for. Together this
/// doubles the speed of reading weights that no cache holds; any address is allowed.
#[inline]
pub fn fetch_ahead(place: *const u8, distance: usize) {
    fetch::<SECOND_LEVEL>(place.wrapping_add(distance));
}

/// Ask for values that will be read soon to be brought to the second-level cache.
#[inline]
pub fn fetch_soon<T>(values: &[T]) {
    lines(values).for_each(fetch::<SECOND_LEVEL>);
}

/// Ask for values that will be read next to be brought to the first-level cache: not many at once.
#[inline]
pub fn fetch_next<T>(values: &[T]) {
    lines(values).for_each(fetch::<FIRST_LEVEL>);
}

fn lines<T>(values: &[T]) -> impl Iterator<Item = *const u8> {
    let first = values.as_ptr().cast::<u8>();
    (0..size_of_val(values)).step_by(64).map(move |line| first.wrapping_add(line))
}

#[cfg(target_arch = "x86_64")]
const FIRST_LEVEL: i32 = std::arch::x86_64::_MM_HINT_T0;
#[cfg(target_arch = "x86_64")]
const SECOND_LEVEL: i32 = std::arch::x86_64::_MM_HINT_T1;
#[cfg(not(target_arch = "x86_64"))]
const FIRST_LEVEL: i32 = 0;
#[cfg(not(target_arch = "x86_64"))]
const SECOND_LEVEL: i32 = 1;

#[cfg(target_arch = "x86_64")]
#[inline]
fn fetch<const LEVEL: i32>(place: *const u8) {
    // SAFETY: a prefetch reads nothing that the program could see, whatever the address.
    unsafe { std::arch::x86_64::_mm_prefetch::<LEVEL>(place.cast()) };
}

#[cfg(not(target_arch = "x86_64"))]
fn fetch<const LEVEL: i32>(_: *const u8) {}

/// The paths this CPU can run, fastest first; the last one is always portable.
#[must_use]
pub fn available() -> Vec<&'static Kernels> {
    #[cfg(target_arch = "x86_64")]
    let (bf16, vnni) = (avx512::detect_bf16(), avx512::detect_vnni());
    #[cfg(target_arch = "x86_64")]
    let [first, second] = if avx512::bf16_is_slow() { [vnni, bf16] } else { [bf16, vnni] };
    #[cfg(target_arch = "x86_64")]
    let narrow = [avx2::detect_vnni(), avx2::detect()];
    #[cfg(target_arch = "x86_64")]
    let detected = [amx::detect(), first, second, avx512::detect(), narrow[0], narrow[1]];
    #[cfg(not(target_arch = "x86_64"))]
    let detected = [];
    detected.into_iter().flatten().chain([&portable::KERNELS]).collect()
}

/// The table for this process: the fastest, or the one that `QLORA_RS_CPU` names.
///
/// # Errors
/// [`Error::CpuPathUnknown`] or [`Error::CpuPathMissing`] when `QLORA_RS_CPU` cannot be honoured.
pub fn kernels() -> Result<&'static Kernels, Error> {
    static CHOSEN: OnceLock<Result<&'static Kernels, Error>> = OnceLock::new();
    CHOSEN.get_or_init(|| choose(std::env::var("QLORA_RS_CPU").ok().as_deref())).clone()
}

fn choose(requested: Option<&str>) -> Result<&'static Kernels, Error> {
    let paths = available();
    match requested {
        None | Some("") => Ok(paths[0]),
        Some(
            name @ ("portable" | "avx2" | "avx2_vnni" | "avx512" | "avx512_vnni" | "avx512_bf16" | "amx"),
        ) => {
            let found = paths.iter().copied().find(|path| path.name == name);
            found.ok_or_else(|| Error::CpuPathMissing {
                requested: name.to_owned(),
                available: paths.iter().map(|p| p.name).collect::<Vec<_>>().join(", "),
            })
        }
        Some(other) => Err(Error::CpuPathUnknown(other.to_owned())),
    }
}

#[cfg(test)]
mod fixed_tests;
#[cfg(test)]
mod panel_tests;
#[cfg(test)]
mod tests;
