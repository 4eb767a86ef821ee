use super::*;
use crate::testing::{TestHost, UsbLoopback};
use crate::{
    Call, Clock, HostLink, HostUsb, Memory, Result, ThreadSpec, Threads, UsbPath, UsbTransfer,
    UsbTransferKind,
};
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use std::collections::BTreeSet;

fn recorded(host: TestHost) -> (Recorded<TestHost>, ByteRing) {
    let ring = ByteRing::new(4 << 20).unwrap();
    (Recorded::new(host, Box::leak(Box::new(Recorder::new(ring)))), ring)
}

fn records(ring: ByteRing) -> Vec<Record> {
    let mut bytes = Vec::new();
    ring.read(&mut bytes);
    let mut rest = &bytes[..];
    let records = core::iter::from_fn(|| Record::take(&mut rest).ok()).collect();
    assert!(rest.is_empty(), "{} bytes are no record", rest.len());
    records
}

#[test]
fn a_call_is_written_with_all_that_it_was_told() {
    let host = TestHost::new();
    let disk = host.add_disk(vec![7; 8192], 512, false);
    let (recorded, ring) = recorded(host);
    let mut sector = [0; 512];
    crate::HostBlock::disk_read(&recorded, disk, 3, &mut sector).unwrap();
    assert!(recorded.alloc_pages(0).is_err());
    let now = recorded.monotonic_ns();
    let [read, pages, time] = &records(ring)[..] else { panic!("three records") };
    assert_eq!(
        (read.event.name(), &read.arguments[1..], read.data.as_slice()),
        ("disk_read", &[3, 512][..], &[7; 512][..])
    );
    assert_eq!(outcome_of(pages.results[0]), Some(Err(crate::Error::Invalid)));
    assert_eq!((time.event.name(), time.results.as_slice()), ("monotonic_ns", &[now][..]));
}

/// The law on which a replay rests.
#[test]
fn another_thread_goes_on_only_where_one_sleeps() {
    let (host, ring) = recorded(TestHost::new());
    let spawn = |rounds: usize| -> Result<_> {
        let body = move || {
            for _ in 0..rounds {
                host.monotonic_ns();
                host.memory_bytes();
                host.yield_now();
            }
        };
        host.spawn(ThreadSpec { name: "t", cpu: None }, Box::new(body))
    };
    let threads: Vec<_> = (0..4).map(|n| spawn(50 + n).unwrap()).collect();
    threads.into_iter().for_each(|thread| host.join(thread).unwrap());
    let entered = std::thread::spawn(move || host.enter(ENTER_STOP, || host.yield_now()));
    host.outside(|_| {
        entered.join().unwrap();
        9
    });
    host.leave();
    let records = records(ring);
    let sleeps = |event| match event {
        Event::Call(call) => call.blocks(),
        Event::Begin | Event::Enter | Event::Outside => true,
        _ => false,
    };
    let mut running = Some(0);
    for record in &records {
        // What blocks was begun earlier: its record is where the thread goes on.
        assert!(
            running == Some(record.thread) || sleeps(record.event) || record.event == Event::Raise,
            "{record:?}"
        );
        running = match record.event {
            Event::End | Event::Leave => None,
            _ => Some(record.thread),
        };
    }
    let threads: BTreeSet<u32> = records.iter().map(|record| record.thread).collect();
    assert_eq!(threads.len(), 6);
    assert_eq!(
        records.iter().filter(|record| record.event == Event::Outside && record.results == [9]).count(),
        1
    );
}

#[test]
fn what_the_host_raises_comes_as_a_record_where_a_thread_sleeps() {
    let host = TestHost::new();
    let (a, b) = host.add_link_pair();
    let (recorded, ring) = recorded(host);
    let signal = Arc::new(Signal::new());
    recorded.link_open(a, signal.clone()).unwrap();
    host.link_open(b, Arc::new(Signal::new())).unwrap();
    host.link_send(b, &[0x5a; 60]).unwrap();
    assert_eq!(signal.count(), 1, "nothing reaches a component between its calls, but that the host has it");
    assert!(signal.wait(&recorded, 1, None));
    assert_eq!(signal.count(), 2);
    let mut frame = [0; 2000];
    assert_eq!(recorded.link_receive(a, &mut frame), Ok(60));
    let kinds: Vec<&str> = records(ring).iter().map(|record| record.event.name()).collect();
    assert_eq!(kinds, ["link_open", "raise", "park", "link_receive"]);
    // A component may raise it, too.
    signal.raise(&recorded);
    assert!(signal.wait(&recorded, 2, None));
    recorded.link_close(a);
    assert_eq!(Arc::strong_count(&signal), 1, "it was given back");
}

