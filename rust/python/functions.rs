//! Borrow the arguments, let go of the interpreter, call the core.

use super::arguments::{Argument, Scalar};
use super::exceptions::QloraError;
use crate::codebook::{DYNAMIC_MAP, LEVELS};
use crate::cuda::SOURCES;
use crate::element::Element;
use crate::error::Error;
use crate::gemm::factors::{self, FactorGradient};
use crate::gemm::{Direction, LowRank, Product};
use crate::matmul;
use crate::packed_matrix::{PackedMatrix, Scales};
use crate::{
    cross_entropy as loss, dequantize as decode, double_quantize as nested, quantize as encode, simd,
};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

type Capsule<'py> = Bound<'py, PyCapsule>;

/// Run a generic body for the element type of an argument.
macro_rules! for_element {
    ($argument:expr, $body:ident ( $($rest:expr),* )) => {
        match $argument.element() {
            <f32 as Scalar>::ELEMENT => $body::<f32>($($rest),*),
            <half::f16 as Scalar>::ELEMENT => $body::<half::f16>($($rest),*),
            <half::bf16 as Scalar>::ELEMENT => $body::<half::bf16>($($rest),*),
            _ => Err($argument.wrong_type("float32, float16 or bfloat16")),
        }
    };
}

pub(super) use for_element;

/// The parts of a packed weight as capsules, in the order of `Packed.capsules()`.
#[derive(FromPyObject)]
pub struct Packed<'py>(
    Capsule<'py>,
    Capsule<'py>,
    Option<Capsule<'py>>,
    Option<Capsule<'py>>,
    Option<Capsule<'py>>,
);

pub(super) struct PackedArguments<'py> {
    codes: Argument<'py>,
    absmax: Argument<'py>,
    nested: Option<[Argument<'py>; 3]>,
}

impl<'py> PackedArguments<'py> {
    pub(super) fn new(packed: &Packed<'py>) -> PyResult<Self> {
        let nested = match (&packed.2, &packed.3, &packed.4) {
            (Some(absmax), Some(offset), Some(map)) => Some([
                Argument::new("nested_absmax", absmax)?,
                Argument::new("nested_offset", offset)?,
                Argument::new("nested_map", map)?,
            ]),
            _ => None,
        };
        let (codes, absmax) = (Argument::new("codes", &packed.0)?, Argument::new("absmax", &packed.1)?);
        Ok(Self { codes, absmax, nested })
    }

    /// Whether the scales are quantized a second time.
    pub(super) fn is_nested(&self) -> bool {
        self.nested.is_some()
    }

    pub(super) fn matrix(&self, shape: (usize, usize), block_size: usize) -> PyResult<PackedMatrix<'_>> {
        let scales = match &self.nested {
            None => Scales::Single(self.absmax.slice()?),
            Some([absmax, offset, map]) => Scales::Nested {
                codes: self.absmax.slice()?,
                absmax: absmax.slice()?,
                offset: *offset.slice()?.first().ok_or_else(|| offset.wrong_type("one float32"))?,
                map: map.slice()?.try_into().map_err(|_| map.wrong_type("256 float32 values"))?,
            },
        };
        Ok(PackedMatrix::new(self.codes.slice()?, scales, shape.0, shape.1, block_size)?)
    }
}

/// The CPU path of this process: `portable`, `avx2`, `avx2_vnni`, `avx512`, `avx512_vnni`, `avx512_bf16` or
/// `amx`.
#[pyfunction]
pub fn cpu_path() -> PyResult<&'static str> {
    Ok(simd::kernels()?.name)
}

/// The CPU paths that this machine can run, fastest first.
#[pyfunction]
pub fn cpu_paths() -> Vec<&'static str> {
    simd::available().into_iter().map(|path| path.name).collect()
}

/// The 16 NF4 levels.
#[pyfunction]
pub fn levels() -> [f32; 16] {
    LEVELS
}

/// The 256 values of the dynamic map that double quantization uses.
#[pyfunction]
pub fn dynamic_map() -> Vec<f32> {
    DYNAMIC_MAP.to_vec()
}

/// The text of a file in `cuda/`.
#[pyfunction]
pub fn cuda_source(name: &str) -> PyResult<&'static str> {
    let found = SOURCES.iter().find(|(file, _)| *file == name).map(|(_, text)| *text);
    found.ok_or_else(|| QloraError::new_err(format!("cuda/ has no file {name}")))
}

/// Raise what `quantize` raises for weights that are NaN or infinite.
#[pyfunction]
pub fn refuse_non_finite(count: usize, rows: usize, columns: usize, first: usize) -> PyResult<()> {
    Err(Error::NonFinite { count, rows, columns: columns.max(1), first }.into())
}

