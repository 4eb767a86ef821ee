//! What keeps a connection going where smoltcp 0.14 would stop for ever.
//!
//! Most of it comes from a closed window (RFC 9293, 3.8.6.1) and what smoltcp then does with its one timer:
//!
//! - **It forgets what is in flight.** An acknowledgement that also closes the window replaces the retransmission timer
//!   by that of the zero-window probe; as the window opens, that one is stopped. What the peer dropped is never sent
//!   again, and the probes before were empty, because all data counted as sent. So such a segment is told in two parts:
//!   first the acknowledgement, then the closed window.
//! - **It forgets to probe.** When the retransmission timer runs out and the window is closed, nothing is sent and no timer
//!   is set. The same happens when a fast retransmission finds the device full. So whoever is owed an acknowledgement and
//!   has no timer is roused by what the peer said last. (A lone FIN is lost so too; it is kept from being sent fast.)
//! - **It does not listen.** Of an empty segment that begins elsewhere than expected it reads neither acknowledgement nor
//!   window. Two ends of its kind then wait for each other in two cases, in which other stacks read on. Both probed a
//!   closed window at once, and both took the other's byte as the windows opened: that byte is not counted as sent, so what
//!   either says from then on begins one too early, like a keep-alive. Or our window closed a few bytes before the edge
//!   that was announced first, because a scaled window is rounded (RFC 7323, 2.4): the peer sent those bytes, we did
//!   not take them, and what it says begins after them. So news is told as if it began where it is expected. (What we
//!   say ourselves is put right in [`super::egress`].)
//!
//! And three that have nothing to do with windows: it scales the window that it said in a SYN, which is not scaled
//! ([`SYN_WINDOW`]), and panics when a peer fills what it takes for the window; it takes data that a peer sends behind
//! its own FIN for more of the stream; and when TIME-WAIT ends it throws away what was not read yet, so that the stream
//! seems to end early ([`Flow::lingers`]).

use super::flow::{Flow, MIN_WAIT_NS, SLOW_NS};
use crate::counters::NetCounters;
use crate::packet::{Tcp, flag};
use smoltcp::socket::tcp::State;

/// The largest unit of a scaled window in bytes (RFC 7323, 2.3), which rounding can take from it.
const MOST_ROUNDING: u32 = 1 << 14;
/// The most that a peer may send before it heard a scaled window (RFC 7323, 2.2).
const SYN_WINDOW: u32 = u16::MAX as u32;
/// Duplicate acknowledgements that make smoltcp send again (RFC 5681, 3.2).
const DUPLICATES: usize = 3;

/// Where a connection stands, as far as smoltcp does not tell. Sequence numbers and counts are modulo 2^32.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Progress {
    /// The first byte that the peer sends, and how many the application took.
    pub(super) first_in: u32,
    pub(super) taken: u32,
    /// The first byte that we send, and how many the application gave.
    pub(super) first_out: u32,
    pub(super) given: u32,
    /// The peer's window, as in the header.
    pub(super) window: u16,
}

impl Flow {
    /// The sequence number that the engine expects (RCV.NXT).
    fn next_in(&self) -> Option<u32> {
        let socket = self.engine.as_ref()?.socket();
        let fin = u32::from(self.has_ended());
        let Progress { first_in, taken, .. } = self.progress;
        Some(first_in.wrapping_add(taken).wrapping_add(socket.recv_queue() as u32 + fin))
    }

    /// The oldest sequence number without an acknowledgement (SND.UNA), a FIN not counted.
    fn oldest_out(&self) -> Option<u32> {
        let queued = self.engine.as_ref()?.socket().send_queue() as u32;
        Some(self.progress.first_out.wrapping_add(self.progress.given).wrapping_sub(queued))
    }

    /// Whether a segment has more than the peer may send yet.
    pub(super) fn is_beyond_window(&self, tcp: &Tcp) -> bool {
        let end = tcp.seq.wrapping_add(tcp.len as u32).wrapping_sub(self.progress.first_in);
        !self.emitted.scaled && tcp.len > 0 && end.cast_signed() > SYN_WINDOW.cast_signed()
    }

