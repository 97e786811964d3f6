//! A warp: registers of its lanes, and the groups of lanes that share a program counter.

use crate::block::lanes;
use crate::fault::Fault;
use crate::lanes::Lanes;
use crate::layout::LOCAL_BASE;
use crate::program::{NONE, Program, Slot};
use crate::refusal::Complaint;

/// What a group of lanes is waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    Ready,
    /// For the other lanes of the warp to reach the same aligned instruction.
    Convergence,
    /// For the other members of a masked collective.
    Members,
    /// For a barrier of the block; the program counter is already past it.
    Barrier(u32),
}

/// Lanes with one program counter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub(crate) pc: u32,
    pub(crate) mask: u32,
    pub(crate) wait: Wait,
}

#[derive(Debug, Default)]
pub(crate) struct Warp {
    pub(crate) registers: Vec<Lanes>,
    /// Lanes of each register that hold a value.
    pub(crate) defined: Vec<u32>,
    pub(crate) groups: Vec<Group>,
    /// Lanes that exist and have not ended.
    pub(crate) live: u32,
    /// Instructions executed, for `%clock`.
    pub(crate) clock: u64,
    /// Group chosen last and how many instructions in a row, for fairness.
    pub(crate) current: usize,
    pub(crate) streak: u32,
    /// For each way round a barrier, how often each lane took it.
    pub(crate) passes: Vec<[u32; 32]>,
    local: Vec<u8>,
    local_defined: Vec<bool>,
    local_bytes: usize,
    /// The last instruction that read shared memory without a value, and the first such offset it read.
    pub(crate) stray: Option<(u32, usize)>,
    /// Buffer found last by each kind of access.
    pub(crate) hint: usize,
}

impl Warp {
    pub(crate) fn reset(&mut self, program: &Program, live: u32) {
        self.registers.resize(program.slot_names.len(), [0; 32]);
        self.defined.clear();
        self.defined.resize(program.slot_names.len(), 0);
        for &(slot, value) in &program.constants {
            self.registers[slot as usize] = [value; 32];
            self.defined[slot as usize] = u32::MAX;
        }
        self.groups.clear();
        self.groups.push(Group { pc: 0, mask: live, wait: Wait::Ready });
        self.live = live;
        self.clock = 0;
        self.current = 0;
        self.streak = 0;
        self.stray = None;
        self.passes.clear();
        self.passes.resize(program.bypasses.len(), [0; 32]);
        self.local_bytes = program.local_bytes - LOCAL_BASE as usize;
        self.local.clear();
        self.local.resize(self.local_bytes * 32, 0);
        self.local_defined.clear();
        self.local_defined.resize(self.local_bytes * 32, false);
    }

    #[inline]
    pub(crate) fn get(&self, slot: Slot) -> &Lanes {
        &self.registers[slot as usize]
    }

    /// Writes the lanes of `mask`; `defined` says which of them now hold a value.
    #[inline]
    pub(crate) fn set(&mut self, slot: Slot, values: &Lanes, mask: u32, defined: u32) {
        if slot == NONE {
            return;
        }
        let register = &mut self.registers[slot as usize];
        if mask == u32::MAX {
            *register = *values;
        } else {
            for lane in 0..32 {
                if mask >> lane & 1 == 1 {
                    register[lane] = values[lane];
                }
            }
        }
        let bits = &mut self.defined[slot as usize];
        *bits = *bits & !mask | defined & mask;
    }

    /// Writes one lane; `defined` says whether it now holds a value.
    #[inline]
    pub(crate) fn set_lane(&mut self, slot: Slot, lane: usize, value: u64, defined: bool) {
        if slot != NONE {
            self.registers[slot as usize][lane] = value;
            let bits = &mut self.defined[slot as usize];
            *bits = *bits & !(1 << lane) | u32::from(defined) << lane;
        }
    }

    /// Refuses when a lane of `mask` uses a register that nothing has written.
    #[inline]
    pub(crate) fn need(&self, slot: Slot, mask: u32, program: &Program, what: &str) -> Result<(), Fault> {
        let missing = mask & !self.defined[slot as usize];
        if missing == 0 {
            return Ok(());
        }
        let name = &program.slot_names[slot as usize];
        let source = self.stray.map_or_else(String::new, |(pc, offset)| {
            let (offset, place) = (program.shared_names.place(offset), program.place(pc));
            format!(
                "; the warp last read such bytes at {offset}, {place} (a missing __syncthreads looks like this too)"
            )
        });
        let text =
            format!("{what} comes from register `{name}`, which depends on something never written{source}");
        Err(Fault::new(Complaint::Uninitialised, missing.trailing_zeros(), text))
    }

    fn local_place(&self, lane: usize, address: u64, bytes: usize) -> Result<usize, Fault> {
        let offset = address.wrapping_sub(LOCAL_BASE);
        if offset >= self.local_bytes as u64 || offset + bytes as u64 > self.local_bytes as u64 {
            let text = format!(
                "access of {bytes} bytes at local offset {} of the thread's {} bytes",
                offset as i64, self.local_bytes
            );
            return Err(Fault::new(Complaint::OutOfBounds, 0, text));
        }
        if !address.is_multiple_of(bytes as u64) {
            let text = format!("local address {address:#x} is no multiple of the access's {bytes} bytes");
            return Err(Fault::new(Complaint::Misaligned, 0, text));
        }
        Ok(lane * self.local_bytes + offset as usize)
    }

    /// Reads local memory of one lane; the flag says whether all bytes hold a value. `whole` is the size of
    /// the vector access that this element belongs to.
    pub(crate) fn local_read(&self, lane: usize, address: u64, bytes: usize) -> Result<(u64, bool), Fault> {
        let place = self.local_place(lane, address, bytes)?;
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&self.local[place..place + bytes]);
        Ok((u64::from_le_bytes(word), self.local_defined[place..place + bytes].iter().all(|&d| d)))
    }

    /// Writes local memory of one lane. An undefined value leaves the bytes undefined.
    pub(crate) fn local_write(
        &mut self,
        lane: usize,
        address: u64,
        bytes: usize,
        value: u64,
        defined: bool,
    ) -> Result<(), Fault> {
        let place = self.local_place(lane, address, bytes)?;
        self.local[place..place + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        self.local_defined[place..place + bytes].fill(defined);
        Ok(())
    }

    /// Lanes go round a barrier.
    pub(crate) fn pass(&mut self, bypass: u32, mask: u32) {
        if bypass == NONE {
            return;
        }
        let passes = &mut self.passes[bypass as usize];
        lanes(mask).for_each(|lane| passes[lane] += 1);
    }

    /// Merges ready groups that stand at the same instruction.
    pub(crate) fn merge(&mut self) {
        let mut i = 0;
        while i < self.groups.len() {
            let mut j = i + 1;
            while j < self.groups.len() {
                let (a, b) = (self.groups[i], self.groups[j]);
                let barrier = matches!(a.wait, Wait::Barrier(_)) || matches!(b.wait, Wait::Barrier(_));
                if a.pc == b.pc && !barrier {
                    // A waiting group looks again once another one has come to it.
                    self.groups[i].mask |= b.mask;
                    self.groups[i].wait = Wait::Ready;
                    self.groups.swap_remove(j);
                    if self.current == j || self.current == self.groups.len() {
                        self.current = i;
                    }
                } else {
                    j += 1;
                }
            }
            i += 1;
        }
    }
}
