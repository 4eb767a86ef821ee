//! A bounded queue of frames, stored one behind the other in one buffer.

use hypercall::{Error, Result};

/// Frames are kept with their length in front, in four bytes.
const LENGTH: usize = 4;

/// First in, first out.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    /// Empty until the ring is given room.
    bytes: Vec<u8>,
    /// Where the oldest frame begins.
    head: usize,
    /// Bytes in use from there on, around the end.
    used: usize,
}

impl Ring {
    /// Forgets all frames and makes room for `capacity` bytes of frames and their lengths; 0 gives the memory back.
    pub(crate) fn reset(&mut self, capacity: usize) {
        self.bytes = vec![0; capacity];
        (self.head, self.used) = (0, 0);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Whether at least half of the room is free.
    pub(crate) fn is_half_free(&self) -> bool {
        self.used <= self.bytes.len() / 2
    }

    /// Adds a frame if there is room.
    pub(crate) fn push(&mut self, frame: &[u8]) -> bool {
        if self.bytes.len() - self.used < LENGTH + frame.len() {
            return false;
        }
        self.put(&(frame.len() as u32).to_le_bytes());
        self.put(frame);
        true
    }

    /// Takes the oldest frame: [`Error::WouldBlock`] if there is none, [`Error::BufferTooSmall`] if it did not fit and was
    /// dropped.
    pub(crate) fn pop(&mut self, buf: &mut [u8]) -> Result<usize> {
        if self.used == 0 {
            return Err(Error::WouldBlock);
        }
        let mut len = [0; LENGTH];
        self.take(&mut len);
        let len = u32::from_le_bytes(len) as usize;
        match buf.get_mut(..len) {
            Some(buf) => {
                self.take(buf);
                Ok(len)
            }
            None => {
                self.skip(len);
                Err(Error::BufferTooSmall)
            }
        }
    }

    fn put(&mut self, data: &[u8]) {
        let capacity = self.bytes.len();
        let at = (self.head + self.used) % capacity;
        let first = data.len().min(capacity - at);
        self.bytes[at..at + first].copy_from_slice(&data[..first]);
        self.bytes[..data.len() - first].copy_from_slice(&data[first..]);
        self.used += data.len();
    }

    fn take(&mut self, buf: &mut [u8]) {
        let first = buf.len().min(self.bytes.len() - self.head);
        let (a, b) = buf.split_at_mut(first);
        a.copy_from_slice(&self.bytes[self.head..self.head + first]);
        b.copy_from_slice(&self.bytes[..b.len()]);
        self.skip(buf.len());
    }

    fn skip(&mut self, len: usize) {
        self.head = (self.head + len) % self.bytes.len();
        self.used -= len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_and_content_around_the_end() {
        let mut ring = Ring::default();
        ring.reset(100);
        let (mut next_in, mut next_out) = (0u8, 0u8);
        let mut buf = [0; 64];
        for step in 0..10_000 {
            let len = 1 + step * 7 % 40;
            if ring.push(&vec![next_in; len]) {
                next_in = next_in.wrapping_add(1);
            } else {
                assert!(!ring.is_empty());
                let len = ring.pop(&mut buf).unwrap();
                assert!(buf[..len].iter().all(|byte| *byte == next_out));
                next_out = next_out.wrapping_add(1);
            }
        }
        while let Ok(len) = ring.pop(&mut buf) {
            assert!(buf[..len].iter().all(|byte| *byte == next_out));
            next_out = next_out.wrapping_add(1);
        }
        assert_eq!(next_in, next_out);
        assert_eq!(ring.pop(&mut buf), Err(Error::WouldBlock));
    }

    #[test]
    fn a_frame_that_does_not_fit_is_dropped_and_the_next_one_comes() {
        let mut ring = Ring::default();
        ring.reset(100);
        assert!(ring.push(&[1; 30]) && ring.push(&[2; 10]));
        let mut buf = [0; 20];
        assert_eq!(ring.pop(&mut buf), Err(Error::BufferTooSmall));
        assert_eq!(ring.pop(&mut buf), Ok(10));
        assert_eq!(buf[..10], [2; 10]);
    }

    #[test]
    fn without_room_nothing_goes_in() {
        let mut ring = Ring::default();
        assert!(!ring.push(&[1]));
        ring.reset(5);
        assert!(ring.push(&[1]));
        assert!(!ring.push(&[]));
    }
}
