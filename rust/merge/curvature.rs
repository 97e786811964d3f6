//! H = XᵀX / tokens of a layer's inputs → what the solver reads: H damped, cut into panels, and its factor U.
//!
//! A panel holds one block of columns for all rows, so that the solver reads it from front to back.
//! U is unit upper triangular with H = (U + I) D (U + I)ᵀ, columns ordered by falling diagonal: with
//! it, feeding each column's error into the next ones is what GPTQ does (arXiv 2210.17323; the form
//! without an inverse is LDLQ of arXiv 2307.13304). Memory: `memory()` floats, stated to the caller.

use super::cholesky;
use crate::error::Error;
use crate::parallel;
use crate::quantize::check_length;
use crate::simd::merging::MergeKernels;

/// The damped matrix and its factor for layers of one width, borrowed from the caller's buffers.
#[derive(Clone, Copy, Debug)]
pub struct Curvature<'a> {
    order: &'a [i64],
    hessian: &'a [f32],
    factor: &'a [f32],
    columns: usize,
    block_size: usize,
}

/// Where [`prepare`] writes.
pub struct Buffers<'a> {
    /// `columns` indices: the columns by falling diagonal.
    pub order: &'a mut [i64],
    /// `columns` x `columns`, in panels.
    pub hessian: &'a mut [f32],
    /// [`factor_length`] floats, in panels.
    pub factor: &'a mut [f32],
}

/// Floats in the panels of U: panel b holds rows up to the end of block b only.
#[must_use]
pub fn factor_length(columns: usize, block_size: usize) -> usize {
    let blocks = columns / block_size;
    block_size * block_size * blocks * (blocks + 1) / 2
}

/// Damp `h` [columns, columns], symmetric, by `damping` times its mean diagonal; order, cut and
/// factorize it. Returns the damping added to the diagonal.
///
/// # Errors
/// [`Error::NonFiniteStatistic`], [`Error::Operand`], [`Error::StraddlingBlocks`];
/// [`Error::NotPositive`] when no damping up to the mean diagonal makes it positive definite.
pub fn prepare(
    kernels: &MergeKernels,
    h: &[f32],
    columns: usize,
    block_size: usize,
    damping: f64,
    out: Buffers<'_>,
    threads: usize,
) -> Result<f64, Error> {
    if block_size == 0 || !columns.is_multiple_of(block_size) {
        return Err(Error::StraddlingBlocks { columns, block_size });
    }
    check_length("statistics", h.len(), columns * columns)?;
    check_length("order", out.order.len(), columns)?;
    check_length("hessian", out.hessian.len(), columns * columns)?;
    check_length("factor", out.factor.len(), factor_length(columns, block_size))?;
    if let Some(first) = h.iter().position(|value| !value.is_finite()) {
        return Err(Error::NonFiniteStatistic { name: "statistics", first });
    }
    let diagonal = |i: usize| f64::from(h[i * columns + i]);
    let mean = (0..columns).map(diagonal).sum::<f64>() / columns.max(1) as f64;
    // Inputs that are always zero say nothing: every weight counts the same then.
    let unit = if mean > 0.0 { mean } else { 1.0 };
    let mut order: Vec<usize> = (0..columns).collect();
    order.sort_by(|&a, &b| diagonal(b).total_cmp(&diagonal(a)));
    let mut added = damping * unit;
    let factor = loop {
        match reversed_cholesky(kernels, h, &order, added, threads) {
            Some(factor) => break factor,
            None if added < unit => added = (10.0 * added).max(1e-6 * unit),
            None => return Err(Error::NotPositive { columns, damping: added }),
        }
    };
    for (out, &column) in out.order.iter_mut().zip(&order) {
        *out = column as i64;
    }
    let panels = out.hessian.chunks_mut((columns * block_size).max(1)).enumerate();
    parallel::for_each(panels, threads, |(panel, out)| {
        let first = panel * block_size;
        for (row, out) in out.chunks_exact_mut(block_size).enumerate() {
            out.copy_from_slice(&h[row * columns + first..][..block_size]);
            if (first..first + block_size).contains(&row) {
                out[row - first] = (diagonal(row) + added) as f32;
            }
        }
    });
    let mut rest = out.factor;
    for block in 0..columns / block_size {
        let (panel, others) = rest.split_at_mut((block + 1) * block_size * block_size);
        rest = others;
        for (row, out) in panel.chunks_exact_mut(block_size).enumerate() {
            for (j, out) in out.iter_mut().enumerate() {
                let column = block * block_size + j;
                *out = if row < column { unit_upper(&factor, columns, row, column) } else { 0.0 };
            }
        }
    }
    Ok(added)
}

