use super::{kernel, shut_down};
use crate::testing::{BlkModel, Handle, Hostility, MmioOptions, PciOptions, TestMachine};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::block::{BlockDevice, BlockError, Complete, Op, Request, transfer};
use hypercall::{CpuId, Irq, IrqSource, Mmio, Signal};
use std::string::String;
use std::sync::Mutex;
use std::vec;

const DISK_BYTES: usize = 1 << 20;

fn image() -> Vec<u8> {
    (0..DISK_BYTES).map(|i| (i / 512 * 7 + i) as u8).collect()
}

type Disk = Arc<dyn BlockDevice>;
type Started = (TestMachine, Handle<BlkModel>, Arc<Kernel<TestMachine>>, Disk);

fn on_mmio(model: BlkModel, options: MmioOptions) -> Started {
    let machine = TestMachine::new();
    let handle = machine.add_mmio(model, options);
    let kernel = kernel(machine);
    let disk = kernel.block_devices()[0].clone();
    (machine, handle, kernel, disk)
}

fn on_pci(model: BlkModel, options: PciOptions) -> Started {
    let machine = TestMachine::new();
    let handle = machine.add_pci(model, options);
    let kernel = kernel(machine);
    let disk = kernel.block_devices()[0].clone();
    (machine, handle, kernel, disk)
}

/// Every front and every set of ring features.
fn all_fronts() -> Vec<Started> {
    let mut all = Vec::new();
    for ring_features in [0, 1 << 28, 1 << 29, 1 << 28 | 1 << 29] {
        for legacy in [false, true] {
            let options = MmioOptions { legacy, ring_features, ..MmioOptions::default() };
            all.push(on_mmio(BlkModel::new(image()), options));
        }
        for (msix, transitional) in [(4, false), (0, false), (1, true)] {
            let options = PciOptions { msix, transitional, ring_features, ..PciOptions::default() };
            all.push(on_pci(BlkModel::new(image()), options));
        }
    }
    all
}

fn zeroed(lens: &[usize]) -> Vec<Box<[u8]>> {
    lens.iter().map(|&len| vec![0; len].into_boxed_slice()).collect()
}

#[test]
fn reads_and_writes_on_every_front() {
    for (machine, handle, kernel, disk) in all_fronts() {
        let got = transfer(machine, &*disk, Op::Read, 3, zeroed(&[512, 1024, 4096])).unwrap();
        assert_eq!(got.concat(), image()[3 * 512..3 * 512 + 5632]);
        let data: Vec<Box<[u8]>> = vec![vec![0xaa; 512].into(), vec![0xbb; 1024].into()];
        transfer(machine, &*disk, Op::Write, 10, data).unwrap();
        transfer(machine, &*disk, Op::Flush, 0, Vec::new()).unwrap();
        handle.with(|model| {
            assert_eq!(model.image[5120..5632], [0xaa; 512]);
            assert_eq!(model.image[5632..6656], [0xbb; 1024]);
            assert_eq!(model.image[6656..7168], image()[6656..7168]);
            assert_eq!(model.flushes, 1);
        });
        assert_eq!(handle.complaints(), Vec::<String>::new());
        drop(disk);
        shut_down(machine, &kernel);
    }
}
/// Collects what was completed.
#[derive(Default)]
struct Collect(Mutex<Vec<Completed>>);

type Completed = (u64, Result<(), BlockError>, Vec<Box<[u8]>>);

impl Complete for Collect {
    fn complete(&self, request: Request, result: Result<(), BlockError>) {
        self.0.lock().unwrap().push((request.tag, result, request.buffers));
    }
}

fn request(op: Op, sector: u64, buffers: Vec<Box<[u8]>>, done: &Arc<Collect>, tag: u64) -> Request {
    Request { op, sector, buffers, done: done.clone(), tag }
}

