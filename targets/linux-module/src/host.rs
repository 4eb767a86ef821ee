//! The contracts on the C half.
#![expect(unsafe_code, reason = "calls into C")]

use crate::ffi;
use alloc::boxed::Box;
use alloc::sync::Arc;
use core::ffi::c_void;
use core::ptr::NonNull;
use core::sync::atomic::AtomicU32;
use hypercall::{
    Clock, Console, ContractVersion, CpuId, Cpus, DiskInfo, Entropy, Error, Exit, ExitStatus, HostBlock,
    HostLink, LinkInfo, Memory, Pages, Params, ParkResult, Result, Signal, ThreadId, ThreadSpec, Threads,
    Versions,
};

/// The Linux kernel that the module is loaded in.
#[derive(Debug, Clone, Copy)]
pub struct LinuxHost;

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const ENXIO: i32 = 6;
const EAGAIN: i32 = 11;
const ENOMEM: i32 = 12;
const EBUSY: i32 = 16;
const ENODEV: i32 = 19;
const EINVAL: i32 = 22;
const EROFS: i32 = 30;
const EOVERFLOW: i32 = 75;
const EOPNOTSUPP: i32 = 95;

fn error(errno: i32) -> Error {
    match -errno {
        ENOENT => Error::NotFound,
        EAGAIN => Error::WouldBlock,
        ENOMEM => Error::NoMemory,
        EBUSY => Error::Busy,
        ENODEV | ENXIO => Error::Gone,
        EINVAL => Error::Invalid,
        EPERM | EROFS => Error::Denied,
        EOVERFLOW => Error::BufferTooSmall,
        EOPNOTSUPP => Error::Unsupported,
        _ => Error::Io,
    }
}

pub(crate) fn check(result: i32) -> Result<()> {
    if result == 0 { Ok(()) } else { Err(error(result)) }
}

/// A length, or an error if it is negative.
pub(crate) fn length(result: isize) -> Result<usize> {
    usize::try_from(result).map_err(|_| error(i32::try_from(result).unwrap_or(i32::MIN + 1)))
}

impl Versions for LinuxHost {
    fn contracts(&self) -> &'static [ContractVersion] {
        const ALL: &[ContractVersion] =
            &[ContractVersion::CORE, ContractVersion::BLOCK, ContractVersion::LINK, ContractVersion::USB];
        match ALL.split_last() {
            Some((_, without_usb)) if ffi::ak_usb_present() == 0 => without_usb,
            _ => ALL,
        }
    }
}

impl Clock for LinuxHost {
    fn monotonic_ns(&self) -> u64 {
        ffi::ak_monotonic_ns()
    }

    fn realtime_ns(&self) -> u64 {
        ffi::ak_realtime_ns()
    }
}

// SAFETY: `ak_pages_alloc` gives zeroed, page-aligned memory of `count` pages (kvzalloc) that is nobody else's until
// `ak_pages_free`, or null.
unsafe impl Memory for LinuxHost {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        if count == 0 {
            return Err(Error::Invalid);
        }
        let base = NonNull::new(ffi::ak_pages_alloc(count).cast()).ok_or(Error::NoMemory)?;
        Ok(Pages { base, count })
    }

    unsafe fn free_pages(&self, pages: Pages) {
        // SAFETY: by the contract the pages came from `alloc_pages`, and nobody refers to them.
        unsafe { ffi::ak_pages_free(pages.base.as_ptr().cast(), pages.count) }
    }

    fn memory_bytes(&self) -> u64 {
        ffi::ak_memory_bytes()
    }
}

/// What a thread is to run. The pointer that C carries is to the outer box: the inner one is fat.
pub(crate) type Entry = Box<dyn FnOnce() + Send + 'static>;

