//! Global memory: buffers with guard zones, shared by all blocks.

use crate::fault::Fault;
use crate::layout::GUARD_BYTES;
use crate::refusal::Complaint;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

/// What bytes of an output that nothing has written look like: a NaN in f32, f16 and bf16.
const POISON: u8 = 0xff;

/// Addresses below are a null pointer and what an index makes of it.
const NULL_BYTES: u64 = 1 << 32;

/// The part of an output that a kernel left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unwritten {
    /// How many bytes.
    pub bytes: usize,
    /// The offset of the first.
    pub first: usize,
}

/// One buffer. Words are atomic because blocks run on several CPU threads; a kernel that races on global
/// memory gives unspecified values here as on a GPU, never undefined behaviour.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub(crate) name: String,
    pub(crate) base: u64,
    pub(crate) bytes: usize,
    pub(crate) read_only: bool,
    words: Vec<AtomicU32>,
    /// Four bits per word, one per byte that holds a value; None when all of them do.
    defined: Option<Vec<AtomicU8>>,
    /// Bit 0: the sector of 32 bytes was read, bit 1: written.
    sectors: Vec<AtomicU8>,
}

impl Buffer {
    /// A buffer at `base`. Undefined buffers refuse reads of bytes that nothing has written.
    pub(crate) fn new(name: String, base: u64, content: &[u8], defined: bool, read_only: bool) -> Self {
        let head = (base % 4) as usize;
        let words = (head + content.len()).div_ceil(4);
        let byte = |at: usize| at.checked_sub(head).and_then(|at| content.get(at)).copied().unwrap_or(0);
        let word = |w: usize| u32::from_le_bytes(std::array::from_fn(|i| byte(4 * w + i)));
        let sectors = ((base % 32) as usize + content.len()).div_ceil(32);
        Self {
            name,
            base,
            bytes: content.len(),
            read_only,
            words: (0..words).map(|w| AtomicU32::new(word(w))).collect(),
            defined: (!defined).then(|| (0..words).map(|_| AtomicU8::new(0)).collect()),
            sectors: (0..sectors).map(|_| AtomicU8::new(0)).collect(),
        }
    }

    fn word(&self, address: u64) -> usize {
        ((address - (self.base & !3)) / 4) as usize
    }

    /// Reads up to 8 bytes that lie within the buffer at their natural alignment.
    #[inline]
    pub(crate) fn read(&self, address: u64, bytes: usize) -> u64 {
        let w = self.word(address);
        match bytes {
            8 => u64::from(self.words[w].load(Relaxed)) | u64::from(self.words[w + 1].load(Relaxed)) << 32,
            4 => u64::from(self.words[w].load(Relaxed)),
            _ => {
                let word = self.words[w].load(Relaxed) >> (8 * (address % 4));
                u64::from(word) & (u64::MAX >> (64 - 8 * bytes))
            }
        }
    }

    /// Writes up to 8 bytes; true when the memory changed.
    #[inline]
    pub(crate) fn write(&self, address: u64, bytes: usize, value: u64) -> bool {
        let w = self.word(address);
        self.define(address, bytes);
        match bytes {
            8 => {
                let old = self.read(address, 8);
                self.words[w].store(value as u32, Relaxed);
                self.words[w + 1].store((value >> 32) as u32, Relaxed);
                old != value
            }
            4 => {
                let changed = self.words[w].load(Relaxed) != value as u32;
                self.words[w].store(value as u32, Relaxed);
                changed
            }
            _ => {
                let shift = 8 * (address % 4) as u32;
                let mask = (u32::MAX >> (32 - 8 * bytes)) << shift;
                let old = self.words[w].fetch_update(Relaxed, Relaxed, |word| {
                    Some(word & !mask | (value as u32) << shift & mask)
                });
                old.unwrap_or(0) & mask != (value as u32) << shift & mask
            }
        }
    }

    /// Replaces a 4-byte word atomically; returns the old one.
    pub(crate) fn update(&self, address: u64, f: impl Fn(u32) -> u32) -> u32 {
        self.define(address, 4);
        let word = &self.words[self.word(address)];
        word.fetch_update(Relaxed, Relaxed, |old| Some(f(old))).unwrap_or(0)
    }

    fn define(&self, address: u64, bytes: usize) {
        let Some(defined) = &self.defined else { return };
        for part in 0..bytes.div_ceil(4) as u64 {
            let first = (address + 4 * part) % 4;
            let bits = ((1u16 << bytes.min(4)) - 1) << first;
            let cell = &defined[self.word(address + 4 * part)];
            if u16::from(cell.load(Relaxed)) & bits != bits {
                cell.fetch_or(bits as u8, Relaxed);
            }
        }
    }

    /// Whether every byte of the range holds a value.
    #[inline]
    pub(crate) fn is_defined(&self, address: u64, bytes: usize) -> bool {
        let Some(defined) = &self.defined else { return true };
        (0..bytes as u64).all(|i| {
            let at = address + i;
            defined[self.word(at)].load(Relaxed) >> (at % 4) & 1 == 1
        })
    }

