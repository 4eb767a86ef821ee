//! The suite is judged here: the right host passes every check, and each deliberately wrong one fails exactly the
//! check meant for its fault.
#![expect(unsafe_code, reason = "forwards and breaks memory contracts")]

mod block;
mod device;
mod link;
mod system;
mod usb;

use super::*;
use crate::atomic::{AtomicU32, Ordering::SeqCst};
use crate::testing::{TestHost, UsbLoopback};
use crate::*;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU64;
use core::time::Duration;

/// What is wrong with a host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    TimeGoesBack,
    TimeSkewsBetweenCpus,
    ClockTicksAt100Hz,
    WallTimeStandsStill,
    CpuOutOfRange,
    CpuBindingIgnored,
    UnknownCpuAccepted,
    ZeroPagesGranted,
    PagesMisaligned,
    PagesNotZeroed,
    PagesShared,
    JoinReturnsEarly,
    JoinTwice,
    CompareThenSleep,
    ExpectedIgnored,
    DeadlineIgnored,
    DeadlineEarly,
    ParkSpins,
    UnparkLost,
    UnparkWakesAll,
    UnparkWakesOne,
    UnparkCountsNone,
    UnparkWakesStrangers,
    RandomConstant,
    RandomShort,
    ParamTruncates,
    ParamWritesBeforeRefusing,
    UnknownParamEmpty,
    ConsoleTears,
    ConsoleCuts,
    NoVersion,
    DmaMisaligned,
    DmaNotZeroed,
    DmaShared,
    DmaMapOverlaps,
    DmaMapClobbers,
    IrqTwice,
    IrqNever,
    IrqAfterDetach,
    IrqStaysMasked,
    ShortRead,
    WriteBesideTheSpot,
    FlushLosesWrites,
    WritesReadOnly,
    PartialSectorAccepted,
    FrameCut,
    FramesSwapped,
    LinkSignalNever,
    LinkOpensTwice,
    UsbListsTwice,
    UsbBusZero,
    UsbStrangersOpened,
    UsbDescriptorsCut,
    UsbOpensTwice,
    UsbControlZeroes,
    UsbFillsFirst,
    UsbShortAsFull,
    UsbStallAsDone,
    UsbCompletesTwice,
    UsbLoses,
    UsbSignalNever,
    UsbKeepsRefused,
    UsbClaimsAnything,
    UsbCancelSilent,
    UsbReleaseForgets,
    UsbHaltStays,
    UsbKeepsSignal,
    UsbResetKills,
    UsbWatchForever,
}

/// What a wrong host remembers.
struct Memo {
    calls: AtomicU64,
    word: AtomicU32,
    pages: std::sync::Mutex<Vec<(usize, usize)>>,
    frame: std::sync::Mutex<Option<Vec<u8>>>,
    writes: std::sync::Mutex<Vec<(u64, Vec<u8>)>>,
    irqs: std::sync::Mutex<Vec<Arc<Signal>>>,
    threads: std::sync::Mutex<Vec<ThreadId>>,
    completion: std::sync::Mutex<Option<UsbCompletion>>,
}

#[derive(Clone, Copy)]
struct Wrong {
    host: TestHost,
    fault: Fault,
    memo: &'static Memo,
}

