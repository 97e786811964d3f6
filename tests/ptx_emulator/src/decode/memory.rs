//! Instructions that touch memory: ld, st, atom, red, cvta, cp.async.

use super::operands::{destination, destination_list};
use super::{Decoder, Frame, Opcode};
use crate::lanes::lanewise;
use crate::layout::{LOCAL_WINDOW, SHARED_WINDOW};
use crate::program::{Access, AsyncCopy, Atomic, AtomicOp, Class, NONE, Op, Slot, Strength};
use crate::refusal::Refusal;
use crate::syntax::{Instruction, Operand};
use crate::types::{Space, Type};

/// Suffixes of loads and stores that change nothing here: caching and prefetching.
fn is_hint(suffix: &str) -> bool {
    matches!(suffix, "ca" | "cg" | "cs" | "cv" | "lu" | "wb" | "wt" | "nc" | "noftz" | "weak" | "uniform")
        || suffix.starts_with("L1::")
        || suffix.starts_with("L2::")
        || matches!(suffix, "cta" | "gpu" | "sys" | "cluster" | "v2" | "v4" | "v8")
        || matches!(suffix, "shared::cta" | "param::entry" | "param::func" | "level::eviction_priority")
}

fn space(opcode: &Opcode) -> Space {
    for suffix in &opcode.suffixes {
        match *suffix {
            "global" => return Space::Global,
            "shared" | "shared::cta" => return Space::Shared,
            "local" => return Space::Local,
            "param" | "param::entry" | "param::func" => return Space::Param,
            "const" => return Space::Const,
            _ => {}
        }
    }
    Space::Generic
}

fn strength(opcode: &Opcode) -> Strength {
    for suffix in &opcode.suffixes {
        match *suffix {
            "relaxed" | "volatile" | "mmio" => return Strength::Relaxed,
            "acquire" => return Strength::Acquire,
            "release" => return Strength::Release,
            "acq_rel" => return Strength::AcquireRelease,
            _ => {}
        }
    }
    Strength::Weak
}

