//! f32 and f64 instructions: exact rounding modes, flush to zero, saturation.

use crate::lanes::{Kernel, Lanes};
use crate::rounding::{Rounding, odd_sum, to_f32, to_odd};
use crate::types::Type;

const NEAREST: u8 = 0;
const ZERO: u8 = 1;
const DOWN: u8 = 2;
const UP: u8 = 3;

fn mode<const M: u8>() -> Rounding {
    match M {
        ZERO => Rounding::Zero,
        DOWN => Rounding::Down,
        UP => Rounding::Up,
        _ => Rounding::NearestEven,
    }
}

/// A register's bits as f32; `.ftz` flushes subnormal inputs to zero of their sign.
#[inline]
pub(crate) fn input<const FTZ: bool>(bits: u64) -> f32 {
    let x = f32::from_bits(bits as u32);
    if FTZ && x.is_subnormal() { f32::from_bits(bits as u32 & 0x8000_0000) } else { x }
}

/// A result as register bits: flushed, saturated to [0, 1], NaN canonical.
#[inline]
pub(crate) fn output<const FTZ: bool, const SAT: bool>(x: f32) -> u64 {
    if SAT {
        // NaN saturates to +0.
        let flushed = FTZ && x.is_subnormal();
        return u64::from(if x > 0.0 && !flushed { x.min(1.0) } else { 0.0 }.to_bits());
    }
    if x.is_nan() {
        return 0x7fff_ffff;
    }
    let bits = x.to_bits();
    u64::from(if FTZ && x.is_subnormal() { bits & 0x8000_0000 } else { bits })
}

fn add<const M: u8, const FTZ: bool, const SAT: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let (a, b) = (input::<FTZ>(s[0][i]), input::<FTZ>(s[1][i]));
        let sum = if M == NEAREST { a + b } else { directed_sum::<M>(f64::from(a), f64::from(b)) };
        d[i] = output::<FTZ, SAT>(sum);
    }
}

/// A sum of f32 values under a directed mode; an exact zero sum of opposite signs is -0 when rounding down.
fn directed_sum<const M: u8>(a: f64, b: f64) -> f32 {
    let sum = odd_sum(a, b);
    if sum == 0.0 && M == DOWN && (a.is_sign_negative() || b.is_sign_negative()) {
        return -0.0;
    }
    to_f32(sum, mode::<M>())
}

fn sub<const M: u8, const FTZ: bool, const SAT: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let (a, b) = (input::<FTZ>(s[0][i]), input::<FTZ>(s[1][i]));
        let sum = if M == NEAREST { a - b } else { directed_sum::<M>(f64::from(a), -f64::from(b)) };
        d[i] = output::<FTZ, SAT>(sum);
    }
}

fn mul<const M: u8, const FTZ: bool, const SAT: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let (a, b) = (input::<FTZ>(s[0][i]), input::<FTZ>(s[1][i]));
        // The product of two f32 values is exact in f64.
        let product = if M == NEAREST { a * b } else { to_f32(f64::from(a) * f64::from(b), mode::<M>()) };
        d[i] = output::<FTZ, SAT>(product);
    }
}

fn fma<const M: u8, const FTZ: bool, const SAT: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let (a, b, c) = (input::<FTZ>(s[0][i]), input::<FTZ>(s[1][i]), input::<FTZ>(s[2][i]));
        let product = f64::from(a) * f64::from(b);
        let result = if M == NEAREST {
            odd_sum(product, f64::from(c)) as f32
        } else {
            directed_sum::<M>(product, f64::from(c))
        };
        d[i] = output::<FTZ, SAT>(result);
    }
}

fn div<const M: u8, const FTZ: bool, const SAT: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let (a, b) = (input::<FTZ>(s[0][i]), input::<FTZ>(s[1][i]));
        let quotient = if M == NEAREST { a / b } else { quotient(f64::from(a), f64::from(b), mode::<M>()) };
        d[i] = output::<FTZ, SAT>(quotient);
    }
}

