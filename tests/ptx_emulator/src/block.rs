//! A block of threads: its warps, its shared memory, its barriers; and the loop that runs them.

use crate::async_copy::Pipeline;
use crate::counters::Counters;
use crate::fault::Fault;
use crate::global::Memory;
use crate::matrix::Scratch;
use crate::options::{Options, Schedule};
use crate::order::Order;
use crate::program::{NONE, Op, Program, Reduction, Slot, Special};
use crate::refusal::{Complaint, Refusal};
use crate::shared::Shared;
use crate::warp::{Group, Wait, Warp};
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

/// What every block of a launch shares.
pub(crate) struct Launch<'a> {
    pub(crate) program: &'a Program,
    pub(crate) memory: &'a Memory,
    pub(crate) parameters: &'a [u8],
    pub(crate) options: &'a Options,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) dynamic_shared: usize,
}

impl Launch<'_> {
    pub(crate) fn threads(&self) -> u32 {
        self.block.iter().product()
    }
}

/// One of the 16 barriers of a block.
#[derive(Clone, Debug, Default)]
pub(crate) struct BarrierState {
    /// Threads that have arrived, and threads in whole warps (what an explicit count counts).
    pub(crate) arrived: u32,
    pub(crate) arrived_in_warps: u32,
    pub(crate) expected: Option<u32>,
    pub(crate) clock: Vec<u32>,
    pub(crate) waiting: Vec<(usize, u32)>,
    pub(crate) reduction: Option<Reduction>,
    pub(crate) votes: u32,
    pub(crate) results: Vec<(usize, u32, Slot)>,
}

/// How a slice of execution ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Finished,
    /// The slice is used up; true when the block is certain to repeat itself for ever unless another
    /// block changes memory.
    Paused {
        repeats: bool,
    },
}

pub(crate) struct Block {
    pub(crate) index: u64,
    pub(crate) position: [u32; 3],
    pub(crate) warps: Vec<Warp>,
    pub(crate) shared: Shared,
    pub(crate) order: Order,
    pub(crate) pipelines: Vec<Pipeline>,
    pub(crate) barriers: Vec<BarrierState>,
    pub(crate) scratch: Box<Scratch>,
    /// Memory changed, a barrier opened or a thread ended since the last look.
    pub(crate) changed: bool,
    /// The same for the slice that ended last.
    pub(crate) changed_in_slice: bool,
    pub(crate) issued: u64,
    /// Barriers that were completed because threads had ended.
    pub(crate) completed_by_exits: u64,
    random: u64,
    /// Past states of groups since the last change: warp, lanes, and a hash of program counter and registers.
    past: HashSet<(usize, u32, u64)>,
    /// Changes to memory that all blocks had made when `past` began.
    pub(crate) changes_seen: u64,
}

const SLICE: u64 = 200_000;
const TURN: u32 = 2_000;

impl Block {
    /// An empty block, to be filled by `reset` (memory is reused from block to block).
    pub(crate) fn empty() -> Self {
        Self {
            index: 0,
            position: [0; 3],
            warps: Vec::new(),
            shared: Shared::default(),
            order: Order::default(),
            pipelines: Vec::new(),
            barriers: Vec::new(),
            scratch: Box::default(),
            changed: true,
            changed_in_slice: true,
            issued: 0,
            completed_by_exits: 0,
            random: 0,
            past: HashSet::new(),
            changes_seen: 0,
        }
    }

