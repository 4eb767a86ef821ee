//! `tmpfs`: files in memory, gone when unmounted.
//!
//! Bounded: a mount takes at most half of [`hypercall::Memory::memory_bytes`]; beyond that every operation that needs
//! memory fails with [`FsError::NoSpace`] and changes nothing. Files are sparse: pages that were never written take no
//! memory.
//!
//! Locks: every inode has its own. Whoever holds more than one of them holds [`Shared::moves`] too, so that no order
//! among inodes is needed.

mod content;
mod node;
#[cfg(test)]
mod tests;

use alloc::{string::String, sync::Arc};
use anykernel::block::BlockDevice;
use anykernel::fs::{FileSystem, FsError, FsStats, FsType, Inode, Result};
use anykernel::sync::Mutex;
use content::PAGE;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use hypercall::Host;
use node::Node;

/// Longest name in bytes, as on most file systems.
const MAX_NAME: usize = 255;

/// The kind `tmpfs`.
pub struct TmpFs<H: Host> {
    host: H,
}

impl<H: Host> TmpFs<H> {
    /// A kind whose mounts take memory from `host`.
    pub fn new(host: H) -> Self {
        Self { host }
    }
}

impl<H: Host> FsType for TmpFs<H> {
    fn name(&self) -> &'static str {
        "tmpfs"
    }

    fn probe(&self, _device: &Arc<dyn BlockDevice>) -> Result<bool> {
        Ok(false)
    }

    /// An empty file system. `device` is ignored; a read-only one stays empty.
    fn mount(&self, _device: Option<Arc<dyn BlockDevice>>, read_only: bool) -> Result<Arc<dyn FileSystem>> {
        let shared = Arc::new(Shared {
            host: self.host,
            limit: self.host.memory_bytes() / 2,
            used: AtomicU64::new(0),
            next_inode: AtomicU64::new(1),
            read_only,
            moves: Mutex::new(self.host, ()),
        });
        let root = Node::directory(&shared)?;
        Ok(Arc::new(Mount { shared, root }))
    }
}

/// What all inodes of one mount share.
struct Shared<H: Host> {
    host: H,
    /// Most bytes of memory to use.
    limit: u64,
    used: AtomicU64,
    next_inode: AtomicU64,
    read_only: bool,
    /// Held by whoever locks several inodes or changes which directory another one is in.
    moves: Mutex<H, ()>,
}

impl<H: Host> Shared<H> {
    /// Takes `bytes` from the budget.
    fn charge(&self, bytes: u64) -> Result<()> {
        self.used
            .fetch_update(Relaxed, Relaxed, |used| used.checked_add(bytes).filter(|sum| *sum <= self.limit))
            .map(|_| ())
            .map_err(|_| FsError::NoSpace)
    }

    /// Gives `bytes` back.
    fn release(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Relaxed);
    }
}

struct Mount<H: Host> {
    shared: Arc<Shared<H>>,
    root: Arc<Node<H>>,
}

impl<H: Host> FileSystem for Mount<H> {
    fn root(&self) -> Result<Arc<dyn Inode>> {
        Ok(self.root.clone())
    }

    fn stats(&self) -> Result<FsStats> {
        let page = PAGE as u64;
        let used = self.shared.used.load(Relaxed);
        Ok(FsStats {
            kind: "tmpfs",
            block_size: PAGE as u32,
            blocks: self.shared.limit / page,
            free_blocks: self.shared.limit.saturating_sub(used) / page,
            max_name: MAX_NAME as u32,
            read_only: self.shared.read_only,
            label: String::new(),
        })
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
