//! The task of a storage device: finds its units and their media, and carries out what their disks are asked for.

use super::bot::Direction;
use super::disk::{Disk, Registered};
use super::scsi::{self, Capacity, Inquiry, Sense};
use super::transport::{CommandError, Done, Transport};
use crate::controller::Speed;
use crate::descriptor::Setting;
use crate::device::{Device, zeroed};
use crate::engine::Failure;
use crate::quirks::Quirks;
use crate::stack::{Busy, Shared};
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::block::{BlockError, BlockInfo, Op, Request};
use core::future::Future;
use core::pin::pin;
use core::task::Poll;
use hypercall::Host;

/// A read or write may take so long (a disk may have to spin up).
const DATA_TIMEOUT_MS: u64 = 30_000;
const COMMAND_TIMEOUT_MS: u64 = 10_000;
/// How often a command is tried while the device has reasons to ask for it.
const TRIES: u32 = 4;
/// How often a unit is asked whether it is ready, and how long in between.
const READY_TRIES: u32 = 50;
const READY_PAUSE_MS: u64 = 100;
/// How often a unit is asked for its medium while nothing else goes on.
const WATCH_MS: u64 = 2_000;
const PAGE: usize = 4096;

/// Why a request, or a step of setting a unit up, failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// What the sense data said.
    Sense(Sense),
    /// The transport kept failing, and was recovered each time.
    Transport,
    /// The device is no more.
    Dead(Failure),
}

/// A logical unit.
struct Unit<H: Host> {
    lun: u8,
    name: String,
    removable: bool,
    disk: Option<Arc<Disk<H>>>,
    /// SYNCHRONIZE CACHE is not known here.
    no_flush: bool,
}

struct Storage<H: Host> {
    shared: Arc<Shared<H>>,
    transport: Transport<H>,
    units: Vec<Unit<H>>,
    /// Who is served first next time.
    turn: usize,
}

impl<H: Host> Drop for Storage<H> {
    /// However the task ends, nobody waits for ever.
    fn drop(&mut self) {
        for disk in self.units.iter_mut().filter_map(|unit| unit.disk.take()) {
            disk.set_gone();
            self.shared.remove_disk(&disk.info.name);
        }
    }
}

/// Serves the storage function of `device` until it is unplugged (`Ok`) or is no good any more (`Err`, with one line why).
pub(crate) async fn run<H: Host>(
    shared: Arc<Shared<H>>,
    device: Arc<Device<H>>,
    setting: Setting,
    busy: Busy<H>,
) -> Result<(), String> {
    let recoveries = shared.counters.storage_recoveries.clone();
    let Some(transport) = Transport::new(device.clone(), &setting, recoveries) else {
        return Err("it has no bulk endpoints for both directions".into());
    };
    let mut storage = Storage { shared, transport, units: Vec::new(), turn: 0 };
    let result = storage.serve(busy).await;
    match result {
        Err(_) if device.is_gone() => Ok(()),
        Err(Trouble::Dead(Failure::Gone)) => Ok(()),
        Err(trouble) => Err(describe(trouble)),
        Ok(()) => Ok(()),
    }
}

fn describe(trouble: Trouble) -> String {
    match trouble {
        Trouble::Sense(Sense::NoMedium) => "no medium".into(),
        Trouble::Sense(Sense::NotYet | Sense::NotReady) => "it does not become ready".into(),
        Trouble::Sense(_) => "it refuses what every disk must know".into(),
        Trouble::Transport => "its transport fails again and again".into(),
        Trouble::Dead(failure) => format!("its transport is beyond recovery: {failure}"),
    }
}

impl<H: Host> Storage<H> {
    fn device(&self) -> &Arc<Device<H>> {
        &self.transport.device
    }

    async fn serve(&mut self, busy: Busy<H>) -> Result<(), Trouble> {
        let luns = self.transport.luns().await.map_err(Trouble::Dead)?;
        for lun in 0..luns {
            if let Some(unit) = self.find_unit(lun).await? {
                self.units.push(unit);
            }
        }
        for index in 0..self.units.len() {
            self.look_for_medium(index).await?;
        }
        self.tell();
        drop(busy);
        loop {
            match self.next().await {
                Next::Request(index, request) => self.carry_out(index, request).await?,
                Next::Watch => {
                    for index in 0..self.units.len() {
                        self.watch_medium(index).await?;
                    }
                }
                Next::Gone => return Ok(()),
            }
        }
    }

