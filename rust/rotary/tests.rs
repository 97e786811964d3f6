//! Against a computation of single values, rounded where the module says so, on every path and type.

use super::{Rotary, SMALL};
use crate::element::Element;
use crate::error::Error;
use crate::gemm::Direction;
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

/// One head: the sum of two rounded products.
fn reference<T: Element>(direction: Direction, x: &[T], cosine: &[T], sine: &[T]) -> Vec<T> {
    let half = x.len() / 2;
    let product = |a: T, b: T| T::from_f32(a.to_f32() * b.to_f32()).to_f32();
    let value = |i: usize| {
        let (first, other) = (i < half, (i + half) % (2 * half));
        let turned = match direction {
            Direction::Forward => product(x[other], sine[i]),
            Direction::Backward => product(x[other], sine[other]),
        };
        let sign = if first == (direction == Direction::Forward) { -1.0 } else { 1.0 };
        T::from_f32(product(x[i], cosine[i]) + sign * turned)
    };
    (0..x.len()).map(value).collect()
}

fn agrees<T: Element>() {
    let bits = |values: &[T]| values.iter().map(|v| v.to_f32().to_bits()).collect::<Vec<_>>();
    // The last is more than one thread's; the second has two sequences.
    for (tokens, positions, heads, dimensions) in
        [(1, 1, 1, 2), (0, 3, 2, 4), (6, 3, 2, 10), (5, 5, 9, 64), (SMALL / 200, SMALL / 200, 3, 128)]
    {
        let x: Vec<T> = values(tokens * heads * dimensions, 1);
        let (cosine, sine): (Vec<T>, Vec<T>) =
            (values(positions * dimensions, 2), values(positions * dimensions, 3));
        let rotary = Rotary { cosine: &cosine, sine: &sine, dimensions };
        for direction in [Direction::Forward, Direction::Backward] {
            let mut expected = Vec::new();
            for (i, head) in x.chunks_exact(dimensions).enumerate() {
                let row = i / heads % positions * dimensions;
                let row = row..row + dimensions;
                expected.extend(reference(direction, head, &cosine[row.clone()], &sine[row]));
            }
            for (path, threads) in available().into_iter().flat_map(|path| [(path, 1), (path, 3)]) {
                let mut out = vec![T::default(); x.len()];
                rotary.rotate(path, direction, &x, heads, &mut out, threads).expect("lengths fit");
                assert_eq!(bits(&out), bits(&expected), "{} {direction:?}", path.name);
            }
        }
    }
}

#[test]
fn every_type_and_path_rounds_where_a_written_out_rotation_does() {
    agrees::<f32>();
    agrees::<f16>();
    agrees::<bf16>();
}

#[test]
fn a_rotation_by_nothing_changes_nothing_and_backward_undoes_forward() {
    let kernels = available().remove(0);
    let x: Vec<f32> = values(8 * 16, 4);
    let angles: Vec<f32> = values(2 * 8, 5);
    // Both halves of a head turn by the same angle.
    let angle = |i: usize| angles[i / 16 * 8 + i % 8];
    let cosine: Vec<f32> = (0..32).map(|i| angle(i).cos()).collect();
    let sine: Vec<f32> = (0..32).map(|i| angle(i).sin()).collect();
    let rotary = Rotary { cosine: &cosine, sine: &sine, dimensions: 16 };
    let (mut turned, mut back) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    rotary.rotate(kernels, Direction::Forward, &x, 4, &mut turned, 1).expect("lengths fit");
    rotary.rotate(kernels, Direction::Backward, &turned, 4, &mut back, 1).expect("lengths fit");
    assert!(x.iter().zip(&turned).any(|(x, y)| (x - y).abs() > 0.1));
    assert!(x.iter().zip(&back).all(|(x, y)| (x - y).abs() < 1e-6));
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let kernels = available().remove(0);
    let ones = [1.0_f32; 24];
    let refused = |cosine, sine, dimensions, x, out| {
        let rotary = Rotary { cosine: &ones[..cosine], sine: &ones[..sine], dimensions };
        let mut results = [0.0; 24];
        rotary
            .rotate(kernels, Direction::Forward, &ones[..x], 2, &mut results[..out], 1)
            .is_err_and(|error| matches!(error, Error::Operand { .. }))
    };
    assert!(!refused(4, 4, 4, 16, 16));
    assert!(refused(4, 4, 4, 16, 24));
    assert!(refused(4, 4, 4, 12, 12));
    assert!(refused(4, 8, 4, 16, 16));
    assert!(refused(6, 6, 4, 16, 16));
    assert!(refused(3, 3, 3, 12, 12));
    assert!(refused(8, 8, 4, 8, 8));
    assert!(refused(0, 0, 4, 16, 16));
}
