//! y = x Wᵀ + b for few rows of x and a dense W, of which every weight is read once.
//!
//! This is a model's output layer, mostly in generation. The bound is memory; W's rows are widened a few
//! at a time, in the first-level cache.

use crate::element::Element;
use crate::error::Error;
use crate::memory::Scratch;
use crate::parallel::{self, Columns};
use crate::quantize::check_length;
use crate::simd::Kernels;

/// Rows of x, at most, for which the bound is memory.
pub const MOST_TOKENS: usize = 8;

/// Rows of W that are widened at a time, at most: of a small model, they fit a first-level cache.
const STRIP_ROWS: usize = 8;

/// Rows of W that are one unit of parallel work.
const RUN_ROWS: usize = 512;

/// Operands of one product, all of one type.
#[derive(Clone, Copy, Debug)]
pub struct DenseRows<'a, T> {
    /// W [out, in].
    pub weight: &'a [T],
    /// x [tokens, in].
    pub x: &'a [T],
    /// b [out].
    pub bias: Option<&'a [T]>,
    /// Rows of x.
    pub tokens: usize,
    /// in.
    pub columns: usize,
}

impl<T: Element> DenseRows<'_, T> {
    /// Write y [tokens, out], summed in f32 and rounded once.
    ///
    /// # Errors
    /// [`Error::Operand`] when an operand has another length than the shapes ask for.
    pub fn write(&self, kernels: &Kernels, y: &mut [T], threads: usize) -> Result<(), Error> {
        let Self { weight, x, bias, tokens, columns } = *self;
        let rows = y.len() / tokens.max(1);
        check_length("x", x.len(), tokens * columns)?;
        check_length("y", y.len(), tokens * rows)?;
        if tokens == 0 {
            return Ok(());
        }
        check_length("weight", weight.len(), rows * columns)?;
        if let Some(bias) = bias {
            check_length("bias", bias.len(), rows)?;
        }
        let mut wide = Scratch::of::<f32>(x.len());
        let wide = &mut wide.values_mut()[..x.len()];
        T::widen(kernels, x, wide);
        let wide = &*wide;
        let y = Columns::new(y, rows);
        parallel::for_each((0..rows).step_by(RUN_ROWS), threads, |start| {
            let run = start..rows.min(start + RUN_ROWS);
            let mut y = y.take(run.clone());
            let mut scratch = Scratch::of::<f32>(STRIP_ROWS * columns);
            for first in run.clone().step_by(STRIP_ROWS) {
                let height = (run.end - first).min(STRIP_ROWS);
                let strip = &weight[first * columns..(first + height) * columns];
                let strip = T::as_f32(strip).unwrap_or_else(|| {
                    let scratch = &mut scratch.values_mut()[..strip.len()];
                    T::widen(kernels, strip, scratch);
                    scratch
                });
                let mut sums = [0.0; STRIP_ROWS];
                for token in 0..tokens {
                    (kernels.matrix_vector)(strip, &wide[token * columns..][..columns], &mut sums[..height]);
                    if let Some(bias) = bias {
                        for (sum, bias) in sums.iter_mut().zip(&bias[first..first + height]) {
                            *sum += bias.to_f32();
                        }
                    }
                    T::narrow(kernels, &sums[..height], y.row_mut(token, first - run.start, height));
                }
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::DenseRows;
    use crate::element::Element;
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

    fn agrees_with_f64<T: Element>(epsilon: f64) {
        for path in available() {
            for (tokens, rows, columns) in
                [(0, 3, 4), (1, 1, 1), (3, 17, 5), (1, 1030, 64), (8, 530, 577), (2, 4, 0)]
            {
                let (weight, x): (Vec<T>, Vec<T>) = (values(rows * columns, 1), values(tokens * columns, 2));
                let bias: Vec<T> = values(rows, 3);
                let mut answers = Vec::new();
                for threads in [1, 2] {
                    let product = DenseRows { weight: &weight, x: &x, bias: Some(&bias), tokens, columns };
                    let mut y = vec![T::default(); tokens * rows];
                    product.write(path, &mut y, threads).expect("lengths fit");
                    answers.push(y.iter().map(|y| f64::from(y.to_f32())).collect::<Vec<_>>());
                }
                assert_eq!(answers[0], answers[1], "{}: two threads", path.name);
                for (i, y) in answers[0].iter().enumerate() {
                    let (token, row) = (i / rows, i % rows);
                    let exact: f64 = (0..columns)
                        .map(|c| {
                            let (w, x) = (weight[row * columns + c], x[token * columns + c]);
                            f64::from(w.to_f32()) * f64::from(x.to_f32())
                        })
                        .sum::<f64>()
                        + f64::from(bias[row].to_f32());
                    let close = (y - exact).abs() <= epsilon * exact.abs() + 1e-4;
                    assert!(close, "{} {tokens} {rows} {columns}: {y} for {exact}", path.name);
                }
            }
        }
    }

    #[test]
    fn products_agree_with_f64() {
        agrees_with_f64::<f32>(1e-6);
        agrees_with_f64::<f16>(1e-3);
        agrees_with_f64::<bf16>(5e-3);
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let path = available()[0];
        let (weight, x) = (vec![0.0_f32; 12], vec![0.0_f32; 4]);
        let product = DenseRows { weight: &weight, x: &x, bias: None, tokens: 1, columns: 4 };
        assert!(product.write(path, &mut [0.0; 3], 1).is_ok());
        assert!(matches!(product.write(path, &mut [0.0; 2], 1), Err(Error::Operand { .. })));
        let short = DenseRows { bias: Some(&x[..2]), ..product };
        assert!(matches!(short.write(path, &mut [0.0; 3], 1), Err(Error::Operand { .. })));
    }
}