impl Wrong {
    fn new(fault: Fault) -> Self {
        let host = TestHost::new();
        host.set_config(r#"{"hostname":"conformance"}"#);
        let memo = Memo {
            calls: AtomicU64::new(0),
            word: AtomicU32::new(0),
            pages: Default::default(),
            frame: Default::default(),
            writes: Default::default(),
            irqs: Default::default(),
            threads: Default::default(),
            completion: Default::default(),
        };
        Self { host, fault, memo: Box::leak(Box::new(memo)) }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    /// `true` once in so many calls.
    fn once_in(&self, n: u64) -> bool {
        self.memo.calls.fetch_add(1, SeqCst) % n == n - 1
    }
}
/// Everything the suite has to say about a host.
fn judge(host: Wrong) -> Vec<CheckReport> {
    let mut reports = Vec::new();
    let mut report = |one| reports.push(one);
    run(host, &mut report);
    run_console(host, &mut || host.host.console_text().into_bytes(), &mut report);
    run_dma(host, &mut report);
    let disk = host.host.add_disk(vec![0x11; 1 << 20], 512, false);
    run_block(host, disk, &mut report);
    let (a, b) = host.host.add_link_pair();
    run_link(host, a, Some(b), &mut report);
    let device = host.host.plug_usb(UsbPath::root(1).child(1).unwrap(), Box::new(UsbLoopback::default()));
    run_usb(host, device, &mut report);
    let source = IrqSource::Line(5);
    let mut fire = || {
        host.host.fire(source);
        let again = host.is(Fault::IrqTwice) || host.host.irqs_attached() == 0;
        for signal in host.memo.irqs.lock().unwrap().iter().filter(|_| again) {
            signal.raise(&host.host);
        }
    };
    run_irq(host, source, &mut fire, &mut report);
    reports
}

fn failed(reports: &[CheckReport]) -> Vec<&'static str> {
    reports
        .iter()
        .filter(|report| matches!(report.outcome, Outcome::Fail(_)))
        .map(|report| report.name)
        .collect()
}

/// The host fails `expected` and nothing else, and what was not run says that it rests on it (or is about another kind
/// of disk).
#[track_caller]
fn fails(fault: Fault, expected: &[&str]) {
    let reports = judge(Wrong::new(fault));
    assert_eq!(failed(&reports), expected, "{fault:?}: {reports:#?}");
    let unexplained = reports.iter().find(|report| match &report.outcome {
        Outcome::NotRun(reason) => !reason.starts_with("rests on") && report.name != "block/read-only",
        _ => false,
    });
    assert_eq!(unexplained, None, "{fault:?}");
}

macro_rules! wrong_hosts {
    ($($test:ident: $fault:ident fails $($check:literal),+;)*) => {
        $(
            #[test]
            fn $test() {
                fails(Fault::$fault, &[$($check),+]);
            }
        )*
    };
}

wrong_hosts! {
    time_goes_back: TimeGoesBack fails "clock/monotonic";
    time_skews: TimeSkewsBetweenCpus fails "clock/monotonic-across-cpus";
    coarse_clock: ClockTicksAt100Hz fails "clock/resolution";
    frozen_wall_time: WallTimeStandsStill fails "clock/realtime";
    cpu_out_of_range: CpuOutOfRange fails "cpus/in-range";
    cpu_binding_ignored: CpuBindingIgnored fails "threads/cpu-binding";
    unknown_cpu_accepted: UnknownCpuAccepted fails "threads/cpu-refused";
    zero_pages_granted: ZeroPagesGranted fails "memory/refuses-zero";
    pages_misaligned: PagesMisaligned fails "memory/aligned";
    pages_not_zeroed: PagesNotZeroed fails "memory/zeroed";
    pages_shared: PagesShared fails "memory/exclusive";
    join_returns_early: JoinReturnsEarly fails "threads/join-waits";
    join_twice: JoinTwice fails "threads/join-once";
    compare_then_sleep: CompareThenSleep fails "park/no-lost-wakeup";
    expected_ignored: ExpectedIgnored fails "park/compares";
    deadline_ignored: DeadlineIgnored fails "park/deadline";
    deadline_early: DeadlineEarly fails "park/not-early";
    park_spins: ParkSpins fails "park/sleeps";
    unpark_lost: UnparkLost fails "park/no-lost-wakeup";
    unpark_wakes_all: UnparkWakesAll fails "unpark/at-most";
    unpark_wakes_one: UnparkWakesOne fails "unpark/all";
    unpark_counts_none: UnparkCountsNone fails "unpark/count";
    unpark_wakes_strangers: UnparkWakesStrangers fails "unpark/by-address";
    random_constant: RandomConstant fails "entropy/not-constant";
    random_short: RandomShort fails "entropy/fills";
    param_truncates: ParamTruncates fails "params/too-small-copies-nothing";
    param_writes_before_refusing: ParamWritesBeforeRefusing fails "params/too-small-copies-nothing";
    unknown_param_empty: UnknownParamEmpty fails "params/unknown";
    console_tears: ConsoleTears fails "console/not-torn";
    console_cuts: ConsoleCuts fails "console/whole";
    no_version: NoVersion fails "versions/core";
    dma_misaligned: DmaMisaligned fails "dma/aligned";
    dma_not_zeroed: DmaNotZeroed fails "dma/zeroed";
    dma_shared: DmaShared fails "dma/exclusive";
    dma_map_overlaps: DmaMapOverlaps fails "dma/maps-apart";
    dma_map_clobbers: DmaMapClobbers fails "dma/map-keeps-data";
    irq_twice: IrqTwice fails "irq/raises-once";
    irq_never: IrqNever fails "irq/raises";
    irq_after_detach: IrqAfterDetach fails "irq/detach";
    irq_stays_masked: IrqStaysMasked fails "irq/again-after-unmask";
    short_read: ShortRead fails "block/reads-whole";
    write_beside_the_spot: WriteBesideTheSpot fails "block/writes-only-there";
    flush_loses_writes: FlushLosesWrites fails "block/flush-keeps";
    partial_sector_accepted: PartialSectorAccepted fails "block/whole-sectors";
    frame_cut: FrameCut fails "link/delivers";
    frames_swapped: FramesSwapped fails "link/order";
    link_signal_never: LinkSignalNever fails "link/signals";
    link_opens_twice: LinkOpensTwice fails "link/open-once";
    usb_lists_twice: UsbListsTwice fails "usb/listed";
    usb_bus_zero: UsbBusZero fails "usb/paths";
    usb_strangers_opened: UsbStrangersOpened fails "usb/not-found";
    usb_descriptors_cut: UsbDescriptorsCut fails "usb/descriptors";
    usb_opens_twice: UsbOpensTwice fails "usb/open-once";
    usb_control_zeroes: UsbControlZeroes fails "usb/control";
    usb_fills_first: UsbFillsFirst fails "usb/scattered";
    usb_short_as_full: UsbShortAsFull fails "usb/short-in";
    usb_stall_as_done: UsbStallAsDone fails "usb/stall";
    usb_completes_twice: UsbCompletesTwice fails "usb/once";
    usb_loses: UsbLoses fails "usb/once";
    usb_signal_never: UsbSignalNever fails "usb/signals";
    usb_keeps_refused: UsbKeepsRefused fails "usb/refuses";
    usb_claims_anything: UsbClaimsAnything fails "usb/claim";
    usb_cancel_silent: UsbCancelSilent fails "usb/cancel";
    usb_release_forgets: UsbReleaseForgets fails "usb/release-cancels";
    usb_halt_stays: UsbHaltStays fails "usb/clear-halt";
    usb_keeps_signal: UsbKeepsSignal fails "usb/close-drops-signal";
    usb_reset_kills: UsbResetKills fails "usb/reset";
    usb_watch_forever: UsbWatchForever fails "usb/watch";
}

#[test]
fn the_right_host_passes_everything() {
    let host = Wrong::new(Fault::None);
    let reports = judge(host);
    for report in &reports {
        // The one check for another kind of disk; it runs below.
        if report.name != "block/read-only" {
            assert_eq!(report.outcome, Outcome::Pass, "{report}");
        }
    }
    assert_eq!(host.host.pages_in_use(), 0);
    assert_eq!((host.host.dma_blocks(), host.host.dma_mappings(), host.host.irqs_attached()), (0, 0, 0));
    // What was reported is what is published.
    let published: Vec<_> = SUITES.iter().filter(|suite| !["mmio", "pci"].contains(&suite.0)).collect();
    let published: Vec<_> = published.into_iter().flat_map(|suite| suite.1).copied().collect();
    assert_eq!(reports.iter().map(|report| report.name).collect::<Vec<_>>(), published);
}

#[test]
fn names_are_unique() {
    let mut names: Vec<_> = SUITES.iter().flat_map(|suite| suite.1).collect();
    let all = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all);
}

