//! One instruction of one group of lanes.

use crate::block::{Block, Launch, lanes};
use crate::convert::convert_lanes;
use crate::counters::Counters;
use crate::fault::Fault;
use crate::lanes::Lanes;
use crate::layout::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_BYTES};
use crate::program::{NONE, Op, Slot};
use crate::refusal::Complaint;
use crate::types::Space;
use crate::warp::{Group, Wait};

impl Block {
    /// Executes the instruction at which group `g` of warp `w` stands.
    #[inline]
    pub(crate) fn step(
        &mut self,
        launch: &Launch,
        counters: &mut Counters,
        w: usize,
        g: usize,
    ) -> Result<(), Fault> {
        let program = launch.program;
        let warp = &mut self.warps[w];
        let Group { pc, mask, .. } = warp.groups[g];
        let inst = &program.insts[pc as usize];
        let count = &mut counters.counts[pc as usize];
        let mut active = mask;
        if inst.guard != NONE {
            warp.need(inst.guard, mask, program, "the guard")?;
            let guard = warp.get(inst.guard);
            let mut bits = 0;
            for lane in 0..32 {
                bits |= ((guard[lane] & 1) as u32) << lane;
            }
            active &= if inst.negate { !bits } else { bits };
        }
        warp.clock += 1;
        let waits = matches!(
            inst.op,
            Op::Barrier(_)
                | Op::WarpBarrier { .. }
                | Op::Shuffle { .. }
                | Op::Collective { .. }
                | Op::LoadMatrix { .. }
                | Op::StoreMatrix { .. }
                | Op::MoveMatrix { .. }
                | Op::Multiply(_)
                | Op::WmmaLoad(_)
                | Op::WmmaStore(_)
        );
        if waits {
            if active != mask {
                // Lanes whose guard is false pass by; the others wait here.
                count.divergent += u64::from(active != 0);
                if let Op::Barrier(barrier) = &inst.op {
                    warp.pass(barrier.bypass, mask & !active);
                }
                warp.groups[g].pc = pc + 1;
                warp.groups[g].mask = mask & !active;
                if active != 0 {
                    warp.groups.push(Group { pc, mask: active, wait: Wait::Ready });
                    let last = warp.groups.len() - 1;
                    return self.meet(launch, counters, w, last, active);
                }
                return Ok(());
            }
            return self.meet(launch, counters, w, g, active);
        }
        count.warps += 1;
        count.threads += u64::from(active.count_ones());
        let mut next = pc + 1;
        match &inst.op {
            Op::Lanewise { kernel, dst, dst2, src } => {
                let [a, b, c, d] = *src;
                let mut out: Lanes = [0; 32];
                let mut out2: Lanes = [0; 32];
                kernel(&[warp.get(a), warp.get(b), warp.get(c), warp.get(d)], &mut out, &mut out2);
                let defined = warp.defined[a as usize]
                    & warp.defined[b as usize]
                    & warp.defined[c as usize]
                    & warp.defined[d as usize];
                warp.set(*dst, &out, active, defined);
                if *dst2 != NONE {
                    warp.set(*dst2, &out2, active, defined);
                }
            }
            Op::Convert { convert, dst, a, b } => {
                let mut out: Lanes = [0; 32];
                let low = if *b == NONE { None } else { Some(warp.get(*b)) };
                convert_lanes(convert, warp.get(*a), low, &mut out);
                let second = if *b == NONE { *a } else { *b };
                let defined = warp.defined[*a as usize] & warp.defined[second as usize];
                warp.set(*dst, &out, active, defined);
            }
            Op::Compare { .. } => self.compare(&inst.op, w, active),
            Op::Select { dst, a, b, predicate } => {
                let (x, y, p) = (warp.get(*a), warp.get(*b), warp.get(*predicate));
                let out: Lanes = std::array::from_fn(|lane| if p[lane] & 1 == 1 { x[lane] } else { y[lane] });
                let mut chosen = 0;
                for lane in 0..32 {
                    chosen |= ((p[lane] & 1) as u32) << lane;
                }
                let defined = warp.defined[*predicate as usize]
                    & (chosen & warp.defined[*a as usize] | !chosen & warp.defined[*b as usize]);
                warp.set(*dst, &out, active, defined);
            }
            Op::Pack { dst, parts, bits } => {
                let mut out: Lanes = [0; 32];
                let mut defined = u32::MAX;
                for (i, &part) in parts.iter().enumerate() {
                    let values = warp.get(part);
                    let mask = u64::MAX >> (64 - bits);
                    for lane in 0..32 {
                        out[lane] |= (values[lane] & mask) << (*bits as usize * i);
                    }
                    defined &= warp.defined[part as usize];
                }
                warp.set(*dst, &out, active, defined);
            }
            Op::Unpack { parts, src, bits } => {
                let values = *warp.get(*src);
                let defined = warp.defined[*src as usize];
                for (i, &part) in parts.iter().enumerate() {
                    let shift = *bits as usize * i;
                    let out: Lanes = values.map(|value| value >> shift & (u64::MAX >> (64 - bits)));
                    warp.set(part, &out, active, defined);
                }
            }
            Op::Branch { target, bypasses } => {
                if *bypasses != [NONE; 2] {
                    warp.pass(bypasses[0], active);
                    warp.pass(bypasses[1], mask & !active);
                }
                if active == mask {
                    next = *target;
                } else if active != 0 {
                    count.divergent += 1;
                    warp.groups[g].mask = mask & !active;
                    warp.groups[g].pc = next;
                    warp.groups.push(Group { pc: *target, mask: active, wait: Wait::Ready });
                    return Ok(());
                }
            }
            Op::BranchTable { index, targets } => {
                warp.need(*index, active, program, "the index of the branch")?;
                let index = *warp.get(*index);
                let mut rest = mask & !active;
                let mut groups: Vec<Group> = Vec::new();
                for lane in lanes(active) {
                    let Some(&target) = targets.get(index[lane] as usize) else {
                        rest |= 1 << lane;
                        continue;
                    };
                    match groups.iter_mut().find(|group| group.pc == target) {
                        Some(group) => group.mask |= 1 << lane,
                        None => groups.push(Group { pc: target, mask: 1 << lane, wait: Wait::Ready }),
                    }
                }
                count.divergent += u64::from(groups.len() + usize::from(rest != 0) > 1);
                if rest == 0 {
                    let first = groups.swap_remove(0);
                    warp.groups[g] = first;
                } else {
                    warp.groups[g] = Group { pc: next, mask: rest, wait: Wait::Ready };
                }
                warp.groups.extend(groups);
                return Ok(());
            }
            Op::Exit => return self.exit(launch, w, g, active),
            Op::Trap(why) if active != 0 => {
                return Err(Fault::new(Complaint::Trap, active.trailing_zeros(), why.as_str()));
            }
            Op::Clock { dst, bits } => {
                let now = warp.clock & (u64::MAX >> (64 - bits));
                warp.set(*dst, &[now; 32], active, u32::MAX);
            }
            Op::ActiveMask { dst } => {
                warp.set(*dst, &[u64::from(active); 32], active, u32::MAX);
            }
            Op::IsSpace { dst, src, space } => {
                let addresses = *warp.get(*src);
                let defined = warp.defined[*src as usize];
                let out = addresses.map(|address| u64::from(space_of(address) == *space));
                warp.set(*dst, &out, active, defined);
            }
            Op::Load(access) => self.load(launch, count, w, active, pc, access)?,
            Op::Store(access) => self.store(launch, count, w, active, pc, access)?,
            Op::Atomic(atomic) => self.atomic(launch, count, w, active, pc, atomic)?,
            Op::AsyncCopy(copy) => self.async_copy(launch, count, w, active, pc, copy)?,
            Op::AsyncCommit => {
                for lane in lanes(active) {
                    self.pipelines[32 * w + lane].commit(&mut self.shared);
                }
            }
            Op::AsyncWait(pending) => self.async_wait(launch, w, active, pc, *pending)?,
            Op::Fence if active != 0 => self.order.fence(w),
            _ => {}
        }
        self.warps[w].groups[g].pc = next;
        Ok(())
    }

