//! Inner loops of the merge solver on strips of 48 rows (`merge/strip.rs`), chosen once for this CPU.
//!
//! `gather` takes nearly all the time and is written with intrinsics; the others are plain loops over
//! lanes that the compiler turns into the vectors of the path they are compiled for. Results may
//! differ between paths in their last bits (a fused multiply-add rounds once), never between runs.

use crate::error::Error;
use crate::merge::strip::{Lane, ROWS, nearest_level};
use std::ops::Range;

/// `sums[c] = Σ_k errors[k] * panel[k * sums.len() + c]`; `sums.len()` is a multiple of 8.
pub type Gather = fn(errors: &[Lane], panel: &[f32], sums: &mut [Lane]);

/// One column with error feedback: its level for target + sum; returns target - level * scale.
pub type RoundColumn = fn(target: &Lane, sum: &Lane, scale: &Lane, level: &mut Lane) -> Lane;

/// `sums[c] += error * factors[c]`.
pub type Spread = fn(error: &Lane, factors: &[f32], sums: &mut [Lane]);

/// `Σ_k importance[k] (target[k] - scale * nearest level)²` of each row.
pub type RoundingErrors = fn(target: &[Lane], importance: &[f32], scale: &Lane) -> Lane;

/// Each code of a block in turn takes its best value; returns how many changed. `square` is the
/// block's part of H, `sums` its part of e H, kept up to date.
pub type MoveCodes =
    fn(scale: &Lane, square: &[f32], sums: &mut [Lane], levels: &mut [Lane], errors: &mut [Lane]) -> usize;

/// As [`MoveCodes`], but each code takes the level nearest to its best value plus noise of deviation
/// `noise / sqrt(H_jj)`: a draw from its conditional distribution at a temperature. `state`: one
/// generator per row.
pub type ShakeCodes = fn(
    scale: &Lane,
    square: &[f32],
    noise: &Lane,
    state: &mut [u32; ROWS],
    sums: &mut [Lane],
    levels: &mut [Lane],
    errors: &mut [Lane],
);

/// The loops of one CPU path; handed out only where the CPU has its instructions.
#[derive(Clone, Copy, Debug)]
pub struct MergeKernels {
    /// See [`Gather`].
    pub gather: Gather,
    /// See [`RoundColumn`].
    pub round_column: RoundColumn,
    /// See [`Spread`].
    pub spread: Spread,
    /// See [`RoundingErrors`].
    pub rounding_errors: RoundingErrors,
    /// See [`MoveCodes`].
    pub move_codes: MoveCodes,
    /// See [`ShakeCodes`].
    pub shake_codes: ShakeCodes,
    /// See [`SubtractProduct`].
    pub subtract_product: SubtractProduct,
}

static PORTABLE: MergeKernels =
    MergeKernels { gather, round_column, spread, rounding_errors, move_codes, shake_codes, subtract_product };

/// The loops for the path that the process chose (`QLORA_RS_CPU` included).
///
/// # Errors
/// As [`super::kernels`].
pub fn merge_kernels() -> Result<&'static MergeKernels, Error> {
    Ok(for_path(super::kernels()?.name))
}

/// The loops of a path that this CPU has.
#[must_use]
pub fn for_path(name: &str) -> &'static MergeKernels {
    #[cfg(target_arch = "x86_64")]
    {
        let wide = super::available().into_iter().any(|path| path.name == name);
        if wide && (name.starts_with("avx512") || name == "amx") {
            return &x86::AVX512;
        }
        if wide && name == "avx2" {
            return &x86::AVX2;
        }
    }
    let _ = name;
    &PORTABLE
}

#[inline(always)]
fn gather(errors: &[Lane], panel: &[f32], sums: &mut [Lane]) {
    let width = sums.len();
    assert!(width.is_multiple_of(8) && panel.len() >= errors.len() * width, "a factor per error and column");
    sums.fill(Lane::ZERO);
    for (error, factors) in errors.iter().zip(panel.chunks_exact(width.max(1))) {
        spread(error, factors, sums);
    }
}

#[inline(always)]
fn spread(error: &Lane, factors: &[f32], sums: &mut [Lane]) {
    for (sum, &factor) in sums.iter_mut().zip(factors) {
        for row in 0..ROWS {
            sum.0[row] += error.0[row] * factor;
        }
    }
}

