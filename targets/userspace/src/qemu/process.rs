//! A child process that ends with us.

use crate::interrupt;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus};
use std::time::{Duration, Instant};

/// How often a wait looks whether Ctrl-C was pressed.
const STEP: Duration = Duration::from_millis(100);

/// How long it may take to end after SIGTERM.
const TERMINATION: Duration = Duration::from_secs(2);

/// How a process ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, or because it was asked to.
    Ended(ExitStatus),
    /// It was killed when the deadline came.
    Late,
    /// It was ended because it did not end in time after Ctrl-C.
    Deaf,
}

/// A child that ends with us: on drop, after Ctrl-C while it is waited for, and by the kernel should we be killed.
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts it. Call it on a thread that outlives it: it dies with the thread that started it.
    pub fn start(mut command: Command) -> std::io::Result<Self> {
        die_with_parent(&mut command);
        Ok(Self { child: command.spawn()? })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The pipes that were asked for, once.
    pub fn pipes(&mut self) -> (Option<ChildStdin>, Option<ChildStdout>, Option<ChildStderr>) {
        (self.child.stdin.take(), self.child.stdout.take(), self.child.stderr.take())
    }

    /// Waits for its end, until `deadline` if there is one. After Ctrl-C it calls `ask` a few times a second, which asks the
    /// process to end; after `grace` it ends it.
    pub fn wait(
        &mut self,
        deadline: Option<Instant>,
        grace: Duration,
        mut ask: impl FnMut(),
    ) -> std::io::Result<End> {
        let pidfd = Pid::from_raw(self.child.id().cast_signed())
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
        let mut asked: Option<Instant> = None;
        let mut deaf = false;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(if deaf { End::Deaf } else { End::Ended(status) });
            }
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                self.kill()?;
                return Ok(End::Late);
            }
            if interrupt::interrupted() {
                let late = now - *asked.get_or_insert(now);
                if late >= grace + TERMINATION {
                    self.kill()?;
                    return Ok(End::Deaf);
                }
                if late >= grace {
                    deaf = true;
                    terminate(self.child.id());
                } else {
                    ask();
                }
            }
            let step = deadline.map_or(STEP, |deadline| STEP.min(deadline - now));
            match &pidfd {
                Some(pidfd) => {
                    let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(step.subsec_nanos()) };
                    // Ctrl-C may interrupt it, which is what it waits for.
                    let _ = rustix::event::poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout));
                }
                None => std::thread::sleep(step),
            }
        }
    }

    fn kill(&mut self) -> std::io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks a child of ours to end. It must not have been waited for yet, else the number may be somebody else's.
pub(super) fn terminate(pid: u32) {
    if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
        // Fails only if it has ended already.
        let _ = rustix::process::kill_process(pid, Signal::TERM);
    }
}

/// The kernel ends the child when the thread that starts it ends, however that comes about; and the terminal's Ctrl-C
/// reaches only us, who then end it.
#[expect(unsafe_code, reason = "runs between fork and exec")]
pub(crate) fn die_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    // SAFETY: the closure makes one system call and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::TERM)).map_err(Into::into)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn a_process_ends_when_dropped_or_late() {
        let mut sleep = Command::new("sleep");
        sleep.arg("1000");
        let mut process = Process::start(sleep).unwrap();
        let pid = process.id();
        let soon = Instant::now() + Duration::from_millis(20);
        let end = process.wait(Some(soon), Duration::ZERO, || panic!("nobody pressed Ctrl-C")).unwrap();
        assert_eq!(end, End::Late);
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn an_end_is_seen_at_once() {
        let start = Instant::now();
        let mut process = Process::start(Command::new("true")).unwrap();
        let end = process.wait(None, Duration::ZERO, || ()).unwrap();
        assert!(matches!(end, End::Ended(status) if status.success()));
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
