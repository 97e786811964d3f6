//! cvt: between integers and floats of every width, with rounding, flushing and saturation.

use crate::lanes::{Kernel, Lanes, lanewise};
use crate::rounding::{
    BF16, F16, F32, Format, Rounding, TF32, bf16_to_f32, decode, encode, f16_to_f32, f32_to_bf16,
};
use crate::types::Type;

/// One `cvt`, decoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Convert {
    pub(crate) to: Type,
    pub(crate) from: Type,
    pub(crate) rounding: Option<Rounding>,
    /// `.rni` and its kin between floats: round to an integral value.
    pub(crate) integral: bool,
    pub(crate) ftz: bool,
    pub(crate) sat: bool,
    pub(crate) relu: bool,
    pub(crate) satfinite: bool,
}

/// The f64 value of a float of type `kind`.
pub(crate) fn float_value(bits: u64, kind: Type) -> f64 {
    match kind {
        Type::F16 => f64::from(f16_to_f32(bits as u16)),
        Type::Bf16 => f64::from(bf16_to_f32(bits as u16)),
        Type::F64 => f64::from_bits(bits),
        _ => f64::from(f32::from_bits(bits as u32)),
    }
}

fn integer_value(bits: u64, kind: Type) -> i128 {
    match kind {
        Type::S8 => i128::from(bits as i8),
        Type::S16 => i128::from(bits as i16),
        Type::S32 => i128::from(bits as i32),
        Type::S64 => i128::from(bits as i64),
        Type::U8 | Type::B8 => i128::from(bits as u8),
        Type::U16 | Type::B16 => i128::from(bits as u16),
        Type::U32 | Type::B32 => i128::from(bits as u32),
        _ => i128::from(bits),
    }
}

fn integral(x: f64, mode: Rounding) -> f64 {
    match mode {
        Rounding::NearestEven => x.round_ties_even(),
        Rounding::NearestAway => x.round(),
        Rounding::Zero => x.trunc(),
        Rounding::Down => x.floor(),
        Rounding::Up => x.ceil(),
    }
}

fn format(kind: Type) -> Format {
    match kind {
        Type::F16 | Type::F16x2 => F16,
        Type::Bf16 | Type::Bf16x2 => BF16,
        Type::Tf32 => TF32,
        _ => F32,
    }
}

/// An integer as the nearest f64 to odd, so that one more rounding is the only one.
fn odd_integer(value: i128) -> f64 {
    let magnitude = value.unsigned_abs();
    let extra = 128u32.saturating_sub(magnitude.leading_zeros()).saturating_sub(53);
    let kept = (magnitude >> extra) as u64;
    let sticky = u64::from(magnitude & ((1u128 << extra) - 1) != 0);
    let x = (kept | sticky) as f64 * (1u128 << extra) as f64;
    if value < 0 { -x } else { x }
}

impl Convert {
    /// Converts one value; for pairs (`bf16x2`), one half.
    pub(crate) fn apply(&self, bits: u64) -> u64 {
        match (self.from.is_float(), self.to.is_float()) {
            (false, false) => self.integer_to_integer(integer_value(bits, self.from)),
            (false, true) => {
                let value = integer_value(bits, self.from);
                self.finish(if self.to == Type::F64 {
                    self.integer_to_f64(value)
                } else {
                    odd_integer(value)
                })
            }
            (true, false) => self.float_to_integer(float_value(bits, self.from)),
            (true, true) => {
                let mut x = float_value(bits, self.from);
                // Flushing concerns f32 only.
                if self.ftz && self.from == Type::F32 && (x as f32).is_subnormal() {
                    x = if x.is_sign_negative() { -0.0 } else { 0.0 };
                }
                if self.integral {
                    x = integral(x, self.rounding.unwrap_or(Rounding::NearestEven));
                }
                if self.to == Type::F64 && self.from == Type::F64 {
                    return if self.sat { unit(x).to_bits() } else { x.to_bits() };
                }
                self.finish(x)
            }
        }
    }

