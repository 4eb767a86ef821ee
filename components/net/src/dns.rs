//! The DNS client (RFC 1035, RFC 3596): a stub resolver over a UDP socket of its own per look-up.

use alloc::{boxed::Box, string::String, sync::Arc, vec::Vec};
use anykernel::socket::{Datagram, Lookup, NetError, Result};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::task::{Context, Poll, Waker};
use smoltcp::wire::{
    DnsFlags, DnsOpcode, DnsPacket, DnsQueryType, DnsQuestion, DnsRcode, DnsRecord, DnsRecordData, DnsRepr,
};

const PORT: u16 = 53;
/// A server has this long to answer before the next one is asked.
const TRY_NS: u64 = 2_000_000_000;
/// How many times the servers are gone through.
const ROUNDS: usize = 2;
/// CNAME records that are followed in one answer.
const MAX_ALIASES: usize = 16;
/// Most addresses kept.
const MAX_ADDRESSES: usize = 32;

/// What the client needs of a stack.
pub(crate) trait Resolver {
    /// Name servers, first choice first.
    fn servers(&self) -> Vec<IpAddr>;
    /// A UDP socket on a port that cannot be guessed.
    fn socket(&self, v4: bool) -> Result<Arc<dyn Datagram>>;
    /// A number that cannot be guessed.
    fn random(&self) -> u64;
    /// Time.
    fn clock(&self) -> Box<dyn Alarm>;
}

/// Time, and being woken at one.
pub(crate) trait Alarm: Send {
    fn now_ns(&self) -> u64;
    fn wake_at(&self, at_ns: u64, waker: &Waker);
}

/// Begins to look `name` up.
pub(crate) fn lookup(resolver: &dyn Resolver, name: &str) -> Result<Box<dyn Lookup>> {
    let name = name.strip_suffix('.').unwrap_or(name);
    let literal = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    if let Ok(addr) = literal {
        return Ok(Box::new(Known(alloc::vec![addr])));
    }
    if name.eq_ignore_ascii_case("localhost") {
        return Ok(Box::new(Known(alloc::vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()])));
    }
    let wire_name = encode(name).ok_or(NetError::Invalid)?;
    let servers = resolver.servers();
    let first = servers.first().ok_or(NetError::Unreachable)?;
    let random = resolver.random();
    Ok(Box::new(Query {
        clock: resolver.clock(),
        socket_v4: if servers.iter().any(IpAddr::is_ipv4) { Some(resolver.socket(true)?) } else { None },
        socket_v6: if servers.iter().any(IpAddr::is_ipv6) { Some(resolver.socket(false)?) } else { None },
        server: *first,
        servers,
        turn: 0,
        deadline_ns: 0,
        questions: [
            Question { id: random as u16, kind: DnsQueryType::A, answer: None },
            Question { id: (random >> 16) as u16, kind: DnsQueryType::Aaaa, answer: None },
        ],
        name: name.into(),
        wire_name,
    }))
}

struct Known(Vec<IpAddr>);

impl Lookup for Known {
    fn poll_addresses(&mut self, _: &mut Context<'_>) -> Poll<Result<Vec<IpAddr>>> {
        Poll::Ready(Ok(self.0.clone()))
    }
}

struct Question {
    id: u16,
    kind: DnsQueryType,
    answer: Option<Answer>,
}

/// What a server said to one question.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Addresses(Vec<IpAddr>),
    NoSuchName,
}

struct Query {
    clock: Box<dyn Alarm>,
    socket_v4: Option<Arc<dyn Datagram>>,
    socket_v6: Option<Arc<dyn Datagram>>,
    servers: Vec<IpAddr>,
    server: IpAddr,
    turn: usize,
    deadline_ns: u64,
    questions: [Question; 2],
    name: String,
    wire_name: Vec<u8>,
}

impl Query {
    fn socket(&self) -> Option<&Arc<dyn Datagram>> {
        if self.server.is_ipv4() { self.socket_v4.as_ref() } else { self.socket_v6.as_ref() }
    }

