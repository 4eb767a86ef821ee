//! The suite that every host must pass, as a library.
//!
//! A host is right when [`run`] reports no [`Outcome::Fail`], and so for the suite of each driver contract that it has.
//! There is one check per law of the contract, named after it; [`SUITES`] lists them all. Every check is bounded in
//! time, also on a host that breaks the law it looks at: nothing is waited for without a limit. The core suite takes
//! about a second on a machine that is not overloaded, a few under an emulator.
//!
//! Needs: a heap, and a clock that goes on while threads yield (a simulated host lets it).

mod block;
mod clock;
mod console;
mod device;
mod dma;
mod link;
mod memory;
mod park;
mod support;
mod system;
mod threads;
mod usb;
#[cfg(test)]
mod wrong_hosts;

use crate::{Dma, Host, HostBlock, HostLink, HostUsb, Irq, IrqSource, Mmio, Pci, UsbDeviceId};
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use support::Stop;

/// How a check ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The host keeps this law, as far as the check can see.
    Pass,
    /// It breaks it; the line says how.
    Fail(String),
    /// It could not be judged; the line says why: a check on which this one rests failed, or the host was not given what
    /// it needs (a parameter, a second link).
    NotRun(String),
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckReport {
    /// One of [`SUITES`].
    pub name: &'static str,
    /// How it ended.
    pub outcome: Outcome,
}

impl Outcome {
    /// `"pass"`, `"fail"` or `"absent"`, as the contract matrix has it.
    pub fn status(&self) -> &'static str {
        match self {
            Outcome::Pass => "pass",
            Outcome::Fail(_) => "fail",
            Outcome::NotRun(_) => "absent",
        }
    }

    /// Why it did not pass; empty if it did.
    pub fn reason(&self) -> &str {
        match self {
            Outcome::Pass => "",
            Outcome::Fail(reason) | Outcome::NotRun(reason) => reason,
        }
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            Outcome::Pass => write!(f, "{}: pass", self.name),
            Outcome::Fail(reason) => write!(f, "{}: FAIL: {reason}", self.name),
            Outcome::NotRun(reason) => write!(f, "{}: not run: {reason}", self.name),
        }
    }
}

/// Runs checks in order, reports each, and remembers which did not pass.
struct Runner<'a> {
    report: &'a mut dyn FnMut(CheckReport),
    not_passed: Vec<&'static str>,
}

impl Runner<'_> {
    fn check(&mut self, name: &'static str, needs: &[&'static str], body: impl FnOnce() -> Result<(), Stop>) {
        let missing = needs.iter().find(|need| self.not_passed.contains(need));
        let outcome = match missing {
            Some(need) => Outcome::NotRun(alloc::format!("rests on {need}, which did not pass")),
            None => match body() {
                Ok(()) => Outcome::Pass,
                Err(Stop::Fail(reason)) => Outcome::Fail(reason),
                Err(Stop::NotRun(reason)) => Outcome::NotRun(reason),
            },
        };
        if outcome != Outcome::Pass {
            self.not_passed.push(name);
        }
        (self.report)(CheckReport { name, outcome });
    }
}

