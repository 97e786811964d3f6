//! Large memory: huge pages behind it, and scratch that is kept between calls.

use crate::gemm::tile::Tile;
use half::bf16;
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

/// A call holds seven at a time: in a dense backward product, beside the segment's activations, its sums
/// and all, those of every product: packed activations, sums, scales and weights.
const MOST_KEPT: usize = 7;

/// Numbers that scratch memory may be seen as.
///
/// # Safety
/// Every bit pattern must be a value, no byte padding, and a tile's alignment a multiple of the type's.
pub unsafe trait Plain: Copy {}

// SAFETY: both are plain bits of two or four bytes.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for bf16 {}

impl Scratch {
    /// `length` tiles.
    #[must_use]
    pub fn take(length: usize) -> Self {
        let bytes = length * size_of::<Tile>();
        // A thread that is ending has no kept buffers any more.
        let kept = KEPT.try_with(|kept| {
            let mut kept = kept.borrow_mut();
            let fits = kept.iter().position(|buffer| buffer.layout.size() >= bytes);
            // Where none does, the new one takes the place of the largest, whose work it can do as well:
            // kept beside it, it would be memory that nobody needs.
            if fits.is_none() {
                drop(kept.pop());
            }
            fits.map(|fits| kept.remove(fits))
        });
        Self { buffer: Some(kept.ok().flatten().unwrap_or_else(|| Buffer::allocate(bytes))), length }
    }
}

impl Scratch {
    /// Room for `count` values, aligned to a cache line: vectors that cross a line cost two loads.
    #[must_use]
    pub fn of<T: Plain>(count: usize) -> Self {
        Self::take((count * size_of::<T>()).div_ceil(size_of::<Tile>()))
    }

    /// The memory as numbers of some kind.
    #[must_use]
    pub fn values<T: Plain>(&self) -> &[T] {
        let tiles: &[Tile] = self;
        // SAFETY: the tiles hold that many whole values, any bits of which are one (see `Plain`).
        unsafe { std::slice::from_raw_parts(tiles.as_ptr().cast(), size_of_val(tiles) / size_of::<T>()) }
    }

    /// The same for writing.
    #[must_use]
    pub fn values_mut<T: Plain>(&mut self) -> &mut [T] {
        let tiles: &mut [Tile] = self;
        // SAFETY: as in `values`; the borrow is exclusive.
        unsafe {
            std::slice::from_raw_parts_mut(tiles.as_mut_ptr().cast(), size_of_val(tiles) / size_of::<T>())
        }
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
        let align = if bytes > HUGE / 2 { HUGE } else { align_of::<Tile>() };
        // Rounded up, so that slightly larger requests find a buffer that fits; large ones only a little,
        // for a huge page counts as used as a whole.
        let size = if bytes > HUGE {
            bytes.next_multiple_of(HUGE / 4)
        } else {
            bytes.max(align_of::<Tile>()).next_power_of_two()
        };
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

#[cfg(test)]
mod tests {
    use super::{HUGE, KEPT, Scratch, Tile};

    /// Bytes of the buffers that this thread keeps, smallest first.
    fn kept() -> Vec<usize> {
        KEPT.with(|kept| kept.borrow().iter().map(|buffer| buffer.layout.size()).collect())
    }

    #[test]
    fn a_larger_buffer_takes_the_place_of_a_smaller_one() {
        // What other tests left on this thread.
        KEPT.with(|kept| kept.borrow_mut().clear());
        let large = 5 * HUGE / size_of::<Tile>() / 2;
        drop(Scratch::take(100));
        drop(Scratch::take(large));
        assert_eq!(kept(), [5 * HUGE / 2], "the smaller one is gone, and little is rounded up");
        let (first, second) = (Scratch::take(100), Scratch::take(100));
        assert_eq!((first.len(), second.len()), (100, 100));
        drop((first, second));
        assert_eq!(kept(), [1 << 17, 5 * HUGE / 2], "what is in use is left alone");
        drop(Scratch::take(large));
        assert_eq!(kept().len(), 2, "the large one was used again");
    }
}
