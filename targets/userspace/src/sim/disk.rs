//! Disks with a volatile cache, and what is left of them when the power fails.

use super::random::Random;
use super::trace::digest;
use super::{DiskModel, SimHost, Simulation};
use hypercall::{Call, DiskInfo, Error, HostBlock, Result};

/// Names a disk of a simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskId(pub(super) usize);

/// What a power failure leaves of writes that were not flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PowerCut {
    /// Of each sector any of the states that it had since it was durable, by chance: writes are lost, torn between sectors
    /// and done out of order.
    #[default]
    Random,
    /// Nothing.
    LoseAll,
    /// Everything.
    KeepAll,
    /// The first so many writes.
    KeepFirst(usize),
}

struct Write {
    sector: u64,
    data: Box<[u8]>,
}

pub(super) struct Disk {
    model: DiskModel,
    durable: Vec<u8>,
    /// What a reader sees.
    current: Vec<u8>,
    /// What the two differ by, in order.
    pending: Vec<Write>,
    random: Random,
    cut: PowerCut,
    /// Writes and flushes so far, and at which of them the power fails.
    writes: u64,
    cut_at: Option<u64>,
}

impl Disk {
    fn sectors(&self) -> u64 {
        (self.current.len() / self.model.sector_size as usize) as u64
    }

    /// The bytes of a request, if it is one.
    fn range(&self, sector: u64, len: usize) -> Result<core::ops::Range<usize>> {
        let size = self.model.sector_size as usize;
        let count = (len / size) as u64;
        let inside = sector.checked_add(count).is_some_and(|end| end <= self.sectors());
        if !len.is_multiple_of(size) || len == 0 || !inside {
            return Err(Error::Invalid);
        }
        let start = sector as usize * size;
        Ok(start..start + len)
    }

    fn is_bad(&self, sector: u64, len: usize) -> bool {
        let end = sector + (len / self.model.sector_size as usize) as u64;
        self.model.bad_sectors.iter().any(|bad| (sector..end).contains(bad))
    }

    fn put(&mut self, sector: u64, data: &[u8]) {
        let start = sector as usize * self.model.sector_size as usize;
        self.current[start..start + data.len()].copy_from_slice(data);
        self.pending.push(Write { sector, data: data.into() });
    }

    fn settle(&mut self) {
        let size = self.model.sector_size as usize;
        for write in self.pending.drain(..) {
            let start = write.sector as usize * size;
            self.durable[start..start + write.data.len()].copy_from_slice(&write.data);
        }
    }

    /// Afterwards what is durable is all there is.
    pub(super) fn power_fails(&mut self, random: &mut Random) {
        let size = self.model.sector_size as usize;
        let pending = core::mem::take(&mut self.pending);
        match self.cut {
            PowerCut::LoseAll => {}
            PowerCut::KeepAll | PowerCut::KeepFirst(_) => {
                let most = if let PowerCut::KeepFirst(n) = self.cut { n } else { pending.len() };
                self.pending = pending.into_iter().take(most).collect();
                self.settle();
            }
            PowerCut::Random => {
                // Which states each sector had, in order.
                let mut states: std::collections::BTreeMap<u64, Vec<&[u8]>> = Default::default();
                for write in &pending {
                    for (index, data) in write.data.chunks(size).enumerate() {
                        states.entry(write.sector + index as u64).or_default().push(data);
                    }
                }
                for (sector, states) in states {
                    let chosen = random.below(states.len() as u64 + 1) as usize;
                    if let Some(data) = chosen.checked_sub(1).and_then(|at| states.get(at)) {
                        let start = sector as usize * size;
                        self.durable[start..start + size].copy_from_slice(data);
                    }
                }
            }
        }
        self.current.copy_from_slice(&self.durable);
        self.cut_at = None;
    }

    /// Counts a write or a flush. `true`: the power fails now, before it is done.
    fn counts(&mut self) -> bool {
        self.writes += 1;
        self.cut_at.is_some_and(|at| self.writes >= at)
    }
}

impl Simulation {
    /// Adds a disk with `image` on it. Panics if that is no whole number of sectors.
    pub fn disk(&self, image: Vec<u8>, model: DiskModel) -> DiskId {
        assert!(image.len().is_multiple_of(model.sector_size as usize), "a disk has whole sectors");
        let mut disks = self.world().disks.borrow_mut();
        let id = disks.len();
        disks.push(Disk {
            random: Random::new(self.world().config.seed, 3_000_000 + id as u64),
            durable: image.clone(),
            current: image,
            pending: Vec::new(),
            cut: PowerCut::default(),
            writes: 0,
            cut_at: None,
            model,
        });
        DiskId(id)
    }

