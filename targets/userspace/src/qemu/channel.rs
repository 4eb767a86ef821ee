//! Memory of a guest that this process sees too, and the channel in it ([`hypercall::layers::Channel`]).
#![expect(unsafe_code, reason = "maps the memory of a guest")]

use crate::Failure;
use core::sync::atomic::AtomicU64;
use hypercall::layers::{CHANNEL_ALIGN, Channel};
use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::File;
use std::os::fd::AsRawFd;

/// The memory of a machine. The mapping stays until the process ends, because channels are for ever.
pub(super) struct GuestMemory {
    file: File,
    bytes: u64,
    words: &'static [AtomicU64],
}

impl GuestMemory {
    /// Memory for a machine with `bytes` of it.
    pub(super) fn new(bytes: u64) -> Result<Self, Failure> {
        let fail = |error: rustix::io::Errno| {
            Failure::new(format!("memory that is shared with the guest: {error}: give it less with --memory"))
        };
        let file = File::from(memfd_create("anykernel-guest", MemfdFlags::CLOEXEC).map_err(fail)?);
        ftruncate(&file, bytes).map_err(fail)?;
        let len = usize::try_from(bytes).map_err(|_| fail(rustix::io::Errno::NOMEM))?;
        // SAFETY: a fresh mapping at a place of the kernel's choice.
        let at = unsafe {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            mmap(core::ptr::null_mut(), len, protection, MapFlags::SHARED, &file, 0).map_err(fail)?
        };
        // SAFETY: the mapping is never taken away, page-aligned, as long as the file, which nobody else can shorten without
        // being this user, and accessed as atomics only.
        let words = unsafe { core::slice::from_raw_parts(at.cast::<AtomicU64>(), len / 8) };
        Ok(Self { file, bytes, words })
    }

    /// What QEMU is told. `-m` must say the same size.
    pub(super) fn args(&self) -> [String; 4] {
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd());
        [
            "-object".into(),
            format!("memory-backend-file,id=ram0,size={},mem-path={path},share=on", self.bytes),
            "-machine".into(),
            "memory-backend=ram0".into(),
        ]
    }

    /// Looks for the channel. Pages that the guest never touched are passed over.
    pub(super) fn find(&self) -> Option<Channel> {
        let mut end = 0;
        loop {
            let start = seek(&self.file, SeekFrom::Data(end)).ok()?;
            end = seek(&self.file, SeekFrom::Hole(start)).ok()?;
            let pages = (start..end).step_by(CHANNEL_ALIGN);
            let found = pages.filter_map(|at| Channel::attach(self.words.get(at as usize / 8..)?)).next();
            if found.is_some() {
                return found;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercall::layers::ChannelKind;

    #[test]
    fn finds_a_channel_wherever_it_is() {
        let memory = GuestMemory::new(64 << 20).unwrap();
        assert!(memory.find().is_none());
        memory.words[5].store(1, core::sync::atomic::Ordering::Relaxed);
        assert!(memory.find().is_none());
        let at = (48 << 20) / 8;
        Channel::create(&memory.words[at..at + (64 << 10)], ChannelKind::Trace).unwrap();
        assert!(memory.find().is_some());
    }
}
