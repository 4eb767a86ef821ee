//! A host for the benchmarks: threads and futexes of the operating system, disks on files.

use hypercall::testing::TestHost;
use hypercall::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU32;
use std::time::Instant;

#[derive(Clone, Copy)]
pub(crate) struct BenchHost(&'static Inner);

struct Inner {
    /// For what no measurement touches.
    rest: TestHost,
    start: Instant,
    disks: Vec<(File, DiskInfo)>,
}

impl BenchHost {
    /// One read-only disk. The host is leaked, as hosts of tests are.
    pub(crate) fn with_disk(file: File) -> Self {
        let sectors = file.metadata().expect("the image's size").len() / 512;
        let info = DiskInfo { sector_size: 512, sectors, read_only: true };
        Self(Box::leak(Box::new(Inner {
            rest: TestHost::new(),
            start: Instant::now(),
            disks: vec![(file, info)],
        })))
    }
}

impl Versions for BenchHost {
    fn contracts(&self) -> &'static [ContractVersion] {
        &[ContractVersion::CORE, ContractVersion::BLOCK]
    }
}

impl Clock for BenchHost {
    fn monotonic_ns(&self) -> u64 {
        self.0.start.elapsed().as_nanos() as u64
    }
    fn realtime_ns(&self) -> u64 {
        self.0.rest.realtime_ns()
    }
}

// SAFETY: the pages are those of another host.
unsafe impl Memory for BenchHost {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        self.0.rest.alloc_pages(count)
    }
    unsafe fn free_pages(&self, pages: Pages) {
        // SAFETY: by the contract they came from `alloc_pages`, that is from there.
        unsafe { self.0.rest.free_pages(pages) }
    }
    fn memory_bytes(&self) -> u64 {
        4 << 30
    }
}

impl Threads for BenchHost {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        self.0.rest.spawn(spec, entry)
    }
    fn join(&self, thread: ThreadId) -> Result<()> {
        self.0.rest.join(thread)
    }
    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        use rustix::thread::futex;
        assert!(deadline_ns.is_none(), "nothing here waits with a deadline");
        match futex::wait(word, futex::Flags::PRIVATE, expected, None) {
            Ok(()) => ParkResult::Woken,
            Err(_) => ParkResult::Changed,
        }
    }
    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        use rustix::thread::futex;
        let count = count.min(i32::MAX as u32);
        futex::wake(word, futex::Flags::PRIVATE, count).unwrap_or(0) as u32
    }
    fn yield_now(&self) {
        std::thread::yield_now();
    }
}

impl Cpus for BenchHost {
    fn cpu_count(&self) -> u32 {
        2
    }
    fn current_cpu(&self) -> CpuId {
        CpuId(0)
    }
}

impl Entropy for BenchHost {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        self.0.rest.fill_random(buf)
    }
}

impl Params for BenchHost {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        self.0.rest.param(key, buf)
    }
}

impl Console for BenchHost {
    fn console_write(&self, bytes: &[u8]) {
        self.0.rest.console_write(bytes);
    }
}

impl Exit for BenchHost {
    fn exit(&self, status: ExitStatus) -> ! {
        self.0.rest.exit(status)
    }
}

impl HostBlock for BenchHost {
    fn disk_count(&self) -> u32 {
        self.0.disks.len() as u32
    }
    fn disk_info(&self, disk: u32) -> Result<DiskInfo> {
        self.0.disks.get(disk as usize).map(|(_, info)| *info).ok_or(Error::NotFound)
    }
    fn disk_read(&self, disk: u32, sector: u64, buf: &mut [u8]) -> Result<()> {
        let (file, _) = self.0.disks.get(disk as usize).ok_or(Error::NotFound)?;
        file.read_exact_at(buf, sector * 512).map_err(|_| Error::Io)
    }
    fn disk_write(&self, _disk: u32, _sector: u64, _buf: &[u8]) -> Result<()> {
        Err(Error::Denied)
    }
    fn disk_flush(&self, _disk: u32) -> Result<()> {
        Ok(())
    }
}