/// A thread that already sleeps is woken by the host, and by other threads.
#[test]
fn sleepers_wake() {
    let host = TestHost::new();
    let (a, b) = host.add_link_pair();
    let (recorded, _) = recorded(host);
    let signal = Arc::new(Signal::new());
    recorded.link_open(a, signal.clone()).unwrap();
    host.link_open(b, Arc::new(Signal::new())).unwrap();
    let waiter = signal.clone();
    let body = move || {
        assert!(waiter.wait(&recorded, 0, None));
        assert!(waiter.wait(&recorded, 1, None));
    };
    let thread = recorded.spawn(ThreadSpec { name: "t", cpu: None }, Box::new(body)).unwrap();
    let pause = || std::thread::sleep(core::time::Duration::from_millis(20));
    recorded.outside(|_| {
        pause();
        host.link_send(b, &[0x5a; 60]).unwrap();
        pause();
        0
    });
    signal.raise(&recorded);
    recorded.join(thread).unwrap();
}

/// One that asks for the time between its looks, at least.
#[test]
fn a_thread_may_spin_for_another() {
    let (host, ring) = recorded(TestHost::new());
    let (turn, begun) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let play = |me: u32| {
        let (turn, begun) = (turn.clone(), begun.clone());
        let body = move || {
            // On a busy machine the other one may come late, and whoever spins alone is not preempted.
            begun.fetch_add(1, Ordering::Release);
            while begun.load(Ordering::Acquire) < 2 {
                std::thread::sleep(std::time::Duration::from_millis(1));
                host.yield_now();
            }
            while turn.load(Ordering::Acquire) < 10 {
                if turn.load(Ordering::Acquire) % 2 == me {
                    turn.fetch_add(1, Ordering::Release);
                }
                host.monotonic_ns();
                // Nobody empties the ring, and the other one may lose the CPU before it asks for the baton again.
                std::thread::sleep(std::time::Duration::from_micros(20));
            }
        };
        host.spawn(ThreadSpec { name: "t", cpu: None }, Box::new(body)).unwrap()
    };
    [play(0), play(1)].into_iter().for_each(|thread| host.join(thread).unwrap());
    let preempted = records(ring).iter().filter(|record| record.event == Event::Preempt).count();
    assert!(preempted >= 9, "{preempted}");
}

#[test]
fn a_signal_that_the_host_does_not_have_is_not_kept() {
    let host = TestHost::new();
    let (link, _) = host.add_link_pair();
    let (recorded, _) = recorded(host);
    for _ in 0..3 {
        let signal = Arc::new(Signal::new());
        assert!(recorded.link_open(link + 9, signal.clone()).is_err());
        assert_eq!(Arc::strong_count(&signal), 1);
        recorded.link_open(link, signal.clone()).unwrap();
        recorded.link_close(link);
        assert_eq!(Arc::strong_count(&signal), 1);
    }
    assert_eq!(recorded.recorder().held(|held| held.sources.len()), 1, "its place is used again");
}

#[test]
fn who_slept_before_the_host_had_the_signal_is_woken() {
    let host = TestHost::new();
    let (a, b) = host.add_link_pair();
    let (recorded, _) = recorded(host);
    let signal = Arc::new(Signal::new());
    let slept = signal.clone();
    let sleeper = move || {
        let deadline = recorded.monotonic_ns() + 20_000_000_000;
        loop {
            let seen = slept.count();
            if recorded.link_receive(a, &mut [0; 1514]).is_ok() {
                return;
            }
            assert!(slept.wait(&recorded, seen, Some(deadline)), "nobody woke it");
        }
    };
    let thread = recorded.spawn(ThreadSpec { name: "t", cpu: None }, Box::new(sleeper)).unwrap();
    for _ in 0..10 {
        recorded.yield_now();
    }
    recorded.link_open(a, signal).unwrap();
    host.link_open(b, Arc::new(Signal::new())).unwrap();
    host.link_send(b, &[0x5a; 60]).unwrap();
    recorded.join(thread).unwrap();
}

#[test]
fn a_thread_that_spins_hears_of_the_host() {
    let host = TestHost::new();
    let (a, b) = host.add_link_pair();
    let (recorded, _) = recorded(host);
    let signal = Arc::new(Signal::new());
    recorded.link_open(a, signal.clone()).unwrap();
    let seen = signal.count();
    host.link_open(b, Arc::new(Signal::new())).unwrap();
    host.link_send(b, &[0x5a; 60]).unwrap();
    while signal.count() == seen {
        recorded.monotonic_ns();
    }
}

