//! The input as a stream of choices.

use arbitrary::{Arbitrary, Unstructured};

/// What a harness reads its decisions from. At the end everything is 0, so every input is a complete story.
#[derive(Default)]
pub struct Input {
    data: Vec<u8>,
    at: usize,
}

impl Input {
    /// From the fuzzer's bytes.
    pub fn new(data: &[u8]) -> Self {
        Self { data: data.to_vec(), at: 0 }
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.at == self.data.len()
    }

    fn next<T: for<'a> Arbitrary<'a> + Default>(&mut self) -> T {
        let mut rest = Unstructured::new(&self.data[self.at..]);
        let value = rest.arbitrary().unwrap_or_default();
        self.at = self.data.len() - rest.len();
        value
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        self.next()
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> u16 {
        self.next()
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> u32 {
        self.next()
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> u64 {
        self.next()
    }

    /// A number below `end`, which is not 0. One byte where that is enough, else two or four.
    pub fn below(&mut self, end: usize) -> usize {
        let raw = match end {
            0..=256 => usize::from(self.u8()),
            257..=65_536 => self.u16().into(),
            _ => self.u32() as usize,
        };
        raw % end
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// At most `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let end = self.data.len().min(self.at.saturating_add(len));
        let bytes = self.data[self.at..end].to_vec();
        self.at = end;
        bytes
    }

    /// A stream of its own, of as many bytes as the next number says.
    pub fn split(&mut self) -> Self {
        let len = self.u16();
        Self { data: self.bytes(len.into()), at: 0 }
    }
}
