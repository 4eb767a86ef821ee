//! End-to-end tests, and what they share: the command that users run, and processes that end with a test.

pub mod module;
pub mod usb_capture;

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
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