#[test]
fn transfers_of_usb_are_written_where_they_begin_and_where_they_are_reaped() {
    let host = TestHost::new();
    let path = UsbPath::parse("1-2").unwrap();
    let id = host.plug_usb(path, Box::new(UsbLoopback::default()));
    let (recorded, ring) = recorded(host);
    let (watch, signal) = (Arc::new(Signal::new()), Arc::new(Signal::new()));
    recorded.usb_watch(Some(watch.clone())).unwrap();
    let mut found = Vec::new();
    recorded.usb_devices(&mut |info| found.push(info));
    assert_eq!((found.len(), found[0].id, found[0].path), (1, id, path));
    recorded.usb_open(id, signal.clone()).unwrap();
    recorded.usb_claim(id, 0).unwrap();
    let transfer = |endpoint, data: &[u8], tag| UsbTransfer {
        kind: UsbTransferKind::Bulk,
        endpoint,
        data: vec![data.into()],
        zero_packet: false,
        tag,
    };
    recorded.usb_submit(id, transfer(0x01, b"hello", 1)).unwrap();
    recorded.usb_submit(id, transfer(0x82, &[0; 512], 2)).unwrap();
    let mut reaped = Vec::new();
    while reaped.len() < 2 {
        let seen = signal.count();
        match recorded.usb_reap(id) {
            Some(completion) => reaped.push(completion),
            None => assert!(signal.wait(&recorded, seen, None)),
        }
    }
    assert_eq!((&reaped[1].transfer.data[0][..5], reaped[1].actual), (&b"hello"[..], 5));
    assert!(recorded.usb_submit(id, transfer(0x07, b"", 3)).is_err());
    recorded.usb_close(id);
    recorded.usb_watch(None).unwrap();
    assert_eq!((Arc::strong_count(&watch), Arc::strong_count(&signal)), (1, 1), "they were given back");
    let records = records(ring);
    let of = |call| records.iter().filter(move |record| record.event == Event::Call(call));
    let words: Vec<u64> = of(Call::UsbDevices)
        .next()
        .unwrap()
        .data
        .as_chunks::<8>()
        .0
        .iter()
        .copied()
        .map(u64::from_le_bytes)
        .collect();
    assert_eq!(usb_device_of(words.try_into().unwrap()), Some(found[0]));
    assert_eq!(of(Call::UsbSubmit).map(|one| one.results[0]).collect::<Vec<_>>()[..2], [0, 0]);
    let reaped: Vec<_> = of(Call::UsbReap).filter(|one| one.results[0] == 1).collect();
    assert_eq!((reaped[0].results[1], reaped[0].data.len()), (1, 0), "what was sent is known");
    assert_eq!((reaped[1].results[1], reaped[1].data.as_slice()), (2, &b"hello"[..]));
}

#[test]
fn a_ring_that_nobody_reads_ends_the_recording_and_not_the_domain() {
    let ring = ByteRing::new(256).unwrap();
    let host = TestHost::with_virtual_time();
    let recorder: &'static Recorder = Box::leak(Box::new(Recorder::new(ring)));
    let recorded = Recorded::new(host, recorder);
    // The test host's clock is virtual: somebody must move it.
    let mover = std::thread::spawn(move || {
        while !recorder.given_up() {
            host.advance(1_000_000_000);
            std::thread::yield_now();
        }
    });
    for _ in 0..1000 {
        recorded.memory_bytes();
    }
    mover.join().unwrap();
    assert!(recorder.given_up() && ring.lost(), "and whoever reads it later knows");
}

#[test]
fn records_are_read_as_written() {
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 11
    };
    for _ in 0..2000 {
        let some = |random: &mut dyn FnMut() -> u64| -> Vec<u64> {
            (0..random() % 5).map(|_| random() >> (random() % 53)).collect()
        };
        let record = Record {
            event: Event::Call(crate::Call::ALL[random() as usize % crate::Call::ALL.len()]),
            thread: random() as u32,
            arguments: some(&mut random),
            results: some(&mut random),
            data: (0..random() % 40).map(|n| n as u8).collect(),
        };
        let mut bytes = Vec::new();
        record.put(&mut bytes);
        let mut rest = &bytes[..];
        assert_eq!(Record::take(&mut rest), Ok(record));
        assert!(rest.is_empty());
        for len in 0..bytes.len() {
            assert_eq!(Record::take(&mut &bytes[..len]), Err(NoRecord::Cut), "cut to {len}");
        }
        // Whatever is read: no panic, and no more memory than there are bytes.
        let at = random() as usize % bytes.len();
        bytes[at] ^= 1 << (random() % 8);
        let _ = Record::take(&mut &bytes[..]);
    }
}
