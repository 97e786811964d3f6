//! atom and red.

use crate::block::{Block, Launch, lanes, optional};
use crate::counters::Count;
use crate::fault::Fault;
use crate::float::{input, output};
use crate::global::Buffer;
use crate::layout::SHARED_WINDOW;
use crate::program::{Atomic, AtomicOp, Strength};
use crate::refusal::Complaint;
use crate::rounding::{BF16, F16, Rounding, decode, encode};
use crate::shared::Who;
use crate::step::resolve;
use crate::types::{Space, Type};

/// `flush`: sums of f32 in global memory lose subnormal operands and results; in shared memory they do not.
fn add(kind: Type, a: u64, b: u64, flush: bool) -> u64 {
    let halves = |format| {
        let half = move |shift: u32| {
            let sum = decode(a >> shift & 0xffff, format) + decode(b >> shift & 0xffff, format);
            encode(sum, format, Rounding::NearestEven) << shift
        };
        move |packed: bool| half(0) | if packed { half(16) } else { 0 }
    };
    match kind {
        Type::F32 if flush => output::<true, false>(input::<true>(a) + input::<true>(b)),
        Type::F32 => u64::from((f32::from_bits(a as u32) + f32::from_bits(b as u32)).to_bits()),
        Type::F64 => (f64::from_bits(a) + f64::from_bits(b)).to_bits(),
        Type::F16 => halves(F16)(false),
        Type::F16x2 => halves(F16)(true),
        Type::Bf16 => halves(BF16)(false),
        Type::Bf16x2 => halves(BF16)(true),
        _ => a.wrapping_add(b),
    }
}

fn less(kind: Type, a: u64, b: u64) -> bool {
    match kind {
        Type::S32 => (a as i32) < b as i32,
        Type::S64 => (a as i64) < b as i64,
        _ => a < b,
    }
}

/// The new value of a memory cell.
fn combine(atomic: &Atomic, old: u64, value: u64, swap: u64, flush: bool) -> u64 {
    let new = match atomic.op {
        AtomicOp::And => old & value,
        AtomicOp::Or => old | value,
        AtomicOp::Xor => old ^ value,
        AtomicOp::Exchange => value,
        AtomicOp::CompareAndSwap => {
            if old == value {
                swap
            } else {
                old
            }
        }
        AtomicOp::Add => add(atomic.kind, old, value, flush),
        AtomicOp::Increment => {
            if old >= value {
                0
            } else {
                old + 1
            }
        }
        AtomicOp::Decrement => {
            if old == 0 || old > value {
                value
            } else {
                old - 1
            }
        }
        AtomicOp::Min => {
            if less(atomic.kind, value, old) {
                value
            } else {
                old
            }
        }
        AtomicOp::Max => {
            if less(atomic.kind, old, value) {
                value
            } else {
                old
            }
        }
    };
    new & (u64::MAX >> (64 - atomic.kind.bits()))
}

impl Block {
    pub(crate) fn atomic(
        &mut self,
        launch: &Launch,
        count: &mut Count,
        w: usize,
        active: u32,
        pc: u32,
        atomic: &Atomic,
    ) -> Result<(), Fault> {
        let warp = &mut self.warps[w];
        warp.need(atomic.address, active, launch.program, "the address")?;
        for &slot in atomic.values.iter().chain(optional(atomic.swap).iter()) {
            warp.need(slot, active, launch.program, "the operand of the atomic")?;
        }
        let addresses = *warp.get(atomic.address);
        let bytes = atomic.kind.bytes();
        let whole = bytes * atomic.values.len();
        let mut global: Vec<(u64, usize)> = Vec::new();
        let mut shared: Vec<(usize, usize)> = Vec::new();
        let acquire = matches!(atomic.strength, Strength::Acquire | Strength::AcquireRelease);
        let release = matches!(atomic.strength, Strength::Release | Strength::AcquireRelease);
        for lane in lanes(active) {
            let fail = |fault: Fault| fault.at(lane);
            let address = addresses[lane].wrapping_add(atomic.offset as u64);
            let (space, address) = resolve(atomic.space, address);
            let swap = optional(atomic.swap).map_or(0, |slot| self.warps[w].get(slot)[lane]);
            for (i, &slot) in atomic.values.iter().enumerate() {
                let value = self.warps[w].get(slot)[lane];
                let at = address + (i * bytes) as u64;
                let (old, defined) = match space {
                    Space::Shared => {
                        let offset = self.shared.locate(at, bytes).map_err(fail)?;
                        let who = Who { warp: w, lane, pc };
                        self.order.observe(w, SHARED_WINDOW | at, acquire);
                        let defined =
                            self.shared.read(&self.order, who, offset, bytes, true).map_err(fail)?;
                        if !defined && atomic.op != AtomicOp::Exchange {
                            let text = format!(
                                "atomic on {}, which holds no value",
                                self.shared.names.place(offset)
                            );
                            return Err(Fault::new(Complaint::Uninitialised, lane as u32, text));
                        }
                        let old = self.shared.get(offset, bytes);
                        let new = combine(atomic, old, value, swap, false);
                        self.shared.write(&self.order, who, offset, bytes, None, true).map_err(fail)?;
                        self.order.publish(w, SHARED_WINDOW | at, release);
                        self.changed |= self.shared.put(offset, bytes, new);
                        shared.push((lane, offset));
                        (old, defined)
                    }
                    Space::Global | Space::Generic => {
                        let mut hint = self.warps[w].hint;
                        if i == 0 {
                            launch.memory.find(at, whole, true, &mut hint).map_err(fail)?;
                        }
                        let buffer = launch.memory.find(at, bytes, true, &mut hint).map_err(fail)?;
                        self.warps[w].hint = hint;
                        let defined = buffer.is_defined(at, bytes);
                        if !defined && atomic.op != AtomicOp::Exchange {
                            let text = format!(
                                "atomic on `{}` + {}, which nothing has written",
                                buffer.name,
                                at - buffer.base
                            );
                            return Err(Fault::new(Complaint::Uninitialised, lane as u32, text));
                        }
                        self.order.publish(w, at, release);
                        let old = update(launch, buffer, at, atomic, value, swap);
                        self.order.observe(w, at, acquire);
                        self.changed |= old != combine(atomic, old, value, swap, true);
                        buffer.touch(at, bytes, true);
                        global.push((at, bytes));
                        (old, defined)
                    }
                    other => {
                        let text = format!("an atomic cannot work on {} memory", other.name());
                        return Err(Fault::new(Complaint::OutOfBounds, lane as u32, text));
                    }
                };
                if let Some(&result) = atomic.results.get(i) {
                    self.warps[w].set_lane(result, lane, old, defined);
                }
            }
        }
        if !global.is_empty() {
            count.bytes_read += (bytes * global.len()) as u64;
            count.bytes_written += (bytes * global.len()) as u64;
            count.global_access(&global, bytes);
        }
        if !shared.is_empty() {
            count.shared_access(&shared, bytes, 32);
        }
        Ok(())
    }
}

/// Replaces a cell of global memory atomically; returns the old value.
fn update(launch: &Launch, buffer: &Buffer, address: u64, atomic: &Atomic, value: u64, swap: u64) -> u64 {
    let bytes = atomic.kind.bytes();
    if bytes == 4 {
        return u64::from(
            buffer.update(address, |old| combine(atomic, u64::from(old), value, swap, true) as u32),
        );
    }
    let guard = launch.memory.wide_atomics.lock();
    let old = buffer.read(address, bytes);
    buffer.write(address, bytes, combine(atomic, old, value, swap, true));
    drop(guard);
    old
}
