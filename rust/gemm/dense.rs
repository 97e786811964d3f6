//! Products of many activation rows with a dense matrix, computed in f32: a low-rank part whose hidden
//! activations are given, beside a packed matrix that is not there.
//!
//! ```text
//! forward     y [tokens, rows]      = x  [tokens, columns] Wᵀ + bias     "hidden Bᵀ", B = W
//! backward    dX [tokens, columns]  = dY [tokens, rows]    W             "hidden A",  A = W
//! ```
//!
//! Weights of a half type are widened block by block, in the cache. That is a model's output layer in
//! training, on CPUs that multiply f32 faster than what the weights are stored in.

use super::tile::PANEL;
use super::{Direction, Hidden, LowRank, MOST_TOKENS, Product};
use crate::element::{Element, Floats};
use crate::error::Error;
use crate::memory::Scratch;
use crate::packed_matrix::{PackedMatrix, Scales};
use crate::parallel;
use crate::quantize::check_length;
use crate::simd::Kernels;

/// Rows of W that a backward product sums over at a time. Deeper ones would leave room for few tokens
/// in a pass, and each pass widens all weights.
const SEGMENT_ROWS: usize = 2048;

/// What some tokens' running sums, those of the next segment, its activations and their packed copy may
/// take together.
const SEGMENT_BYTES: usize = 6 << 20;

/// Tokens whose activations one task copies.
const TASK_TOKENS: usize = 16;

/// Operands of one product.
#[derive(Clone, Copy, Debug)]
pub struct DenseProduct<'a, T> {
    /// Forward or backward.
    pub direction: Direction,
    /// W [rows, columns], row-major.
    pub weight: Floats<'a>,
    /// Rows of W.
    pub rows: usize,
    /// Columns of W.
    pub columns: usize,
    /// x or dY, row-major.
    pub activations: &'a [T],
    /// Rows of `activations`.
    pub tokens: usize,
    /// Added to each row of the result.
    pub bias: Option<&'a [T]>,
}