/// `div.approx` multiplies by a reciprocal, which is zero for divisors beyond 2^126.
fn div_approx<const FTZ: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let (a, b) = (input::<FTZ>(s[0][i]), input::<FTZ>(s[1][i]));
        let vanishes = b.abs() > f32::from_bits(0x7e80_0000);
        d[i] = output::<FTZ, false>(if vanishes { a * 0f32.copysign(b) } else { a / b });
    }
}

fn rcp<const M: u8, const FTZ: bool, const SAT: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let a = input::<FTZ>(s[0][i]);
        let quotient = if M == NEAREST { 1.0 / a } else { quotient(1.0, f64::from(a), mode::<M>()) };
        d[i] = output::<FTZ, SAT>(quotient);
    }
}

fn quotient(a: f64, b: f64, mode: Rounding) -> f32 {
    let rounded = a / b;
    let error = if rounded.is_finite() && b != 0.0 { (-rounded).mul_add(b, a) * b.signum() } else { 0.0 };
    to_f32(to_odd(rounded, error), mode)
}

fn sqrt<const M: u8, const FTZ: bool, const SAT: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let a = input::<FTZ>(s[0][i]);
        let root = if M == NEAREST {
            a.sqrt()
        } else {
            let wide = f64::from(a);
            let rounded = wide.sqrt();
            let error = if rounded.is_finite() { (-rounded).mul_add(rounded, wide) } else { 0.0 };
            to_f32(to_odd(rounded, error), mode::<M>())
        };
        d[i] = output::<FTZ, SAT>(root);
    }
}

/// The approximate functions, here correctly rounded through f64 (within the bounds PTX gives).
fn special<const F: u8, const FTZ: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let x = f64::from(input::<FTZ>(s[0][i]));
        let y = match F {
            0 => x.sqrt().recip(),
            1 => x.sin(),
            2 => x.cos(),
            3 => x.log2(),
            4 => x.exp2(),
            _ => x.tanh(),
        };
        d[i] = output::<FTZ, false>(y as f32);
    }
}

fn smaller<const NAN: bool>(a: f64, b: f64) -> f64 {
    if NAN && (a.is_nan() || b.is_nan()) {
        f64::NAN
    } else if a.is_nan() {
        b
    } else if b.is_nan() || a < b || (a == b && a.is_sign_negative()) {
        a
    } else {
        b
    }
}

/// `min` of PTX: a NaN loses against a number unless `NAN`; -0 is less than +0.
pub(crate) fn minimum<const NAN: bool>(a: f64, b: f64) -> f64 {
    smaller::<NAN>(a, b)
}

/// `max` of PTX.
pub(crate) fn maximum<const NAN: bool>(a: f64, b: f64) -> f64 {
    -smaller::<NAN>(-a, -b)
}

fn extreme<const MAX: bool, const NAN: bool, const FTZ: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let (a, b) = (f64::from(input::<FTZ>(s[0][i])), f64::from(input::<FTZ>(s[1][i])));
        let chosen = if MAX { maximum::<NAN>(a, b) } else { minimum::<NAN>(a, b) };
        d[i] = output::<FTZ, false>(chosen as f32);
    }
}

fn extreme_of_three<const MAX: bool, const NAN: bool, const FTZ: bool>(
    s: &[&Lanes; 4],
    d: &mut Lanes,
    unused: &mut Lanes,
) {
    let mut first: Lanes = [0; 32];
    extreme::<MAX, NAN, FTZ>(s, &mut first, unused);
    extreme::<MAX, NAN, FTZ>(&[&first, s[2], s[2], s[2]], d, unused);
}

fn sign<const ABS: bool, const FTZ: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let x = input::<FTZ>(s[0][i]);
        d[i] = output::<FTZ, false>(if ABS { x.abs() } else { -x });
    }
}

