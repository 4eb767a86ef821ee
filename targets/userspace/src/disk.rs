//! Host files and block devices as disks.
//!
//! pread(2) and pwrite(2), no mapping: a file that shrinks under us is an error of one request, not the end of the process.
//! An advisory lock (flock(2)) is shared by readers and exclusive for a writer, so that no image is written by two, or
//! read by one while another writes.

use crate::Failure;
use hypercall::{DiskInfo, Error, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Sectors of files have this size, as nearly every image was made for.
const FILE_SECTOR: u32 = 512;

/// An open disk.
#[derive(Debug)]
pub struct HostDisk {
    file: File,
    info: DiskInfo,
}

impl HostDisk {
    /// Opens a file or block device. Failures are lines for a person.
    pub fn open(path: &Path, writable: bool) -> Result<Self, Failure> {
        let shown = path.display();
        let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound => {
                Failure::new(format!("{shown}: no such file: check the path of the image"))
            }
            _ => Failure::new(format!("{shown}: {error}")),
        })?;
        let kind = metadata.file_type();
        let is_device = kind.is_block_device();
        if !kind.is_file() && !is_device {
            let what = if kind.is_dir() { "a directory" } else { "neither a file nor a block device" };
            return Err(Failure::new(format!(
                "{shown} is {what}: a disk is an image file or a block device"
            )));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(writable);
        if is_device && writable {
            // The kernel then refuses a device that is mounted or in use.
            options.custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed());
        }
        let mut file = options.open(path).map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied if writable => Failure::new(format!(
                "{shown}: no permission to write: change the file's permissions, or use it read-only ({shown}:ro)"
            )),
            ErrorKind::PermissionDenied => Failure::new(format!("{shown}: no permission to read the image")),
            ErrorKind::ResourceBusy => Failure::new(format!("{shown} is in use by the host: unmount it first")),
            _ => Failure::new(format!("{shown}: {error}")),
        })?;
        let locked = if writable { file.try_lock() } else { file.try_lock_shared() };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if writable => {
                return Err(Failure::new(format!("{shown} is in use: end who uses it, or use it read-only")));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::new(format!(
                    "{shown} is being written by another process: wait until it ends"
                )));
            }
            // A file system without locks.
            Err(TryLockError::Error(error)) => log::warn!("{shown}: not locked: {error}"),
        }
        let sector_size =
            if is_device { rustix::fs::ioctl_blksszget(&file).unwrap_or(FILE_SECTOR) } else { FILE_SECTOR };
        let bytes = file.seek(SeekFrom::End(0)).map_err(|error| Failure::new(format!("{shown}: {error}")))?;
        let sectors = bytes / u64::from(sector_size);
        if sectors == 0 {
            return Err(Failure::new(match bytes {
                0 => format!("{shown} is empty: give an image with a file system"),
                _ => format!("{shown} is shorter than one sector: give an image with a file system"),
            }));
        }
        Ok(Self { file, info: DiskInfo { sector_size, sectors, read_only: !writable } })
    }

    /// A read-only disk with `image` as content, kept in memory.
    pub fn in_memory(image: &[u8]) -> std::io::Result<Self> {
        let file = memory_file(image)?;
        let sectors = image.len() as u64 / u64::from(FILE_SECTOR);
        Ok(Self { file, info: DiskInfo { sector_size: FILE_SECTOR, sectors, read_only: true } })
    }

    /// A file in memory with `image` as content, and a path by which this process and its children can open it as long as the file
    /// is kept.
    pub fn memory_path(image: &[u8]) -> std::io::Result<(PathBuf, File)> {
        let file = memory_file(image)?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        Ok((path.into(), file))
    }

    /// What it is like.
    pub fn info(&self) -> DiskInfo {
        self.info
    }

    /// Byte offset of a transfer that lies within the disk.
    fn offset(&self, sector: u64, len: usize) -> Result<u64> {
        let size = u64::from(self.info.sector_size);
        let len = len as u64;
        if !len.is_multiple_of(size) {
            return Err(Error::Invalid);
        }
        let end = sector.checked_add(len / size).ok_or(Error::Invalid)?;
        if end > self.info.sectors {
            return Err(Error::Invalid);
        }
        Ok(sector * size)
    }

    /// As [`hypercall::HostBlock::disk_read`].
    pub fn read(&self, sector: u64, buf: &mut [u8]) -> Result<()> {
        let offset = self.offset(sector, buf.len())?;
        self.file.read_exact_at(buf, offset).map_err(|_| Error::Io)
    }

    /// As [`hypercall::HostBlock::disk_write`].
    pub fn write(&self, sector: u64, buf: &[u8]) -> Result<()> {
        if self.info.read_only {
            return Err(Error::Denied);
        }
        let offset = self.offset(sector, buf.len())?;
        self.file.write_all_at(buf, offset).map_err(|_| Error::Io)
    }

    /// As [`hypercall::HostBlock::disk_flush`].
    pub fn flush(&self) -> Result<()> {
        if self.info.read_only {
            return Ok(());
        }
        self.file.sync_data().map_err(|_| Error::Io)
    }
}

