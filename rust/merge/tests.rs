//! The solver against formulae written out in f64, on matrices small enough to check every move.

use super::*;
use crate::codebook::LEVELS;
use crate::quantize::{nearest_code, quantize};
use crate::simd::merging::for_path;
use coupling::Coupling;
use curvature::{Buffers, factor_length, prepare};

/// Numbers in -1..1 that look random.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// XᵀX / tokens of correlated inputs.
fn statistics(columns: usize, seed: u64) -> Vec<f32> {
    let tokens = 3 * columns;
    let mut x = noise(seed, tokens * columns);
    for row in x.chunks_mut(columns) {
        for j in 1..columns {
            row[j] = 0.6 * row[j - 1] + row[j] * (1.0 + (j % 7) as f32);
        }
    }
    let mut h = vec![0.0; columns * columns];
    for (i, out) in h.iter_mut().enumerate() {
        let (a, b) = (i / columns, i % columns);
        *out = x.chunks(columns).map(|row| row[a] * row[b]).sum::<f32>() / tokens as f32;
    }
    h
}

struct Prepared {
    order: Vec<i64>,
    hessian: Vec<f32>,
    factor: Vec<f32>,
    added: f64,
}

fn prepared(path: &str, h: &[f32], columns: usize, block_size: usize, threads: usize) -> Prepared {
    let mut order = vec![0; columns];
    let mut hessian = vec![0.0; columns * columns];
    let mut factor = vec![0.0; factor_length(columns, block_size)];
    let buffers = Buffers { order: &mut order, hessian: &mut hessian, factor: &mut factor };
    let added =
        prepare(for_path(path), h, columns, block_size, 0.01, buffers, threads).expect("positive definite");
    Prepared { order, hessian, factor, added }
}

/// Codes, scales and objectives of a problem with free scales.
fn solve(
    path: &str,
    target: &[f32],
    rows: usize,
    block_size: usize,
    p: &Prepared,
    threads: usize,
) -> (Vec<u8>, Vec<f32>, Vec<f64>) {
    solve_coupled(path, target, rows, block_size, p, None, threads)
}

/// The same, with F where there is one.
fn solve_coupled(
    path: &str,
    target: &[f32],
    rows: usize,
    block_size: usize,
    p: &Prepared,
    moment: Option<&[f32]>,
    threads: usize,
) -> (Vec<u8>, Vec<f32>, Vec<f64>) {
    let columns = target.len() / rows;
    let (mut codes, mut absmax) = (vec![0; target.len() / 2], vec![0.0; target.len() / block_size]);
    quantize(&crate::simd::portable::KERNELS, target, columns, block_size, &mut codes, &mut absmax, 1)
        .expect("finite");
    let nearest =
        PackedMatrix::new(&codes, Scales::Single(&absmax), rows, columns, block_size).expect("lengths fit");
    let problem = Problem {
        target,
        nearest,
        curvature: Curvature::new(&p.order, &p.hessian, &p.factor, columns, block_size),
        effort: Effort { given: 8, sweeps: 8, tolerance: 0.0, feedback: true, anneal: 4 },
    };
    let (mut out, mut scales) = (vec![0; codes.len()], vec![0.0; absmax.len()]);
    let mut objectives = vec![0.0; 2 * rows];
    let output =
        Output { codes: &mut out, scales: OutputScales::Single(&mut scales), objectives: &mut objectives };
    if let Some(moment) = moment {
        let coupling = Coupling { first: 0, rows, moment, damping: 0.01 };
        coupling::calibrate(for_path(path), &problem, coupling, output, threads).expect("a fitting problem");
    } else {
        calibrate(for_path(path), &problem, output, threads).expect("a fitting problem");
    }
    (out, scales, objectives)
}

/// e (H + added I) eᵀ in f64 from the packed result.
fn objective(target: &[f32], codes: &[u8], scales: &[f32], block_size: usize, h: &[f32], added: f64) -> f64 {
    let columns = (h.len() as f64).sqrt() as usize;
    let error = |i: usize| {
        let code = if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
        f64::from(target[i]) - f64::from(LEVELS[usize::from(code)] * scales[i / block_size])
    };
    (0..target.len() / columns)
        .map(|row| {
            let errors: Vec<f64> = (0..columns).map(|j| error(row * columns + j)).collect();
            let quadratic = |i: usize| -> f64 {
                let entry = |j: usize| f64::from(h[i * columns + j]) + if i == j { added } else { 0.0 };
                (0..columns).map(|j| errors[i] * entry(j) * errors[j]).sum()
            };
            (0..columns).map(quadratic).sum::<f64>()
        })
        .sum()
}