/// 1 / scale, or zero for scales that no code can use.
#[inline(always)]
fn inverse(scale: &Lane) -> Lane {
    let mut inverse = Lane::ZERO;
    for row in 0..ROWS {
        inverse.0[row] = if scale.0[row] > 0.0 { 1.0 / scale.0[row] } else { 0.0 };
    }
    inverse
}

#[inline(always)]
fn round_column(target: &Lane, sum: &Lane, scale: &Lane, level: &mut Lane) -> Lane {
    let inverse = inverse(scale);
    let mut error = Lane::ZERO;
    for row in 0..ROWS {
        level.0[row] = nearest_level((target.0[row] + sum.0[row]) * inverse.0[row]);
        error.0[row] = target.0[row] - level.0[row] * scale.0[row];
    }
    error
}

#[inline(always)]
fn rounding_errors(target: &[Lane], importance: &[f32], scale: &Lane) -> Lane {
    let inverse = inverse(scale);
    let mut errors = Lane::ZERO;
    for (target, &importance) in target.iter().zip(importance) {
        for row in 0..ROWS {
            let error = target.0[row] - nearest_level(target.0[row] * inverse.0[row]) * scale.0[row];
            errors.0[row] += importance * error * error;
        }
    }
    errors
}

#[inline(always)]
fn move_codes(
    scale: &Lane,
    square: &[f32],
    sums: &mut [Lane],
    levels: &mut [Lane],
    errors: &mut [Lane],
) -> usize {
    let width = sums.len();
    let inverse = inverse(scale);
    let mut changed = Lane::ZERO;
    for j in 0..width {
        let factors = &square[j * width..][..width];
        let per_curve = 1.0 / factors[j];
        let mut step = Lane::ZERO;
        for row in 0..ROWS {
            let level = levels[j].0[row];
            // In units of the scale: where the objective is least, and the level nearest to that.
            let best = level + sums[j].0[row] * per_curve * inverse.0[row];
            let near = nearest_level(best);
            let closer = (near - best).abs() < (level - best).abs() && inverse.0[row] > 0.0;
            let new = if closer { near } else { level };
            step.0[row] = (level - new) * scale.0[row];
            changed.0[row] += if closer { 1.0 } else { 0.0 };
            levels[j].0[row] = new;
            errors[j].0[row] += step.0[row];
        }
        spread(&step, &factors[j + 1..], &mut sums[j + 1..]);
    }
    changed.0.iter().sum::<f32>() as usize
}

#[inline(always)]
fn shake_codes(
    scale: &Lane,
    square: &[f32],
    noise: &Lane,
    state: &mut [u32; ROWS],
    sums: &mut [Lane],
    levels: &mut [Lane],
    errors: &mut [Lane],
) {
    let width = sums.len();
    let inverse = inverse(scale);
    for j in 0..width {
        let factors = &square[j * width..][..width];
        let (per_curve, deviation) = (1.0 / factors[j], 1.0 / factors[j].sqrt());
        let mut step = Lane::ZERO;
        for row in 0..ROWS {
            // xorshift32; the sum of two uniform halves has variance 1 / 6 before scaling.
            let mut word = state[row];
            word ^= word << 13;
            word ^= word >> 17;
            word ^= word << 5;
            state[row] = word;
            let halves = (word >> 16) as i32 + (word & 0xFFFF) as i32 - 0xFFFF;
            let draw = halves as f32 * (2.449_49 / 65536.0);
            let level = levels[j].0[row];
            let wanted = sums[j].0[row] * per_curve + noise.0[row] * deviation * draw;
            let near = nearest_level(level + wanted * inverse.0[row]);
            let new = if inverse.0[row] > 0.0 { near } else { level };
            step.0[row] = (level - new) * scale.0[row];
            levels[j].0[row] = new;
            errors[j].0[row] += step.0[row];
        }
        spread(&step, &factors[j + 1..], &mut sums[j + 1..]);
    }
}

/// Columns of f64 that [`SubtractProduct`] computes at a time.
pub const F64_TILE: usize = 16;

