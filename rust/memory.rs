//! Advice to the operating system about large outputs.

/// Ask for huge pages behind a freshly allocated output of several megabytes.
///
/// The first write to each page costs a fault; with 4 KiB pages the faults of a decoded 4096 x 4096
/// matrix take longer than decoding it. This is advice: where the system has none to give, nothing
/// changes.
#[cfg(target_os = "linux")]
pub fn advise_huge_pages<T>(output: &mut [T]) {
    const HUGE: usize = 2 << 20;
    let start = (output.as_mut_ptr() as usize).next_multiple_of(HUGE);
    let end = output.as_mut_ptr() as usize + size_of_val(output);
    if end > start && end - start >= 2 * HUGE {
        let length = (end - start) / HUGE * HUGE;
        // SAFETY: the range lies inside `output`, and this advice changes no contents.
        unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_HUGEPAGE) };
    }
}

/// Other systems choose page sizes themselves.
#[cfg(not(target_os = "linux"))]
pub fn advise_huge_pages<T>(_: &mut [T]) {}
