//! Disks of the host, broken.

use super::*;

impl HostBlock for Wrong {
    fn disk_count(&self) -> u32 {
        self.host.disk_count()
    }
    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        self.host.disk_info(disk)
    }
    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        let size = 512;
        match self.fault {
            Fault::ShortRead if buf.len() > 16 * size => {
                let half = buf.len() / 2 / size * size;
                self.host.disk_read(disk, sector, &mut buf[..half])
            }
            Fault::PartialSectorAccepted if !buf.len().is_multiple_of(size) => Ok(()),
            _ => self.host.disk_read(disk, sector, buf),
        }
    }
    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        let size = 512;
        match self.fault {
            Fault::PartialSectorAccepted if !buf.len().is_multiple_of(size) => Ok(()),
            Fault::WritesReadOnly if self.host.disk_info(disk)?.read_only && buf.len() == size => {
                match self.host.disk_write(disk, sector, buf) {
                    Err(Error::Denied) => Ok(()),
                    other => other,
                }
            }
            // Rounds up to the next 4096 bytes, as a read-modify-write that forgot the read.
            Fault::WriteBesideTheSpot if sector == 4 && buf.len() < 8 * size => {
                let mut whole = buf.to_vec();
                whole.resize(8 * size, 0);
                self.host.disk_write(disk, sector, &whole)
            }
            Fault::FlushLosesWrites => {
                let mut old = vec![0; buf.len()];
                self.host.disk_read(disk, sector, &mut old)?;
                self.memo.writes.lock().unwrap().push((sector, old));
                self.host.disk_write(disk, sector, buf)
            }
            _ => self.host.disk_write(disk, sector, buf),
        }
    }
    fn disk_flush(&self, disk: u32) -> Result<()> {
        if self.is(Fault::FlushLosesWrites) {
            for (sector, old) in self.memo.writes.lock().unwrap().drain(..).rev() {
                self.host.disk_write(disk, sector, &old)?;
            }
        }
        self.host.disk_flush(disk)
    }
}
