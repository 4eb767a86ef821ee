//! The host that components see: the machine, or with a feature a layer around it.

use crate::host::Machine;

#[cfg(not(feature = "trace"))]
mod chosen {
    use super::Machine;

    /// The host of this image's components.
    pub type Domain = Machine;

    /// The one there is.
    pub(crate) fn host() -> Option<Domain> {
        Some(Machine)
    }
}

#[cfg(feature = "trace")]
mod chosen {
    use super::Machine;
    use crate::memory::{frames, paging, total_bytes};
    use core::sync::atomic::AtomicU64;
    use hypercall::PAGE_SIZE;
    use hypercall::layers::{Channel, ChannelKind, TraceRing, Traced};

    /// The host of this image's components.
    pub type Domain = Traced<Machine, TraceRing>;

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

    /// The one there is; `None` without the memory for a channel.
    pub(crate) fn host() -> Option<Domain> {
        Some(Traced::new(Machine, channel(ChannelKind::Trace)?.events()?))
    }
}

pub use chosen::Domain;
pub(crate) use chosen::host;
