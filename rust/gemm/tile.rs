//! Tiles: 16 x 16 words of 32 bits, 1 KiB, the unit of all packed operands.
//!
//! A word holds what one multiply-add lane consumes of the summed dimension: one f32, or two
//! neighbouring bf16. A panel is 32 rows (of activations or of weights) by some steps; each step is
//! two tiles.
//!
//! ```text
//! left operand     tile[row][word]      rows of the result, words of the summed dimension
//! right operand    tile[word][column]   columns of the result
//! sums             tile[row][column]    f32; four per pair of panels, [left tile][right tile]
//! ```
//!
//! This is the layout that AMX tile registers load; the other microkernels read it as well.

use super::Direction;
use crate::element::{Element, Floats};
use crate::simd::{Kernels, PanelKernels};
use half::bf16;

/// Rows and columns of a tile.
pub const SIDE: usize = 16;

/// Rows of a panel: two tiles.
pub const PANEL: usize = 2 * SIDE;

/// 16 rows of 16 words, aligned to a cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Tile(pub [[u32; SIDE]; SIDE]);

impl Tile {
    /// Nothing but zeros.
    pub const ZERO: Tile = Tile([[0; SIDE]; SIDE]);

    /// Swap rows and columns; the plain version of [`Kernels::transpose`].
    pub fn transpose(&mut self) {
        for i in 0..SIDE {
            for j in 0..i {
                let word = self.0[i][j];
                self.0[i][j] = self.0[j][i];
                self.0[j][i] = word;
            }
        }
    }
}

/// A block of decoded weights and the activations to multiply it with.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// Panels of weights, `steps` steps each.
    pub weights: &'a [Tile],
    /// Panels of activations, of whose `activation_steps` steps each the first `steps` count.
    pub activations: &'a [Tile],
    /// Steps from one panel of activations to the next.
    pub activation_steps: usize,
    /// The activations that the next block will read, to be brought nearer meanwhile.
    pub next: &'a [Tile],
    /// Steps of the summed dimension.
    pub steps: usize,
    /// Outputs; the last panel of weights may be partly empty.
    pub width: usize,
    /// Tokens; the last panel of activations may be partly empty.
    pub tokens: usize,
    /// Whether the sums start at zero here; what they hold is not read then.
    pub start: bool,
    /// Forward: weights are the left operand. Backward: activations are.
    pub direction: Direction,
}

/// Adds the block's product to `sums` (or sets them to it, see `Block::start`): four tiles per panel of weights and panel of tokens.
pub type MultiplyBlock = fn(block: &Block<'_>, sums: &mut [Tile]);

impl Block<'_> {
    /// Call `multiply(left, right, sums, rows, columns)` for each pair of panels. Only `rows` by
    /// `columns` of the 32 x 32 sums are wanted; the rest may hold anything.
    #[inline(always)]
    pub fn for_each_pair(
        &self,
        sums: &mut [Tile],
        mut multiply: impl FnMut(&[Tile], &[Tile], &mut [Tile; 4], usize, usize),
    ) {
        let mut sums = sums.as_chunks_mut::<4>().0.iter_mut();
        for (i, weights) in self.weights.chunks_exact(self.steps * 2).enumerate() {
            let width = (self.width - i * PANEL).min(PANEL);
            let panels = self.activations.chunks_exact(self.activation_steps * 2);
            let panels = panels.map(|panel| &panel[..self.steps * 2]).enumerate();
            for ((panel, activations), sums) in panels.zip(&mut sums) {
                let tokens = (self.tokens - panel * PANEL).min(PANEL);
                match self.direction {
                    Direction::Forward => multiply(weights, activations, sums, width, tokens),
                    Direction::Backward => multiply(activations, weights, sums, tokens, width),
                }
            }
        }
    }
}

