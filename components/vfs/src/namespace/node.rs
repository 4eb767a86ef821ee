//! Inodes as they are handed out: they keep their mount busy, and changes made through them reach the dentry cache.

use super::table::Mount;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::{DirEntry, FileKind, FsError, Inode, Metadata, Result, Timestamp};
use hypercall::Host;

pub(super) struct Node<H: Host> {
    mount: Arc<Mount<H>>,
    inode: Arc<dyn Inode>,
    number: u64,
}

impl<H: Host> Node<H> {
    pub(super) fn new(mount: Arc<Mount<H>>, inode: Arc<dyn Inode>, number: u64) -> Result<Arc<Self>> {
        if !mount.enter() {
            return Err(FsError::NotFound);
        }
        Ok(Arc::new(Self { mount, inode, number }))
    }

    fn wrap(&self, inode: Arc<dyn Inode>) -> Result<Arc<dyn Inode>> {
        let number = inode.metadata()?.inode;
        Ok(Self::new(self.mount.clone(), inode, number)?)
    }
}

impl<H: Host> Drop for Node<H> {
    fn drop(&mut self) {
        self.mount.leave();
    }
}

impl<H: Host> Inode for Node<H> {
    fn metadata(&self) -> Result<Metadata> {
        self.inode.metadata()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        self.inode.read_at(offset, buf)
    }

    fn lookup(&self, name: &[u8]) -> Result<Arc<dyn Inode>> {
        let found = self.mount.dentries.lookup(&self.inode, self.number, name)?.ok_or(FsError::NotFound)?;
        Ok(Self::new(self.mount.clone(), found.inode, found.number)?)
    }

    fn read_dir(&self, cursor: u64, sink: &mut dyn FnMut(DirEntry) -> bool) -> Result<Option<u64>> {
        self.inode.read_dir(cursor, sink)
    }

    fn read_link(&self) -> Result<Vec<u8>> {
        self.inode.read_link()
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<usize> {
        self.inode.write_at(offset, data)
    }

    fn truncate(&self, size: u64) -> Result<()> {
        self.inode.truncate(size)
    }

    fn create(&self, name: &[u8], kind: FileKind, target: Option<&[u8]>) -> Result<Arc<dyn Inode>> {
        let made = self.inode.create(name, kind, target);
        self.mount.dentries.forget(self.number, name);
        self.wrap(made?)
    }

    fn remove(&self, name: &[u8]) -> Result<()> {
        let removed = self.inode.remove(name);
        // It may have been a directory, whose number may come back.
        self.mount.dentries.forget_all();
        removed
    }

    fn rename(&self, name: &[u8], to: &Arc<dyn Inode>, new_name: &[u8]) -> Result<()> {
        let to = to.as_any().downcast_ref::<Self>().ok_or(FsError::CrossDevice)?;
        if !Arc::ptr_eq(&self.mount, &to.mount) {
            return Err(FsError::CrossDevice);
        }
        let renamed = self.inode.rename(name, &to.inode, new_name);
        self.mount.dentries.forget_all();
        renamed
    }

    fn set_modified(&self, time: Timestamp) -> Result<()> {
        self.inode.set_modified(time)
    }

    fn sync(&self) -> Result<()> {
        self.inode.sync()
    }

    fn as_any(&self) -> &dyn core::any::Any {
        self
    }
}