#[test]
fn many_requests_are_in_flight_at_once_and_a_full_queue_gives_the_request_back() {
    let (machine, handle, kernel, disk) = on_mmio(BlkModel::new(image()), MmioOptions::default());
    handle.hold();
    let done = Arc::new(Collect::default());
    let depth = disk.info().queue_depth as u64;
    assert!(depth >= 32);
    for tag in 0..depth {
        assert!(disk.submit(request(Op::Read, tag, zeroed(&[512]), &done, tag)).is_ok());
    }
    let refused = disk.submit(request(Op::Read, 0, zeroed(&[512]), &done, 99)).err().unwrap();
    assert_eq!(refused.reason, None);
    assert_eq!((refused.request.buffers.len(), refused.request.buffers[0].len()), (1, 512));
    handle.release();
    while done.0.lock().unwrap().len() < depth as usize {
        disk.poll();
    }
    for (tag, result, buffers) in done.0.lock().unwrap().iter() {
        assert_eq!(*result, Ok(()));
        assert_eq!(buffers[0][..], image()[*tag as usize * 512..][..512]);
    }
    drop(disk);
    shut_down(machine, &kernel);
}

#[test]
fn a_batch_while_the_device_is_busy_costs_one_doorbell() {
    let (machine, handle, kernel, disk) = on_mmio(BlkModel::new(image()), MmioOptions::default());
    let done = Arc::new(Collect::default());
    handle.hold();
    let before = handle.kicks(0);
    for tag in 0..20 {
        disk.submit(request(Op::Read, tag, zeroed(&[512]), &done, tag)).ok().unwrap();
    }
    assert_eq!(handle.kicks(0) - before, 1);
    handle.release();
    while done.0.lock().unwrap().len() < 20 {
        disk.poll();
    }
    drop(disk);
    shut_down(machine, &kernel);
}

#[test]
fn the_driver_thread_completes_without_anybody_polling() {
    for (machine, _handle, kernel, disk) in all_fronts() {
        let done = Arc::new(Collect::default());
        // Several rounds: a lost interrupt or a line left masked shows at the second.
        for round in 0..5 {
            disk.submit(request(Op::Read, round, zeroed(&[512]), &done, round)).ok().unwrap();
            let start = std::time::Instant::now();
            while done.0.lock().unwrap().len() <= round as usize {
                assert!(start.elapsed().as_secs() < 3, "the interrupt was lost");
                std::thread::yield_now();
            }
        }
        drop(disk);
        shut_down(machine, &kernel);
    }
}

#[test]
fn refuses_what_the_device_cannot_do_before_it_sees_it() {
    let (machine, handle, kernel, disk) = on_mmio(BlkModel::new(image()).read_only(), MmioOptions::default());
    let sectors = disk.info().sectors;
    assert_eq!(sectors, DISK_BYTES as u64 / 512);
    assert!(disk.info().read_only);
    let cases: [(Op, u64, &[usize], BlockError); 9] = [
        (Op::Read, sectors, &[512], BlockError::Invalid),
        (Op::Read, sectors - 1, &[1024], BlockError::Invalid),
        (Op::Read, u64::MAX, &[512], BlockError::Invalid),
        (Op::Read, 0, &[], BlockError::Invalid),
        (Op::Read, 0, &[100], BlockError::Invalid),
        (Op::Read, 0, &[512, 0], BlockError::Invalid),
        (Op::Read, 0, &[disk.info().max_request_bytes + 512], BlockError::Invalid),
        (Op::Write, 0, &[512], BlockError::ReadOnly),
        (Op::Flush, 0, &[512], BlockError::Invalid),
    ];
    for (op, sector, lens, expected) in cases {
        assert_eq!(transfer(machine, &*disk, op, sector, zeroed(lens)).err(), Some(expected));
    }
    handle.with(|model| assert!(model.served.is_empty()));
    drop(disk);
    shut_down(machine, &kernel);
}

