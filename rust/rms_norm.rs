//! Root mean square normalization of rows, and its gradient, one pass over memory each.
//!
//! ```text
//! r  = 1 / √(mean x² + ε)        n = x r        y = w n             (arXiv 1910.07467, equation 4)
//! g  = w dY                      dX = r (g - n mean(g n))
//! ```
//!
//! n, y and g are rounded to the type of x, as models that compute them one after another have it;
//! all other arithmetic is f32.

use crate::element::Element;
use crate::error::Error;
use crate::parallel;
use crate::quantize::check_length;
use crate::simd::Kernels;

/// Fewer values than this are not worth a second thread.
const SMALL: usize = 1 << 15;

/// What rows are normalized by.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm<'a, T> {
    /// w, one per column.
    pub weight: &'a [T],
    /// ε, added to the mean square.
    pub epsilon: f32,
}

impl<T: Element> RmsNorm<'_, T> {
    /// Write the normalized rows of `x` to `y`.
    ///
    /// # Errors
    /// [`Error::Operand`] when x is not whole rows, or y is not as long.
    pub fn forward(&self, kernels: &Kernels, x: &[T], y: &mut [T], threads: usize) -> Result<(), Error> {
        let columns = self.check(x, y)?;
        self.for_each_row(y, x.len(), threads, |first, rows| {
            let mut row = self.room(kernels);
            for (x, y) in x[first..].chunks_exact(columns).zip(rows.chunks_exact_mut(columns)) {
                let scale = self.scale(kernels, x, &mut row.x);
                row.x.iter_mut().for_each(|x| *x *= scale);
                T::narrow(kernels, &row.x, y);
                row.times_weight(kernels, y);
                T::narrow(kernels, &row.other, y);
            }
        });
        Ok(())
    }

    /// Write the gradient over the rows of `x`, given the one over the result, to `out`.
    ///
    /// # Errors
    /// [`Error::Operand`] when x is not whole rows, or the others are not as long.
    pub fn backward(
        &self,
        kernels: &Kernels,
        x: &[T],
        grad: &[T],
        out: &mut [T],
        threads: usize,
    ) -> Result<(), Error> {
        let columns = self.check(x, out)?;
        check_length("grad", grad.len(), x.len())?;
        self.for_each_row(out, x.len(), threads, |first, rows| {
            let mut row = self.room(kernels);
            let operands = x[first..].chunks_exact(columns).zip(grad[first..].chunks_exact(columns));
            for ((x, grad), out) in operands.zip(rows.chunks_exact_mut(columns)) {
                row.times_weight(kernels, grad);
                T::narrow(kernels, &row.other, out);
                T::widen(kernels, out, &mut row.other);
                let scale = self.scale(kernels, x, &mut row.x);
                let mut product = [0.0];
                (kernels.matrix_vector)(&row.other, &row.x, &mut product);
                let shrink = product[0] * scale * scale / columns as f32;
                for (grad, x) in row.other.iter_mut().zip(&row.x) {
                    *grad = scale * (*grad - *x * shrink);
                }
                T::narrow(kernels, &row.other, out);
            }
        });
        Ok(())
    }

    /// Number of columns; `out` must be as long as `x`, whole rows.
    fn check(&self, x: &[T], out: &[T]) -> Result<usize, Error> {
        let columns = self.weight.len().max(1);
        check_length("x", x.len(), x.len().next_multiple_of(columns))?;
        check_length("out", out.len(), x.len())?;
        Ok(columns)
    }

    /// `work(first value, rows)` on runs of whole rows of `out`.
    fn for_each_row(
        &self,
        out: &mut [T],
        values: usize,
        threads: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let columns = self.weight.len().max(1);
        let threads = if values < SMALL { 1 } else { threads.max(1) };
        let run = (values / columns).div_ceil(4 * threads).max(1) * columns;
        let runs = out.chunks_mut(run).enumerate();
        parallel::for_each(runs, threads, |(i, rows)| work(i * run, rows));
    }

    /// r, and the row as f32.
    fn scale(&self, kernels: &Kernels, x: &[T], wide: &mut [f32]) -> f32 {
        T::widen(kernels, x, wide);
        let mut sum = [0.0];
        (kernels.matrix_vector)(wide, wide, &mut sum);
        1.0 / (sum[0] / x.len() as f32 + self.epsilon).sqrt()
    }

    /// Room for a row, and the weight as f32.
    fn room(&self, kernels: &Kernels) -> Room {
        let columns = self.weight.len().max(1);
        let mut weight = vec![0.0; self.weight.len()];
        T::widen(kernels, self.weight, &mut weight);
        Room { x: vec![0.0; columns], other: vec![0.0; columns], weight }
    }
}

/// Rows of f32.
struct Room {
    x: Vec<f32>,
    other: Vec<f32>,
    weight: Vec<f32>,
}

impl Room {
    /// `other` = w times values of T.
    fn times_weight<T: Element>(&mut self, kernels: &Kernels, values: &[T]) {
        T::widen(kernels, values, &mut self.other);
        for (value, weight) in self.other.iter_mut().zip(&self.weight) {
            *value *= weight;
        }
    }
}

#[cfg(test)]
mod tests;
