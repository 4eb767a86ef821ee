//! The virtio-net driver.

use super::device::{Shared, plug};
use crate::host::FuzzHost;
use crate::input::Input;
use crate::watch;
use anykernel::Kernel;
use anykernel::config::Config;
use anykernel::nic::{ChecksumAt, NicQueue, Segment, TxMeta};
use hypercall::Signal;
use std::sync::{Arc, Mutex, PoisonError};

struct Story {
    input: Input,
    shared: Arc<Mutex<Shared>>,
    received: usize,
}

impl Story {
    fn operation(&mut self, host: FuzzHost, queue: &mut dyn NicQueue, most: usize) {
        watch::step();
        match self.input.u8() & 7 {
            0 | 1 => {
                let len = self.input.u16() % 1600;
                let fill = self.input.u8();
                let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
                shared.frames.push_back(vec![fill; usize::from(len)]);
            }
            2 | 3 => {
                let got = queue.receive(16, &mut |frame, _| {
                    assert!(frame.len() <= most, "a frame of {} bytes", frame.len());
                    let honest = !self.shared.lock().unwrap_or_else(PoisonError::into_inner).lied;
                    if honest && let Some(first) = frame.first() {
                        let other = frame.iter().position(|byte| byte != first);
                        assert_eq!(other, None, "a frame of {} bytes has another's", frame.len());
                    }
                    self.received += 1;
                });
                assert!(got <= 16, "{got} frames, only 16 were asked for");
            }
            4 => {
                let choice = self.input.u8();
                let len = 14 + usize::from(self.input.u16()) % 1500;
                let mut meta = TxMeta::default();
                if choice & 1 != 0 {
                    meta.checksum = Some(ChecksumAt { start: 34, field: 16 });
                }
                if choice & 2 != 0 && len > 100 {
                    meta.segment = Some(Segment { mss: 536, header_len: 54, ipv6: false });
                }
                let _ = queue.transmit(len, meta, &mut |out| {
                    assert_eq!(out.len(), len);
                    out.fill(0x5a);
                });
            }
            5 => queue.flush(),
            6 => {
                queue.arm();
            }
            _ => {
                host.tick();
                host.advance(1_000_000_000);
                queue.link_up();
            }
        }
    }
}

/// One execution.
pub fn run(data: &[u8]) {
    let host = FuzzHost::fresh();
    let mut input = Input::new(data);
    let how = input.u8();
    let operations = input.split();
    let offloads = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;
    let features = offloads | 1 << 3 | 1 << 5 | 1 << 16 | if how & 1 != 0 { 1 << 15 } else { 0 };
    let mut config = vec![2, 0, 0, 0, 0, 9, 1, 0, 1, 0];
    config.extend(1500u16.to_le_bytes());
    let shared = Arc::new(Mutex::new(Shared::default()));
    plug(host, how & 0x10 != 0, input, shared.clone(), 1, features, config);
    let kernel = Kernel::new(host, Config::default());
    anykernel_virtio::probe(&kernel).expect("the host has every contract");
    let mut story = Story { input: operations, shared, received: 0 };
    if let Some(nic) = kernel.nics().first() {
        let most = usize::from(nic.info().mtu).max(65_550) + 18;
        assert!(nic.info().mtu >= 576, "an MTU of {}", nic.info().mtu);
        if let Ok(mut queue) = nic.open_queue(0, Arc::new(Signal::new())) {
            while !story.input.is_empty() {
                story.operation(host, &mut *queue, most);
            }
        }
    }
    kernel.stop();
    host.run_rest();
    kernel.shutdown();
}
