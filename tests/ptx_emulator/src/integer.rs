//! Integer and bit instructions: name and type → kernel.

use crate::lanes::{Kernel, lanewise, signed, unsigned};
use crate::types::Type;

/// The kernel of a plain integer instruction, or None when this file has none of that name and form.
/// `suffixes` are the parts of the opcode between its name and its type.
pub(crate) fn kernel(name: &str, suffixes: &[&str], kind: Type) -> Option<Kernel> {
    let bytes = kind.bytes();
    let has = |suffix: &str| suffixes.contains(&suffix);
    if name != "prmt" && suffixes.iter().any(|suffix| !KNOWN.contains(suffix)) {
        return None;
    }
    Some(match name {
        "add" if has("sat") => lanewise!(i32, u32; a, b => a.saturating_add(b)),
        "sub" if has("sat") => lanewise!(i32, u32; a, b => a.saturating_sub(b)),
        "add" if matches!(kind, Type::S16x2 | Type::U16x2) => {
            lanewise!(u32, u32; a, b => pair(a, b, u16::wrapping_add))
        }
        "add" => unsigned!(bytes; a, b => a.wrapping_add(b)),
        "sub" => unsigned!(bytes; a, b => a.wrapping_sub(b)),
        "mul" if has("wide") => match (bytes, kind.is_signed()) {
            (2, true) => lanewise!(i16, u32; a, b => i32::from(a) * i32::from(b)),
            (2, false) => lanewise!(u16, u32; a, b => u32::from(a) * u32::from(b)),
            (4, true) => lanewise!(i32, u64; a, b => i64::from(a) * i64::from(b)),
            _ => lanewise!(u32, u64; a, b => u64::from(a) * u64::from(b)),
        },
        "mul" if has("hi") => match (bytes, kind.is_signed()) {
            (2, true) => lanewise!(i16, u16; a, b => (i32::from(a) * i32::from(b)) >> 16),
            (2, false) => lanewise!(u16, u16; a, b => (u32::from(a) * u32::from(b)) >> 16),
            (8, true) => lanewise!(i64, u64; a, b => (i128::from(a) * i128::from(b)) >> 64),
            (8, false) => lanewise!(u64, u64; a, b => (u128::from(a) * u128::from(b)) >> 64),
            (_, true) => lanewise!(i32, u32; a, b => (i64::from(a) * i64::from(b)) >> 32),
            (_, false) => lanewise!(u32, u32; a, b => (u64::from(a) * u64::from(b)) >> 32),
        },
        "mul" => unsigned!(bytes; a, b => a.wrapping_mul(b)),
        "mad" if has("wide") => match (bytes, kind.is_signed()) {
            (2, true) => lanewise!(u64, u32; a, b, c =>
                (i32::from(a as i16) * i32::from(b as i16)).wrapping_add(c as i32)),
            (2, false) => lanewise!(u64, u32; a, b, c =>
                (u32::from(a as u16) * u32::from(b as u16)).wrapping_add(c as u32)),
            (4, true) => lanewise!(u64, u64; a, b, c =>
                (i64::from(a as i32) * i64::from(b as i32)).wrapping_add(c as i64)),
            _ => lanewise!(u64, u64; a, b, c =>
                (u64::from(a as u32) * u64::from(b as u32)).wrapping_add(c)),
        },
        "mad" if has("hi") && has("sat") => lanewise!(i32, u32; a, b, c =>
            (((i64::from(a) * i64::from(b)) >> 32) as i32).saturating_add(c)),
        "mad" if has("hi") => match (bytes, kind.is_signed()) {
            (8, true) => lanewise!(i64, u64; a, b, c =>
                (((i128::from(a) * i128::from(b)) >> 64) as i64).wrapping_add(c)),
            (8, false) => lanewise!(u64, u64; a, b, c =>
                (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c)),
            (2, true) => {
                lanewise!(i16, u16; a, b, c => ((i32::from(a) * i32::from(b)) >> 16) as i16 as i32 + i32::from(c))
            }
            (2, false) => {
                lanewise!(u16, u16; a, b, c => ((u32::from(a) * u32::from(b)) >> 16) + u32::from(c))
            }
            (_, true) => lanewise!(i32, u32; a, b, c =>
                (((i64::from(a) * i64::from(b)) >> 32) as i32).wrapping_add(c)),
            (_, false) => lanewise!(u32, u32; a, b, c =>
                (((u64::from(a) * u64::from(b)) >> 32) as u32).wrapping_add(c)),
        },
        "mad" => unsigned!(bytes; a, b, c => a.wrapping_mul(b).wrapping_add(c)),
        "mul24" if has("hi") => {
            if kind.is_signed() {
                lanewise!(u32, u32; a, b => (signed_24(a) * signed_24(b)) >> 16)
            } else {
                lanewise!(u64, u32; a, b => ((a & 0xff_ffff) * (b & 0xff_ffff)) >> 16)
            }
        }
        "mul24" => {
            if kind.is_signed() {
                lanewise!(u32, u32; a, b => signed_24(a) * signed_24(b))
            } else {
                lanewise!(u64, u32; a, b => (a & 0xff_ffff) * (b & 0xff_ffff))
            }
        }
        "mad24" if !has("hi") => {
            if kind.is_signed() {
                lanewise!(u32, u32; a, b, c => signed_24(a) * signed_24(b) + i64::from(c))
            } else {
                lanewise!(u64, u32; a, b, c => (a & 0xff_ffff) * (b & 0xff_ffff) + c)
            }
        }
        // The upper 32 of the product's 48 bits, plus the third.
        "mad24" if !has("sat") => {
            if kind.is_signed() {
                lanewise!(u32, u32; a, b, c => (signed_24(a) * signed_24(b) >> 16) + i64::from(c))
            } else {
                lanewise!(u64, u32; a, b, c => ((a & 0xff_ffff) * (b & 0xff_ffff) >> 16) + c)
            }
        }
        "sad" if kind.is_signed() => signed!(bytes; a, b, c => c.wrapping_add(a.abs_diff(b) as _)),
        "sad" => unsigned!(bytes; a, b, c => c.wrapping_add(a.abs_diff(b))),
        // Division by zero is unspecified; all ones is what the hardware's code gives.
        "div" if kind.is_signed() => {
            signed!(bytes; a, b => if b == 0 { !0 } else { a.wrapping_div(b) })
        }
        "div" => unsigned!(bytes; a, b => a.checked_div(b).unwrap_or(!0)),
        "rem" if kind.is_signed() => signed!(bytes; a, b => if b == 0 { a } else { a.wrapping_rem(b) }),
        "rem" => unsigned!(bytes; a, b => if b == 0 { a } else { a % b }),
        "abs" => signed!(bytes; a => a.wrapping_abs()),
        "neg" => signed!(bytes; a => a.wrapping_neg()),
        "min" if kind == Type::S16x2 && has("relu") => lanewise!(u32, u32; a, b =>
            pair(a, b, |x, y| (x as i16).min(y as i16).max(0) as u16)),
        "max" if kind == Type::S16x2 && has("relu") => lanewise!(u32, u32; a, b =>
            pair(a, b, |x, y| (x as i16).max(y as i16).max(0) as u16)),
        "min" if matches!(kind, Type::S16x2) => lanewise!(u32, u32; a, b =>
            pair(a, b, |x, y| (x as i16).min(y as i16) as u16)),
        "max" if matches!(kind, Type::S16x2) => lanewise!(u32, u32; a, b =>
            pair(a, b, |x, y| (x as i16).max(y as i16) as u16)),
        "min" if matches!(kind, Type::U16x2) => lanewise!(u32, u32; a, b => pair(a, b, u16::min)),
        "max" if matches!(kind, Type::U16x2) => lanewise!(u32, u32; a, b => pair(a, b, u16::max)),
        "min" if has("relu") => signed!(bytes; a, b => a.min(b).max(0)),
        "max" if has("relu") => signed!(bytes; a, b => a.max(b).max(0)),
        "min" if kind.is_signed() => signed!(bytes; a, b => a.min(b)),
        "min" => unsigned!(bytes; a, b => a.min(b)),
        "max" if kind.is_signed() => signed!(bytes; a, b => a.max(b)),
        "max" => unsigned!(bytes; a, b => a.max(b)),
        "and" => lanewise!(u64, u64; a, b => a & b),
        "or" => lanewise!(u64, u64; a, b => a | b),
        "xor" => lanewise!(u64, u64; a, b => a ^ b),
        "not" if kind == Type::Pred => lanewise!(u64, u64; a => a ^ 1),
        "not" => unsigned!(bytes; a => !a),
        "cnot" => unsigned!(bytes; a => u8::from(a == 0)),
        "shl" => shift_left(bytes),
        "shr" if kind.is_signed() => match bytes {
            2 => lanewise!(u64, u16; a, b => (a as i16) >> (b as u32).min(15)),
            8 => lanewise!(u64, u64; a, b => (a as i64) >> (b as u32).min(63)),
            _ => lanewise!(u64, u32; a, b => (a as i32) >> (b as u32).min(31)),
        },
        "shr" => match bytes {
            2 => lanewise!(u64, u16; a, b => (a as u16).checked_shr(b as u32).unwrap_or(0)),
            8 => lanewise!(u64, u64; a, b => a.checked_shr(b as u32).unwrap_or(0)),
            _ => lanewise!(u64, u32; a, b => (a as u32).checked_shr(b as u32).unwrap_or(0)),
        },
        // shf.l takes the high word of (b:a) << c, shf.r the low word of (b:a) >> c.
        "shf" => match (has("l"), has("wrap")) {
            (true, true) => lanewise!(u64, u32; a, b, c => ((b << 32 | a) << (c & 31)) >> 32),
            (true, false) => lanewise!(u64, u32; a, b, c => ((b << 32 | a) << c.min(32)) >> 32),
            (false, true) => lanewise!(u64, u32; a, b, c => (b << 32 | a) >> (c & 31)),
            (false, false) => lanewise!(u64, u32; a, b, c => (b << 32 | a) >> c.min(32)),
        },
        "clz" => unsigned!(bytes; a => a.leading_zeros()),
        "popc" => unsigned!(bytes; a => a.count_ones()),
        "brev" => unsigned!(bytes; a => a.reverse_bits()),
        "bfind" => bit_find(bytes, kind.is_signed(), has("shiftamt")),
        "bfe" => match (bytes, kind.is_signed()) {
            (8, true) => lanewise!(u64, u64; a, b, c => extract(a, 64, b as u32, c as u32, true)),
            (8, false) => lanewise!(u64, u64; a, b, c => extract(a, 64, b as u32, c as u32, false)),
            (_, true) => lanewise!(u64, u32; a, b, c => extract(a, 32, b as u32, c as u32, true)),
            (_, false) => lanewise!(u64, u32; a, b, c => extract(a, 32, b as u32, c as u32, false)),
        },
        "bfi" if bytes == 8 => lanewise!(u64, u64; a, b, c, d => insert(a, b, 64, c as u32, d as u32)),
        "bfi" => lanewise!(u64, u32; a, b, c, d => insert(a, b, 32, c as u32, d as u32)),
        "szext" => match (kind.is_signed(), has("wrap")) {
            (true, true) => lanewise!(u32, u32; a, b => sign_extend(a, b & 31)),
            (true, false) => lanewise!(u32, u32; a, b => sign_extend(a, b)),
            (false, true) => lanewise!(u32, u32; a, b => a & bit_mask(0, b & 31)),
            (false, false) => lanewise!(u32, u32; a, b => a & bit_mask(0, b)),
        },
        "bmsk" if has("wrap") => lanewise!(u32, u32; a, b => bit_mask(a & 31, b & 31)),
        "bmsk" => lanewise!(u32, u32; a, b => bit_mask(a, b)),
        "lop3" => lanewise!(u32, u32; a, b, c, table => lop3(a, b, c, table)),
        "prmt" => permute(suffixes)?,
        "slct" if kind == Type::F32 && has("ftz") => lanewise!(u64, u64; a, b, c => {
            let c = f32::from_bits(c as u32);
            if c >= 0.0 || c.is_subnormal() { a } else { b }
        }),
        "slct" if kind == Type::F32 => {
            lanewise!(u64, u64; a, b, c => if f32::from_bits(c as u32) >= 0.0 { a } else { b })
        }
        "slct" => lanewise!(u64, u64; a, b, c => if c >> 31 & 1 == 0 { a } else { b }),
        _ => return None,
    })
}

