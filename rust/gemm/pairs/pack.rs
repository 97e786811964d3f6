//! Operands → panels of pairs: activations and factors brought into fixed point, weights looked up there.

use super::panel::{self, UNIT, UNIT_STEPS};
use super::steps;
use crate::element::Element;
use crate::gemm::pack::{self, LONGEST_RUN};
use crate::gemm::scales::{self, DecodedScales};
use crate::gemm::tile::{PANEL, SIDE, Tile};
use crate::gemm::{Direction, Product};
use crate::memory::Scratch;
use crate::simd::{FIXED_TOLERANCE, Kernels, PAIR_SCALE, PREPARED_MULTIPLE, PairPanels, PairStep, Run};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Columns of a factor that are looked at together: whole units.
const FACTOR_COLUMNS: usize = 16 * UNIT;

/// How many of some absmax that share a unit may be so small that their weights lose more than fixed point may:
/// they bring as little to results, unless gradients are large where weights are small.
fn few_of_absmax(count: usize) -> u32 {
    (count / 8) as u32
}

/// The same for a factor's values, which are of all sizes; not an outlier beside all the others.
fn few_of_factor(count: usize) -> u32 {
    (count * 3 / 4).max(7) as u32
}

/// How a row of activations is carried in fixed point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowState {
    /// As it is.
    Once,
    /// By two rows, the second of which holds what the first one loses.
    Twice,
    /// Not at all: computed in f32.
    Apart,
}

/// Packed activations: panel by panel, pieces one after another.
pub(super) struct Packed {
    pub(super) pieces: Vec<Range<usize>>,
    pub(super) tiles: Scratch,
}

/// Something to prepare before blocks can be multiplied.
pub(super) enum Task<'a> {
    /// A panel of activations, from row `first_token` on.
    Panel {
        first_token: usize,
        pieces: &'a [Range<usize>],
        tiles: &'a mut [Tile],
        states: &'a mut [RowState],
    },
    /// The absmax of rows of W.
    Scales(pack::Task<'a>),
}

/// One of the factors of the low-rank part.
#[derive(Clone, Copy)]
pub(super) enum WhichFactor {
    /// The one that activations meet.
    First,
    /// The one that leads to the result.
    Second,
}

impl Packed {
    /// Room for `panels` panels.
    pub(super) fn new(pieces: Vec<Range<usize>>, panels: usize) -> Self {
        let tiles = Scratch::take(panels * super::tiles(&pieces));
        Self { pieces, tiles }
    }

    pub(super) fn tiles_per_panel(&self) -> usize {
        super::tiles(&self.pieces)
    }

    /// Make a panel one of zeros.
    pub(super) fn clear(&mut self, panel: usize) {
        let tiles = self.tiles_per_panel();
        self.tiles[panel * tiles..][..tiles].fill(Tile::ZERO);
    }

    /// Piece `i` of a panel.
    pub(super) fn piece(&self, panel: usize, i: usize) -> &[Tile] {
        let first = panel * self.tiles_per_panel() + super::tiles(&self.pieces[..i]);
        &self.tiles[first..][..panel::tiles(steps(&self.pieces[i]))]
    }

    /// What is to be packed, as tasks for several threads; each says how its rows are carried.
    pub(super) fn tasks<'a>(&'a mut self, states: &'a mut [RowState]) -> impl Iterator<Item = Task<'a>> {
        let (tiles, pieces) = (super::tiles(&self.pieces), &self.pieces[..]);
        let panels = self.tiles.chunks_exact_mut(tiles).zip(states.chunks_exact_mut(PANEL)).enumerate();
        panels.map(move |(i, (tiles, states))| Task::Panel { first_token: i * PANEL, pieces, tiles, states })
    }
}

