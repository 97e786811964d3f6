//! setp and set: comparisons of every type, and how their result combines with a predicate.

use crate::float;
use crate::lanes::{Kernel, Lanes};
use crate::rounding::{bf16_to_f32, f16_to_f32};
use crate::types::Type;
use std::cmp::Ordering;

/// How the result of a comparison combines with the predicate operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Combine {
    And,
    Or,
    Xor,
}

impl Combine {
    pub(crate) fn parse(suffix: &str) -> Option<Self> {
        Some(match suffix {
            "and" => Self::And,
            "or" => Self::Or,
            "xor" => Self::Xor,
            _ => return None,
        })
    }

    pub(crate) fn apply(self, a: u64, b: u64) -> u64 {
        match self {
            Self::And => a & b,
            Self::Or => a | b,
            Self::Xor => a ^ b,
        }
    }
}

const LESS: u8 = 1;
const EQUAL: u8 = 2;
const GREATER: u8 = 4;
const UNORDERED: u8 = 8;

/// A comparison as the set of orderings that make it true.
fn accepted(name: &str) -> Option<u8> {
    Some(match name {
        "eq" => EQUAL,
        "ne" => LESS | GREATER,
        "lt" | "lo" => LESS,
        "le" | "ls" => LESS | EQUAL,
        "gt" | "hi" => GREATER,
        "ge" | "hs" => GREATER | EQUAL,
        "equ" => EQUAL | UNORDERED,
        "neu" => LESS | GREATER | UNORDERED,
        "ltu" => LESS | UNORDERED,
        "leu" => LESS | EQUAL | UNORDERED,
        "gtu" => GREATER | UNORDERED,
        "geu" => GREATER | EQUAL | UNORDERED,
        "num" => LESS | EQUAL | GREATER,
        "nan" => UNORDERED,
        _ => return None,
    })
}

fn class(ordering: Option<Ordering>) -> u8 {
    match ordering {
        Some(Ordering::Less) => LESS,
        Some(Ordering::Equal) => EQUAL,
        Some(Ordering::Greater) => GREATER,
        None => UNORDERED,
    }
}

/// Compares both registers; result lanes hold the ordering's class, to be tested against a set.
fn compare<const KIND: u8>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
    for i in 0..32 {
        let (a, b) = (s[0][i], s[1][i]);
        let found = match KIND {
            0 => class(Some(a.cmp(&b))),
            1 => class(Some((a as i16).cmp(&(b as i16)))),
            2 => class(Some((a as i32).cmp(&(b as i32)))),
            3 => class(Some((a as i64).cmp(&(b as i64)))),
            4 => class(float::input::<false>(a).partial_cmp(&float::input::<false>(b))),
            5 => class(float::input::<true>(a).partial_cmp(&float::input::<true>(b))),
            6 => class(f64::from_bits(a).partial_cmp(&f64::from_bits(b))),
            7 => class(f16_to_f32(a as u16).partial_cmp(&f16_to_f32(b as u16))),
            _ => class(bf16_to_f32(a as u16).partial_cmp(&bf16_to_f32(b as u16))),
        };
        d[i] = u64::from(found);
    }
}

/// A comparison: the kernel that finds the ordering, and the set of orderings that count as true.
pub(crate) fn comparison(name: &str, ftz: bool, kind: Type) -> Option<(Kernel, u8)> {
    let kernel = match kind {
        Type::S16 => compare::<1>,
        Type::S32 => compare::<2>,
        Type::S64 => compare::<3>,
        Type::F32 if ftz => compare::<5>,
        Type::F32 => compare::<4>,
        Type::F64 => compare::<6>,
        Type::F16 | Type::F16x2 => compare::<7>,
        Type::Bf16 | Type::Bf16x2 => compare::<8>,
        _ => compare::<0>,
    };
    // For integers `lo` and its kin are unsigned whatever the type says; registers hold zero-extended
    // values, so comparing them whole is the unsigned comparison.
    let unsigned_name = matches!(name, "lo" | "ls" | "hi" | "hs");
    Some((if unsigned_name { compare::<0> } else { kernel }, accepted(name)?))
}