/// Float weights → codes and absmax, into the given tensors.
#[pyfunction]
pub fn quantize(
    py: Python<'_>,
    weight: &Capsule<'_>,
    columns: usize,
    block_size: usize,
    codes: &Capsule<'_>,
    absmax: &Capsule<'_>,
    threads: usize,
) -> PyResult<()> {
    let weight = Argument::new("weight", weight)?;
    let (codes, absmax) = (Argument::new("codes", codes)?, Argument::new("absmax", absmax)?);
    return for_element!(weight, run(py, &weight, columns, block_size, codes, absmax, threads));

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        weight: &Argument<'_>,
        columns: usize,
        block_size: usize,
        mut codes: Argument<'_>,
        mut absmax: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let kernels = simd::kernels()?;
        let (weight, codes, absmax) = (weight.slice::<T>()?, codes.slice_mut()?, absmax.slice_mut()?);
        Ok(py.detach(|| encode::quantize(kernels, weight, columns, block_size, codes, absmax, threads))?)
    }
}

/// absmax → 8-bit codes and one f32 per 256, into the given tensors; returns the offset, which is
/// the mean of absmax unless one is given.
#[pyfunction]
#[pyo3(signature = (absmax, codes, nested_absmax, threads, offset=None))]
pub fn double_quantize(
    py: Python<'_>,
    absmax: &Capsule<'_>,
    codes: &Capsule<'_>,
    nested_absmax: &Capsule<'_>,
    threads: usize,
    offset: Option<f32>,
) -> PyResult<f32> {
    let absmax = Argument::new("absmax", absmax)?;
    let mut codes = Argument::new("codes", codes)?;
    let mut nested_absmax = Argument::new("nested_absmax", nested_absmax)?;
    let (absmax, codes, nested_absmax) = (absmax.slice()?, codes.slice_mut()?, nested_absmax.slice_mut()?);
    Ok(py.detach(|| {
        let offset = offset.unwrap_or_else(|| nested::mean(absmax));
        nested::double_quantize(absmax, offset, codes, nested_absmax, threads).map(|()| offset)
    })?)
}

/// Decode rows x columns of a packed matrix into `out`.
#[pyfunction]
pub fn dequantize(
    py: Python<'_>,
    packed: Packed<'_>,
    shape: (usize, usize),
    block_size: usize,
    rows: (usize, usize),
    columns: (usize, usize),
    out: &Capsule<'_>,
    threads: usize,
) -> PyResult<()> {
    let packed = PackedArguments::new(&packed)?;
    let matrix = packed.matrix(shape, block_size)?;
    let out = Argument::new("out", out)?;
    return for_element!(out, run(py, &matrix, rows, columns, out, threads));

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        matrix: &PackedMatrix<'_>,
        rows: (usize, usize),
        columns: (usize, usize),
        mut out: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let kernels = simd::kernels()?;
        let out = out.slice_mut::<T>()?;
        let (rows, columns) = (rows.0..rows.1, columns.0..columns.1);
        Ok(py.detach(|| decode::dequantize_tile(kernels, matrix, rows, columns, out, threads))?)
    }
}

/// A low-rank part: A, B, rank, scaling, and where its hidden activations are to be written, if anybody
/// wants them.
type LowRankArguments<'py> = (Capsule<'py>, Capsule<'py>, usize, f32, Option<Capsule<'py>>);

/// `tokens` rows of activations times the packed matrix, plus a low-rank part and a bias, into `out`.
///
/// Forward: x Wᵀ + hidden Bᵀ + bias, hidden = scaling x Aᵀ. Backward: dY W + hidden A, hidden =
/// scaling dY B.
#[pyfunction]
pub fn multiply(
    py: Python<'_>,
    backward: bool,
    activations: &Capsule<'_>,
    tokens: usize,
    packed: Packed<'_>,
    shape: (usize, usize),
    block_size: usize,
    low_rank: Option<LowRankArguments<'_>>,
    bias: Option<Capsule<'_>>,
    out: &Capsule<'_>,
    threads: usize,
) -> PyResult<()> {
    let packed = PackedArguments::new(&packed)?;
    let operands = Operands {
        direction: if backward { Direction::Backward } else { Direction::Forward },
        matrix: packed.matrix(shape, block_size)?,
        activations: Argument::new("activations", activations)?,
        tokens,
        low_rank: low_rank.map(LowRankOperands::new).transpose()?,
        bias: bias.map(|bias| Argument::new("bias", &bias)).transpose()?,
    };
    let out = Argument::new("out", out)?;
    return for_element!(out, run(py, operands, out, threads));

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        mut operands: Operands<'_, '_>,
        mut out: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let mut unwanted = Vec::new();
        let (low_rank, hidden) = match &mut operands.low_rank {
            Some(LowRankOperands { a, b, rank, scaling, hidden }) => {
                let low_rank = LowRank { a: a.floats()?, b: b.floats()?, rank: *rank, scaling: *scaling };
                let hidden = if let Some(hidden) = hidden {
                    hidden.slice_mut::<T>()?
                } else {
                    unwanted.resize(operands.tokens * *rank, T::default());
                    &mut unwanted
                };
                (Some(low_rank), hidden)
            }
            None => (None, &mut [][..]),
        };
        let product = Product {
            direction: operands.direction,
            matrix: operands.matrix,
            activations: operands.activations.slice::<T>()?,
            tokens: operands.tokens,
            low_rank,
            bias: operands.bias.as_ref().map(Argument::slice::<T>).transpose()?,
        };
        let (kernels, out) = (simd::kernels()?, out.slice_mut::<T>()?);
        Ok(py.detach(|| matmul::write(&product, kernels, out, hidden, threads))?)
    }
}