impl<T: Element> Product<'_, T> {
    /// Do a task; `uneven` is set where absmax have too little in common.
    pub(super) fn do_task(&self, kernels: &Kernels, pairs: &PairPanels, task: Task<'_>, uneven: &AtomicBool) {
        match task {
            // Nothing will be read of it.
            Task::Panel { .. } if uneven.load(Ordering::Relaxed) => {}
            Task::Panel { first_token, pieces, tiles, states } => {
                let (depth, tokens) = (self.depth(), (self.tokens - first_token).min(PANEL));
                let rows = &self.activations[first_token * depth..][..tokens * depth];
                let tolerance = T::EPSILON * FIXED_TOLERANCE;
                let rows = rows.chunks_exact(depth);
                self.pack_panel(kernels, rows, depth, pieces, tiles, |token, row, prepared| {
                    if !(pairs.prepare)(row, tolerance, prepared) {
                        let finite = (pairs.prepare)(row, f32::INFINITY, prepared);
                        states[token] = if finite { RowState::Twice } else { RowState::Apart };
                    }
                    states[token] != RowState::Apart
                });
            }
            Task::Scales(task) => {
                let pack::Task::Scales { row, columns, piece, out } = task else { return };
                scales::decode(self, kernels, row, &columns, piece, out);
                let pieces = columns.len() / piece;
                // A typical weight is 0.4 of its absmax.
                let smallest = smallest::<T>() / 0.4;
                if self.direction == Direction::Backward
                    && !out
                        .chunks(UNIT * pieces)
                        .all(|absmax| are_even(absmax, pieces, smallest, few_of_absmax))
                {
                    uneven.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    /// Whether the values of both factors have enough in common to share units.
    pub(super) fn factors_are_even(&self, kernels: &Kernels) -> bool {
        let Some((first, second)) = self.factors() else { return true };
        let (outputs, depth, rank) = (self.outputs(), self.depth(), self.rank());
        // Each as the microkernel has it: [rank, depth] and [outputs, rank] forward, else the other way round.
        [(first, rank, depth), (second, outputs, rank)].into_iter().all(|(factor, rows, columns)| {
            let (rows, columns, unit) = match self.direction {
                Direction::Forward => (rows, columns, 1),
                Direction::Backward => (columns, rows, UNIT),
            };
            let mut scratch = Scratch::of::<f32>(unit * FACTOR_COLUMNS);
            (0..rows).step_by(unit).all(|row| {
                (0..columns).step_by(FACTOR_COLUMNS).all(|first| {
                    let (height, width) = (unit.min(rows - row), FACTOR_COLUMNS.min(columns - first));
                    let values = &mut scratch.values_mut()[..height * width];
                    for (i, values) in values.chunks_exact_mut(width).enumerate() {
                        factor.values.widen(kernels, (row + i) * columns + first, values);
                    }
                    if self.direction == Direction::Backward {
                        return are_even(values, width, smallest::<T>(), few_of_factor);
                    }
                    // A unit is 64 neighbours.
                    values.chunks(UNIT).all(|unit| is_even(unit, smallest::<T>()))
                })
            })
        })
    }

    /// What some rows lose, as rows of a panel of their own; sets `states` where that is refused in turn.
    pub(super) fn pack_losses(
        &self,
        kernels: &Kernels,
        pairs: &PairPanels,
        tokens: &[usize],
        pieces: &[Range<usize>],
        (tiles, states): (&mut [Tile], &mut [RowState]),
    ) {
        let depth = self.depth();
        let rows = tokens.iter().map(|token| &self.activations[token * depth..][..depth]);
        self.pack_panel(kernels, rows, depth, pieces, tiles, |i, row, prepared| {
            (pairs.prepare)(row, f32::INFINITY, prepared);
            for (values, step) in row.chunks_mut(PREPARED_MULTIPLE).zip(&*prepared) {
                for (k, value) in values.iter_mut().enumerate() {
                    let word = (step.pairs[k / 2] >> (16 * (k % 2))) as i16;
                    let carried = f64::from(word) * f64::from(step.unit[k / 8]) * f64::from(PAIR_SCALE);
                    *value = (f64::from(*value) - carried) as f32;
                }
            }
            let fits = (pairs.prepare)(row, T::EPSILON * FIXED_TOLERANCE, prepared);
            states[i] = if fits { RowState::Twice } else { RowState::Apart };
            fits
        });
    }

    /// Up to 32 rows of `width` values → a panel, in the form that the activations' side of the microkernel
    /// reads. `prepare(index, widened row, result)` brings each into fixed point; where it returns false,
    /// zeros take the row's place.
    pub(super) fn pack_panel<'r>(
        &self,
        kernels: &Kernels,
        mut rows: impl Iterator<Item = &'r [T]>,
        width: usize,
        pieces: &[Range<usize>],
        tiles: &mut [Tile],
        mut prepare: impl FnMut(usize, &mut [f32], &mut [PairStep]) -> bool,
    ) where
        T: 'r,
    {
        let mut wide = Scratch::of::<f32>(width);
        let wide = &mut wide.values_mut()[..width];
        let mut prepared = Scratch::of::<PairStep>(width.div_ceil(PREPARED_MULTIPLE));
        let prepared = &mut prepared.values_mut::<PairStep>()[..width.div_ceil(PREPARED_MULTIPLE)];
        for index in 0..PANEL {
            let carried = rows.next().is_some_and(|row| {
                T::widen(kernels, row, wide);
                prepare(index, wide, prepared)
            });
            let (half, row) = (index / SIDE, index % SIDE);
            let mut first = 0;
            for piece in pieces {
                let steps = steps(piece);
                let panel = &mut tiles[first..][..panel::tiles(steps)];
                first += panel.len();
                for step in 0..steps {
                    let (at, within) = place(piece.start + step * panel::STEP);
                    let words = &prepared[at].pairs.as_chunks::<SIDE>().0[within / panel::STEP];
                    panel[2 * step + half].0[row] = words.map(i32::cast_unsigned);
                }
                for unit in 0..steps.div_ceil(UNIT_STEPS) {
                    let (at, within) = place(piece.start + unit * UNIT);
                    let value = if carried { prepared[at].unit[within / 8] } else { 0.0 };
                    panel::units_mut(panel, steps, unit, half)[row] = value.to_bits();
                }
            }
        }
        if self.direction == Direction::Forward {
            let mut first = 0;
            for piece in pieces {
                tiles[first..][..2 * steps(piece)].iter_mut().for_each(kernels.transpose);
                first += panel::tiles(steps(piece));
            }
        }
    }

    /// A piece of the weights of some outputs → panels.
    pub(super) fn fill_pairs(
        &self,
        pairs: &PairPanels,
        scales: &DecodedScales,
        outputs: &Range<usize>,
        piece: &Range<usize>,
        panels: &mut [Tile],
    ) {
        let Some(runs) = self.runs(scales, outputs, piece) else { return };
        let steps = steps(piece);
        let panel_tiles = panel::tiles(steps);
        if self.direction == Direction::Forward {
            for i in 0..outputs.len().next_multiple_of(PANEL) {
                let panel = &mut panels[i / PANEL * panel_tiles..][..panel_tiles];
                let run = runs.of(i);
                (pairs.decode_left)(run.codes, i % PANEL, &mut panel[..2 * steps]);
                for (unit, absmax) in run.absmax.iter().enumerate() {
                    panel::units_mut(panel, steps, unit, i % PANEL / SIDE)[i % SIDE] = absmax.to_bits();
                }
            }
            return;
        }
        for unit in 0..steps.div_ceil(UNIT_STEPS) {
            let mut largest = [0.0_f32; LONGEST_RUN / 32];
            for row in unit * UNIT..piece.len().min((unit + 1) * UNIT) {
                for (largest, absmax) in largest.iter_mut().zip(runs.absmax(row)) {
                    *largest = largest.max(absmax.abs());
                }
            }
            for (i, panel) in panels.chunks_exact_mut(panel_tiles).enumerate() {
                for half in 0..2 {
                    let largest = largest[(i * PANEL + half * SIDE) / runs.block_size()];
                    *panel::units_mut(panel, steps, unit, half) = [largest.to_bits(); SIDE];
                }
            }
            let divisors = largest.map(|largest| if largest > 0.0 { largest } else { 1.0 });
            for word in unit * UNIT_STEPS * SIDE..steps.min((unit + 1) * UNIT_STEPS) * SIDE {
                let mut absmax = [[0.0; LONGEST_RUN / 32]; 2];
                let pair: [Run<'_>; 2] = std::array::from_fn(|i| runs.of(2 * word + i));
                for (absmax, run) in absmax.iter_mut().zip(&pair) {
                    for (out, (absmax, divisor)) in absmax.iter_mut().zip(run.absmax.iter().zip(&divisors)) {
                        *out = absmax / divisor;
                    }
                }
                let pair =
                    std::array::from_fn(|i| Run { absmax: &absmax[i][..pair[i].absmax.len()], ..pair[i] });
                (pairs.decode_right)(&pair, word, panel_tiles, panels);
            }
        }
    }

    /// A piece of a factor, for some outputs, → panels.
    pub(super) fn fill_factor(
        &self,
        kernels: &Kernels,
        pairs: &PairPanels,
        which: WhichFactor,
        outputs: &Range<usize>,
        piece: &Range<usize>,
        panels: &mut [Tile],
    ) {
        let Some((first, second)) = self.factors() else { return };
        let factor = match which {
            WhichFactor::First => first,
            WhichFactor::Second => second,
        };
        let steps = steps(piece);
        let panel_tiles = panel::tiles(steps);
        let (rows, run) = match self.direction {
            Direction::Forward => (outputs, piece),
            Direction::Backward => (piece, outputs),
        };
        let mut values = Scratch::of::<f32>(rows.len() * run.len());
        let values = &mut values.values_mut()[..rows.len() * run.len()];
        for (row, values) in rows.clone().zip(values.chunks_exact_mut(run.len())) {
            factor.values.widen(kernels, row * factor.columns + run.start, values);
        }
        if self.direction == Direction::Forward {
            for output in 0..outputs.len().next_multiple_of(PANEL) {
                let panel = &mut panels[output / PANEL * panel_tiles..][..panel_tiles];
                let values = values.get(output * run.len()..(output + 1) * run.len()).unwrap_or_default();
                (pairs.factor_left)(values, output % PANEL, steps, panel);
            }
        } else {
            (pairs.factor_right)(values, run.len(), steps, panels);
        }
    }
}

/// Where a row's value is among its prepared steps.
fn place(column: usize) -> (usize, usize) {
    (column / PREPARED_MULTIPLE, column % PREPARED_MULTIPLE)
}

/// What a value may be, of the largest one that shares its unit, without losing more than fixed point may: words
/// lose 0.29 (root mean square).
fn smallest<T: Element>() -> f32 {
    0.29 / (PAIR_SCALE * T::EPSILON * FIXED_TOLERANCE)
}

/// Whether up to 64 rows of values, `width` each, may share units, one in each column: whether `few` of them are
/// less than `smallest` times the largest, in magnitude. Zeros lose nothing. False for what is not finite.
fn are_even(values: &[f32], width: usize, smallest: f32, few: fn(usize) -> u32) -> bool {
    const MOST: usize = 64;
    let most = few(values.len() / width.max(1));
    (0..width).step_by(MOST).all(|first| {
        let count = (width - first).min(MOST);
        let rows = || values.chunks_exact(width).map(|row| &row[first..first + count]);
        let (mut largest, mut small) = ([0; MOST], [0; MOST]);
        for row in rows() {
            for (largest, value) in largest.iter_mut().zip(row) {
                *largest = size(*value).max(*largest);
            }
        }
        let limits = largest.map(|largest| limit(largest, smallest));
        for row in rows() {
            for ((small, limit), value) in small.iter_mut().zip(&limits).zip(row) {
                *small += u32::from(is_small(*value, *limit));
            }
        }
        small.iter().all(|small| *small <= most) && largest.iter().all(|largest| *largest < INFINITE)
    })
}

/// The same for up to 64 values of a factor that share one unit.
fn is_even(values: &[f32], smallest: f32) -> bool {
    let largest = values.iter().fold(0, |largest, value| size(*value).max(largest));
    let limit = limit(largest, smallest);
    let small: u32 = values.iter().map(|value| u32::from(is_small(*value, limit))).sum();
    small <= few_of_factor(values.len()) && largest < INFINITE
}

/// The bits of infinity; those of NaN are above.
const INFINITE: u32 = f32::INFINITY.to_bits();

/// A magnitude's bits, which order as it does.
#[inline(always)]
fn size(value: f32) -> u32 {
    value.abs().to_bits()
}

#[inline(always)]
fn limit(largest: u32, smallest: f32) -> u32 {
    (f32::from_bits(largest) * smallest).to_bits()
}

#[inline(always)]
fn is_small(value: f32, limit: u32) -> bool {
    // Zero less one is above all of them.
    size(value).wrapping_sub(1) < limit.saturating_sub(1)
}
