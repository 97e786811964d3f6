//! Both ways to compute a forward product, timed in turns for few and for more rows of activations.
//!
//! `tune THREADS SECONDS [PATH ...]` prints CSV: the milliseconds that decoding weights in registers
//! (`few_rows.rs`) and in blocks (`gemm.rs`) takes, SECONDS for each line, on the named CPU paths or all
//! available. Read next: `tune.py`, which derives the crossovers.

mod operands;

use half::bf16;
use operands::{Measured, Weight, Write, check, values};
use qlora_rs_core::gemm::{Direction, Product};
use qlora_rs_core::simd::{self, Kernels};
use qlora_rs_core::{few_rows, matmul};
use std::process::ExitCode;
use std::time::Instant;

/// A layer of a 7B model, whose codes fill a second-level cache several times, and one of a 135M
/// model, where what a call costs before its first multiplication counts.
const SIDES: [usize; 2] = [4096, 576];

/// Rows of activations: every crossover known so far lies among them.
const ROWS: [usize; 15] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192];

/// Calls shorter than this are repeated within a turn until they fill it; short, so that many turns
/// are free of what else the machine does.
const SAMPLE: f64 = 0.001;

/// Turns at least, however long they take.
const TURNS: usize = 5;

/// What one line of the output is measured with.
#[derive(Clone, Copy)]
struct Setting<'a> {
    kernels: &'a Kernels,
    weight: &'a Weight,
    dense: &'a [f32],
    side: usize,
    threads: usize,
    seconds: f64,
}

/// The time of `call(0)` and of `call(1)` in the fastest of their turns: a crossover is a property of
/// the undisturbed machine, and disturbances only add time.
fn interleave(mut call: impl FnMut(usize), seconds: f64) -> [f64; 2] {
    let mut time = |way: usize, repeats: usize| {
        let start = Instant::now();
        (0..repeats).for_each(|_| call(way));
        start.elapsed().as_secs_f64() / repeats as f64
    };
    let repeats = [0, 1].map(|way| (SAMPLE / time(way, 1)).round().max(1.0) as usize);
    let mut fastest = [f64::INFINITY; 2];
    let start = Instant::now();
    let mut turns = 0;
    while start.elapsed().as_secs_f64() < seconds || turns < TURNS {
        for way in 0..2 {
            fastest[way] = fastest[way].min(time(way, repeats[way]));
        }
        turns += 1;
    }
    fastest
}

/// The lines of one type of activations.
fn compare<T: Measured>(setting: Setting<'_>, dtype: &str) {
    let Setting { kernels, weight, dense, side, threads, seconds } = setting;
    for tokens in ROWS {
        let activations = values::<T>(tokens * side, 2);
        let product = Product {
            direction: Direction::Forward,
            matrix: weight.matrix(),
            activations: &activations,
            tokens,
            low_rank: None,
            bias: None,
        };
        let ways: [Write<T>; 2] = [few_rows::write, matmul::write_blocks];
        let mut out = vec![T::default(); tokens * side];
        for way in ways {
            way(&product, kernels, &mut out, &mut [], threads).expect("lengths fit");
            check(&product, dense, &out);
        }
        let multiply =
            |way: usize| ways[way](&product, kernels, &mut out, &mut [], threads).expect("lengths fit");
        let [registers, blocks] = interleave(multiply, seconds);
        let (registers, blocks) = (1e3 * registers, 1e3 * blocks);
        println!("{},{dtype},{side},{tokens},{registers:.5},{blocks:.5}", kernels.name);
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [threads, seconds, wanted @ ..] = &arguments[..] else {
        eprintln!("usage: tune THREADS SECONDS [PATH ...]");
        // `cargo bench` runs every program without arguments of ours: that is no failure.
        return ExitCode::SUCCESS;
    };
    let (Ok(threads), Ok(seconds)) = (threads.parse(), seconds.parse()) else {
        eprintln!("{threads} must be a whole number, {seconds} a number");
        return ExitCode::FAILURE;
    };
    println!("path,dtype,size,rows,registers,blocks");
    for side in SIDES {
        let weight = Weight::new(side, side);
        let dense = weight.dense();
        for kernels in simd::available() {
            if wanted.is_empty() || wanted.iter().any(|name| name == kernels.name) {
                let setting = Setting { kernels, weight: &weight, dense: &dense, side, threads, seconds };
                compare::<f32>(setting, "float32");
                compare::<bf16>(setting, "bfloat16");
            }
        }
    }
    ExitCode::SUCCESS
}