/// Suffixes that the instructions of this file know, beside the modes of prmt.
const KNOWN: [&str; 11] = ["ftz", "sat", "lo", "hi", "wide", "l", "r", "wrap", "clamp", "shiftamt", "relu"];

fn pair(a: u32, b: u32, f: impl Fn(u16, u16) -> u16) -> u32 {
    let low = f(a as u16, b as u16);
    let high = f((a >> 16) as u16, (b >> 16) as u16);
    u32::from(high) << 16 | u32::from(low)
}

fn signed_24(a: u32) -> i64 {
    i64::from((a << 8) as i32 >> 8)
}

fn shift_left(bytes: usize) -> Kernel {
    match bytes {
        2 => lanewise!(u64, u16; a, b => (a as u16).checked_shl(b as u32).unwrap_or(0)),
        8 => lanewise!(u64, u64; a, b => a.checked_shl(b as u32).unwrap_or(0)),
        _ => lanewise!(u64, u32; a, b => (a as u32).checked_shl(b as u32).unwrap_or(0)),
    }
}

fn sign_extend(a: u32, width: u32) -> u32 {
    match width {
        0 => 0,
        1..=31 => ((a << (32 - width)) as i32 >> (32 - width)) as u32,
        _ => a,
    }
}

fn bit_mask(start: u32, width: u32) -> u32 {
    let ones = if width >= 32 { u32::MAX } else { (1 << width) - 1 };
    if start >= 32 { 0 } else { ones << start }
}

