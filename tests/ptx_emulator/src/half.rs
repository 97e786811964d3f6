//! f16, bf16 and their pairs: every operation is formed exactly (to odd) and rounded once.

use crate::float::{maximum, minimum};
use crate::lanes::{Kernel, Lanes};
use crate::rounding::{BF16, F16, Format, Rounding, bf16_to_f32, encode, f16_to_f32, odd_sum};
use crate::types::Type;

const ADD: u8 = 0;
const SUB: u8 = 1;
const MUL: u8 = 2;
const FMA: u8 = 3;
const MIN: u8 = 4;
const MAX: u8 = 5;
const MIN_NAN: u8 = 6;
const MAX_NAN: u8 = 7;
const ABS: u8 = 8;
const NEG: u8 = 9;
const EX2: u8 = 10;
const TANH: u8 = 11;

/// What follows the rounding.
const PLAIN: u8 = 0;
const FTZ: u8 = 1;
const SAT: u8 = 2;
const RELU: u8 = 3;
const FTZ_SAT: u8 = 4;
const FTZ_RELU: u8 = 5;

fn widen<const BRAIN: bool>(bits: u16) -> f64 {
    f64::from(if BRAIN { bf16_to_f32(bits) } else { f16_to_f32(bits) })
}

fn flush(bits: u16, format: Format) -> u16 {
    let exponent = ((1u16 << format.exponent_bits) - 1) << format.fraction_bits;
    if bits & exponent == 0 { bits & 0x8000 } else { bits }
}

fn one<const BRAIN: bool, const OP: u8, const AFTER: u8>(a: u16, b: u16, c: u16) -> u16 {
    let format = if BRAIN { BF16 } else { F16 };
    let ftz = matches!(AFTER, FTZ | FTZ_SAT | FTZ_RELU);
    let [a, b, c] = [a, b, c].map(|bits| if ftz { flush(bits, format) } else { bits });
    if OP == ABS {
        return a & 0x7fff;
    }
    if OP == NEG {
        return a ^ 0x8000;
    }
    let (x, y, z) = (widen::<BRAIN>(a), widen::<BRAIN>(b), widen::<BRAIN>(c));
    let exact = match OP {
        ADD => odd_sum(x, y),
        SUB => odd_sum(x, -y),
        MUL => x * y,
        FMA => odd_sum(x * y, z),
        MIN => minimum::<false>(x, y),
        MAX => maximum::<false>(x, y),
        MIN_NAN => minimum::<true>(x, y),
        MAX_NAN => maximum::<true>(x, y),
        EX2 => x.exp2(),
        _ => x.tanh(),
    };
    let exact = match AFTER {
        SAT | FTZ_SAT => {
            if exact > 0.0 {
                exact.min(1.0)
            } else {
                0.0
            }
        }
        // relu turns NaN into the canonical NaN and negative numbers into +0.
        RELU | FTZ_RELU => {
            if exact.is_nan() || exact > 0.0 {
                exact
            } else {
                0.0
            }
        }
        _ => exact,
    };
    let bits = encode(exact, format, Rounding::NearestEven) as u16;
    if ftz { flush(bits, format) } else { bits }
}

fn scalar<const BRAIN: bool, const OP: u8, const AFTER: u8>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        d[i] = u64::from(one::<BRAIN, OP, AFTER>(s[0][i] as u16, s[1][i] as u16, s[2][i] as u16));
    }
}

fn pair<const BRAIN: bool, const OP: u8, const AFTER: u8>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let half = |shift: u32| {
            one::<BRAIN, OP, AFTER>(
                (s[0][i] >> shift) as u16,
                (s[1][i] >> shift) as u16,
                (s[2][i] >> shift) as u16,
            )
        };
        d[i] = u64::from(half(16)) << 16 | u64::from(half(0));
    }
}

macro_rules! by_form {
    ($op:ident, $after:expr, $brain:expr, $packed:expr) => {
        match $after {
            PLAIN => by_form!(@ $op, PLAIN, $brain, $packed),
            FTZ => by_form!(@ $op, FTZ, $brain, $packed),
            SAT => by_form!(@ $op, SAT, $brain, $packed),
            RELU => by_form!(@ $op, RELU, $brain, $packed),
            FTZ_SAT => by_form!(@ $op, FTZ_SAT, $brain, $packed),
            _ => by_form!(@ $op, FTZ_RELU, $brain, $packed),
        }
    };
    (@ $op:ident, $after:ident, $brain:expr, $packed:expr) => {
        match ($brain, $packed) {
            (false, false) => scalar::<false, $op, $after>,
            (false, true) => pair::<false, $op, $after>,
            (true, false) => scalar::<true, $op, $after>,
            (true, true) => pair::<true, $op, $after>,
        }
    };
}

/// The kernel of a half-precision instruction, or None when this file has none of that name and form.
pub(crate) fn kernel(name: &str, suffixes: &[&str], kind: Type) -> Option<Kernel> {
    let (brain, packed) = match kind {
        Type::F16 => (false, false),
        Type::F16x2 => (false, true),
        Type::Bf16 => (true, false),
        Type::Bf16x2 => (true, true),
        _ => return None,
    };
    let has = |suffix: &str| suffixes.contains(&suffix);
    if suffixes.iter().any(|suffix| !["rn", "ftz", "sat", "relu", "NaN", "approx"].contains(suffix)) {
        return None;
    }
    let after = match (has("ftz"), has("sat"), has("relu")) {
        (false, false, false) => PLAIN,
        (true, false, false) => FTZ,
        (false, true, _) => SAT,
        (false, false, true) => RELU,
        (true, true, _) => FTZ_SAT,
        (true, false, true) => FTZ_RELU,
    };
    Some(match name {
        "add" => by_form!(ADD, after, brain, packed),
        "sub" => by_form!(SUB, after, brain, packed),
        "mul" => by_form!(MUL, after, brain, packed),
        "fma" => by_form!(FMA, after, brain, packed),
        "min" if has("NaN") => by_form!(MIN_NAN, after, brain, packed),
        "max" if has("NaN") => by_form!(MAX_NAN, after, brain, packed),
        "min" => by_form!(MIN, after, brain, packed),
        "max" => by_form!(MAX, after, brain, packed),
        "abs" => by_form!(ABS, after, brain, packed),
        "neg" => by_form!(NEG, after, brain, packed),
        "ex2" => by_form!(EX2, after, brain, packed),
        "tanh" => by_form!(TANH, after, brain, packed),
        _ => return None,
    })
}