    /// Whether a segment has data behind the peer's FIN, which is to be ignored (RFC 9293, 3.10.7.4).
    pub(super) fn is_behind_end(&self, tcp: &Tcp) -> bool {
        if tcp.len == 0 || !self.has_ended() {
            return false;
        }
        let end = tcp.seq.wrapping_add(tcp.len as u32);
        self.next_in().is_some_and(|next| end.wrapping_sub(next.wrapping_sub(1)).cast_signed() > 0)
    }

    /// Whether the peer's FIN, and all before it, was taken.
    fn has_ended(&self) -> bool {
        let closed = [State::CloseWait, State::Closing, State::LastAck, State::TimeWait];
        self.engine.as_ref().is_some_and(|engine| closed.contains(&engine.socket().state()))
    }

    /// Tells the engine what it would not see in the segment itself. `false`: there is nothing else in it.
    pub(super) fn hear(&mut self, tcp: &Tcp, now_ns: u64) -> bool {
        let (Some(next), Some(oldest)) = (self.next_in(), self.oldest_out()) else { return true };
        let before = self.progress.window;
        let Some(engine) = &mut self.engine else { return true };
        if tcp.flags & (flag::ACK | flag::RST | flag::SYN) != flag::ACK {
            return true;
        }
        let most = engine.socket().recv_capacity() as u32;
        let (ahead, behind) = (tcp.seq.wrapping_sub(next), next.wrapping_sub(tcp.seq));
        if ahead > most && tcp.end().wrapping_sub(next) > most && behind > most {
            return true;
        }
        self.progress.window = tcp.window;
        self.emitted.shut = tcp.window == 0;
        if !self.established {
            return true;
        }
        let queued = engine.socket().send_queue();
        let acked = tcp.ack.wrapping_sub(oldest);
        let acks = (1..=queued as u32 + 1).contains(&acked);
        if acks && tcp.window == 0 && queued > 0 {
            engine.hear(now_ns, &self.tuple, next, tcp.ack, 1);
        }
        let is_empty = tcp.len == 0 && tcp.flags == flag::ACK;
        if !acks && tcp.window == before {
            // Three of these would have a lone FIN sent again at once, and smoltcp forgets about it.
            return !(is_empty && ahead == 0 && queued == 0);
        }
        let late = self.emitted.window == 0 && (1..=MOST_ROUNDING).contains(&ahead);
        let early = (1..=most).contains(&behind) && (acks || behind == 1);
        if is_empty && (late || early) {
            engine.hear(now_ns, &self.tuple, next, tcp.ack, tcp.window);
        }
        true
    }

    /// When the engine has something to do. One that is owed something and waits for nothing is roused.
    pub(super) fn engine_deadline_ns(&mut self, now_ns: u64, counters: &NetCounters) -> Option<u64> {
        if self.lingers() {
            return None;
        }
        let not_at_once = |at: u64| at.max(now_ns + MIN_WAIT_NS);
        let at = self.engine.as_mut()?.next_deadline_ns(now_ns);
        if at.is_some() || !self.established || !self.is_owed() {
            return at.map(not_at_once);
        }
        counters.roused.increment();
        self.rouse(now_ns);
        let at = self.engine.as_mut()?.next_deadline_ns(now_ns);
        Some(at.map_or(now_ns + SLOW_NS, not_at_once))
    }

    /// Says again what the peer said last: with a closed window that sets the timer of the probe, with an open one and
    /// often enough it is loss.
    fn rouse(&mut self, now_ns: u64) {
        let (Some(next), Some(oldest)) = (self.next_in(), self.oldest_out()) else { return };
        let window = self.progress.window;
        let Some(engine) = &mut self.engine else { return };
        if window > 0 {
            // Another window begins the count anew.
            engine.hear(now_ns, &self.tuple, next, oldest, window ^ 1);
            for _ in 0..DUPLICATES {
                engine.hear(now_ns, &self.tuple, next, oldest, window);
            }
        }
        engine.hear(now_ns, &self.tuple, next, oldest, window);
    }
}
