//! File systems over a disk in memory that is reset by forgetting what was written to it.

pub mod disk;
pub mod ext4;
pub mod fat;
pub mod fsck;
pub mod images;
pub mod partition;

use crate::host::FuzzHost;
use crate::watch;
use anykernel::fs::{FileKind, Inode};
use anykernel_vfs::cache::{BlockCache, CacheCounters, CacheLimits};
use std::collections::HashSet;
use std::sync::Arc;

/// A small cache, so that things leave it again.
pub fn cache(host: FuzzHost) -> Arc<BlockCache<FuzzHost>> {
    let limits = CacheLimits { bytes: 256 << 10, read_ahead_bytes: 16 << 10 };
    BlockCache::new(host, limits, CacheCounters::default())
}

/// Visits everything once, reads some of each file, and checks what is true of any tree.
pub fn visit(top: Arc<dyn Inode>) -> usize {
    let mut seen = HashSet::new();
    let mut todo = vec![top];
    let (mut names, mut buf) = (0, [0; 4096]);
    while let Some(inode) = todo.pop() {
        watch::step();
        let Ok(metadata) = inode.metadata() else { continue };
        if !seen.insert(metadata.inode) || names > 1000 {
            continue;
        }
        match metadata.kind {
            FileKind::Directory => {
                let (mut entries, mut cursor) = (Vec::new(), 0);
                while let Ok(Some(next)) = inode.read_dir(cursor, &mut |entry| {
                    entries.push(entry);
                    entries.len() % 20 != 0
                }) {
                    watch::step();
                    assert!(next > cursor, "a listing goes forward");
                    cursor = next;
                    if entries.len() > 1000 {
                        break;
                    }
                }
                names += entries.len();
                let _ = inode.lookup(b"no such name");
                for entry in entries {
                    assert!(
                        !entry.name.is_empty()
                            && !entry.name.contains(&b'/')
                            && entry.name != b"."
                            && entry.name != b".."
                    );
                    todo.extend(inode.lookup(&entry.name));
                }
            }
            FileKind::Symlink => {
                if let Ok(target) = inode.read_link() {
                    assert!(target.len() <= 4095, "a link of {} bytes", target.len());
                }
            }
            _ => {
                for offset in [0, metadata.size / 2, metadata.size.saturating_sub(100), u64::MAX - 4096] {
                    if let Ok(len) = inode.read_at(offset, &mut buf) {
                        assert!(len <= buf.len() && (len == 0 || offset + len as u64 <= metadata.size));
                    }
                }
            }
        }
    }
    names
}
