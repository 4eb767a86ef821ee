//! The simulated host keeps every law of the contracts, and does everything the same way twice.

use anykernel::sync::Mutex as KernelMutex;
use anykernel_userspace::sim::{
    DiskModel, Failure, LinkModel, MS, NodeSetup, PowerCut, SECOND, Schedule, SimConfig, SimHost, Simulation,
};
use hypercall::conformance;
use hypercall::{
    Clock, CpuId, Error, Exit, ExitStatus, HostBlock, HostLink, IrqSource, Memory, Signal, ThreadSpec,
    Threads,
};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

mod common;
use common::{NEED_WRITING, judge, params};

const SCHEDULES: [Schedule; 3] = [
    Schedule::Turns,
    Schedule::Random { switch_ppm: 100_000 },
    Schedule::Priorities { depth: 3, steps: 100_000 },
];

fn setup(cpus: u32) -> NodeSetup {
    NodeSetup { cpus, params: params().into_iter().collect(), ..NodeSetup::named("a") }
}

#[test]
fn core_contract() {
    for schedule in SCHEDULES {
        for cpus in [1, 2] {
            let sim = Simulation::new(SimConfig::seeded(5).schedule(schedule));
            let host = sim.node(setup(cpus));
            let absent: &[&str] = if cpus == 1 { &["threads/parallel"] } else { &[] };
            judge(&format!("{schedule:?}"), absent, |report| conformance::run(host, report));
            judge("console", &[], |report| {
                conformance::run_console(host, &mut || sim.console(host).into_bytes(), report);
            });
            assert!(!sim.leaks(host).any(), "{}", sim.leaks(host));
        }
    }
}

/// The same on a thread of the node instead of the outside.
#[test]
fn core_contract_on_a_thread() {
    let sim = Simulation::new(SimConfig::default());
    let host = sim.node(setup(2));
    let reports = sim.run(host, "main", move || {
        let mut reports = Vec::new();
        conformance::run(host, &mut |report| reports.push(report));
        reports
    });
    judge("core", &[], |report| reports.unwrap().into_iter().for_each(report));
}

#[test]
fn disks() {
    let sim = Simulation::new(SimConfig::default());
    let writable = sim.disk(vec![0; 4 << 20], DiskModel::default());
    let fixed = sim.disk(vec![7; 4 << 20], DiskModel { read_only: true, ..DiskModel::default() });
    let host = sim.node(NodeSetup { disks: vec![writable, fixed], ..setup(2) });
    judge("writable", &["block/read-only"], |report| conformance::run_block(host, 0, report));
    judge("read-only", &NEED_WRITING, |report| conformance::run_block(host, 1, report));
}

#[test]
fn links() {
    for mtu in [1500, u16::MAX] {
        let sim = Simulation::new(SimConfig::default());
        let model = LinkModel { mtu, bits_per_second: Some(10_000_000_000), ..LinkModel::default() };
        let wire = sim.segment(model);
        let host = sim.node(NodeSetup { links: vec![wire, wire], ..setup(2) });
        judge("wire", &[], |report| conformance::run_link(host, 0, Some(1), report));
    }
}

#[test]
fn devices() {
    struct Silent;
    impl anykernel_userspace::sim::Registers for Silent {
        fn read(&mut self, _: anykernel_userspace::sim::Bus, offset: usize, _: hypercall::Width) -> u64 {
            match offset {
                0 => 0x7472_6976,
                4 => 2,
                _ => 0,
            }
        }
        fn write(&mut self, _: anykernel_userspace::sim::Bus, _: usize, _: hypercall::Width, _: u64) {}
    }
    let sim = Simulation::new(SimConfig::default());
    let host = sim.node(setup(2));
    let model = std::rc::Rc::new(std::cell::RefCell::new(Silent));
    sim.add_mmio_device(host, hypercall::PhysAddr(0xfeb0_0000), 0x200, 5, model);
    let mut space = [0; 64];
    space[..4].copy_from_slice(&[0xf4, 0x1a, 0x42, 0x10]);
    sim.add_pci_function(
        host,
        hypercall::PciAddress { segment: 0, bus: 0, device: 1, function: 0 },
        &space,
        2,
        &[],
    );
    judge("dma", &[], |report| conformance::run_dma(host, report));
    judge("mmio", &[], |report| conformance::run_mmio(host, report));
    judge("pci", &[], |report| conformance::run_pci(host, report));
    let bus = anykernel_userspace::sim::Bus::new(host);
    let mut fire = || {
        bus.interrupt(IrqSource::Line(9));
    };
    judge("irq", &[], |report| {
        conformance::run_irq(host, IrqSource::Line(9), &mut fire, report);
    });
    assert!(!sim.leaks(host).any(), "{}", sim.leaks(host));
}

