//! Cross-entropy of rows of logits, and its gradient in their place.
//!
//! ```text
//! loss     = log Σ exp z - z_target = log Σ exp(z - m) + m - z_target,    m = max z
//! gradient = exp(z - m) / Σ exp(z - m) - [target]
//! ```
//!
//! A row is read twice, a strip at a time: once for m and the sum (which is rescaled when a later
//! strip holds a larger logit: Milakov and Gimelshein, arXiv 1805.02867, algorithm 3), once for the
//! gradient. Rows of usual vocabularies stay in the second-level cache between the two. All
//! arithmetic is f32 at least, whatever the logits' type.
//!
//! NaN in a row, plus infinity, or minus infinity throughout make its loss and gradient NaN, as in
//! torch; single logits of minus infinity have probability zero.

use crate::element::Element;
use crate::error::Error;
use crate::parallel;
use crate::quantize::check_length;
use crate::simd::Kernels;

/// Logits widened to f32 at a time: 8 KiB, which the first-level cache holds beside their source.
const STRIP: usize = 2048;

/// Write each row's loss, and replace the logits by the loss's gradient if asked to.
///
/// `logits` has `vocabulary` values per target. Allocates nothing.
///
/// # Errors
/// [`Error::Operand`] when a length does not fit the number of targets; [`Error::Target`] when a
/// target is not below `vocabulary`. Nothing was written then.
pub fn cross_entropy<T: Element>(
    kernels: &Kernels,
    logits: &mut [T],
    vocabulary: usize,
    targets: &[i64],
    losses: &mut [f32],
    gradient: bool,
    threads: usize,
) -> Result<(), Error> {
    check_length("logits", logits.len(), targets.len().saturating_mul(vocabulary))?;
    check_length("losses", losses.len(), targets.len())?;
    let outside = |target: i64| usize::try_from(target).map_or(true, |target| target >= vocabulary);
    if let Some(row) = targets.iter().position(|&target| outside(target)) {
        return Err(Error::Target { row, target: targets[row], vocabulary });
    }
    if targets.is_empty() {
        return Ok(());
    }
    let rows = logits.chunks_exact_mut(vocabulary).zip(targets).zip(losses);
    parallel::for_each(rows, threads, |((logits, &target), loss)| {
        let target = target as usize;
        let softmax = Softmax::of(kernels, logits);
        *loss = softmax.loss(logits[target].to_f32());
        if gradient {
            softmax.write_gradient(kernels, logits, target);
        }
    });
    Ok(())
}

/// What turns a row's logits into probabilities: exp(logit - largest) / sum.
struct Softmax {
    largest: f32,
    sum: f64,
}

impl Softmax {
    fn of<T: Element>(kernels: &Kernels, logits: &[T]) -> Self {
        let (mut largest, mut sum) = (f32::NEG_INFINITY, 0.0);
        let mut strip = [0.0; STRIP];
        for logits in logits.chunks(STRIP) {
            let strip = &mut strip[..logits.len()];
            T::widen(kernels, logits, strip);
            let largest_here = (kernels.largest)(strip);
            if largest_here > largest {
                sum *= f64::from(largest - largest_here).exp();
                largest = largest_here;
            }
            // While all logits were minus infinity, any finite shift makes them zeros and keeps NaN.
            let shift = if largest == f32::NEG_INFINITY { 0.0 } else { largest };
            sum += (kernels.exponentials)(strip, shift, 1.0);
        }
        Self { largest, sum }
    }

    fn loss(&self, target: f32) -> f32 {
        (self.sum.ln() + (f64::from(self.largest) - f64::from(target))) as f32
    }

    fn write_gradient<T: Element>(&self, kernels: &Kernels, logits: &mut [T], target: usize) {
        let scale = (1.0 / self.sum) as f32;
        let mut strip = [0.0; STRIP];
        for (number, logits) in logits.chunks_mut(STRIP).enumerate() {
            let strip = &mut strip[..logits.len()];
            T::widen(kernels, logits, strip);
            (kernels.exponentials)(strip, self.largest, scale);
            // Before the result is rounded to T: a probability near one must not become one first.
            if let Some(probability) = target.checked_sub(number * STRIP).and_then(|i| strip.get_mut(i)) {
                *probability -= 1.0;
            }
            T::narrow(kernels, strip, logits);
        }
    }
}

#[cfg(test)]
mod tests;