fn read_only_reports(fault: Fault) -> Vec<CheckReport> {
    let host = Wrong::new(fault);
    let disk = host.host.add_disk(vec![0x11; 1 << 20], 512, true);
    let mut reports = Vec::new();
    run_block(host, disk, &mut |report| reports.push(report));
    reports
}

#[test]
fn a_read_only_disk_passes() {
    let reports = read_only_reports(Fault::None);
    assert_eq!(failed(&reports), [""; 0]);
    let passed = reports.iter().find(|report| report.name == "block/read-only").unwrap();
    assert_eq!(passed.outcome, Outcome::Pass);
}

#[test]
fn a_write_to_a_read_only_disk_fails() {
    assert_eq!(failed(&read_only_reports(Fault::WritesReadOnly)), ["block/read-only"]);
}

#[test]
fn a_lossy_wire_fails_delivery() {
    let host = Wrong::new(Fault::None);
    let (a, b) = host.host.add_link_pair();
    host.host.lose_frames(a, 3);
    let mut reports = Vec::new();
    run_link(host, a, Some(b), &mut |report| reports.push(report));
    assert_eq!(failed(&reports), ["link/delivers"]);
}

#[test]
fn devices_are_judged() {
    let host = Wrong::new(Fault::None).host;
    let virt = |_, _| 0x7472_6976;
    host.add_mmio_device(PhysAddr(0xfeb0_0000), 0x200, 5, (virt, |_, _, _| ()));
    let at = PciAddress { segment: 0, bus: 0, device: 3, function: 0 };
    host.add_pci_function(at, &[0xf4, 0x1a, 0x41, 0x10], 2, &[]);
    let mut reports = Vec::new();
    run_mmio(host, &mut |report| reports.push(report));
    run_pci(host, &mut |report| reports.push(report));
    run_irq(
        host,
        IrqSource::Msix { function: at, entry: 1 },
        &mut || {
            host.fire(IrqSource::Msix { function: at, entry: 1 });
        },
        &mut |report| reports.push(report),
    );
    for report in reports {
        assert_eq!(report.outcome, Outcome::Pass, "{report}");
    }

    let host = TestHost::new();
    host.add_mmio_device(PhysAddr(0xfeb0_0000), 0x200, 5, (|_, _| 0, |_, _, _| ()));
    host.add_pci_function(at, &[0xff, 0xff, 0xff, 0xff], 2, &[]);
    let mut reports = Vec::new();
    run_mmio(host, &mut |report| reports.push(report));
    run_pci(host, &mut |report| reports.push(report));
    assert_eq!(failed(&reports), ["mmio/identity", "pci/functions"]);
}
