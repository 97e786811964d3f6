//! Extended-precision integers: add.cc, addc, sub.cc, subc, mad.cc, madc. The carry flag is one more
//! register of the thread: fourth source, second result.

use crate::lanes::{Kernel, Lanes};
use crate::types::Type;

fn add<const BITS: u32, const CARRY_IN: bool>(s: &[&Lanes; 4], d: &mut Lanes, carry: &mut Lanes) {
    for lane in 0..32 {
        let carry_in = if CARRY_IN { s[3][lane] } else { 0 };
        let sum = u128::from(s[0][lane]) + u128::from(s[1][lane]) + u128::from(carry_in);
        d[lane] = sum as u64 & (u64::MAX >> (64 - BITS));
        carry[lane] = (sum >> BITS) as u64 & 1;
    }
}

fn subtract<const BITS: u32, const CARRY_IN: bool>(s: &[&Lanes; 4], d: &mut Lanes, carry: &mut Lanes) {
    for lane in 0..32 {
        let borrow_in = if CARRY_IN { s[3][lane] } else { 0 };
        let difference = i128::from(s[0][lane]) - i128::from(s[1][lane]) - i128::from(borrow_in);
        d[lane] = difference as u64 & (u64::MAX >> (64 - BITS));
        carry[lane] = u64::from(difference < 0);
    }
}

fn multiply_add<const SIGNED: bool, const HIGH: bool, const CARRY_IN: bool>(
    s: &[&Lanes; 4],
    d: &mut Lanes,
    carry: &mut Lanes,
) {
    for lane in 0..32 {
        let product = if SIGNED {
            (i64::from(s[0][lane] as i32) * i64::from(s[1][lane] as i32)) as u64
        } else {
            (s[0][lane] & 0xffff_ffff) * (s[1][lane] & 0xffff_ffff)
        };
        let half = if HIGH { product >> 32 } else { product & 0xffff_ffff };
        let sum = half + s[2][lane] + if CARRY_IN { s[3][lane] } else { 0 };
        d[lane] = sum & 0xffff_ffff;
        carry[lane] = sum >> 32;
    }
}

fn multiply_add_64<const HIGH: bool, const CARRY_IN: bool>(
    s: &[&Lanes; 4],
    d: &mut Lanes,
    carry: &mut Lanes,
) {
    for lane in 0..32 {
        let product = u128::from(s[0][lane]) * u128::from(s[1][lane]);
        let half = if HIGH { product >> 64 } else { product & u128::from(u64::MAX) };
        let sum = half + u128::from(s[2][lane]) + if CARRY_IN { u128::from(s[3][lane]) } else { 0 };
        d[lane] = sum as u64;
        carry[lane] = (sum >> 64) as u64;
    }
}

/// The kernel of `name` (`add`, `addc`, `sub`, `subc`, `mad`, `madc`) with a carry in or out.
pub(crate) fn kernel(name: &str, suffixes: &[&str], kind: Type) -> Option<Kernel> {
    let wide = kind.bytes() == 8;
    let high = suffixes.contains(&"hi");
    Some(match (name, wide) {
        ("add", false) => add::<32, false>,
        ("add", true) => add::<64, false>,
        ("addc", false) => add::<32, true>,
        ("addc", true) => add::<64, true>,
        ("sub", false) => subtract::<32, false>,
        ("sub", true) => subtract::<64, false>,
        ("subc", false) => subtract::<32, true>,
        ("subc", true) => subtract::<64, true>,
        ("mad" | "madc", false) => match (kind.is_signed(), high, name == "madc") {
            (true, true, true) => multiply_add::<true, true, true>,
            (true, true, false) => multiply_add::<true, true, false>,
            (true, false, true) => multiply_add::<true, false, true>,
            (true, false, false) => multiply_add::<true, false, false>,
            (false, true, true) => multiply_add::<false, true, true>,
            (false, true, false) => multiply_add::<false, true, false>,
            (false, false, true) => multiply_add::<false, false, true>,
            (false, false, false) => multiply_add::<false, false, false>,
        },
        ("mad" | "madc", true) if !kind.is_signed() || !high => match (high, name == "madc") {
            (true, true) => multiply_add_64::<true, true>,
            (true, false) => multiply_add_64::<true, false>,
            (false, true) => multiply_add_64::<false, true>,
            (false, false) => multiply_add_64::<false, false>,
        },
        _ => return None,
    })
}