    fn integer_to_f64(&self, value: i128) -> f64 {
        // i128 → f64 rounds to nearest even; directed modes step by the remainder's sign.
        let nearest = value as f64;
        let error = value - nearest as i128;
        let step = match self.rounding {
            Some(Rounding::Up) if error > 0 => 1,
            Some(Rounding::Down) if error < 0 => -1,
            Some(Rounding::Zero) if error != 0 && (error < 0) == (value > 0) => -value.signum() as i64,
            _ => 0,
        };
        if step == 0 || nearest == 0.0 {
            return nearest;
        }
        let away = (step > 0) == (nearest > 0.0);
        f64::from_bits(if away { nearest.to_bits() + 1 } else { nearest.to_bits() - 1 })
    }

    fn finish(&self, x: f64) -> u64 {
        let x = if self.sat { unit(x) } else { x };
        let x = if self.relu && x <= 0.0 { 0.0 } else { x };
        if self.to == Type::F64 {
            return x.to_bits();
        }
        let format = format(self.to);
        let mode =
            if self.integral { Rounding::Zero } else { self.rounding.unwrap_or(Rounding::NearestEven) };
        let mut bits = encode(x, format, mode);
        if self.to == Type::F32 && x.is_nan() {
            bits = 0x7fff_ffff;
        }
        let magnitude = bits & ((1 << (format.exponent_bits + format.fraction_bits)) - 1);
        if self.satfinite && magnitude == infinity(format) {
            bits -= 1;
        }
        if self.ftz && self.to == Type::F32 && f32::from_bits(bits as u32).is_subnormal() {
            bits &= 0x8000_0000;
        }
        if self.to == Type::Tf32 { bits << 13 } else { bits }
    }

    fn integer_to_integer(&self, value: i128) -> u64 {
        let (low, high) = range(self.to);
        let value = if self.sat { value.clamp(low, high) } else { value };
        value as u64 & mask(self.to)
    }

    fn float_to_integer(&self, x: f64) -> u64 {
        let x = if self.ftz && self.from == Type::F32 && (x as f32).is_subnormal() { 0.0 } else { x };
        // NaN becomes zero, except from f64 and to 64 bits: there the top bit alone.
        if x.is_nan() {
            let top = self.from == Type::F64 || self.to.bits() == 64;
            return if top { 1 << (self.to.bits() - 1) } else { 0 };
        }
        let rounded = integral(x, self.rounding.unwrap_or(Rounding::Zero));
        let (low, high) = range(self.to);
        // Out-of-range values clamp for every conversion from float.
        let clamped = if rounded >= high as f64 && rounded > 0.0 {
            high
        } else if rounded <= low as f64 {
            low
        } else {
            rounded as i128
        };
        clamped as u64 & mask(self.to)
    }
}

fn infinity(format: Format) -> u64 {
    ((1 << format.exponent_bits) - 1) << format.fraction_bits
}

