//! Private contract: disks that the host itself opens (a file, a block device of a host kernel).

use crate::Result;

/// What a host disk is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskInfo {
    /// Bytes per sector: a power of two, 512 to 4096.
    pub sector_size: u32,
    /// How many sectors.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
}

/// Host disks, numbered from 0. All calls may be made from many threads at once.
///
/// Calls block until the host has done it: concurrency comes from the caller's threads. Offsets and lengths are whole
/// sectors. Counterparts: `rumpuser_open`, `rumpuser_bio`, `rumpuser_syncfd`; LKL
/// `lkl_dev_blk_ops`.
pub trait HostBlock {
    /// How many disks there are. Constant. Context: any.
    fn disk_count(&self) -> u32;

    /// Errors: [`crate::Error::NotFound`]. Context: thread.
    fn disk_info(&self, disk: u32) -> Result<DiskInfo>;

    /// Fills all of `buf` from `sector` on, or fails: there are no short reads.
    ///
    /// Errors: [`crate::Error::Invalid`] (outside the disk, not whole sectors), [`crate::Error::Io`] (`buf` is then
    /// unspecified), [`crate::Error::Gone`]. Context: thread. Blocks.
    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()>;

    /// Writes all of `buf`, or fails. It is durable only after [`HostBlock::disk_flush`].
    ///
    /// Errors: as `disk_read`, and [`crate::Error::Denied`] on a read-only disk. Context: thread. Blocks.
    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()>;

    /// Makes every write that returned before this call durable. Errors: [`crate::Error::Io`]: what was written may be
    /// lost. Context: thread. Blocks.
    fn disk_flush(&self, disk: u32) -> Result<()>;
}
