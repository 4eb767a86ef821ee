//! Threads, CPUs and time: std threads, futex(2), CLOCK_MONOTONIC.

use super::{PosixHost, Recover, system};
use core::num::NonZeroU32;
use core::sync::atomic::{AtomicU32, Ordering, fence};
use hypercall::{Clock, CpuId, Cpus, Error, ExitStatus, ParkResult, Result, ThreadId, ThreadSpec, Threads};
use rustix::io::Errno;
use rustix::thread::futex;
use rustix::time::{ClockId, Timespec, clock_gettime};
use std::panic::AssertUnwindSafe;

thread_local! {
    /// The virtual CPU that this thread stands for.
    static VIRTUAL_CPU: core::cell::Cell<u32> = const { core::cell::Cell::new(0) };
}

/// How many threads are parked, or about to be, on words of each group. Most wake-ups find nobody, and this spares
/// them the system call.
///
/// Sound because both sides meet in one total order: a parker counts itself before the kernel compares the word, a waker
/// has stored the word before it looks at the count. So either the waker sees the parker, or the kernel sees the new word.
static PARKED: [Count; 256] = [const { Count(AtomicU32::new(0)) }; 256];

#[repr(align(64))]
struct Count(AtomicU32);

fn parked(word: &AtomicU32) -> &'static AtomicU32 {
    // Fibonacci hashing; the low two bits of an aligned address say nothing.
    let hash = (core::ptr::from_ref(word).addr() as u64 >> 2).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    &PARKED[(hash >> 56) as usize].0
}

fn now_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    now.tv_sec.cast_unsigned().wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec.cast_unsigned())
}

impl Clock for PosixHost {
    fn monotonic_ns(&self) -> u64 {
        now_ns(ClockId::Monotonic)
    }
    fn realtime_ns(&self) -> u64 {
        now_ns(ClockId::Realtime)
    }
}

impl Threads for PosixHost {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        if spec.cpu.is_some_and(|cpu| cpu.0 >= self.cpus) {
            return Err(Error::Invalid);
        }
        let host = *self;
        let inner = self.inner().ok_or(Error::Gone)?;
        let id = inner.next_thread.fetch_add(1, Ordering::Relaxed);
        let cpu = spec.cpu.map_or((id % u64::from(self.cpus)) as u32, |cpu| cpu.0);
        let pin = spec.cpu.and_then(|cpu| inner.pins.get(cpu.0 as usize).copied());
        let mut cut = spec.name.len().min(15);
        while !spec.name.is_char_boundary(cut) {
            cut -= 1;
        }
        let body = move || {
            VIRTUAL_CPU.set(cpu);
            if let Some(pin) = pin {
                let mut set = rustix::thread::CpuSet::new();
                set.set(pin);
                // The CPU may have been taken away meanwhile; then any other will do.
                let _ = rustix::thread::sched_setaffinity(None, &set);
            }
            if let Err(payload) = std::panic::catch_unwind(AssertUnwindSafe(entry)) {
                let ended = payload.is::<system::DomainExit>();
                if !ended {
                    system::end(&host, ExitStatus::Panic);
                }
                system::run_stop_hook(&host);
                if !ended {
                    std::panic::resume_unwind(payload);
                }
            }
        };
        // The lock is held so that nobody can join the thread before it is in the table.
        let mut threads = inner.threads.lock().recover();
        let name = spec.name[..cut].replace('\0', "?");
        let handle = std::thread::Builder::new().name(name).spawn(body).map_err(|_| Error::NoMemory)?;
        threads.insert(id, handle);
        Ok(ThreadId(id))
    }

    fn join(&self, thread: ThreadId) -> Result<()> {
        let inner = self.inner().ok_or(Error::NotFound)?;
        let mut threads = inner.threads.lock().recover();
        if threads.get(&thread.0).is_some_and(|handle| handle.thread().id() == std::thread::current().id()) {
            return Err(Error::NotFound);
        }
        let handle = threads.remove(&thread.0).ok_or(Error::NotFound)?;
        drop(threads);
        drop(inner);
        handle.join().map_err(|_| Error::Gone)
    }

    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        if word.load(Ordering::Acquire) != expected {
            return ParkResult::Changed;
        }
        let deadline = deadline_ns.map(|ns| Timespec {
            tv_sec: (ns / 1_000_000_000).cast_signed(),
            tv_nsec: (ns % 1_000_000_000).cast_signed(),
        });
        let group = parked(word);
        group.fetch_add(1, Ordering::SeqCst);
        // A bitset wait takes an absolute time of CLOCK_MONOTONIC.
        let result =
            futex::wait_bitset(word, futex::Flags::PRIVATE, expected, deadline.as_ref(), NonZeroU32::MAX);
        group.fetch_sub(1, Ordering::Relaxed);
        match result {
            Err(Errno::AGAIN) => ParkResult::Changed,
            Err(Errno::TIMEDOUT) => ParkResult::TimedOut,
            // Woken, or interrupted by a signal.
            _ => ParkResult::Woken,
        }
    }

    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        fence(Ordering::SeqCst);
        if parked(word).load(Ordering::SeqCst) == 0 {
            return 0;
        }
        let count = count.min(i32::MAX.cast_unsigned());
        futex::wake(word, futex::Flags::PRIVATE, count).map_or(0, |woken| woken as u32)
    }

    fn yield_now(&self) {
        std::thread::yield_now();
    }
}

impl Cpus for PosixHost {
    fn cpu_count(&self) -> u32 {
        self.cpus
    }
    fn current_cpu(&self) -> CpuId {
        // A thread of another, larger instance may ask.
        CpuId(VIRTUAL_CPU.get() % self.cpus)
    }
}

/// One host CPU for each virtual CPU, none if there are not enough. Instances begin at different ones.
pub(super) fn choose_pins(cpus: u32) -> Vec<usize> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    let usable: Vec<usize> =
        (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    if usable.len() < cpus as usize {
        return Vec::new();
    }
    let first = NEXT.fetch_add(cpus, Ordering::Relaxed);
    (0..cpus).map(|cpu| usable[(first.wrapping_add(cpu)) as usize % usable.len()]).collect()
}
