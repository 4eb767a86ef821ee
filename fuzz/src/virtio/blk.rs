//! The virtio-blk driver. Whatever the device does, every request comes back exactly once with its own buffers; while the
//! device has not lied, with the right content.

use super::device::{Shared, plug, sector_byte};
use crate::host::{FuzzHost, Script};
use crate::input::Input;
use crate::watch;
use anykernel::Kernel;
use anykernel::block::{BlockDevice, BlockError, Complete, Op, Request};
use anykernel::config::Config;
use std::sync::{Arc, Mutex, PoisonError};

/// What became of the requests: by tag, how often it came back.
#[derive(Default)]
struct Ledger {
    shared: Arc<Mutex<Shared>>,
    state: Mutex<Vec<(Vec<usize>, Option<Result<(), BlockError>>)>>,
}

impl Complete for Ledger {
    fn complete(&self, request: Request, result: Result<(), BlockError>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (lens, outcome) = &mut state[request.tag as usize];
        assert!(outcome.is_none(), "request {} came back twice", request.tag);
        *outcome = Some(result);
        // Lost with a device that cannot be reset, else as they were given.
        let came: Vec<usize> = request.buffers.iter().map(|buffer| buffer.len()).collect();
        assert!(
            came == *lens || result == Err(BlockError::Gone) && came.is_empty(),
            "buffers {came:?} for {lens:?}"
        );
        let honest = !self.shared.lock().unwrap_or_else(PoisonError::into_inner).lied;
        if honest && result.is_ok() && request.op == Op::Read {
            let mut at = 0;
            for byte in request.buffers.iter().flatten() {
                let sector = request.sector + at as u64 / 512;
                assert_eq!(*byte, sector_byte(sector, at % 512), "sector {sector}");
                at += 1;
            }
        }
    }
}

struct Story {
    input: Input,
    kernel: Arc<Kernel<FuzzHost>>,
    ledger: Arc<Ledger>,
    idle: u8,
}

impl Story {
    fn operation(&mut self, host: FuzzHost) {
        let choice = self.input.u8();
        let Some(disk) = self.kernel.block_devices().first().cloned() else { return };
        match choice & 7 {
            0..5 => self.submit(&*disk, choice),
            5 => disk.poll(),
            6 => host.advance(crate::net::pause(choice >> 3)),
            _ => host.tick(),
        }
    }

    fn submit(&mut self, disk: &dyn BlockDevice, choice: u8) {
        let op = match choice & 7 {
            0..3 => Op::Read,
            3 => Op::Write,
            _ => Op::Flush,
        };
        let mut buffers = Vec::new();
        if op != Op::Flush {
            for _ in 0..1 + (choice >> 3 & 3) {
                let sectors = 1 + usize::from(self.input.u8() & 15);
                buffers.push(vec![0xa5u8; 512 * sectors].into_boxed_slice());
            }
        }
        let mut state = self.ledger.state.lock().unwrap_or_else(PoisonError::into_inner);
        let tag = state.len();
        state.push((buffers.iter().map(|buffer| buffer.len()).collect(), None));
        drop(state);
        let sector = if choice & 0x80 != 0 { self.input.u64() } else { self.input.u8().into() };
        let request = Request { op, sector, buffers, done: self.ledger.clone(), tag: tag as u64 };
        if let Err(rejected) = disk.submit(request) {
            let mut state = self.ledger.state.lock().unwrap_or_else(PoisonError::into_inner);
            let came: Vec<usize> = rejected.request.buffers.iter().map(|buffer| buffer.len()).collect();
            assert_eq!(came, state[tag].0, "a rejected request has its buffers");
            state[tag].1 = Some(Err(rejected.reason.unwrap_or(BlockError::Invalid)));
        }
    }
}

impl Script for Story {
    fn step(&mut self, host: FuzzHost) -> bool {
        watch::step();
        if !self.input.is_empty() {
            self.operation(host);
        } else if self.idle < 8 {
            // Time for a late device to be given up.
            self.idle += 1;
            host.advance(6_000_000_000);
        } else {
            self.kernel.stop();
            return false;
        }
        host.tick();
        true
    }
}

/// One execution.
pub fn run(data: &[u8]) {
    execute(data);
}

/// One execution; how many requests were done well.
fn execute(data: &[u8]) -> usize {
    let host = FuzzHost::fresh();
    let mut input = Input::new(data);
    let how = input.u8();
    let operations = input.split();
    let mut config = vec![0; 60];
    config[..8].copy_from_slice(&256u64.to_le_bytes());
    config[8..12].copy_from_slice(&(if how & 4 != 0 { 4096u32 } else { 65_536 }).to_le_bytes());
    config[12..16].copy_from_slice(&62u32.to_le_bytes());
    config[20..24].copy_from_slice(&512u32.to_le_bytes());
    config[34] = 1;
    let features = 1 << 2 | 1 << 6 | 1 << 9 | if how & 4 != 0 { 1 << 1 } else { 0 };
    let shared = Arc::new(Mutex::new(Shared::default()));
    plug(host, how & 0x10 != 0, input, shared.clone(), 2, features, config);
    let kernel = Kernel::new(host, Config::default());
    if how & 1 != 0 {
        host.refuse_threads();
    }
    anykernel_virtio::probe(&kernel).expect("the host has every contract");
    let ledger = Arc::new(Ledger { shared, state: Mutex::default() });
    let mut story = Story { input: operations, kernel: kernel.clone(), ledger: ledger.clone(), idle: 0 };
    if how & 1 != 0 || kernel.block_devices().is_empty() {
        while story.step(host) {}
        // Without a thread whoever asks waits himself.
        for disk in kernel.block_devices() {
            disk.poll();
        }
    } else {
        host.run_thread(story);
    }
    kernel.shutdown();
    let state = ledger.state.lock().unwrap_or_else(PoisonError::into_inner);
    for (tag, (_, outcome)) in state.iter().enumerate() {
        assert!(outcome.is_some(), "request {tag} never came back");
    }
    state.iter().filter(|(_, outcome)| *outcome == Some(Ok(()))).count()
}

#[cfg(test)]
mod tests {
    /// Two reads and a flush, by a device that does not lie: on virtio-mmio of both versions, on PCI with its line and
    /// with vectors.
    #[test]
    fn an_honest_device_serves() {
        let requests = [0, 0, 1, 0, 7, 0, 4, 7];
        for (how, device) in
            [(0, &[0u8, 0][..]), (0, &[1, 0]), (0x10, &[0, 0, 0]), (0x10, &[0x10, 0, 0]), (0x11, &[0, 0, 0])]
        {
            let story = [&[how, requests.len() as u8, 0], &requests[..], device].concat();
            assert_eq!(super::execute(&story), 3, "{how:#x} {device:?}");
        }
    }
}
