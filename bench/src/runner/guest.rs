//! A guest under measurement: the machine that users run, ended when dropped.

use super::Result;
use anykernel_userspace::qemu::Machine;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running QEMU.
pub struct Guest {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Guest {
    /// Starts QEMU, with a serial console that [`Guest::line`] reads.
    pub fn start(machine: &Machine) -> Result<Self> {
        let mut command = machine.command();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(|error| format!("qemu-system-x86_64: {error}"))?;
        let output = child.stdout.take().ok_or("no console")?;
        let (send, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(std::result::Result::ok) {
                if send.send(String::from_utf8_lossy(&line).trim().to_string()).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines })
    }

    /// The next line of the console that `wanted` takes, within `limit`; `None` if it does not come.
    pub fn line<T>(&self, limit: Duration, wanted: impl Fn(&str) -> Option<T>) -> Option<T> {
        let end = Instant::now() + limit;
        loop {
            let line = self.lines.recv_timeout(end.saturating_duration_since(Instant::now())).ok()?;
            if let Some(found) = wanted(&line) {
                return Some(found);
            }
        }
    }

    /// Whether the guest ended by itself.
    pub fn ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

/// A loopback port that nothing listens on now.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|error| error.to_string())?;
    listener.local_addr().map(|addr| addr.port()).map_err(|error| error.to_string())
}

/// Whether a GET of `path` at the port answers within `limit` with a body of `bytes` bytes.
pub fn answers(guest: &mut Guest, port: u16, path: &str, bytes: u64, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    let url = format!("http://127.0.0.1:{port}/{path}");
    while Instant::now() < end && !guest.ended() {
        let output = Command::new("curl")
            .args(["-s", "-o", "/dev/null", "--max-time", "5", "-w", "%{http_code} %{size_download}", &url])
            .output();
        if output.is_ok_and(|output| output.stdout == format!("200 {bytes}").into_bytes()) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    false
}