#[test]
fn cholesky_multiplies_back_to_its_matrix() {
    for n in [1, 2, 63, 64, 65, 130, 200] {
        let h = statistics(n, 5);
        let mut matrix: Vec<f64> = h.iter().map(|&value| f64::from(value)).collect();
        for i in 0..n {
            matrix[i * n + i] += 0.1;
        }
        let original = matrix.clone();
        assert!(cholesky::factorize(for_path("portable"), &mut matrix, n, 2), "{n} is positive definite");
        for i in 0..n {
            for j in 0..=i {
                let product: f64 = (0..=j).map(|k| matrix[i * n + k] * matrix[j * n + k]).sum();
                assert!(
                    (product - original[i * n + j]).abs() < 1e-10 * original[i * n + i].max(1.0),
                    "{n} {i} {j}"
                );
            }
        }
    }
    assert!(!cholesky::factorize(for_path("portable"), &mut [1.0, 0.0, 2.0, 1.0], 2, 1), "det < 0");
}

#[test]
fn the_factor_multiplies_back_to_the_damped_statistics() {
    let (columns, block_size) = (96, 32);
    let h = statistics(columns, 3);
    let p = prepared("portable", &h, columns, block_size, 1);
    let upper = |i: usize, j: usize| {
        let block = j / block_size;
        let panel = &p.factor[block_size * block_size * block * (block + 1) / 2..];
        match i.cmp(&j) {
            std::cmp::Ordering::Less => f64::from(panel[i * block_size + j % block_size]),
            std::cmp::Ordering::Equal => 1.0,
            std::cmp::Ordering::Greater => 0.0,
        }
    };
    let entry = |i: usize, j: usize| {
        let (a, b) = (p.order[i] as usize, p.order[j] as usize);
        f64::from(h[a * columns + b]) + if a == b { p.added } else { 0.0 }
    };
    // D from the last column backwards: H_ij = Σ_k U_ik D_k U_jk.
    let mut d = vec![0.0; columns];
    for i in (0..columns).rev() {
        let tail: f64 = (i + 1..columns).map(|k| upper(i, k).powi(2) * d[k]).sum();
        d[i] = entry(i, i) - tail;
    }
    for i in 0..columns {
        for j in i..columns {
            let product: f64 = (j..columns).map(|k| upper(i, k) * d[k] * upper(j, k)).sum();
            assert!((product - entry(i, j)).abs() < 1e-4 * entry(i, i).max(entry(j, j)), "{i} {j}");
        }
    }
}

#[test]
fn rows_never_end_above_plain_rounding_and_objectives_are_true() {
    for (rows, columns, block_size) in [(1, 64, 64), (5, 128, 64), (50, 192, 32), (97, 128, 128)] {
        let h = statistics(columns, 7);
        let p = prepared("portable", &h, columns, block_size, 1);
        let target = noise(11, rows * columns);
        for path in crate::simd::available() {
            let (codes, scales, objectives) = solve(path.name, &target, rows, block_size, &p, 1);
            assert!(objectives.chunks(2).all(|pair| pair[1] <= pair[0]), "{}", path.name);
            let claimed: f64 = objectives.chunks(2).map(|pair| pair[1]).sum();
            let truth = objective(&target, &codes, &scales, block_size, &h, p.added);
            assert!((claimed - truth).abs() < 1e-3 * truth, "{}: {claimed} {truth}", path.name);
            let start: f64 = objectives.chunks(2).map(|pair| pair[0]).sum();
            assert!(claimed < 0.7 * start, "{rows} x {columns}: {claimed} of {start}");
        }
    }
}

