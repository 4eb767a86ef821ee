//! TCP (RFC 9293): the table of connections, listening ports, TIME-WAIT, and one smoltcp engine per connection.

mod api;
mod egress;
pub(crate) mod engine;
pub(crate) mod flow;
pub(crate) mod listen;
mod mend;
pub(crate) mod table;
pub(crate) mod timewait;

use crate::io::Layout;
use crate::ipv4::Outgoing;
use crate::packet::{Ip, Tcp, flag, protocol, put};
use crate::shard::Shard;
use core::net::IpAddr;
use table::{Target, Tuple};

impl Shard {
    /// The shard that owns the connection between `a` and `b`.
    pub(crate) fn tcp_shard(&self, a: (IpAddr, u16), b: (IpAddr, u16)) -> usize {
        crate::shard::pick(self.secret.tuple_hash(a, b), self.count)
    }

    /// Takes in a segment.
    pub(crate) fn tcp_in(&mut self, ip: &Ip<'_>, checksum_ok: bool) {
        let Some(tcp) = Tcp::parse(ip.payload) else { return self.io.counters.drop_malformed.increment() };
        if !checksum_ok && !ip.transport_checksum_ok() {
            return self.io.counters.drop_checksum.increment();
        }
        if ip.src.is_unspecified() || tcp.src_port == 0 || tcp.dst_port == 0 {
            return self.io.counters.drop_address.increment();
        }
        let tuple =
            Tuple { local: ip.dst, remote: ip.src, local_port: tcp.dst_port, remote_port: tcp.src_port };
        let hash = self.secret.tuple_hash((ip.src, tcp.src_port), (ip.dst, tcp.dst_port));
        match self.demux.get(hash, &tuple) {
            Some(Target::Flow(key)) => self.flow_in(key, ip, &tcp),
            Some(Target::HalfOpen(key)) => self.half_open_in(key, ip, &tcp),
            Some(Target::TimeWait(key)) => self.time_wait_in(key, ip, &tcp, hash),
            None => self.stranger_in(tuple, hash, ip, &tcp),
        }
    }

    /// A segment of no connection we know (RFC 9293, 3.10.7.1 and 3.10.7.2).
    fn stranger_in(&mut self, tuple: Tuple, hash: u64, ip: &Ip<'_>, tcp: &Tcp) {
        let is_syn = tcp.has(flag::SYN) && tcp.flags & (flag::ACK | flag::RST | flag::FIN) == 0;
        if is_syn && let Some(accept) = self.listeners.find(tuple.local, tuple.local_port) {
            let accept = accept.clone();
            return self.syn_in(accept, tuple, hash, ip, tcp);
        }
        self.io.counters.drop_no_socket.increment();
        self.tcp_reset(ip, tcp);
    }

    fn time_wait_in(&mut self, key: crate::slab::Key, ip: &Ip<'_>, tcp: &Tcp, hash: u64) {
        let Some(entry) = self.time_waits.get(key).copied() else { return };
        // RFC 1337: a reset does not end TIME-WAIT.
        if tcp.has(flag::RST) {
            return;
        }
        let is_new = tcp.has(flag::SYN) && (tcp.seq.wrapping_sub(entry.ack) as i32) > 0;
        if is_new && self.listeners.find(entry.tuple.local, entry.tuple.local_port).is_some() {
            self.time_waits.remove(&mut self.demux, key);
            return self.stranger_in(entry.tuple, hash, ip, tcp);
        }
        if tcp.len > 0 || tcp.flags & (flag::SYN | flag::FIN) != 0 || tcp.seq != entry.ack {
            self.tcp_bare(entry.tuple, entry.seq, entry.ack, flag::ACK);
        }
    }

    /// Answers a segment with a reset (RFC 9293, 3.5.2), unless it is one.
    pub(crate) fn tcp_reset(&mut self, ip: &Ip<'_>, tcp: &Tcp) {
        if tcp.has(flag::RST) {
            return;
        }
        if !self.limit_rate() {
            return self.io.counters.drop_rate_limit.increment();
        }
        self.io.counters.resets_sent.increment();
        let tuple =
            Tuple { local: ip.dst, remote: ip.src, local_port: tcp.dst_port, remote_port: tcp.src_port };
        if tcp.has(flag::ACK) {
            self.tcp_bare(tuple, tcp.ack, 0, flag::RST);
        } else {
            self.tcp_bare(tuple, 0, tcp.end(), flag::RST | flag::ACK);
        }
    }

    /// Sends a segment without options and payload.
    fn tcp_bare(&mut self, tuple: Tuple, seq: u32, ack: u32, flags: u8) {
        let packet = Outgoing::new(tuple.local, tuple.remote, protocol::TCP, 20);
        let layout = Layout::tcp(tuple.remote.is_ipv6(), None);
        let sent = self.send_ip(packet, layout, &mut |buf| {
            put(buf, 0, &[0; 20]);
            put(buf, 0, &tuple.local_port.to_be_bytes());
            put(buf, 2, &tuple.remote_port.to_be_bytes());
            put(buf, 4, &seq.to_be_bytes());
            put(buf, 8, &ack.to_be_bytes());
            put(buf, 12, &[5 << 4, flags]);
        });
        if sent.is_err() {
            self.io.counters.drop_unresolved.increment();
        }
    }
}