impl Decoder<'_> {
    pub(super) fn memory(
        &mut self,
        frame: &Frame,
        instruction: &Instruction,
        opcode: &Opcode,
    ) -> Result<Option<(Op, Class)>, Refusal> {
        let operands = instruction.operands.as_slice();
        Ok(Some(match opcode.name {
            "ld" | "ldu" => {
                let access = self.access(frame, &operands[1], &operands[0], false, opcode)?;
                let class = match access.space {
                    Space::Shared => Class::LoadShared,
                    Space::Const | Space::Param => Class::LoadConst,
                    Space::Local => Class::LoadLocal,
                    _ => Class::LoadGlobal,
                };
                (Op::Load(access), class)
            }
            "st" => {
                let access = self.access(frame, &operands[0], &operands[1], true, opcode)?;
                let class = match access.space {
                    Space::Shared => Class::StoreShared,
                    Space::Local | Space::Param => Class::StoreLocal,
                    _ => Class::StoreGlobal,
                };
                (Op::Store(access), class)
            }
            "atom" | "red" if !opcode.has("async") => (self.atomic(frame, operands, opcode)?, Class::Atomic),
            "cvta" => (self.convert_address(frame, operands, opcode)?, Class::Integer),
            "isspacep" => {
                let dst = destination(frame, &operands[0], opcode)?;
                let src = self.operand(frame, &operands[1], Type::U64, opcode)?;
                (Op::IsSpace { dst, src, space: space(opcode) }, Class::Compare)
            }
            "cp" if opcode.has("async") && !opcode.has("bulk") && !opcode.has("mbarrier") => {
                (self.async_copy(frame, operands, opcode)?, Class::AsyncCopy)
            }
            _ => return Ok(None),
        }))
    }

    /// Address operand → space, address slot, offset.
    pub(super) fn address(
        &mut self,
        frame: &Frame,
        operand: &Operand,
        space: Space,
        opcode: &Opcode,
    ) -> Result<(Space, Slot, i64), Refusal> {
        let Operand::Address(base, offset) = operand else { return opcode.unknown(" without an address") };
        let space = match (&**base, space) {
            // Parameters of device functions live in the thread's local memory.
            (Operand::Variable(index, _), Space::Param) => frame.function.variables[*index as usize].space,
            _ => space,
        };
        let mut slot = self.operand(frame, base, Type::U64, opcode)?;
        if let (Operand::Variable(index, shift), Space::Param) = (&**base, space) {
            slot = self.constant(frame.addresses[*index as usize].wrapping_add(*shift as u64));
        }
        Ok((space, slot, *offset))
    }

    fn access(
        &mut self,
        frame: &Frame,
        address: &Operand,
        registers: &Operand,
        store: bool,
        opcode: &Opcode,
    ) -> Result<Access, Refusal> {
        let known = |suffix: &&str| {
            is_hint(suffix)
                || Type::parse(suffix).is_some()
                || matches!(*suffix, "global" | "shared" | "local" | "param" | "const")
                || matches!(*suffix, "relaxed" | "volatile" | "mmio" | "acquire" | "release")
        };
        if let Some(suffix) = opcode.suffixes.iter().find(|suffix| !known(suffix)) {
            return opcode.unknown(&format!(" because of its suffix `.{suffix}`"));
        }
        let Some(element) = opcode.kind().filter(|kind| kind.bytes() <= 8) else { return opcode.unknown("") };
        let (space, address, offset) = self.address(frame, address, space(opcode), opcode)?;
        let registers = if store {
            self.operand_list(frame, registers, element, opcode)?
        } else {
            destination_list(frame, registers, opcode)?
        };
        let register_bits = registers
            .iter()
            .filter(|&&slot| slot != NONE)
            .map(|&slot| self.slot_kinds[slot as usize].bits())
            .max();
        if matches!(space, Space::Shared | Space::Generic) {
            self.granule = self.granule.min(element.bytes());
        }
        let register_bits = register_bits.unwrap_or(64);
        Ok(Access { space, address, offset, element, registers, register_bits, strength: strength(opcode) })
    }

    /// A store of a 32-bit constant into the thread's local memory.
    pub(super) fn store_local(&mut self, address: u64, value: u64) -> Op {
        let (address, value) = (self.constant(address), self.constant(value));
        Op::Store(Access {
            space: Space::Local,
            address,
            offset: 0,
            element: Type::B32,
            registers: [value].into(),
            register_bits: 32,
            strength: Strength::Weak,
        })
    }

    fn atomic(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Op, Refusal> {
        let op = opcode.suffixes.iter().find_map(|suffix| {
            Some(match *suffix {
                "and" => AtomicOp::And,
                "or" => AtomicOp::Or,
                "xor" => AtomicOp::Xor,
                "exch" => AtomicOp::Exchange,
                "cas" => AtomicOp::CompareAndSwap,
                "add" => AtomicOp::Add,
                "inc" => AtomicOp::Increment,
                "dec" => AtomicOp::Decrement,
                "min" => AtomicOp::Min,
                "max" => AtomicOp::Max,
                _ => return None,
            })
        });
        let (Some(op), Some(kind)) = (op, opcode.kind()) else { return opcode.unknown("") };
        if kind.bytes() > 8 {
            return opcode.unknown("");
        }
        let returns = opcode.name == "atom";
        let rest = &operands[usize::from(returns)..];
        let (space, address, offset) = self.address(frame, &rest[0], space(opcode), opcode)?;
        let results = if returns { destination_list(frame, &operands[0], opcode)? } else { [].into() };
        let values = self.operand_list(frame, &rest[1], kind, opcode)?;
        let swap =
            if op == AtomicOp::CompareAndSwap { self.operand(frame, &rest[2], kind, opcode)? } else { NONE };
        // Without a qualifier an atomic is relaxed.
        let strength = match strength(opcode) {
            Strength::Weak => Strength::Relaxed,
            other => other,
        };
        if matches!(space, Space::Shared | Space::Generic) {
            self.granule = self.granule.min(kind.bytes());
        }
        Ok(Op::Atomic(Atomic { op, kind, space, address, offset, results, values, swap, strength }))
    }

    fn convert_address(
        &mut self,
        frame: &Frame,
        operands: &[Operand],
        opcode: &Opcode,
    ) -> Result<Op, Refusal> {
        let to_space = opcode.has("to");
        let window = match space(opcode) {
            Space::Shared => SHARED_WINDOW,
            Space::Local => LOCAL_WINDOW,
            // `mov` of a parameter's name already gives the generic address.
            Space::Param | Space::Global | Space::Const => 0,
            Space::Generic => return opcode.unknown(""),
        };
        let dst = destination(frame, &operands[0], opcode)?;
        let a = self.operand(frame, &operands[1], Type::U64, opcode)?;
        let b = self.constant(if to_space { window.wrapping_neg() } else { window });
        let kernel = if opcode.kind().is_some_and(|kind| kind.bytes() == 4) {
            lanewise!(u64, u32; a, b => a.wrapping_add(b))
        } else {
            lanewise!(u64, u64; a, b => a.wrapping_add(b))
        };
        Ok(Op::Lanewise { kernel, dst, dst2: NONE, src: [a, b, a, b] })
    }

    fn async_copy(&mut self, frame: &Frame, operands: &[Operand], opcode: &Opcode) -> Result<Op, Refusal> {
        if opcode.has("commit_group") {
            return Ok(Op::AsyncCommit);
        }
        if opcode.has("wait_all") {
            return Ok(Op::AsyncWait(None));
        }
        if opcode.has("wait_group") {
            return match operands.first() {
                Some(Operand::Integer(count)) => Ok(Op::AsyncWait(Some(*count as u32))),
                _ => opcode.unknown(" without a constant"),
            };
        }
        if !(opcode.has("ca") || opcode.has("cg")) {
            return opcode.unknown("");
        }
        let (_, destination, destination_offset) =
            self.address(frame, &operands[0], Space::Shared, opcode)?;
        let (_, source, source_offset) = self.address(frame, &operands[1], Space::Global, opcode)?;
        let Some(Operand::Integer(bytes)) = operands.get(2) else { return opcode.unknown(" without a size") };
        let sizes: &[u64] = if opcode.has("cg") { &[16] } else { &[4, 8, 16] };
        if !sizes.contains(bytes) {
            return Err(Refusal::syntax(opcode.line, format!("`{}` cannot copy {bytes} bytes", opcode.text)));
        }
        let mut copy = AsyncCopy {
            destination,
            destination_offset,
            source,
            source_offset,
            bytes: *bytes as usize,
            source_bytes: NONE,
            ignore: NONE,
            ignore_negated: false,
        };
        // A fourth operand is the source size, or the `ignore-src` predicate, or the cache policy.
        let hinted = opcode.suffixes.iter().any(|suffix| suffix.ends_with("cache_hint"));
        let extra = &operands[3..operands.len() - usize::from(hinted && operands.len() > 3)];
        if let Some(operand) = extra.first() {
            let (slot, negated) = self.predicate(frame, operand, opcode)?;
            let is_predicate =
                matches!(operand, Operand::Not(_)) || self.slot_kinds[slot as usize] == Type::Pred;
            if is_predicate {
                (copy.ignore, copy.ignore_negated) = (slot, negated);
            } else {
                copy.source_bytes = self.operand(frame, operand, Type::U32, opcode)?;
            }
        }
        Ok(Op::AsyncCopy(copy))
    }
}
