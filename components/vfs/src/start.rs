//! What happens when the component starts.

use crate::cache::BlockCache;
use crate::ext4::Ext4;
use crate::fat::VFat;
use crate::namespace::MountTree;
use crate::partition;
use crate::tmpfs::TmpFs;
use alloc::sync::Arc;
use anykernel::fs::{FileKind, FsError, Namespace};
use anykernel::manifest::Capability;
use anykernel::{Kernel, Manifest, StartError};
use hypercall::{ContractVersion, Host};

/// What the component uses.
pub const MANIFEST: Manifest = Manifest {
    name: "vfs",
    summary: "mounts, path walk, ext4, FAT, tmpfs, block cache, partitions",
    core: &[Capability::Clock, Capability::Memory, Capability::Threads, Capability::Entropy],
    contracts: &[ContractVersion::CORE],
};

/// Starts the component: registers the kinds of file systems, the partitions of every registered block device, sets
/// the namespace and mounts what the configuration says (a tmpfs at `/` if that is nothing, or does not begin
/// with `/`). Missing mount points are made where the file system above can.
///
/// Errors: [`StartError::Refused`]; [`StartError::Config`] or [`StartError::Other`] with a line that says which mount
/// failed, why, and what to do. Context: thread, after the block drivers.
pub fn start<H: Host>(kernel: &Arc<Kernel<H>>) -> Result<(), StartError> {
    kernel.admit(MANIFEST)?;
    let cache = BlockCache::for_kernel(kernel);
    kernel.add_fs_type(Arc::new(Ext4::new(kernel, cache.clone())));
    kernel.add_fs_type(Arc::new(VFat::new(kernel.host().of_component("vfat"), cache)));
    kernel.add_fs_type(Arc::new(TmpFs::new(kernel.host().of_component("tmpfs"))));
    partition::scan(kernel);
    let tree = MountTree::new(kernel);
    kernel.set_namespace(tree.clone());
    let mounts = &kernel.config().mounts;
    if mounts.first().is_none_or(|first| !first.target.trim_end_matches('/').is_empty()) {
        let root = tree.mount_or_explain("tmpfs", b"/", Some("tmpfs"), false);
        root.map_err(|failed| StartError::Other(failed.line))?;
    }
    for mount in mounts {
        make_mount_point(&*tree, mount.target.as_bytes());
        tree.mount_or_explain(&mount.source, mount.target.as_bytes(), mount.kind.as_deref(), mount.read_only)
            .map_err(|failed| match failed.error {
                FsError::NotFound | FsError::Unsupported | FsError::Busy => StartError::Config(failed.line),
                _ => StartError::Other(failed.line),
            })?;
        log::info!("mounted {} at {}", mount.source, mount.target);
    }
    Ok(())
}

/// Makes the directories of `target` that are missing. What cannot be made shows when it is mounted on.
fn make_mount_point(tree: &dyn Namespace, target: &[u8]) {
    let ends = target.iter().enumerate().filter(|(at, byte)| *at > 0 && **byte == b'/').map(|(at, _)| at);
    for end in ends.chain([target.len()]) {
        if let Some(path) = target.get(..end)
            && tree.resolve(path, true).is_err()
        {
            let _ = tree.create(path, FileKind::Directory, None);
        }
    }
}
