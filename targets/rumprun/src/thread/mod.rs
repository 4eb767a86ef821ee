//! Threads: what they are, how they start and end.

pub(crate) mod list;
pub(crate) mod park;
pub(crate) mod scheduler;

use crate::memory::stacks::{self, Stack};
use crate::sync::SpinLock;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use hypercall::{Error, Result, ThreadId, ThreadSpec};
use list::Links;

/// Bytes kept of a thread's name.
const NAME: usize = 15;

/// On a CPU, or in a run queue.
const RUNNABLE: u8 = 0;
/// In a wait bucket, but still on its CPU.
const PARKING: u8 = 1;
/// In a wait bucket and off its CPU.
const PARKED: u8 = 2;
/// Woken before it was off its CPU.
const WOKEN: u8 = 3;
/// Has returned, but is still on its CPU.
const EXITING: u8 = 4;

type Entry = Box<dyn FnOnce() + Send + 'static>;

/// A thread.
///
/// Who may touch the `Cell`s: `stack_pointer` the CPU that switches from or to it; `park_key`, `timed_out` who holds the lock
/// of its wait bucket; `deadline_ns` and `timer_cpu` in addition the lock of its timer list; `links` the lock of the list;
/// the others the CPU that it runs on.
pub(crate) struct Thread {
    stack_pointer: Cell<usize>,
    pub(crate) links: Links,
    state: AtomicU8,
    /// Where it last ran; where it goes when it becomes ready.
    cpu: AtomicU32,
    pinned: bool,
    /// It waits in the run queue because it was woken, not because its time slice was over.
    woken: Cell<bool>,
    /// Address of the word that it is parked on.
    pub(crate) park_key: Cell<usize>,
    timed_out: Cell<bool>,
    pub(crate) deadline_ns: Cell<u64>,
    /// The CPU in whose timer list it is.
    pub(crate) timer_cpu: Cell<Option<u32>>,
    /// 1 once it has ended and is off its CPU: what a joiner parks on.
    ended: AtomicU32,
    entry: Cell<Option<Entry>>,
    stack: Stack,
    name: [u8; NAME],
    name_len: u8,
}

impl Thread {
    pub(crate) fn name(&self) -> &str {
        core::str::from_utf8(&self.name[..usize::from(self.name_len)]).unwrap_or("?")
    }

    pub(crate) fn stack(&self) -> &Stack {
        &self.stack
    }
}

/// A thread that is not joined yet. The pointer is to a `Box` that was leaked.
struct Owned(NonNull<Thread>);

// SAFETY: the owner of a thread may be any thread.
unsafe impl Send for Owned {}

static THREADS: SpinLock<BTreeMap<u64, Owned>> = SpinLock::new(BTreeMap::new());
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

#[cfg(target_os = "none")]
core::arch::global_asm!(include_str!("switch.s"), first = sym first);

unsafe extern "C" {
    /// Saves this thread's registers, stores its stack pointer at `save` and goes on with the thread whose stack pointer is
    /// `to`; `passed` comes out of the call there.
    fn switch_stacks(save: *mut usize, to: usize, passed: *mut ()) -> *mut ();
    /// Where a thread that never ran begins.
    fn thread_start();
}

/// First code of a thread, with interrupts off; `previous` is the thread that ran before on this CPU.
#[cfg(target_os = "none")]
extern "C" fn first(previous: *mut ()) -> ! {
    // SAFETY: the scheduler passed the thread that it left.
    unsafe { scheduler::after_switch(previous) };
    let entry = {
        let Some(thread) = crate::cpu::current_thread() else { unreachable!("a thread runs") };
        // SAFETY: the running thread lives; its entry is its own.
        unsafe { thread.as_ref() }.entry.take()
    };
    // SAFETY: no lock is held in a fresh thread.
    unsafe { crate::cpu::regs::interrupts_enable() };
    if let Some(entry) = entry {
        entry();
    }
    scheduler::exit_thread()
}

