//! Threads: coroutines of nodes, from their start to their end.

use super::engine::{OUTSIDE, World};
use super::fiber::Fiber;
use super::report::{Failure, Panicked, ThreadReport};
use crate::host::DomainExit;
use hypercall::{CpuId, Error, ExitStatus, ParkResult, Result, ThreadId, ThreadSpec};
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

/// How often a thread that is to unwind may block before its stack is taken away.
const MOST_DEAD_TURNS: u32 = 10_000;

/// What a thread that is to end is unwound with.
struct Killed;

/// How a thread ended.
pub(super) enum Ending {
    Returned,
    Killed,
    Exit(ExitStatus),
    Panic(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Ready,
    Running,
    Parked,
    Joining(u32),
    Sleeping,
    /// Of a node that is down: only its unwinding is left.
    Dying,
    Ended,
}

pub(super) struct Thread {
    pub(super) generation: u32,
    pub(super) node: u32,
    pub(super) cpu: u32,
    pub(super) name: String,
    pub(super) state: State,
    pub(super) since_ns: u64,
    pub(super) word: usize,
    pub(super) timer: Option<(u64, u64)>,
    pub(super) result: ParkResult,
    pub(super) joiner: Option<u32>,
    pub(super) fiber: Option<Fiber>,
    pub(super) entry: Option<Box<dyn FnOnce() + Send>>,
    pub(super) ending: Rc<Cell<Option<Ending>>>,
    pub(super) panicked: bool,
    pub(super) killed: bool,
    /// Unwinds, for whatever reason.
    pub(super) unwinding: bool,
    pub(super) dead_turns: u32,
}

impl World {
    pub(super) fn new_thread(
        &self,
        node: u32,
        cpu: u32,
        name: &str,
        entry: Option<Box<dyn FnOnce() + Send>>,
    ) -> u32 {
        let mut threads = self.threads.borrow_mut();
        let free = self.free_threads.borrow_mut().pop();
        let generation = free.map_or(1, |at| threads[at as usize].generation);
        let thread = Thread {
            generation,
            node,
            cpu,
            name: name.into(),
            state: State::Ready,
            since_ns: self.now.get(),
            word: 0,
            timer: None,
            result: ParkResult::Woken,
            joiner: None,
            fiber: None,
            entry,
            ending: Rc::default(),
            panicked: false,
            killed: false,
            unwinding: false,
            dead_turns: 0,
        };
        let at = match free {
            Some(at) => {
                threads[at as usize] = thread;
                at
            }
            None => {
                threads.push(thread);
                threads.len() as u32 - 1
            }
        };
        self.scheduler.borrow_mut().born(at);
        at
    }

    pub(super) fn spawn(
        &self,
        index: u32,
        spec: ThreadSpec<'_>,
        entry: Box<dyn FnOnce() + Send>,
    ) -> Result<ThreadId> {
        let node = self.node(index).ok_or(Error::Gone)?;
        let cpus = node.setup.cpus.max(1);
        let cpu = match spec.cpu {
            Some(CpuId(cpu)) if cpu >= cpus => return Err(Error::Invalid),
            Some(CpuId(cpu)) => cpu,
            None => {
                let next = node.next_cpu.get();
                node.next_cpu.set((next + 1) % cpus);
                next
            }
        };
        let at = self.new_thread(index, cpu, spec.name, Some(entry));
        node.threads.set(node.threads.get() + 1);
        self.scheduler.borrow_mut().add(at, false);
        let generation = self.threads.borrow()[at as usize].generation;
        Ok(ThreadId(u64::from(generation) << 32 | u64::from(at)))
    }

    /// The CPU that the caller runs on, 0 for one of another node.
    pub(super) fn cpu(&self, index: u32) -> u32 {
        let threads = self.threads.borrow();
        threads
            .get(self.current.get() as usize)
            .filter(|thread| thread.node == index)
            .map_or(0, |thread| thread.cpu)
    }

    pub(super) fn make_ready(&self, at: u32) {
        let timer = {
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[at as usize];
            thread.state = State::Ready;
            thread.timer.take()
        };
        self.forget_timer(timer);
        self.scheduler.borrow_mut().add(at, false);
    }

    pub(super) fn resume(&self, at: u32) {
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[at as usize];
        if thread.state != State::Dying {
            thread.state = State::Running;
        }
        let mut fiber = match thread.fiber.take() {
            Some(fiber) => fiber,
            None => {
                let entry = thread.entry.take().expect("a thread begins once");
                let ending = thread.ending.clone();
                Fiber::new(self.config.stack_bytes, move || {
                    ending.set(Some(match catch_unwind(AssertUnwindSafe(entry)) {
                        Ok(()) => Ending::Returned,
                        Err(payload) => classify(payload),
                    }));
                })
                .expect("memory for a stack")
            }
        };
        self.watched.runs(thread.node, at);
        drop(threads);
        self.current.set(at);
        self.slice_end_ns.set(self.now.get() + self.config.slice_ns);
        self.in_loop.set(false);
        let ended = fiber.resume();
        self.in_loop.set(true);
        if ended {
            fiber.recycle();
            self.ended(at);
        } else {
            self.threads.borrow_mut()[at as usize].fiber = Some(fiber);
        }
    }