    pub(crate) fn reset(&mut self, launch: &Launch, index: u64) {
        let [gx, gy, _] = launch.grid.map(u64::from);
        self.index = index;
        self.position = [(index % gx) as u32, (index / gx % gy) as u32, (index / gx / gy) as u32];
        let threads = launch.threads();
        let warps = threads.div_ceil(32) as usize;
        let program = launch.program;
        self.warps.resize_with(warps, Warp::default);
        for (w, warp) in self.warps.iter_mut().enumerate() {
            let lanes = (threads - 32 * w as u32).min(32);
            warp.reset(program, u32::MAX >> (32 - lanes));
        }
        self.fill_special_registers(launch);
        let bytes = program.dynamic_shared.max(program.static_shared) + launch.dynamic_shared;
        let bytes = if launch.dynamic_shared == 0 { program.static_shared } else { bytes };
        self.shared.reset(bytes, program.granule, warps, launch.options.races);
        self.shared.names = program.shared_names.clone();
        self.order.reset(warps);
        self.pipelines.clear();
        self.pipelines.resize_with(threads as usize, Pipeline::default);
        self.barriers.clear();
        self.barriers.resize(16, BarrierState::default());
        self.changed = true;
        self.issued = 0;
        self.completed_by_exits = 0;
        self.past.clear();
        let seed = match launch.options.schedule {
            Schedule::Random(seed) => seed,
            _ => 0,
        };
        self.random = (seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1;
    }

    fn fill_special_registers(&mut self, launch: &Launch) {
        let [bx, by, _] = launch.block;
        let warps = self.warps.len() as u64;
        for (w, warp) in self.warps.iter_mut().enumerate() {
            for &(slot, special) in &launch.program.specials {
                let value = |lane: usize| -> u64 {
                    let thread = (32 * w + lane) as u32;
                    let bit = 1u64 << lane;
                    match special {
                        Special::Tid(0) => u64::from(thread % bx),
                        Special::Tid(1) => u64::from(thread / bx % by),
                        Special::Tid(_) => u64::from(thread / bx / by),
                        Special::Ntid(axis) => u64::from(launch.block[usize::from(axis)]),
                        Special::Ctaid(axis) => u64::from(self.position[usize::from(axis)]),
                        Special::Nctaid(axis) => u64::from(launch.grid[usize::from(axis)]),
                        Special::Lane => lane as u64,
                        Special::Warp => w as u64,
                        Special::WarpCount => warps,
                        Special::SmId => self.index % 108,
                        Special::SmCount => 108,
                        Special::LaneMaskEq => bit,
                        Special::LaneMaskLe => bit | (bit - 1),
                        Special::LaneMaskLt => bit - 1,
                        Special::LaneMaskGe => 0xffff_ffff & !(bit - 1),
                        Special::LaneMaskGt => 0xffff_ffff & !(bit | (bit - 1)),
                        Special::DynamicShared => launch.dynamic_shared as u64,
                        Special::TotalShared => {
                            (launch.program.dynamic_shared + launch.dynamic_shared) as u64
                        }
                        Special::GridId | Special::Zero => 0,
                        Special::One => 1,
                    }
                };
                warp.registers[slot as usize] = std::array::from_fn(value);
                warp.defined[slot as usize] = u32::MAX;
            }
        }
    }

    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32
    }

    /// Runs until the block ends or a slice is used up.
    pub(crate) fn run(&mut self, launch: &Launch, counters: &mut Counters) -> Result<Progress, Refusal> {
        let start = self.issued;
        // A block that changed nothing last time may be waiting: look at it more often.
        let slice = if self.changed_in_slice { SLICE } else { SLICE / 10 };
        loop {
            let mut advanced = false;
            for turn in 0..self.warps.len() {
                let w = match launch.options.schedule {
                    Schedule::Descending => self.warps.len() - 1 - turn,
                    Schedule::Random(_) => self.next_random() as usize % self.warps.len(),
                    _ => turn,
                };
                let budget = match launch.options.schedule {
                    Schedule::Random(_) => 1 + self.next_random() as u32 % 48,
                    Schedule::Ahead => 50 * TURN,
                    _ => TURN,
                };
                advanced |= self.run_warp(launch, counters, w, budget)? > 0;
            }
            // Before the look at the slice: a block that ends as its slice does is not set aside.
            if self.warps.iter().all(|warp| warp.live == 0) {
                counters.barriers_completed_by_exits += self.completed_by_exits;
                return Ok(Progress::Finished);
            }
            if !advanced && !self.any_ready() {
                return Err(self.stuck(launch));
            }
            if self.issued - start > slice {
                if self.issued > launch.options.instruction_limit {
                    let [x, y, z] = self.position;
                    let text = format!(
                        "kernel `{}`, block ({x}, {y}, {z}): more than {} warp instructions; raise `instruction_limit` if that is right",
                        launch.program.name, launch.options.instruction_limit
                    );
                    return Err(Refusal::new(Complaint::Limit, text));
                }
                return Ok(Progress::Paused { repeats: self.repeats() });
            }
        }
    }

