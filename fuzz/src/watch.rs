//! What an execution may cost: memory is counted by the allocator, work by steps. Beyond the bound is a finding.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Bytes that one execution may hold at a time, beside what was there before it.
const MEMORY_BYTES: usize = 48 << 20;
/// Steps of one execution: device requests, hypercalls that wait, rounds of a harness.
const STEPS: u64 = 200_000;

std::thread_local! {
    /// Below 0 in a thread that frees what another one allocated.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static CEILING: Cell<isize> = const { Cell::new(isize::MAX) };
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static REFUSED: Cell<usize> = const { Cell::new(0) };
    static LEAKS: Cell<bool> = const { Cell::new(false) };
    static TELL: Cell<bool> = const { Cell::new(false) };
    static PATIENCE: Cell<u32> = const { Cell::new(0) };
}

/// The system's allocator with a bound for each execution. Beyond it an allocation fails, as on a machine that has no
/// more: code that can fail goes on, code that cannot ends the process. Both are findings.
struct Bounded;

impl Bounded {
    fn admit(size: usize) -> bool {
        // A layout is never larger than this.
        let after = LIVE.get().saturating_add(size.cast_signed());
        if after > CEILING.get() {
            refused(size);
            return false;
        }
        LIVE.set(after);
        true
    }

    fn gone(size: usize) {
        LIVE.set(LIVE.get().saturating_sub(size.cast_signed()));
    }
}

/// Names the site, when asked to by [`tell_refusals`]: the last one before an abort is the culprit.
#[cold]
fn refused(size: usize) {
    REFUSED.set(REFUSED.get().max(size));
    if TELL.replace(false) {
        let (ceiling, live) = (CEILING.replace(isize::MAX), LIVE.get());
        eprintln!("allocation of {size} bytes refused: over {MEMORY_BYTES} bytes in one execution");
        eprintln!("{}", std::backtrace::Backtrace::force_capture());
        // What the names of the frames were looked up in stays, and is not the execution's.
        LIVE.set(live);
        CEILING.set(ceiling);
        TELL.set(true);
    }
}

// SAFETY: everything is done by the system's allocator; this only counts and refuses.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !Self::admit(layout.size()) {
            return core::ptr::null_mut();
        }
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !Self::admit(layout.size()) {
            return core::ptr::null_mut();
        }
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        Self::gone(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if new_size > layout.size() && !Self::admit(new_size - layout.size()) {
            return core::ptr::null_mut();
        }
        if new_size < layout.size() {
            Self::gone(layout.size() - new_size);
        }
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

/// From now on a refused allocation prints where it was asked for. Slow.
pub fn tell_refusals() {
    TELL.set(true);
}

/// Unless it is called again within so many seconds, this process ends, and prints where it was. For processes that run
/// one input at a time: no fuzzer may use the alarm.
pub fn tell_hang(seconds: u32) {
    // It allocates where it must not, so that a hang inside the allocator is not told. The process ends anyway.
    extern "C" fn late(_: libc::c_int) {
        panic!("no end within {} s", PATIENCE.get());
    }
    PATIENCE.set(seconds);
    let handler: extern "C" fn(libc::c_int) = late;
    // SAFETY: the handler has the type that `signal` wants, and does not return.
    unsafe {
        libc::signal(libc::SIGALRM, handler as libc::sighandler_t);
        libc::alarm(seconds);
    }
}

/// Steps taken by this execution so far.
pub fn steps() -> u64 {
    STEPS.saturating_sub(LEFT.get())
}

/// Counts one step. Panics when an execution takes too many: it would not end.
pub fn step() {
    let left = LEFT.get();
    if left == 0 {
        // Whoever catches this goes on without a bound.
        LEFT.set(u64::MAX);
        panic!("no end after {STEPS} steps");
    }
    LEFT.set(left - 1);
}

/// This execution may leave memory behind: a device that cannot be reset keeps what it was given.
pub fn allow_leak() {
    LEAKS.set(true);
}

/// A panic lifts the bound of memory: what prints its stack needs more, and would be refused.
fn lift_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        CEILING.set(isize::MAX);
        before(panic);
    }));
}

/// Runs one execution within its bounds, and then looks whether it left memory behind.
pub(crate) fn bounded(run: impl Fn()) {
    static LIFT: std::sync::Once = std::sync::Once::new();
    LIFT.call_once(lift_on_panic);
    let once = || {
        let before = LIVE.get();
        CEILING.set(before.saturating_add(MEMORY_BYTES.cast_signed()));
        LEFT.set(STEPS);
        LEAKS.set(false);
        run();
        CEILING.set(isize::MAX);
        let refused = REFUSED.replace(0);
        assert!(
            refused == 0,
            "an allocation of {refused} bytes was asked for, over {MEMORY_BYTES} in one execution"
        );
        LIVE.get() - before
    };
    // What is made once (tables, thread-locals) grows the first time; a leak grows every time.
    if once() > 0 && !LEAKS.get() && once() > 0 {
        let left = once();
        assert!(left <= 0, "{left} bytes are left behind by every execution");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_frees_what_is_not_its_own_can_allocate() {
        let foreign = vec![0u8; 1 << 10];
        let freed = std::thread::spawn(move || {
            drop(foreign);
            bounded(|| drop(std::hint::black_box(vec![0u8; 1 << 20])));
            std::hint::black_box(vec![0u8; 1 << 20]).len()
        });
        assert_eq!(freed.join().ok(), Some(1 << 20));
    }

    #[test]
    fn too_much_memory_and_a_leak_are_findings() {
        let panics = |run: fn()| std::panic::catch_unwind(|| bounded(run)).is_err();
        assert!(!panics(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(MEMORY_BYTES - 100)))));
        assert!(panics(|| {
            let refused = Vec::<u8>::new().try_reserve_exact(std::hint::black_box(MEMORY_BYTES + 1));
            assert!(refused.is_err());
        }));
        assert!(panics(|| std::mem::forget(std::hint::black_box(vec![0u8; 10]))));
        // And the bound is gone.
        assert_eq!(std::hint::black_box(vec![0u8; 2 * MEMORY_BYTES]).len(), 2 * MEMORY_BYTES);
    }
}
