//! ld, st and cp.async of one warp.

use crate::async_copy::Copy;
use crate::block::{Block, Launch, lanes, optional};
use crate::counters::Count;
use crate::fault::Fault;
use crate::global::Buffer;
use crate::layout::SHARED_WINDOW;
use crate::options::AsyncTiming;
use crate::program::{Access, AsyncCopy, Strength};
use crate::refusal::Complaint;
use crate::shared::Who;
use crate::step::{present, resolve};
use crate::types::Space;
use crate::warp::Warp;

/// Lanes whose shared accesses of `bytes` each are served at once.
pub(crate) fn lanes_per_phase(bytes: usize) -> usize {
    (128 / bytes.max(4)).clamp(8, 32)
}

fn extend(value: u64, access: &Access) -> u64 {
    if !access.element.is_signed() {
        return value;
    }
    let shift = 64 - access.element.bits();
    let wide = (value << shift) as i64 >> shift;
    wide as u64 & (u64::MAX >> (64 - access.register_bits))
}

/// Refuses to read global bytes that nothing has written.
pub(crate) fn need_written(buffer: &Buffer, address: u64, bytes: usize) -> Result<(), Fault> {
    if buffer.is_defined(address, bytes) {
        return Ok(());
    }
    let text = format!("read of `{}` + {}, which nothing has written", buffer.name, address - buffer.base);
    Err(Fault::new(Complaint::Uninitialised, 0, text))
}

/// Fills the registers of one lane from memory that `read` gives, element by element from its offset on.
#[inline]
fn fill(warp: &mut Warp, access: &Access, lane: usize, defined: bool, read: impl Fn(usize) -> u64) {
    for (i, &register) in access.registers.iter().enumerate() {
        let value = extend(read(i * access.element.bytes()), access);
        warp.set_lane(register, lane, value, defined);
    }
}

/// Adds a warp's accesses to the counts.
fn count_accesses(count: &mut Count, global: &[(u64, usize)], shared: &[(usize, usize)], bytes: usize) {
    if !global.is_empty() {
        count.global_access(global, bytes);
    }
    if !shared.is_empty() {
        count.shared_access(shared, bytes, lanes_per_phase(bytes));
    }
}

impl Block {
    pub(crate) fn load(
        &mut self,
        launch: &Launch,
        count: &mut Count,
        w: usize,
        active: u32,
        pc: u32,
        access: &Access,
    ) -> Result<(), Fault> {
        let warp = &mut self.warps[w];
        warp.need(access.address, active, launch.program, "the address")?;
        let addresses = *warp.get(access.address);
        let element = access.element.bytes();
        let bytes = element * access.registers.len();
        let mut global: Vec<(u64, usize)> = Vec::new();
        let mut shared: Vec<(usize, usize)> = Vec::new();
        let mut stray = None;
        for lane in lanes(active) {
            let address = addresses[lane].wrapping_add(access.offset as u64);
            let (space, address) = resolve(access.space, address);
            let fail = |fault: Fault| fault.at(lane);
            match space {
                Space::Shared => {
                    let offset = self.shared.locate(address, bytes).map_err(fail)?;
                    let strong = access.strength != Strength::Weak;
                    if strong {
                        let acquire = access.strength == Strength::Acquire;
                        self.order.observe(w, SHARED_WINDOW | address, acquire);
                    }
                    let who = Who { warp: w, lane, pc };
                    let whole = self.shared.read(&self.order, who, offset, bytes, strong).map_err(fail)?;
                    if !whole {
                        stray.get_or_insert((pc, offset));
                    }
                    fill(warp, access, lane, whole, |at| self.shared.get(offset + at, element));
                    shared.push((lane, offset));
                }
                Space::Global | Space::Const | Space::Generic => {
                    let mut hint = warp.hint;
                    let buffer = launch.memory.find(address, bytes, false, &mut hint).map_err(fail)?;
                    warp.hint = hint;
                    need_written(buffer, address, bytes).map_err(fail)?;
                    if access.strength != Strength::Weak {
                        self.order.observe(w, address, access.strength == Strength::Acquire);
                    }
                    let whole = launch.memory.whole(access.strength != Strength::Weak && element == 8);
                    fill(warp, access, lane, true, |at| buffer.read(address + at as u64, element));
                    drop(whole);
                    if access.space != Space::Const {
                        buffer.touch(address, bytes, false);
                        global.push((address, bytes));
                    }
                }
                Space::Local => {
                    for (i, &register) in access.registers.iter().enumerate() {
                        let at = address + (i * element) as u64;
                        let (value, defined) = warp.local_read(lane, at, element).map_err(fail)?;
                        warp.set_lane(register, lane, extend(value, access), defined);
                    }
                }
                Space::Param => {
                    let Some(content) = launch.parameters.get(address as usize..address as usize + bytes)
                    else {
                        let text =
                            format!("access of {bytes} bytes at offset {address} of the kernel's parameters");
                        return Err(Fault::new(Complaint::OutOfBounds, lane as u32, text));
                    };
                    fill(warp, access, lane, true, |at| {
                        let mut word = [0; 8];
                        word[..element].copy_from_slice(&content[at..at + element]);
                        u64::from_le_bytes(word)
                    });
                }
            }
        }
        warp.stray = stray.or(warp.stray);
        count.bytes_read += (bytes * global.len()) as u64;
        count_accesses(count, &global, &shared, bytes);
        Ok(())
    }