    fn compare(&mut self, op: &Op, w: usize, active: u32) {
        let Op::Compare { kernel, accepted, combine, dst, dst2, a, b, set, packed } = op else { return };
        let warp = &mut self.warps[w];
        let mut defined = warp.defined[*a as usize] & warp.defined[*b as usize];
        let mut ordering: Lanes = [0; 32];
        let mut unused: Lanes = [0; 32];
        let (x, y) = (*warp.get(*a), *warp.get(*b));
        kernel(&[&x, &y, &x, &x], &mut ordering, &mut unused);
        let truth = |orderings: &Lanes| orderings.map(|found| u64::from(found as u8 & accepted != 0));
        let mut first = truth(&ordering);
        // `p|q`: q is the complement, or for pairs of halves the high half.
        let mut second = if *packed {
            let (x, y) = (x.map(|v| v >> 16), y.map(|v| v >> 16));
            kernel(&[&x, &y, &x, &x], &mut ordering, &mut unused);
            truth(&ordering)
        } else {
            first.map(|value| value ^ 1)
        };
        if let Some((combine, slot, negated)) = combine {
            let other = *warp.get(*slot);
            defined &= warp.defined[*slot as usize];
            for lane in 0..32 {
                let c = other[lane] & 1 ^ u64::from(*negated);
                first[lane] = combine.apply(first[lane], c);
                second[lane] = combine.apply(second[lane], c);
            }
        }
        if let Some(value) = set {
            first = first.map(|truth| truth * value);
        }
        warp.set(*dst, &first, active, defined);
        if *dst2 != NONE {
            warp.set(*dst2, &second, active, defined);
        }
    }

