//! What to read before it is asked for.

use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Smallest window, in bytes.
const FIRST_WINDOW: u64 = 32 << 10;

/// Watches the reads of one file. It holds no lock: readers that run into each other at worst read ahead too little.
#[derive(Debug)]
pub struct ReadAhead {
    /// Where the last read ended.
    next: AtomicU64,
    /// Up to where was read ahead.
    ahead: AtomicU64,
    /// How far to read ahead now; 0 after a jump.
    window: AtomicU64,
    max: u64,
}

impl ReadAhead {
    /// For a file that nobody read yet. `max_bytes` 0: never read ahead.
    pub const fn new(max_bytes: u32) -> Self {
        Self {
            next: AtomicU64::new(0),
            ahead: AtomicU64::new(0),
            window: AtomicU64::new(0),
            max: max_bytes as u64,
        }
    }

    /// Notes a read of `offset .. offset + len` and says which bytes of the file to fetch now, beyond that read. The
    /// range may reach past the end of the file; it is `None` most of the time.
    pub fn note(&self, offset: u64, len: u64) -> Option<Range<u64>> {
        let end = offset.checked_add(len)?;
        let sequential = self.next.swap(end, Relaxed) == offset;
        if self.max == 0 {
            return None;
        }
        let window = self.window.load(Relaxed);
        if !sequential {
            if window != 0 {
                self.window.store(0, Relaxed);
            }
            return None;
        }
        let ahead = self.ahead.load(Relaxed);
        // What was read ahead counts only if it is in front of us.
        let ahead = if window == 0 || ahead < end || ahead - end > self.max { end } else { ahead };
        // Half the window is still there: nothing to do, and requests stay large.
        if window != 0 && ahead - end > window / 2 {
            return None;
        }
        let window = (window * 2).clamp(FIRST_WINDOW.min(self.max), self.max);
        let to = end.checked_add(window)?;
        self.window.store(window, Relaxed);
        self.ahead.store(to, Relaxed);
        (to > ahead).then_some(ahead..to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_while_sequential_and_covers_each_byte_once() {
        let state = ReadAhead::new(512 << 10);
        let mut fetched = 4096;
        let mut calls = 0;
        for step in 0..1024u64 {
            if let Some(range) = state.note(step * 4096, 4096) {
                assert_eq!(range.start, fetched);
                assert!(range.end - (step + 1) * 4096 <= 512 << 10);
                fetched = range.end;
                calls += 1;
            }
            assert!(fetched >= (step + 1) * 4096);
        }
        assert!(calls < 32, "{calls} fetches for 4 MiB");
    }

    #[test]
    fn a_jump_stops_it() {
        let state = ReadAhead::new(512 << 10);
        assert!(state.note(0, 4096).is_some());
        assert_eq!(state.note(1 << 20, 4096), None);
        assert_eq!(state.note(5 << 20, 4096), None);
        assert_eq!(state.note((5 << 20) + 4096, 4096).unwrap().start, (5 << 20) + 8192);
        assert_eq!(ReadAhead::new(0).note(0, 4096), None);
        assert_eq!(state.note(u64::MAX - 1, 4096), None);
    }
}
