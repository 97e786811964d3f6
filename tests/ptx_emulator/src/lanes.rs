//! A register of a warp: one value for each of its 32 lanes, and functions applied to all lanes.
//!
//! Every value stands zero-extended in 64 bits; predicates are 0 or 1. An instruction's arithmetic is one
//! function pointer over whole registers, chosen when the instruction is decoded, so that the inner loop
//! over lanes holds no dispatch.

/// One value per lane.
pub(crate) type Lanes = [u64; 32];

/// Up to four source registers → a result and, for some, a second one (a carry, a second predicate).
pub(crate) type Kernel = fn(&[&Lanes; 4], &mut Lanes, &mut Lanes);

/// A kernel from an expression over operands of one type: `lanewise!(u32, u32; a, b => a & b)`.
/// The first type is the operands', the second the unsigned one that the result is stored as.
macro_rules! lanewise {
    ($operand:ty, $stored:ty; $a:ident => $result:expr) => {{
        fn kernel(
            s: &[&$crate::lanes::Lanes; 4],
            d: &mut $crate::lanes::Lanes,
            _: &mut $crate::lanes::Lanes,
        ) {
            for lane in 0..32 {
                let $a = s[0][lane] as $operand;
                d[lane] = ($result) as $stored as u64;
            }
        }
        kernel as $crate::lanes::Kernel
    }};
    ($operand:ty, $stored:ty; $a:ident, $b:ident => $result:expr) => {{
        fn kernel(
            s: &[&$crate::lanes::Lanes; 4],
            d: &mut $crate::lanes::Lanes,
            _: &mut $crate::lanes::Lanes,
        ) {
            for lane in 0..32 {
                let ($a, $b) = (s[0][lane] as $operand, s[1][lane] as $operand);
                d[lane] = ($result) as $stored as u64;
            }
        }
        kernel as $crate::lanes::Kernel
    }};
    ($operand:ty, $stored:ty; $a:ident, $b:ident, $c:ident => $result:expr) => {{
        fn kernel(
            s: &[&$crate::lanes::Lanes; 4],
            d: &mut $crate::lanes::Lanes,
            _: &mut $crate::lanes::Lanes,
        ) {
            for lane in 0..32 {
                let ($a, $b, $c) = (s[0][lane] as $operand, s[1][lane] as $operand, s[2][lane] as $operand);
                d[lane] = ($result) as $stored as u64;
            }
        }
        kernel as $crate::lanes::Kernel
    }};
    ($operand:ty, $stored:ty; $a:ident, $b:ident, $c:ident, $d:ident => $result:expr) => {{
        fn kernel(
            s: &[&$crate::lanes::Lanes; 4],
            d: &mut $crate::lanes::Lanes,
            _: &mut $crate::lanes::Lanes,
        ) {
            for lane in 0..32 {
                let ($a, $b, $c, $d) = (
                    s[0][lane] as $operand,
                    s[1][lane] as $operand,
                    s[2][lane] as $operand,
                    s[3][lane] as $operand,
                );
                d[lane] = ($result) as $stored as u64;
            }
        }
        kernel as $crate::lanes::Kernel
    }};
}

/// The same expression for 16, 32 and 64 bits, unsigned.
macro_rules! unsigned {
    ($bytes:expr; $($a:ident),+ => $result:expr) => {
        match $bytes {
            1 => $crate::lanes::lanewise!(u8, u8; $($a),+ => $result),
            2 => $crate::lanes::lanewise!(u16, u16; $($a),+ => $result),
            8 => $crate::lanes::lanewise!(u64, u64; $($a),+ => $result),
            _ => $crate::lanes::lanewise!(u32, u32; $($a),+ => $result),
        }
    };
}

/// The same expression for 16, 32 and 64 bits, signed.
macro_rules! signed {
    ($bytes:expr; $($a:ident),+ => $result:expr) => {
        match $bytes {
            1 => $crate::lanes::lanewise!(i8, u8; $($a),+ => $result),
            2 => $crate::lanes::lanewise!(i16, u16; $($a),+ => $result),
            8 => $crate::lanes::lanewise!(i64, u64; $($a),+ => $result),
            _ => $crate::lanes::lanewise!(i32, u32; $($a),+ => $result),
        }
    };
}

pub(crate) use {lanewise, signed, unsigned};