    /// Marks the sectors of a range as read or written.
    #[inline]
    pub(crate) fn touch(&self, address: u64, bytes: usize, written: bool) {
        let start = self.base & !31;
        let bit = 1 << u8::from(written);
        for sector in (address - start) / 32..=(address + bytes as u64 - 1 - start) / 32 {
            let cell = &self.sectors[sector as usize];
            if cell.load(Relaxed) & bit == 0 {
                cell.fetch_or(bit, Relaxed);
            }
        }
    }

    /// How many sectors of 32 bytes were read and written at least once.
    pub(crate) fn touched(&self) -> (u64, u64) {
        let count = |bit: u8| self.sectors.iter().filter(|cell| cell.load(Relaxed) & bit != 0).count() as u64;
        (count(1), count(2))
    }

    /// The bytes as they stand. Those that nothing has written are poison: what the caller's array held before
    /// must not pass for a result.
    pub(crate) fn content(&self) -> Vec<u8> {
        let all: Vec<u8> = self.words.iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect();
        let head = (self.base % 4) as usize;
        let mut content = all[head..head + self.bytes].to_vec();
        for at in self.holes() {
            content[at] = POISON;
        }
        content
    }

    /// How many bytes nothing has written, and the offset of the first; None when there are none.
    pub(crate) fn unwritten(&self) -> Option<Unwritten> {
        let first = self.holes().next()?;
        Some(Unwritten { bytes: self.holes().count(), first })
    }

    /// Offsets of the bytes that nothing has written.
    fn holes(&self) -> impl Iterator<Item = usize> + '_ {
        let head = (self.base % 4) as usize;
        let written = move |defined: &[AtomicU8], at: usize| {
            defined[(head + at) / 4].load(Relaxed) >> ((head + at) % 4) & 1 == 1
        };
        let tracked = self.defined.as_deref();
        tracked.into_iter().flat_map(move |defined| (0..self.bytes).filter(move |&at| !written(defined, at)))
    }
}

/// All buffers of a launch, by address.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    buffers: Vec<Buffer>,
    /// Serialises strong accesses of 8 bytes and atomics of 8 and 2, which no single word holds.
    pub(crate) wide_atomics: std::sync::Mutex<()>,
}

impl Memory {
    pub(crate) fn new(mut buffers: Vec<Buffer>) -> Self {
        buffers.sort_by_key(|buffer| buffer.base);
        Self { buffers, wide_atomics: std::sync::Mutex::new(()) }
    }

    pub(crate) fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<&Buffer> {
        self.buffers.iter().find(|buffer| buffer.name == name)
    }

    /// While this is held, 8 bytes are one piece to other blocks, as strong accesses must be.
    #[inline]
    pub(crate) fn whole(&self, wide: bool) -> Option<std::sync::MutexGuard<'_, ()>> {
        wide.then(|| self.wide_atomics.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// The buffer that holds the whole range. `hint` remembers the last one found.
    #[inline]
    pub(crate) fn find(
        &self,
        address: u64,
        bytes: usize,
        write: bool,
        hint: &mut usize,
    ) -> Result<&Buffer, Fault> {
        let inside = |buffer: &Buffer| {
            address >= buffer.base && address + bytes as u64 <= buffer.base + buffer.bytes as u64
        };
        if address > u64::MAX - 64 {
            return Err(self.outside(address, bytes, write));
        }
        if !self.buffers.get(*hint).is_some_and(inside) {
            let next = self.buffers.partition_point(|buffer| buffer.base <= address);
            *hint = next.saturating_sub(1);
        }
        match self.buffers.get(*hint) {
            Some(buffer) if inside(buffer) => {
                if !address.is_multiple_of(bytes as u64) {
                    let text = format!(
                        "address {address:#x} (`{}` + {}) is no multiple of the access's {bytes} bytes",
                        buffer.name,
                        address - buffer.base
                    );
                    return Err(Fault::new(Complaint::Misaligned, 0, text));
                }
                if write && buffer.read_only {
                    let text = format!("`{}` + {} is read-only", buffer.name, address - buffer.base);
                    return Err(Fault::new(Complaint::ReadOnly, 0, text));
                }
                Ok(buffer)
            }
            _ => Err(self.outside(address, bytes, write)),
        }
    }

    fn outside(&self, address: u64, bytes: usize, write: bool) -> Fault {
        let verb = if write { "write" } else { "read" };
        if address < NULL_BYTES {
            let text =
                format!("{verb} of {bytes} bytes at {address:#x}: a null pointer, or an index from one");
            return Fault::new(Complaint::OutOfBounds, 0, text);
        }
        let distance = |buffer: &Buffer| {
            let end = buffer.base + buffer.bytes as u64;
            buffer.base.saturating_sub(address).max(address.saturating_sub(end.saturating_sub(1)))
        };
        let nearest = self.buffers.iter().min_by_key(|buffer| distance(buffer));
        let place = match nearest {
            None => "the launch has no buffers".to_owned(),
            Some(buffer) if distance(buffer) > GUARD_BYTES => "no buffer is near".to_owned(),
            Some(buffer) => {
                let offset = i128::from(address) - i128::from(buffer.base);
                format!("the nearest is `{}` of {} bytes, at its offset {offset}", buffer.name, buffer.bytes)
            }
        };
        let text = format!("{verb} of {bytes} bytes at {address:#x}, outside every buffer; {place}");
        Fault::new(Complaint::OutOfBounds, 0, text)
    }
}
