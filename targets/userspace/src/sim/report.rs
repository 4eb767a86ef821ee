//! What a run says about itself.

use hypercall::ExitStatus;
use std::fmt;

/// Where a thread is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadReport {
    /// Name of its node.
    pub node: String,
    /// Its name.
    pub name: String,
    /// What it does, in words.
    pub state: String,
}

impl fmt::Display for ThreadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}: {}", self.node, self.name, self.state)
    }
}

/// A thread that panicked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Panicked {
    /// Name of its node.
    pub node: String,
    /// Its name.
    pub thread: String,
    /// What it said.
    pub message: String,
    /// When, in virtual time.
    pub at_ns: u64,
}

impl fmt::Display for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} panicked at {} ns: {}", self.node, self.thread, self.at_ns, self.message)
    }
}

/// Why a run ended before its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Nobody can run and nothing is to come.
    #[error("deadlock at {at_ns} ns: nobody can run and no timer is set\n{}", lines(threads))]
    Deadlock {
        /// When.
        at_ns: u64,
        /// Every thread that is left.
        threads: Vec<ThreadReport>,
    },
    /// [`super::SimConfig::time_limit_ns`].
    #[error("the time limit of {at_ns} ns is reached\n{}", lines(threads))]
    TimeLimit {
        /// When.
        at_ns: u64,
        /// Every thread that is left.
        threads: Vec<ThreadReport>,
    },
    /// [`super::SimConfig::step_limit`].
    #[error("the limit of {steps} hypercalls is reached at {at_ns} ns\n{}", lines(threads))]
    StepLimit {
        /// How many.
        steps: u64,
        /// When.
        at_ns: u64,
        /// Every thread that is left.
        threads: Vec<ThreadReport>,
    },
    /// The thread that was waited for panicked.
    #[error("{0}")]
    Panic(Panicked),
    /// The node that was waited for has ended itself.
    #[error("the node has exited with {0:?}")]
    Exited(ExitStatus),
    /// The node that was waited for was crashed.
    #[error("the node is down")]
    Down,
}

fn lines(threads: &[ThreadReport]) -> String {
    threads.iter().map(|thread| format!("  {thread}")).collect::<Vec<_>>().join("\n")
}

/// What a node has not given back. All zero after an orderly end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leaks {
    /// Pages.
    pub pages: u64,
    /// Blocks of device memory.
    pub dma_blocks: u64,
    /// Mapped buffers.
    pub dma_maps: u64,
    /// Attached interrupts.
    pub irqs: u64,
    /// Open links.
    pub links: u64,
    /// Threads that run, or ended and were not joined.
    pub threads: u64,
    /// Threads whose stack was taken away because they would not unwind: what they held is lost.
    pub abandoned: u64,
}

impl Leaks {
    /// Whether there are any.
    pub fn any(&self) -> bool {
        *self != Self::default()
    }
}

impl fmt::Display for Leaks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            (self.pages, "pages"),
            (self.dma_blocks, "DMA blocks"),
            (self.dma_maps, "DMA mappings"),
            (self.irqs, "interrupts"),
            (self.links, "open links"),
            (self.threads, "threads"),
            (self.abandoned, "abandoned threads"),
        ];
        let some: Vec<_> =
            all.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        f.write_str(&if some.is_empty() { "none".to_string() } else { some.join(", ") })
    }
}
