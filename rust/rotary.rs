//! Rotary position embedding of queries and keys, and its gradient, one pass over memory each.
//!
//! ```text
//! y1 = x1 c1 - x2 s1      dx1 = dy1 c1 + dy2 s2       (arXiv 2104.09864, equation 34, with the two
//! y2 = x2 c2 + x1 s2      dx2 = dy2 c2 - dy1 s1        halves of a head in the place of its pairs)
//! ```
//!
//! Products and sums are rounded to the type of x one after another, as models that are written out
//! operator by operator have it: results are equal to the bit.

use crate::element::Element;
use crate::error::Error;
use crate::gemm::Direction;
use crate::parallel;
use crate::quantize::check_length;
use crate::simd::Kernels;

/// Fewer values than this are not worth a second thread.
const SMALL: usize = 1 << 14;

/// Cosines and sines of the positions of a sequence, one row of `dimensions` each.
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a, T> {
    /// c, row-major. Sequences that follow each other in x use the rows again.
    pub cosine: &'a [T],
    /// s.
    pub sine: &'a [T],
    /// Of a head, even.
    pub dimensions: usize,
}

impl<T: Element> Rotary<'_, T> {
    /// Rotate `x` [tokens, heads, dimensions] into `out`; backward, a gradient.
    ///
    /// # Errors
    /// [`Error::Operand`] when lengths do not fit.
    pub fn rotate(
        &self,
        kernels: &Kernels,
        direction: Direction,
        x: &[T],
        heads: usize,
        out: &mut [T],
        threads: usize,
    ) -> Result<(), Error> {
        let (token, positions) = (heads * self.dimensions, self.check()?);
        if token == 0 || positions == 0 {
            return check_length("x", x.len(), 0);
        }
        check_length("x", x.len(), x.len().next_multiple_of(token * positions))?;
        check_length("out", out.len(), x.len())?;
        let threads = if x.len() < SMALL { 1 } else { threads.max(1) };
        let run = (x.len() / token).div_ceil(4 * threads).max(1);
        let runs = x.chunks(run * token).zip(out.chunks_mut(run * token)).enumerate();
        parallel::for_each(runs, threads, |(i, (x, out))| {
            let mut room = Room::new(token, self.dimensions);
            let tokens = x.chunks_exact(token).zip(out.chunks_exact_mut(token));
            for (position, (x, out)) in (i * run..).zip(tokens) {
                let first = position % positions * self.dimensions;
                T::widen(kernels, &self.cosine[first..first + self.dimensions], &mut room.cosine);
                T::widen(kernels, &self.sine[first..first + self.dimensions], &mut room.sine);
                T::widen(kernels, x, &mut room.x);
                room.multiply(direction);
                // The two products of a sum are rounded apart; `out` is where that is done.
                for product in [&mut room.x, &mut room.turned] {
                    T::narrow(kernels, product, out);
                    T::widen(kernels, out, product);
                }
                for (sum, turned) in room.x.iter_mut().zip(&room.turned) {
                    *sum += turned;
                }
                T::narrow(kernels, &room.x, out);
            }
        });
        Ok(())
    }

    /// Number of positions.
    fn check(&self) -> Result<usize, Error> {
        let dimensions = self.dimensions.max(1);
        check_length("dimensions", self.dimensions, self.dimensions.next_multiple_of(2))?;
        check_length("cosine", self.cosine.len(), self.cosine.len().next_multiple_of(dimensions))?;
        check_length("sine", self.sine.len(), self.cosine.len())?;
        Ok(self.cosine.len() / dimensions)
    }
}

/// A token's heads, and what they are multiplied by, as f32.
struct Room {
    x: Vec<f32>,
    turned: Vec<f32>,
    cosine: Vec<f32>,
    sine: Vec<f32>,
}

impl Room {
    fn new(token: usize, dimensions: usize) -> Self {
        let zeros = |length| vec![0.0; length];
        Self { x: zeros(token), turned: zeros(token), cosine: zeros(dimensions), sine: zeros(dimensions) }
    }

    /// `turned` = the other half of each head, with its sign, times the sine; x becomes x times the cosine.
    fn multiply(&mut self, direction: Direction) {
        let half = self.cosine.len() / 2;
        let (sine, other_sine) = self.sine.split_at(half);
        // Forward, a half of the result takes its own sine; backward, a half of x does.
        let sines = match direction {
            Direction::Forward => [sine, other_sine],
            Direction::Backward => [other_sine, sine],
        };
        let heads = self.x.chunks_exact_mut(2 * half).zip(self.turned.chunks_exact_mut(2 * half));
        for (x, turned) in heads {
            let (x1, x2) = x.split_at(half);
            let (turned1, turned2) = turned.split_at_mut(half);
            match direction {
                Direction::Forward => {
                    multiply(x2, sines[0], -1.0, turned1);
                    multiply(x1, sines[1], 1.0, turned2);
                }
                Direction::Backward => {
                    multiply(x2, sines[0], 1.0, turned1);
                    multiply(x1, sines[1], -1.0, turned2);
                }
            }
            for (x, cosine) in x.iter_mut().zip(&self.cosine) {
                *x *= cosine;
            }
        }
    }
}

/// `out` = sign x factor.
fn multiply(x: &[f32], factor: &[f32], sign: f32, out: &mut [f32]) {
    for ((x, factor), out) in x.iter().zip(factor).zip(out) {
        *out = sign * x * factor;
    }
}

#[cfg(test)]
mod tests;
