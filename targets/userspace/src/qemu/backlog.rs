//! QEMU's user network listens with a backlog of 1, so a burst of clients meets timeouts of seconds. It cannot be told
//! otherwise, but who has a socket may listen on it again with another backlog, and a child's sockets can be had
//! (pidfd_getfd(2)).

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::fs;
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const BACKLOG: i32 = 4096;

/// How long QEMU may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until the child listens on `addresses`, and gives each the larger backlog. Without success all works as before.
pub(super) fn widen(child: u32, addresses: &[SocketAddrV4], ended: &AtomicBool) {
    let deadline = Instant::now() + PATIENCE;
    for address in addresses {
        while !ended.load(Ordering::Acquire) && Instant::now() < deadline {
            match socket(child, *address) {
                Some(fd) => {
                    if let Err(error) = listen_again(child, fd) {
                        log::debug!("the backlog of {address} stays 1: {error}");
                    }
                    break;
                }
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

fn listen_again(child: u32, fd: i32) -> rustix::io::Result<()> {
    let pid = Pid::from_raw(child.cast_signed()).ok_or(rustix::io::Errno::SRCH)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let socket = pidfd_getfd(&process, fd, PidfdGetfdFlags::empty())?;
    rustix::net::listen(&socket, BACKLOG)
}

/// The child's descriptor that listens on `address` (proc(5): `/proc/net/tcp`, `/proc/PID/fd`).
fn socket(child: u32, address: SocketAddrV4) -> Option<i32> {
    const LISTEN: &str = "0A";
    let ip = u32::from_ne_bytes(address.ip().octets());
    let local = format!("{ip:08X}:{:04X}", address.port());
    let table = fs::read_to_string("/proc/net/tcp").ok()?;
    let inode = table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        (fields.get(1)? == &local && fields.get(3)? == &LISTEN).then(|| fields.get(9).copied()).flatten()
    })?;
    let target = format!("socket:[{inode}]");
    fs::read_dir(format!("/proc/{child}/fd")).ok()?.flatten().find_map(|entry| {
        let is_it = fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == target.as_str());
        is_it.then(|| entry.file_name().to_str()?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_narrow_listener_takes_a_burst_afterwards() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let Ok(SocketAddr::V4(address)) = listener.local_addr() else { panic!("an IPv4 address") };
        assert_eq!(socket(std::process::id(), address), Some(listener.as_raw_fd()));
        widen(std::process::id(), &[address], &AtomicBool::new(false));
        // Nobody accepts: with a backlog of 1 the fourth would wait for a second at least.
        let start = Instant::now();
        let clients: Vec<TcpStream> = (0..64).map(|_| TcpStream::connect(address).unwrap()).collect();
        assert!(start.elapsed() < Duration::from_millis(900), "{:?}", start.elapsed());
        drop(clients);
    }
}