    /// Says in the tree what there is.
    fn tell(&self) {
        let mut line = String::new();
        for unit in &self.units {
            let text = match &unit.disk {
                Some(disk) => format!("{} ({})", disk.info.name, unit.name),
                None => format!("no medium ({})", unit.name),
            };
            if !line.is_empty() {
                line.push_str(", ");
            }
            line.push_str(&text);
        }
        let interface = self.transport.interface;
        self.shared.set_driver(self.device().identity.path, interface, "storage", line);
    }

    /// A command whose data is small, with retries for what deserves one.
    async fn ask(&mut self, lun: u8, command: &[u8], len: usize) -> Result<Vec<u8>, Trouble> {
        let mut last = Trouble::Transport;
        for _ in 0..TRIES {
            let data = zeroed(len).map_err(Trouble::Dead)?;
            let done = self.transport.command(lun, command, Direction::In, data, COMMAND_TIMEOUT_MS).await;
            match self.judge(lun, done.result).await {
                Ok(()) => {
                    let mut answer = done.data.into_iter().next().unwrap_or_default().into_vec();
                    answer.truncate(done.actual);
                    return Ok(answer);
                }
                Err(trouble) => last = trouble,
            }
            match last {
                Trouble::Transport | Trouble::Sense(Sense::Attention { .. } | Sense::Aborted) => {
                    self.shared.counters.storage_retries.increment();
                }
                _ => break,
            }
        }
        Err(last)
    }

    /// Asks for the sense data if the device wants that.
    async fn judge(&mut self, lun: u8, result: Result<(), CommandError>) -> Result<(), Trouble> {
        match result {
            Ok(()) => Ok(()),
            Err(CommandError::Transport) => Err(Trouble::Transport),
            Err(CommandError::Dead(failure)) => Err(Trouble::Dead(failure)),
            Err(CommandError::Check) => {
                let len = usize::from(scsi::SENSE_LEN);
                let data = zeroed(len).map_err(Trouble::Dead)?;
                let command = &scsi::REQUEST_SENSE;
                let done: Done =
                    self.transport.command(lun, command, Direction::In, data, COMMAND_TIMEOUT_MS).await;
                match done.result {
                    Ok(()) => {
                        let bytes =
                            done.data.first().and_then(|data| data.get(..done.actual)).unwrap_or_default();
                        match scsi::sense(bytes) {
                            // A failure without a reason is one all the same.
                            Sense::Fine => Err(Trouble::Sense(Sense::Aborted)),
                            sense => Err(Trouble::Sense(sense)),
                        }
                    }
                    Err(CommandError::Check) => Err(Trouble::Sense(Sense::Failed)),
                    Err(CommandError::Transport) => Err(Trouble::Transport),
                    Err(CommandError::Dead(failure)) => Err(Trouble::Dead(failure)),
                }
            }
        }
    }