    pub(crate) fn store(
        &mut self,
        launch: &Launch,
        count: &mut Count,
        w: usize,
        active: u32,
        pc: u32,
        access: &Access,
    ) -> Result<(), Fault> {
        let warp = &mut self.warps[w];
        warp.need(access.address, active, launch.program, "the address")?;
        let addresses = *warp.get(access.address);
        let element = access.element.bytes();
        let bytes = element * access.registers.len();
        let mut global: Vec<(u64, usize)> = Vec::new();
        let mut shared: Vec<(usize, usize)> = Vec::new();
        let values = |warp: &Warp, lane: usize| -> Result<(), Fault> {
            for register in present(&access.registers) {
                warp.need(register, 1 << lane, launch.program, "the value stored")?;
            }
            Ok(())
        };
        for lane in lanes(active) {
            let address = addresses[lane].wrapping_add(access.offset as u64);
            let (space, address) = resolve(access.space, address);
            let fail = |fault: Fault| fault.at(lane);
            match space {
                Space::Shared => {
                    let offset = self.shared.locate(address, bytes).map_err(fail)?;
                    let strong = access.strength != Strength::Weak;
                    for (i, &register) in access.registers.iter().enumerate() {
                        let value = warp.get(register)[lane] & (u64::MAX >> (64 - 8 * element));
                        let at = offset + i * element;
                        let who = Who { warp: w, lane, pc };
                        let defined = warp.defined[register as usize] >> lane & 1 == 1;
                        let bits = defined.then_some(value);
                        self.shared.write(&self.order, who, at, element, bits, strong).map_err(fail)?;
                        if !defined {
                            self.shared.hollow(at, element);
                        }
                        self.changed |= self.shared.put(at, element, value);
                    }
                    if strong {
                        let release = access.strength == Strength::Release;
                        self.order.publish(w, SHARED_WINDOW | address, release);
                    }
                    shared.push((lane, offset));
                }
                Space::Global | Space::Const | Space::Generic => {
                    values(warp, lane)?;
                    let mut hint = warp.hint;
                    let buffer = launch.memory.find(address, bytes, true, &mut hint).map_err(fail)?;
                    warp.hint = hint;
                    if access.strength != Strength::Weak {
                        self.order.publish(w, address, access.strength == Strength::Release);
                    }
                    let whole = launch.memory.whole(access.strength != Strength::Weak && element == 8);
                    for (i, &register) in access.registers.iter().enumerate() {
                        let value = warp.get(register)[lane];
                        self.changed |= buffer.write(address + (i * element) as u64, element, value);
                    }
                    drop(whole);
                    buffer.touch(address, bytes, true);
                    global.push((address, bytes));
                }
                Space::Local => {
                    for (i, &register) in access.registers.iter().enumerate() {
                        let value = warp.get(register)[lane];
                        let defined = warp.defined[register as usize] >> lane & 1 == 1;
                        let at = address + (i * element) as u64;
                        warp.local_write(lane, at, element, value, defined).map_err(fail)?;
                    }
                }
                Space::Param => {
                    let text = "a kernel's parameters cannot be written";
                    return Err(Fault::new(Complaint::ReadOnly, lane as u32, text));
                }
            }
        }
        count.bytes_written += (bytes * global.len()) as u64;
        count_accesses(count, &global, &shared, bytes);
        Ok(())
    }

