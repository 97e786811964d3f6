//! One operation at a time, for a tool that counts instructions.
//!
//! `instructions PATH CASE` does CASE on the CPU path PATH, one thread, twice: outside [`measured`],
//! which detects the CPU and allocates scratch once and whose result is checked, then inside. Without
//! arguments it lists the paths of this CPU, fastest first, and the cases.
//! Read next: `instructions.py`, which runs it under callgrind.

mod operands;

use half::bf16;
use operands::{BLOCK_SIZE, Measured, Weight, Write, check, values};
use qlora_rs_core::dequantize::dequantize_tile;
use qlora_rs_core::element::Element;
use qlora_rs_core::gemm::{Direction, Product};
use qlora_rs_core::quantize::quantize;
use qlora_rs_core::simd::{self, Kernels, portable};
use qlora_rs_core::{few_rows, matmul};
use std::process::ExitCode;

/// Rows and columns of the weight: large beside the caches' first level, small enough that a tool
/// fifty times slower than the CPU is done in seconds.
const SIDE: usize = 1024;

/// A case's operation, type and rows, and what it does.
type Case = (&'static str, fn(&Kernels));

const CASES: [Case; 12] = [
    ("few rows, float32, 1", few_rows_product::<f32, 1>),
    ("few rows, float32, 8", few_rows_product::<f32, 8>),
    ("few rows, bfloat16, 1", few_rows_product::<bf16, 1>),
    ("few rows, bfloat16, 8", few_rows_product::<bf16, 8>),
    ("many rows, float32, 128", |kernels| blocked_product::<f32>(kernels, Direction::Forward)),
    ("many rows, bfloat16, 128", |kernels| blocked_product::<bf16>(kernels, Direction::Forward)),
    ("backward, float32, 128", |kernels| blocked_product::<f32>(kernels, Direction::Backward)),
    ("backward, bfloat16, 128", |kernels| blocked_product::<bf16>(kernels, Direction::Backward)),
    ("quantize, float32, 1024", pack::<f32>),
    ("quantize, bfloat16, 1024", pack::<bf16>),
    ("dequantize, float32, 1024", unpack::<f32>),
    ("dequantize, bfloat16, 1024", unpack::<bf16>),
];

/// What is counted is what runs in here.
#[inline(never)]
fn measured(work: &mut dyn FnMut()) {
    work();
}

fn few_rows_product<T: Measured, const TOKENS: usize>(kernels: &Kernels) {
    product::<T>(kernels, Direction::Forward, TOKENS, few_rows::write);
}

fn blocked_product<T: Measured>(kernels: &Kernels, direction: Direction) {
    product::<T>(kernels, direction, 128, matmul::write_blocks);
}

fn product<T: Measured>(kernels: &Kernels, direction: Direction, tokens: usize, write: Write<T>) {
    let weight = Weight::new(SIDE, SIDE);
    let activations = values::<T>(tokens * SIDE, 2);
    let matrix = weight.matrix();
    let product =
        Product { direction, matrix, activations: &activations, tokens, low_rank: None, bias: None };
    let mut out = vec![T::default(); tokens * SIDE];
    let mut work = || write(&product, kernels, &mut out, &mut [], 1).expect("lengths fit");
    work();
    measured(&mut work);
    check(&product, &weight.dense(), &out);
}

fn pack<T: Element>(kernels: &Kernels) {
    let weights = values::<T>(SIDE * SIDE, 3);
    let pack = |kernels: &Kernels, codes: &mut [u8], absmax: &mut [f32]| {
        quantize(kernels, &weights, SIDE, BLOCK_SIZE, codes, absmax, 1).expect("lengths fit");
    };
    let empty = || (vec![0; SIDE * SIDE / 2], vec![0.0; SIDE * SIDE / BLOCK_SIZE]);
    let ((mut codes, mut absmax), (mut expected_codes, mut expected_absmax)) = (empty(), empty());
    let mut work = || pack(kernels, &mut codes, &mut absmax);
    work();
    measured(&mut work);
    pack(&portable::KERNELS, &mut expected_codes, &mut expected_absmax);
    assert!(codes == expected_codes && absmax == expected_absmax, "the bytes differ from portable's");
}

fn unpack<T: Element>(kernels: &Kernels) {
    let weight = Weight::new(SIDE, SIDE);
    let matrix = weight.matrix();
    let mut out = vec![T::default(); SIDE * SIDE];
    let mut work = || dequantize_tile(kernels, &matrix, 0..SIDE, 0..SIDE, &mut out, 1).expect("lengths fit");
    work();
    measured(&mut work);
    let equal = |(got, &expected): (&T, &f32)| got.to_f32() == T::from_f32(expected).to_f32();
    assert!(out.iter().zip(&weight.dense()).all(equal), "the values differ from portable's");
}

fn main() -> ExitCode {
    let paths = simd::available();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [path, case] = &arguments[..] {
        let kernels = paths.iter().find(|kernels| kernels.name == path);
        let run = CASES.iter().find(|(name, _)| name == case);
        let (Some(kernels), Some((_, run))) = (kernels, run) else {
            eprintln!("no path {path} on this CPU, or no case {case}; see the list without arguments");
            return ExitCode::FAILURE;
        };
        run(kernels);
        return ExitCode::SUCCESS;
    }
    println!("{}", paths.iter().map(|kernels| kernels.name).collect::<Vec<_>>().join(" "));
    for (name, _) in CASES {
        println!("{name}");
    }
    ExitCode::SUCCESS
}