impl Threads for LinuxHost {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Entry) -> Result<ThreadId> {
        // `ANY_CPU` is a number, too.
        if spec.cpu.is_some_and(|cpu| cpu.0 >= self.cpu_count()) {
            return Err(Error::Invalid);
        }
        let entry: *mut Entry = Box::into_raw(Box::new(entry));
        let cpu = spec.cpu.map_or(ffi::ANY_CPU, |cpu| cpu.0);
        let mut id = 0;
        // SAFETY: the name is as long as said, `id` is ours, and `entry` is a leaked box that `ak_rust_thread` takes
        // back if the thread starts.
        let result = unsafe {
            ffi::ak_thread_spawn(spec.name.as_ptr(), spec.name.len(), cpu, entry.cast(), &raw mut id)
        };
        if let Err(error) = check(result) {
            // SAFETY: no thread was started, so the box is still ours.
            drop(unsafe { Box::from_raw(entry) });
            return Err(error);
        }
        Ok(ThreadId(id))
    }

    fn join(&self, thread: ThreadId) -> Result<()> {
        check(ffi::ak_thread_join(thread.0))
    }

    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        let deadline = deadline_ns.map_or(ffi::NO_DEADLINE, |ns| ns.min(ffi::NO_DEADLINE - 1));
        // SAFETY: the reference keeps the word readable; C reads it as one aligned 32-bit load.
        match unsafe { ffi::ak_park(word.as_ptr(), expected, deadline) } {
            ffi::WOKEN => ParkResult::Woken,
            ffi::CHANGED => ParkResult::Changed,
            _ => ParkResult::TimedOut,
        }
    }

    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        ffi::ak_unpark(word.as_ptr(), count)
    }

    fn yield_now(&self) {
        ffi::ak_yield();
    }
}

impl Cpus for LinuxHost {
    fn cpu_count(&self) -> u32 {
        ffi::ak_cpu_count()
    }

    fn current_cpu(&self) -> CpuId {
        CpuId(ffi::ak_current_cpu())
    }
}

impl Entropy for LinuxHost {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        // SAFETY: the buffer is as long as said.
        check(unsafe { ffi::ak_random(buf.as_mut_ptr(), buf.len()) })
    }
}

impl Params for LinuxHost {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        // SAFETY: key and buffer are as long as said.
        length(unsafe { ffi::ak_param(key.as_ptr(), key.len(), buf.as_mut_ptr(), buf.len()) })
    }
}

impl Console for LinuxHost {
    fn console_write(&self, bytes: &[u8]) {
        // SAFETY: the text is as long as said.
        unsafe { ffi::ak_console(bytes.as_ptr(), bytes.len()) }
    }
}

impl Exit for LinuxHost {
    fn exit(&self, status: ExitStatus) -> ! {
        ffi::ak_exit(u32::from(status.code()))
    }
}

impl HostBlock for LinuxHost {
    fn disk_count(&self) -> u32 {
        ffi::ak_disk_count()
    }

    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        let mut info = ffi::DiskInfo::default();
        // SAFETY: `info` is ours to write.
        check(unsafe { ffi::ak_disk_info(disk, &raw mut info) })?;
        Ok(DiskInfo { sector_size: info.sector_size, sectors: info.sectors, read_only: info.read_only != 0 })
    }

    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        // SAFETY: the buffer is as long as said; the call returns only when nothing writes to it any more.
        check(unsafe { ffi::ak_disk_read(disk, sector, buf.as_mut_ptr(), buf.len()) })
    }

    fn disk_write(&self, disk: u32, sector: u64, buf: &[u8]) -> Result<()> {
        // SAFETY: the buffer is as long as said; the call returns only when nothing reads it any more.
        check(unsafe { ffi::ak_disk_write(disk, sector, buf.as_ptr(), buf.len()) })
    }

    fn disk_flush(&self, disk: u32) -> Result<()> {
        check(ffi::ak_disk_flush(disk))
    }
}

impl HostLink for LinuxHost {
    fn link_count(&self) -> u32 {
        ffi::ak_link_count()
    }

    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        let signal: *const c_void = Arc::into_raw(signal).cast();
        let mut info = ffi::LinkInfo::default();
        // SAFETY: `info` is ours to write; the signal is a leaked reference that stays valid until `link_close`.
        if let Err(error) = check(unsafe { ffi::ak_link_open(link, signal, &raw mut info) }) {
            drop_signal(signal);
            return Err(error);
        }
        Ok(LinkInfo { mac: info.mac, mtu: info.mtu })
    }

    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        // SAFETY: the frame is as long as said, and copied.
        check(unsafe { ffi::ak_link_send(link, frame.as_ptr(), frame.len()) })
    }

    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        // SAFETY: the buffer is as long as said.
        length(unsafe { ffi::ak_link_receive(link, buf.as_mut_ptr(), buf.len()) })
    }

    fn link_close(&self, link: u32) {
        drop_signal(ffi::ak_link_close(link));
    }
}

/// Drops a reference that was leaked for the C half; null is none.
pub(crate) fn drop_signal(signal: *const c_void) {
    if !signal.is_null() {
        // SAFETY: it is what `Arc::into_raw` gave when it was handed over, and the C half has just given it up.
        drop(unsafe { Arc::from_raw(signal.cast::<Signal>()) });
    }
}