/// Threads that meet at locks, sleep, draw random numbers and send frames.
fn busy(config: SimConfig) -> (u64, Vec<u64>) {
    let sim = Simulation::new(config);
    let model = LinkModel { loss_ppm: 100_000, jitter_ns: MS, duplicate_ppm: 50_000, ..LinkModel::default() };
    let wire = sim.segment(model);
    let seen = Arc::new(Mutex::new(Vec::new()));
    for n in 0..3 {
        let host = sim.node(NodeSetup { cpus: 2, links: vec![wire], ..NodeSetup::named(&format!("n{n}")) });
        let signal = Arc::new(Signal::new());
        host.link_open(0, signal.clone()).unwrap();
        let lock = Arc::new(KernelMutex::new(host, 0u64));
        for worker in 0..3 {
            let (lock, seen, signal) = (lock.clone(), seen.clone(), signal.clone());
            let body = move || {
                use hypercall::Entropy;
                for turn in 0..40u64 {
                    let mut random = [0; 8];
                    host.fill_random(&mut random).unwrap();
                    let pause = u64::from_le_bytes(random) % MS;
                    host.park(&AtomicU32::new(0), 0, Some(host.monotonic_ns() + pause));
                    *lock.lock() += turn;
                    let mut frame = [0xff; 60];
                    frame[6..12].copy_from_slice(&[2, 0, 0, 0, n, worker]);
                    host.link_send(0, &frame).unwrap();
                    let count = signal.count();
                    signal.wait(&host, count, Some(host.monotonic_ns() + MS));
                    let mut buf = [0; 2000];
                    while host.link_receive(0, &mut buf).is_ok() {
                        seen.lock()
                            .unwrap()
                            .push(u64::from(n) << 32 | u64::from(buf[10]) << 8 | u64::from(buf[11]));
                    }
                }
            };
            host.spawn(ThreadSpec { name: "worker", cpu: None }, Box::new(body)).unwrap();
        }
    }
    sim.run_for(10 * SECOND).unwrap();
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    assert!(seen.len() > 100);
    (sim.trace_hash(), seen)
}

#[test]
fn the_same_seed_is_the_same_run() {
    for schedule in SCHEDULES {
        let config = SimConfig::seeded(11).schedule(schedule);
        let first = busy(config.clone());
        assert_eq!(first, busy(config), "{schedule:?}");
        assert_ne!(first.0, busy(SimConfig::seeded(12).schedule(schedule)).0, "{schedule:?}");
    }
}

#[test]
fn a_deadlock_is_reported_with_who_waits() {
    let sim = Simulation::new(SimConfig::default());
    let host = sim.node(NodeSetup::named("a"));
    let result = sim.run(host, "main", move || {
        host.park(&AtomicU32::new(0), 0, None);
    });
    let Err(failure @ Failure::Deadlock { .. }) = result else { panic!("{result:?}") };
    assert!(failure.to_string().contains("a/main: parked since"), "{failure}");
    // The world goes on, and the thread is unwound when it ends.
    sim.run_for(SECOND).unwrap();
}

#[test]
fn a_panic_takes_its_node_down_and_no_other() {
    let sim = Simulation::new(SimConfig::default());
    let (a, b) = (sim.node(NodeSetup::named("a")), sim.node(NodeSetup::named("b")));
    let lives = Arc::new(AtomicU64::new(0));
    let its = lives.clone();
    let counts = move || loop {
        its.fetch_add(1, SeqCst);
        b.park(&AtomicU32::new(0), 0, Some(b.monotonic_ns() + MS));
    };
    b.spawn(ThreadSpec { name: "counts", cpu: None }, Box::new(counts)).unwrap();
    let result = sim.run(a, "main", || std::panic::resume_unwind(Box::new("on purpose")));
    let Err::<(), _>(Failure::Panic(panicked)) = result else { panic!("{result:?}") };
    assert_eq!((panicked.thread.as_str(), panicked.message.as_str()), ("main", "on purpose"));
    assert_eq!(sim.exit_status(a), Some(ExitStatus::Panic));
    assert_eq!(a.alloc_pages(1).unwrap_err(), Error::Gone);
    sim.run_for(SECOND).unwrap();
    assert!(lives.load(SeqCst) > 900);
    assert_eq!(sim.exit_status(b), None);
}

#[test]
fn exit_ends_every_thread_of_the_node() {
    let sim = Simulation::new(SimConfig::default());
    let host = sim.node(NodeSetup { cpus: 2, ..NodeSetup::named("a") });
    let held = Arc::new(());
    for _ in 0..4 {
        let held = held.clone();
        let waits = move || {
            let _held = held;
            host.park(&AtomicU32::new(0), 0, None);
        };
        host.spawn(ThreadSpec { name: "waits", cpu: None }, Box::new(waits)).unwrap();
    }
    let result: Result<(), _> = sim.run(host, "main", move || host.exit(ExitStatus::Usage));
    assert_eq!(result, Err(Failure::Exited(ExitStatus::Usage)));
    sim.run_for(MS).unwrap();
    assert_eq!(Arc::strong_count(&held), 1, "every stack was unwound");
    assert_eq!(sim.leaks(host).abandoned, 0);
}

