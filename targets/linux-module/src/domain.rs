//! The host that components see: Linux, or with a feature a layer around it.

use crate::LinuxHost;
use hypercall::layers::Channel;
use hypercall::{Clock, Threads};

#[cfg(not(any(feature = "trace", feature = "record")))]
mod chosen {
    use super::{Channel, LinuxHost};

    /// The host of this module's components.
    pub(crate) type Domain = LinuxHost;

    /// The one there is, and how it is watched.
    pub(crate) fn host() -> Option<(Domain, Option<Channel>)> {
        Some((LinuxHost, None))
    }

    /// Waits for something that is not the domain's.
    pub(crate) fn outside(_host: &Domain, body: impl FnOnce()) {
        body();
    }

    /// The first thread leaves the domain.
    pub(crate) fn leave(_host: &Domain) {}

    /// Frees what the layer holds, when nobody uses it any more.
    pub(crate) fn give_back(_host: Domain) {}
}

#[cfg(any(feature = "trace", feature = "record"))]
#[expect(unsafe_code, reason = "memory that the C half gives")]
fn channel(kind: hypercall::layers::ChannelKind) -> Option<Channel> {
    use core::sync::atomic::AtomicU64;
    /// What Linux gives in one piece.
    const BYTES: usize = 4 << 20;
    let base: *const AtomicU64 = crate::ffi::ak_channel_alloc(BYTES).cast();
    // SAFETY: zeroed pages, nobody else's, freed only when the module's code goes too.
    let words = unsafe { (!base.is_null()).then(|| core::slice::from_raw_parts(base, BYTES / 8)) };
    Channel::create(words?, kind)
}

#[cfg(feature = "trace")]
mod chosen {
    use super::{Channel, LinuxHost, channel};
    use hypercall::layers::{ChannelKind, TraceRing, Traced};

    /// The host of this module's components.
    pub(crate) type Domain = Traced<LinuxHost, TraceRing>;

    /// The one there is, and how it is watched; `None` without the memory for that.
    pub(crate) fn host() -> Option<(Domain, Option<Channel>)> {
        let channel = channel(ChannelKind::Trace)?;
        Some((Traced::new(LinuxHost, channel.events()?), Some(channel)))
    }

    /// Waits for something that is not the domain's.
    pub(crate) fn outside(_host: &Domain, body: impl FnOnce()) {
        body();
    }

    /// The first thread leaves the domain.
    pub(crate) fn leave(_host: &Domain) {}

    /// Frees what the layer holds, when nobody uses it any more.
    pub(crate) fn give_back(_host: Domain) {}
}

#[cfg(all(feature = "record", not(feature = "trace")))]
mod chosen {
    use super::{Channel, LinuxHost, channel};
    use alloc::boxed::Box;
    use hypercall::layers::{ChannelKind, Recorded, Recorder};

    /// The host of this module's components.
    pub(crate) type Domain = Recorded<LinuxHost>;

    /// The one there is, and how it is watched; `None` without the memory for that.
    pub(crate) fn host() -> Option<(Domain, Option<Channel>)> {
        let channel = channel(ChannelKind::Recording)?;
        let recorder = Recorder::new(channel.bytes()?);
        Some((Recorded::new(LinuxHost, Box::leak(Box::new(recorder))), Some(channel)))
    }

    /// Waits for something that is not the domain's.
    pub(crate) fn outside(host: &Domain, body: impl FnOnce()) {
        host.outside(|_| {
            body();
            0
        });
    }

    /// The first thread leaves the domain.
    pub(crate) fn leave(host: &Domain) {
        host.leave();
    }

    /// Frees what the layer holds, when nobody uses it any more.
    #[expect(unsafe_code, reason = "takes back what `host` leaked")]
    pub(crate) fn give_back(host: Domain) {
        // SAFETY: `host` made it from a box; all threads are joined and the kernel is gone, so no handle is left but this.
        drop(unsafe { Box::from_raw(core::ptr::from_ref(host.recorder()).cast_mut()) });
    }
}

/// Gives whoever reads a channel time for the rest: its memory is about to go.
pub(crate) fn finish(channel: Channel) {
    const PATIENCE_NS: u64 = 200_000_000;
    let deadline = LinuxHost.monotonic_ns() + PATIENCE_NS;
    while !channel.is_drained() && LinuxHost.monotonic_ns() < deadline {
        LinuxHost.yield_now();
    }
    channel.close();
}

pub(crate) use chosen::{Domain, give_back, host, leave, outside};