#[test]
fn no_single_code_can_be_improved_at_the_end() {
    let (rows, columns, block_size) = (3, 64, 64);
    let h = statistics(columns, 13);
    let p = prepared("portable", &h, columns, block_size, 1);
    let target = noise(17, rows * columns);
    let (codes, scales, _) = solve("portable", &target, rows, block_size, &p, 1);
    let best = objective(&target, &codes, &scales, block_size, &h, p.added);
    for i in 0..target.len() {
        for code in 0..16 {
            let mut other = codes.clone();
            let byte = &mut other[i / 2];
            *byte = if i % 2 == 0 { *byte & 0x0F | code << 4 } else { *byte & 0xF0 | code };
            let changed = objective(&target, &other, &scales, block_size, &h, p.added);
            assert!(changed >= best * (1.0 - 1e-5), "weight {i}, code {code}: {changed} below {best}");
        }
    }
}

#[test]
fn the_number_of_threads_does_not_show() {
    let (rows, columns, block_size) = (150, 192, 64);
    let h = statistics(columns, 19);
    let target = noise(23, rows * columns);
    for path in crate::simd::available() {
        let one = prepared(path.name, &h, columns, block_size, 1);
        let many = prepared(path.name, &h, columns, block_size, 5);
        assert_eq!((&one.order, &one.hessian, &one.factor), (&many.order, &many.hessian, &many.factor));
        let expected = solve(path.name, &target, rows, block_size, &one, 1);
        for threads in [2, 3, 8] {
            assert!(solve(path.name, &target, rows, block_size, &one, threads) == expected, "{threads}");
        }
    }
}

#[test]
fn dead_inputs_and_hostile_statistics() {
    let (columns, block_size) = (64, 64);
    let mut h = statistics(columns, 29);
    for i in 0..columns {
        h[5 * columns + i] = 0.0;
        h[i * columns + 5] = 0.0;
    }
    let p = prepared("portable", &h, columns, block_size, 1);
    assert!(p.factor.iter().all(|value| value.is_finite()));
    let p = prepared("portable", &vec![0.0; columns * columns], columns, block_size, 1);
    let target = noise(31, 2 * columns);
    assert!(solve("portable", &target, 2, block_size, &p, 1).2.iter().all(|value| value.is_finite()));
    let mut buffers = (vec![0; columns], vec![0.0; columns * columns], vec![0.0; factor_length(columns, 64)]);
    let mut refused = |h: &[f32]| {
        let out = Buffers { order: &mut buffers.0, hessian: &mut buffers.1, factor: &mut buffers.2 };
        prepare(for_path("portable"), h, columns, block_size, 0.01, out, 1).expect_err("damaged")
    };
    h[9] = f32::NAN;
    assert_eq!(refused(&h), Error::NonFiniteStatistic { name: "statistics", first: 9 });
    h[9] = 1e20;
    h[9 * columns] = 1e20;
    assert!(matches!(refused(&h), Error::NotPositive { columns: 64, .. }));
}

#[test]
fn levels_round_as_codes_do() {
    for i in -3000..3000 {
        let scaled = i as f32 / 2500.0;
        assert_eq!(strip::nearest_level(scaled), LEVELS[usize::from(nearest_code(scaled))]);
    }
}

#[test]
fn moments_are_sums_of_products() {
    for (tokens, columns) in [(1, 1), (3, 48), (300, 50), (257, 130)] {
        let x = noise(37, tokens * columns);
        for path in crate::simd::available() {
            let mut total = vec![0.25; columns * columns];
            moment::accumulate(path, for_path(path.name), &x, columns, &mut total, 3).expect("lengths fit");
            for i in 0..columns {
                for j in 0..=i {
                    let product = |row: &[f32]| f64::from(row[i]) * f64::from(row[j]);
                    let sum: f64 = x.chunks(columns).map(product).sum();
                    assert!((f64::from(total[i * columns + j]) - 0.25 - sum).abs() < 1e-3, "{i} {j}");
                }
            }
        }
    }
}

/// tr(F E H Eᵀ) in f64 from the packed result.
fn coupled_objective(target: &[f32], codes: &[u8], scales: &[f32], size: usize, h: &[f32], f: &[f32]) -> f64 {
    let columns = (h.len() as f64).sqrt() as usize;
    let rows = target.len() / columns;
    let errors: Vec<f64> = (0..target.len())
        .map(|i| {
            let code = if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
            f64::from(target[i]) - f64::from(LEVELS[usize::from(code)] * scales[i / size])
        })
        .collect();
    let mut total = 0.0;
    for (i, row) in errors.chunks(columns).enumerate() {
        let products: Vec<f64> = (0..columns)
            .map(|j| (0..columns).map(|k| row[k] * f64::from(h[k * columns + j])).sum())
            .collect();
        for (j, other) in errors.chunks(columns).enumerate() {
            let dot: f64 = products.iter().zip(other).map(|(a, b)| a * b).sum();
            total += f64::from(f[i * rows + j]) * dot;
        }
    }
    total
}