    /// Asks the server whose turn it is what has not been answered. An error means that the next one should be asked.
    fn ask(&self, cx: &mut Context<'_>) -> Result<()> {
        let socket = self.socket().ok_or(NetError::Unreachable)?;
        for question in self.questions.iter().filter(|question| question.answer.is_none()) {
            let message = question_message(question.id, &self.wire_name, question.kind);
            let sent = socket.poll_send_to(cx, &message, SocketAddr::new(self.server, PORT));
            if let Poll::Ready(Err(error)) = sent {
                return Err(error);
            }
        }
        Ok(())
    }

    fn take_in(&mut self, message: &[u8], from: SocketAddr) -> Result<()> {
        if from != SocketAddr::new(self.server, PORT) {
            return Ok(());
        }
        for question in &mut self.questions {
            if let Some(answer) = parse_answer(message, question.id, question.kind, &self.wire_name)? {
                question.answer = Some(answer);
            }
        }
        Ok(())
    }

    fn finish(&self) -> Option<Result<Vec<IpAddr>>> {
        let mut addresses = Vec::new();
        for question in &self.questions {
            if let Answer::Addresses(found) = question.answer.as_ref()? {
                addresses.extend(found);
            }
        }
        Some(if addresses.is_empty() { Err(NetError::NameNotFound) } else { Ok(addresses) })
    }
}

impl Lookup for Query {
    fn poll_addresses(&mut self, cx: &mut Context<'_>) -> Poll<Result<Vec<IpAddr>>> {
        loop {
            let now_ns = self.clock.now_ns();
            if now_ns >= self.deadline_ns {
                let last = self.servers.len() * ROUNDS;
                if self.turn >= last {
                    // One family answered and the other did not: better half than nothing.
                    let found: Vec<_> = self
                        .questions
                        .iter()
                        .filter_map(|question| match &question.answer {
                            Some(Answer::Addresses(found)) => Some(found.clone()),
                            _ => None,
                        })
                        .flatten()
                        .collect();
                    if !found.is_empty() {
                        return Poll::Ready(Ok(found));
                    }
                    log::debug!("no name server answered for {}", self.name);
                    return Poll::Ready(Err(NetError::TimedOut));
                }
                if let Some(server) = self.servers.get(self.turn % self.servers.len()) {
                    self.server = *server;
                }
                self.turn += 1;
                if self.ask(cx).is_err() {
                    continue;
                }
                self.deadline_ns = now_ns + TRY_NS;
                self.clock.wake_at(self.deadline_ns, cx.waker());
            }
            let mut buf = [0u8; 1500];
            let Some(socket) = self.socket().cloned() else {
                self.deadline_ns = 0;
                continue;
            };
            match socket.poll_recv_from(cx, &mut buf) {
                Poll::Pending => return Poll::Pending,
                // The server is not there (port unreachable): the next one.
                Poll::Ready(Err(_)) => self.deadline_ns = 0,
                Poll::Ready(Ok((len, from))) => {
                    let message = buf.get(..len).unwrap_or_default();
                    if self.take_in(message, from).is_err() {
                        self.deadline_ns = 0;
                        continue;
                    }
                    if let Some(result) = self.finish() {
                        return Poll::Ready(result);
                    }
                }
            }
        }
    }
}

/// A name as labels (RFC 1035, 3.1). `None`: not a name.
fn encode(name: &str) -> Option<Vec<u8>> {
    let mut wire = Vec::new();
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 || !label.bytes().all(|byte| byte.is_ascii_graphic()) {
            return None;
        }
        wire.push(label.len() as u8);
        wire.extend(label.bytes());
    }
    wire.push(0);
    (wire.len() <= 255).then_some(wire)
}

fn question_message(id: u16, name: &[u8], kind: DnsQueryType) -> Vec<u8> {
    let repr = DnsRepr {
        transaction_id: id,
        flags: DnsFlags::RECURSION_DESIRED,
        opcode: DnsOpcode::Query,
        question: DnsQuestion { name, type_: kind },
    };
    let mut message = alloc::vec![0; repr.buffer_len()];
    repr.emit(&mut DnsPacket::new_unchecked(&mut message[..]));
    message
}