/// Makes a suite: the list of its names, and the function that runs it. The two cannot differ.
macro_rules! suite {
    (
        $(#[$list_doc:meta])* $list:ident;
        $(#[$run_doc:meta])* pub fn $run:ident<$h:ident: $first:ident $(+ $bound:ident)*>($host:ident $(, $arg:ident: $ty:ty)*);
        $($name:literal $(needs $($need:literal),+)? => $check:expr;)*
    ) => {
        $(#[$list_doc])*
        pub const $list: &[&str] = &[$($name),*];

        $(#[$run_doc])*
        pub fn $run<$h: $first $(+ $bound)*>($host: $h $(, $arg: $ty)*, report: &mut dyn FnMut(CheckReport)) {
            let mut runner = Runner { report, not_passed: Vec::new() };
            $(runner.check($name, &[$($($need),+)?], || $check);)*
        }
    };
}

suite! {
    /// The checks of the core contract, in the order in which [`run`] makes them.
    CHECKS;
    /// Judges the core contract. Context: a thread of the host. Blocks for about a second; leaves nothing behind.
    pub fn run<H: Host>(host);

    "versions/core" => system::versions_core(host);
    "versions/one-each" => system::versions_one_each(host);
    "clock/monotonic" => clock::monotonic(host);
    "clock/advances" => clock::advances(host);
    "clock/resolution" needs "clock/advances" => clock::resolution(host);
    "clock/realtime" => clock::realtime(host);
    "cpus/count" => system::cpus_count(host);
    "cpus/in-range" => system::cpus_in_range(host);
    "memory/refuses-zero" => memory::refuses_zero(host);
    "memory/refuses-too-much" => memory::refuses_too_much(host);
    "memory/aligned" => memory::aligned(host);
    "memory/zeroed" => memory::zeroed(host);
    "memory/exclusive" => memory::exclusive(host);
    "memory/size" => memory::size(host);
    "threads/run" needs "clock/advances" => threads::run(host);
    "threads/join-waits" needs "threads/run" => threads::join_waits(host);
    "threads/join-frees" needs "threads/join-waits" => threads::join_frees(host);
    "threads/join-once" needs "threads/run" => threads::join_once(host);
    "threads/join-unknown" => threads::join_unknown(host);
    "threads/join-self" needs "threads/run" => threads::join_self(host);
    "threads/ids" needs "threads/run" => threads::ids(host);
    "threads/many" needs "threads/run" => threads::many(host);
    "threads/cpu-refused" => threads::cpu_refused(host);
    "threads/cpu-binding" needs "threads/run", "cpus/in-range" => threads::cpu_binding(host);
    "threads/parallel" needs "threads/run" => threads::parallel(host);
    "clock/monotonic-across-cpus" needs "clock/monotonic", "threads/run" => clock::monotonic_across(host);
    "memory/from-threads" needs "memory/exclusive", "memory/zeroed", "threads/run" => memory::from_threads(host);
    "park/deadline" needs "threads/run" => park::deadline(host);
    "park/compares" needs "park/deadline" => park::compares(host);
    "park/not-early" needs "park/deadline", "clock/monotonic", "clock/resolution" => park::not_early(host);
    "park/sleeps" needs "park/deadline" => park::sleeps(host);
    "park/no-lost-wakeup" needs "park/deadline", "park/compares" => park::no_lost_wakeup(host);
    "unpark/nobody" => park::unpark_nobody(host);
    "unpark/wakes" needs "park/deadline", "park/compares" => park::unpark_wakes(host);
    "unpark/by-address" needs "unpark/wakes", "park/sleeps" => park::unpark_by_address(host);
    "unpark/count" needs "unpark/by-address" => park::unpark_count(host);
    "unpark/at-most" needs "unpark/by-address" => park::unpark_at_most(host);
    "unpark/all" needs "unpark/wakes" => park::unpark_all(host);
    "entropy/fills" => system::entropy_fills(host);
    "entropy/not-constant" => system::entropy_not_constant(host);
    "params/unknown" => system::params_unknown(host);
    "params/config" => system::params_config(host);
    "params/too-small-copies-nothing" needs "params/config" => system::params_too_small(host);
    "console/returns" needs "threads/run" => console::returns(host);
}

suite! {
    /// The checks of [`run_console`].
    CONSOLE_CHECKS;
    /// Judges what arrives on the console: `read_back` returns everything written to it since the domain began.
    /// Context: a thread of the host.
    pub fn run_console<H: Host>(host, read_back: &mut dyn FnMut() -> Vec<u8>);

    "console/whole" => console::whole(host, read_back);
    "console/not-torn" needs "console/whole" => console::not_torn(host, read_back);
}

suite! {
    /// The checks of [`run_dma`].
    DMA_CHECKS;
    /// Judges [`Dma`] as far as it shows without a device. Context: a thread of the host.
    pub fn run_dma<H: Host + Dma>(host);

    "dma/refuses" => dma::refuses(host);
    "dma/aligned" => dma::aligned(host);
    "dma/zeroed" => dma::zeroed(host);
    "dma/exclusive" => dma::exclusive(host);
    "dma/map-keeps-data" => dma::map_keeps_data(host);
    "dma/maps-apart" => dma::maps_apart(host);
}

suite! {
    /// The checks of [`run_block`].
    BLOCK_CHECKS;
    /// Judges [`HostBlock`] on `disk`. Unless it is read-only its first MiB is **overwritten**. Context: a thread of the
    /// host.
    pub fn run_block<H: Host + HostBlock>(host, disk: u32);

    "block/info" => block::info(host, disk);
    "block/not-found" => block::not_found(host);
    "block/bounds" needs "block/info" => block::bounds(host, disk);
    "block/whole-sectors" needs "block/info" => block::whole_sectors(host, disk);
    "block/reads-whole" needs "block/info" => block::reads_whole(host, disk);
    "block/reads-same" needs "block/reads-whole" => block::reads_same(host, disk);
    "block/read-only" needs "block/info" => block::read_only(host, disk);
    "block/reads-what-was-written" needs "block/reads-whole" => block::write_read(host, disk);
    "block/writes-only-there" needs "block/reads-what-was-written" => block::neighbours(host, disk);
    "block/flush-keeps" needs "block/reads-what-was-written" => block::flush_keeps(host, disk);
    "block/many-threads" needs "block/reads-what-was-written" => block::many_threads(host, disk);
}

suite! {
    /// The checks of [`run_link`].
    LINK_CHECKS;
    /// Judges [`HostLink`] on two links of this host that a wire joins; `b` `None` leaves out what needs a peer. Both are
    /// closed before and after. Other traffic on the wire does no harm. Context: a thread of the host.
    pub fn run_link<H: Host + HostLink>(host, a: u32, b: Option<u32>);

    "link/not-found" => link::not_found(host);
    "link/info" => link::info(host, a);
    "link/open-once" needs "link/info" => link::open_once(host, a);
    "link/length" needs "link/info" => link::length(host, a);
    "link/would-block" needs "link/info" => link::would_block(host, a);
    "link/close-drops-signal" needs "link/info" => link::close_drops_signal(host, a);
    "link/delivers" needs "link/info" => link::delivers(host, a, b);
    "link/signals" needs "link/delivers" => link::signals(host, a, b);
    "link/order" needs "link/delivers" => link::order(host, a, b);
    "link/buffer-too-small" needs "link/delivers" => link::buffer_too_small(host, a, b);
    "link/room-comes-back" needs "link/delivers", "link/signals" => link::room_comes_back(host, a, b);
}

suite! {
    /// The checks of [`run_usb`].
    USB_CHECKS;
    /// Judges [`HostUsb`] on `device`, which is in a configuration and not open. It best has an interface with an IN endpoint on
    /// which nothing comes unasked (a disk, a keyboard at which nobody types): it is claimed and reset, and nothing is written
    /// to it. Context: a thread of the host.
    pub fn run_usb<H: Host + HostUsb>(host, device: UsbDeviceId);

    "usb/listed" => usb::listed(host, device);
    "usb/paths" => usb::paths(host);
    "usb/not-found" => usb::not_found(host, device);
    "usb/descriptors" needs "usb/listed" => usb::descriptors(host, device);
    "usb/open-once" needs "usb/listed" => usb::open_once(host, device);
    "usb/control" needs "usb/descriptors" => usb::control(host, device);
    "usb/scattered" needs "usb/control" => usb::scattered(host, device);
    "usb/short-in" needs "usb/control" => usb::short_in(host, device);
    "usb/stall" needs "usb/control" => usb::stall(host, device);
    "usb/once" needs "usb/control" => usb::once(host, device);
    "usb/signals" needs "usb/control" => usb::signals(host, device);
    "usb/refuses" needs "usb/control" => usb::refuses(host, device);
    "usb/claim" needs "usb/descriptors" => usb::claim(host, device);
    "usb/cancel" needs "usb/claim" => usb::cancel(host, device);
    "usb/release-cancels" needs "usb/claim" => usb::release_cancels(host, device);
    "usb/clear-halt" needs "usb/claim" => usb::clear_halt(host, device);
    "usb/close-drops-signal" needs "usb/descriptors" => usb::close_drops_signal(host, device);
    "usb/reset" needs "usb/control" => usb::reset(host, device);
    "usb/watch" => usb::watch(host);
}

suite! {
    /// The checks of [`run_irq`].
    IRQ_CHECKS;
    /// Judges [`Irq`] on `source`, which nobody uses; `fire` makes its device interrupt once. Context: a thread of the
    /// host.
    pub fn run_irq<H: Host + Irq>(host, source: IrqSource, fire: &mut dyn FnMut());

    "irq/not-found" => device::irq_not_found(host);
    "irq/raises" => device::irq_raises(host, source, fire);
    "irq/raises-once" needs "irq/raises" => device::irq_raises_once(host, source, fire);
    "irq/wakes" needs "irq/raises" => device::irq_wakes(host, source, fire);
    "irq/again-after-unmask" needs "irq/raises" => device::irq_again(host, source, fire);
    "irq/busy" => device::irq_busy(host, source);
    "irq/detach" needs "irq/raises" => device::irq_detach(host, source, fire);
}

suite! {
    /// The checks of [`run_mmio`].
    MMIO_CHECKS;
    /// Judges [`Mmio`] on the virtio-mmio transports that the host lists. Reads identification registers only.
    /// Context: a thread of the host.
    pub fn run_mmio<H: Host + Mmio>(host);

    "mmio/refuses-empty" => device::mmio_refuses_empty(host);
    "mmio/devices" => device::mmio_devices(host);
    "mmio/identity" needs "mmio/devices" => device::mmio_identity(host);
}

suite! {
    /// The checks of [`run_pci`].
    PCI_CHECKS;
    /// Judges [`Pci`] on the functions that the host lists. Reads only. Context: a thread of the host.
    pub fn run_pci<H: Host + Pci>(host);

    "pci/functions" => device::pci_functions(host);
    "pci/widths" needs "pci/functions" => device::pci_widths(host);
    "pci/refuses" needs "pci/functions" => device::pci_refuses(host);
    "pci/absent" => device::pci_absent(host);
}

/// Every check there is, by contract: the contract's name and its checks.
pub const SUITES: &[(&str, &[&str])] = &[
    ("core", CHECKS),
    ("console", CONSOLE_CHECKS),
    ("dma", DMA_CHECKS),
    ("block", BLOCK_CHECKS),
    ("link", LINK_CHECKS),
    ("usb", USB_CHECKS),
    ("irq", IRQ_CHECKS),
    ("mmio", MMIO_CHECKS),
    ("pci", PCI_CHECKS),
];
