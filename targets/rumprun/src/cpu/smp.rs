//! The other CPUs: how they are started, and what each does first (Intel SDM volume 3, 8.4).

use super::{MAX_CPUS, PerCpu};
use crate::interrupts::apic;
use crate::memory::{frames, paging};
use crate::{thread, time};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use hypercall::{ParkResult, Result};

/// Where they begin: a page below 1 MiB that nothing else uses.
const TRAMPOLINE: u64 = 0x8000;
/// How long the last CPU may take.
const PATIENCE_NS: u64 = 1_000_000_000;
/// After how long a CPU that did not start is told once more.
const SECOND_CALL_NS: u64 = 1_000_000;

/// The number that the next CPU takes; the boot CPU is 0.
static NEXT: AtomicU32 = AtomicU32::new(1);
/// Stack tops by number.
static STACKS: AtomicUsize = AtomicUsize::new(0);
/// How many have come up. A joiner parks on it.
static ARRIVED: AtomicU32 = AtomicU32::new(0);
/// Who comes now comes too late.
static CLOSED: AtomicBool = AtomicBool::new(false);

#[cfg(target_os = "none")]
core::arch::global_asm!(
    include_str!("../boot/trampoline.s"),
    next = sym NEXT,
    stacks = sym STACKS,
    main = sym secondary_main,
);

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_tables: u8;
    static trampoline_end: u8;
}

/// CPUs on their way up.
pub(crate) struct Starting {
    apic_ids: Vec<u32>,
    tables: [u64; 4],
}

/// Starts every CPU of `apic_ids` (without the boot CPU's), and does not wait for them.
pub(crate) fn start(mut apic_ids: Vec<u32>) -> Result<Option<Starting>> {
    if apic_ids.len() >= MAX_CPUS {
        log::warn!("{} CPUs; {} are used", apic_ids.len() + 1, MAX_CPUS);
        apic_ids.truncate(MAX_CPUS - 1);
    }
    if apic_ids.is_empty() {
        return Ok(None);
    }
    let mut tops = Vec::new();
    tops.push(0);
    for number in 1..=apic_ids.len() {
        let cpu: &'static PerCpu = Box::leak(Box::new(PerCpu::new()));
        super::prepare(number as u32, 0, cpu);
        // A CPU begins as its idle thread.
        let idle = thread::create_idle(number as u32)?;
        cpu.set_current(idle);
        cpu.scheduler.set_idle(idle);
        // SAFETY: the thread was just made.
        tops.push(unsafe { idle.as_ref() }.stack().top());
    }
    STACKS.store(tops.leak().as_ptr().addr(), Ordering::Release);
    let tables = paging::trampoline_tables(TRAMPOLINE)?;
    // SAFETY: the code lies between its symbols; the page is low memory, which nobody else uses.
    unsafe {
        let [start, words, end] =
            [&raw const trampoline_start, &raw const trampoline_tables, &raw const trampoline_end]
                .map(|at| at.addr());
        let page = paging::direct(TRAMPOLINE);
        core::ptr::copy_nonoverlapping(&raw const trampoline_start, page, end - start);
        page.add(words - start).cast::<u32>().write_unaligned(tables[0] as u32);
    }
    for id in &apic_ids {
        apic::send_init(*id);
        apic::send_startup(*id, TRAMPOLINE);
    }
    Ok(Some(Starting { apic_ids, tables }))
}

impl Starting {
    /// Waits for the CPUs and says how many there are. Context: thread.
    pub(crate) fn finish(self) -> u32 {
        let wanted = self.apic_ids.len() as u32;
        let start_ns = time::monotonic_ns();
        let mut called_again = false;
        loop {
            let arrived = ARRIVED.load(Ordering::Acquire);
            if arrived == wanted {
                break;
            }
            let until = start_ns + if called_again { PATIENCE_NS } else { SECOND_CALL_NS };
            if thread::park::park(&ARRIVED, arrived, Some(until)) != ParkResult::TimedOut {
                continue;
            }
            if called_again {
                break;
            }
            // Real CPUs may need a second call; those that run take no notice of it.
            called_again = true;
            for id in &self.apic_ids {
                apic::send_startup(*id, TRAMPOLINE);
            }
        }
        CLOSED.store(true, Ordering::SeqCst);
        let arrived = ARRIVED.load(Ordering::SeqCst);
        if arrived < wanted {
            log::warn!("{} of {} CPUs did not start", wanted - arrived, wanted + 1);
        } else {
            // A CPU that never came may still wander in, and needs its tables then.
            for frame in self.tables {
                // SAFETY: all CPUs run on the final tables.
                unsafe { frames::free(frame, 1) };
            }
        }
        super::set_count(arrived + 1);
        let waited_us = (time::monotonic_ns() - start_ns) / 1000;
        log::debug!("{} CPUs, waited {waited_us} us, called again: {called_again}", arrived + 1);
        arrived + 1
    }
}

/// First Rust code of another CPU, on the stack that its number found.
#[cfg(target_os = "none")]
extern "C" fn secondary_main(number: u32) -> ! {
    // SAFETY: once on this CPU, in this order, with interrupts off.
    let ready = unsafe {
        paging::enable_on_this_cpu();
        super::adopt(number);
        super::descriptors::load()
    };
    apic::enable();
    super::this().apic_id.set(apic::id());
    time::pvclock::enable_on_this_cpu();
    if ready.is_err() {
        super::regs::halt_forever();
    }
    if CLOSED.load(Ordering::SeqCst) {
        super::regs::halt_forever();
    }
    ARRIVED.fetch_add(1, Ordering::SeqCst);
    thread::park::unpark(&ARRIVED, u32::MAX);
    thread::scheduler::idle()
}