    /// From now on the disk does this to requests.
    pub fn set_disk_model(&self, disk: DiskId, model: DiskModel) {
        self.world().disks.borrow_mut()[disk.0].model = model;
    }

    /// What a power failure will leave.
    pub fn set_power_cut(&self, disk: DiskId, cut: PowerCut) {
        self.world().disks.borrow_mut()[disk.0].cut = cut;
    }

    /// The power of the node fails at the `n`-th write or flush that it makes from now on, before that is done; 1 is the
    /// next one.
    pub fn cut_power_at(&self, disk: DiskId, n: u64) {
        let mut disks = self.world().disks.borrow_mut();
        let disk = &mut disks[disk.0];
        disk.cut_at = Some(disk.writes + n);
    }

    /// Writes and flushes that the disk got so far.
    pub fn disk_writes(&self, disk: DiskId) -> u64 {
        self.world().disks.borrow()[disk.0].writes
    }

    /// What is on it and would survive any power failure.
    pub fn durable_image(&self, disk: DiskId) -> Vec<u8> {
        self.world().disks.borrow()[disk.0].durable.clone()
    }

    /// What a reader sees.
    pub fn disk_image(&self, disk: DiskId) -> Vec<u8> {
        self.world().disks.borrow()[disk.0].current.clone()
    }
}

impl SimHost {
    /// Waits as long as the disk takes, then calls `f` with it.
    fn on_disk<T>(
        &self,
        call: Call,
        disk: u32,
        arguments: [u64; 2],
        f: impl FnOnce(&mut Disk) -> Result<T>,
    ) -> Result<T> {
        let mut latency = 0;
        self.world_call(call, arguments, |world, node| {
            let id = node.setup.disks.get(disk as usize).ok_or(Error::NotFound)?;
            latency = world.disks.borrow()[id.0].model.latency_ns;
            Ok(())
        })?;
        self.wait(latency);
        self.finish_call(|world, node| {
            let id = node.setup.disks.get(disk as usize).ok_or(Error::NotFound)?;
            if matches!(call, Call::DiskWrite | Call::DiskFlush) {
                let fails = world.disks.borrow_mut()[id.0].counts();
                if fails {
                    world.crash(self.index());
                    return Err(Error::Gone);
                }
            }
            f(&mut world.disks.borrow_mut()[id.0])
        })
    }
}

impl HostBlock for SimHost {
    fn disk_count(&self) -> u32 {
        self.value(Call::DiskCount, |node| node.setup.disks.len() as u32).unwrap_or(0)
    }

    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        self.world_call(Call::DiskInfo, [disk.into(), 0], |world, node| {
            let id = node.setup.disks.get(disk as usize).ok_or(Error::NotFound)?;
            let disk = &world.disks.borrow()[id.0];
            Ok(DiskInfo {
                sector_size: disk.model.sector_size,
                sectors: disk.sectors(),
                read_only: disk.model.read_only,
            })
        })
    }

    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        self.on_disk(Call::DiskRead, disk, [sector, buf.len() as u64], |disk| {
            let range = disk.range(sector, buf.len())?;
            if disk.is_bad(sector, buf.len()) || disk.random.chance(disk.model.read_error_ppm) {
                return Err(Error::Io);
            }
            buf.copy_from_slice(&disk.current[range]);
            Ok(())
        })
    }

    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        self.on_disk(Call::DiskWrite, disk, [sector, digest(buf)], |disk| {
            if disk.model.read_only {
                return Err(Error::Denied);
            }
            disk.range(sector, buf.len())?;
            let size = disk.model.sector_size as usize;
            if disk.is_bad(sector, buf.len()) {
                return Err(Error::Io);
            }
            if disk.random.chance(disk.model.short_write_ppm) {
                let done = disk.random.below((buf.len() / size) as u64) as usize * size;
                if done > 0 {
                    disk.put(sector, &buf[..done]);
                }
                return Err(Error::Io);
            }
            disk.put(sector, buf);
            Ok(())
        })
    }

    fn disk_flush(&self, disk: u32) -> Result<()> {
        self.on_disk(Call::DiskFlush, disk, [disk.into(), 0], |disk| {
            if disk.random.chance(disk.model.flush_error_ppm) {
                return Err(Error::Io);
            }
            if !disk.random.chance(disk.model.lost_flush_ppm) {
                disk.settle();
            }
            Ok(())
        })
    }
}
