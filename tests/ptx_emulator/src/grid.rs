//! A whole launch: blocks in some order over the CPU's cores. Blocks that wait for other blocks are set
//! aside after a while, so that those others run.

use crate::block::{Block, Launch, Progress};
use crate::counters::Counters;
use crate::options::Schedule;
use crate::refusal::{Complaint, Refusal};
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};

/// A block set aside. `repeats_at`: the number of changes to memory at which it was seen to run in a circle.
struct Aside {
    block: Block,
    repeats_at: Option<u64>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<u64>,
    aside: VecDeque<Aside>,
    running: usize,
    /// Slices that changed memory.
    changes: u64,
    refusal: Option<(u64, Refusal)>,
    idle: Vec<Block>,
}

impl Queue {
    /// The next block set aside that may go on: one not known to repeat itself in the memory as it is.
    fn hopeful(&self) -> Option<usize> {
        self.aside.iter().position(|aside| aside.repeats_at != Some(self.changes))
    }
}

fn order(launch: &Launch) -> VecDeque<u64> {
    let total: u64 = launch.grid.iter().map(|&size| u64::from(size)).product();
    let mut all: Vec<u64> = launch.options.blocks.clone().unwrap_or_else(|| (0..total).collect());
    match launch.options.schedule {
        Schedule::Ascending | Schedule::Ahead => {}
        Schedule::Descending => all.reverse(),
        Schedule::Random(seed) => {
            let mut state = seed.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(3_037_000_493);
            for i in (1..all.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                all.swap(i, (state >> 33) as usize % (i + 1));
            }
        }
    }
    all.into()
}

/// Runs all blocks; returns the counts, or the refusal of the lowest block among those that were refused.
pub(crate) fn run(launch: &Launch) -> Result<Counters, Refusal> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = if launch.options.workers == 0 { cores } else { launch.options.workers };
    let queue = Mutex::new(Queue { waiting: order(launch), ..Queue::default() });
    let wake = Condvar::new();
    let instructions = launch.program.insts.len();
    let totals = Mutex::new(Counters::new(instructions));
    let work = || {
        let mut counters = Counters::new(instructions);
        worker(launch, &queue, &wake, &mut counters);
        totals.lock().unwrap_or_else(PoisonError::into_inner).merge(&counters);
    };
    if workers == 1 {
        work();
    } else {
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(work);
            }
        });
    }
    let queue = queue.into_inner().unwrap_or_else(PoisonError::into_inner);
    match queue.refusal {
        Some((_, refusal)) => Err(refusal),
        None => Ok(totals.into_inner().unwrap_or_else(PoisonError::into_inner)),
    }
}

fn worker(launch: &Launch, queue: &Mutex<Queue>, wake: &Condvar, counters: &mut Counters) {
    let lock = || queue.lock().unwrap_or_else(PoisonError::into_inner);
    let mut state = lock();
    loop {
        if state.refusal.is_some() {
            wake.notify_all();
            return;
        }
        let resident = state.running + state.aside.len();
        let start_new =
            !state.waiting.is_empty() && (resident < launch.options.resident || state.aside.is_empty());
        let mut block = if let (true, Some(index)) = (start_new, state.waiting.front().copied()) {
            state.waiting.pop_front();
            let mut block = state.idle.pop().unwrap_or_else(Block::empty);
            state.running += 1;
            drop(state);
            block.reset(launch, index);
            block
        } else if let Some(place) = state.hopeful() {
            let Some(mut aside) = state.aside.remove(place) else { continue };
            state.running += 1;
            aside.block.look_afresh(state.changes);
            drop(state);
            aside.block
        } else if let (0, Some(aside)) = (state.running, state.aside.front()) {
            let refusal = deadlock(launch, aside, state.aside.len() - 1);
            state.refusal = Some((aside.block.index, refusal));
            continue;
        } else if state.running > 0 {
            state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        } else {
            wake.notify_all();
            return;
        };
        let result = block.run(launch, counters);
        state = lock();
        state.running -= 1;
        match result {
            Ok(Progress::Finished) => {
                state.changes += 1;
                state.idle.push(block);
            }
            Ok(Progress::Paused { repeats }) => {
                let certain = repeats && block.changes_seen == state.changes;
                state.changes += u64::from(block.changed_in_slice);
                let repeats_at = certain.then_some(state.changes);
                state.aside.push_back(Aside { block, repeats_at });
            }
            Err(refusal) => {
                let index = block.index;
                if state.refusal.as_ref().is_none_or(|(other, _)| index < *other) {
                    state.refusal = Some((index, refusal));
                }
            }
        }
        wake.notify_all();
    }
}

fn deadlock(launch: &Launch, aside: &Aside, others: usize) -> Refusal {
    let block = &aside.block;
    let spinning = block.warps.iter().enumerate().find_map(|(w, warp)| {
        warp.groups.iter().find(|group| group.wait == crate::warp::Wait::Ready).map(|group| (w, *group))
    });
    let (w, group) =
        spinning.unwrap_or((0, crate::warp::Group { pc: 0, mask: 1, wait: crate::warp::Wait::Ready }));
    let text = format!(
        "the thread spins for ever: its state repeats, no block changes memory, and {others} other blocks wait or spin too"
    );
    let fault = crate::fault::Fault::new(Complaint::Deadlock, group.mask.trailing_zeros(), text);
    block.refuse(launch, w, group.pc, &fault)
}