    /// Lanes end. Groups that waited for them look again.
    fn exit(&mut self, launch: &Launch, w: usize, g: usize, active: u32) -> Result<(), Fault> {
        for lane in lanes(active) {
            self.pipelines[32 * w + lane].end().map_err(|fault| fault.at(lane))?;
        }
        let warp = &mut self.warps[w];
        warp.live &= !active;
        warp.groups[g].mask &= !active;
        warp.groups[g].pc += 1;
        if warp.groups[g].mask == 0 {
            warp.groups.swap_remove(g);
        }
        for group in &mut warp.groups {
            if matches!(group.wait, Wait::Convergence | Wait::Members) {
                group.wait = Wait::Ready;
            }
        }
        self.changed = true;
        self.open_complete_barriers(launch)
    }
}

/// The space that a generic address points into, and global for everything outside the windows.
pub(crate) fn space_of(address: u64) -> Space {
    let within = |window: u64| address >= window && address < window + WINDOW_BYTES;
    if within(SHARED_WINDOW) {
        Space::Shared
    } else if within(LOCAL_WINDOW) {
        Space::Local
    } else if within(PARAM_WINDOW) {
        Space::Param
    } else {
        Space::Global
    }
}

/// A generic address → its space and its address there.
#[inline]
pub(crate) fn resolve(space: Space, address: u64) -> (Space, u64) {
    if space != Space::Generic {
        return (space, address);
    }
    match space_of(address) {
        Space::Shared => (Space::Shared, address - SHARED_WINDOW),
        Space::Local => (Space::Local, address - LOCAL_WINDOW),
        Space::Param => (Space::Param, address - PARAM_WINDOW),
        _ => (Space::Global, address),
    }
}

/// Slots that are present.
pub(crate) fn present(slots: &[Slot]) -> impl Iterator<Item = Slot> + '_ {
    slots.iter().copied().filter(|&slot| slot != NONE)
}
