//! Operands → tiles: activations as they are, weights decoded on the way.

use super::scales::{self, DecodedScales, RowScales};
use super::tile::{self, PANEL, Packable, SIDE, Tile};
use super::{BLOCK_OUTPUTS, Direction, Factor, MOST_STEPS, Product, Span};
use crate::dequantize::dequantize_run;
use crate::element::Element;
use crate::memory::Scratch;
use crate::simd::{Kernels, Run, fetch_next};
use half::bf16;
use std::marker::PhantomData;
use std::ops::Range;

/// Weights of a row that are decoded at a time, at most.
pub(super) const LONGEST_RUN: usize = 640;
const _: () = assert!(
    BLOCK_OUTPUTS <= LONGEST_RUN && MOST_STEPS * bf16::STEP <= LONGEST_RUN,
    "a run is as long as a block is wide or deep"
);

/// Codes and absmax of a run of zeros.
static ZERO_CODES: [u8; LONGEST_RUN / 2] = [0x77; LONGEST_RUN / 2];
static ZERO_ABSMAX: [f32; LONGEST_RUN / 32] = [0.0; LONGEST_RUN / 32];

/// Panels of activations that are packed by one task.
const TASK_PANELS: usize = 4;

/// Runs of some rows of W, to be asked for in order: each has what is needed soon brought nearer.
pub(super) struct Runs<'a> {
    /// From the first row's run on.
    codes: &'a [u8],
    scales: RowScales<'a>,
    rows: usize,
    /// Bytes from one run to the next.
    stride: usize,
    /// Bytes of a run.
    length: usize,
    /// Bytes from a run to what is needed after all of these, if anything is.
    ahead: Option<usize>,
}

impl<'a> Runs<'a> {
    /// Row `i`; zeros past the last one.
    // Handed over through memory, each run would wait for what the one before it stored.
    #[inline(always)]
    pub(super) fn of(&self, i: usize) -> Run<'a> {
        let (piece, length, from) = (self.scales.piece, self.length, i * self.stride);
        if i >= self.rows {
            let (codes, absmax) = (&ZERO_CODES[..length], &ZERO_ABSMAX[..2 * length / piece]);
            return Run { codes, absmax, block_size: piece };
        }
        if let Some(ahead) = self.ahead {
            fetch_next(&self.codes[from + ahead..][..length]);
        }
        if i + 16 < self.rows {
            fetch_next(&self.codes[from + 16 * self.stride..][..length]);
        }
        Run { codes: &self.codes[from..][..length], absmax: self.scales.row(i), block_size: piece }
    }

    /// The absmax of row `i`.
    pub(super) fn absmax(&self, i: usize) -> &'a [f32] {
        self.scales.row(i)
    }

    /// Weights that share an absmax.
    pub(super) fn block_size(&self) -> usize {
        self.scales.piece
    }
}

/// Packed activations: for each span its panels, one after another. (Panels a power of two apart
/// would share cache sets.)
pub(super) struct Packing<'a, C> {
    spans: &'a [Span],
    panels: usize,
    tokens: usize,
    tiles: Scratch,
    element: PhantomData<C>,
}

/// Something to prepare before blocks can be multiplied.
pub(super) enum Task<'a> {
    /// Some panels of a span of activations: W's part of it, or that of the rank.
    Pack { span: &'a Span, first_token: usize, tokens: usize, tiles: &'a mut [Tile] },
    /// The absmax of rows of W from `row` on.
    Scales { row: usize, columns: Range<usize>, piece: usize, out: &'a mut [f32] },
}

impl<'a, C: Packable> Packing<'a, C> {
    /// Room for `tokens` rows of activations.
    pub(super) fn new(spans: &'a [Span], tokens: usize) -> Self {
        let panels = tokens.div_ceil(PANEL);
        let steps: usize = spans.iter().map(Span::steps::<C>).sum();
        Self { spans, panels, tokens, tiles: Scratch::take(panels * steps * 2), element: PhantomData }
    }

