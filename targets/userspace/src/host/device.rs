//! Disks and links of an instance.

use super::PosixHost;
use hypercall::{DiskInfo, Error, HostBlock, HostLink, LinkInfo, Result, Signal};
use std::sync::Arc;

impl PosixHost {
    fn disk(&self, disk: u32) -> Result<Arc<crate::disk::HostDisk>> {
        self.with(|inner| inner.disks.get(disk as usize).cloned().ok_or(Error::NotFound))
            .unwrap_or(Err(Error::Gone))
    }

    fn link<R>(&self, link: u32, f: impl FnOnce(&crate::link::LinkPort) -> Result<R>) -> Result<R> {
        self.with(|inner| inner.links.get(link as usize).map_or(Err(Error::NotFound), f))
            .unwrap_or(Err(Error::Gone))
    }
}

impl HostBlock for PosixHost {
    fn disk_count(&self) -> u32 {
        self.with(|inner| inner.disks.len() as u32).unwrap_or(0)
    }
    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        self.disk(disk).map(|disk| disk.info())
    }
    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        self.disk(disk)?.read(sector, buf)
    }
    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        self.disk(disk)?.write(sector, buf)
    }
    fn disk_flush(&self, disk: u32) -> Result<()> {
        self.disk(disk)?.flush()
    }
}

impl HostLink for PosixHost {
    fn link_count(&self) -> u32 {
        self.with(|inner| inner.links.len() as u32).unwrap_or(0)
    }
    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        self.link(link, |port| port.open(*self, signal))
    }
    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        self.link(link, |port| port.send(frame))
    }
    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        self.link(link, |port| port.receive(buf))
    }
    fn link_close(&self, link: u32) {
        // A link of a retired instance is closed already.
        let _ = self.link(link, |port| {
            port.close();
            Ok(())
        });
    }
}
