//! This CPU's timer: one shot at the earliest of the deadlines of threads that parked here and the end of the running
//! thread's time slice. Nothing ticks while nothing is due.

use super::{APIC_PER_NS, TSC_PER_NS, monotonic_ns, scale};
use crate::cpu::{self, regs};
use crate::interrupts::apic;
use crate::sync::{InterruptsOff, SpinLock};
use crate::thread::list::{List, TIMER_LINK};
use crate::thread::{Thread, park, scheduler};
use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::Ordering;

/// Timers of one CPU.
pub(crate) struct Local {
    /// Threads that parked with a deadline, in order of deadlines.
    sleepers: SpinLock<List<TIMER_LINK>>,
    /// When the timer is set to fire; `u64::MAX` when it is not. Used by this CPU with interrupts off.
    armed_ns: Cell<u64>,
}

impl Local {
    pub(crate) const fn new() -> Self {
        Self { sleepers: SpinLock::new(List::new()), armed_ns: Cell::new(u64::MAX) }
    }
}

/// Sees to it that the timer of this CPU fires at `deadline_ns` at the latest. It may fire earlier, for a deadline that
/// was withdrawn since: setting the timer costs more than an interrupt too many now and then.
pub(crate) fn arm(deadline_ns: u64) {
    let _off = InterruptsOff::new();
    let armed = &cpu::this().timers.armed_ns;
    if deadline_ns >= armed.get() {
        return;
    }
    armed.set(deadline_ns);
    let left_ns = deadline_ns.saturating_sub(monotonic_ns());
    if apic::has_deadline() {
        apic::set_deadline(regs::rdtsc() + scale(left_ns, TSC_PER_NS.load(Ordering::Relaxed)));
    } else {
        let ticks = scale(left_ns, APIC_PER_NS.load(Ordering::Relaxed));
        // A deadline too far away fires early and is set again.
        apic::set_countdown(ticks.clamp(1, u64::from(u32::MAX)) as u32);
    }
}

/// Adds a thread that parks on this CPU. Interrupts are off.
///
/// # Safety
/// The thread is in no timer list, and stays alive until it is taken out.
pub(crate) unsafe fn insert(thread: NonNull<Thread>, deadline_ns: u64) {
    let this = cpu::this();
    // SAFETY: the thread lives; its timer fields are used under this lock from here on.
    unsafe {
        thread.as_ref().timer_cpu.set(Some(this.id()));
        thread.as_ref().deadline_ns.set(deadline_ns);
        // SAFETY (comparison): members of the list are parked threads.
        this.timers
            .sleepers
            .lock()
            .insert_before(thread, |other| other.as_ref().deadline_ns.get() > deadline_ns);
    }
    arm(deadline_ns);
}

/// Takes a thread out that was woken before its deadline.
///
/// # Safety
/// The thread is parked, and the caller holds the lock of its wait bucket.
pub(crate) unsafe fn remove(thread: NonNull<Thread>) {
    // SAFETY: by the caller, nobody else changes `timer_cpu` now.
    unsafe {
        if let Some(cpu) = thread.as_ref().timer_cpu.take() {
            cpu::get(cpu).timers.sleepers.lock().remove(thread);
        }
    }
}

/// The first sleeper of CPU `cpu` if it is due: the thread, only as a name, and what it waits for.
fn due(cpu: u32, now_ns: u64) -> Option<(NonNull<Thread>, usize)> {
    let sleepers = cpu::get(cpu).timers.sleepers.lock();
    let first = sleepers.first()?;
    // SAFETY: members of the list are parked threads, and cannot leave while the lock is held.
    let thread = unsafe { first.as_ref() };
    (thread.deadline_ns.get() <= now_ns).then(|| (first, thread.park_key.get()))
}

/// Whether `thread` is still first and due, waiting for `key`. Called with the lock of the key's bucket held.
pub(crate) fn still_due(cpu: u32, thread: NonNull<Thread>, key: usize) -> bool {
    due(cpu, monotonic_ns()) == Some((thread, key))
}

/// The timer interrupt of this CPU.
pub(crate) fn fired() {
    let this = cpu::this();
    this.timers.armed_ns.set(u64::MAX);
    let now = monotonic_ns();
    while let Some((thread, key)) = due(this.id(), now) {
        park::time_out(this.id(), thread, key);
    }
    let next = {
        let sleepers = this.timers.sleepers.lock();
        // SAFETY: as in `due`.
        sleepers.first().map(|thread| unsafe { thread.as_ref() }.deadline_ns.get())
    };
    if let Some(next) = next {
        arm(next);
    }
    scheduler::timer_fired(now);
}
