//! Instructions at which lanes of a warp meet: who has come, and what they exchange.

use crate::block::{Block, Launch, lanes};
use crate::counters::Counters;
use crate::fault::Fault;
use crate::lanes::Lanes;
use crate::program::{Op, Reduction, ShuffleMode, Slot};
use crate::refusal::Complaint;
use crate::types::Type;
use crate::warp::{Group, Wait};

/// The members that a lane names; it must be one of them.
fn own_mask(masks: &Lanes, lane: usize) -> Result<u32, Fault> {
    let mask = masks[lane] as u32;
    if mask >> lane & 1 == 1 {
        return Ok(mask);
    }
    let text = format!("lane {lane} is no member of its own mask {mask:#010x}");
    Err(Fault::new(Complaint::Collective, lane as u32, text))
}

impl Block {
    /// Group `g` of warp `w` stands at an instruction that needs other lanes. Executes it for those whose
    /// partners have come; lets the others wait.
    pub(crate) fn meet(
        &mut self,
        launch: &Launch,
        counters: &mut Counters,
        w: usize,
        g: usize,
        active: u32,
    ) -> Result<(), Fault> {
        let pc = self.warps[w].groups[g].pc;
        let inst = &launch.program.insts[pc as usize];
        let members = match &inst.op {
            Op::WarpBarrier { mask } | Op::Shuffle { mask, .. } | Op::Collective { mask, .. } => *mask,
            Op::Barrier(barrier) if !barrier.aligned => {
                counters.issue(pc, active);
                self.warps[w].groups[g].pc = pc + 1;
                return self.barrier(launch, w, g, active, barrier);
            }
            op => return self.meet_aligned(launch, counters, w, g, active, op),
        };
        if let Op::WarpBarrier { .. } = inst.op {
            return self.warp_barrier(launch, counters, w, g, active, members);
        }
        self.warps[w].need(members, active, launch.program, "the mask of members")?;
        let masks = *self.warps[w].get(members);
        let live = self.warps[w].live;
        let mut ready = 0;
        let mut sets: Vec<u32> = Vec::new();
        for lane in lanes(active) {
            let mask = own_mask(&masks, lane)?;
            if sets.contains(&mask) {
                continue;
            }
            let here = lanes(active)
                .filter(|&other| masks[other] as u32 == mask)
                .fold(0, |set, other| set | 1 << other);
            if mask & live & !here == 0 {
                sets.push(mask);
                ready |= here;
            }
        }
        for mask in sets {
            let set = mask & ready;
            counters.issue(pc, set);
            match &inst.op {
                Op::Shuffle { .. } => self.shuffle(launch, w, set, &inst.op)?,
                op => self.reduce(launch, w, set, op)?,
            }
        }
        self.split_waiting(w, g, ready, pc, Wait::Members);
        Ok(())
    }

    /// The `done` lanes of the group go on; the rest waits at `pc`.
    fn split_waiting(&mut self, w: usize, g: usize, done: u32, pc: u32, wait: Wait) {
        let warp = &mut self.warps[w];
        let group = warp.groups[g];
        let rest = group.mask & !done;
        if rest == 0 {
            warp.groups[g] = Group { pc: pc + 1, mask: group.mask, wait: Wait::Ready };
            return;
        }
        warp.groups[g] = Group { pc, mask: rest, wait };
        if done & group.mask != 0 {
            warp.groups.push(Group { pc: pc + 1, mask: done & group.mask, wait: Wait::Ready });
        }
    }

    /// Instructions that every lane of the warp that has not ended must reach together.
    fn meet_aligned(
        &mut self,
        launch: &Launch,
        counters: &mut Counters,
        w: usize,
        g: usize,
        active: u32,
        op: &Op,
    ) -> Result<(), Fault> {
        let warp = &mut self.warps[w];
        let pc = warp.groups[g].pc;
        if active != warp.live {
            warp.groups[g].wait = Wait::Convergence;
            return Ok(());
        }
        counters.issue(pc, active);
        self.warps[w].groups[g].pc = pc + 1;
        self.warps[w].groups[g].wait = Wait::Ready;
        if let Op::Barrier(barrier) = op {
            return self.barrier(launch, w, g, active, barrier);
        }
        self.matrix(launch, counters, w, active, pc, op)
    }

    /// bar.warp.sync: members may stand at different ones of these instructions.
    fn warp_barrier(
        &mut self,
        launch: &Launch,
        counters: &mut Counters,
        w: usize,
        g: usize,
        active: u32,
        members: Slot,
    ) -> Result<(), Fault> {
        self.warps[w].need(members, active, launch.program, "the mask of members")?;
        let pc = self.warps[w].groups[g].pc;
        let masks = *self.warps[w].get(members);
        let live = self.warps[w].live;
        self.warps[w].groups[g].wait = Wait::Members;
        // Everyone who waits at a bar.warp.sync, with the mask it names.
        let mut waiting = [None; 32];
        for group in self.warps[w].groups.iter().filter(|group| group.wait == Wait::Members) {
            if let Op::WarpBarrier { mask } = launch.program.insts[group.pc as usize].op {
                for lane in lanes(group.mask) {
                    waiting[lane] = Some(self.warps[w].get(mask)[lane] as u32);
                }
            }
        }
        let mut open = 0;
        let mut seen: Vec<u32> = Vec::new();
        for lane in lanes(active) {
            let mask = own_mask(&masks, lane)?;
            if !seen.contains(&mask) && lanes(mask & live).all(|other| waiting[other] == Some(mask)) {
                seen.push(mask);
                open |= mask & live;
                self.order.warp_barrier(w, mask & live, live);
            }
        }
        if open == 0 {
            return Ok(());
        }
        counters.issue(pc, open);
        let warp = &mut self.warps[w];
        for i in 0..warp.groups.len() {
            let group = warp.groups[i];
            let at_barrier = matches!(launch.program.insts[group.pc as usize].op, Op::WarpBarrier { .. });
            if group.wait != Wait::Members || !at_barrier || group.mask & open == 0 {
                continue;
            }
            let rest = group.mask & !open;
            warp.groups[i] = Group { pc: group.pc + 1, mask: group.mask & open, wait: Wait::Ready };
            if rest != 0 {
                warp.groups.push(Group { pc: group.pc, mask: rest, wait: Wait::Members });
            }
        }
        Ok(())
    }

