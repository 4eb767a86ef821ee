//! A queue of deadlines: a pure data structure, told of time by its owner.

use alloc::collections::BTreeMap;

/// Names a timer of one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TimerKey {
    deadline_ns: u64,
    serial: u64,
}

/// Deadlines with what is due at them, in order of time.
pub struct TimerQueue<T> {
    entries: BTreeMap<TimerKey, T>,
    next_serial: u64,
}

impl<T> Default for TimerQueue<T> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), next_serial: 0 }
    }
}

impl<T> TimerQueue<T> {
    /// Adds an entry. Those of one deadline come out in the order they went in.
    pub fn insert(&mut self, deadline_ns: u64, value: T) -> TimerKey {
        let key = TimerKey { deadline_ns, serial: self.next_serial };
        self.next_serial += 1;
        self.entries.insert(key, value);
        key
    }

    /// Takes an entry out before its time.
    pub fn cancel(&mut self, key: TimerKey) -> Option<T> {
        self.entries.remove(&key)
    }

    /// What is due at `key`, while it waits.
    pub fn get_mut(&mut self, key: TimerKey) -> Option<&mut T> {
        self.entries.get_mut(&key)
    }

    /// The earliest deadline.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.entries.first_key_value().map(|(key, _)| key.deadline_ns)
    }

    /// Takes the earliest entry out if it is due.
    pub fn pop_due(&mut self, now_ns: u64) -> Option<T> {
        let entry = self.entries.first_entry()?;
        (entry.key().deadline_ns <= now_ns).then(|| entry.remove())
    }

    /// How many entries wait.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    proptest! {
        /// Against a plain list: the same entries come out, in the same order, at the same times.
        #[test]
        fn behaves_as_a_sorted_list(steps in proptest::collection::vec((0u8..3, 0u64..20), 0..200)) {
            let mut queue = TimerQueue::default();
            let mut list: Vec<(TimerKey, u32)> = Vec::new();
            for (value, (what, number)) in (0u32..).zip(steps) {
                match what {
                    0 => {
                        let key = queue.insert(number, value);
                        prop_assert_eq!(queue.get_mut(key).copied(), Some(value));
                        list.push((key, value));
                        list.sort();
                    }
                    1 if !list.is_empty() => {
                        let (key, value) = list.remove(number as usize % list.len());
                        prop_assert_eq!(queue.cancel(key), Some(value));
                        prop_assert_eq!(queue.cancel(key), None);
                        prop_assert_eq!(queue.get_mut(key), None);
                    }
                    _ => {
                        let due = list.first().filter(|(key, _)| key.deadline_ns <= number).map(|one| one.1);
                        prop_assert_eq!(queue.pop_due(number), due);
                        if due.is_some() {
                            list.remove(0);
                        }
                    }
                }
                prop_assert_eq!(queue.next_deadline_ns(), list.first().map(|(key, _)| key.deadline_ns));
                prop_assert_eq!((queue.len(), queue.is_empty()), (list.len(), list.is_empty()));
            }
        }
    }
}
