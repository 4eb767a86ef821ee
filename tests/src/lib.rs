//! End-to-end tests, and what they share: the command that users run, and processes that end with a test.

pub mod module;
pub mod plugged;
pub mod usb_capture;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The command that users run, built as they build it, unless the environment variable `ANYKERNEL` names one.
pub fn anykernel() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(path) = std::env::var_os("ANYKERNEL") {
            return path.into();
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace");
        let built = Command::new(env!("CARGO"))
            .current_dir(root)
            .args(["build", "--quiet", "--package", "anykernel-userspace", "--bin", "anykernel"])
            .status();
        assert!(built.expect("cargo runs").success());
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        target.join("debug/anykernel")
    })
}

/// A loopback port that nothing listens on now.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("the loopback interface");
    listener.local_addr().expect("an address").port()
}

/// A file from the server at a loopback port; an error is a line.
pub fn fetch(port: u16, path: &str) -> Result<Vec<u8>, String> {
    let fetch = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = fetch().map_err(|error| error.to_string())?;
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").ok_or("no answer")?;
    if !answer.starts_with(b"HTTP/1.1 200 ") {
        return Err(String::from_utf8_lossy(&answer[..end]).into_owned());
    }
    Ok(answer[end + 4..].to_vec())
}

/// A child that is killed when dropped.
#[derive(Debug)]
pub struct Running(pub Child);

impl Running {
    /// Starts it, with its standard output piped.
    pub fn start(command: &mut Command) -> (Self, BufReader<ChildStdout>) {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the command starts");
        let stdout = child.stdout.take().expect("standard output was piped");
        (Self(child), BufReader::new(stdout))
    }

    /// Ctrl-C.
    pub fn interrupt(&self) {
        let kill = Command::new("kill").args(["-INT", &self.0.id().to_string()]).status();
        assert!(kill.expect("kill(1)").success());
    }

    /// Waits for its end, at most for `patience`.
    pub fn end(&mut self, patience: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().expect("a child of ours") {
                return status;
            }
            assert!(start.elapsed() < patience, "it has not ended after {patience:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads lines up to one that `wanted` takes. Panics with what came if it does not.
pub fn line<T>(from: &mut impl BufRead, wanted: impl Fn(&str) -> Option<T>) -> T {
    let mut all = String::new();
    loop {
        let mut line = String::new();
        if from.read_line(&mut line).expect("text") == 0 {
            panic!("it ended, and had said:\n{all}");
        }
        if let Some(found) = wanted(&line) {
            return found;
        }
        all.push_str(&line);
    }
}