/// Makes a thread that is in no list yet.
fn create(name: &str, cpu: u32, pinned: bool, pages: usize, entry: Option<Entry>) -> Result<NonNull<Thread>> {
    let mut end = name.len().min(NAME);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = [0; NAME];
    bytes[..end].copy_from_slice(&name.as_bytes()[..end]);
    let stack = stacks::allocate(pages)?;
    // As `switch_stacks` leaves a stack: six registers, then where to return to. rbp, the last of the six, is 0 and ends
    // backtraces.
    let words = core::ptr::with_exposed_provenance_mut::<usize>(stack.top() - 8 * 8);
    // SAFETY: the words are at the top of a fresh stack.
    unsafe {
        words.write_bytes(0, 8);
        words.add(6).write(thread_start as *const () as usize);
    }
    let thread = Box::new(Thread {
        stack_pointer: Cell::new(words.addr()),
        links: Links::default(),
        state: AtomicU8::new(RUNNABLE),
        cpu: AtomicU32::new(cpu),
        pinned,
        woken: Cell::new(false),
        park_key: Cell::new(0),
        timed_out: Cell::new(false),
        deadline_ns: Cell::new(0),
        timer_cpu: Cell::new(None),
        ended: AtomicU32::new(0),
        entry: Cell::new(entry),
        stack,
        name: bytes,
        name_len: end as u8,
    });
    Ok(NonNull::from(Box::leak(thread)))
}

/// See [`hypercall::Threads::spawn`].
pub(crate) fn spawn(spec: ThreadSpec<'_>, entry: Entry) -> Result<ThreadId> {
    let cpu = match spec.cpu {
        Some(cpu) if cpu.0 >= crate::cpu::count() => return Err(Error::Invalid),
        Some(cpu) => cpu.0,
        None => scheduler::least_loaded(),
    };
    let thread = create(spec.name, cpu, spec.cpu.is_some(), stacks::THREAD_PAGES, Some(entry))?;
    let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    THREADS.lock().insert(id, Owned(thread));
    // SAFETY: a live thread in no list.
    unsafe { scheduler::make_ready(thread) };
    Ok(ThreadId(id))
}

/// See [`hypercall::Threads::join`].
pub(crate) fn join(id: ThreadId) -> Result<()> {
    let thread = {
        let mut threads = THREADS.lock();
        let thread = threads.get(&id.0).ok_or(Error::NotFound)?.0;
        if crate::cpu::current_thread() == Some(thread) {
            return Err(Error::NotFound);
        }
        threads.remove(&id.0);
        thread
    };
    {
        // SAFETY: out of the table, the thread is ours to free, and lives until then.
        let ended = &unsafe { thread.as_ref() }.ended;
        while ended.load(Ordering::Acquire) == 0 {
            park::park(ended, 0, None);
        }
    }
    // SAFETY: it came from `Box::leak`, has ended, is off its CPU and in no list; nobody else has the pointer.
    unsafe {
        let thread = Box::from_raw(thread.as_ptr());
        stacks::free(thread.stack);
    }
    Ok(())
}

/// The thread that a CPU runs when there is nothing to do.
pub(crate) fn create_idle(cpu: u32) -> Result<NonNull<Thread>> {
    create("idle", cpu, true, stacks::IDLE_PAGES, Some(Box::new(|| scheduler::idle())))
}

/// Goes over from the boot stack to a thread of this CPU, for good.
///
/// # Safety
/// Once per CPU, with interrupts off; `thread` is fresh, in no list, and this CPU's.
pub(crate) unsafe fn run_first(thread: NonNull<Thread>) -> ! {
    crate::cpu::this().set_current(thread);
    let mut nowhere = 0;
    // SAFETY: the stack was prepared by `create`; the boot stack is not used again.
    unsafe {
        switch_stacks(&mut nowhere, thread.as_ref().stack_pointer.get(), core::ptr::null_mut());
    }
    unreachable!("the boot stack was left for good")
}
