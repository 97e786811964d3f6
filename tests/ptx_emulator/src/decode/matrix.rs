//! Instructions of the tensor cores: ldmatrix, stmatrix, movmatrix, mma, wmma.

use super::operands::{destination, destination_list};
use super::{Decoder, Frame, Opcode};
use crate::matrix::{Shape, places};
use crate::program::{Class, Multiply, NONE, Op, Slot, WmmaAccess};
use crate::refusal::Refusal;
use crate::syntax::{Instruction, Operand};
use crate::types::{Space, Type};

/// `m16n8k16` → (16, 8, 16).
fn shape(opcode: &Opcode) -> Option<(usize, usize, usize)> {
    opcode.suffixes.iter().find_map(|suffix| {
        let (m, rest) = suffix.strip_prefix('m')?.split_once('n')?;
        let (n, k) = rest.split_once('k')?;
        Some((m.parse().ok()?, n.parse().ok()?, k.parse().ok()?))
    })
}

fn kinds(opcode: &Opcode) -> Vec<Type> {
    opcode.suffixes.iter().filter_map(|suffix| Type::parse(suffix)).collect()
}

impl Decoder<'_> {
    pub(super) fn matrix(
        &mut self,
        frame: &Frame,
        instruction: &Instruction,
        opcode: &Opcode,
    ) -> Result<Option<(Op, Class)>, Refusal> {
        let operands = instruction.operands.as_slice();
        let shared =
            if opcode.has("shared") || opcode.has("shared::cta") { Space::Shared } else { Space::Generic };
        Ok(Some(match opcode.name {
            "ldmatrix" | "stmatrix" if opcode.has("m8n8") && opcode.has("b16") => {
                let load = opcode.name == "ldmatrix";
                let place = usize::from(load);
                let (space, address, offset) = self.address(frame, &operands[place], shared, opcode)?;
                let transpose = opcode.has("trans");
                let op = if load {
                    let dst = destination_list(frame, &operands[0], opcode)?;
                    Op::LoadMatrix { address, offset, space, transpose, dst }
                } else {
                    let src = self.operand_list(frame, &operands[1], Type::B32, opcode)?;
                    Op::StoreMatrix { address, offset, space, transpose, src }
                };
                (op, Class::LoadMatrix)
            }
            "movmatrix" if opcode.has("m8n8") && opcode.has("b16") => {
                let dst = destination(frame, &operands[0], opcode)?;
                let src = self.operand(frame, &operands[1], Type::B32, opcode)?;
                (Op::MoveMatrix { dst, src }, Class::LoadMatrix)
            }
            "mma" => (self.mma(frame, operands, opcode)?, Class::Matrix),
            "wmma" if opcode.has("mma") => (self.wmma(frame, operands, opcode)?, Class::Matrix),
            "wmma" => (self.wmma_access(frame, operands, opcode)?, Class::LoadMatrix),
            _ => return Ok(None),
        }))
    }

    fn mma(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Op, Refusal> {
        let supported =
            !opcode.has("sp") && !opcode.has("block_scale") && opcode.has("row") && opcode.has("col");
        let (Some((m, n, k)), [d_kind, a_kind, b_kind, c_kind], true) =
            (shape(opcode), &kinds(opcode)[..], supported)
        else {
            return opcode.unknown("");
        };
        let known = matches!(
            (m, n, k, a_kind),
            (16, 8, 8 | 16, Type::F16 | Type::Bf16)
                | (16, 8, 4 | 8, Type::Tf32)
                | (16, 8, 16 | 32, Type::S8 | Type::U8)
                | (8, 8, 16, Type::S8 | Type::U8)
        );
        // m16n8k8 is the smaller shape of halves and the larger of tf32.
        if !known || (opcode.has("xor") || opcode.has("and")) {
            return opcode.unknown("");
        }
        self.multiply(frame, operands, opcode, (m, n, k), [*a_kind, *b_kind, *c_kind, *d_kind], false)
    }

    fn wmma(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Op, Refusal> {
        let Some((m, n, k)) = shape(opcode) else { return opcode.unknown("") };
        if k != 16 || opcode.has("xor") || opcode.has("and") {
            return opcode.unknown("");
        }
        let kinds = kinds(opcode);
        // Half-precision products name only the accumulators' types.
        let [a, b, c, d] = match kinds[..] {
            [d, c] => [Type::F16, Type::F16, c, d],
            [d, a, b, c] => [a, b, c, d],
            _ => return opcode.unknown(""),
        };
        if !matches!(a, Type::F16 | Type::Bf16 | Type::S8 | Type::U8) {
            return opcode.unknown("");
        }
        self.multiply(frame, operands, opcode, (m, n, k), [a, b, c, d], true)
    }

    fn multiply(
        &mut self,
        frame: &Frame,
        operands: &[Operand],
        opcode: &Opcode,
        (m, n, k): (usize, usize, usize),
        [a_kind, b_kind, c_kind, d_kind]: [Type; 4],
        wmma: bool,
    ) -> Result<Op, Refusal> {
        let d = destination_list(frame, &operands[0], opcode)?;
        let a = self.operand_list(frame, &operands[1], Type::B32, opcode)?;
        let b = self.operand_list(frame, &operands[2], Type::B32, opcode)?;
        let c = self.operand_list(frame, &operands[3], c_kind, opcode)?;
        let satfinite = opcode.has("satfinite");
        let fragment = |role, kind, columns, total, slots: &[Slot]| {
            places(&Shape { role, kind, columns, total, wmma }, slots.len())
        };
        let a_places = fragment('a', a_kind, k, m * k, &a);
        let b_places = fragment('b', b_kind, n, k * n, &b);
        let c_places = fragment('c', c_kind, n, m * n, &c);
        let d_places = fragment('d', d_kind, n, m * n, &d);
        let whole = |places: &[u16], total: usize| places.iter().all(|&place| usize::from(place) < total);
        if !whole(&a_places, m * k)
            || !whole(&b_places, k * n)
            || !whole(&c_places, m * n)
            || !whole(&d_places, m * n)
        {
            return opcode.unknown(" with this number of registers");
        }
        Ok(Op::Multiply(Multiply {
            m,
            n,
            k,
            a_kind,
            b_kind,
            c_kind,
            d_kind,
            a_places,
            b_places,
            c_places,
            d_places,
            satfinite,
            a,
            b,
            c,
            d,
        }))
    }

    fn wmma_access(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Op, Refusal> {
        let (Some((m, n, k)), Some(kind)) = (shape(opcode), opcode.kind()) else { return opcode.unknown("") };
        let load = opcode.has("load");
        let role = opcode.suffixes.iter().find_map(|suffix| match *suffix {
            "a" => Some('a'),
            "b" => Some('b'),
            "c" => Some('c'),
            "d" => Some('d'),
            _ => None,
        });
        let Some(role) = role.filter(|_| k == 16) else { return opcode.unknown("") };
        let space = if opcode.has("shared") {
            Space::Shared
        } else if opcode.has("global") {
            Space::Global
        } else {
            Space::Generic
        };
        let (space, address, offset) = self.address(frame, &operands[usize::from(load)], space, opcode)?;
        let registers = if load {
            destination_list(frame, &operands[0], opcode)?
        } else {
            self.operand_list(frame, &operands[1], kind, opcode)?
        };
        let stride = match operands.get(2) {
            Some(stride) => self.operand(frame, stride, Type::U32, opcode)?,
            None => NONE,
        };
        self.granule = self.granule.min(kind.bytes());
        let row_major = opcode.has("row");
        let access = WmmaAccess { role, m, n, k, row_major, kind, space, address, offset, stride, registers };
        Ok(if load { Op::WmmaLoad(access) } else { Op::WmmaStore(access) })
    }
}