#[test]
fn respects_segment_limits() {
    let mut model = BlkModel::new(image());
    (model.seg_max, model.size_max) = (8, 1024);
    let (machine, handle, kernel, disk) = on_mmio(model, MmioOptions::default());
    // Eight segments of at most 1 KiB: two pages.
    assert_eq!(disk.info().max_request_bytes, 8192);
    let got = transfer(machine, &*disk, Op::Read, 0, zeroed(&[4096, 4096])).unwrap();
    assert_eq!(got.concat(), image()[..8192]);
    let nine = transfer(machine, &*disk, Op::Read, 0, zeroed(&[512; 9]));
    assert_eq!(nine.err(), Some(BlockError::Invalid));
    handle.with(|model| assert_eq!((model.most_segments, model.longest_segment), (8, 1024)));
    drop(disk);
    shut_down(machine, &kernel);
}

/// Without VIRTIO_BLK_F_SEG_MAX a request has one segment, but that may be long.
#[test]
fn one_segment_carries_a_large_buffer() {
    let mut model = BlkModel::new(image());
    model.features &= !(1 << 2);
    let (machine, handle, kernel, disk) = on_mmio(model, MmioOptions::default());
    let info = disk.info().clone();
    assert_eq!((info.max_buffers, info.max_request_bytes), (1, 1 << 20));
    let got = transfer(machine, &*disk, Op::Read, 0, zeroed(&[64 << 10])).unwrap();
    assert_eq!(got.concat(), image()[..64 << 10]);
    let two = transfer(machine, &*disk, Op::Read, 0, zeroed(&[4096, 4096]));
    assert_eq!(two.err(), Some(BlockError::Invalid));
    handle.with(|model| assert_eq!((model.most_segments, model.longest_segment), (1, 64 << 10)));
    drop(disk);
    shut_down(machine, &kernel);
}

#[test]
fn counts_in_blocks_of_4096_bytes() {
    let mut model = BlkModel::new(image());
    model.block_size = 4096;
    let (machine, _handle, kernel, disk) = on_mmio(model, MmioOptions::default());
    assert_eq!((disk.info().sector_size, disk.info().sectors), (4096, 256));
    let got = transfer(machine, &*disk, Op::Read, 255, zeroed(&[4096])).unwrap();
    assert_eq!(got.concat(), image()[255 * 4096..]);
    drop(disk);
    shut_down(machine, &kernel);
}

#[test]
fn a_bad_sector_is_an_error_of_its_request_only() {
    let mut model = BlkModel::new(image());
    model.bad_sector = Some(7);
    let (machine, _handle, kernel, disk) = on_mmio(model, MmioOptions::default());
    assert_eq!(transfer(machine, &*disk, Op::Read, 7, zeroed(&[512])).err(), Some(BlockError::Io));
    assert!(transfer(machine, &*disk, Op::Read, 8, zeroed(&[512])).is_ok());
    assert_eq!(kernel.counter("disk0.errors").get(), 1);
    drop(disk);
    shut_down(machine, &kernel);
}

#[test]
fn a_flush_without_a_cache_is_done_by_poll() {
    let mut model = BlkModel::new(image());
    model.features &= !(1 << 9);
    let (machine, handle, kernel, disk) = on_mmio(model, MmioOptions::default());
    assert!(!disk.info().needs_flush);
    transfer(machine, &*disk, Op::Flush, 0, Vec::new()).unwrap();
    handle.with(|model| assert_eq!(model.flushes, 0));
    drop(disk);
    shut_down(machine, &kernel);
}

#[test]
fn uses_a_queue_for_each_cpu_and_vector() {
    for (msix, queues) in [(4, 2), (1, 1), (0, 1)] {
        let mut model = BlkModel::new(image());
        model.queues = 4;
        let (machine, handle, kernel, disk) = on_pci(model, PciOptions { msix, ..PciOptions::default() });
        assert_eq!(machine.attached_interrupts(), queues);
        assert_eq!(disk.info().queue_depth, queues * 64);
        transfer(machine, &*disk, Op::Read, 0, zeroed(&[512])).unwrap();
        assert_eq!(handle.complaints(), Vec::<String>::new());
        drop(disk);
        shut_down(machine, &kernel);
    }
}