impl<T: Element> DenseProduct<'_, T> {
    /// Write the product, summed in f32 and rounded once, to `out` [tokens, outputs].
    ///
    /// Scratch: about 8 MiB per thread, as [`Product::write`].
    ///
    /// # Errors
    /// [`Error::Operand`] when an operand has another length than the shapes ask for.
    pub fn write(&self, kernels: &Kernels, out: &mut [T], threads: usize) -> Result<(), Error> {
        let Self { direction, weight, rows, columns, activations, tokens, bias } = *self;
        let nothing = Floats::F32(&[]);
        let (a, b, rank, shape) = match direction {
            Direction::Forward => (nothing, weight, columns, (rows, 0)),
            Direction::Backward => (weight, nothing, rows, (0, columns)),
        };
        check_length("weight", weight.len(), rows * columns)?;
        if direction == Direction::Backward && rows > SEGMENT_ROWS {
            return self.write_in_segments(kernels, out, threads);
        }
        let product = Product {
            direction,
            matrix: PackedMatrix::new(&[], Scales::Single(&[]), shape.0, shape.1, 64)?,
            activations: &[],
            tokens,
            low_rank: Some(LowRank { a, b, rank, scaling: 1.0 }),
            bias,
        };
        product.check(out.len(), activations.len())?;
        product.write_passes::<f32>(kernels, out, Hidden::Given(activations), threads.max(1));
        Ok(())
    }

    /// A deep backward product as a sum, in f32, of shallower ones.
    fn write_in_segments(&self, kernels: &Kernels, out: &mut [T], threads: usize) -> Result<(), Error> {
        let Self { weight, rows, columns, activations, tokens, .. } = *self;
        check_length("x", activations.len(), tokens * rows)?;
        check_length("y", out.len(), tokens * columns)?;
        if let Some(bias) = self.bias {
            check_length("bias", bias.len(), columns)?;
        }
        if out.is_empty() {
            return Ok(());
        }
        let values_per_token = 2 * (columns + SEGMENT_ROWS);
        let most = (SEGMENT_BYTES / size_of::<f32>() / values_per_token).clamp(PANEL, MOST_TOKENS);
        let room_for = |count: usize| Scratch::of::<f32>(most.min(tokens) * count);
        let (mut total, mut part, mut segment) =
            (room_for(columns), room_for(columns), room_for(SEGMENT_ROWS));
        for (activations, out) in activations.chunks(most * rows).zip(out.chunks_mut(most * columns)) {
            let tokens = activations.len() / rows;
            let total = &mut total.values_mut()[..out.len()];
            let part = &mut part.values_mut()[..out.len()];
            total.fill(0.0);
            for start in (0..rows).step_by(SEGMENT_ROWS) {
                let height = (rows - start).min(SEGMENT_ROWS);
                let segment = &mut segment.values_mut()[..tokens * height];
                let tasks = segment.chunks_mut(TASK_TOKENS * height);
                let tasks = tasks.zip(activations.chunks(TASK_TOKENS * rows)).collect::<Vec<_>>();
                parallel::for_each(tasks, threads, |(segment, activations)| {
                    let rows = activations.chunks_exact(rows).map(|row| &row[start..start + height]);
                    for (row, out) in rows.zip(segment.chunks_exact_mut(height)) {
                        T::widen(kernels, row, out);
                    }
                });
                let product = DenseProduct {
                    direction: Direction::Backward,
                    weight: weight.part(start * columns..(start + height) * columns),
                    rows: height,
                    columns,
                    activations: &*segment,
                    tokens,
                    bias: None,
                };
                product.write(kernels, part, threads)?;
                for (total, part) in total.iter_mut().zip(&*part) {
                    *total += part;
                }
            }
            if let Some(bias) = self.bias {
                for (total, bias) in total.iter_mut().zip(bias.iter().cycle()) {
                    *total += bias.to_f32();
                }
            }
            T::narrow(kernels, total, out);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{DenseProduct, Direction};
    use crate::element::{Element, Floats};
    use crate::error::Error;
    use crate::simd::available;
    use half::{bf16, f16};

    fn values<T: Element>(count: usize, seed: u64) -> Vec<T> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| T::from_f32(next())).collect()
    }

    fn agrees_with_f64<T: Element>(view: fn(&[T]) -> Floats<'_>, epsilon: f64) {
        // Deep ones need several passes over the tokens.
        for (tokens, rows, columns) in [
            (0, 3, 4),
            (1, 1, 1),
            (3, 17, 5),
            (70, 330, 64),
            (33, 5, 577),
            (40, 40_000, 3),
            (600, 2100, 40),
            (2, 4, 0),
            (2, 0, 4),
        ] {
            let (weight, bias): (Vec<T>, Vec<T>) = (values(rows * columns, 1), values(rows.max(columns), 3));
            let wide: Vec<f64> = weight.iter().map(|w| f64::from(w.to_f32())).collect();
            for direction in [Direction::Forward, Direction::Backward] {
                let forward = direction == Direction::Forward;
                let (depth, outputs) = if forward { (columns, rows) } else { (rows, columns) };
                let activations: Vec<T> = values(tokens * depth, 2);
                for path in available() {
                    let product = DenseProduct {
                        direction,
                        weight: view(&weight),
                        rows,
                        columns,
                        activations: &activations,
                        tokens,
                        bias: Some(&bias[..outputs]),
                    };
                    let [mut one, mut two] =
                        [vec![T::default(); tokens * outputs], vec![T::default(); tokens * outputs]];
                    product.write(path, &mut one, 1).expect("lengths fit");
                    product.write(path, &mut two, 2).expect("lengths fit");
                    for (i, (one, two)) in one.iter().zip(&two).enumerate() {
                        let (token, output) = (i / outputs, i % outputs);
                        let weight = |k: usize| {
                            wide[if forward { output * columns + k } else { k * columns + output }]
                        };
                        let x = |k: usize| f64::from(activations[token * depth + k].to_f32());
                        let sum: f64 = (0..depth).map(|k| weight(k) * x(k)).sum();
                        let exact = sum + f64::from(bias[output].to_f32());
                        let got = f64::from(one.to_f32());
                        assert!(got == f64::from(two.to_f32()), "{}: two threads", path.name);
                        let bound = epsilon * exact.abs() + 3e-7 * (depth as f64 + 10.0);
                        assert!((got - exact).abs() <= bound, "{} {tokens} {rows} {columns}", path.name);
                    }
                }
            }
        }
    }

    #[test]
    fn products_agree_with_f64() {
        agrees_with_f64::<f32>(|values| Floats::F32(values), 1e-6);
        agrees_with_f64::<f16>(|values| Floats::F16(values), 1e-3);
        agrees_with_f64::<bf16>(|values| Floats::Bf16(values), 5e-3);
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let (path, weight) = (available()[0], [0.0_f32; 12]);
        let product = DenseProduct {
            direction: Direction::Backward,
            weight: Floats::F32(&weight),
            rows: 3,
            columns: 4,
            activations: &weight[..6],
            tokens: 2,
            bias: None,
        };
        assert!(product.write(path, &mut [0.0; 8], 1).is_ok());
        assert!(matches!(product.write(path, &mut [0.0; 7], 1), Err(Error::Operand { .. })));
        let short = DenseProduct { activations: &weight[..5], ..product };
        assert!(matches!(short.write(path, &mut [0.0; 8], 1), Err(Error::Operand { .. })));
        let thin = DenseProduct { weight: Floats::F32(&weight[..11]), ..product };
        assert!(matches!(thin.write(path, &mut [0.0; 8], 1), Err(Error::Operand { .. })));
    }
}