fn unit(x: f64) -> f64 {
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

fn mask(kind: Type) -> u64 {
    u64::MAX >> (64 - kind.bits())
}

fn range(kind: Type) -> (i128, i128) {
    let bits = kind.bits();
    if kind.is_signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

/// Frequent conversions as whole-register kernels; None sends the rest through `Convert::apply`.
pub(crate) fn fast(convert: &Convert) -> Option<Kernel> {
    if convert.sat || convert.relu || convert.ftz || convert.integral || convert.satfinite {
        return None;
    }
    let nearest = matches!(convert.rounding, None | Some(Rounding::NearestEven));
    Some(match (convert.from, convert.to) {
        (Type::F32, Type::Bf16) if nearest => {
            lanewise!(u32, u16; a => f32_to_bf16(f32::from_bits(a)))
        }
        (Type::F32, Type::Bf16x2) if nearest => lanewise!(u32, u32; a, b =>
            u32::from(f32_to_bf16(f32::from_bits(a))) << 16 | u32::from(f32_to_bf16(f32::from_bits(b)))),
        (Type::Bf16, Type::F32) => lanewise!(u32, u32; a => number(bf16_to_f32(a as u16))),
        (Type::F16, Type::F32) => lanewise!(u32, u32; a => number(f16_to_f32(a as u16))),
        (Type::U32, Type::F32) if nearest => lanewise!(u32, u32; a => (a as f32).to_bits()),
        (Type::S32, Type::F32) if nearest => lanewise!(i32, u32; a => (a as f32).to_bits()),
        (Type::U16, Type::F32) if nearest => lanewise!(u16, u32; a => f32::from(a).to_bits()),
        (Type::U8, Type::F32) if nearest => lanewise!(u8, u32; a => f32::from(a).to_bits()),
        (Type::U8, Type::U16 | Type::U32 | Type::U64 | Type::S16 | Type::S32 | Type::S64) => {
            lanewise!(u8, u64; a => a)
        }
        (Type::U16, Type::U32 | Type::U64 | Type::S32 | Type::S64) => lanewise!(u16, u64; a => a),
        (Type::U32, Type::U64 | Type::S64) => lanewise!(u32, u64; a => a),
        (Type::S32, Type::S64 | Type::U64) => lanewise!(i32, u64; a => i64::from(a)),
        (Type::U64 | Type::S64, Type::U32 | Type::S32) => lanewise!(u32, u32; a => a),
        (Type::U32 | Type::S32 | Type::U64 | Type::S64, Type::U16 | Type::S16) => {
            lanewise!(u16, u16; a => a)
        }
        _ => return None,
    })
}

fn number(x: f32) -> u32 {
    if x.is_nan() { 0x7fff_ffff } else { x.to_bits() }
}

/// Applies a conversion to whole registers; `b` is the low half of a packed result.
pub(crate) fn convert_lanes(convert: &Convert, a: &Lanes, b: Option<&Lanes>, d: &mut Lanes) {
    for lane in 0..32 {
        d[lane] = match b {
            Some(low) => convert.apply(a[lane]) << 16 | convert.apply(low[lane]),
            None => convert.apply(a[lane]),
        };
    }
}

/// dp4a and dp2a: products of bytes (and halves) summed into 32 bits.
pub(crate) fn dot_product(name: &str, high: bool, a: Type, b: Type) -> Kernel {
    fn byte(word: u64, index: u32, signed: bool) -> i64 {
        let byte = (word >> (8 * index)) as u8;
        if signed { i64::from(byte as i8) } else { i64::from(byte) }
    }
    fn four<const A: bool, const B: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
        for lane in 0..32 {
            let sum: i64 = (0..4).map(|i| byte(s[0][lane], i, A) * byte(s[1][lane], i, B)).sum();
            d[lane] = u64::from((sum + s[2][lane] as i64) as u32);
        }
    }
    fn two<const A: bool, const B: bool, const HIGH: bool>(s: &[&Lanes; 4], d: &mut Lanes, _: &mut Lanes) {
        for lane in 0..32 {
            let half = |i: u32| {
                let bits = (s[0][lane] >> (16 * i)) as u16;
                if A { i64::from(bits as i16) } else { i64::from(bits) }
            };
            let offset = if HIGH { 2 } else { 0 };
            let sum: i64 = (0..2).map(|i| half(i) * byte(s[1][lane], i + offset, B)).sum();
            d[lane] = u64::from((sum + s[2][lane] as i64) as u32);
        }
    }
    match (name, a.is_signed(), b.is_signed(), high) {
        ("dp4a", true, true, _) => four::<true, true>,
        ("dp4a", true, false, _) => four::<true, false>,
        ("dp4a", false, true, _) => four::<false, true>,
        ("dp4a", false, false, _) => four::<false, false>,
        (_, true, true, true) => two::<true, true, true>,
        (_, true, true, false) => two::<true, true, false>,
        (_, true, false, true) => two::<true, false, true>,
        (_, true, false, false) => two::<true, false, false>,
        (_, false, true, true) => two::<false, true, true>,
        (_, false, true, false) => two::<false, true, false>,
        (_, false, false, true) => two::<false, false, true>,
        (_, false, false, false) => two::<false, false, false>,
    }
}

/// The value of an element of a matrix fragment.
pub(crate) fn element(bits: u64, kind: Type) -> f64 {
    match kind {
        Type::Tf32 => decode(bits >> 13 & 0x7_ffff, TF32),
        _ => float_value(bits, kind),
    }
}
