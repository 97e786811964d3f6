//! The loops of a gated activation, written once: each path compiles them for its instructions, and
//! as in `softmax.rs` every path gives the same bits.

use super::softmax::exponential;

/// Values computed at a time: two vectors of AVX-512, four of AVX2.
const LANES: usize = 32;

/// σ(x) = 1 / (1 + exp -x) and 1 - σ(x), neither as a difference.
#[inline(always)]
fn sigmoids(x: f32) -> (f32, f32) {
    let small = exponential(-x.abs());
    let large = 1.0 / (1.0 + small);
    let small = small * large;
    if x < 0.0 { (small, large) } else { (large, small) }
}

/// See [`super::Kernels::gated`].
#[inline(always)]
pub(super) fn gated(gate: &mut [f32], up: &[f32]) {
    let run = |gate: &mut [f32], up: &[f32]| {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate * sigmoids(*gate).0 * up;
        }
    };
    let (gates, gate_tail) = gate.as_chunks_mut::<LANES>();
    let (ups, up_tail) = up.as_chunks::<LANES>();
    for (gate, up) in gates.iter_mut().zip(ups) {
        run(gate, up);
    }
    run(gate_tail, up_tail);
}

/// See [`super::Kernels::gated_gradients`].
#[inline(always)]
pub(super) fn gated_gradients(gate: &mut [f32], up: &mut [f32], grad: &mut [f32]) {
    let run = |gate: &mut [f32], up: &mut [f32], grad: &mut [f32]| {
        for ((gate, up), grad) in gate.iter_mut().zip(up).zip(grad) {
            let (sigmoid, rest) = sigmoids(*gate);
            let activated = *gate * sigmoid;
            let of_gate = *grad * *up * (sigmoid * (1.0 + *gate * rest));
            (*gate, *up, *grad) = (of_gate, *grad * activated, activated * *up);
        }
    };
    let (gates, gate_tail) = gate.as_chunks_mut::<LANES>();
    let (ups, up_tail) = up.as_chunks_mut::<LANES>();
    let (grads, grad_tail) = grad.as_chunks_mut::<LANES>();
    for ((gate, up), grad) in gates.iter_mut().zip(ups).zip(grads) {
        run(gate, up, grad);
    }
    run(gate_tail, up_tail, grad_tail);
}