    /// Other blocks have changed memory: what was seen before proves nothing.
    pub(crate) fn look_afresh(&mut self, changes: u64) {
        if self.changes_seen != changes {
            self.changes_seen = changes;
            self.past.clear();
        }
    }

    fn any_ready(&self) -> bool {
        self.warps.iter().flat_map(|warp| &warp.groups).any(|group| group.wait == Wait::Ready)
    }

    /// Whether every group that could go on is in a state that it was in before, with no change to memory in
    /// between: then it runs in a circle. Groups touch each other through memory and collectives only.
    fn repeats(&mut self) -> bool {
        self.changed_in_slice = std::mem::take(&mut self.changed);
        if self.changed_in_slice || self.past.len() > 100_000 {
            self.past.clear();
        }
        // Where nobody can go on, `run` says why.
        let mut all = self.any_ready();
        for (w, warp) in self.warps.iter().enumerate() {
            for group in warp.groups.iter().filter(|group| group.wait == Wait::Ready) {
                let mut hasher = DefaultHasher::new();
                group.pc.hash(&mut hasher);
                for register in &warp.registers {
                    for lane in lanes(group.mask) {
                        register[lane].hash(&mut hasher);
                    }
                }
                all &= !self.past.insert((w, group.mask, hasher.finish()));
            }
        }
        all
    }

    /// Runs one warp for up to `budget` instructions; returns how many it executed.
    fn run_warp(
        &mut self,
        launch: &Launch,
        counters: &mut Counters,
        w: usize,
        budget: u32,
    ) -> Result<u32, Refusal> {
        let random = matches!(launch.options.schedule, Schedule::Random(_));
        let mut executed = 0;
        while executed < budget {
            let Some(g) = self.pick(w, random) else { break };
            let pc = self.warps[w].groups[g].pc;
            self.step(launch, counters, w, g).map_err(|fault| self.refuse(launch, w, pc, &fault))?;
            executed += 1;
        }
        self.issued += u64::from(executed);
        Ok(executed)
    }

    /// The group that runs next: the one with the lowest program counter, so that lanes meet again as soon as
    /// they can; but no group runs for ever while another could.
    #[inline]
    fn pick(&mut self, w: usize, random: bool) -> Option<usize> {
        let warp = &mut self.warps[w];
        if warp.groups.len() == 1 {
            return (warp.groups[0].wait == Wait::Ready).then_some(0);
        }
        warp.merge();
        let ready: Vec<usize> =
            (0..warp.groups.len()).filter(|&g| warp.groups[g].wait == Wait::Ready).collect();
        if ready.len() < 2 {
            return ready.first().copied();
        }
        warp.streak += 1;
        let lowest = ready.iter().copied().min_by_key(|&g| warp.groups[g].pc)?;
        if random {
            let choice = self.next_random() as usize % ready.len();
            return Some(ready[choice]);
        }
        // Every so often the others get a stretch of their own.
        if warp.streak % 4096 > 2048 {
            let others: Vec<usize> = ready.into_iter().filter(|&g| g != lowest).collect();
            let turn = (warp.streak / 4096) as usize;
            return Some(others[turn % others.len()]);
        }
        Some(lowest)
    }

