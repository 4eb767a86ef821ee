//! `usb fill`: a writer that finds its disk pulled out, for trying what becomes of what it wrote.

use crate::print;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::fs::{File, FsError, Namespace, OpenOptions};
use hypercall::{ExitStatus, Host, Signal};
use serde_json::json;

const BLOCK: usize = 64 << 10;
/// The file goes round in this many blocks.
const BLOCKS: u64 = 256;
/// Blocks between two calls of sync.
const SYNC_EVERY: u64 = 8;
const PERIOD_NS: u64 = 50_000_000;
const FILE: &str = "filled.bin";

struct Fill<'a, H: Host> {
    kernel: &'a Arc<Kernel<H>>,
    pause: Arc<Signal>,
    source: &'a str,
    target: &'a str,
    /// Blocks that were written, how many of them are durable, and how many were ever written.
    written: u64,
    synced: u64,
    most: u64,
}

/// Writes blocks to a file below `target`, where `source` is mounted, and syncs them, until that fails; then unmounts, waits
/// until the disk is plugged in again, mounts it and checks that what was synced is there. Again and again, until the
/// instance is stopped. What happens is printed as JSON lines.
pub(crate) fn run<H: Host>(kernel: &Arc<Kernel<H>>, source: &str, target: &str) -> ExitStatus {
    let Some(names) = kernel.namespace() else { return ExitStatus::Failure };
    let pause = Arc::new(Signal::new());
    kernel.raise_on_stop(pause.clone());
    let mut fill = Fill { kernel, pause, source, target, written: 0, synced: 0, most: 0 };
    while !kernel.stopping() {
        let Err(error) = fill.write(&*names) else { break };
        fill.say(json!({ "error": error.to_string(), "written": fill.written, "synced": fill.synced }));
        if let Err(line) = fill.come_back(&*names) {
            fill.say(json!({ "wrong": line }));
            return ExitStatus::Failure;
        }
    }
    ExitStatus::Success
}

impl<H: Host> Fill<'_, H> {
    fn say(&self, line: serde_json::Value) {
        print(self.kernel, &line.to_string());
    }

    fn open(&self, names: &dyn Namespace, name: &str, write: bool) -> Result<File, FsError> {
        let options = OpenOptions { read: true, write, create: write, ..OpenOptions::default() };
        names.open(alloc::format!("{}/{name}", self.target).as_bytes(), options)
    }

    /// Writes until that fails, or (`Ok`) the instance is stopped.
    fn write(&mut self, names: &dyn Namespace) -> Result<(), FsError> {
        let file = self.open(names, FILE, true)?;
        while !self.kernel.stopping() {
            let block: Vec<u8> = self.written.to_le_bytes().repeat(BLOCK / 8);
            let at = self.written % BLOCKS * BLOCK as u64;
            if file.write_at(at, &block)? != BLOCK {
                return Err(FsError::NoSpace);
            }
            self.written += 1;
            self.most = self.most.max(self.written);
            if self.written.is_multiple_of(SYNC_EVERY) {
                file.inode.sync()?;
                self.synced = self.written;
                self.say(json!({ "synced": self.synced }));
            }
        }
        Ok(())
    }

    /// Waits until the disk is there, or is not; `false`: the instance is stopped.
    fn wait(&self, there: bool) -> bool {
        loop {
            let seen = self.pause.count();
            if self.kernel.stopping() {
                return false;
            }
            if self.kernel.block_devices().iter().any(|disk| disk.info().name == self.source) == there {
                return true;
            }
            let host = self.kernel.host();
            self.pause.wait(&host, seen, Some(host.monotonic_ns().saturating_add(PERIOD_NS)));
        }
    }

    /// From a disk that was pulled out to the same one again.
    fn come_back(&mut self, names: &dyn Namespace) -> Result<(), String> {
        if !self.wait(false) {
            return Ok(());
        }
        if self.open(names, "another.bin", true).is_ok_and(|file| file.inode.sync().is_ok()) {
            return Err("the mount of a disk that is gone still takes files".into());
        }
        let failed = |what: &'static str| move |error: FsError| alloc::format!("{what}: {error}");
        names.unmount(self.target.as_bytes()).map_err(failed("unmounting"))?;
        if !self.wait(true) {
            return Ok(());
        }
        names.mount(self.source, self.target.as_bytes(), None, false).map_err(failed("mounting"))?;
        let file = self.open(names, FILE, false).map_err(failed("opening"))?;
        let mut block = vec![0; BLOCK];
        for at in 0..BLOCKS.min(self.synced) {
            // The last that was synced of those that went to this place; a later one may be there, too.
            let rounds = (self.synced - 1 - at) / BLOCKS;
            let least = rounds * BLOCKS + at;
            let len = file.read_at(at * BLOCK as u64, &mut block).map_err(failed("reading"))?;
            let (words, _) = block.as_chunks::<8>();
            let good = |word: &[u8; 8]| {
                let word = u64::from_le_bytes(*word);
                word >= least && word % BLOCKS == at && word < self.most
            };
            if len != BLOCK || !words.iter().all(good) {
                return Err(alloc::format!("block {at} is not what was synced as block {least}"));
            }
        }
        // What was written behind that may be lost.
        self.written = self.synced;
        self.say(json!({ "verified": self.synced }));
        Ok(())
    }
}
