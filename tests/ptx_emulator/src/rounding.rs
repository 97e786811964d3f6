//! One exact value → one float format, under every rounding mode of PTX.
//!
//! Sums and products are first formed in f64 *rounded to odd*: when the exact result has more bits than
//! f64 holds, the last bit is set. A second rounding to any format of at most 50 bits then equals a single
//! rounding of the exact result (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums").

/// How an inexact result is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    NearestEven,
    NearestAway,
    Zero,
    Down,
    Up,
}

impl Rounding {
    /// The suffix of an opcode, also in its to-integer form (`rni`).
    pub(crate) fn parse(suffix: &str) -> Option<Self> {
        Some(match suffix {
            "rn" | "rni" => Self::NearestEven,
            "rna" => Self::NearestAway,
            "rz" | "rzi" => Self::Zero,
            "rm" | "rmi" => Self::Down,
            "rp" | "rpi" => Self::Up,
            _ => return None,
        })
    }
}

/// A binary float format by its field widths; `finite` formats have no infinities (none so far).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) exponent_bits: u32,
    pub(crate) fraction_bits: u32,
}

pub(crate) const F16: Format = Format { exponent_bits: 5, fraction_bits: 10 };
pub(crate) const BF16: Format = Format { exponent_bits: 8, fraction_bits: 7 };
pub(crate) const TF32: Format = Format { exponent_bits: 8, fraction_bits: 10 };
pub(crate) const F32: Format = Format { exponent_bits: 8, fraction_bits: 23 };

/// `p + c` in f64, rounded to odd.
#[inline]
pub(crate) fn odd_sum(p: f64, c: f64) -> f64 {
    let s = p + c;
    if !s.is_finite() {
        return s;
    }
    let rest = s - p;
    let error = (p - (s - rest)) + (c - rest);
    to_odd(s, error)
}

/// `rounded`, the nearest f64 of an exact value that lies beyond it in the direction of `error`, to odd.
#[inline]
pub(crate) fn to_odd(rounded: f64, error: f64) -> f64 {
    let bits = rounded.to_bits();
    if error == 0.0 || bits & 1 == 1 {
        return rounded;
    }
    let away_from_zero = (error > 0.0) == (rounded > 0.0);
    f64::from_bits(if away_from_zero { bits + 1 } else { bits - 1 })
}

/// The bits of `x` in `format`. NaN becomes the canonical all-ones NaN of PTX.
pub(crate) fn encode(x: f64, format: Format, mode: Rounding) -> u64 {
    let Format { exponent_bits, fraction_bits } = format;
    let sign = u64::from(x.is_sign_negative()) << (exponent_bits + fraction_bits);
    let infinity = ((1u64 << exponent_bits) - 1) << fraction_bits;
    if x.is_nan() {
        return infinity | ((1 << fraction_bits) - 1);
    }
    if x.is_infinite() {
        return sign | infinity;
    }
    if x == 0.0 {
        return sign;
    }
    let bits = x.to_bits() & (u64::MAX >> 1);
    let (mut significand, mut exponent) = (bits & ((1 << 52) - 1), (bits >> 52) as i64);
    if exponent == 0 {
        let shift = i64::from(significand.leading_zeros()) - 11;
        significand <<= shift;
        exponent = 1 - shift;
    } else {
        significand |= 1 << 52;
    }
    // x = significand * 2^(exponent - 52), 2^52 <= significand < 2^53.
    exponent -= 1023;
    let bias = (1i64 << (exponent_bits - 1)) - 1;
    let lowest = 1 - bias;
    let drop = exponent.max(lowest) - i64::from(fraction_bits) - (exponent - 52);
    let (mut kept, remainder, half) = if drop >= 64 {
        (0, significand, u64::MAX)
    } else if drop > 0 {
        (significand >> drop, significand & ((1 << drop) - 1), 1 << (drop - 1))
    } else {
        (significand << -drop, 0, 1)
    };
    let up = match mode {
        Rounding::NearestEven => remainder > half || (remainder == half && kept & 1 == 1),
        Rounding::NearestAway => remainder >= half,
        Rounding::Zero => false,
        Rounding::Down => remainder != 0 && sign != 0,
        Rounding::Up => remainder != 0 && sign == 0,
    };
    kept += u64::from(up);
    let magnitude = if exponent < lowest {
        kept
    } else {
        (((exponent + bias) as u64) << fraction_bits) + (kept - (1 << fraction_bits))
    };
    if magnitude >= infinity {
        let to_infinity = match mode {
            Rounding::NearestEven | Rounding::NearestAway => true,
            Rounding::Zero => false,
            Rounding::Down => sign != 0,
            Rounding::Up => sign == 0,
        };
        return sign | if to_infinity { infinity } else { infinity - 1 };
    }
    sign | magnitude
}

