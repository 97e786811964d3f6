//! Shared memory of a block with its shadow: who wrote each granule and when, who read it since, and which
//! bytes a `cp.async` still owns.

use crate::fault::{Fault, Other};
use crate::layout::{SHARED_BASE, SharedNames};
use crate::order::Order;
use crate::refusal::Complaint;
use std::sync::Arc;

const WRITTEN: u8 = 1;
const ATOMIC: u8 = 2;
const IN_FLIGHT: u8 = 4;
const COMMITTED: u8 = 8;
/// What was written depends on something never written.
const HOLLOW: u8 = 16;

#[derive(Clone, Copy, Debug, Default)]
struct Writer {
    generation: u32,
    pc: u32,
    thread: u16,
    flags: u8,
}

/// Reads of one granule by one warp in its latest generation.
#[derive(Clone, Copy, Debug, Default)]
struct Reader {
    generation: u32,
    lanes: u32,
    pc: u32,
}

/// Who makes an access.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Who {
    pub(crate) warp: usize,
    pub(crate) lane: usize,
    pub(crate) pc: u32,
}

impl Who {
    fn thread(self) -> usize {
        self.warp * 32 + self.lane
    }
}

#[derive(Debug, Default)]
pub(crate) struct Shared {
    data: Vec<u8>,
    shift: u32,
    warps: usize,
    races: bool,
    pub(crate) names: Arc<SharedNames>,
    writers: Vec<Writer>,
    readers: Vec<Reader>,
}

impl Shared {
    /// Fresh memory: nothing written. `granule` is the smallest access of the kernel in bytes.
    pub(crate) fn reset(&mut self, bytes: usize, granule: usize, warps: usize, races: bool) {
        self.races = races;
        self.shift = granule.trailing_zeros();
        self.warps = warps;
        let granules = bytes.div_ceil(granule);
        self.data.clear();
        // A pattern that is a NaN in f32, f16 and bf16: what leaks is seen.
        self.data.resize(bytes, 0xff);
        self.writers.clear();
        self.writers.resize(granules, Writer::default());
        self.readers.clear();
        self.readers.resize(granules * warps, Reader::default());
    }

    /// Checks bounds and alignment of an address of the shared space; returns the offset.
    #[inline]
    pub(crate) fn locate(&self, address: u64, bytes: usize) -> Result<usize, Fault> {
        let offset = address.wrapping_sub(SHARED_BASE);
        if offset >= self.data.len() as u64 || offset + bytes as u64 > self.data.len() as u64 {
            let text = format!(
                "access of {bytes} bytes at shared address {address:#x}, offset {} of the block's {} bytes",
                offset as i64,
                self.data.len()
            );
            return Err(Fault::new(Complaint::OutOfBounds, 0, text));
        }
        if !offset.is_multiple_of(bytes as u64) {
            let text =
                format!("{} is no multiple of the access's {bytes} bytes", self.names.place(offset as usize));
            return Err(Fault::new(Complaint::Misaligned, 0, text));
        }
        Ok(offset as usize)
    }