    /// Nobody can run and not everybody has ended: says why.
    fn stuck(&self, launch: &Launch) -> Refusal {
        // Of several that wait, the barrier of the block says most, the barrier of a warp least.
        let rank = |group: &Group| match launch.program.insts[group.pc as usize].op {
            Op::Barrier(_) => 0,
            Op::WarpBarrier { .. } => 2,
            _ => 1,
        };
        for (w, warp) in self.warps.iter().enumerate() {
            let waiting =
                warp.groups.iter().filter(|group| matches!(group.wait, Wait::Convergence | Wait::Members));
            let Some(group) = waiting.min_by_key(|group| rank(group)) else { continue };
            let inst = &launch.program.insts[group.pc as usize];
            let complaint = match inst.op {
                Op::Barrier(_) | Op::WarpBarrier { .. } => Complaint::DivergentBarrier,
                _ => Complaint::DivergentCollective,
            };
            let elsewhere: Vec<String> = warp
                .groups
                .iter()
                .filter(|other| other.pc != group.pc || other.mask != group.mask)
                .map(|other| format!("lanes {:#010x} wait at line {}", other.mask, line_of(launch, other)))
                .collect();
            let ended = !warp.live;
            let text = format!(
                "lanes {:#010x} wait for the rest of their warp, which never comes: {}{}",
                group.mask,
                if elsewhere.is_empty() { String::new() } else { elsewhere.join(", ") + "; " },
                if ended == 0 {
                    "no lane has ended".to_owned()
                } else {
                    format!("lanes {ended:#010x} have ended")
                }
            );
            let fault = Fault::new(complaint, group.mask.trailing_zeros(), text);
            return self.refuse(launch, w, group.pc, &fault);
        }
        let waiting: Vec<String> = self
            .barriers
            .iter()
            .enumerate()
            .filter(|(_, barrier)| barrier.arrived > 0)
            .map(|(id, barrier)| {
                let expected = barrier.expected.unwrap_or_else(|| self.live_threads());
                format!("barrier {id} has {} of {expected} threads", barrier.arrived)
            })
            .collect();
        let (w, group) = self
            .warps
            .iter()
            .enumerate()
            .find_map(|(w, warp)| warp.groups.first().map(|group| (w, *group)))
            .unwrap_or((0, Group { pc: 0, mask: 1, wait: Wait::Ready }));
        let text = format!("no thread of the block can go on: {}", waiting.join(", "));
        let fault = Fault::new(Complaint::DivergentBarrier, group.mask.trailing_zeros(), text);
        self.refuse(launch, w, group.pc.saturating_sub(1), &fault)
    }

    pub(crate) fn live_threads(&self) -> u32 {
        self.warps.iter().map(|warp| warp.live.count_ones()).sum()
    }

    /// A fault with its place: the sentence a user reads.
    pub(crate) fn refuse(&self, launch: &Launch, w: usize, pc: u32, fault: &Fault) -> Refusal {
        let program = launch.program;
        let coordinates = |thread: u32| {
            let [x, y, _] = launch.block;
            format!("({}, {}, {})", thread % x, thread / x % y, thread / x / y)
        };
        let [bx, by, bz] = self.position;
        let thread = coordinates(32 * w as u32 + fault.lane);
        let mut message = format!(
            "kernel `{}`, block ({bx}, {by}, {bz}), thread {thread}, {}: {}",
            program.name,
            program.place(pc),
            fault.text
        );
        if let Some(other) = fault.other {
            let (thread, place) = (coordinates(other.thread), program.place(other.pc));
            let verb = other.verb;
            let sentence = if fault.complaint == Complaint::Race {
                format!(
                    " with thread {thread}, which {verb} at {place}, with nothing, such as __syncthreads, that orders the two"
                )
            } else {
                format!("; thread {thread} {verb} at {place}")
            };
            message.push_str(&sentence);
        }
        Refusal::new(fault.complaint, message)
    }
}

impl Program {
    /// An instruction's place for messages: PTX line, its text, and the CUDA line when `.loc` gives it.
    pub(crate) fn place(&self, pc: u32) -> String {
        let inst = &self.insts[pc as usize];
        let text = self.lines.get(inst.line.saturating_sub(1) as usize).map_or("", |line| line.trim());
        let (file, line) = inst.source;
        match self.files.get(&file) {
            Some(file) if line > 0 => format!("PTX line {} `{text}` ({file}:{line})", inst.line),
            _ => format!("PTX line {} `{text}`", inst.line),
        }
    }
}

/// The PTX line at which a group waits.
fn line_of(launch: &Launch, group: &Group) -> u32 {
    let pc = if matches!(group.wait, Wait::Barrier(_)) { group.pc - 1 } else { group.pc };
    launch.program.insts[pc as usize].line
}

/// The masks of the lanes of `mask`, one after another.
pub(crate) fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 == 1)
}

/// A source that may be absent.
pub(crate) fn optional(slot: Slot) -> Option<Slot> {
    (slot != NONE).then_some(slot)
}