/// An unnamed file in memory that holds `content`; it is gone when closed.
fn memory_file(content: &[u8]) -> std::io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("anykernel-disk", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all_at(content, 0)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn reads_what_was_written_and_nothing_outside() {
        let file = image(4096 + 100);
        let disk = HostDisk::open(file.path(), true).unwrap();
        assert_eq!(disk.info(), DiskInfo { sector_size: 512, sectors: 8, read_only: false });
        disk.write(7, &[7; 512]).unwrap();
        disk.flush().unwrap();
        let mut buf = [0; 1024];
        disk.read(6, &mut buf).unwrap();
        assert_eq!((buf[0], buf[512], buf[1023]), (0, 7, 7));
        assert_eq!(disk.read(7, &mut buf), Err(Error::Invalid));
        assert_eq!(disk.read(u64::MAX, &mut buf), Err(Error::Invalid));
        assert_eq!(disk.read(0, &mut buf[..100]), Err(Error::Invalid));
        assert_eq!(disk.write(8, &[0; 512]), Err(Error::Invalid));
    }

    #[test]
    fn a_read_only_disk_is_not_written() {
        let file = image(4096);
        let disk = HostDisk::open(file.path(), false).unwrap();
        assert_eq!(disk.write(0, &[1; 512]), Err(Error::Denied));
        assert_eq!(disk.flush(), Ok(()));
        assert!(std::fs::read(file.path()).unwrap().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_shrinking_file_is_an_error_not_a_crash() {
        let file = image(8192);
        let disk = HostDisk::open(file.path(), false).unwrap();
        file.as_file().set_len(512).unwrap();
        let mut buf = [0; 512];
        assert_eq!(disk.read(0, &mut buf), Ok(()));
        assert_eq!(disk.read(8, &mut buf), Err(Error::Io));
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(4096);
        let reader = HostDisk::open(file.path(), false).unwrap();
        let other = HostDisk::open(file.path(), false).unwrap();
        assert!(HostDisk::open(file.path(), true).unwrap_err().line.contains("in use"));
        drop((reader, other));
        let _writer = HostDisk::open(file.path(), true).unwrap();
        assert!(HostDisk::open(file.path(), false).unwrap_err().line.contains("being written"));
        assert!(HostDisk::open(file.path(), true).is_err());
    }

    #[test]
    fn says_what_is_wrong_with_a_path() {
        let dir = tempfile::tempdir().unwrap();
        let missing = HostDisk::open(&dir.path().join("none.img"), false).unwrap_err();
        assert!(missing.line.contains("no such file"), "{missing}");
        assert!(HostDisk::open(dir.path(), false).unwrap_err().line.contains("directory"));
        assert!(HostDisk::open(Path::new("/dev/null"), false).unwrap_err().line.contains("neither"));
        assert!(HostDisk::open(image(0).path(), false).unwrap_err().line.contains("empty"));
        assert!(
            HostDisk::open(image(511).path(), false).unwrap_err().line.contains("shorter than one sector")
        );
    }

    #[test]
    fn a_disk_in_memory() {
        let disk = HostDisk::in_memory(&[3; 1024]).unwrap();
        let mut buf = [0; 1024];
        disk.read(0, &mut buf).unwrap();
        assert_eq!(buf, [3; 1024]);
        assert_eq!(disk.write(0, &buf), Err(Error::Denied));
    }
}