fn bit_find(bytes: usize, signed: bool, shift_amount: bool) -> Kernel {
    fn find(a: u64, bits: u32, signed: bool, shift_amount: bool) -> u32 {
        let shift = 64 - bits;
        let negative = signed && ((a << shift) as i64) < 0;
        let value = if negative { !a << shift >> shift } else { a };
        match value.checked_ilog2() {
            None => u32::MAX,
            Some(top) if shift_amount => bits - 1 - top,
            Some(top) => top,
        }
    }
    match (bytes, signed, shift_amount) {
        (8, true, true) => lanewise!(u64, u32; a => find(a, 64, true, true)),
        (8, true, false) => lanewise!(u64, u32; a => find(a, 64, true, false)),
        (8, false, true) => lanewise!(u64, u32; a => find(a, 64, false, true)),
        (8, false, false) => lanewise!(u64, u32; a => find(a, 64, false, false)),
        (_, true, true) => lanewise!(u64, u32; a => find(a, 32, true, true)),
        (_, true, false) => lanewise!(u64, u32; a => find(a, 32, true, false)),
        (_, false, true) => lanewise!(u64, u32; a => find(a, 32, false, true)),
        (_, false, false) => lanewise!(u64, u32; a => find(a, 32, false, false)),
    }
}

/// bfe: `length` bits from `start`; bits beyond the top repeat the sign bit, or are zero.
fn extract(a: u64, bits: u32, start: u32, length: u32, signed: bool) -> u64 {
    let (start, length) = (start & 255, length & 255);
    let top = bits - 1;
    let sign = if !signed || length == 0 { 0 } else { a >> (start + length - 1).min(top) & 1 };
    let mut result = if sign == 1 { u64::MAX } else { 0 };
    for i in 0..length.min(bits) {
        if start + i <= top {
            result = result & !(1 << i) | (a >> (start + i) & 1) << i;
        }
    }
    result
}

