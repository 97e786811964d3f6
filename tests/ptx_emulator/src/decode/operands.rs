//! Operands → slots of the register file.

use super::{Decoder, Frame, Opcode};
use crate::layout::PARAM_WINDOW;
use crate::program::{NONE, Slot, Special};
use crate::refusal::Refusal;
use crate::syntax::Operand;
use crate::types::{Space, Type};

impl Decoder<'_> {
    /// The slot of a source operand of type `kind`.
    pub(super) fn operand(
        &mut self,
        frame: &Frame,
        operand: &Operand,
        kind: Type,
        opcode: &Opcode,
    ) -> Result<Slot, Refusal> {
        let mask = u64::MAX >> (64 - kind.bits().clamp(8, 64));
        Ok(match operand {
            Operand::Register(index) => frame.slot_base + index,
            Operand::Integer(value) if kind == Type::Pred => self.constant(u64::from(*value != 0)),
            Operand::Integer(value) => self.constant(value & mask),
            Operand::Float32(bits) => self.constant(u64::from(*bits)),
            Operand::Float64(bits) if kind == Type::F32 => {
                self.constant(u64::from((f64::from_bits(*bits) as f32).to_bits()))
            }
            Operand::Float64(bits) => self.constant(*bits),
            Operand::Variable(index, offset) => {
                let variable = &frame.function.variables[*index as usize];
                let base = if variable.space == Space::Param { PARAM_WINDOW } else { 0 };
                self.constant(base + frame.addresses[*index as usize].wrapping_add(*offset as u64))
            }
            Operand::Symbol(name, offset) => {
                if let Some(slot) = self.special_register(name) {
                    return Ok(slot);
                }
                let address = self.shared.named.get(name).or_else(|| self.globals.get(name)).copied();
                match address {
                    Some(address) => self.constant(address.wrapping_add(*offset as u64)),
                    None => {
                        return opcode
                            .unknown(&format!(": `{name}` is neither a variable nor a register known here"));
                    }
                }
            }
            Operand::Vector(parts) if parts.len() == 1 => {
                return self.operand(frame, &parts[0], kind, opcode);
            }
            _ => return opcode.unknown(" with this operand"),
        })
    }

    /// A predicate source and whether it is negated.
    pub(super) fn predicate(
        &mut self,
        frame: &Frame,
        operand: &Operand,
        opcode: &Opcode,
    ) -> Result<(Slot, bool), Refusal> {
        match operand {
            Operand::Not(inner) => Ok((self.operand(frame, inner, Type::Pred, opcode)?, true)),
            other => Ok((self.operand(frame, other, Type::Pred, opcode)?, false)),
        }
    }

    /// The parts of a `{...}` or a single operand as sources.
    pub(super) fn operand_list(
        &mut self,
        frame: &Frame,
        operand: &Operand,
        kind: Type,
        opcode: &Opcode,
    ) -> Result<Box<[Slot]>, Refusal> {
        match operand {
            Operand::Vector(parts) => {
                parts.iter().map(|part| self.operand(frame, part, kind, opcode)).collect()
            }
            other => Ok([self.operand(frame, other, kind, opcode)?].into()),
        }
    }

    pub(super) fn special_register(&mut self, name: &str) -> Option<Slot> {
        let axis = |text: &str| match text {
            "x" => Some(0),
            "y" => Some(1),
            "z" => Some(2),
            _ => None,
        };
        let (base, part) = name.split_once('.').unwrap_or((name, ""));
        let special = match base {
            "%tid" => Special::Tid(axis(part)?),
            "%ntid" => Special::Ntid(axis(part)?),
            "%ctaid" | "%clusterid" => Special::Ctaid(axis(part)?),
            "%nctaid" | "%nclusterid" => Special::Nctaid(axis(part)?),
            "%cluster_ctaid" => Special::Zero,
            "%cluster_nctaid" => Special::One,
            "%laneid" => Special::Lane,
            "%warpid" => Special::Warp,
            "%nwarpid" => Special::WarpCount,
            "%smid" => Special::SmId,
            "%nsmid" => Special::SmCount,
            "%lanemask_eq" => Special::LaneMaskEq,
            "%lanemask_le" => Special::LaneMaskLe,
            "%lanemask_lt" => Special::LaneMaskLt,
            "%lanemask_ge" => Special::LaneMaskGe,
            "%lanemask_gt" => Special::LaneMaskGt,
            "%gridid" => Special::GridId,
            "%cluster_ctarank" => Special::Zero,
            "%cluster_nctarank" => Special::One,
            "%dynamic_smem_size" => Special::DynamicShared,
            "%total_smem_size" => Special::TotalShared,
            _ => return None,
        };
        Some(self.special(special, name))
    }
}

/// The register that a result goes to.
pub(super) fn destination(frame: &Frame, operand: &Operand, opcode: &Opcode) -> Result<Slot, Refusal> {
    match operand {
        Operand::Register(index) => Ok(frame.slot_base + index),
        Operand::Sink => Ok(NONE),
        Operand::Vector(parts) if parts.len() == 1 => destination(frame, &parts[0], opcode),
        _ => opcode.unknown(" with this destination"),
    }
}

/// `d` or `d|p`.
pub(super) fn destinations(
    frame: &Frame,
    operand: &Operand,
    opcode: &Opcode,
) -> Result<(Slot, Slot), Refusal> {
    match operand {
        Operand::Pair(a, b) => Ok((destination(frame, a, opcode)?, destination(frame, b, opcode)?)),
        other => Ok((destination(frame, other, opcode)?, NONE)),
    }
}

/// The parts of a `{...}` or a single register as destinations.
pub(super) fn destination_list(
    frame: &Frame,
    operand: &Operand,
    opcode: &Opcode,
) -> Result<Box<[Slot]>, Refusal> {
    match operand {
        Operand::Vector(parts) => parts.iter().map(|part| destination(frame, part, opcode)).collect(),
        other => Ok([destination(frame, other, opcode)?].into()),
    }
}