/// A left panel, one or two right ones, and where their sums go.
pub struct Group<'a> {
    /// The panel whose rows are rows of the sums.
    pub left: &'a [Tile],
    /// The panels whose rows are columns of the sums; the second one is empty after the last.
    pub right: [&'a [Tile]; 2],
    /// Four tiles for each right panel.
    pub sums: [Option<&'a mut [Tile; 4]>; 2],
    /// Of the left panel's 32 rows, those that are wanted.
    pub rows: usize,
    /// Of the right panels' 64 rows, those that are wanted.
    pub columns: usize,
}

impl Block<'_> {
    /// Call `multiply` for each left panel with each two right ones, which are the same for all of the
    /// left ones, so that they stay in the nearest cache that holds them. Sums beyond the wanted
    /// rows and columns may hold anything.
    #[inline(always)]
    pub fn for_each_group(&self, sums: &mut [Tile], mut multiply: impl FnMut(Group<'_>)) {
        let weights = self.weights.chunks_exact(self.steps * 2);
        let activations = self.activations.chunks_exact(self.activation_steps * 2);
        let activations = activations.map(|panel| &panel[..self.steps * 2]);
        // From a panel of sums to that of the next left or right panel, in tiles.
        let (near, far) = (4, activations.len() * 4);
        match self.direction {
            Direction::Forward => {
                groups(weights, activations, (self.width, self.tokens), (far, near), sums, &mut multiply);
            }
            Direction::Backward => {
                groups(activations, weights, (self.tokens, self.width), (near, far), sums, &mut multiply);
            }
        }
    }
}

/// [`Block::for_each_group`] for rows and columns of sums, and the tiles from the sums of one left panel
/// to those of the next, and from those of one right panel to those of the next.
#[inline(always)]
pub(super) fn groups<'a>(
    left: impl Iterator<Item = &'a [Tile]> + Clone,
    mut right: impl Iterator<Item = &'a [Tile]>,
    (rows, columns): (usize, usize),
    (left_stride, right_stride): (usize, usize),
    sums: &mut [Tile],
    multiply: &mut impl FnMut(Group<'_>),
) {
    let mut first_column = 0;
    while let Some(panel) = right.next() {
        let right = [panel, right.next().unwrap_or_default()];
        for (i, left) in left.clone().enumerate() {
            let sums = &mut sums[first_column / PANEL * right_stride + i * left_stride..];
            let (first, second) = sums.split_at_mut(right_stride.min(sums.len()));
            multiply(Group {
                left,
                right,
                sums: [first.first_chunk_mut(), second.first_chunk_mut()],
                rows: (rows - i * PANEL).min(PANEL),
                columns: (columns - first_column).min(2 * PANEL),
            });
        }
        first_column += 2 * PANEL;
    }
}

/// An element type that microkernels multiply: f32, or bf16 where the CPU can.
pub trait Packable: Element {
    /// Elements in a word.
    const PER_WORD: usize;
    /// Elements of the summed dimension in a tile.
    const STEP: usize = SIDE * Self::PER_WORD;
    /// The loops for panels of this type; `None` where this path has none.
    fn panels(kernels: &Kernels) -> Option<&PanelKernels>;
    /// `values` in this type; `scratch` is used where that is another one.
    fn cast<'a, T: Element>(kernels: &Kernels, values: &'a [T], scratch: &'a mut [Self]) -> &'a [Self];
    /// Write the factor's values from `first` on in this type.
    fn read(kernels: &Kernels, factor: &Floats<'_>, first: usize, out: &mut [Self]);
    /// `PER_WORD` runs of weights, one after another in `group` → row `word` of the right operand's panels.
    fn put_group(kernels: &Kernels, group: &[Self], word: usize, steps: usize, panels: &mut [Tile]);
}

/// Steps of the summed dimension in a block: both panels of a block must fit a first-level cache of
/// 48 KiB together, for AMX consumes a step in 64 cycles, and only that cache brings it that fast. The
/// AVX-512 microkernel's three panels fill it; of longer ones it reads a part from the second level.
pub const BLOCK_STEPS: usize = 8;

/// As many steps still leave that cache room to stream the other operand through.
pub const MOST_STEPS: usize = 20;

impl Packable for f32 {
    const PER_WORD: usize = 1;

    fn panels(kernels: &Kernels) -> Option<&PanelKernels> {
        Some(&kernels.panels_f32)
    }

    fn cast<'a, T: Element>(kernels: &Kernels, values: &'a [T], scratch: &'a mut [Self]) -> &'a [Self] {
        T::as_f32(values).unwrap_or_else(|| {
            let scratch = &mut scratch[..values.len()];
            T::widen(kernels, values, scratch);
            scratch
        })
    }

    fn read(kernels: &Kernels, factor: &Floats<'_>, first: usize, out: &mut [Self]) {
        factor.widen(kernels, first, out);
    }

    fn put_group(_: &Kernels, group: &[Self], word: usize, steps: usize, panels: &mut [Tile]) {
        for (i, run) in group.as_chunks::<SIDE>().0.iter().enumerate() {
            panels[i / 2 * steps * 2 + word / SIDE * 2 + i % 2].0[word % SIDE] = run.map(f32::to_bits);
        }
    }
}

impl Packable for bf16 {
    const PER_WORD: usize = 2;

    fn panels(kernels: &Kernels) -> Option<&PanelKernels> {
        kernels.bf16.as_ref().map(|bf16| &bf16.panels)
    }

    fn cast<'a, T: Element>(_: &Kernels, values: &'a [T], scratch: &'a mut [Self]) -> &'a [Self] {
        T::as_bf16(values).unwrap_or_else(|| {
            let scratch = &mut scratch[..values.len()];
            for (value, out) in values.iter().zip(&mut *scratch) {
                *out = bf16::from_f32(value.to_f32());
            }
            scratch
        })
    }

    fn read(_: &Kernels, factor: &Floats<'_>, first: usize, out: &mut [Self]) {
        factor.narrow(first, out);
    }

    fn put_group(kernels: &Kernels, group: &[Self], word: usize, steps: usize, panels: &mut [Tile]) {
        let Some(bf16_kernels) = &kernels.bf16 else { return };
        let (even, odd) = group.split_at(group.len() / 2);
        let runs = even.as_chunks::<SIDE>().0.iter().zip(odd.as_chunks::<SIDE>().0);
        for (i, (even, odd)) in runs.enumerate() {
            let row = &mut panels[i / 2 * steps * 2 + word / SIDE * 2 + i % 2].0[word % SIDE];
            (bf16_kernels.interleave)(even, odd, row);
        }
    }
}

/// Row `row` of the panel that starts at `tiles[0]`: values go to consecutive steps, the last one
/// padded with zeros.
pub fn put_row<T: Packable>(values: &[T], row: usize, tiles: &mut [Tile]) {
    let (half, row) = (row / SIDE, row % SIDE);
    let mut chunks = values.chunks_exact(T::STEP);
    let mut step = 0;
    for values in &mut chunks {
        // SAFETY: STEP values are 64 bytes, copied into a row of 64 bytes; a `Packable` is f32 or
        // bf16, which have no padding, and every bit pattern is a u32.
        unsafe {
            let out = tiles[step * 2 + half].0[row].as_mut_ptr().cast::<u8>();
            std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), out, 64);
        }
        step += 1;
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        let words = &mut tiles[step * 2 + half].0[row];
        *words = [0; SIDE];
        // SAFETY: as above, for fewer values than a row holds.
        unsafe {
            let out = words.as_mut_ptr().cast::<u8>();
            std::ptr::copy_nonoverlapping(rest.as_ptr().cast::<u8>(), out, size_of_val(rest));
        }
    }
}
