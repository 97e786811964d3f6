//! The only file that uses threads.
//!
//! The pool belongs to one process: a forked child has none of its parent's threads, so it leaks
//! the parent's pool (dropping it would join threads that do not exist) and builds its own.
//! Work is cut into chunks whose boundaries depend on the data alone, so results do not depend on
//! the number of threads. Nothing starts before the first parallel call.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

struct ProcessPool {
    process: u32,
    workers: usize,
    pool: ThreadPool,
}

/// Null, or a leaked [`ProcessPool`]. Not a lock: a fork while another thread held it would leave
/// the child waiting for ever.
static POOL: AtomicPtr<ProcessPool> = AtomicPtr::new(std::ptr::null_mut());

/// Run `work` on every item, on the calling thread and up to `threads - 1` others.
///
/// Items are handed out in order; which thread takes which is unspecified. A panic in `work` reaches
/// the caller after all threads have stopped, and the pool stays usable.
pub fn for_each<I>(items: I, threads: usize, work: impl Fn(I::Item) + Sync)
where
    I: IntoIterator,
    I::IntoIter: ExactSizeIterator + Send,
    I::Item: Send,
{
    let items = items.into_iter();
    let workers = threads.min(items.len()).saturating_sub(1);
    let Some(pool) = (workers > 0).then(|| pool(threads - 1)).flatten() else {
        items.for_each(work);
        return;
    };
    let queue = Mutex::new(items);
    let take = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let drain = || {
        while let Some(item) = take() {
            work(item);
        }
    };
    pool.in_place_scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|_| drain());
        }
        drain();
    });
}

/// This process's pool with at least `workers` threads; `None` where the system refuses threads.
fn pool(workers: usize) -> Option<&'static ThreadPool> {
    let process = std::process::id();
    // SAFETY: the pointer is null or came from `Box::leak` below and is never freed, so it is valid
    // for the rest of the process and of its forked children.
    let current: Option<&'static ProcessPool> = unsafe { POOL.load(Ordering::Acquire).as_ref() };
    if let Some(known) = current.filter(|p| p.process == process && p.workers >= workers) {
        return Some(&known.pool);
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(workers)
        .thread_name(|i| format!("qlora-rs-{i}"))
        .build()
        .ok()?;
    // Leaked on purpose: another thread may still be using the pool that this one replaces, and two
    // threads that race here cost one idle pool, not an error.
    let built: &'static mut ProcessPool = Box::leak(Box::new(ProcessPool { process, workers, pool }));
    POOL.store(built, Ordering::Release);
    Some(&built.pool)
}

/// A row-major matrix whose columns are written by several threads, each its own range of them.
pub struct Columns<'a, T> {
    first: *mut T,
    rows: usize,
    columns: usize,
    taken: Mutex<Vec<Range<usize>>>,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer comes from an exclusive borrow that lives as long as `Columns`, and `take`
// gives every column to one caller only, so sharing it among threads shares no element.
unsafe impl<T: Send> Sync for Columns<'_, T> {}

/// Exclusive access to some columns of a [`Columns`] matrix.
pub struct ColumnRange<'a, T> {
    first: *mut T,
    rows: usize,
    columns: usize,
    range: Range<usize>,
    matrix: PhantomData<&'a mut [T]>,
}

impl<'a, T> Columns<'a, T> {
    /// Borrow `matrix`, whose rows have `columns` elements each.
    pub fn new(matrix: &'a mut [T], columns: usize) -> Self {
        let rows = matrix.len().checked_div(columns).unwrap_or(0);
        Self { first: matrix.as_mut_ptr(), rows, columns, taken: Mutex::default(), matrix: PhantomData }
    }

    /// Exclusive access to the columns in `range`.
    ///
    /// # Panics
    /// When the range leaves the matrix or overlaps one taken before.
    pub fn take(&self, range: Range<usize>) -> ColumnRange<'_, T> {
        assert!(range.start <= range.end && range.end <= self.columns, "columns lie inside the matrix");
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let apart = |other: &Range<usize>| range.end <= other.start || other.end <= range.start;
        assert!(taken.iter().all(apart), "columns are taken once");
        taken.push(range.clone());
        ColumnRange { first: self.first, rows: self.rows, columns: self.columns, range, matrix: PhantomData }
    }
}

impl<T> ColumnRange<'_, T> {
    /// Set the element in row `row` and the `column`-th column of the range.
    ///
    /// # Panics
    /// When either lies outside.
    pub fn set(&mut self, row: usize, column: usize, value: T) {
        assert!(row < self.rows && column < self.range.len(), "element lies inside the range");
        // SAFETY: row < rows and range.start + column < columns, so the element is inside the
        // matrix; the range is this value's alone (`Columns::take`).
        unsafe { self.first.add(row * self.columns + self.range.start + column).write(value) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_item_is_visited_once_whatever_the_thread_count() {
        for threads in [0, 1, 2, 7] {
            let sum = AtomicUsize::new(0);
            for_each((1..1001_u32).collect::<Vec<_>>(), threads, |i| {
                sum.fetch_add(i as usize, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 500_500);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_the_pool_usable() {
        let panicking = std::panic::catch_unwind(|| for_each(0..64_u32, 2, |i| assert!(i != 40)));
        assert!(panicking.is_err());
        let count = AtomicUsize::new(0);
        for_each(0..64_u32, 2, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 64);
    }
}
