//! `--usb-pcap`: what goes over USB, in a file that Wireshark reads (see [`anykernel_usb::usbmon`]).
//!
//! In this process the USB stack tells of its transfers. Of a guest QEMU does, each device by itself, through one pipe.

use crate::Failure;
use crate::host::Recover;
use anykernel_usb::usbmon::{SNAP_LEN, file_header};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// The file.
#[derive(Debug)]
pub(crate) struct UsbPcap(Mutex<(BufWriter<File>, bool)>);

impl UsbPcap {
    /// An empty file at `path`; what was there is lost.
    pub(crate) fn create(path: &Path) -> Result<Arc<Self>, Failure> {
        let file =
            File::create(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        Ok(Arc::new(Self(Mutex::new((BufWriter::new(file), false)))))
    }

    /// Adds the file's header or a record. Once that fails, the file ends.
    pub(crate) fn write(&self, bytes: &[u8]) {
        let (file, failed) = &mut *self.0.lock().recover();
        if !*failed && let Err(error) = file.write_all(bytes) {
            log::error!("recording USB: {error}: the file ends here");
            *failed = true;
        }
    }

    /// Everything is in the file.
    pub(crate) fn finish(&self) -> Result<(), Failure> {
        let (file, failed) = &mut *self.0.lock().recover();
        match file.flush() {
            Err(error) if !*failed => Err(Failure::new(format!("recording USB: {error}"))),
            _ => Ok(()),
        }
    }
}

/// The pipe through which QEMU tells what its USB devices do.
pub(crate) struct Pipe {
    /// Open as long as QEMU may want to open it by its name.
    pipe: OwnedFd,
    thread: JoinHandle<io::Result<()>>,
    file: Arc<UsbPcap>,
}

impl Pipe {
    pub(crate) fn start(path: &Path) -> Result<Self, Failure> {
        let file = UsbPcap::create(path)?;
        let fail = |error: io::Error| Failure::new(format!("recording USB: {error}"));
        let (from, pipe) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| fail(error.into()))?;
        let to = file.clone();
        let body = move || merge(BufReader::new(File::from(from)), &mut |bytes| to.write(bytes));
        let thread = std::thread::Builder::new().name("usb-pcap".into()).spawn(body).map_err(fail)?;
        Ok(Self { pipe, thread, file })
    }

    /// What QEMU is told: every USB device writes there.
    pub(crate) fn args(&self) -> [String; 2] {
        let file = format!("/proc/{}/fd/{}", std::process::id(), self.pipe.as_raw_fd());
        ["-global".into(), format!("usb-device.pcap={file}")]
    }

    /// The guest has ended.
    pub(crate) fn finish(self) -> Result<(), Failure> {
        drop(self.pipe);
        match self.thread.join() {
            Ok(Ok(())) => self.file.finish(),
            Ok(Err(error)) => Err(Failure::new(format!("recording USB: {error}"))),
            Err(_) => Err(Failure::new("recording USB: the thread panicked")),
        }
    }
}

/// One file out of several in one stream, whose headers stand between records.
fn merge(mut from: impl Read, to: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    to(&file_header());
    let magic = 0xa1b2_c3d4u32.to_le_bytes();
    let mut record = vec![0; 16];
    loop {
        record.resize(16, 0);
        match from.read_exact(&mut record) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        if record.starts_with(&magic) {
            // A file's header is longer by eight bytes.
            from.read_exact(&mut record[..8])?;
            continue;
        }
        let len = u32::from_le_bytes([record[8], record[9], record[10], record[11]]);
        if len > 16 * SNAP_LEN {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "QEMU writes another format than expected",
            ));
        }
        record.resize(16 + len as usize, 0);
        from.read_exact(&mut record[16..])?;
        to(&record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_files_in_one_stream_become_one() {
        let record = |len: u8| {
            let mut record = vec![1, 0, 0, 0, 2, 0, 0, 0, len, 0, 0, 0, len, 0, 0, 0];
            record.resize(16 + usize::from(len), len);
            record
        };
        let header = file_header().to_vec();
        let stream = [&header[..], &record(3), &header, &header, &record(200), &record(0), &[1, 2]].concat();
        let mut out = Vec::new();
        merge(&stream[..], &mut |bytes| out.extend_from_slice(bytes)).unwrap();
        assert_eq!(out, [header, record(3), record(200), record(0)].concat());
        let lie = [&file_header()[..], &[0xff; 16]].concat();
        assert!(merge(&lie[..], &mut |_| ()).is_err());
    }
}
