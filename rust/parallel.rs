//! The only file that uses threads.
//!
//! Inside a torch process there is a team of OpenMP threads already, which spins for a while after
//! every torch operator: a second pool would fight it for the same cores (three times slower on
//! two cores, measured). So the work goes to that team where the process has one, found by its
//! entry point `GOMP_parallel`, and to a pool of our own where it has none.
//!
//! OpenMP does not survive a fork, and a pool's threads do not either: a forked child builds a
//! fresh pool of its own (it leaks its parent's, since dropping that would join threads that do
//! not exist).
//!
//! Which sums are formed in which order depends on the data alone, so results do not depend on the
//! number of threads. Nothing starts before the first parallel call.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Run `work` on every item, on the calling thread and up to `threads - 1` others.
///
/// Items are handed out in order; which thread takes which is unspecified. A panic in `work` reaches
/// the caller after all threads have stopped, and later calls work as before.
pub fn for_each<I>(items: I, threads: usize, work: impl Fn(I::Item) + Sync)
where
    I: IntoIterator,
    I::IntoIter: ExactSizeIterator + Send,
    I::Item: Send,
{
    let items = items.into_iter();
    let threads = threads.min(items.len());
    if threads <= 1 {
        items.for_each(work);
        return;
    }
    let queue = Mutex::new(items);
    let take = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let drain = || {
        while let Some(item) = take() {
            work(item);
        }
    };
    if let Some(team) = OpenMp::of_this_process() {
        team.run(threads, &drain);
    } else if let Some(pool) = pool(threads - 1) {
        pool.in_place_scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|_| drain());
            }
            drain();
        });
    } else {
        drain();
    }
}

/// Run a function on every thread of a team, the caller among them (GNU OpenMP's ABI, which LLVM's
/// and Intel's runtimes provide too).
type GompParallel = unsafe extern "C" fn(
    function: extern "C" fn(*mut c_void),
    data: *mut c_void,
    threads: c_uint,
    flags: c_uint,
);

/// The process that first used this code, to be called when it is loaded: a forked child has another id.
pub fn remember_process() -> u32 {
    static LOADED_BY: OnceLock<u32> = OnceLock::new();
    *LOADED_BY.get_or_init(std::process::id)
}

/// The process's OpenMP runtime.
#[derive(Clone, Copy)]
struct OpenMp {
    parallel: GompParallel,
}

/// What the team's threads share for the length of one call.
struct Job<'a> {
    work: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl OpenMp {
    /// The runtime that some library of this process loaded, unless the process is a forked child.
    fn of_this_process() -> Option<Self> {
        static FOUND: OnceLock<Option<GompParallel>> = OnceLock::new();
        // A child whose parent's team is gone must not enter it, even if this is its first call.
        if std::process::id() != remember_process() {
            return None;
        }
        let parallel = (*FOUND.get_or_init(find_gomp_parallel))?;
        Some(Self { parallel })
    }

    fn run(self, threads: usize, work: &(dyn Fn() + Sync)) {
        extern "C" fn enter(data: *mut c_void) {
            // SAFETY: `data` is the job below, which outlives the parallel region.
            let job = unsafe { &*data.cast::<Job<'_>>() };
            // Unwinding into OpenMP would be undefined: carry the panic home instead.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(job.work)) {
                job.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            }
        }
        let job = Job { work, panic: Mutex::new(None) };
        let data = std::ptr::from_ref(&job).cast_mut().cast();
        // SAFETY: the runtime calls `enter` with `data` on each thread and returns after all are
        // done, so `job` is alive throughout; it is shared read-only but for its mutex.
        unsafe { (self.parallel)(enter, data, threads as c_uint, 0) };
        if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

#[cfg(unix)]
fn find_gomp_parallel() -> Option<GompParallel> {
    // SAFETY: a lookup by a NUL-terminated name; it only reads the loader's tables.
    let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
    // SAFETY: null becomes None; otherwise this name has this signature in every runtime that
    // exports it, since compiled OpenMP programs call it so.
    unsafe { std::mem::transmute::<*mut c_void, Option<GompParallel>>(symbol) }
}

#[cfg(not(unix))]
fn find_gomp_parallel() -> Option<GompParallel> {
    None
}

struct ProcessPool {
    process: u32,
    workers: usize,
    pool: ThreadPool,
}

/// Null, or a leaked [`ProcessPool`]. Not a lock: a fork while another thread held it would leave
/// the child waiting for ever.
static POOL: AtomicPtr<ProcessPool> = AtomicPtr::new(std::ptr::null_mut());

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
    /// `length` elements of row `row`, from the `column`-th column of the range on.
    ///
    /// # Panics
    /// When they do not all lie inside.
    pub fn row_mut(&mut self, row: usize, column: usize, length: usize) -> &mut [T] {
        assert!(row < self.rows && column + length <= self.range.len(), "elements lie inside the range");
        // SAFETY: row < rows and range.start + column + length <= columns, so the elements are inside
        // the matrix; the range is this value's alone (`Columns::take`), and the borrow of `self`
        // keeps a second slice of it from existing.
        unsafe {
            let first = self.first.add(row * self.columns + self.range.start + column);
            std::slice::from_raw_parts_mut(first, length)
        }
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