    #[inline]
    pub(crate) fn get(&self, offset: usize, bytes: usize) -> u64 {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&self.data[offset..offset + bytes]);
        u64::from_le_bytes(word)
    }

    /// Stores without checks; true when a byte changed.
    #[inline]
    pub(crate) fn put(&mut self, offset: usize, bytes: usize, value: u64) -> bool {
        let place = &mut self.data[offset..offset + bytes];
        let value = &value.to_le_bytes()[..bytes];
        let changed = place != value;
        place.copy_from_slice(value);
        changed
    }

    fn granules(&self, offset: usize, bytes: usize) -> std::ops::Range<usize> {
        offset >> self.shift..(offset + bytes - 1 >> self.shift) + 1
    }

    /// Checks and records a read; returns whether all its bytes hold a value.
    #[inline]
    pub(crate) fn read(
        &mut self,
        order: &Order,
        who: Who,
        offset: usize,
        bytes: usize,
        strong: bool,
    ) -> Result<bool, Fault> {
        let generation = order.generation(who.warp);
        let mut defined = true;
        for granule in self.granules(offset, bytes) {
            let writer = self.writers[granule];
            if writer.flags & IN_FLIGHT != 0 {
                return Err(self.in_flight("read", granule, writer));
            }
            defined &= writer.flags & (WRITTEN | HOLLOW) == WRITTEN;
            let writer_thread = usize::from(writer.thread);
            let exempt = !self.races || writer.flags & WRITTEN == 0 || strong && writer.flags & ATOMIC != 0;
            if !exempt && !order.before(who.warp, who.lane, writer_thread, writer.generation) {
                return Err(self.race("read", granule, writer_thread, writer.pc, "wrote it"));
            }
            if !strong {
                let reader = &mut self.readers[granule * self.warps + who.warp];
                if reader.generation == generation {
                    reader.lanes |= 1 << who.lane;
                } else {
                    *reader = Reader { generation, lanes: 1 << who.lane, pc: who.pc };
                }
                reader.pc = who.pc;
            }
        }
        Ok(defined)
    }

    /// Checks and records a write of `value`. Two unordered writes of the same bits are no conflict. The bytes
    /// count as written; `hollow` says otherwise afterwards.
    #[inline]
    pub(crate) fn write(
        &mut self,
        order: &Order,
        who: Who,
        offset: usize,
        bytes: usize,
        value: Option<u64>,
        strong: bool,
    ) -> Result<(), Fault> {
        let same = value.is_some_and(|value| self.get(offset, bytes) == value);
        for granule in self.granules(offset, bytes) {
            let writer = self.writers[granule];
            if writer.flags & IN_FLIGHT != 0 {
                return Err(self.in_flight("write", granule, writer));
            }
            let writer_thread = usize::from(writer.thread);
            let exempt = !self.races || strong && writer.flags & ATOMIC != 0 || same;
            if writer.flags & WRITTEN != 0
                && !exempt
                && !order.before(who.warp, who.lane, writer_thread, writer.generation)
            {
                return Err(self.race("write", granule, writer_thread, writer.pc, "wrote it"));
            }
            for warp in 0..if self.races { self.warps } else { 0 } {
                let reader = self.readers[granule * self.warps + warp];
                if reader.generation == 0 {
                    continue;
                }
                let unordered = if warp == who.warp {
                    let others = reader.lanes & !(1 << who.lane);
                    (0..32).find(|&lane| {
                        others >> lane & 1 == 1 && !order.before_lane(warp, who.lane, lane, reader.generation)
                    })
                } else if order.before(who.warp, who.lane, warp * 32, reader.generation) {
                    None
                } else {
                    Some(reader.lanes.trailing_zeros() as usize)
                };
                if let Some(lane) = unordered {
                    return Err(self.race("write", granule, warp * 32 + lane, reader.pc, "read it"));
                }
            }
            let flags = WRITTEN | if strong { ATOMIC } else { 0 };
            let generation = order.generation(who.warp);
            self.writers[granule] = Writer { generation, pc: who.pc, thread: who.thread() as u16, flags };
        }
        Ok(())
    }

    /// What was just written is a value that depends on something never written.
    pub(crate) fn hollow(&mut self, offset: usize, bytes: usize) {
        for granule in self.granules(offset, bytes) {
            self.writers[granule].flags |= HOLLOW;
        }
    }

    /// A `cp.async` owns the range from now on; `write` has been checked before.
    pub(crate) fn take(&mut self, offset: usize, bytes: usize) {
        for granule in self.granules(offset, bytes) {
            self.writers[granule].flags |= IN_FLIGHT;
        }
    }

    /// The copy was committed; only messages care.
    pub(crate) fn committed(&mut self, offset: usize, bytes: usize) {
        for granule in self.granules(offset, bytes) {
            self.writers[granule].flags |= COMMITTED;
        }
    }

    /// The copy has landed: from now on it counts as a write of its thread.
    pub(crate) fn land(&mut self, offset: usize, bytes: usize, generation: u32) {
        for granule in self.granules(offset, bytes) {
            let writer = &mut self.writers[granule];
            writer.flags = WRITTEN;
            writer.generation = generation;
        }
    }

    #[cold]
    fn race(&self, verb: &str, granule: usize, thread: usize, pc: u32, other: &'static str) -> Fault {
        let text = format!("{verb} of {} races", self.names.place(granule << self.shift));
        let other = Some(Other { thread: thread as u32, pc, verb: other });
        Fault { complaint: Complaint::Race, lane: 0, text, other }
    }

    #[cold]
    fn in_flight(&self, verb: &str, granule: usize, writer: Writer) -> Fault {
        let state = if writer.flags & COMMITTED != 0 { "not waited for" } else { "never committed" };
        let text = format!(
            "{verb} of {}, which a cp.async still fills ({state})",
            self.names.place(granule << self.shift)
        );
        let other = Some(Other { thread: u32::from(writer.thread), pc: writer.pc, verb: "started the copy" });
        Fault { complaint: Complaint::AsyncInFlight, lane: 0, text, other }
    }
}