macro_rules! flags {
    ($f:ident, $mode:expr, $ftz:expr, $sat:expr) => {
        match ($mode, $ftz, $sat) {
            (Rounding::Zero, false, false) => $f::<ZERO, false, false>,
            (Rounding::Zero, true, false) => $f::<ZERO, true, false>,
            (Rounding::Zero, false, true) => $f::<ZERO, false, true>,
            (Rounding::Zero, true, true) => $f::<ZERO, true, true>,
            (Rounding::Down, false, false) => $f::<DOWN, false, false>,
            (Rounding::Down, true, false) => $f::<DOWN, true, false>,
            (Rounding::Down, false, true) => $f::<DOWN, false, true>,
            (Rounding::Down, true, true) => $f::<DOWN, true, true>,
            (Rounding::Up, false, false) => $f::<UP, false, false>,
            (Rounding::Up, true, false) => $f::<UP, true, false>,
            (Rounding::Up, false, true) => $f::<UP, false, true>,
            (Rounding::Up, true, true) => $f::<UP, true, true>,
            (_, false, false) => $f::<NEAREST, false, false>,
            (_, true, false) => $f::<NEAREST, true, false>,
            (_, false, true) => $f::<NEAREST, false, true>,
            (_, true, true) => $f::<NEAREST, true, true>,
        }
    };
}

macro_rules! choose {
    ($f:ident $(, $fixed:literal)*; $flag:expr) => {
        if $flag { $f::<$($fixed,)* true> } else { $f::<$($fixed,)* false> }
    };
}

/// The kernel of an f32 or f64 instruction, or None when this file has none of that name and form.
pub(crate) fn kernel(name: &str, suffixes: &[&str], kind: Type) -> Option<Kernel> {
    let has = |suffix: &str| suffixes.contains(&suffix);
    let rounding = suffixes.iter().find_map(|suffix| Rounding::parse(suffix));
    if kind == Type::F64 {
        return double::kernel(name, rounding.unwrap_or(Rounding::NearestEven), suffixes);
    }
    if kind != Type::F32 || suffixes.iter().any(|suffix| !KNOWN.contains(suffix)) {
        return None;
    }
    let (ftz, sat) = (has("ftz"), has("sat"));
    let mode = rounding.unwrap_or(Rounding::NearestEven);
    Some(match name {
        "add" => flags!(add, mode, ftz, sat),
        "sub" => flags!(sub, mode, ftz, sat),
        "mul" => flags!(mul, mode, ftz, sat),
        "fma" | "mad" => flags!(fma, mode, ftz, sat),
        "div" if has("approx") => choose!(div_approx; ftz),
        "div" => flags!(div, mode, ftz, false),
        "rcp" => flags!(rcp, mode, ftz, false),
        "sqrt" => flags!(sqrt, mode, ftz, false),
        "rsqrt" => choose!(special, 0; ftz),
        "sin" => choose!(special, 1; ftz),
        "cos" => choose!(special, 2; ftz),
        "lg2" => choose!(special, 3; ftz),
        "ex2" => choose!(special, 4; ftz),
        "tanh" => choose!(special, 5; ftz),
        "min" if has("NaN") => choose!(extreme, false, true; ftz),
        "max" if has("NaN") => choose!(extreme, true, true; ftz),
        "min" => choose!(extreme, false, false; ftz),
        "max" => choose!(extreme, true, false; ftz),
        "min3" if has("NaN") => choose!(extreme_of_three, false, true; ftz),
        "max3" if has("NaN") => choose!(extreme_of_three, true, true; ftz),
        "min3" => choose!(extreme_of_three, false, false; ftz),
        "max3" => choose!(extreme_of_three, true, false; ftz),
        "abs" => choose!(sign, true; ftz),
        "neg" => choose!(sign, false; ftz),
        "copysign" => copysign,
        _ => return None,
    })
}

const KNOWN: [&str; 9] = ["rn", "rz", "rm", "rp", "ftz", "sat", "approx", "full", "NaN"];

/// copysign d, a, b: the sign of a, the magnitude of b.
fn copysign(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        d[i] = s[0][i] & 0x8000_0000 | s[1][i] & 0x7fff_ffff;
    }
}