/// The gradients of A [rank, in] and B [out, rank] into `grad_a` and `grad_b`: sums over tokens of the
/// outer products of rows of `grad_hidden` and x, and of `grad` and `hidden`.
#[pyfunction]
pub fn factor_gradients(
    py: Python<'_>,
    x: &Capsule<'_>,
    grad_hidden: &Capsule<'_>,
    grad: &Capsule<'_>,
    hidden: &Capsule<'_>,
    tokens: usize,
    rank: usize,
    shape: (usize, usize),
    grad_a: &Capsule<'_>,
    grad_b: &Capsule<'_>,
    threads: usize,
) -> PyResult<()> {
    let (x, grad_hidden) = (Argument::new("x", x)?, Argument::new("grad_hidden", grad_hidden)?);
    let (grad, hidden) = (Argument::new("grad", grad)?, Argument::new("hidden", hidden)?);
    let outputs = [Argument::new("grad_a", grad_a)?, Argument::new("grad_b", grad_b)?];
    let sizes = (tokens, rank, shape);
    return for_element!(x, run(py, [&x, &grad_hidden, &grad, &hidden], sizes, outputs, threads));

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        [x, grad_hidden, grad, hidden]: [&Argument<'_>; 4],
        (tokens, rank, (rows, columns)): (usize, usize, (usize, usize)),
        outputs: [Argument<'_>; 2],
        threads: usize,
    ) -> PyResult<()> {
        let of_a = FactorGradient {
            left: grad_hidden.slice::<T>()?,
            right: x.slice::<T>()?,
            tokens,
            rank,
            width: columns,
            transposed: false,
        };
        let of_b = FactorGradient {
            left: hidden.slice::<T>()?,
            right: grad.slice::<T>()?,
            tokens,
            rank,
            width: rows,
            transposed: true,
        };
        let [grad_a, grad_b] = outputs;
        for_element!(grad_a, first(py, [of_a, of_b], grad_a, grad_b, threads))
    }

    fn first<A: Element + Scalar>(
        py: Python<'_>,
        gradients: [FactorGradient<'_, impl Element>; 2],
        mut grad_a: Argument<'_>,
        grad_b: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let grad_a = grad_a.slice_mut::<A>()?;
        for_element!(grad_b, second(py, gradients, grad_a, grad_b, threads))
    }

    fn second<B: Element + Scalar>(
        py: Python<'_>,
        [of_a, of_b]: [FactorGradient<'_, impl Element>; 2],
        grad_a: &mut [impl Element],
        mut grad_b: Argument<'_>,
        threads: usize,
    ) -> PyResult<()> {
        let (kernels, grad_b) = (simd::kernels()?, grad_b.slice_mut::<B>()?);
        Ok(py.detach(|| factors::write((&of_a, grad_a), (&of_b, grad_b), kernels, threads))?)
    }
}

/// The operands of a product before their element type is known.
struct Operands<'a, 'py> {
    direction: Direction,
    matrix: PackedMatrix<'a>,
    activations: Argument<'py>,
    tokens: usize,
    low_rank: Option<LowRankOperands<'py>>,
    bias: Option<Argument<'py>>,
}

struct LowRankOperands<'py> {
    a: Argument<'py>,
    b: Argument<'py>,
    rank: usize,
    scaling: f32,
    hidden: Option<Argument<'py>>,
}

impl<'py> LowRankOperands<'py> {
    fn new((a, b, rank, scaling, hidden): LowRankArguments<'py>) -> PyResult<Self> {
        Ok(Self {
            a: Argument::new("lora_a", &a)?,
            b: Argument::new("lora_b", &b)?,
            rank,
            scaling,
            hidden: hidden.map(|hidden| Argument::new("hidden", &hidden)).transpose()?,
        })
    }
}

/// Cross-entropy of each row of `logits` into `losses`; with `gradient`, the logits become its gradient.
#[pyfunction]
pub fn cross_entropy(
    py: Python<'_>,
    logits: &Capsule<'_>,
    vocabulary: usize,
    targets: &Capsule<'_>,
    losses: &Capsule<'_>,
    gradient: bool,
    threads: usize,
) -> PyResult<()> {
    let logits = Argument::new("logits", logits)?;
    let targets = Argument::new("targets", targets)?;
    let losses = Argument::new("losses", losses)?;
    return for_element!(logits, run(py, logits, vocabulary, &targets, losses, gradient, threads));

    fn run<T: Element + Scalar>(
        py: Python<'_>,
        mut logits: Argument<'_>,
        vocabulary: usize,
        targets: &Argument<'_>,
        mut losses: Argument<'_>,
        gradient: bool,
        threads: usize,
    ) -> PyResult<()> {
        let kernels = simd::kernels()?;
        let (logits, targets, losses) = (logits.slice_mut::<T>()?, targets.slice()?, losses.slice_mut()?);
        Ok(py.detach(|| {
            loss::cross_entropy(kernels, logits, vocabulary, targets, losses, gradient, threads)
        })?)
    }
}
