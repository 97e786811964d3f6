//! Barriers of a block: bar.sync, bar.arrive, bar.red and barrier.sync.

use crate::block::{BarrierState, Block, Launch, lanes, optional};
use crate::fault::{Fault, Other};
use crate::program::{Barrier, NONE, Reduction};
use crate::refusal::Complaint;
use crate::warp::Wait;

impl Block {
    /// Lanes `active` of warp `w` (group `g`, already past the instruction) arrive at a barrier.
    pub(crate) fn barrier(
        &mut self,
        launch: &Launch,
        w: usize,
        g: usize,
        active: u32,
        barrier: &Barrier,
    ) -> Result<(), Fault> {
        let warp = &self.warps[w];
        warp.need(barrier.id, active, launch.program, "the number of the barrier")?;
        let first = active.trailing_zeros() as usize;
        let id = warp.get(barrier.id)[first] as usize;
        let count = optional(barrier.count).map(|slot| warp.get(slot)[first] as u32);
        let uniform = lanes(active).all(|lane| warp.get(barrier.id)[lane] as usize == id);
        if id >= 16 || !uniform {
            let text = format!("barrier {id} is not one of 0 to 15, the same for all lanes of the warp");
            return Err(Fault::new(Complaint::DivergentBarrier, first as u32, text));
        }
        if count.is_some_and(|count| {
            count == 0 || count % 32 != 0 || count > launch.threads().next_multiple_of(32)
        }) {
            let text = format!(
                "barrier {id} expects {} threads, not a multiple of 32 that the block of {} has",
                count.unwrap_or(0),
                launch.threads()
            );
            return Err(Fault::new(Complaint::DivergentBarrier, first as u32, text));
        }
        let mut votes = 0;
        if let Some((_, predicate, negated, _)) = barrier.reduction {
            warp.need(predicate, active, launch.program, "the predicate of the barrier")?;
            votes =
                lanes(active).filter(|&lane| (warp.get(predicate)[lane] & 1 == 1) != negated).count() as u32;
        }
        let state = &mut self.barriers[id];
        if state.arrived > 0 && state.expected != count {
            let text =
                format!("barrier {id} expects {count:?} threads here and {:?} elsewhere", state.expected);
            return Err(Fault::new(Complaint::DivergentBarrier, first as u32, text));
        }
        state.expected = count;
        state.arrived += active.count_ones();
        state.arrived_in_warps += if barrier.aligned { 32 } else { active.count_ones() };
        state.votes += votes;
        self.order.arrive(w, &mut state.clock);
        if let Some((reduction, _, _, dst)) = barrier.reduction {
            state.reduction = Some(reduction);
            state.results.push((w, active, dst));
        }
        if !barrier.arrive {
            state.waiting.push((w, active));
            self.warps[w].groups[g].wait = Wait::Barrier(id as u32);
        }
        self.changed = true;
        self.open_complete_barriers(launch)
    }

    /// Opens every barrier at which all expected threads have arrived.
    pub(crate) fn open_complete_barriers(&mut self, launch: &Launch) -> Result<(), Fault> {
        let live = self.live_threads();
        for id in 0..self.barriers.len() {
            let state = &self.barriers[id];
            let complete = match state.expected {
                _ if state.arrived == 0 => false,
                Some(expected) if state.arrived_in_warps > expected => {
                    let text = format!(
                        "{} threads came to barrier {id}, which expects {expected}",
                        state.arrived_in_warps
                    );
                    return Err(Fault::new(Complaint::DivergentBarrier, 0, text));
                }
                Some(expected) => state.arrived_in_warps == expected,
                None => state.arrived >= live,
            };
            if !complete {
                continue;
            }
            if state.expected.is_none() && state.arrived < launch.threads() {
                self.completed_by_exits += 1;
                if launch.options.barriers {
                    self.refuse_bypasses(launch, id as u32)?;
                }
            }
            let state = std::mem::take(&mut self.barriers[id]);
            self.open(launch, id as u32, &state);
        }
        Ok(())
    }

    /// A barrier is complete because threads have ended: refuses it when one of them had gone round it.
    fn refuse_bypasses(&self, launch: &Launch, id: u32) -> Result<(), Fault> {
        let waiting = self.warps.iter().flat_map(|warp| {
            let here = warp.groups.iter().filter(|group| group.wait == Wait::Barrier(id));
            here.map(move |group| (warp, group.pc - 1, group.mask.trailing_zeros() as usize))
        });
        for (warp, pc, lane) in waiting {
            for (number, &bypass) in launch.program.bypasses.iter().enumerate() {
                for thread in 0..launch.threads() {
                    let (ended, other) = (&self.warps[thread as usize / 32], thread as usize % 32);
                    // Those who wait went the same ways as those who have ended, and then on to here.
                    let strayed = ended.passes[number][other] > warp.passes[number][lane];
                    if ended.live >> other & 1 == 0 && strayed {
                        let text = format!(
                            "barrier {id} at {} was completed by the end of threads that had gone round a barrier; \
                             all threads of the block must reach a barrier in conditional code, or none",
                            launch.program.place(pc)
                        );
                        let other = Some(Other { thread, pc: bypass, verb: "did so" });
                        return Err(Fault { complaint: Complaint::DivergentBarrier, lane: 0, text, other });
                    }
                }
            }
        }
        Ok(())
    }

    fn open(&mut self, _launch: &Launch, id: u32, state: &BarrierState) {
        let result = match state.reduction {
            Some(Reduction::Add) => state.votes,
            Some(Reduction::And) => u32::from(state.votes == state.arrived),
            _ => u32::from(state.votes > 0),
        };
        for &(w, mask, dst) in &state.results {
            if dst != NONE {
                self.warps[w].set(dst, &[u64::from(result); 32], mask, u32::MAX);
            }
        }
        for &(w, mask) in &state.waiting {
            self.order.leave(w, &state.clock);
            for group in &mut self.warps[w].groups {
                if group.wait == Wait::Barrier(id) && group.mask & mask != 0 {
                    group.wait = Wait::Ready;
                }
            }
        }
        self.changed = true;
    }
}