/// Compares a name in a message, which may be compressed, with labels.
fn is_name(packet: &DnsPacket<&[u8]>, at: &[u8], name: &[u8]) -> bool {
    let mut rest = name;
    // 128 labels are the most a name can have; pointers that loop end there.
    for label in packet.parse_name(at).take(128) {
        let Ok(label) = label else { return false };
        let Some((len, tail)) = rest.split_first() else { return false };
        let Some((expected, tail)) = tail.split_at_checked(usize::from(*len)) else { return false };
        if !expected.eq_ignore_ascii_case(label) {
            return false;
        }
        rest = tail;
    }
    rest == [0]
}

/// Copies a name in a message as labels without compression.
fn copy_name(packet: &DnsPacket<&[u8]>, at: &[u8]) -> Option<Vec<u8>> {
    let mut wire = Vec::new();
    for label in packet.parse_name(at).take(128) {
        let label = label.ok()?;
        wire.push(u8::try_from(label.len()).ok()?);
        wire.extend(label);
        if wire.len() > 255 {
            return None;
        }
    }
    wire.push(0);
    Some(wire)
}

/// The planted bug: as [`copy_name`], but a pointer may lead anywhere, also to itself.
fn follow_for_ever<'a>(message: &'a [u8], mut at: &'a [u8]) -> Option<Vec<u8>> {
    let mut wire = Vec::new();
    loop {
        match at {
            [0, ..] => break,
            [high, low, ..] if *high >= 0xc0 => {
                at = message.get(usize::from(high & 0x3f) << 8 | usize::from(*low)..)?
            }
            [len, rest @ ..] => {
                wire.push(*len);
                wire.extend(rest.get(..usize::from(*len))?);
                at = rest.get(usize::from(*len)..)?;
            }
            [] => return None,
        }
    }
    wire.push(0);
    Some(wire)
}

/// Reads the answer to a question. `Ok(None)`: not an answer to it. `Err`: the server cannot tell.
fn parse_answer(message: &[u8], id: u16, kind: DnsQueryType, name: &[u8]) -> Result<Option<Answer>> {
    let Ok(packet) = DnsPacket::new_checked(message) else { return Ok(None) };
    let is_response = packet.flags().contains(DnsFlags::RESPONSE);
    if packet.transaction_id() != id || !is_response || packet.question_count() != 1 {
        return Ok(None);
    }
    let Ok((mut rest, question)) = DnsQuestion::parse(packet.payload()) else { return Ok(None) };
    if question.type_ != kind || !is_name(&packet, question.name, name) {
        return Ok(None);
    }
    match packet.rcode() {
        DnsRcode::NoError => {}
        DnsRcode::NXDomain => return Ok(Some(Answer::NoSuchName)),
        _ => return Err(NetError::Unreachable),
    }
    let mut records = Vec::new();
    for _ in 0..packet.answer_record_count().min(64) {
        let Ok((next, record)) = DnsRecord::parse(rest) else { break };
        rest = next;
        records.push(record);
    }
    let mut wanted = Vec::from(name);
    let mut addresses = Vec::new();
    for _ in 0..MAX_ALIASES {
        let mut alias = None;
        for record in records.iter().filter(|record| is_name(&packet, record.name, &wanted)) {
            match record.data {
                DnsRecordData::A(addr) if kind == DnsQueryType::A => addresses.push(IpAddr::V4(addr)),
                DnsRecordData::Aaaa(addr) if kind == DnsQueryType::Aaaa => addresses.push(IpAddr::V6(addr)),
                DnsRecordData::Cname(target) if hypercall::planted!("dns-compression-loop") => {
                    alias = follow_for_ever(message, target);
                }
                DnsRecordData::Cname(target) => alias = copy_name(&packet, target),
                _ => {}
            }
        }
        match alias {
            Some(alias) if addresses.is_empty() => wanted = alias,
            _ => break,
        }
    }
    addresses.truncate(MAX_ADDRESSES);
    Ok(Some(Answer::Addresses(addresses)))
}
