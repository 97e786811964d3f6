//! Instructions over registers alone.

use super::operands::{destination, destination_list, destinations};
use super::{Decoder, Frame, Opcode};
use crate::compare::{Combine, comparison};
use crate::convert::{Convert, dot_product, fast};
use crate::lanes::{Kernel, lanewise};
use crate::program::{Class, NONE, Op};
use crate::refusal::Refusal;
use crate::rounding::Rounding;
use crate::syntax::{Instruction, Operand};
use crate::types::Type;
use crate::{carry, float, half, integer};

type Decoded = (Op, Class);

/// How many sources the instructions of this file take.
fn arity(name: &str) -> std::ops::RangeInclusive<usize> {
    match name {
        "abs" | "neg" | "not" | "cnot" | "clz" | "popc" | "brev" | "bfind" | "testp" => 1..=1,
        "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => 1..=1,
        "mad" | "mad24" | "madc" | "sad" | "fma" | "shf" | "bfe" | "prmt" | "dp4a" | "dp2a" | "slct" => 3..=3,
        "lop3" | "bfi" => 4..=4,
        "min" | "max" => 2..=3,
        _ => 2..=2,
    }
}

impl Decoder<'_> {
    pub(super) fn arithmetic(
        &mut self,
        frame: &Frame,
        instruction: &Instruction,
        opcode: &Opcode,
    ) -> Result<Decoded, Refusal> {
        let operands = instruction.operands.as_slice();
        match opcode.name {
            "mov" => return self.mov(frame, operands, opcode),
            "cvt" => return self.cvt(frame, operands, opcode),
            "setp" | "set" => return self.compare(frame, operands, opcode),
            "selp" => {
                let kind = opcode.kind().unwrap_or(Type::B32);
                let (predicate, negated) = self.predicate(frame, &operands[3], opcode)?;
                let mut a = self.operand(frame, &operands[1], kind, opcode)?;
                let mut b = self.operand(frame, &operands[2], kind, opcode)?;
                if negated {
                    std::mem::swap(&mut a, &mut b);
                }
                let dst = destination(frame, &operands[0], opcode)?;
                return Ok((Op::Select { dst, a, b, predicate }, Class::Move));
            }
            "dp4a" | "dp2a" => {
                let kinds: Vec<Type> =
                    opcode.suffixes.iter().filter_map(|suffix| Type::parse(suffix)).collect();
                let [a, b] = kinds[..] else { return opcode.unknown("") };
                let kernel = dot_product(opcode.name, opcode.has("hi"), a, b);
                return self.lanewise(frame, operands, opcode, kernel, Type::U32, Class::Integer);
            }
            "testp" => return self.test_property(frame, operands, opcode),
            _ => {}
        }
        let Some(kind) = opcode.kind() else { return opcode.unknown("") };
        let suffixes: Vec<&str> =
            opcode.suffixes.iter().copied().filter(|suffix| Type::parse(suffix).is_none()).collect();
        let carry_out = opcode.has("cc");
        if carry_out || matches!(opcode.name, "addc" | "subc" | "madc") {
            let Some(kernel) = carry::kernel(opcode.name, &suffixes, kind) else { return opcode.unknown("") };
            let (mut op, class) = self.lanewise(frame, operands, opcode, kernel, kind, Class::Integer)?;
            if let Op::Lanewise { dst2, src, .. } = &mut op {
                src[3] = if opcode.name.ends_with('c') { self.carry } else { src[0] };
                *dst2 = if carry_out { self.carry } else { NONE };
            }
            return Ok((op, class));
        }
        let special =
            matches!(opcode.name, "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh");
        // sm_100 has minima and maxima of three.
        let name = match (opcode.name, operands.len()) {
            ("min", 4) => "min3",
            ("max", 4) => "max3",
            (name, _) => name,
        };
        let (kernel, class) = if kind.is_float() {
            let found = half::kernel(name, &suffixes, kind).or_else(|| float::kernel(name, &suffixes, kind));
            let class = match kind {
                _ if special => Class::SpecialFunction,
                Type::F32 => Class::Float32,
                Type::F64 => Class::Float64,
                _ => Class::Half,
            };
            // slct is typed by the number it looks at, but moves bits.
            let found = if name == "slct" { integer::kernel(name, &suffixes, kind) } else { found };
            (found, class)
        } else {
            let logic = ["and", "or", "xor", "not", "shl", "shr", "shf", "lop3", "prmt", "bfe", "bfi"];
            let class = if logic.contains(&opcode.name) { Class::Logic } else { Class::Integer };
            (integer::kernel(name, &suffixes, kind), class)
        };
        let Some(kernel) = kernel else { return opcode.unknown("") };
        self.lanewise(frame, operands, opcode, kernel, kind, class)
    }

    fn lanewise(
        &mut self,
        frame: &Frame,
        operands: &[Operand],
        opcode: &Opcode,
        kernel: Kernel,
        kind: Type,
        class: Class,
    ) -> Result<Decoded, Refusal> {
        let (dst, dst2) = destinations(frame, &operands[0], opcode)?;
        if dst2 != NONE {
            return opcode.unknown(" with two results");
        }
        let mut src = [0; 4];
        let sources = &operands[1..];
        // Another number of operands is another instruction, which the kernel would quietly cut short.
        if !arity(opcode.name).contains(&sources.len()) {
            return opcode.unknown(" with this number of operands");
        }
        for (i, operand) in sources.iter().enumerate() {
            // Shift counts and field positions are 32-bit whatever the type of the value.
            let counts = matches!(opcode.name, "shl" | "shr") && i == 1
                || opcode.name == "bfe" && i > 0
                || opcode.name == "bfi" && i > 1;
            src[i] = self.operand(frame, operand, if counts { Type::U32 } else { kind }, opcode)?;
        }
        // Kernels of fewer operands ignore the rest; repeating one keeps the check for uninitialised
        // registers to those that are read.
        for i in sources.len()..4 {
            src[i] = src[0];
        }
        Ok((Op::Lanewise { kernel, dst, dst2, src }, class))
    }

    fn mov(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Decoded, Refusal> {
        let kind = opcode.kind().unwrap_or(Type::B32);
        if kind == Type::B128 {
            return opcode.unknown("");
        }
        match (&operands[0], &operands[1]) {
            (Operand::Vector(parts), source) if parts.len() > 1 => {
                let parts = destination_list(frame, &operands[0], opcode)?;
                let src = self.operand(frame, source, kind, opcode)?;
                let bits = kind.bits() / parts.len() as u32;
                Ok((Op::Unpack { parts, src, bits }, Class::Move))
            }
            (_, Operand::Vector(parts)) if parts.len() > 1 => {
                let bits = kind.bits() / parts.len() as u32;
                let part = if bits == 8 {
                    Type::B8
                } else if bits == 16 {
                    Type::B16
                } else {
                    Type::B32
                };
                let parts = self.operand_list(frame, &operands[1], part, opcode)?;
                let dst = destination(frame, &operands[0], opcode)?;
                Ok((Op::Pack { dst, parts, bits }, Class::Move))
            }
            (target, Operand::Symbol(name, _))
                if name.starts_with("%clock") || name.starts_with("%globaltimer") =>
            {
                let dst = destination(frame, target, opcode)?;
                Ok((Op::Clock { dst, bits: kind.bits() }, Class::Move))
            }
            (target, source) => {
                let dst = destination(frame, target, opcode)?;
                let src = self.operand(frame, source, kind, opcode)?;
                let kernel = lanewise!(u64, u64; a => a);
                Ok((Op::Lanewise { kernel, dst, dst2: NONE, src: [src; 4] }, Class::Move))
            }
        }
    }

    fn cvt(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Decoded, Refusal> {
        let kinds: Vec<Type> = opcode.suffixes.iter().filter_map(|suffix| Type::parse(suffix)).collect();
        let ([to, from], false) = (&kinds[..], opcode.has("pack")) else { return opcode.unknown("") };
        let (mut to, mut from) = (*to, *from);
        let known = |suffix: &&str| {
            Type::parse(suffix).is_some()
                || Rounding::parse(suffix).is_some()
                || matches!(*suffix, "ftz" | "sat" | "relu" | "satfinite")
        };
        if !opcode.suffixes.iter().all(known) || matches!(from, Type::Tf32 | Type::F16x2 | Type::Bf16x2) {
            return opcode.unknown("");
        }
        // Bit types convert as unsigned ones.
        let unsigned = |kind: Type| match kind {
            Type::B8 => Type::U8,
            Type::B16 => Type::U16,
            Type::B32 => Type::U32,
            Type::B64 => Type::U64,
            other => other,
        };
        (to, from) = (unsigned(to), unsigned(from));
        let integral =
            to.is_float() && opcode.suffixes.iter().any(|s| matches!(*s, "rni" | "rzi" | "rmi" | "rpi"));
        let mut convert = Convert {
            to,
            from,
            rounding: opcode.suffixes.iter().find_map(|suffix| Rounding::parse(suffix)),
            integral,
            ftz: opcode.has("ftz"),
            sat: opcode.has("sat"),
            relu: opcode.has("relu"),
            satfinite: opcode.has("satfinite"),
        };
        let dst = destination(frame, &operands[0], opcode)?;
        let a = self.operand(frame, &operands[1], from, opcode)?;
        let b = if matches!(to, Type::F16x2 | Type::Bf16x2) {
            let Some(low) = operands.get(2) else { return opcode.unknown(" with one source") };
            self.operand(frame, low, from, opcode)?
        } else {
            NONE
        };
        let wide = if dst == NONE { to.bits() } else { self.slot_kinds[dst as usize].bits() };
        if let Some(kernel) = fast(&convert).filter(|_| !to.is_signed() || wide <= to.bits()) {
            let src = [a, if b == NONE { a } else { b }, a, a];
            return Ok((Op::Lanewise { kernel, dst, dst2: NONE, src }, Class::Convert));
        }
        // A narrow signed result is kept sign-extended to the width of its register.
        if to.is_signed() {
            if wide > to.bits() && from.is_float() && to.bits() < 32 {
                return opcode.unknown(" into a wider register");
            }
            if wide > to.bits() && !convert.sat {
                convert.from = if from.bits() > to.bits() { to } else { from };
                convert.to = if wide == 64 {
                    Type::S64
                } else if wide == 32 {
                    Type::S32
                } else {
                    Type::S16
                };
            }
        }
        Ok((Op::Convert { convert, dst, a, b }, Class::Convert))
    }

    fn compare(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Decoded, Refusal> {
        let Some(kind) = opcode.kind() else { return opcode.unknown("") };
        let ftz = opcode.has("ftz");
        let found = opcode.suffixes.iter().find_map(|name| comparison(name, ftz, kind));
        let Some((kernel, accepted)) = found else { return opcode.unknown("") };
        let (dst, dst2) = destinations(frame, &operands[0], opcode)?;
        let a = self.operand(frame, &operands[1], kind, opcode)?;
        let b = self.operand(frame, &operands[2], kind, opcode)?;
        let combine = match opcode.suffixes.iter().find_map(|suffix| Combine::parse(suffix)) {
            Some(combine) => {
                let Some(operand) = operands.get(3) else { return opcode.unknown(" without a predicate") };
                let (slot, negated) = self.predicate(frame, operand, opcode)?;
                Some((combine, slot, negated))
            }
            None => None,
        };
        let packed = matches!(kind, Type::F16x2 | Type::Bf16x2);
        let set = if opcode.name == "set" {
            let target = opcode.suffixes.iter().find_map(|suffix| Type::parse(suffix));
            match target {
                Some(Type::F32) => Some(u64::from(1f32.to_bits())),
                Some(Type::U32 | Type::S32) => Some(0xffff_ffff),
                _ => return opcode.unknown(""),
            }
        } else {
            None
        };
        if set.is_some() && packed {
            return opcode.unknown("");
        }
        Ok((Op::Compare { kernel, accepted, combine, dst, dst2, a, b, set, packed }, Class::Compare))
    }

    fn test_property(
        &mut self,
        frame: &Frame,
        operands: &[Operand],
        opcode: &Opcode,
    ) -> Result<Decoded, Refusal> {
        let double = opcode.kind() == Some(Type::F64);
        let property = opcode.suffixes.first().copied().unwrap_or_default();
        let kernel = match (property, double) {
            ("finite", false) => lanewise!(u32, u64; a => f32::from_bits(a).is_finite()),
            ("infinite", false) => lanewise!(u32, u64; a => f32::from_bits(a).is_infinite()),
            ("number", false) => lanewise!(u32, u64; a => !f32::from_bits(a).is_nan()),
            ("notanumber", false) => lanewise!(u32, u64; a => f32::from_bits(a).is_nan()),
            ("normal", false) => lanewise!(u32, u64; a => f32::from_bits(a).is_normal()),
            ("subnormal", false) => lanewise!(u32, u64; a => f32::from_bits(a).is_subnormal()),
            ("finite", true) => lanewise!(u64, u64; a => f64::from_bits(a).is_finite()),
            ("infinite", true) => lanewise!(u64, u64; a => f64::from_bits(a).is_infinite()),
            ("number", true) => lanewise!(u64, u64; a => !f64::from_bits(a).is_nan()),
            ("notanumber", true) => lanewise!(u64, u64; a => f64::from_bits(a).is_nan()),
            ("normal", true) => lanewise!(u64, u64; a => f64::from_bits(a).is_normal()),
            ("subnormal", true) => lanewise!(u64, u64; a => f64::from_bits(a).is_subnormal()),
            _ => return opcode.unknown(""),
        };
        let kind = if double { Type::F64 } else { Type::F32 };
        self.lanewise(frame, operands, opcode, kernel, kind, Class::Compare)
    }
}
