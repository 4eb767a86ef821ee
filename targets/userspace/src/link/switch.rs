//! A switch in memory for any number of instances. It learns addresses as a hardware switch does.

use super::wire::{Delivery, Inbox};
use super::{Listener, random_mac};
use crate::host::Recover;
use hypercall::{LinkInfo, Result};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, RwLock};

/// Most addresses that are remembered; a host that invents more gets its frames flooded.
const MOST_ADDRESSES: usize = 4096;

type Mac = [u8; 6];

#[derive(Debug, Default)]
struct Fabric {
    ports: RwLock<HashMap<u64, Arc<Inbox>>>,
    addresses: Mutex<HashMap<Mac, u64>>,
    mtu: u16,
}

/// A switch. It lives as long as one of its ports does.
#[derive(Debug)]
pub struct Switch(Arc<Fabric>, std::sync::atomic::AtomicU64);

/// A port of a [`Switch`].
#[derive(Debug)]
pub struct Port {
    fabric: Arc<Fabric>,
    number: u64,
    inbox: Arc<Inbox>,
    mac: Mac,
}

impl Switch {
    /// A switch without ports. `mtu` in bytes.
    pub fn new(mtu: u16) -> Self {
        Self(Arc::new(Fabric { mtu, ..Fabric::default() }), Default::default())
    }

    /// One more port.
    pub fn port(&self) -> Port {
        let number = self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let inbox = Arc::<Inbox>::default();
        self.0.ports.write().recover().insert(number, inbox.clone());
        Port { fabric: self.0.clone(), number, inbox, mac: random_mac() }
    }
}

fn mac_at(frame: &[u8], at: usize) -> Mac {
    let mut mac = [0; 6];
    if let Some(bytes) = frame.get(at..at + 6) {
        mac.copy_from_slice(bytes);
    }
    mac
}

impl Port {
    pub(super) fn info(&self) -> LinkInfo {
        LinkInfo { mac: self.mac, mtu: self.fabric.mtu }
    }

    pub(super) fn open(&self, listener: Listener) {
        self.inbox.open(listener);
    }

    /// As on a real switch, a frame for a port whose queue is full is lost.
    pub(super) fn send(&self, frame: &[u8]) -> Result<()> {
        let (to, from) = (mac_at(frame, 0), mac_at(frame, 6));
        let known = {
            let mut addresses = self.fabric.addresses.lock().recover();
            if addresses.len() < MOST_ADDRESSES || addresses.contains_key(&from) {
                addresses.insert(from, self.number);
            }
            addresses.get(&to).copied()
        };
        let ports = self.fabric.ports.read().recover();
        match known.and_then(|number| ports.get(&number).map(|inbox| (number, inbox))) {
            Some((number, _)) if number == self.number => {}
            Some((_, inbox)) => {
                let (Delivery::Done | Delivery::Full) = inbox.put(frame);
            }
            None => {
                for (_, inbox) in ports.iter().filter(|(number, _)| **number != self.number) {
                    let (Delivery::Done | Delivery::Full) = inbox.put(frame);
                }
            }
        }
        Ok(())
    }

    pub(super) fn receive(&self, buf: &mut [u8]) -> Result<usize> {
        self.inbox.take(buf).0
    }

    pub(super) fn close(&self) {
        self.inbox.close();
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.fabric.ports.write().recover().remove(&self.number);
        self.fabric.addresses.lock().recover().retain(|_, number| *number != self.number);
    }
}