/// A reset in the middle: threads that wait, hold locks, sleep in a disk or never ran leave nothing behind.
#[test]
fn dropping_a_world_gives_everything_back() {
    struct Counted(Arc<AtomicU64>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_sub(1, SeqCst);
        }
    }
    let alive = Arc::new(AtomicU64::new(0));
    let counted = || {
        alive.fetch_add(1, SeqCst);
        Counted(alive.clone())
    };
    for seed in 0..20 {
        let sim = Simulation::new(SimConfig::seeded(seed).schedule(Schedule::Random { switch_ppm: 200_000 }));
        let disk = sim.disk(vec![0; 1 << 20], DiskModel::default());
        let host = sim.node(NodeSetup { cpus: 2, disks: vec![disk], ..NodeSetup::named("a") });
        let lock = Arc::new(KernelMutex::new(host, counted()));
        for n in 0..8 {
            let (lock, mine) = (lock.clone(), counted());
            let body = move || {
                let _mine = mine;
                loop {
                    let guard = lock.lock();
                    host.disk_write(0, n, &[1; 512]).unwrap();
                    host.yield_now();
                    drop(guard);
                }
            };
            host.spawn(ThreadSpec { name: "works", cpu: None }, Box::new(body)).unwrap();
        }
        sim.run_for(seed * MS).unwrap();
        drop(lock);
        drop(sim);
        assert_eq!(alive.load(SeqCst), 0, "seed {seed}");
        assert_eq!(host.disk_info(0), Err(Error::Gone));
    }
}

#[test]
fn power_cuts_keep_what_was_flushed() {
    for seed in 0..50 {
        let sim = Simulation::new(SimConfig::seeded(seed));
        let disk = sim.disk(vec![0; 64 << 10], DiskModel::default());
        let host = sim.node(NodeSetup { disks: vec![disk], ..NodeSetup::named("a") });
        let flushed = sim.run(host, "main", move || {
            host.disk_write(0, 0, &[1; 4096]).unwrap();
            host.disk_flush(0).unwrap();
            host.disk_write(0, 4, &[2; 4096]).unwrap();
        });
        flushed.unwrap();
        sim.crash(host);
        let image = sim.durable_image(disk);
        assert_eq!(image[..2048], [1; 2048]);
        for sector in 4..12 {
            let bytes = &image[sector * 512..][..512];
            let before = if sector < 8 { 1 } else { 0 };
            assert!(bytes == [2; 512] || bytes == [before; 512], "a sector is whole");
        }
        let again = sim.reboot(host);
        let mut buf = [0; 4096];
        again.disk_read(0, 0, &mut buf).unwrap();
        assert_eq!(buf[..2048], [1; 2048]);
    }
    let sim = Simulation::new(SimConfig::default());
    let disk = sim.disk(vec![0; 64 << 10], DiskModel::default());
    let host = sim.node(NodeSetup { disks: vec![disk], ..NodeSetup::named("a") });
    sim.set_power_cut(disk, PowerCut::LoseAll);
    sim.cut_power_at(disk, 3);
    let result = sim.run(host, "main", move || {
        for n in 0..10 {
            host.disk_write(0, n, &[9; 512]).unwrap();
        }
    });
    assert_eq!(result, Err(Failure::Down));
    assert_eq!(sim.durable_image(disk), vec![0; 64 << 10]);
}

#[test]
fn partitions_cut_and_heal() {
    let sim = Simulation::new(SimConfig::default());
    let wire = sim.segment(LinkModel::default());
    let nodes: Vec<SimHost> = (0..3)
        .map(|n| sim.node(NodeSetup { links: vec![wire], ..NodeSetup::named(&format!("n{n}")) }))
        .collect();
    for node in &nodes {
        node.link_open(0, Arc::new(Signal::new())).unwrap();
    }
    let heard = |from: usize| -> Vec<bool> {
        nodes[from].link_send(0, &[0xff; 60]).unwrap();
        sim.run_for(MS).unwrap();
        nodes.iter().map(|node| node.link_receive(0, &mut [0; 1600]).is_ok()).collect()
    };
    assert_eq!(heard(0), [false, true, true]);
    sim.partition(wire, &[&[nodes[0], nodes[1]]]);
    assert_eq!(heard(0), [false, true, false]);
    assert_eq!(heard(2), [false, false, false]);
    sim.heal(wire);
    assert_eq!(heard(2), [true, true, false]);
}

#[test]
fn threads_keep_to_their_cpus_and_simulations_apart() {
    use hypercall::Cpus;
    let (one, two) = (Simulation::new(SimConfig::default()), Simulation::new(SimConfig::seeded(2)));
    let (a, b) = (one.node(setup(3)), two.node(setup(1)));
    let spec = ThreadSpec { name: "bound", cpu: Some(CpuId(2)) };
    let cpu = Arc::new(AtomicU32::new(9));
    let its = cpu.clone();
    let thread = a.spawn(spec, Box::new(move || its.store(a.current_cpu().0, SeqCst))).unwrap();
    a.join(thread).unwrap();
    assert_eq!(cpu.load(SeqCst), 2);
    one.run_for(SECOND).unwrap();
    assert!(b.monotonic_ns() < SECOND);
    drop(one);
    assert_eq!(a.alloc_pages(1).unwrap_err(), Error::Gone);
    two.run_for(SECOND).unwrap();
}
