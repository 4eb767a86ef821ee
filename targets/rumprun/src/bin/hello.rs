//! The smallest image: says hello from every CPU, or breaks a rule on request, for the boot tests.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
extern crate alloc;

#[cfg(target_os = "none")]
mod application {
    use alloc::{boxed::Box, format, sync::Arc, vec::Vec};
    use anykernel::Kernel;
    use anykernel_rumprun::Machine;
    use core::sync::atomic::{AtomicU32, Ordering};
    use hypercall::{Clock, Console, CpuId, Cpus, Exit, ExitStatus, Memory, ThreadSpec, Threads};

    fn say(line: &str) {
        Machine.console_write(format!("{line}\n").as_bytes());
    }

    /// A thread per CPU says where it runs, all at the same time: each waits for the others.
    fn greet() -> ExitStatus {
        let cpus = Machine.cpu_count();
        let here = Arc::new(AtomicU32::new(0));
        let mut threads = Vec::new();
        for cpu in 0..cpus {
            let here = here.clone();
            let entry = move || {
                let place = Machine.current_cpu().0;
                here.fetch_add(1, Ordering::SeqCst);
                while here.load(Ordering::SeqCst) < cpus {
                    core::hint::spin_loop();
                }
                say(&format!("hello from CPU {place}"));
            };
            let spec = ThreadSpec { name: "greeter", cpu: Some(CpuId(cpu)) };
            match Machine.spawn(spec, Box::new(entry)) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    say(&format!("spawn: {error}"));
                    return ExitStatus::Failure;
                }
            }
        }
        for thread in threads {
            if Machine.join(thread).is_err() {
                return ExitStatus::Failure;
            }
        }
        say(&format!(
            "{cpus} CPUs, {} KiB of memory, {} ns since the first instruction, {} s since 1970",
            Machine.memory_bytes() >> 10,
            Machine.monotonic_ns(),
            hypercall::Clock::realtime_ns(&Machine) / 1_000_000_000
        ));
        ExitStatus::Success
    }

    #[inline(never)]
    fn overflow(depth: u64) -> u64 {
        let frame = core::hint::black_box([depth; 64]);
        if depth == u64::MAX { 0 } else { overflow(depth + 1) + frame[3] }
    }

    #[inline(never)]
    fn fail_on_request() -> ExitStatus {
        panic!("as requested")
    }

    /// Says what time it is, three times, 2 s apart by the machine's own clock.
    fn tell_time() -> ExitStatus {
        let word = AtomicU32::new(0);
        for round in 0..3 {
            let now = Machine.monotonic_ns();
            say(&format!("clock {now}"));
            if round < 2 {
                Machine.park(&word, 0, Some(now + 2_000_000_000));
            }
        }
        ExitStatus::Success
    }

    /// Judges the copying of memory, byte by byte, at all small sizes and overlaps and some large ones.
    fn copies_right() -> bool {
        let mut buffer = alloc::vec![0u8; 1400];
        let sizes = (0..36).chain([63, 64, 65, 95, 96, 97, 128, 129, 255, 511, 512, 513, 600]);
        for size in sizes {
            for (from, to) in [(0, 700), (700, 3), (700, 701), (701, 700), (700, 709), (709, 700)] {
                for (at, byte) in buffer.iter_mut().enumerate() {
                    *byte = (at * 7 + size) as u8;
                }
                buffer.copy_within(from..from + size, core::hint::black_box(to));
                let right = buffer.iter().enumerate().all(|(at, byte)| {
                    let source = if (to..to + size).contains(&at) { at - to + from } else { at };
                    *byte == (source * 7 + size) as u8
                });
                if !right {
                    say(&format!("memory/copy: FAIL: {size} bytes from {from} to {to}"));
                    return false;
                }
            }
            let (source, target) = buffer.split_at_mut(700);
            source.fill(0x5a);
            target.fill(0);
            target[5..5 + size].copy_from_slice(core::hint::black_box(&source[1..1 + size]));
            source[3..3 + size].fill(core::hint::black_box(0xa5));
            let copied =
                target.iter().enumerate().all(|(at, byte)| (*byte == 0x5a) == (5..5 + size).contains(&at));
            let filled =
                source.iter().enumerate().all(|(at, byte)| (*byte == 0xa5) == (3..3 + size).contains(&at));
            if !(copied && filled) {
                say(&format!("memory/copy: FAIL: {size} bytes"));
                return false;
            }
        }
        say("memory/copy: pass");
        true
    }

    /// Judges the machine by the suites of the contracts that it offers.
    fn conformance() -> ExitStatus {
        use hypercall::conformance::{self, CheckReport, Outcome};
        let mut failed = u32::from(!copies_right());
        let mut report = |check: CheckReport| {
            failed += u32::from(matches!(check.outcome, Outcome::Fail(_)));
            say(&format!("{check}"));
        };
        conformance::run(Machine, &mut report);
        conformance::run_dma(Machine, &mut report);
        conformance::run_mmio(Machine, &mut report);
        conformance::run_pci(Machine, &mut report);
        let line = hypercall::IrqSource::Line(anykernel_rumprun::SERIAL_LINE);
        conformance::run_irq(Machine, line, &mut anykernel_rumprun::interrupt_by_serial_port, &mut report);
        say(&format!("conformance: {failed} failed"));
        if failed == 0 { ExitStatus::Success } else { ExitStatus::Failure }
    }

    pub(crate) fn main(kernel: &Arc<Kernel<Machine>>) -> ExitStatus {
        let word = kernel.config().app.get(1).map_or("", |word| word.as_str());
        static CONSTANT: [u8; 4] = [1, 2, 3, 4];
        match word {
            "" => greet(),
            "panic" => fail_on_request(),
            "overflow" => {
                say(&format!("{}", overflow(0)));
                ExitStatus::Failure
            }
            "write-text" | "write-constant" | "null" => {
                let target: *mut u8 = match word {
                    "write-text" => (main as *const ()).cast_mut().cast(),
                    "write-constant" => CONSTANT.as_ptr().cast_mut(),
                    _ => core::ptr::null_mut(),
                };
                // SAFETY: it faults, which is what the caller wants to see.
                unsafe { core::hint::black_box(target).write_volatile(0x90) };
                ExitStatus::Failure
            }
            "execute-data" => {
                let code = Box::new([0xc3u8; 16]);
                // SAFETY: it faults, which is what the caller wants to see.
                let call: extern "C" fn() =
                    unsafe { core::mem::transmute(core::hint::black_box(code.as_ptr())) };
                call();
                ExitStatus::Failure
            }
            "copies" => {
                if copies_right() {
                    ExitStatus::Success
                } else {
                    ExitStatus::Failure
                }
            }
            "clock" => tell_time(),
            "conformance" => conformance(),
            "fail" => Machine.exit(ExitStatus::Failure),
            _ => {
                say("hello: unknown request");
                ExitStatus::Usage
            }
        }
    }
}

#[cfg(target_os = "none")]
use application::main as application_main;
anykernel_rumprun::image!(application_main);