    async fn find_unit(&mut self, lun: u8) -> Result<Option<Unit<H>>, Trouble> {
        let answer = self.ask(lun, &scsi::INQUIRY, usize::from(scsi::INQUIRY_LEN)).await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(Trouble::Sense(_)) if lun > 0 => return Ok(None),
            Err(trouble) => return Err(trouble),
        };
        let Some(inquiry) = Inquiry::parse(&answer) else { return Ok(None) };
        // Direct access, and optical disks, which read alike. A qualifier means that nothing is there.
        if !matches!(inquiry.peripheral, 0 | 5 | 7) {
            return Ok(None);
        }
        let Inquiry { removable, name, .. } = inquiry;
        Ok(Some(Unit { lun, name, removable, disk: None, no_flush: false }))
    }

    /// Waits until the unit is ready; `false`: it has no medium.
    async fn ready(&mut self, lun: u8) -> Result<bool, Trouble> {
        let mut last = Trouble::Transport;
        for _ in 0..READY_TRIES {
            match self.ask(lun, &scsi::TEST_UNIT_READY, 0).await {
                Ok(_) => return Ok(true),
                Err(Trouble::Sense(Sense::NoMedium)) => return Ok(false),
                Err(trouble @ Trouble::Sense(Sense::NotYet | Sense::Attention { .. } | Sense::Aborted)) => {
                    last = trouble;
                }
                // Some do not know the command: whether they can be read will show.
                Err(Trouble::Sense(Sense::Illegal)) => return Ok(true),
                Err(trouble) => return Err(trouble),
            }
            self.device().engine.sleep_ms(READY_PAUSE_MS).await;
        }
        Err(last)
    }

    async fn capacity(&mut self, lun: u8) -> Result<Option<Capacity>, Trouble> {
        let answer = self.ask(lun, &scsi::READ_CAPACITY_10, 8).await?;
        let Some((last, sector_size)) = scsi::capacity_10(&answer) else { return Ok(None) };
        let (last, sector_size) = if last == u32::MAX {
            let answer = self.ask(lun, &scsi::READ_CAPACITY_16, 32).await?;
            let Some(found) = scsi::capacity_16(&answer) else { return Ok(None) };
            found
        } else {
            (u64::from(last), sector_size)
        };
        let fix = self.device().identity.quirks.contains(Quirks::CAPACITY_TOO_LARGE);
        Ok(scsi::checked_capacity(last.saturating_sub(u64::from(fix)), sector_size))
    }

    /// Makes a disk of the medium of a unit, if there is one.
    async fn look_for_medium(&mut self, index: usize) -> Result<(), Trouble> {
        let Some(unit) = self.units.get(index) else { return Ok(()) };
        let (lun, unit_name) = (unit.lun, unit.name.clone());
        let path = self.device().identity.path;
        if !self.ready(lun).await? {
            return Ok(());
        }
        let Some(capacity) = self.capacity(lun).await? else {
            log::error!("usb {path}: unit {lun} has no size that a disk can have; going on without it");
            return Ok(());
        };
        let read_only = match self.ask(lun, &scsi::MODE_SENSE, 192).await {
            Ok(answer) => scsi::write_protected(&answer),
            Err(Trouble::Dead(failure)) => return Err(Trouble::Dead(failure)),
            Err(_) => false,
        };
        let engine = self.device().engine.clone();
        let (most_bytes, max_buffers) = engine.with_controller(|one| {
            let info = one.info();
            (info.max_transfer_bytes, info.max_buffers)
        });
        let quirks = self.device().identity.quirks;
        let limit = match self.device().identity.speed {
            _ if quirks.contains(Quirks::SMALL_TRANSFERS) => 32 << 10,
            Speed::Low | Speed::Full => 64 << 10,
            // What every device on sale was tried with.
            Speed::High => 120 << 10,
            Speed::Super | Speed::SuperPlus => 1 << 20,
        };
        let limit = limit.min(most_bytes).min(max_buffers.saturating_mul(PAGE)).max(PAGE);
        let name = if lun == 0 { format!("usb{path}") } else { format!("usb{path}l{lun}") };
        let info = BlockInfo {
            name,
            sector_size: capacity.sector_size,
            sectors: capacity.sectors,
            read_only,
            max_request_bytes: limit - limit % PAGE,
            max_buffers: usize::MAX,
            queue_depth: 1,
            needs_flush: !read_only,
        };
        log::info!(
            "{}: {unit_name}, {} sectors of {} bytes{}",
            info.name,
            info.sectors,
            info.sector_size,
            if read_only { ", read-only" } else { "" },
        );
        let disk = Disk::new(engine, info, max_buffers);
        if self.shared.add_disk(|owner| Arc::new(Registered { disk: disk.clone(), _owner: owner }))
            && let Some(unit) = self.units.get_mut(index)
        {
            unit.disk = Some(disk);
        }
        Ok(())
    }

    /// The medium was taken out, or is another one.
    fn lose_medium(&mut self, index: usize) {
        if let Some(disk) = self.units.get_mut(index).and_then(|unit| unit.disk.take()) {
            log::warn!("{}: its medium is gone", disk.info.name);
            disk.set_gone();
            self.shared.remove_disk(&disk.info.name);
            self.tell();
        }
    }

    /// Asks a unit with a removable medium whether it (still) has one.
    async fn watch_medium(&mut self, index: usize) -> Result<(), Trouble> {
        let Some(unit) = self.units.get(index) else { return Ok(()) };
        if !unit.removable {
            return Ok(());
        }
        let (lun, had) = (unit.lun, unit.disk.is_some());
        let done = self.transport.command(
            lun,
            &scsi::TEST_UNIT_READY,
            Direction::In,
            Vec::new(),
            COMMAND_TIMEOUT_MS,
        );
        let done = done.await;
        match (self.judge(lun, done.result).await, had) {
            (Err(Trouble::Dead(failure)), _) => return Err(Trouble::Dead(failure)),
            (Err(Trouble::Sense(Sense::NoMedium | Sense::Attention { medium: true })), true) => {
                self.lose_medium(index);
            }
            (Ok(()) | Err(Trouble::Sense(Sense::Attention { .. })), false) => {
                match self.look_for_medium(index).await {
                    Err(Trouble::Dead(failure)) => return Err(Trouble::Dead(failure)),
                    _ => self.tell(),
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// What to do next.
    async fn next(&mut self) -> Next {
        let device = self.transport.device.clone();
        let watching = self.units.iter().any(|unit| unit.removable);
        let mut pause = pin!(device.engine.sleep_ms(WATCH_MS));
        core::future::poll_fn(|cx| {
            if device.poll_gone(cx).is_ready() {
                return Poll::Ready(Next::Gone);
            }
            let count = self.units.len();
            for offset in 0..count {
                let index = (self.turn + offset) % count;
                let disk = self.units.get(index).and_then(|unit| unit.disk.as_ref());
                if let Some(request) = disk.and_then(|disk| disk.next(cx.waker())) {
                    self.turn = index + 1;
                    return Poll::Ready(Next::Request(index, request));
                }
            }
            if watching && pause.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Next::Watch);
            }
            Poll::Pending
        })
        .await
    }

    /// Carries a request out and completes it, whatever happens.
    async fn carry_out(&mut self, index: usize, mut request: Request) -> Result<(), Trouble> {
        let Some(unit) = self.units.get(index) else { return Ok(()) };
        let (lun, no_flush) = (unit.lun, unit.no_flush);
        let Some(disk) = unit.disk.clone() else { return Ok(()) };
        let mut in_work = InWork { disk: &disk, request: None };
        let result = match request.op {
            Op::Flush if no_flush => Ok(()),
            Op::Flush => self.ask(lun, &scsi::SYNCHRONIZE_CACHE, 0).await.map(drop),
            Op::Read | Op::Write => {
                let buffers = core::mem::take(&mut request.buffers);
                let (op, sector, size) = (request.op, request.sector, disk.info.sector_size);
                in_work.request = Some(request);
                let (buffers, result) = self.transfer(lun, op, sector, size, buffers).await;
                let Some(back) = in_work.request.take() else { return Ok(()) };
                request = back;
                request.buffers = buffers;
                result
            }
        };
        drop(in_work);
        let answer = match result {
            Ok(()) => Ok(()),
            Err(Trouble::Sense(Sense::Illegal)) if request.op == Op::Flush => {
                // No cache, then.
                if let Some(unit) = self.units.get_mut(index) {
                    unit.no_flush = true;
                }
                Ok(())
            }
            Err(Trouble::Sense(Sense::Protected)) => Err(BlockError::ReadOnly),
            Err(Trouble::Sense(Sense::NoMedium | Sense::Attention { medium: true })) => {
                disk.over(request, Err(BlockError::Gone));
                self.lose_medium(index);
                return Ok(());
            }
            Err(Trouble::Dead(failure)) => {
                disk.over(request, Err(BlockError::Gone));
                return Err(Trouble::Dead(failure));
            }
            Err(_) => Err(BlockError::Io),
        };
        if answer.is_err() {
            self.shared.counters.storage_errors.increment();
        }
        disk.over(request, answer);
        Ok(())
    }

    /// Reads or writes, in a few tries.
    async fn transfer(
        &mut self,
        lun: u8,
        op: Op,
        sector: u64,
        sector_size: u32,
        mut buffers: Vec<Box<[u8]>>,
    ) -> (Vec<Box<[u8]>>, Result<(), Trouble>) {
        let len = buffers.iter().map(|buffer| buffer.len()).sum::<usize>();
        let (command, command_len) = scsi::transfer(op == Op::Write, sector, len as u32 / sector_size.max(1));
        let command = command.get(..command_len).unwrap_or_default();
        let direction = if op == Op::Write { Direction::Out } else { Direction::In };
        let mut last = Trouble::Transport;
        for attempt in 0..TRIES {
            if attempt > 0 {
                self.shared.counters.storage_retries.increment();
            }
            let done = self.transport.command(lun, command, direction, buffers, DATA_TIMEOUT_MS).await;
            buffers = done.data;
            match self.judge(lun, done.result).await {
                Ok(()) if done.actual == len => return (buffers, Ok(())),
                // Less than was asked for, and no word why: a residue.
                Ok(()) => last = Trouble::Transport,
                Err(trouble) => last = trouble,
            }
            match last {
                Trouble::Transport | Trouble::Sense(Sense::Attention { medium: false } | Sense::Aborted) => {}
                Trouble::Sense(Sense::NotYet) => self.device().engine.sleep_ms(READY_PAUSE_MS).await,
                _ => break,
            }
        }
        (buffers, Err(last))
    }
}

/// A request whose buffers are with the device. Dropped with the task, it completes as gone, without them.
struct InWork<'a, H: Host> {
    disk: &'a Disk<H>,
    request: Option<Request>,
}

impl<H: Host> Drop for InWork<'_, H> {
    fn drop(&mut self) {
        if let Some(request) = self.request.take() {
            self.disk.over(request, Err(BlockError::Gone));
        }
    }
}

enum Next {
    Request(usize, Request),
    Watch,
    Gone,
}
