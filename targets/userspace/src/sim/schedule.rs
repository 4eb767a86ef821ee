//! Who runs next.

use super::Random;
use super::config::Schedule;
use std::collections::VecDeque;

/// The threads that can run, and the rule by which one is taken.
pub(super) struct Scheduler {
    policy: Schedule,
    random: Random,
    ready: VecDeque<u32>,
    /// By thread; higher runs first.
    priorities: Vec<u64>,
    /// Steps at which the running thread falls behind, descending.
    changes: Vec<u64>,
    /// The next priority of one that falls behind; always below what any other has.
    lowest: u64,
}

const MIDDLE: u64 = 1 << 62;

impl Scheduler {
    pub(super) fn new(policy: Schedule, seed: u64) -> Self {
        let mut random = Random::new(seed, 1);
        let mut changes = Vec::new();
        if let Schedule::Priorities { depth, steps } = policy {
            changes = (1..depth).map(|_| 1 + random.below(steps)).collect();
            changes.sort_unstable_by(|a, b| b.cmp(a));
        }
        Self { policy, random, ready: VecDeque::new(), priorities: Vec::new(), changes, lowest: MIDDLE }
    }

    /// A thread begins its life at index `at`.
    pub(super) fn born(&mut self, at: u32) {
        let at = at as usize;
        if self.priorities.len() <= at {
            self.priorities.resize(at + 1, 0);
        }
        if matches!(self.policy, Schedule::Priorities { .. }) {
            self.priorities[at] = MIDDLE + self.random.below(MIDDLE);
        }
    }

    /// `at` can run; `first`: before all others, if there are turns.
    pub(super) fn add(&mut self, at: u32, first: bool) {
        if first { self.ready.push_front(at) } else { self.ready.push_back(at) }
    }

    pub(super) fn remove(&mut self, at: u32) {
        self.ready.retain(|one| *one != at);
    }

    /// Takes the one that runs next.
    pub(super) fn next(&mut self) -> Option<u32> {
        match self.policy {
            Schedule::Turns => self.ready.pop_front(),
            Schedule::Random { .. } => {
                let at = self.random.below(self.ready.len() as u64) as usize;
                self.ready.remove(at)
            }
            Schedule::Priorities { .. } => {
                let best = (0..self.ready.len()).max_by_key(|at| self.priority(self.ready[*at]))?;
                self.ready.remove(best)
            }
        }
    }

    fn priority(&self, at: u32) -> u64 {
        self.priorities.get(at as usize).copied().unwrap_or(0)
    }

    /// Whether `current` has to make way at this hypercall.
    #[inline]
    pub(super) fn preempts(&mut self, current: u32, steps: u64) -> bool {
        match self.policy {
            Schedule::Turns => false,
            Schedule::Random { switch_ppm } => !self.ready.is_empty() && self.random.chance(switch_ppm),
            Schedule::Priorities { .. } => {
                if self.changes.last().is_some_and(|at| *at <= steps) {
                    self.changes.pop();
                    self.falls_behind(current);
                }
                let mine = self.priority(current);
                self.ready.iter().any(|other| self.priority(*other) > mine)
            }
        }
    }

    /// `current` yields or had its time: with priorities it would otherwise keep those that it waits for from running.
    pub(super) fn falls_behind(&mut self, current: u32) {
        if matches!(self.policy, Schedule::Priorities { .. }) {
            self.lowest -= 1;
            self.priorities[current as usize] = self.lowest;
        }
    }

    /// Takes the waiter that a wake-up wakes.
    pub(super) fn choose_waiter(&mut self, waiting: &mut VecDeque<u32>) -> Option<u32> {
        match self.policy {
            Schedule::Random { .. } if waiting.len() > 1 => {
                let at = self.random.below(waiting.len() as u64) as usize;
                waiting.remove(at)
            }
            _ => waiting.pop_front(),
        }
    }
}