/// bfi: the low `length` bits of `a` into `b` at `start`.
fn insert(a: u64, b: u64, bits: u32, start: u32, length: u32) -> u64 {
    let (start, length) = (start & 255, length & 255);
    if start >= bits || length == 0 {
        return b;
    }
    let length = length.min(bits - start);
    let ones = if length == 64 { u64::MAX } else { (1 << length) - 1 };
    b & !(ones << start) | (a & ones) << start
}

/// lop3: bit i of the result is bit (4 a_i + 2 b_i + c_i) of the table.
fn lop3(a: u32, b: u32, c: u32, table: u32) -> u32 {
    let mut result = 0;
    for entry in 0..8u32 {
        if table >> entry & 1 == 1 {
            let x = if entry & 4 != 0 { a } else { !a };
            let y = if entry & 2 != 0 { b } else { !b };
            let z = if entry & 1 != 0 { c } else { !c };
            result |= x & y & z;
        }
    }
    result
}

/// prmt: each selector nibble picks one of the eight bytes of (b:a); its top bit repeats that byte's sign.
fn permute(suffixes: &[&str]) -> Option<Kernel> {
    fn select(a: u32, b: u32, selector: [u32; 4]) -> u32 {
        let bytes = u64::from(b) << 32 | u64::from(a);
        let mut result = 0;
        for (i, nibble) in selector.iter().enumerate() {
            let byte = (bytes >> (8 * (nibble & 7))) as u8;
            let byte = if nibble & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
            result |= u32::from(byte) << (8 * i);
        }
        result
    }
    const MODES: [(&str, [[u32; 4]; 4]); 6] = [
        ("f4e", [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]),
        ("b4e", [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]]),
        ("rc8", [[0; 4], [1; 4], [2; 4], [3; 4]]),
        ("ecl", [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]]),
        ("ecr", [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]]),
        ("rc16", [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]]),
    ];
    Some(match suffixes.iter().find(|suffix| **suffix != "b32") {
        None => lanewise!(u32, u32; a, b, c =>
            select(a, b, [c & 15, c >> 4 & 15, c >> 8 & 15, c >> 12 & 15])),
        Some(&"f4e") => lanewise!(u32, u32; a, b, c => select(a, b, MODES[0].1[c as usize & 3])),
        Some(&"b4e") => lanewise!(u32, u32; a, b, c => select(a, b, MODES[1].1[c as usize & 3])),
        Some(&"rc8") => lanewise!(u32, u32; a, b, c => select(a, b, MODES[2].1[c as usize & 3])),
        Some(&"ecl") => lanewise!(u32, u32; a, b, c => select(a, b, MODES[3].1[c as usize & 3])),
        Some(&"ecr") => lanewise!(u32, u32; a, b, c => select(a, b, MODES[4].1[c as usize & 3])),
        Some(&"rc16") => lanewise!(u32, u32; a, b, c => select(a, b, MODES[5].1[c as usize & 3])),
        _ => return None,
    })
}
