//! The component of docs/writing-a-component.md, which a newcomer builds first: what the document shows is this code.

extern crate alloc;

use anykernel::config::Config;
use anykernel::{Kernel, block};
use hypercall::testing::TestHost;

#[expect(unreachable_pub, reason = "as in a crate of its own")]
mod ramdisk {
    use alloc::sync::Arc;
    use alloc::vec::Vec;
    use anykernel::block::{BlockDevice, BlockError, BlockInfo, Op, Rejected, Request};
    use anykernel::counter::Counter;
    use anykernel::manifest::Capability;
    use anykernel::sync::Mutex;
    use anykernel::{Kernel, Manifest, StartError};
    use hypercall::{ContractVersion, Host};

    pub const MANIFEST: Manifest = Manifest {
        name: "ramdisk",
        summary: "a disk in memory",
        core: &[Capability::Threads],
        contracts: &[ContractVersion::CORE],
    };

    pub fn start<H: Host>(kernel: &Arc<Kernel<H>>) -> Result<(), StartError> {
        kernel.admit(MANIFEST)?;
        let refused = kernel.counter("ramdisk.refused");
        let disk = RamDisk::new(kernel.host().of_component("ramdisk"), 16 << 20, refused)
            .ok_or_else(|| StartError::Other("ramdisk: no memory".into()))?;
        kernel.add_block_device(Arc::new(disk));
        Ok(())
    }

    const SECTOR: usize = 512;

    struct RamDisk<H: Host> {
        info: BlockInfo,
        refused: Counter,
        content: Mutex<H, Vec<u8>>,
        finished: Mutex<H, Vec<Request>>,
    }

    impl<H: Host> RamDisk<H> {
        /// `None`: no memory.
        fn new(host: H, len: usize, refused: Counter) -> Option<Self> {
            let mut content = Vec::new();
            content.try_reserve_exact(len).ok()?;
            content.resize(len, 0);
            let info = BlockInfo {
                name: "ram0".into(),
                sector_size: SECTOR as u32,
                sectors: (len / SECTOR) as u64,
                read_only: false,
                max_request_bytes: 1 << 20,
                max_buffers: usize::MAX,
                queue_depth: 64,
                needs_flush: false,
            };
            let (content, finished) = (Mutex::new(host, content), Mutex::new(host, Vec::new()));
            Some(Self { info, refused, content, finished })
        }

        /// Where on the disk a request lies; `None`: not on it.
        fn range(&self, request: &Request) -> Option<core::ops::Range<usize>> {
            let start = usize::try_from(request.sector).ok()?.checked_mul(SECTOR)?;
            let end = start.checked_add(request.bytes())?;
            let whole = request.buffers.iter().all(|buffer| buffer.len().is_multiple_of(SECTOR));
            (whole && end as u64 <= self.info.bytes()?).then_some(start..end)
        }
    }

    impl<H: Host> BlockDevice for RamDisk<H> {
        fn info(&self) -> &BlockInfo {
            &self.info
        }

        fn submit(&self, mut request: Request) -> Result<(), Rejected> {
            let Some(range) = self.range(&request) else {
                self.refused.increment();
                return Err(Rejected { request, reason: Some(BlockError::Invalid) });
            };
            let mut content = self.content.lock();
            let mut rest = content.get_mut(range).unwrap_or_default();
            for buffer in &mut request.buffers {
                let (here, after) = rest.split_at_mut(buffer.len());
                match request.op {
                    Op::Read => buffer.copy_from_slice(here),
                    Op::Write => here.copy_from_slice(buffer),
                    Op::Flush => {}
                }
                rest = after;
            }
            drop(content);
            self.finished.lock().push(request);
            Ok(())
        }

        fn poll(&self) {
            // Not under the lock: whoever is told may submit the next one.
            let finished = core::mem::take(&mut *self.finished.lock());
            for request in finished {
                let done = request.done.clone();
                done.complete(request, Ok(()));
            }
        }
    }
}

#[test]
fn keeps_what_is_written_and_refuses_what_lies_outside() {
    let host = TestHost::with_virtual_time();
    let kernel = Kernel::new(host, Config::default());
    ramdisk::start(&kernel).unwrap();
    let disk = kernel.block_devices().remove(0);
    let sector = |byte: u8| vec![vec![byte; 512].into_boxed_slice()];
    block::transfer(host, &*disk, block::Op::Write, 7, sector(7)).unwrap();
    assert_eq!(block::transfer(host, &*disk, block::Op::Read, 7, sector(0)).unwrap(), sector(7));
    for (at, buffers) in [(32768, sector(0)), (u64::MAX, sector(0)), (0, vec![Box::from([0; 100])])] {
        let refused = block::transfer(host, &*disk, block::Op::Read, at, buffers);
        assert_eq!(refused.unwrap_err(), block::BlockError::Invalid, "sector {at}");
    }
    assert_eq!(kernel.counter("ramdisk.refused").get(), 3);
    kernel.shutdown();
}

/// The document's Rust is this file's, line by line.
#[test]
fn the_document_shows_this_code() {
    let document = include_str!("../../docs/writing-a-component.md");
    let code: Vec<&str> = include_str!("ramdisk.rs").lines().map(str::trim).collect();
    let mut shown = Vec::new();
    for block in document.split("```rust\n").skip(1) {
        shown.extend(block.split("```").next().unwrap().lines().map(str::trim));
    }
    // How a crate begins cannot be shown inside a test.
    let begins = |line: &&&str| line.starts_with("#![") || line.starts_with("//!") || line.is_empty();
    let missing: Vec<_> = shown.iter().filter(|line| !begins(line) && !code.contains(*line)).collect();
    assert!(missing.is_empty(), "not in the test: {missing:#?}");
    assert!(shown.len() > 80, "the document shows all of the component");
}
