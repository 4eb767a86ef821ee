//! What each CPU has for itself: identity, descriptor tables, and a block of variables found through GS.

pub(crate) mod descriptors;
pub(crate) mod regs;
pub(crate) mod smp;

use crate::thread::Thread;
use core::arch::asm;
use core::cell::Cell;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

/// Most CPUs that are brought up; one bit each in the set of idle CPUs.
pub(crate) const MAX_CPUS: usize = 64;

/// The variables of one CPU. Only that CPU uses the `Cell`s, with preemption or interrupts off.
#[repr(C)]
pub(crate) struct PerCpu {
    /// Address of this block: `gs:[0]`.
    this: Cell<*const PerCpu>,
    /// The running thread: `gs:[8]`.
    current: Cell<*mut Thread>,
    /// How many reasons there are not to switch threads: `gs:[16]`.
    preempt_off: Cell<u32>,
    /// The running thread should make room soon: `gs:[20]`.
    pub(crate) need_resched: AtomicBool,
    /// Index of this CPU: `gs:[24]`.
    id: Cell<u32>,
    /// Its local APIC's address for interrupts.
    pub(crate) apic_id: Cell<u32>,
    pub(crate) heap: crate::memory::heap::Magazines,
    pub(crate) scheduler: crate::thread::scheduler::Local,
    pub(crate) timers: crate::time::timer::Local,
    pub(crate) clock: crate::time::pvclock::Slot,
    pub(crate) vectors: crate::interrupts::irq::Vectors,
    pub(crate) descriptors: descriptors::Slot,
}

// SAFETY: the `Cell`s are touched by their own CPU only, as said above; the rest is atomic or locked.
unsafe impl Sync for PerCpu {}

impl PerCpu {
    pub(crate) const fn new() -> Self {
        Self {
            this: Cell::new(core::ptr::null()),
            current: Cell::new(core::ptr::null_mut()),
            preempt_off: Cell::new(0),
            need_resched: AtomicBool::new(false),
            id: Cell::new(0),
            apic_id: Cell::new(0),
            heap: crate::memory::heap::Magazines::new(),
            scheduler: crate::thread::scheduler::Local::new(),
            timers: crate::time::timer::Local::new(),
            clock: crate::time::pvclock::Slot::new(),
            vectors: crate::interrupts::irq::Vectors::new(),
            descriptors: descriptors::Slot::new(),
        }
    }
}

static BOOT_CPU: PerCpu = PerCpu::new();

/// The blocks of all CPUs; those of others than the boot CPU come from the heap and stay.
static CPUS: [AtomicPtr<PerCpu>; MAX_CPUS] =
    [const { AtomicPtr::new(core::ptr::from_ref(&BOOT_CPU).cast_mut()) }; MAX_CPUS];

static COUNT: AtomicU32 = AtomicU32::new(1);

const MSR_GS_BASE: u32 = 0xc000_0101;

/// Makes a block that of CPU `id`, before that CPU starts.
pub(crate) fn prepare(id: u32, apic_id: u32, cpu: &'static PerCpu) {
    cpu.this.set(cpu);
    cpu.id.set(id);
    cpu.apic_id.set(apic_id);
    CPUS[id as usize].store(core::ptr::from_ref(cpu).cast_mut(), Ordering::Release);
}

/// Makes the block of the boot CPU.
pub(crate) fn prepare_boot_cpu() {
    prepare(0, 0, &BOOT_CPU);
}

/// Lets this CPU find its block.
///
/// # Safety
/// Called once on each CPU, before anything else of this module, with the index that it was prepared with.
pub(crate) unsafe fn adopt(id: u32) {
    let cpu = get(id);
    // SAFETY: GS is used for this block and nothing else.
    unsafe { regs::wrmsr(MSR_GS_BASE, core::ptr::from_ref(cpu).addr() as u64) };
}

/// The block of the CPU that runs the caller. Means little once the thread moved: hold preemption or interrupts off.
#[inline]
pub(crate) fn this() -> &'static PerCpu {
    let this: *const PerCpu;
    // SAFETY: `adopt` has set GS on this CPU; blocks are static.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) this, options(nostack, preserves_flags, readonly));
        &*this
    }
}

/// The block of any CPU that was prepared.
pub(crate) fn get(id: u32) -> &'static PerCpu {
    // SAFETY: the pointers are to static or leaked blocks.
    unsafe { &*CPUS[id as usize].load(Ordering::Acquire) }
}

/// Index of the CPU that runs the caller.
#[inline]
pub(crate) fn current_id() -> u32 {
    let id: u32;
    // SAFETY: as in `this`, with the offset of `id`, in one instruction.
    unsafe { asm!("mov {:e}, gs:[24]", out(reg) id, options(nostack, preserves_flags, readonly)) };
    id
}

/// The thread that runs the caller; none while a CPU boots.
#[inline]
pub(crate) fn current_thread() -> Option<NonNull<Thread>> {
    let thread: *mut Thread;
    // SAFETY: as in `this`, with the offset of `current`, in one instruction: true on whichever CPU it is read.
    unsafe { asm!("mov {}, gs:[8]", out(reg) thread, options(nostack, preserves_flags, readonly)) };
    NonNull::new(thread)
}

/// How many CPUs run threads.
pub(crate) fn count() -> u32 {
    COUNT.load(Ordering::Relaxed)
}

/// Says how many CPUs came up. Called once, before threads other than the boot thread run.
pub(crate) fn set_count(count: u32) {
    COUNT.store(count, Ordering::Relaxed);
}

impl PerCpu {
    pub(crate) fn id(&self) -> u32 {
        self.id.get()
    }

    pub(crate) fn current(&self) -> Option<NonNull<Thread>> {
        NonNull::new(self.current.get())
    }

    pub(crate) fn set_current(&self, thread: NonNull<Thread>) {
        self.current.set(thread.as_ptr());
    }

    /// Whether a thread switch is allowed as far as [`NoPreempt`] is concerned.
    pub(crate) fn preemptible(&self) -> bool {
        self.preempt_off.get() == 0
    }
}

/// While it lives, the thread stays on its CPU and is not switched out. Cheaper than interrupts off.
pub(crate) struct NoPreempt(core::marker::PhantomData<*mut ()>);

impl NoPreempt {
    #[inline]
    pub(crate) fn new() -> Self {
        // SAFETY: adds to this CPU's `preempt_off` in one instruction, which no interrupt can split.
        unsafe { asm!("add dword ptr gs:[16], 1", options(nostack)) };
        Self(core::marker::PhantomData)
    }
}

impl Drop for NoPreempt {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: as in `new`.
        unsafe { asm!("sub dword ptr gs:[16], 1", options(nostack)) };
        crate::thread::scheduler::preempt_point();
    }
}