/// For a blocked Cholesky factorization: `rows[i][last + j] -= Σ_k rows[i][first + k] * transposed[k * stride + j]` for j up to `offset + i`.
pub type SubtractProduct =
    fn(rows: &mut [f64], n: usize, panel: Range<usize>, offset: usize, transposed: &[f64], stride: usize);

#[inline(always)]
fn subtract_product(
    rows: &mut [f64],
    n: usize,
    panel: Range<usize>,
    offset: usize,
    transposed: &[f64],
    stride: usize,
) {
    let last = panel.end;
    for (group, rows) in rows.chunks_mut(4 * n).enumerate() {
        let count = rows.len() / n;
        // Up to the diagonal of the group's last row.
        let width = (offset + 4 * group + count).min(n - last);
        for first in (0..width).step_by(F64_TILE) {
            let mut sums = [[0.0_f64; F64_TILE]; 4];
            for (k, column) in panel.clone().enumerate() {
                let right = &transposed[k * stride + first..][..F64_TILE];
                for i in 0..count.min(4) {
                    let left = rows[i * n + column];
                    for j in 0..F64_TILE {
                        sums[i][j] += left * right[j];
                    }
                }
            }
            for i in 0..count.min(4) {
                let length = F64_TILE.min(width - first);
                let out = &mut rows[i * n + last + first..][..length];
                for (out, sum) in out.iter_mut().zip(&sums[i]) {
                    *out -= sum;
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The same loops compiled for wider vectors, and `gather` by hand.

    use super::{Lane, MergeKernels};
    use std::arch::x86_64::*;

    /// Wrap the plain loops for a path's instructions.
    macro_rules! compiled_for {
        ($features:literal, $name:ident, $gather:ident, $table:ident) => {
            mod $name {
                use super::super::{self as plain, Lane, ROWS, Range};

                #[target_feature(enable = $features)]
                pub(super) fn round_column(
                    target: &Lane,
                    sum: &Lane,
                    scale: &Lane,
                    level: &mut Lane,
                ) -> Lane {
                    plain::round_column(target, sum, scale, level)
                }

                #[target_feature(enable = $features)]
                pub(super) fn spread(error: &Lane, factors: &[f32], sums: &mut [Lane]) {
                    plain::spread(error, factors, sums);
                }

                #[target_feature(enable = $features)]
                pub(super) fn rounding_errors(target: &[Lane], importance: &[f32], scale: &Lane) -> Lane {
                    plain::rounding_errors(target, importance, scale)
                }

                #[target_feature(enable = $features)]
                pub(super) fn move_codes(
                    scale: &Lane,
                    square: &[f32],
                    sums: &mut [Lane],
                    levels: &mut [Lane],
                    errors: &mut [Lane],
                ) -> usize {
                    plain::move_codes(scale, square, sums, levels, errors)
                }

                #[target_feature(enable = $features)]
                pub(super) fn shake_codes(
                    scale: &Lane,
                    square: &[f32],
                    noise: &Lane,
                    state: &mut [u32; ROWS],
                    sums: &mut [Lane],
                    levels: &mut [Lane],
                    errors: &mut [Lane],
                ) {
                    plain::shake_codes(scale, square, noise, state, sums, levels, errors);
                }

                #[target_feature(enable = $features)]
                pub(super) fn subtract_product(
                    rows: &mut [f64],
                    n: usize,
                    panel: Range<usize>,
                    offset: usize,
                    transposed: &[f64],
                    stride: usize,
                ) {
                    plain::subtract_product(rows, n, panel, offset, transposed, stride);
                }
            }

            pub(super) static $table: MergeKernels = MergeKernels {
                // SAFETY: (each closure) `for_path` hands this table out only where the CPU has the
                // features.
                gather: |errors, panel, sums| unsafe { $gather(errors, panel, sums) },
                // SAFETY: as above.
                round_column: |target, sum, scale, level| unsafe {
                    $name::round_column(target, sum, scale, level)
                },
                // SAFETY: as above.
                spread: |error, factors, sums| unsafe { $name::spread(error, factors, sums) },
                // SAFETY: as above.
                rounding_errors: |target, importance, scale| unsafe {
                    $name::rounding_errors(target, importance, scale)
                },
                // SAFETY: as above.
                move_codes: |scale, square, sums, levels, errors| unsafe {
                    $name::move_codes(scale, square, sums, levels, errors)
                },
                // SAFETY: as above.
                shake_codes: |scale, square, noise, state, sums, levels, errors| unsafe {
                    $name::shake_codes(scale, square, noise, state, sums, levels, errors);
                },
                // SAFETY: as above.
                subtract_product: |rows, n, panel, offset, transposed, stride| unsafe {
                    $name::subtract_product(rows, n, panel, offset, transposed, stride);
                },
            };
        };
    }

    compiled_for!("avx512f,avx512bw,avx512vl,avx512dq,fma", avx512, gather_avx512, AVX512);
    compiled_for!("avx2,fma", avx2, gather_avx2, AVX2);

    /// 3 registers of rows by 8 columns: 24 sums stay in registers for the whole length.
    #[target_feature(enable = "avx512f")]
    fn gather_avx512(errors: &[Lane], panel: &[f32], sums: &mut [Lane]) {
        let width = sums.len();
        assert!(width.is_multiple_of(8) && panel.len() >= errors.len() * width, "a factor per error");
        for first in (0..width).step_by(8) {
            let mut tile = [[_mm512_setzero_ps(); 3]; 8];
            for (k, error) in errors.iter().enumerate() {
                let row = error.0.as_ptr();
                // SAFETY: a lane is 48 floats, aligned to 64 bytes.
                let error: [__m512; 3] = std::array::from_fn(|i| unsafe { _mm512_load_ps(row.add(16 * i)) });
                // SAFETY: k < errors.len() and first + 8 <= width, so the eight factors lie inside.
                let factors = unsafe { panel.as_ptr().add(k * width + first) };
                for (c, sums) in tile.iter_mut().enumerate() {
                    // SAFETY: as above, c < 8.
                    let factor = _mm512_set1_ps(unsafe { *factors.add(c) });
                    for (sum, error) in sums.iter_mut().zip(error) {
                        *sum = _mm512_fmadd_ps(error, factor, *sum);
                    }
                }
            }
            for (out, tile) in sums[first..first + 8].iter_mut().zip(tile) {
                for (out, value) in out.0.as_chunks_mut::<16>().0.iter_mut().zip(tile) {
                    // SAFETY: sixteen floats of an aligned lane, a multiple of 64 bytes from its start.
                    unsafe { _mm512_store_ps(out.as_mut_ptr(), value) };
                }
            }
        }
    }

    /// 2 registers of rows by 4 columns, three times.
    #[target_feature(enable = "avx2,fma")]
    fn gather_avx2(errors: &[Lane], panel: &[f32], sums: &mut [Lane]) {
        let width = sums.len();
        assert!(width.is_multiple_of(8) && panel.len() >= errors.len() * width, "a factor per error");
        for first in (0..width).step_by(4) {
            for third in 0..3 {
                let mut tile = [[_mm256_setzero_ps(); 2]; 4];
                for (k, error) in errors.iter().enumerate() {
                    let row = error.0[16 * third..][..16].as_ptr();
                    // SAFETY: sixteen floats were sliced; the second register is the last eight.
                    let error = unsafe { [_mm256_loadu_ps(row), _mm256_loadu_ps(row.add(8))] };
                    // SAFETY: k < errors.len() and first + 4 <= width, so the four factors lie inside.
                    let factors = unsafe { panel.as_ptr().add(k * width + first) };
                    for (c, sums) in tile.iter_mut().enumerate() {
                        // SAFETY: as above, c < 4.
                        let factor = _mm256_set1_ps(unsafe { *factors.add(c) });
                        for (sum, error) in sums.iter_mut().zip(error) {
                            *sum = _mm256_fmadd_ps(error, factor, *sum);
                        }
                    }
                }
                for (out, tile) in sums[first..first + 4].iter_mut().zip(tile) {
                    let out = out.0[16 * third..][..16].as_mut_ptr();
                    // SAFETY: sixteen floats were sliced.
                    unsafe {
                        _mm256_storeu_ps(out, tile[0]);
                        _mm256_storeu_ps(out.add(8), tile[1]);
                    }
                }
            }
        }
    }
}
