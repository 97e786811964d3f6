//! What goes wrong inside an instruction, before the place is known.

use crate::refusal::Complaint;

/// The other side of a conflict.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Other {
    pub(crate) thread: u32,
    pub(crate) pc: u32,
    pub(crate) verb: &'static str,
}

/// A mistake of one lane; the caller adds kernel, line and thread.
#[derive(Clone, Debug)]
pub(crate) struct Fault {
    pub(crate) complaint: Complaint,
    pub(crate) lane: u32,
    pub(crate) text: String,
    pub(crate) other: Option<Other>,
}

impl Fault {
    pub(crate) fn new(complaint: Complaint, lane: u32, text: impl Into<String>) -> Self {
        Self { complaint, lane, text: text.into(), other: None }
    }

    pub(crate) fn at(mut self, lane: usize) -> Self {
        self.lane = lane as u32;
        self
    }
}
