//! Every hypercall fails that a disk of the platform needs from being found to being let go: one alone, and all from one on.
//! Nothing may panic, hang or stay behind, and what a flush acknowledged is on the medium.

use crate::testing::StorageModel;
use crate::{Claim, Options, PlatformStack, UsbStack};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::block::{BlockDevice, BlockError, Complete, Op, Request};
use hypercall::layers::{Fault, FaultPlan, Faulty};
use hypercall::testing::TestHost;
use hypercall::{HostUsb, Signal, UsbPath};
use std::sync::Mutex;
use std::vec;

type Host = Faulty<TestHost>;

/// How a request ended, and what is in its buffers.
type Ended = (Result<(), BlockError>, Vec<u8>);

#[derive(Default)]
struct Sink(Mutex<Option<Ended>>);

impl Complete for Sink {
    fn complete(&self, request: Request, result: Result<(), BlockError>) {
        let before = self.0.lock().unwrap().replace((result, request.buffers.concat()));
        assert!(before.is_none(), "a request is completed twice");
    }
}

/// Runs until `done`, for ten minutes of virtual time at most. Says whether it is.
fn until(platform: &PlatformStack<Host>, host: TestHost, done: impl Fn() -> bool) -> bool {
    (0..60_000).any(|_| {
        platform.stack.poll();
        host.advance(10_000_000);
        done()
    })
}

/// A request from its beginning to its end, which must come.
fn request(
    platform: &PlatformStack<Host>,
    host: TestHost,
    disk: &dyn BlockDevice,
    op: Op,
    buffers: Vec<Box<[u8]>>,
) -> Result<Vec<u8>, BlockError> {
    let sink = Arc::new(Sink::default());
    disk.submit(Request { op, sector: 8, buffers, done: sink.clone(), tag: 0 })
        .map_err(|rejected| rejected.reason.unwrap_or(BlockError::Io))?;
    assert!(until(platform, host, || sink.0.lock().unwrap().is_some()), "{op:?} never ends");
    let (result, data) = sink.0.lock().unwrap().take().unwrap();
    result.map(|()| data)
}

fn run(fault: Fault) -> &'static FaultPlan {
    let plan: &'static FaultPlan = Box::leak(Box::new(FaultPlan::new(fault)));
    let inner = TestHost::with_virtual_time();
    let kernel = Kernel::new(Faulty::new(inner, plan), Default::default());
    let (model, state) = StorageModel::new(vec![7; 64 << 10]);
    let device = inner.plug_usb(UsbPath::parse("1-1").unwrap(), Box::new(model));
    let options = Options { claim: Claim::All, ..Options::default() };
    let mut worked = false;
    if let Ok(platform) = UsbStack::attach_platform(&kernel, options) {
        platform.look_around();
        assert!(until(&platform, inner, || platform.stack.settled()), "{fault:?}: it looks for ever");
        if let Some(disk) = kernel.block_devices().first().cloned() {
            let one = |byte| vec![vec![byte; 4096].into_boxed_slice()];
            let written = request(&platform, inner, &*disk, Op::Write, one(9));
            let flushed = request(&platform, inner, &*disk, Op::Flush, vec![]);
            if written.is_ok() && flushed.is_ok() {
                let state = state.lock().unwrap();
                let there = &state.medium.as_ref().unwrap()[4096..8192];
                assert_eq!(there, [9; 4096], "{fault:?}: acknowledged data lost");
            }
            if let Ok(data) = request(&platform, inner, &*disk, Op::Read, one(0)) {
                let expected = if written.is_ok() { 9 } else { data[0] };
                assert!(data.iter().all(|byte| *byte == expected), "{fault:?}: not what was written");
                worked = written.is_ok() && flushed.is_ok();
            }
        }
        kernel.shutdown();
        drop(platform);
    }
    let what = plan.last();
    assert!(fault != Fault::Never || worked, "the disk does not even work without a fault");
    assert_eq!(Arc::strong_count(&kernel), 1, "{fault:?}, {what:?}: the kernel is still held");
    drop(kernel);
    assert_eq!(inner.threads_in_use(), 0, "{fault:?}, {what:?}: threads are left");
    assert_eq!(inner.pages_in_use(), 0, "{fault:?}, {what:?}: pages leaked");
    let again = inner.usb_open(device, Arc::new(Signal::new()));
    assert_eq!(again, Ok(()), "{fault:?}, {what:?}: the device is still held");
    plan
}

#[test]
fn every_hypercall_of_a_disk_fails() {
    let calls = run(Fault::Never).counted();
    assert!(calls > 15, "{calls}");
    for n in 1..=calls {
        run(Fault::Nth(n));
        run(Fault::From(n));
    }
}
