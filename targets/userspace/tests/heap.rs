//! Whatever fails, the heap is as it was: no cycle of references, no buffer that an error path forgot.

use anykernel_userspace::sim::scenario::{self, Options};
use hypercall::layers::{Fault, FaultPlan};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Counts what the calling thread has allocated and not freed.
struct Counting;

thread_local! {
    static LIVE: Cell<(i64, i64)> = const { Cell::new((0, 0)) };
}

fn count(blocks: i64, bytes: i64) {
    // Fails while a thread ends; nobody looks then.
    let _ = LIVE.try_with(|live| {
        let (have_blocks, have_bytes) = live.get();
        live.set((have_blocks + blocks, have_bytes + bytes));
    });
}

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(1, layout.size() as i64);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-1, -(layout.size() as i64));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static HEAP: Counting = Counting;

#[test]
fn no_fault_leaks_memory() {
    for scenario in ["faults", "faults-httpd"] {
        sweep(&Options { scenario: scenario.into(), ..Options::default() });
    }
}

fn sweep(options: &Options) {
    let run = |fault| -> (i64, i64) {
        let plan: &'static FaultPlan = Box::leak(Box::new(FaultPlan::new(fault)));
        let before = LIVE.get();
        let report = scenario::run_with_faults(options, plan);
        assert!(report.findings.is_empty(), "{fault:?}: {:?}", report.findings);
        drop(report);
        let after = LIVE.get();
        (after.0 - before.0, after.1 - before.1)
    };
    // What is made once and kept: stacks, the table of simulations.
    let counting: &'static FaultPlan = Box::leak(Box::new(FaultPlan::new(Fault::Never)));
    drop(scenario::run_with_faults(options, counting));
    let calls = counting.counted();
    assert!(calls > 50, "{calls}");
    run(Fault::Never);
    let mut leaks = Vec::new();
    for n in 1..=calls {
        for fault in [Fault::Nth(n), Fault::From(n)] {
            // What a path makes once and keeps is no leak: that comes each time.
            let leak = if run(fault) == (0, 0) { (0, 0) } else { run(fault) };
            if leak != (0, 0) {
                leaks.push(format!("{fault:?}: {} blocks, {} bytes", leak.0, leak.1));
            }
        }
    }
    assert!(leaks.is_empty(), "{}", leaks.join("\n"));
}
