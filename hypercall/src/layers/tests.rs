use super::*;
use crate::testing::TestHost;
use crate::*;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

fn granted(grants: Grants) -> (TestHost, Granted<TestHost>, &'static GrantBook) {
    let host = TestHost::new();
    let book: &'static GrantBook = Box::leak(Box::new(GrantBook::new("probe", grants)));
    (host, Granted::new(host, book), book)
}

fn ring(capacity: usize) -> TraceRing {
    TraceRing::new(capacity).unwrap()
}

/// Only compiles if the layers are hosts of every kind.
fn is_every_kind_of_host<H: DeviceHost + HostBlock + HostLink + HostUsb>(_: H) {}

#[test]
fn layers_stack() {
    let (_, granted, _) = granted(Grants::of(Capability::ALL));
    is_every_kind_of_host(granted);
    is_every_kind_of_host(Traced::new(granted, ring(16)));
    static NOTHING: FaultPlan = FaultPlan::new(Fault::Never);
    is_every_kind_of_host(Faulty::new(granted, &NOTHING));
}

/// Calls every function once, except `exit`.
fn call_everything<H: DeviceHost + HostBlock + HostLink + HostUsb>(host: H) {
    let word = atomic::AtomicU32::new(0);
    let signal = || Arc::new(Signal::new());
    let function = PciAddress { segment: 0, bus: 0, device: 1, function: 0 };
    host.monotonic_ns();
    host.realtime_ns();
    let _ = host.alloc_pages(0);
    host.memory_bytes();
    if let Ok(thread) = host.spawn(ThreadSpec { name: "t", cpu: None }, Box::new(|| ())) {
        host.join(thread).unwrap();
    } else {
        let _ = host.join(ThreadId(u64::MAX));
    }
    host.park(&word, 1, None);
    host.unpark(&word, 1);
    host.yield_now();
    host.cpu_count();
    host.current_cpu();
    let _ = host.fill_random(&mut [0; 4]);
    let _ = host.param("config", &mut []);
    host.console_write(b"");
    let _ = host.dma_alloc(0, 1);
    host.mmio_devices(&mut |_| ());
    let _ = host.mmio_map(PhysAddr(0), 0);
    host.pci_functions(&mut |_| ());
    let _ = host.pci_read(function, 0, Width::U32);
    let _ = host.pci_write(function, 0, Width::U32, 0);
    let _ = host.irq_attach(IrqSource::Line(u32::MAX), CpuId(0), signal());
    host.irq_unmask(IrqId(99));
    host.irq_detach(IrqId(99));
    host.disk_count();
    let _ = host.disk_info(9);
    let _ = host.disk_read(9, 0, &mut []);
    let _ = host.disk_write(9, 0, &[]);
    let _ = host.disk_flush(9);
    host.link_count();
    let _ = host.link_open(9, signal());
    let _ = host.link_send(9, &[]);
    let _ = host.link_receive(9, &mut []);
    host.link_close(9);
    let nobody = UsbDeviceId(9);
    let _ = host.usb_watch(None);
    host.usb_devices(&mut |_| ());
    let _ = host.usb_descriptors(nobody, &mut []);
    let _ = host.usb_open(nobody, signal());
    host.usb_close(nobody);
    let _ = host.usb_configure(nobody, 1);
    let _ = host.usb_claim(nobody, 0);
    host.usb_release(nobody, 0);
    let _ = host.usb_set_alternate(nobody, 0, 0);
    let _ = host.usb_clear_halt(nobody, 1);
    let _ = host.usb_reset(nobody);
    let (kind, data) = (UsbTransferKind::Bulk, Vec::new());
    let _ = host.usb_submit(nobody, UsbTransfer { kind, endpoint: 1, data, zero_packet: false, tag: 0 });
    host.usb_cancel(nobody, 0);
    host.usb_reap(nobody);
}

/// What [`call_everything`] calls: all but `exit`, what gives back what was not got, and registers of no region.
fn called() -> Vec<Call> {
    let left_out = [
        Call::FreePages,
        Call::Exit,
        Call::DmaFree,
        Call::DmaMap,
        Call::DmaUnmap,
        Call::DmaRead,
        Call::DmaCopy,
        Call::MmioRead,
        Call::MmioWrite,
    ];
    Call::ALL.iter().copied().filter(|call| !left_out.contains(call)).collect()
}

#[test]
fn what_is_granted_passes() {
    let (host, granted, book) = granted(Grants::of(Capability::ALL));
    call_everything(granted);
    assert_eq!(book.violations(), 0);
    assert_eq!(host.console_text(), "");
}

#[test]
fn what_is_not_granted_is_refused_and_told_once() {
    let (host, granted, book) = granted(Grants::NONE);
    call_everything(granted);
    call_everything(granted);
    let text = host.console_text();
    // One line for each function that was called.
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), called().len(), "{text}");
    assert!(lines.contains(&"probe: park refused: its manifest does not grant threads"));
    assert_eq!(book.violations(), 2 * lines.len() as u64);
}