#[test]
fn polls_when_the_interrupt_line_is_taken() {
    let machine = TestMachine::new();
    machine.add_mmio(BlkModel::new(image()), MmioOptions::default());
    let mut line = 0;
    machine.mmio_devices(&mut |device| line = device.line);
    let taken = machine.irq_attach(IrqSource::Line(line), CpuId(0), Arc::new(Signal::new())).unwrap();
    let kernel = kernel(machine);
    let disk = kernel.block_devices()[0].clone();
    let got = transfer(machine, &*disk, Op::Read, 1, zeroed(&[512])).unwrap();
    assert_eq!(got.concat(), image()[512..1024]);
    drop(disk);
    machine.irq_detach(taken);
    shut_down(machine, &kernel);
}

#[test]
fn serves_requests_after_its_thread_has_ended() {
    let (machine, handle, kernel, disk) = on_mmio(BlkModel::new(image()), MmioOptions::default());
    kernel.shutdown();
    // The kernel is down, a file system still writes back: nobody waits for interrupts now.
    handle.hold();
    let waiter = {
        let disk = disk.clone();
        std::thread::spawn(move || {
            transfer(machine, &*disk, Op::Write, 0, vec![vec![9; 512].into_boxed_slice()]).is_ok()
        })
    };
    std::thread::sleep(core::time::Duration::from_millis(20));
    handle.release();
    assert!(waiter.join().unwrap());
    handle.with(|model| assert_eq!(model.image[..512], [9; 512]));
    drop(disk);
    shut_down(machine, &kernel);
}

#[test]
fn a_silent_device_is_given_up_and_its_requests_completed() {
    let machine = TestMachine::with_virtual_time();
    let handle = machine.add_mmio(BlkModel::new(image()), MmioOptions::default());
    let kernel = kernel(machine);
    let disk = kernel.block_devices()[0].clone();
    handle.set_hostility(Hostility::NeverCompletes);
    let done = Arc::new(Collect::default());
    disk.submit(request(Op::Read, 0, zeroed(&[512]), &done, 5)).ok().unwrap();
    let start = std::time::Instant::now();
    while done.0.lock().unwrap().is_empty() {
        assert!(start.elapsed().as_secs() < 20, "never given up");
        machine.host().advance(1_000_000_000);
        std::thread::sleep(core::time::Duration::from_millis(2));
    }
    let (tag, result, buffers) = done.0.lock().unwrap().pop().unwrap();
    assert_eq!((tag, result, buffers.len()), (5, Err(BlockError::Gone), 1));
    assert_eq!(kernel.counter("disk0.timeouts").get(), 1);
    let after = transfer(machine, &*disk, Op::Read, 0, zeroed(&[512]));
    assert_eq!(after.err(), Some(BlockError::Gone));
    drop(disk);
    shut_down(machine, &kernel);
}

#[test]
fn hands_buffers_back_when_they_cannot_be_mapped() {
    let (machine, _handle, kernel, disk) = on_mmio(BlkModel::new(image()), MmioOptions::default());
    let done = Arc::new(Collect::default());
    machine.arena().fail_after(1);
    let refused = disk.submit(request(Op::Read, 0, zeroed(&[512, 1024, 2048]), &done, 0)).err().unwrap();
    assert_eq!(refused.reason, Some(BlockError::NoMemory));
    let lens: Vec<_> = refused.request.buffers.iter().map(|buffer| buffer.len()).collect();
    assert_eq!(lens, [512, 1024, 2048]);
    machine.arena().fail_after(usize::MAX);
    transfer(machine, &*disk, Op::Read, 0, zeroed(&[512])).unwrap();
    drop(disk);
    shut_down(machine, &kernel);
}

#[test]
fn fits_a_machine_of_8_mib() {
    let machine = TestMachine::new();
    machine.set_memory_bytes(8 << 20);
    machine.add_mmio(BlkModel::new(image()), MmioOptions::default());
    let kernel = kernel(machine);
    assert!(machine.arena().bytes_in_use() < 64 << 10, "{}", machine.arena().bytes_in_use());
    shut_down(machine, &kernel);
}
