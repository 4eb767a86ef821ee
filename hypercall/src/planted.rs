//! Bugs on purpose, to test the tools that look for bugs.
//!
//! A line of a component says `if hypercall::planted!("ring-toctou") { wrong } else { right }`. Without the feature `planted`
//! that is `false` at compile time and the wrong half is gone. With it, at most one plant grows in a process at a time:
//! the one that [`grow`] named. All of them are listed in `docs/planted-bugs.md`, which a test holds.

#[cfg(feature = "planted")]
use core::sync::atomic::{AtomicU32, Ordering};

#[cfg(feature = "planted")]
static GROWN: AtomicU32 = AtomicU32::new(0);

/// The number of a plant's name (FNV-1a). Never 0 in practice.
pub const fn id(name: &str) -> u32 {
    let bytes = name.as_bytes();
    let (mut hash, mut at) = (0x811c_9dc5u32, 0);
    while at < bytes.len() {
        #[expect(clippy::indexing_slicing, reason = "below the length; iterators are not const")]
        let byte = bytes[at];
        hash = (hash ^ byte as u32).wrapping_mul(0x0100_0193);
        at += 1;
    }
    hash
}

/// Whether the plant with this number grows. Use [`planted!`](crate::planted!).
#[inline(always)]
pub fn grows(_id: u32) -> bool {
    #[cfg(feature = "planted")]
    return GROWN.load(Ordering::Relaxed) == _id;
    #[cfg(not(feature = "planted"))]
    false
}

/// From now on the bug `name` is there, and no other; `""`: none.
#[cfg(feature = "planted")]
pub fn grow(name: &str) {
    GROWN.store(if name.is_empty() { 0 } else { id(name) }, Ordering::SeqCst);
}

/// Whether the bug of this name is there: never, unless a test of the tools has built with the feature `planted`.
#[macro_export]
macro_rules! planted {
    ($name:literal) => {
        $crate::planted::grows(const { $crate::planted::id($name) })
    };
}