#[test]
fn coupled_rows_make_up_for_each_other() {
    let (rows, columns, block_size) = (130, 64, 32);
    let (h, near) = (statistics(columns, 1), statistics(rows, 2));
    // Neighbours there are far apart here: rows of one strip do not know of each other.
    let place = |row: usize| row * 51 % rows;
    let f: Vec<f32> = (0..rows * rows).map(|i| near[place(i / rows) * rows + place(i % rows)]).collect();
    let target: Vec<f32> = noise(3, rows * columns).iter().map(|value| value * 0.05).collect();
    let p = prepared("portable", &h, columns, block_size, 1);
    let alone = solve("portable", &target, rows, block_size, &p, 1);
    let coupled = solve_coupled("portable", &target, rows, block_size, &p, Some(&f), 1);
    let cost = |(codes, scales, _): &(Vec<u8>, Vec<f32>, Vec<f64>)| {
        coupled_objective(&target, codes, scales, block_size, &h, &f)
    };
    assert!(cost(&coupled) < 0.8 * cost(&alone), "{} {}", cost(&coupled), cost(&alone));
    let threads = solve_coupled("portable", &target, rows, block_size, &p, Some(&f), 3);
    assert_eq!(coupled, threads, "the number of threads changes nothing");
}

#[test]
fn rows_that_do_not_count_together_are_solved_as_if_alone() {
    let (rows, columns, block_size) = (100, 64, 32);
    let target: Vec<f32> = noise(4, rows * columns).iter().map(|value| value * 0.05).collect();
    let p = prepared("portable", &statistics(columns, 1), columns, block_size, 1);
    let one: Vec<f32> = (0..rows * rows).map(|i| f32::from(u8::from(i % (rows + 1) == 0))).collect();
    let alone = solve("portable", &target, rows, block_size, &p, 2);
    assert_eq!(alone, solve_coupled("portable", &target, rows, block_size, &p, Some(&one), 2));
}

#[test]
fn a_coupling_of_other_rows_or_of_no_gradients_is_refused() {
    let (rows, columns, block_size) = (50, 64, 32);
    let target = noise(5, rows * columns);
    let p = prepared("portable", &statistics(columns, 1), columns, block_size, 1);
    let (codes, absmax) = (vec![0; rows * columns / 2], vec![1.0; rows * columns / block_size]);
    let nearest =
        PackedMatrix::new(&codes, Scales::Single(&absmax), rows, columns, block_size).expect("lengths fit");
    let problem = Problem {
        target: &target,
        nearest,
        curvature: Curvature::new(&p.order, &p.hessian, &p.factor, columns, block_size),
        effort: Effort { given: 1, sweeps: 1, tolerance: 0.0, feedback: false, anneal: 0 },
    };
    let refused = |first: usize, rows: usize, moment: &[f32]| {
        let (mut out, mut scales) = (vec![0; codes.len()], vec![0.0; absmax.len()]);
        let mut objectives = vec![0.0; 100];
        let output = Output {
            codes: &mut out,
            scales: OutputScales::Single(&mut scales),
            objectives: &mut objectives,
        };
        let coupling = Coupling { first, rows, moment, damping: 0.0 };
        coupling::calibrate(for_path("portable"), &problem, coupling, output, 1).expect_err("no coupling")
    };
    let one = [1.0; 4];
    assert!(matches!(refused(0, 3, &one), Error::Operand { name: "moment", .. }));
    assert!(matches!(refused(7, 2, &one), Error::Operand { name: "rows", .. }));
    assert!(matches!(refused(48, 3, &[0.0; 9]), Error::Operand { name: "rows", .. }));
    assert!(matches!(refused(0, 2, &one), Error::Operand { name: "rows", .. }));
    assert!(matches!(refused(48, 2, &one), Error::NotPositive { columns: 2, .. }));
}