#[test]
fn a_refusal_is_what_the_contract_allows() {
    let (_, granted, _) = granted(Grants::of(&[Capability::Clock]));
    let word = atomic::AtomicU32::new(7);
    assert_eq!(granted.park(&word, 7, None), ParkResult::Woken);
    assert_eq!(granted.unpark(&word, 1), 0);
    assert_eq!(granted.fill_random(&mut [0; 4]), Err(Error::Denied));
    assert_eq!(granted.alloc_pages(1).map(|pages| pages.count), Err(Error::Denied));
    assert_eq!((granted.cpu_count(), granted.current_cpu(), granted.disk_count()), (1, CpuId(0), 0));
    assert!(granted.monotonic_ns() < u64::MAX);
}

#[test]
fn every_call_is_traced() {
    let ring = ring(256);
    let traced = Traced::new(TestHost::new(), ring);
    call_everything(traced);
    let mut seen: Vec<Call> = Vec::new();
    let mut last_start = 0;
    while let Some(event) = ring.pop() {
        assert!(event.start_ns >= last_start);
        last_start = event.start_ns;
        seen.push(event.call);
    }
    assert_eq!(seen, called());
    assert_eq!(ring.dropped(), 0);
}

#[test]
fn a_traced_host_conforms() {
    let host = TestHost::new();
    host.set_config("{}");
    let traced = Traced::new(host, ring(64));
    conformance::run(traced, &mut |report| {
        assert_eq!(report.outcome, conformance::Outcome::Pass, "{report}")
    });
    let disk = host.add_disk(vec![0; 1 << 20], 512, false);
    conformance::run_block(traced, disk, &mut |report| {
        assert!(!matches!(report.outcome, conformance::Outcome::Fail(_)), "{report}");
    });
}

fn event(call: Call, start_ns: u64, duration_ns: u64, arguments: [u64; 2]) -> TraceEvent {
    TraceEvent { call, component: ComponentName::new("net"), cpu: CpuId(1), start_ns, duration_ns, arguments }
}

#[test]
fn a_full_ring_drops_and_counts() {
    let ring = ring(4);
    for start in 0..10 {
        ring.record(event(Call::YieldNow, start, 0, [0; 2]));
    }
    assert_eq!(ring.dropped(), 6);
    for start in 0..4 {
        assert_eq!(ring.pop(), Some(event(Call::YieldNow, start, 0, [0; 2])));
    }
    assert_eq!(ring.pop(), None);
    ring.record(event(Call::Park, 11, 3, [1, 2]));
    assert_eq!(ring.pop(), Some(event(Call::Park, 11, 3, [1, 2])));
}

#[test]
fn a_ring_takes_events_from_many_threads() {
    const EACH: u64 = 20_000;
    let ring = ring(128);
    let writers: Vec<_> = (0..2u64)
        .map(|writer| {
            std::thread::spawn(move || {
                for n in 0..EACH {
                    ring.record(event(Call::Unpark, n, writer, [n, !n]));
                }
            })
        })
        .collect();
    let mut seen = 0;
    let mut last = [None; 2];
    loop {
        let finished = writers.iter().all(|writer| writer.is_finished());
        match ring.pop() {
            Some(event) => {
                seen += 1;
                // Whole, and in the order of its writer.
                assert_eq!(event.arguments, [event.start_ns, !event.start_ns]);
                let last = &mut last[event.duration_ns as usize];
                assert!(last.is_none_or(|last| last < event.start_ns));
                *last = Some(event.start_ns);
            }
            None if finished => break,
            None => std::thread::yield_now(),
        }
    }
    assert_eq!(seen + ring.dropped(), 2 * EACH);
}