/// L of L Lᵀ = the ordered, damped matrix with rows and columns reversed.
fn reversed_cholesky(
    kernels: &MergeKernels,
    h: &[f32],
    order: &[usize],
    added: f64,
    threads: usize,
) -> Option<Vec<f64>> {
    let n = order.len();
    let mut matrix = vec![0.0_f64; n * n];
    let rows = matrix.chunks_mut(n.max(1)).enumerate();
    parallel::for_each(rows, threads, |(i, row)| {
        let source = &h[order[n - 1 - i] * n..][..n];
        for (j, out) in row.iter_mut().enumerate().take(i + 1) {
            *out = f64::from(source[order[n - 1 - j]]) + if i == j { added } else { 0.0 };
        }
    });
    cholesky::factorize(kernels, &mut matrix, n, threads).then_some(matrix)
}

/// U[row, column] from the reversed L: V = reverse(L) is upper with H = V Vᵀ, and U = V / diag(V).
fn unit_upper(factor: &[f64], n: usize, row: usize, column: usize) -> f32 {
    let (i, j) = (n - 1 - row, n - 1 - column);
    (factor[i * n + j] / factor[j * n + j]) as f32
}

impl<'a> Curvature<'a> {
    /// What [`prepare`] wrote.
    #[must_use]
    pub fn new(
        order: &'a [i64],
        hessian: &'a [f32],
        factor: &'a [f32],
        columns: usize,
        block_size: usize,
    ) -> Self {
        Self { order, hessian, factor, columns, block_size }
    }

    /// Refuse buffers of another shape, and an order that is no permutation.
    ///
    /// # Errors
    /// [`Error::Operand`].
    pub fn check(&self, columns: usize, block_size: usize) -> Result<(), Error> {
        check_length("block_size", self.block_size, block_size)?;
        check_length("order", self.order.len(), columns)?;
        check_length("hessian", self.hessian.len(), columns * columns)?;
        check_length("factor", self.factor.len(), factor_length(columns, block_size))?;
        let mut seen = vec![false; columns];
        for &column in self.order {
            match usize::try_from(column).ok().and_then(|column| seen.get_mut(column)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(Error::Operand { name: "order", got: column as usize, expected: columns }),
            }
        }
        Ok(())
    }

    /// The column that comes `place`-th when errors are fed back.
    pub(super) fn column(&self, place: usize) -> usize {
        self.order[place] as usize
    }

    /// Panel of block `block` of damped H: row k, then the block's columns.
    pub(super) fn hessian(&self, block: usize) -> &'a [f32] {
        let length = self.columns * self.block_size;
        &self.hessian[block * length..][..length]
    }

    /// Panel `block` of U, in the order of falling diagonal.
    pub(super) fn factor(&self, block: usize) -> &'a [f32] {
        let square = self.block_size * self.block_size;
        &self.factor[square * block * (block + 1) / 2..][..square * (block + 1)]
    }

    /// H[column, column].
    pub(super) fn diagonal(&self, column: usize) -> f32 {
        let (block, within) = (column / self.block_size, column % self.block_size);
        self.hessian(block)[column * self.block_size + within]
    }
}