    pub(crate) fn async_copy(
        &mut self,
        launch: &Launch,
        count: &mut Count,
        w: usize,
        active: u32,
        pc: u32,
        copy: &AsyncCopy,
    ) -> Result<(), Fault> {
        let warp = &mut self.warps[w];
        warp.need(copy.destination, active, launch.program, "the destination")?;
        warp.need(copy.source, active, launch.program, "the source address")?;
        for slot in [copy.source_bytes, copy.ignore].into_iter().filter_map(optional) {
            warp.need(slot, active, launch.program, "the source size")?;
        }
        let earliest = launch.options.async_timing == AsyncTiming::Earliest;
        let mut global: Vec<(u64, usize)> = Vec::new();
        let mut shared: Vec<(usize, usize)> = Vec::new();
        for lane in lanes(active) {
            let fail = |fault: Fault| fault.at(lane);
            let warp = &mut self.warps[w];
            let destination = warp.get(copy.destination)[lane].wrapping_add(copy.destination_offset as u64);
            let (_, destination) = resolve(Space::Generic, destination);
            let source = warp.get(copy.source)[lane].wrapping_add(copy.source_offset as u64);
            let mut source_bytes =
                optional(copy.source_bytes).map_or(copy.bytes, |slot| warp.get(slot)[lane] as usize);
            if let Some(slot) = optional(copy.ignore)
                && (warp.get(slot)[lane] & 1 == 1) != copy.ignore_negated
            {
                source_bytes = 0;
            }
            if source_bytes > copy.bytes {
                let text =
                    format!("the source size {source_bytes} is larger than the copy of {} bytes", copy.bytes);
                return Err(Fault::new(Complaint::OutOfBounds, lane as u32, text));
            }
            let offset = self.shared.locate(destination, copy.bytes).map_err(fail)?;
            if !source.is_multiple_of(copy.bytes as u64) {
                let text =
                    format!("source address {source:#x} is no multiple of the copy's {} bytes", copy.bytes);
                return Err(Fault::new(Complaint::Misaligned, lane as u32, text));
            }
            if source_bytes > 0 {
                let mut hint = warp.hint;
                launch.memory.find(source + source_bytes as u64 - 1, 1, false, &mut hint).map_err(fail)?;
                let buffer = launch.memory.find(source, 1, false, &mut hint).map_err(fail)?;
                warp.hint = hint;
                need_written(buffer, source, source_bytes).map_err(fail)?;
                buffer.touch(source, source_bytes, false);
                global.push((source, source_bytes));
                count.bytes_read += source_bytes as u64;
            }
            shared.push((lane, offset));
            let issued = Copy { destination: offset, bytes: copy.bytes, source, source_bytes };
            let who = Who { warp: w, lane, pc };
            let pipeline = &mut self.pipelines[32 * w + lane];
            pipeline
                .issue(issued, who, earliest, &mut self.shared, &self.order, launch.memory)
                .map_err(fail)?;
        }
        self.changed = true;
        count_accesses(count, &global, &shared, copy.bytes);
        Ok(())
    }

    pub(crate) fn async_wait(
        &mut self,
        launch: &Launch,
        w: usize,
        active: u32,
        pc: u32,
        pending: Option<u32>,
    ) -> Result<(), Fault> {
        let earliest = launch.options.async_timing == AsyncTiming::Earliest;
        for lane in lanes(active) {
            let who = Who { warp: w, lane, pc };
            self.pipelines[32 * w + lane]
                .wait(pending, who, earliest, &mut self.shared, &self.order, launch.memory)
                .map_err(|fault| fault.at(lane))?;
        }
        Ok(())
    }
}
