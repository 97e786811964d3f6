//! cp.async: copies that land when they are waited for (latest) or at once (earliest). Both are legal on a
//! GPU, so a correct kernel gives the same bits under both.

use crate::fault::Fault;
use crate::global::Memory;
use crate::order::Order;
use crate::refusal::Complaint;
use crate::shared::{Shared, Who};
use std::collections::VecDeque;

/// One copy on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copy {
    pub(crate) destination: usize,
    pub(crate) bytes: usize,
    pub(crate) source: u64,
    /// Bytes to read; the rest becomes zero.
    pub(crate) source_bytes: usize,
}

/// The copies of one thread.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pipeline {
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

impl Copy {
    /// Moves the bytes, without checks.
    fn run(&self, shared: &mut Shared, memory: &Memory) -> Result<(), Fault> {
        let mut hint = 0;
        for at in (0..self.bytes).step_by(4) {
            let mut word = 0;
            for i in 0..4.min(self.source_bytes.saturating_sub(at)) {
                let address = self.source + (at + i) as u64;
                word |= memory.find(address, 1, false, &mut hint)?.read(address, 1) << (8 * i);
            }
            shared.put(self.destination + at, 4, word);
        }
        Ok(())
    }
}

impl Pipeline {
    /// Issues a copy: the destination belongs to it from now on.
    pub(crate) fn issue(
        &mut self,
        copy: Copy,
        who: Who,
        earliest: bool,
        shared: &mut Shared,
        order: &Order,
        memory: &Memory,
    ) -> Result<(), Fault> {
        shared.write(order, who, copy.destination, copy.bytes, None, false)?;
        shared.take(copy.destination, copy.bytes);
        if earliest {
            copy.run(shared, memory)?;
        }
        self.open.push(copy);
        Ok(())
    }

    pub(crate) fn commit(&mut self, shared: &mut Shared) {
        for copy in &self.open {
            shared.committed(copy.destination, copy.bytes);
        }
        self.groups.push_back(std::mem::take(&mut self.open));
    }

    /// Waits until at most `pending` groups remain, or for everything.
    pub(crate) fn wait(
        &mut self,
        pending: Option<u32>,
        who: Who,
        earliest: bool,
        shared: &mut Shared,
        order: &Order,
        memory: &Memory,
    ) -> Result<(), Fault> {
        let mut landed = Vec::new();
        while self.groups.len() > pending.unwrap_or(0) as usize {
            landed.extend(self.groups.pop_front().into_iter().flatten());
        }
        if pending.is_none() {
            landed.append(&mut self.open);
        }
        for copy in landed {
            if !earliest {
                copy.run(shared, memory)?;
            }
            shared.land(copy.destination, copy.bytes, order.generation(who.warp));
        }
        Ok(())
    }

    /// At the end of a thread nothing may be on its way.
    pub(crate) fn end(&self) -> Result<(), Fault> {
        let waiting = self.groups.iter().flatten().count();
        if self.open.is_empty() && waiting == 0 {
            return Ok(());
        }
        let text = format!(
            "the thread ends with {} cp.async copies never committed and {waiting} committed but not waited for",
            self.open.len()
        );
        Err(Fault::new(Complaint::AsyncPendingAtExit, 0, text))
    }
}
