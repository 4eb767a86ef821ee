//! The last words: what went wrong, where, and how it came there.

use crate::console;
use crate::cpu::{self, regs};
use crate::memory::paging;
use core::fmt::Write;
use core::sync::atomic::{AtomicU32, Ordering};
use hypercall::ExitStatus;

/// Most frames of a backtrace.
const DEPTH: usize = 48;

/// 0, or 1 plus the index of the CPU that speaks the last words.
static SPEAKER: AtomicU32 = AtomicU32::new(0);

/// Whether the machine is going down: a CPU that sees it stops.
pub(crate) fn in_progress() -> bool {
    SPEAKER.load(Ordering::Acquire) != 0
}

/// Makes the caller the only one who speaks. A second CPU that gets here stops; a second fault on the same CPU ends the
/// machine at once.
pub(crate) fn begin() {
    regs::interrupts_disable();
    let me = cpu::current_id() + 1;
    match SPEAKER.compare_exchange(0, me, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(speaker) if speaker == me => {
            console::write(b"\npanic while panicking\n");
            crate::exit::exit(ExitStatus::Panic);
        }
        Err(_) => regs::halt_forever(),
    }
    console::last_words();
    crate::interrupts::apic::stop_others();
}

/// Says who failed: the thread and the CPU.
pub(crate) fn write_place(out: &mut impl Write) {
    let cpu = cpu::current_id();
    let _ = match cpu::current_thread() {
        // SAFETY: the current thread exists as long as it runs.
        Some(thread) => write!(out, "thread '{}' on CPU {cpu}", unsafe { thread.as_ref() }.name()),
        None => write!(out, "boot on CPU {cpu}"),
    };
}

/// One line of a backtrace.
fn write_frame(out: &mut impl Write, index: usize, address: usize) {
    let _ = match crate::symbols::lookup(address) {
        Some((name, offset)) => writeln!(out, "  {index:2}: {address:#x} {name}+{offset:#x}"),
        None => writeln!(out, "  {index:2}: {address:#x}"),
    };
}

/// Follows the chain of frame pointers from `frame`. `at` is where the newest frame was, if it is not in the chain.
pub(crate) fn write_backtrace(out: &mut impl Write, at: Option<usize>, mut frame: usize) {
    let _ = writeln!(out, "backtrace:");
    let mut index = 0;
    if let Some(at) = at {
        write_frame(out, index, at);
        index += 1;
    }
    let [image, text_end, ..] = crate::memory::image();
    while index < DEPTH && frame.is_multiple_of(8) && frame != 0 {
        // Both words must be mapped; stacks lie in the upper half.
        if (frame as isize) > -4096
            || paging::translate(frame).is_none()
            || paging::translate(frame + 8).is_none()
        {
            break;
        }
        let words: *const usize = core::ptr::with_exposed_provenance(frame);
        // SAFETY: both words are mapped memory, as was just seen.
        let (next, caller) = unsafe { (words.read(), words.add(1).read()) };
        if !(image..text_end).contains(&caller) {
            break;
        }
        // The call is before the return address.
        write_frame(out, index, caller - 1);
        index += 1;
        if next <= frame {
            break;
        }
        frame = next;
    }
}

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    begin();
    let out = &mut console::Writer;
    let mut message = console::Line::new();
    let _ = write!(message, "{}", info.message());
    // What a person can do something about is no bug, and said in one line.
    if message.bytes().starts_with(b"memory allocation of ") || message.bytes().ends_with(b"out of memory") {
        let _ = write!(out, "out of memory: ");
        write_place(out);
        let _ = writeln!(
            out,
            ": {}: give the machine more (anykernel run --memory, QEMU -m) or fewer CPUs",
            info.message()
        );
        if log::max_level() >= log::LevelFilter::Debug {
            write_backtrace(out, None, regs::frame_pointer());
        }
        crate::exit::exit(ExitStatus::Failure);
    }
    let _ = write!(out, "\npanic: ");
    write_place(out);
    let _ = match info.location() {
        Some(location) => writeln!(out, " at {location}: {}", info.message()),
        None => writeln!(out, ": {}", info.message()),
    };
    write_backtrace(out, None, regs::frame_pointer());
    crate::exit::exit(ExitStatus::Panic)
}