    pub(super) fn ended(&self, at: u32) {
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[at as usize];
        let ending = thread.ending.take().unwrap_or(Ending::Killed);
        thread.state = State::Ended;
        thread.panicked = !matches!(ending, Ending::Returned);
        let (index, name, joiner, killed) = (thread.node, thread.name.clone(), thread.joiner, thread.killed);
        drop(threads);
        let Some(node) = self.node(index) else { return };
        if killed {
            // Nobody of its node will join it.
            node.threads.set(node.threads.get() - 1);
            if joiner.is_none() {
                self.free_thread(at);
            }
        }
        if let Some(joiner) = joiner {
            self.make_ready(joiner);
        }
        let status = match ending {
            Ending::Returned | Ending::Killed => return,
            Ending::Exit(status) => status,
            Ending::Panic(message) => {
                let at_ns = self.now.get();
                self.panics.borrow_mut().push(Panicked {
                    node: node.name.clone(),
                    thread: name,
                    message,
                    at_ns,
                });
                ExitStatus::Panic
            }
        };
        if node.exit.get().is_none() {
            node.exit.set(Some(status));
        }
        self.crash(index);
    }

    pub(super) fn free_thread(&self, at: u32) {
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[at as usize];
        thread.state = State::Free;
        thread.generation = thread.generation.wrapping_add(1).max(1);
        self.free_threads.borrow_mut().push(at);
    }

    /// Unwinds what is left of nodes that are down.
    pub(super) fn reap(&self) {
        loop {
            let Some(at) = self.dying.borrow_mut().pop_front() else { return };
            let mut threads = self.threads.borrow_mut();
            let thread = &mut threads[at as usize];
            thread.dead_turns += 1;
            if thread.dead_turns > MOST_DEAD_TURNS {
                let fiber = thread.fiber.take();
                let node = thread.node;
                thread.ending.set(Some(Ending::Killed));
                drop(threads);
                if let Some(fiber) = fiber {
                    fiber.recycle();
                }
                if let Some(node) = self.node(node) {
                    node.abandoned.set(node.abandoned.get() + 1);
                }
                self.ended(at);
                continue;
            }
            if thread.fiber.is_none() {
                let entry = thread.entry.take();
                thread.ending.set(Some(Ending::Killed));
                drop(threads);
                drop(entry);
                self.ended(at);
                continue;
            }
            drop(threads);
            self.resume(at);
        }
    }

    /// Whether the calling thread's node is down and it has not begun to unwind.
    pub(super) fn is_to_unwind(&self) -> bool {
        let current = self.current.get();
        if self.in_loop.get() || current == OUTSIDE {
            return false;
        }
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[current as usize];
        let now = thread.killed && !thread.unwinding;
        thread.unwinding |= now;
        now
    }

    /// The thread of that id, if it may be joined by the caller.
    pub(super) fn joinable(&self, index: u32, id: ThreadId) -> Option<u32> {
        let at = id.0 as u32;
        let threads = self.threads.borrow();
        let thread = threads.get(at as usize)?;
        let same = u64::from(thread.generation) == id.0 >> 32 && thread.node == index;
        let free = thread.state != State::Free && thread.joiner.is_none() && at != self.current.get();
        (same && free).then_some(at)
    }

    pub(super) fn join_any(self: &Rc<Self>, index: u32, id: ThreadId) -> Result<Result<()>, Failure> {
        let Some(target) = self.joinable(index, id) else { return Ok(Err(Error::NotFound)) };
        let current = self.current.get();
        if self.threads.borrow()[target as usize].state != State::Ended {
            self.threads.borrow_mut()[target as usize].joiner = Some(current);
            self.block(State::Joining(target), None)?;
        }
        let mut threads = self.threads.borrow_mut();
        let thread = &mut threads[target as usize];
        let (panicked, killed) = (thread.panicked, thread.killed);
        drop(threads);
        self.free_thread(target);
        if !killed && let Some(node) = self.node(index) {
            node.threads.set(node.threads.get() - 1);
        }
        Ok(if panicked { Err(Error::Gone) } else { Ok(()) })
    }

    pub(super) fn join(self: &Rc<Self>, index: u32, id: ThreadId) -> Result<()> {
        if self.is_down(index) && self.current.get() != OUTSIDE {
            return Err(Error::NotFound);
        }
        match self.join_any(index, id) {
            Ok(result) => result,
            Err(failure) => panic!("{failure}"),
        }
    }

    pub(super) fn join_outside(self: &Rc<Self>, index: u32, id: ThreadId) -> Result<(), Failure> {
        self.join_any(index, id).map(|_| ())
    }

    pub(super) fn report_threads(&self) -> Vec<ThreadReport> {
        let threads = self.threads.borrow();
        let live = threads.iter().skip(1).filter(|thread| thread.state != State::Free);
        live.map(|thread| ThreadReport {
            node: self.node(thread.node).map_or_else(String::new, |node| node.name.clone()),
            name: thread.name.clone(),
            state: match thread.state {
                State::Free => String::new(),
                State::Ready | State::Running => "can run".into(),
                State::Parked => match thread.timer {
                    Some((at, _)) => format!("parked since {} ns, until {at} ns", thread.since_ns),
                    None => format!("parked since {} ns, without a deadline", thread.since_ns),
                },
                State::Joining(target) => match threads.get(target as usize) {
                    Some(other) => format!("joins {} since {} ns", other.name, thread.since_ns),
                    None => "joins".into(),
                },
                State::Sleeping => "in a hypercall that takes its time".into(),
                State::Dying => "unwinds".into(),
                State::Ended => "has ended and was not joined".into(),
            },
        })
        .collect()
    }
}

/// Ends the calling thread by unwinding it.
pub(super) fn unwind() -> ! {
    resume_unwind(Box::new(Killed))
}

fn classify(payload: Box<dyn Any + Send>) -> Ending {
    if payload.is::<Killed>() {
        return Ending::Killed;
    }
    if let Some(exit) = payload.downcast_ref::<DomainExit>() {
        return Ending::Exit(exit.0);
    }
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_string());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    Ending::Panic(text.unwrap_or_else(|| "a panic without a message".into()))
}
