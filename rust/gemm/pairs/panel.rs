//! Panels of pairs of words: tiles as in `gemm/tile.rs`, then what their integers are multiples of.
//!
//! ```text
//! step 0: two tiles    step 1: two tiles    ...    units of steps 0 and 1, 2 and 3, ...
//! ```
//!
//! Two steps, 64 values of the summed dimension, share a unit in each of the panel's 32 rows. Products of
//! integers are summed over them exactly, and become floats once.

use crate::gemm::Direction;
use crate::gemm::tile::{Group, PANEL, SIDE, Tile, groups};
use crate::simd::fetch_soon;

/// Values of the summed dimension in a step.
pub const STEP: usize = 2 * SIDE;

/// Steps that share units.
pub const UNIT_STEPS: usize = 2;

/// Values of the summed dimension that share a unit.
pub const UNIT: usize = UNIT_STEPS * STEP;

/// Units that a tile has room for, of all rows of a panel.
const UNITS_IN_A_TILE: usize = SIDE * SIDE / PANEL;

/// Tiles of a panel of `steps` steps.
#[must_use]
pub const fn tiles(steps: usize) -> usize {
    2 * steps + steps.div_ceil(UNIT_STEPS).div_ceil(UNITS_IN_A_TILE)
}

/// The units of 16 rows of a panel of `steps` steps, f32 as bits: those of steps 2 `unit` and 2 `unit` + 1,
/// of the panel's first or second half.
#[inline(always)]
#[must_use]
pub fn units(panel: &[Tile], steps: usize, unit: usize, half: usize) -> &[u32; SIDE] {
    &panel[2 * steps + unit / UNITS_IN_A_TILE].0[unit % UNITS_IN_A_TILE * 2 + half]
}

/// The same for writing.
#[inline(always)]
#[must_use]
pub fn units_mut(panel: &mut [Tile], steps: usize, unit: usize, half: usize) -> &mut [u32; SIDE] {
    &mut panel[2 * steps + unit / UNITS_IN_A_TILE].0[unit % UNITS_IN_A_TILE * 2 + half]
}

/// A block of weights and the activations to multiply it with.
#[derive(Clone, Copy, Debug)]
pub struct PairBlock<'a> {
    /// Panels of weights.
    pub weights: &'a [Tile],
    /// Panels of activations.
    pub activations: &'a [&'a [Tile]],
    /// The activations that the next block will read, to be brought nearer meanwhile: as many, or none.
    pub next: &'a [&'a [Tile]],
    /// Steps of every panel.
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

/// Adds the block's product to `sums` (or sets them to it), as [`crate::gemm::tile::MultiplyBlock`] does.
pub type MultiplyPairs = fn(block: &PairBlock<'_>, sums: &mut [Tile]);

impl PairBlock<'_> {
    /// Call `multiply` for each left panel with each two right ones, as [`crate::gemm::tile::Block`] does.
    #[inline(always)]
    pub fn for_each_group(&self, sums: &mut [Tile], mut multiply: impl FnMut(Group<'_>)) {
        let weights = self.weights.chunks_exact(tiles(self.steps));
        let activations = self.activations.iter().copied();
        let (weight_panels, panels) = (weights.len(), activations.len());
        // From a panel of sums to that of the next left or right panel, in tiles.
        let (near, far) = (4, panels * 4);
        let mut done = 0;
        match self.direction {
            Direction::Forward => {
                groups(weights, activations, (self.width, self.tokens), (far, near), sums, &mut |group| {
                    let (pair, part) = (done / weight_panels, done % weight_panels);
                    for next in self.next.iter().skip(2 * pair).take(2) {
                        fetch_part(next, part, weight_panels);
                    }
                    done += 1;
                    multiply(group);
                });
            }
            Direction::Backward => {
                let pairs = weight_panels.div_ceil(2);
                groups(activations, weights, (self.tokens, self.width), (near, far), sums, &mut |group| {
                    if let Some(next) = self.next.get(done % panels) {
                        fetch_part(next, done / panels, pairs);
                    }
                    done += 1;
                    multiply(group);
                });
            }
        }
    }
}

/// Ask for part `part` of `parts` of a panel.
#[inline(always)]
fn fetch_part(panel: &[Tile], part: usize, parts: usize) {
    fetch_soon(&panel[part * panel.len() / parts..(part + 1) * panel.len() / parts]);
}
