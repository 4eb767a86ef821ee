//! Exceptions. None is expected: each ends the machine with a report.

use super::Frame;
use crate::console::Writer;
use crate::cpu::regs;
use core::fmt::Write;
use hypercall::ExitStatus;

const NMI: u64 = 2;
const DOUBLE_FAULT: u64 = 8;
const PAGE_FAULT: u64 = 14;

fn name(vector: u64) -> &'static str {
    match vector {
        0 => "division error",
        3 => "breakpoint",
        6 => "invalid instruction",
        7 => "no floating point",
        8 => "double fault",
        10 => "invalid task state",
        11 => "segment not present",
        12 => "stack fault",
        13 => "general protection fault",
        14 => "page fault",
        18 => "machine check",
        _ => "exception",
    }
}

/// What a page fault was about, in words.
fn explain_page_fault(out: &mut impl Write, frame: &Frame, address: usize) {
    const PRESENT: u64 = 1;
    const WRITE: u64 = 2;
    const FETCH: u64 = 16;
    let access = if frame.error & FETCH != 0 {
        "execution of"
    } else if frame.error & WRITE != 0 {
        "write to"
    } else {
        "read of"
    };
    let what = if frame.error & PRESENT != 0 {
        if frame.error & FETCH != 0 { "memory that is not code" } else { "read-only memory" }
    } else if address < 4096 {
        "a null pointer"
    } else {
        "an unmapped address"
    };
    let _ = write!(out, "{access} {what}, {address:#x}");
}

/// Whether `address` is in the guard page of the stack in use: the running thread's, or that of boot.
fn overflowed(address: usize) -> bool {
    match crate::cpu::current_thread() {
        // SAFETY: the running thread exists.
        Some(thread) => unsafe { thread.as_ref() }.stack().guards(address),
        None => address & !0xfff == crate::memory::boot_guard(),
    }
}

pub(super) fn exception(frame: &Frame) -> ! {
    if frame.vector == NMI && crate::panic::in_progress() {
        regs::halt_forever();
    }
    let address = regs::fault_address();
    crate::panic::begin();
    let out = &mut Writer;
    let _ = write!(out, "\npanic: ");
    if matches!(frame.vector, PAGE_FAULT | DOUBLE_FAULT) && overflowed(address) {
        let _ = write!(out, "stack overflow in ");
        crate::panic::write_place(out);
    } else {
        crate::panic::write_place(out);
        let _ = write!(out, ": {}", name(frame.vector));
        if frame.vector == PAGE_FAULT {
            let _ = write!(out, ": ");
            explain_page_fault(out, frame, address);
        } else {
            let _ = write!(out, " (vector {}, error code {:#x})", frame.vector, frame.error);
        }
    }
    let _ = writeln!(out);
    for line in [
        [("rip", frame.rip), ("rsp", frame.rsp), ("rbp", frame.rbp), ("flags", frame.rflags)],
        [("rax", frame.rax), ("rbx", frame.rbx), ("rcx", frame.rcx), ("rdx", frame.rdx)],
        [("rsi", frame.rsi), ("rdi", frame.rdi), ("r8", frame.r8), ("r9", frame.r9)],
        [("r10", frame.r10), ("r11", frame.r11), ("r12", frame.r12), ("r13", frame.r13)],
        [("r14", frame.r14), ("r15", frame.r15), ("cs", frame.cs), ("ss", frame.ss)],
    ] {
        for (register, value) in line {
            let _ = write!(out, "  {register:>5} {value:016x}");
        }
        let _ = writeln!(out);
    }
    crate::panic::write_backtrace(out, Some(frame.rip as usize), frame.rbp as usize);
    crate::exit::exit(ExitStatus::Panic)
}