/// f64: nearest even by the CPU, directed modes from the error of the nearest result.
mod double {
    use super::{Kernel, Lanes, Rounding, maximum, minimum};
    use crate::lanes::lanewise;

    fn get(bits: u64) -> f64 {
        f64::from_bits(bits)
    }

    /// The neighbour of `rounded` that the mode asks for, when the exact value lies beyond it.
    fn directed(rounded: f64, error: f64, mode: Rounding) -> u64 {
        let bits = rounded.to_bits();
        if error == 0.0 || !rounded.is_finite() {
            return bits;
        }
        let positive = rounded > 0.0;
        let outward = (error > 0.0) == positive;
        match mode {
            Rounding::Zero if !outward => bits - 1,
            Rounding::Down if error < 0.0 => {
                if positive {
                    bits - 1
                } else {
                    bits + 1
                }
            }
            Rounding::Up if error > 0.0 => {
                if positive {
                    bits + 1
                } else {
                    bits - 1
                }
            }
            _ => bits,
        }
    }

    fn sum_error(a: f64, b: f64) -> f64 {
        let s = a + b;
        let rest = s - a;
        (a - (s - rest)) + (b - rest)
    }

    macro_rules! rounded {
        ($mode:expr, $value:expr, $error:expr) => {{
            fn run<const M: u8>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
                for i in 0..32 {
                    let operands = [get(s[0][i]), get(s[1][i])];
                    let value: f64 = $value(operands);
                    d[i] = if M == super::NEAREST {
                        value.to_bits()
                    } else {
                        directed(value, $error(operands, value), super::mode::<M>())
                    };
                }
            }
            match $mode {
                Rounding::Zero => run::<{ super::ZERO }>,
                Rounding::Down => run::<{ super::DOWN }>,
                Rounding::Up => run::<{ super::UP }>,
                _ => run::<{ super::NEAREST }>,
            }
        }};
    }

    pub(super) fn kernel(name: &str, mode: Rounding, suffixes: &[&str]) -> Option<Kernel> {
        let nan = suffixes.contains(&"NaN");
        Some(match name {
            "add" => rounded!(mode, |[a, b]: [f64; 2]| a + b, |[a, b]: [f64; 2], _| sum_error(a, b)),
            "sub" => rounded!(mode, |[a, b]: [f64; 2]| a - b, |[a, b]: [f64; 2], _| sum_error(a, -b)),
            "mul" => {
                rounded!(mode, |[a, b]: [f64; 2]| a * b, |[a, b]: [f64; 2], r: f64| a.mul_add(b, -r))
            }
            "div" => rounded!(mode, |[a, b]: [f64; 2]| a / b, |[a, b]: [f64; 2], r: f64| {
                (-r).mul_add(b, a) * b.signum()
            }),
            "rcp" => rounded!(mode, |[a, _]: [f64; 2]| 1.0 / a, |[a, _]: [f64; 2], r: f64| {
                (-r).mul_add(a, 1.0) * a.signum()
            }),
            "sqrt" => {
                rounded!(mode, |[a, _]: [f64; 2]| a.sqrt(), |[a, _]: [f64; 2], r: f64| (-r).mul_add(r, a))
            }
            "fma" | "mad" if mode == Rounding::NearestEven => {
                lanewise!(u64, u64; a, b, c => get(a).mul_add(get(b), get(c)).to_bits())
            }
            "rsqrt" => lanewise!(u64, u64; a => get(a).sqrt().recip().to_bits()),
            "min" if !nan => lanewise!(u64, u64; a, b => minimum::<false>(get(a), get(b)).to_bits()),
            "max" if !nan => lanewise!(u64, u64; a, b => maximum::<false>(get(a), get(b)).to_bits()),
            "abs" => lanewise!(u64, u64; a => a & (u64::MAX >> 1)),
            "neg" => lanewise!(u64, u64; a => a ^ (1 << 63)),
            "copysign" => lanewise!(u64, u64; a, b => a & (1 << 63) | b & (u64::MAX >> 1)),
            _ => return None,
        })
    }
}
