//! The host that components see: the machine, or with a feature a layer around it.

use crate::host::Machine;
use hypercall::layers::ByteRing;
#[cfg(any(feature = "trace", feature = "record"))]
use {
    crate::memory::{frames, paging, total_bytes},
    core::sync::atomic::AtomicU64,
    hypercall::PAGE_SIZE,
    hypercall::layers::{Channel, ChannelKind},
};

#[cfg(not(any(feature = "trace", feature = "record")))]
mod chosen {
    use super::{ByteRing, Machine};

    /// The host of this image's components.
    pub type Domain = Machine;

    /// The one there is, and where its counters are told.
    pub(crate) fn host() -> Option<(Domain, Option<ByteRing>)> {
        Some((Machine, None))
    }

    /// Lets somebody who is no thread of the domain call it.
    pub(crate) fn enter(_host: &Domain, body: impl FnOnce()) {
        body();
    }
}

#[cfg(any(feature = "trace", feature = "record"))]
/// A part of memory, at most 4 MiB, as a channel: whoever runs the machine finds it there.
fn channel(kind: ChannelKind) -> Option<Channel> {
    let bytes = (total_bytes() / 8).min(4 << 20) as usize;
    let base = paging::direct(frames::allocate(bytes / PAGE_SIZE).ok()?);
    let len = bytes / PAGE_SIZE * PAGE_SIZE;
    // SAFETY: fresh frames, seen through the direct map and never given back; zeros are valid atomics.
    let words = unsafe {
        base.write_bytes(0, len);
        core::slice::from_raw_parts(base.cast::<AtomicU64>(), len / 8)
    };
    Channel::create(words, kind)
}

#[cfg(feature = "trace")]
mod chosen {
    use super::{ByteRing, ChannelKind, Machine, channel};
    use hypercall::layers::{TraceRing, Traced};

    /// The host of this image's components.
    pub type Domain = Traced<Machine, TraceRing>;

    /// The one there is, and where its counters are told; `None` without the memory for a channel.
    pub(crate) fn host() -> Option<(Domain, Option<ByteRing>)> {
        let channel = channel(ChannelKind::Trace)?;
        Some((Traced::new(Machine, channel.events()?), channel.notes()))
    }

    /// Lets somebody who is no thread of the domain call it.
    pub(crate) fn enter(_host: &Domain, body: impl FnOnce()) {
        body();
    }
}

#[cfg(all(feature = "record", not(feature = "trace")))]
mod chosen {
    use super::{ByteRing, ChannelKind, Machine, channel};
    use alloc::boxed::Box;
    use hypercall::layers::recorded::ENTER_STOP;
    use hypercall::layers::{Recorded, Recorder};

    /// The host of this image's components.
    pub type Domain = Recorded<Machine>;

    /// The one there is; `None` without the memory for a channel. Its counters are not told: a replay would not.
    pub(crate) fn host() -> Option<(Domain, Option<ByteRing>)> {
        let recorder = Recorder::new(channel(ChannelKind::Recording)?.bytes()?);
        Some((Recorded::new(Machine, Box::leak(Box::new(recorder))), None))
    }

    /// Lets somebody who is no thread of the domain call it.
    pub(crate) fn enter(host: &Domain, body: impl FnOnce()) {
        host.enter(ENTER_STOP, body);
    }
}

pub use chosen::Domain;
pub(crate) use chosen::{enter, host};
