//! A TAP interface of the host (Linux `Documentation/networking/tuntap.rst`).
//!
//! Frames are read and written directly by who asks, without a copy in between. One thread per open TAP waits (epoll(7), edge-triggered)
//! and raises the signal; the kernel's own queue is the bounded ring.
#![expect(unsafe_code, reason = "one ioctl that rustix does not have")]

use super::{HEADER, Listener, random_mac};
use crate::Failure;
use crate::host::Recover;
use hypercall::{Error, LinkInfo, Result};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// `_IOW('T', 202, int)`: the size in it is an int's, whatever the kernel reads.
const TUNSETIFF: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<i32>(b'T', 202);
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;

const STOP: u64 = 0;
const FRAMES: u64 = 1;

/// An attached TAP interface.
#[derive(Debug)]
pub struct Tap {
    device: OwnedFd,
    info: LinkInfo,
    watcher: Mutex<Option<Watcher>>,
}

#[derive(Debug)]
struct Watcher {
    stop: OwnedFd,
    thread: std::thread::JoinHandle<()>,
}

impl Tap {
    /// Attaches to the interface `name`, which is made if it does not exist and we may. Failures are lines for a person.
    pub fn open_interface(name: &str) -> Result<Self, Failure> {
        if name.is_empty() || name.len() > 15 || name.contains(['/', '\0', '%', ' ']) {
            return Err(Failure::usage(format!(
                "{name:?} is not a name of an interface: write one as in tap:tap0"
            )));
        }
        let device = rustix::fs::open(
            "/dev/net/tun",
            OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
        )
        .map_err(|error| {
            Failure::new(format!("/dev/net/tun: {error}: TAP interfaces need it; use --net user"))
        })?;
        let mut request = InterfaceRequest { name: [0; 16], flags: IFF_TAP | IFF_NO_PI, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is.
        let attached = unsafe {
            rustix::ioctl::ioctl(
                &device,
                rustix::ioctl::Updater::<TUNSETIFF, InterfaceRequest>::new(&mut request),
            )
        };
        attached.map_err(|error| match error {
            Errno::PERM => Failure::new(format!(
                "no permission to use TAP interface {name}: make it with `sudo ip tuntap add {name} mode tap user $USER`, \
                 or use --net user"
            )),
            Errno::BUSY => Failure::new(format!("TAP interface {name} is in use by another process: end that first")),
            Errno::INVAL => Failure::new(format!("interface {name} exists and is not a TAP: choose another name")),
            error => Failure::new(format!("TAP interface {name}: {error}")),
        })?;
        let mtu = std::fs::read_to_string(format!("/sys/class/net/{name}/mtu"))
            .ok()
            .and_then(|text| text.trim().parse::<u16>().ok())
            .filter(|mtu| *mtu >= 576)
            .unwrap_or(1500);
        let info = LinkInfo { mac: random_mac(), mtu };
        Ok(Self { device, info, watcher: Mutex::default() })
    }

    pub(super) fn info(&self) -> LinkInfo {
        self.info
    }

    pub(super) fn open(&self, listener: Listener) -> Result<()> {
        let watch = || -> rustix::io::Result<Watcher> {
            let stop = eventfd(0, EventfdFlags::CLOEXEC)?;
            let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let edges = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
            epoll::add(&poll, &self.device, epoll::EventData::new_u64(FRAMES), edges)?;
            epoll::add(&poll, &stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)?;
            let thread = std::thread::Builder::new()
                .name("tap".into())
                .spawn(move || watch(&poll, &listener))
                .map_err(|_| Errno::AGAIN)?;
            Ok(Watcher { stop, thread })
        };
        *self.watcher.lock().recover() = Some(watch().map_err(|_| Error::NoMemory)?);
        Ok(())
    }

    pub(super) fn send(&self, frame: &[u8]) -> Result<()> {
        match rustix::io::write(&self.device, frame) {
            Ok(_) => Ok(()),
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => Err(Error::WouldBlock),
            // The interface is down: as on a cable that is not plugged in, the frame is lost.
            Err(Errno::IO) => Ok(()),
            Err(Errno::INVAL) => Err(Error::Invalid),
            Err(_) => Err(Error::Gone),
        }
    }

    pub(super) fn receive(&self, buf: &mut [u8]) -> Result<usize> {
        let most = HEADER + usize::from(self.info.mtu);
        let result = if buf.len() >= most {
            rustix::io::read(&self.device, &mut *buf)
        } else {
            // The kernel would cut the frame off in silence.
            let mut whole = vec![0; most];
            rustix::io::read(&self.device, &mut whole[..]).inspect(|len| {
                if let (Some(to), Some(from)) = (buf.get_mut(..*len), whole.get(..*len)) {
                    to.copy_from_slice(from);
                }
            })
        };
        match result {
            Ok(len) if len > buf.len() => Err(Error::BufferTooSmall),
            Ok(len) => Ok(len),
            Err(Errno::AGAIN | Errno::INTR) => Err(Error::WouldBlock),
            Err(_) => Err(Error::Gone),
        }
    }

    pub(super) fn close(&self) {
        if let Some(watcher) = self.watcher.lock().recover().take() {
            // Cannot fail: the counter is far from full.
            let _ = rustix::io::write(&watcher.stop, &1u64.to_ne_bytes());
            let _ = watcher.thread.join();
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.close();
    }
}

fn watch(poll: &OwnedFd, listener: &Listener) {
    let mut events = Vec::with_capacity(4);
    loop {
        events.clear();
        match epoll::wait(poll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(_) => return,
        }
        if events.iter().any(|event| event.data.u64() == STOP) {
            return;
        }
        if !events.is_empty() {
            listener.raise();
        }
    }
}