#[test]
fn writes_what_viewers_read() {
    let ring = ring(8);
    ring.record(event(Call::DiskRead, 1_234_567, 89_001, [8, 4096]));
    ring.record(event(Call::Park, 5, u64::MAX, [0x7f00, u64::MAX]));
    ring.record(event(Call::CpuCount, 2_000, 40, [0; 2]));
    // The first one's thread lost the CPU to the second one's, and came back.
    ring.record(event(Call::FillRandom, 2_010, 100, [9, 0]));
    ring.record(event(Call::FillRandom, 2_040, 1_000, [9, 0]));
    let mut writer = ChromeWriter::new(String::new(), "a \"b\"\n").unwrap();
    assert_eq!(writer.drain(ring), Ok(5));
    let text = writer.finish(7).unwrap();
    assert_eq!(
        text,
        r#"{"displayTimeUnit":"ns","traceEvents":[
{"name":"process_name","ph":"M","pid":1,"tid":0,"args":{"name":"a \"b\"\u000a"}},
{"name":"disk_read","cat":"net","ph":"b","id":1,"pid":1,"tid":1,"ts":1234.567,"args":{"sector":8,"bytes":4096}},
{"name":"disk_read","cat":"net","ph":"e","id":1,"pid":1,"tid":1,"ts":1323.568},
{"name":"park","cat":"net","ph":"b","id":2,"pid":1,"tid":1,"ts":0.005,"args":{"word":32512,"deadline_ns":null}},
{"name":"park","cat":"net","ph":"e","id":2,"pid":1,"tid":1,"ts":18446744073709551.615},
{"name":"thread_name","ph":"M","pid":1,"tid":0,"args":{"name":"CPU 0"}},
{"name":"thread_name","ph":"M","pid":1,"tid":1,"args":{"name":"CPU 1"}},
{"name":"cpu_count","cat":"net","ph":"X","pid":1,"tid":1,"ts":2.000,"dur":0.040,"args":{}},
{"name":"fill_random","cat":"net","ph":"b","id":4,"pid":1,"tid":1,"ts":2.010,"args":{"bytes":9}},
{"name":"fill_random","cat":"net","ph":"e","id":4,"pid":1,"tid":1,"ts":2.110},
{"name":"fill_random","cat":"net","ph":"X","pid":1,"tid":1,"ts":2.040,"dur":1.000,"args":{"bytes":9}}
],"otherData":{"events":5,"dropped":7}}
"#
    );
}

#[test]
fn a_trace_names_the_component() {
    let ring = ring(8);
    let traced = Traced::new(TestHost::new(), ring);
    traced.cpu_count();
    traced.of_component("virtio-blk").cpu_count();
    let names: Vec<_> = std::iter::from_fn(|| ring.pop()).map(|event| event.component).collect();
    assert_eq!(names, [ComponentName::KERNEL, ComponentName::new("virtio-b")]);
    assert_eq!(names[1].as_str(), "virtio-b");
    assert_eq!(ComponentName::from_word(u64::MAX).as_str(), "?");
    assert_eq!(ComponentName::from_word(0).as_str(), "?");
}

fn words(len: usize) -> &'static [AtomicU64] {
    (0..len).map(|_| AtomicU64::new(0)).collect::<Vec<_>>().leak()
}

#[test]
fn a_channel_carries_events_and_notes() {
    let words = words(64 << 10);
    assert!(Channel::attach(words).is_none());
    let writer = Channel::create(&words[..40 << 10], ChannelKind::Trace).unwrap();
    let reader = Channel::attach(words).unwrap();
    assert!(writer.bytes().is_none() && reader.kind() == ChannelKind::Trace);
    let (from, to) = (writer.events().unwrap(), reader.events().unwrap());
    from.record(event(Call::Park, 11, 3, [1, 2]));
    assert!(!writer.is_drained());
    assert_eq!(to.pop(), Some(event(Call::Park, 11, 3, [1, 2])));
    assert!(writer.notes().unwrap().write(b"a 1\n", || false));
    let mut notes = Vec::new();
    assert_eq!((reader.notes().unwrap().read(&mut notes), notes.as_slice()), (4, &b"a 1\n"[..]));
    assert!(writer.is_drained());
    // Cut short, or with any word wrong, it is refused or at least does no harm.
    assert!(Channel::attach(&words[..30 << 10]).is_none());
    for at in 0..7 {
        let right = words[at].swap(u64::MAX, Relaxed);
        assert!(Channel::attach(words).is_none(), "word {at}");
        words[at].store(right, Relaxed);
    }
    assert!(Channel::create(&words[..1000], ChannelKind::Trace).is_none());
    writer.close();
    assert!(Channel::attach(words).is_none());
}

#[test]
fn bytes_cross_a_ring_whole_and_in_order() {
    let ring = ByteRing::new(256).unwrap();
    let sent: Vec<u8> = (0..100_000u32).map(|n| (n * 7) as u8).collect();
    let expected = sent.clone();
    let writer = std::thread::spawn(move || {
        sent.chunks(37).all(|part| {
            ring.write(part, || {
                std::thread::yield_now();
                true
            })
        })
    });
    let mut received = Vec::new();
    while received.len() < expected.len() {
        ring.read(&mut received);
    }
    assert!(writer.join().unwrap());
    assert_eq!(received, expected);
    // Nobody reads: the writer may give up.
    assert!(!ring.write(&[0; 1000], || false));
}

/// A reader is safe from whatever a guest writes in the ring.
#[test]
fn a_ring_of_nonsense_is_read_without_harm() {
    for seed in 0..200u64 {
        let words = words(24 + 64);
        let ring = ByteRing::over(words).unwrap();
        let mut state = seed;
        for word in words.iter().skip(8) {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            word.store(state >> (seed % 64), Relaxed);
        }
        let mut out = Vec::new();
        for _ in 0..10 {
            ring.read(&mut out);
        }
        assert!(out.len() <= 10 * 64 * (64 << 10));
    }
}
