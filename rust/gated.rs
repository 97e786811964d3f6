//! What stands between the products of a gated MLP, and its gradient, one pass over memory each.
//!
//! ```text
//! h  = silu(g) u        silu(g) = g σ(g)                          (SwiGLU, arXiv 2002.05202)
//! dG = dH u σ(g) (1 + g (1 - σ(g)))        dU = dH silu(g)        (differentiated by hand)
//! ```
//!
//! All arithmetic is f32, each result rounded once.

use crate::element::Element;
use crate::error::Error;
use crate::parallel;
use crate::quantize::check_length;
use crate::simd::Kernels;

/// Values widened to f32 at a time: three such strips lie in the first-level cache.
const STRIP: usize = 1024;

/// Fewer values than this are not worth a second thread.
const SMALL: usize = 1 << 14;

/// g and u, of one length.
#[derive(Clone, Copy, Debug)]
pub struct Gated<'a, T> {
    /// What the activation is applied to.
    pub gate: &'a [T],
    /// What it multiplies.
    pub up: &'a [T],
}

impl<T: Element> Gated<'_, T> {
    /// Write h to `out`.
    ///
    /// # Errors
    /// [`Error::Operand`] when lengths differ.
    pub fn forward(&self, kernels: &Kernels, out: &mut [T], threads: usize) -> Result<(), Error> {
        check_length("up", self.up.len(), self.gate.len())?;
        check_length("out", out.len(), self.gate.len())?;
        let run = self.run(threads);
        let runs = self.gate.chunks(run).zip(self.up.chunks(run)).zip(out.chunks_mut(run));
        parallel::for_each(runs, threads, |((gate, up), out)| {
            let mut strips = [[0.0; STRIP]; 2];
            let pieces = gate.chunks(STRIP).zip(up.chunks(STRIP)).zip(out.chunks_mut(STRIP));
            for ((gate, up), out) in pieces {
                let [wide_gate, wide_up] = strips.each_mut().map(|strip| &mut strip[..out.len()]);
                T::widen(kernels, gate, wide_gate);
                T::widen(kernels, up, wide_up);
                (kernels.gated)(wide_gate, wide_up);
                T::narrow(kernels, wide_gate, out);
            }
        });
        Ok(())
    }

    /// Write dG to `grad_gate` and dU to `grad_up`, and h in the place of its gradient.
    ///
    /// # Errors
    /// [`Error::Operand`] when lengths differ.
    pub fn backward(
        &self,
        kernels: &Kernels,
        grad: &mut [T],
        grad_gate: &mut [T],
        grad_up: &mut [T],
        threads: usize,
    ) -> Result<(), Error> {
        check_length("up", self.up.len(), self.gate.len())?;
        check_length("grad", grad.len(), self.gate.len())?;
        check_length("grad_gate", grad_gate.len(), self.gate.len())?;
        check_length("grad_up", grad_up.len(), self.gate.len())?;
        let run = self.run(threads);
        let inputs = self.gate.chunks(run).zip(self.up.chunks(run));
        let outputs = grad_gate.chunks_mut(run).zip(grad_up.chunks_mut(run));
        let runs = inputs.zip(grad.chunks_mut(run).zip(outputs));
        parallel::for_each(runs, threads, |((gate, up), (grad, (grad_gate, grad_up)))| {
            let mut strips = [[0.0; STRIP]; 3];
            let inputs = gate.chunks(STRIP).zip(up.chunks(STRIP));
            let outputs = grad_gate.chunks_mut(STRIP).zip(grad_up.chunks_mut(STRIP));
            for ((gate, up), (grad, (grad_gate, grad_up))) in inputs.zip(grad.chunks_mut(STRIP).zip(outputs))
            {
                let [wide_gate, wide_up, wide_grad] = strips.each_mut().map(|strip| &mut strip[..grad.len()]);
                T::widen(kernels, gate, wide_gate);
                T::widen(kernels, up, wide_up);
                T::widen(kernels, grad, wide_grad);
                (kernels.gated_gradients)(wide_gate, wide_up, wide_grad);
                T::narrow(kernels, wide_gate, grad_gate);
                T::narrow(kernels, wide_up, grad_up);
                T::narrow(kernels, wide_grad, grad);
            }
        });
        Ok(())
    }

    /// Values that a thread takes at a time.
    fn run(&self, threads: usize) -> usize {
        let count = self.gate.len();
        let parts = if count < SMALL { 1 } else { 4 * threads.max(1) };
        count.div_ceil(parts).next_multiple_of(STRIP).max(1)
    }
}

#[cfg(test)]
mod tests;