    pub(super) fn spans(&self) -> &'a [Span] {
        self.spans
    }

    /// The packed panels of span `i`.
    pub(super) fn span(&self, i: usize) -> &[Tile] {
        let before: usize = self.spans[..i].iter().map(Span::steps::<C>).sum();
        &self.tiles[self.panels * before * 2..][..self.panels * self.spans[i].steps::<C>() * 2]
    }

    /// W's part of all spans, or that of the rank, as tasks for several threads.
    pub(super) fn tasks(&mut self, rank: bool) -> Vec<Task<'_>> {
        let mut tasks = Vec::new();
        let mut rest = &mut self.tiles[..];
        for span in self.spans {
            let tiles = span.steps::<C>() * 2;
            let (part, after) = std::mem::take(&mut rest).split_at_mut(self.panels * tiles);
            rest = after;
            if !(if rank { &span.rank } else { &span.depth }).is_empty() {
                for (i, tiles) in part.chunks_mut(TASK_PANELS * tiles).enumerate() {
                    let first_token = i * TASK_PANELS * PANEL;
                    let tokens = (self.tokens - first_token).min(TASK_PANELS * PANEL);
                    tasks.push(Task::Pack { span, first_token, tokens, tiles });
                }
            }
        }
        tasks
    }
}

impl<T: Element> Product<'_, T> {
    /// Forward, weights are the microkernel's left operand; backward, activations are.
    pub(super) fn weights_are_left(&self) -> bool {
        self.direction == Direction::Forward
    }

    /// Do a task that concerns the activations from row `first` on.
    pub(super) fn prepare<C: Packable>(&self, kernels: &Kernels, first: usize, task: Task<'_>) {
        match task {
            Task::Pack { span, first_token, tokens, tiles } => {
                let depth = self.depth();
                let rows = &self.activations[(first + first_token) * depth..][..tokens * depth];
                let steps = 0..span.depth_steps::<C>();
                self.pack_rows::<C>(kernels, rows, depth, &span.depth, steps, span.steps::<C>(), tiles);
            }
            Task::Scales { row, columns, piece, out } => {
                scales::decode(self, kernels, row, &columns, piece, out);
            }
        }
    }

    /// Do a task that concerns the bottleneck's activations, `hidden`.
    pub(super) fn pack_hidden<C: Packable>(&self, kernels: &Kernels, hidden: &[T], task: Task<'_>) {
        if let Task::Pack { span, first_token, tokens, tiles } = task {
            let rank = self.rank();
            let rows = &hidden[first_token * rank..][..tokens * rank];
            let steps = span.depth_steps::<C>()..span.steps::<C>();
            self.pack_rows::<C>(kernels, rows, rank, &span.rank, steps, span.steps::<C>(), tiles);
        }
    }

    /// Columns `piece` of rows of `width` values → steps `steps` of panels of `panel_steps` steps, in
    /// the form that the activations' side of the microkernel reads.
    fn pack_rows<C: Packable>(
        &self,
        kernels: &Kernels,
        rows: &[T],
        width: usize,
        piece: &Range<usize>,
        steps: Range<usize>,
        panel_steps: usize,
        tiles: &mut [Tile],
    ) {
        let mut scratch = [C::default(); LONGEST_RUN];
        let panels = tiles.chunks_exact_mut(panel_steps * 2);
        for (panel, rows) in panels.zip(rows.chunks(PANEL * width)) {
            let tiles = &mut panel[steps.start * 2..steps.end * 2];
            for (token, row) in rows.chunks_exact(width).enumerate() {
                tile::put_row(C::cast(kernels, &row[piece.clone()], &mut scratch), token, tiles);
            }
            if self.weights_are_left() {
                for tile in tiles {
                    (kernels.transpose)(tile);
                }
            }
        }
    }

    /// A span of the weights of some outputs → panels.
    pub(super) fn fill<C: Packable>(
        &self,
        kernels: &Kernels,
        scales: &DecodedScales,
        outputs: Range<usize>,
        span: &Span,
        scratch: &mut [C],
        panels: &mut [Tile],
    ) {
        let (depth_steps, steps) = (span.depth_steps::<C>(), span.steps::<C>());
        if !span.depth.is_empty() && !self.decode::<C>(kernels, scales, &outputs, span, panels) {
            let columns = self.matrix.columns();
            let fill = |row: usize, first: usize, out: &mut [C]| {
                dequantize_run(kernels, &self.matrix, row * columns + first, out);
            };
            let to = (0..depth_steps, steps);
            self.fill_panels(&outputs, span.depth.clone(), to, scratch, panels, kernels, fill);
        }
        if let Some((_, factor)) = self.factors().filter(|_| !span.rank.is_empty()) {
            // The other factor: its summed dimension is the rank.
            self.pack_factor(
                kernels,
                &factor,
                outputs,
                span.rank.clone(),
                depth_steps..steps,
                scratch,
                panels,
            );
        }
    }

    /// Weights of W, straight into tiles. Returns false, nothing written, where that cannot be done.
    fn decode<C: Packable>(
        &self,
        kernels: &Kernels,
        scales: &DecodedScales,
        outputs: &Range<usize>,
        span: &Span,
        panels: &mut [Tile],
    ) -> bool {
        let Some((left, right)) = C::panels(kernels).and_then(|loops| loops.decode) else { return false };
        let Some(runs) = self.runs(scales, outputs, &span.depth) else { return false };
        let (depth_steps, steps) = (span.depth_steps::<C>(), span.steps::<C>());
        if self.weights_are_left() {
            for i in 0..outputs.len() {
                left(&runs.of(i), i % PANEL, &mut panels[i / PANEL * steps * 2..][..depth_steps * 2]);
            }
        } else {
            // A word's worth of rows at a time: one of f32, two of bf16. Words past the last row
            // must hold zeros.
            for word in 0..depth_steps * SIDE {
                let first = runs.of(word * C::PER_WORD);
                if C::PER_WORD == 1 {
                    right(&[first], word, steps, panels);
                } else {
                    right(&[first, runs.of(word * C::PER_WORD + 1)], word, steps, panels);
                }
            }
        }
        true
    }

    /// The weights of some outputs and of `depth`, as runs of rows of W; `None` where their scales are not at hand.
    pub(super) fn runs<'a>(
        &'a self,
        scales: &'a DecodedScales,
        outputs: &Range<usize>,
        depth: &Range<usize>,
    ) -> Option<Runs<'a>> {
        let (rows, run) = if self.weights_are_left() { (outputs, depth) } else { (depth, outputs) };
        let scales = scales.of(rows, run)?;
        let columns = self.matrix.columns();
        // The run's codes in the rows from the first one on, and where what is decoded next begins: the next
        // span of the same rows, or the same columns of later rows.
        let (stride, length) = (columns / 2, run.len() / 2);
        let codes = &self.matrix.codes()[rows.start * stride + run.start / 2..];
        let ahead = match self.direction {
            Direction::Forward if run.end + run.len() <= columns => Some(length),
            Direction::Backward if rows.end + rows.len() <= self.matrix.rows() => Some(rows.len() * stride),
            _ => None,
        };
        if depth.start == 0 {
            // Nobody asked for the first span in advance.
            (0..rows.len()).for_each(|i| fetch_next(&codes[i * stride..][..length]));
        }
        Some(Runs { codes, scales, rows: rows.len(), stride, length, ahead })
    }

    /// A factor of the low-rank part, which is dense, to steps `steps` of panels.
    pub(super) fn pack_factor<C: Packable>(
        &self,
        kernels: &Kernels,
        factor: &Factor<'_>,
        outputs: Range<usize>,
        depth: Range<usize>,
        steps: Range<usize>,
        scratch: &mut [C],
        panels: &mut [Tile],
    ) {
        let fill = |row: usize, first: usize, out: &mut [C]| {
            C::read(kernels, &factor.values, row * factor.columns + first, out);
        };
        let panel_steps = panels.len() / 2 / outputs.len().div_ceil(PANEL).max(1);
        self.fill_panels(&outputs, depth, (steps, panel_steps), scratch, panels, kernels, fill);
    }

    /// `fill(row, first column, out)` reads a run of a row of W (or of a factor in its place). Writes
    /// the given steps of panels of `panel_steps` steps.
    fn fill_panels<C: Packable>(
        &self,
        outputs: &Range<usize>,
        depth: Range<usize>,
        (steps, panel_steps): (Range<usize>, usize),
        scratch: &mut [C],
        panels: &mut [Tile],
        kernels: &Kernels,
        fill: impl Fn(usize, usize, &mut [C]),
    ) {
        let width = outputs.len();
        let padded = width.next_multiple_of(PANEL);
        if self.weights_are_left() {
            let run = &mut scratch[..steps.len() * C::STEP];
            run.fill(C::default());
            for i in 0..padded {
                if i < width {
                    fill(outputs.start + i, depth.start, &mut run[..depth.len()]);
                } else if i == width {
                    run.fill(C::default());
                }
                let panel = &mut panels[i / PANEL * panel_steps * 2..][..panel_steps * 2];
                tile::put_row(run, i % PANEL, &mut panel[steps.start * 2..steps.end * 2]);
            }
        } else {
            let group = &mut scratch[..C::PER_WORD * padded];
            group.fill(C::default());
            for word in 0..steps.len() * SIDE {
                for (j, run) in group.chunks_exact_mut(padded).enumerate() {
                    let row = depth.start + word * C::PER_WORD + j;
                    if row < depth.end {
                        fill(row, outputs.start, &mut run[..width]);
                    } else {
                        run.fill(C::default());
                    }
                }
                C::put_group(kernels, group, steps.start * SIDE + word, panel_steps, panels);
            }
        }
    }
}
