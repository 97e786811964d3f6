//! Large memory: huge pages behind it, and scratch that is kept between calls.

use crate::gemm::tile::Tile;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

const HUGE: usize = 2 << 20;

/// Ask for huge pages behind a freshly allocated output of several megabytes.
///
/// The first write to each page costs a fault; with 4 KiB pages the faults of a decoded 4096 x 4096
/// matrix take longer than decoding it. This is advice: where the system has none to give, nothing
/// changes.
#[cfg(target_os = "linux")]
pub fn advise_huge_pages<T>(output: &mut [T]) {
    let start = (output.as_mut_ptr() as usize).next_multiple_of(HUGE);
    let end = output.as_mut_ptr() as usize + size_of_val(output);
    if end > start && end - start >= HUGE {
        let length = (end - start) / HUGE * HUGE;
        // SAFETY: the range lies inside `output`, and this advice changes no contents.
        unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_HUGEPAGE) };
    }
}

/// Other systems choose page sizes themselves.
#[cfg(not(target_os = "linux"))]
pub fn advise_huge_pages<T>(_: &mut [T]) {}

/// Tiles for one call, from memory that the thread's earlier calls left behind; what they hold is
/// unspecified.
///
/// A call needs a few megabytes, whose page faults would cost as much as its arithmetic if they were
/// allocated anew. Each thread keeps its own, so there is no lock to wait for or to inherit in a
/// forked child.
pub struct Scratch {
    buffer: Option<Buffer>,
    length: usize,
}

struct Buffer {
    first: NonNull<Tile>,
    layout: Layout,
}

// SAFETY: a buffer owns its memory, which holds plain integers; sharing it gives read access only.
unsafe impl Sync for Buffer {}

// SAFETY: as above.
unsafe impl Send for Buffer {}

thread_local! {
    /// Buffers that no call of this thread is using, smallest first.
    static KEPT: RefCell<Vec<Buffer>> = const { RefCell::new(Vec::new()) };
}

/// A call holds four at a time: activations, scales, weights and sums.
const MOST_KEPT: usize = 4;

const FLOATS_PER_TILE: usize = size_of::<Tile>() / size_of::<f32>();

impl Scratch {
    /// `length` tiles.
    #[must_use]
    pub fn take(length: usize) -> Self {
        let bytes = length * size_of::<Tile>();
        // A thread that is ending has no kept buffers any more.
        let kept = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            let fits = kept.iter().position(|buffer| buffer.layout.size() >= bytes)?;
            Some(kept.remove(fits))
        });
        Self { buffer: Some(kept.ok().flatten().unwrap_or_else(|| Buffer::allocate(bytes))), length }
    }
}

impl Scratch {
    /// The same memory as floats.
    #[must_use]
    pub fn as_floats(&self) -> &[f32] {
        let tiles: &[Tile] = self;
        // SAFETY: a tile is 256 words of 32 bits without padding, each of which is also an f32.
        unsafe { std::slice::from_raw_parts(tiles.as_ptr().cast(), tiles.len() * FLOATS_PER_TILE) }
    }

    /// The same memory as floats.
    #[must_use]
    pub fn as_floats_mut(&mut self) -> &mut [f32] {
        let tiles: &mut [Tile] = self;
        // SAFETY: as in `as_floats`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(tiles.as_mut_ptr().cast(), tiles.len() * FLOATS_PER_TILE) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(buffer) = self.buffer.take() else { return };
        // Where the thread is ending, the buffer is freed instead of kept.
        let _ = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            let place = kept.partition_point(|other| other.layout.size() < buffer.layout.size());
            kept.insert(place, buffer);
            if kept.len() > MOST_KEPT {
                kept.remove(0);
            }
        });
    }
}

impl Deref for Scratch {
    type Target = [Tile];

    fn deref(&self) -> &[Tile] {
        self.buffer.as_ref().map_or(&[], |buffer| {
            // SAFETY: the buffer holds at least `length` tiles, zeroed when it was allocated, and is
            // this value's alone.
            unsafe { std::slice::from_raw_parts(buffer.first.as_ptr(), self.length) }
        })
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [Tile] {
        let length = self.length;
        self.buffer.as_mut().map_or(&mut [], |buffer| {
            // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
            unsafe { std::slice::from_raw_parts_mut(buffer.first.as_ptr(), length) }
        })
    }
}

impl Buffer {
    fn allocate(bytes: usize) -> Self {
        let align = if bytes >= HUGE / 2 { HUGE } else { align_of::<Tile>() };
        // Powers of two, so that slightly larger requests find a buffer that fits.
        let size = bytes.max(align).next_power_of_two();
        let Ok(layout) = Layout::from_size_align(size, align) else {
            unreachable!("sizes were checked when the matrix was built")
        };
        // SAFETY: the layout is not empty. The advice concerns the memory just allocated; asked for
        // before anything is written, it decides how the first faults are served.
        unsafe {
            // The layout is aligned for tiles.
            #[allow(clippy::cast_ptr_alignment)]
            let Some(first) = NonNull::new(alloc_zeroed(layout).cast::<Tile>()) else {
                handle_alloc_error(layout)
            };
            advise_huge_pages(std::slice::from_raw_parts_mut(first.as_ptr(), size / size_of::<Tile>()));
            Self { first, layout }
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and dropped once.
        unsafe { dealloc(self.first.as_ptr().cast(), self.layout) };
    }
}
