//! Segments, the task state segment with its stacks for exceptions, and the loading of the interrupt table.
//! (Intel SDM volume 3, 3.4.5, 7.7 and 6.14.)

use crate::memory::stacks::{self, Stack};
use core::arch::asm;
use core::cell::UnsafeCell;

/// Kernel code segment.
pub(crate) const CODE: u16 = 0x08;
const TASK: u16 = 0x10;

/// Which stack of the TSS exceptions run on: faults may be about the stack itself.
pub(crate) const IST_FAULT: u8 = 1;
/// The double fault's own, in case that reporting the first fault fails.
pub(crate) const IST_DOUBLE: u8 = 2;
/// Non-maskable interrupts.
pub(crate) const IST_NMI: u8 = 3;

#[repr(C, packed(4))]
struct TaskState {
    _reserved: u32,
    privileged_stacks: [u64; 3],
    _reserved2: u64,
    interrupt_stacks: [u64; 7],
    _reserved3: u64,
    _reserved4: u16,
    io_map: u16,
}

/// Descriptor tables of one CPU.
pub(crate) struct Slot {
    gdt: UnsafeCell<[u64; 4]>,
    task: UnsafeCell<TaskState>,
}

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

impl Slot {
    pub(crate) const fn new() -> Self {
        Self {
            gdt: UnsafeCell::new([0, 0x0020_9b00_0000_0000, 0, 0]),
            task: UnsafeCell::new(TaskState {
                _reserved: 0,
                privileged_stacks: [0; 3],
                _reserved2: 0,
                interrupt_stacks: [0; 7],
                _reserved3: 0,
                _reserved4: 0,
                io_map: size_of::<TaskState>() as u16,
            }),
        }
    }
}

/// Sets up and loads this CPU's tables.
///
/// # Safety
/// Once per CPU, after [`super::adopt`], with interrupts off.
pub(crate) unsafe fn load() -> hypercall::Result<()> {
    let stacks: [Stack; 3] = [
        stacks::allocate(stacks::FAULT_PAGES)?,
        stacks::allocate(stacks::FAULT_PAGES)?,
        stacks::allocate(1)?,
    ];
    let slot = &super::this().descriptors;
    // SAFETY: this CPU's own tables, used by nobody before the loads below.
    let (gdt, task) = unsafe { (&mut *slot.gdt.get(), &mut *slot.task.get()) };
    for (index, stack) in stacks.iter().enumerate() {
        task.interrupt_stacks[index] = stack.top() as u64;
    }
    let base = core::ptr::from_mut(task).addr() as u64;
    let limit = size_of::<TaskState>() as u64 - 1;
    gdt[2] = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    gdt[3] = base >> 32;
    let gdt_pointer = TablePointer { limit: 31, base: gdt.as_ptr().addr() as u64 };
    let idt_pointer = crate::interrupts::table();
    let idt_pointer = TablePointer { limit: idt_pointer.1, base: idt_pointer.0 as u64 };
    // SAFETY: the tables are static and valid, the code segment is at the same selector as before; the GS base is not
    // touched, as no selector is loaded into GS.
    unsafe {
        asm!(
            "lgdt [{gdt}]",
            "push {code}",
            "lea {tmp}, [rip + 2f]",
            "push {tmp}",
            "retfq",
            "2:",
            "ltr {task:x}",
            "lidt [{idt}]",
            gdt = in(reg) &gdt_pointer,
            idt = in(reg) &idt_pointer,
            code = const CODE,
            task = in(reg) TASK,
            tmp = out(reg) _,
        );
    }
    Ok(())
}
