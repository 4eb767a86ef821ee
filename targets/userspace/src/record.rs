//! `--record`: everything that a domain is told, in a file that `anykernel replay` runs it from again.
//!
//! ```text
//! file  = "AKREC01\n" chunk(header) chunk(records)*
//! chunk = length crc32 bytes        both of 4 bytes, little-endian; the checksum is that of Ethernet, over the bytes
//! ```
//! The header is a JSON object; the records are those of [`hypercall::layers::recorded`], cut anywhere. A file that ends anywhere
//! is read up to its last whole chunk.

use crate::Failure;
use hypercall::layers::ByteRing;
use hypercall::layers::recorded::{MAGIC, crc32};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes of a chunk, about.
const CHUNK: usize = 256 << 10;

/// How much is buffered in a process that records itself.
const BUFFER: usize = 8 << 20;

/// How large a recording may become unless told otherwise.
pub const DEFAULT_LIMIT: u64 = 1 << 30;

/// A recording in the making.
pub struct Recording {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Written>>,
    shown: String,
}

/// What became of it.
struct Written {
    bytes: u64,
    began: bool,
    cut: bool,
    /// The domain gave it up.
    lost: bool,
    /// Why there is no more of it.
    failed: Option<std::io::Error>,
}

impl Recording {
    /// Begins a file that this process fills through the ring that comes back. Failures are lines for a person.
    pub fn start(path: &Path, header: &serde_json::Value, limit: u64) -> Result<(Self, ByteRing), Failure> {
        let ring = ByteRing::new(BUFFER).ok_or_else(|| Failure::new("too little memory for a recording"))?;
        Ok((Self::follow(path, header, limit, move || Some(ring))?, ring))
    }

    /// Begins a file of what comes out of the ring that `find` gives as soon as there is one. It grows to `limit` bytes.
    pub fn follow(
        path: &Path,
        header: &serde_json::Value,
        limit: u64,
        mut find: impl FnMut() -> Option<ByteRing> + Send + 'static,
    ) -> Result<Self, Failure> {
        let shown = path.display().to_string();
        let fail = |error: std::io::Error| Failure::new(format!("{shown}: {error}"));
        let mut file = File::create(path).map_err(fail)?;
        file.write_all(MAGIC).map_err(fail)?;
        let mut written =
            Written { bytes: MAGIC.len() as u64, began: false, cut: false, lost: false, failed: None };
        written.chunk(&mut file, header.to_string().as_bytes()).map_err(fail)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, name) = (stop.clone(), shown.clone());
        let body = move || {
            let (mut ring, mut bytes) = (None, Vec::new());
            loop {
                // Looked at before reading, so that nothing written before the stop is missed.
                let last = stopped.load(Ordering::Acquire);
                ring = ring.or_else(&mut find);
                written.began |= ring.is_some();
                let got = ring.map_or(0, |ring: ByteRing| ring.read(&mut bytes));
                if written.bytes + bytes.len() as u64 + 8 > limit && !written.cut {
                    written.cut = true;
                    log::warn!(
                        "{name}: the recording ends here, at its limit of {limit} bytes; the run goes on"
                    );
                }
                // Still read: the domain would wait.
                if written.cut || written.failed.is_some() {
                    bytes.clear();
                }
                // Whatever is there when nothing more comes: it may be the last of a domain that dies.
                if bytes.len() >= CHUNK || (got == 0 && !bytes.is_empty()) {
                    written.failed = written.chunk(&mut file, &bytes).err();
                    bytes.clear();
                }
                if last && got == 0 {
                    written.lost = ring.is_some_and(|ring| ring.lost());
                    return written;
                }
                if got == 0 {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("record".into())
            .spawn(body)
            .map_err(|error| Failure::new(format!("starting the recording's thread: {error}")))?;
        Ok(Self { stop, thread: Some(thread), shown })
    }

    /// Writes what is left.
    pub fn finish(mut self) -> Result<(), Failure> {
        self.stop.store(true, Ordering::Release);
        match self.thread.take().and_then(|thread| thread.join().ok()) {
            Some(Written { failed: Some(error), .. }) => {
                Err(Failure::new(format!("{}: cannot write: {error}: it is good up to there", self.shown)))
            }
            Some(written) if !written.began => {
                log::warn!("{}: nothing was recorded, because the guest did not get that far", self.shown);
                Ok(())
            }
            Some(written) if written.lost => {
                log::warn!(
                    "{}: the recording ends early, because it was not written for 10 s: is the disk that slow?",
                    self.shown
                );
                Ok(())
            }
            Some(_) => Ok(()),
            None => Err(Failure::new(format!("{}: the recording's thread panicked", self.shown))),
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

impl Written {
    /// In one write, so that a chunk is cut only where the disk is full or the host dies.
    fn chunk(&mut self, file: &mut File, bytes: &[u8]) -> std::io::Result<()> {
        let mut chunk = Vec::with_capacity(bytes.len() + 8);
        chunk.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        chunk.extend_from_slice(&crc32(bytes).to_le_bytes());
        chunk.extend_from_slice(bytes);
        file.write_all(&chunk)?;
        self.bytes += chunk.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_fails_ends_the_recording_and_not_the_run() {
        use std::os::fd::AsRawFd;
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
        let (recording, ring) = Recording::start(Path::new(&path), &serde_json::json!({}), 1 << 30).unwrap();
        // From now on every write fails.
        drop((reader, writer));
        for _ in 0..20_000 {
            assert!(ring.write(&[7; 1000], || {
                std::thread::yield_now();
                true
            }));
        }
        assert!(recording.finish().unwrap_err().to_string().contains("cannot write"));
    }

    #[test]
    fn a_recording_ends_at_its_limit() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (recording, ring) = Recording::start(file.path(), &serde_json::json!({}), 100_000).unwrap();
        for _ in 0..1000 {
            assert!(ring.write(&[7; 1000], || {
                std::thread::yield_now();
                true
            }));
        }
        recording.finish().unwrap();
        assert!(file.as_file().metadata().unwrap().len() <= 100_000);
    }
}