/// The value of a pattern of `format`.
pub(crate) fn decode(bits: u64, format: Format) -> f64 {
    let Format { exponent_bits, fraction_bits } = format;
    let fraction = bits & ((1 << fraction_bits) - 1);
    let exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
    let bias = (1i32 << (exponent_bits - 1)) - 1;
    let magnitude = if exponent == (1 << exponent_bits) - 1 {
        if fraction == 0 { f64::INFINITY } else { f64::NAN }
    } else if exponent == 0 {
        fraction as f64 * power_of_two(1 - bias - fraction_bits as i32)
    } else {
        ((1 << fraction_bits) | fraction) as f64 * power_of_two(exponent as i32 - bias - fraction_bits as i32)
    };
    if bits >> (exponent_bits + fraction_bits) & 1 == 1 { -magnitude } else { magnitude }
}

/// 2^exponent, for exponents of normal f64 values.
#[inline]
pub(crate) fn power_of_two(exponent: i32) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}

/// f32 under a mode; to nearest even, the conversion of the hardware.
#[inline]
pub(crate) fn to_f32(x: f64, mode: Rounding) -> f32 {
    match mode {
        Rounding::NearestEven => x as f32,
        _ => f32::from_bits(encode(x, F32, mode) as u32),
    }
}

#[inline]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let exponent = u32::from(bits >> 10) & 31;
    let fraction = u32::from(bits & 0x3ff);
    let magnitude = match exponent {
        0 => return f32::from_bits(sign | (fraction as f32 * f32::from_bits(0x3380_0000)).to_bits()),
        31 => 0x7f80_0000 | fraction << 13,
        _ => (exponent + 112) << 23 | fraction << 13,
    };
    f32::from_bits(sign | magnitude)
}

#[inline]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// f32 → bf16 to nearest even, NaN canonical.
#[inline]
pub(crate) fn f32_to_bf16(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7fff;
    }
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_a_round_trip() {
        for bits in 0..=u16::MAX {
            for format in [F16, BF16] {
                let value = decode(u64::from(bits), format);
                if !value.is_nan() {
                    assert_eq!(encode(value, format, Rounding::NearestEven), u64::from(bits));
                }
            }
            let value = f16_to_f32(bits);
            assert!(value.is_nan() || f64::from(value) == decode(u64::from(bits), F16));
        }
    }

    #[test]
    fn encode_to_f32_is_the_hardware_conversion() {
        let mut state = 1u64;
        for _ in 0..200_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Exponents around f32's whole range, subnormals included.
            let exponent = 1023 - 155 + (state >> 54) % 290;
            let x = f64::from_bits((exponent << 52) | (state & 0x800f_ffff_ffff_ffff));
            assert_eq!(encode(x, F32, Rounding::NearestEven), u64::from((x as f32).to_bits()), "{x:e}");
        }
    }

    #[test]
    fn directed_modes_bracket_the_value() {
        // 1 + 2^-30 lies between 1 and 1 + 2^-23.
        let x = 1.0 + power_of_two(-30);
        assert_eq!(encode(x, F32, Rounding::Down), 0x3f80_0000);
        assert_eq!(encode(x, F32, Rounding::Up), 0x3f80_0001);
        assert_eq!(encode(-x, F32, Rounding::Up), 0xbf80_0000);
        assert_eq!(encode(-x, F32, Rounding::Zero), 0xbf80_0000);
        assert_eq!(encode(1e300, F32, Rounding::Zero), 0x7f7f_ffff);
        assert_eq!(encode(1e300, F32, Rounding::Up), 0x7f80_0000);
        assert_eq!(encode(1.0 + 1.5 * power_of_two(-10), TF32, Rounding::NearestAway), 0x3f80_4000 >> 13);
        assert_eq!(encode(65520.0, F16, Rounding::NearestEven), 0x7c00);
        assert_eq!(encode(65519.0, F16, Rounding::NearestEven), 0x7bff);
    }

    #[test]
    fn a_sum_rounded_to_odd_and_then_to_f32_is_rounded_once() {
        // 1 + 2^-24 + 2^-60: just above the tie, which f64 alone would lose.
        let tie = 1.0 + power_of_two(-24);
        let sum = odd_sum(tie, power_of_two(-80));
        assert_eq!((sum as f32).to_bits(), 0x3f80_0001);
        assert_eq!((odd_sum(tie, -power_of_two(-80)) as f32).to_bits(), 0x3f80_0000);
        assert_eq!((odd_sum(tie, 0.0) as f32).to_bits(), 0x3f80_0000);
    }
}
