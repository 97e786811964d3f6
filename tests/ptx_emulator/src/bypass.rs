//! Ways round a barrier: branches by which a thread misses a `bar.sync` that others reach.
//!
//! A barrier without a count waits for the threads that have not ended. So `if (i >= n) return;` before it is
//! right, and `if (i < n) __syncthreads();` is not, although the end of the threads that went round completes
//! the barrier too: code that holds a barrier must be reached by all threads of the block or by none. The two
//! differ in where the ways meet again: at the end of the kernel, or before it.

use crate::program::{Inst, NONE, Op};
use std::collections::HashSet;

fn successors(insts: &[Inst], pc: usize) -> Vec<usize> {
    let guarded = insts[pc].guard != NONE;
    match &insts[pc].op {
        Op::Exit if guarded => vec![insts.len(), pc + 1],
        Op::Exit => vec![insts.len()],
        Op::Branch { target, .. } if guarded => vec![*target as usize, pc + 1],
        Op::Branch { target, .. } => vec![*target as usize],
        Op::BranchTable { targets, .. } => targets.iter().map(|&to| to as usize).chain([pc + 1]).collect(),
        _ => vec![pc + 1],
    }
}

/// The nearest instruction that every way from each instruction to the end passes; the number of instructions
/// stands for the end itself. Cooper, Harvey and Kennedy's iteration on the reversed graph.
fn meeting_points(after: &[Vec<usize>]) -> Vec<Option<usize>> {
    let end = after.len();
    let mut before = vec![Vec::new(); end + 1];
    for (pc, next) in after.iter().enumerate() {
        for &to in next {
            before[to].push(pc);
        }
    }
    // Postorder from the end, by a stack of (node, how many of its predecessors were taken).
    let mut rank = vec![usize::MAX; end + 1];
    let mut order = Vec::new();
    let mut seen = vec![false; end + 1];
    let mut stack = vec![(end, 0)];
    seen[end] = true;
    while let Some((node, taken)) = stack.pop() {
        if let Some(&next) = before[node].get(taken) {
            stack.push((node, taken + 1));
            if !std::mem::replace(&mut seen[next], true) {
                stack.push((next, 0));
            }
        } else {
            rank[node] = order.len();
            order.push(node);
        }
    }
    let mut meet = vec![None; end + 1];
    meet[end] = Some(end);
    let mut changed = true;
    while changed {
        changed = false;
        for &node in order.iter().rev().filter(|&&node| node != end) {
            let mut found: Option<usize> = None;
            for &next in after[node].iter().filter(|&&next| meet[next].is_some()) {
                let Some(mut other) = found else {
                    found = Some(next);
                    continue;
                };
                let mut next = next;
                while next != other {
                    let lower = if rank[next] < rank[other] { &mut next } else { &mut other };
                    *lower = meet[*lower].unwrap_or(end);
                }
                found = Some(next);
            }
            if meet[node] != found {
                meet[node] = found;
                changed = true;
            }
        }
    }
    meet
}

/// Whether nothing but the end of the kernel comes from here on.
fn ends(insts: &[Inst], mut pc: usize) -> bool {
    for _ in 0..insts.len() {
        match insts.get(pc) {
            None => return true,
            Some(Inst { op: Op::Exit, guard: NONE, .. }) => return true,
            Some(Inst { op: Op::Branch { target, .. }, guard: NONE, .. }) => pc = *target as usize,
            _ => return false,
        }
    }
    false
}

/// Whether a barrier without a count is reached from `start` before `stop`.
fn leads_to_barrier(insts: &[Inst], after: &[Vec<usize>], start: usize, stop: usize) -> bool {
    let mut seen = HashSet::new();
    let mut stack = vec![start];
    while let Some(pc) = stack.pop() {
        if pc == stop || pc == insts.len() || !seen.insert(pc) {
            continue;
        }
        if is_barrier(&insts[pc]) {
            return true;
        }
        stack.extend(&after[pc]);
    }
    false
}

fn is_barrier(inst: &Inst) -> bool {
    matches!(&inst.op, Op::Barrier(barrier) if barrier.count == NONE)
}

/// Finds the ways round barriers: sides of branches, and of guards of barriers, that reach no barrier where the
/// other side does. Numbers them in their instructions, and returns the program counter of each.
pub(crate) fn find(insts: &mut [Inst]) -> Vec<u32> {
    let mut found = Vec::new();
    if !insts.iter().any(is_barrier) {
        return found;
    }
    let after: Vec<Vec<usize>> = (0..insts.len()).map(|pc| successors(insts, pc)).collect();
    let meet = meeting_points(&after);
    for pc in 0..insts.len() {
        if insts[pc].guard == NONE {
            continue;
        }
        let Some(stop) = meet[pc].filter(|&stop| !ends(insts, stop)) else { continue };
        let target = match &insts[pc].op {
            Op::Branch { target, .. } => *target as usize,
            _ => stop,
        };
        let leads = [target, pc + 1].map(|start| leads_to_barrier(insts, &after, start, stop));
        let next = found.len() as u32;
        match &mut insts[pc].op {
            // Side 0 is taken where the guard is true.
            Op::Branch { bypasses, .. } if leads[0] != leads[1] => bypasses[usize::from(leads[0])] = next,
            Op::Barrier(barrier) if barrier.count == NONE => barrier.bypass = next,
            _ => continue,
        }
        found.push(pc as u32);
    }
    found
}
