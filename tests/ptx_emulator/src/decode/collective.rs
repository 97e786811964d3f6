//! Instructions that need several threads: barriers, fences, shuffles, votes.

use super::operands::{destination, destinations};
use super::{Decoder, Frame, Opcode};
use crate::program::{Barrier, Class, NONE, Op, Reduction, ShuffleMode};
use crate::refusal::Refusal;
use crate::syntax::{Instruction, Operand};
use crate::types::Type;

impl Decoder<'_> {
    pub(super) fn collective(
        &mut self,
        frame: &Frame,
        instruction: &Instruction,
        opcode: &Opcode,
    ) -> Result<Option<(Op, Class)>, Refusal> {
        let operands = instruction.operands.as_slice();
        Ok(Some(match opcode.name {
            "bar" if opcode.has("warp") => {
                let mask = self.operand(frame, &operands[0], Type::U32, opcode)?;
                (Op::WarpBarrier { mask }, Class::WarpBarrier)
            }
            "bar" | "barrier" if !opcode.has("cluster") => {
                (self.barrier(frame, operands, opcode)?, Class::Barrier)
            }
            "membar" | "fence" => {
                if opcode.has("proxy") || opcode.has("mbarrier_init") {
                    return opcode.unknown("");
                }
                (Op::Fence, Class::Fence)
            }
            "shfl" => (self.shuffle(frame, operands, opcode)?, Class::Shuffle),
            "activemask" => (Op::ActiveMask { dst: destination(frame, &operands[0], opcode)? }, Class::Vote),
            "vote" | "match" | "redux" | "elect" => (self.vote(frame, operands, opcode)?, Class::Vote),
            _ => return Ok(None),
        }))
    }

    fn barrier(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Op, Refusal> {
        // `bar` means `barrier...aligned`.
        let aligned = opcode.name == "bar" || opcode.has("aligned");
        let mut reduction = None;
        let mut rest = operands;
        if opcode.has("red") {
            let operation =
                match opcode.suffixes.iter().find(|suffix| matches!(**suffix, "popc" | "and" | "or")) {
                    Some(&"popc") => Reduction::Add,
                    Some(&"and") => Reduction::And,
                    Some(&"or") => Reduction::Or,
                    _ => return opcode.unknown(""),
                };
            let dst = destination(frame, &operands[0], opcode)?;
            let Some(last) = operands.last() else { return opcode.unknown("") };
            let (predicate, negated) = self.predicate(frame, last, opcode)?;
            reduction = Some((operation, predicate, negated, dst));
            rest = &operands[1..operands.len() - 1];
        }
        let Some(id) = rest.first() else { return opcode.unknown(" without a barrier") };
        let id = self.operand(frame, id, Type::U32, opcode)?;
        let count = match rest.get(1) {
            Some(count) => self.operand(frame, count, Type::U32, opcode)?,
            None => NONE,
        };
        let arrive = opcode.has("arrive");
        Ok(Op::Barrier(Barrier { id, count, aligned, arrive, bypass: NONE, reduction }))
    }

    fn shuffle(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Op, Refusal> {
        if !opcode.has("sync") || operands.len() != 5 {
            return opcode.unknown(" without `.sync`");
        }
        let mode = match opcode.suffixes.get(1) {
            Some(&"up") => ShuffleMode::Up,
            Some(&"down") => ShuffleMode::Down,
            Some(&"bfly") => ShuffleMode::Butterfly,
            Some(&"idx") => ShuffleMode::Index,
            _ => return opcode.unknown(""),
        };
        let (dst, predicate) = destinations(frame, &operands[0], opcode)?;
        Ok(Op::Shuffle {
            mode,
            dst,
            predicate,
            src: self.operand(frame, &operands[1], Type::B32, opcode)?,
            lane: self.operand(frame, &operands[2], Type::U32, opcode)?,
            clamp: self.operand(frame, &operands[3], Type::U32, opcode)?,
            mask: self.operand(frame, &operands[4], Type::U32, opcode)?,
        })
    }

    fn vote(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Op, Refusal> {
        let kind = opcode.kind().unwrap_or(Type::B32);
        if !opcode.has("sync") {
            return opcode.unknown(" without `.sync`");
        }
        let word = opcode.suffixes.iter().find_map(|suffix| {
            Some(match (opcode.name, *suffix) {
                ("vote", "all") => Reduction::All,
                ("vote", "any") => Reduction::Any,
                ("vote", "uni") => Reduction::Uniform,
                ("vote", "ballot") => Reduction::Ballot,
                ("match", "any") => Reduction::MatchAny,
                ("match", "all") => Reduction::MatchAll,
                ("redux", "add") => Reduction::Add,
                ("redux", "min") => Reduction::Min,
                ("redux", "max") => Reduction::Max,
                ("redux", "and") => Reduction::And,
                ("redux", "or") => Reduction::Or,
                ("redux", "xor") => Reduction::Xor,
                ("elect", "sync") => Reduction::Elect,
                _ => return None,
            })
        });
        let Some(reduction) = word else { return opcode.unknown("") };
        if opcode.name == "redux" && kind.is_float() {
            return opcode.unknown("");
        }
        let (dst, predicate) = destinations(frame, &operands[0], opcode)?;
        if reduction == Reduction::Elect {
            let mask = self.operand(frame, &operands[1], Type::U32, opcode)?;
            return Ok(Op::Collective { reduction, kind, dst, predicate, src: mask, negate: false, mask });
        }
        let (src, negate) = if opcode.name == "vote" {
            self.predicate(frame, &operands[1], opcode)?
        } else {
            (self.operand(frame, &operands[1], kind, opcode)?, false)
        };
        let mask = self.operand(frame, &operands[2], Type::U32, opcode)?;
        Ok(Op::Collective { reduction, kind, dst, predicate, src, negate, mask })
    }
}