    fn shuffle(&mut self, launch: &Launch, w: usize, set: u32, op: &Op) -> Result<(), Fault> {
        let Op::Shuffle { mode, dst, predicate, src, lane: lane_slot, clamp, .. } = op else { return Ok(()) };
        let warp = &mut self.warps[w];
        warp.need(*lane_slot, set, launch.program, "the lane of the shuffle")?;
        warp.need(*clamp, set, launch.program, "the clamp of the shuffle")?;
        let (values, b, c) = (*warp.get(*src), *warp.get(*lane_slot), *warp.get(*clamp));
        let defined = warp.defined[*src as usize];
        let mut out: Lanes = [0; 32];
        let mut inside: Lanes = [0; 32];
        let mut known = 0;
        for lane in lanes(set) {
            // c packs the clamp (bits 0-4) and the mask of the segment (bits 8-12).
            let (bval, cval, segment) = (b[lane] as i64 & 31, c[lane] as i64 & 31, c[lane] as i64 >> 8 & 31);
            let own = lane as i64;
            let max_lane = own & segment | cval & !segment;
            let min_lane = own & segment;
            let (source, valid) = match mode {
                ShuffleMode::Up => (own - bval, own - bval >= max_lane),
                ShuffleMode::Down => (own + bval, own + bval <= max_lane),
                ShuffleMode::Butterfly => (own ^ bval, own ^ bval <= max_lane),
                ShuffleMode::Index => {
                    let source = min_lane | bval & !segment & 31;
                    (source, source <= max_lane)
                }
            };
            let source = if valid { source as usize & 31 } else { lane };
            if set >> source & 1 == 0 {
                let text =
                    format!("reads from lane {source}, which takes no part in the shuffle ({set:#010x})");
                return Err(Fault::new(Complaint::Collective, lane as u32, text));
            }
            out[lane] = values[source] & 0xffff_ffff;
            inside[lane] = u64::from(valid);
            known |= (defined >> source & 1) << lane;
        }
        warp.set(*dst, &out, set, known);
        warp.set(*predicate, &inside, set, u32::MAX);
        Ok(())
    }

    /// vote, match, redux and elect.
    fn reduce(&mut self, launch: &Launch, w: usize, set: u32, op: &Op) -> Result<(), Fault> {
        let Op::Collective { reduction, kind, dst, predicate, src, negate, .. } = op else { return Ok(()) };
        let warp = &mut self.warps[w];
        warp.need(*src, set, launch.program, "the operand of the collective")?;
        let values = *warp.get(*src);
        let truth = |lane: usize| (values[lane] & 1 == 1) != *negate;
        let ballot = lanes(set).filter(|&lane| truth(lane)).fold(0u32, |bits, lane| bits | 1 << lane);
        let mut second: Lanes = [0; 32];
        let out: Lanes = match reduction {
            Reduction::All => [u64::from(ballot == set); 32],
            Reduction::Any => [u64::from(ballot != 0); 32],
            Reduction::Uniform => [u64::from(ballot == set || ballot == 0); 32],
            Reduction::Ballot => [u64::from(ballot); 32],
            Reduction::MatchAny | Reduction::MatchAll => {
                let equal = |lane: usize| {
                    lanes(set)
                        .filter(|&other| values[other] == values[lane])
                        .fold(0u64, |bits, other| bits | 1 << other)
                };
                let matches: Lanes =
                    std::array::from_fn(|lane| if set >> lane & 1 == 1 { equal(lane) } else { 0 });
                if *reduction == Reduction::MatchAll {
                    let all = lanes(set).all(|lane| matches[lane] == u64::from(set));
                    second = [u64::from(all); 32];
                    [if all { u64::from(set) } else { 0 }; 32]
                } else {
                    matches
                }
            }
            Reduction::Elect => {
                let leader = set.trailing_zeros();
                second = std::array::from_fn(|lane| u64::from(lane as u32 == leader));
                [u64::from(leader); 32]
            }
            arithmetic => {
                let signed = *kind == Type::S32;
                let total = lanes(set).map(|lane| values[lane] as u32).reduce(|a, b| match arithmetic {
                    Reduction::Add => a.wrapping_add(b),
                    Reduction::Min if signed => (a as i32).min(b as i32) as u32,
                    Reduction::Max if signed => (a as i32).max(b as i32) as u32,
                    Reduction::Min => a.min(b),
                    Reduction::Max => a.max(b),
                    Reduction::And => a & b,
                    Reduction::Or => a | b,
                    _ => a ^ b,
                });
                [u64::from(total.unwrap_or(0)); 32]
            }
        };
        warp.set(*dst, &out, set, u32::MAX);
        warp.set(*predicate, &second, set, u32::MAX);
        Ok(())
    }
}
