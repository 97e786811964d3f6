//! Happens-before among the threads of a block.
//!
//! Each warp counts its synchronisations; the count at an access is the access's *generation*. Every warp
//! knows, for every other warp, up to which generation its accesses are ordered before its own next ones
//! (a vector clock per warp). Within a warp, lanes are ordered by `bar.warp.sync` and by block barriers; shuffles
//! and votes order nothing, as CUDA says.

use std::collections::HashMap;

/// Vector clocks of one block.
#[derive(Debug, Default)]
pub(crate) struct Order {
    warps: usize,
    generation: Vec<u32>,
    /// `known[w * warps + v]`: accesses of warp v up to this generation are ordered before warp w.
    known: Vec<u32>,
    lanes: Vec<Lanes>,
    /// What a relaxed store of each warp publishes: its knowledge at its last fence.
    fenced: Vec<Option<Vec<u32>>>,
    /// What relaxed loads of each warp have seen, to be acquired by its next fence.
    observed: Vec<Option<Vec<u32>>>,
    /// Knowledge published at an address.
    flags: HashMap<u64, Vec<u32>>,
}

#[derive(Debug, Default, Clone)]
struct Lanes {
    /// All lanes know each other's accesses up to this generation.
    base: u32,
    /// After synchronisations of some lanes only: what lane i knows of lane j.
    partial: Option<Box<[[u32; 32]; 32]>>,
}

fn join(into: &mut [u32], from: &[u32]) {
    for (a, b) in into.iter_mut().zip(from) {
        *a = (*a).max(*b);
    }
}

impl Order {
    pub(crate) fn reset(&mut self, warps: usize) {
        *self = Self {
            warps,
            generation: vec![1; warps],
            known: vec![0; warps * warps],
            lanes: vec![Lanes::default(); warps],
            fenced: vec![None; warps],
            observed: vec![None; warps],
            flags: HashMap::new(),
        };
    }

    #[inline]
    pub(crate) fn generation(&self, warp: usize) -> u32 {
        self.generation[warp]
    }

    /// Whether an access of `thread` at `generation` is ordered before what lane `lane` of `warp` does now.
    #[inline]
    pub(crate) fn before(&self, warp: usize, lane: usize, thread: usize, generation: u32) -> bool {
        let (other, other_lane) = (thread / 32, thread % 32);
        if other != warp {
            return self.known[warp * self.warps + other] >= generation;
        }
        other_lane == lane || self.before_lane(warp, lane, other_lane, generation)
    }

    /// The same within one warp, for two different lanes.
    #[inline]
    pub(crate) fn before_lane(&self, warp: usize, lane: usize, other: usize, generation: u32) -> bool {
        let lanes = &self.lanes[warp];
        generation <= lanes.base
            || lanes.partial.as_ref().is_some_and(|partial| partial[lane][other] >= generation)
    }

    fn snapshot(&self, warp: usize) -> Vec<u32> {
        let mut clock = self.known[warp * self.warps..(warp + 1) * self.warps].to_vec();
        clock[warp] = self.generation[warp];
        clock
    }

    fn acquire(&mut self, warp: usize, clock: &[u32]) {
        join(&mut self.known[warp * self.warps..(warp + 1) * self.warps], clock);
        let lanes = &mut self.lanes[warp];
        lanes.base = lanes.base.max(clock[warp].min(self.generation[warp]));
    }

    /// Lanes of `mask` have met; `live` are all lanes that have not ended.
    pub(crate) fn warp_barrier(&mut self, warp: usize, mask: u32, live: u32) {
        let generation = self.generation[warp];
        let lanes = &mut self.lanes[warp];
        if mask & live == live {
            lanes.base = generation;
            lanes.partial = None;
        } else {
            let base = lanes.base;
            let partial = lanes.partial.get_or_insert_with(|| Box::new([[base; 32]; 32]));
            let mut joined = [0; 32];
            for lane in (0..32).filter(|lane| mask >> lane & 1 == 1) {
                join(&mut joined, &partial[lane]);
                joined[lane] = generation;
            }
            for lane in (0..32).filter(|lane| mask >> lane & 1 == 1) {
                partial[lane] = joined;
            }
        }
        self.generation[warp] += 1;
    }

    /// A warp arrives at a barrier of the block: its knowledge joins the barrier's.
    pub(crate) fn arrive(&mut self, warp: usize, barrier: &mut Vec<u32>) {
        barrier.resize(self.warps, 0);
        join(barrier, &self.snapshot(warp));
        self.generation[warp] += 1;
    }

    /// A warp leaves a barrier of the block, with the barrier's knowledge.
    pub(crate) fn leave(&mut self, warp: usize, barrier: &[u32]) {
        join(&mut self.known[warp * self.warps..(warp + 1) * self.warps], barrier);
        self.lanes[warp].base = self.generation[warp];
        self.lanes[warp].partial = None;
        self.generation[warp] += 1;
    }

    /// `fence` or `membar`.
    pub(crate) fn fence(&mut self, warp: usize) {
        if let Some(clock) = self.observed[warp].take() {
            self.acquire(warp, &clock);
        }
        self.fenced[warp] = Some(self.snapshot(warp));
        self.generation[warp] += 1;
    }

    /// A strong store to `address`.
    pub(crate) fn publish(&mut self, warp: usize, address: u64, release: bool) {
        if release {
            self.fenced[warp] = Some(self.snapshot(warp));
            self.generation[warp] += 1;
        }
        if let Some(clock) = &self.fenced[warp] {
            let flag = self.flags.entry(address).or_insert_with(|| vec![0; clock.len()]);
            join(flag, clock);
        }
    }

    /// A strong load from `address`.
    pub(crate) fn observe(&mut self, warp: usize, address: u64, acquire: bool) {
        let Some(clock) = self.flags.get(&address).cloned() else { return };
        if acquire {
            self.acquire(warp, &clock);
        } else {
            let seen = self.observed[warp].get_or_insert_with(|| vec![0; clock.len()]);
            join(seen, &clock);
        }
    }
}
