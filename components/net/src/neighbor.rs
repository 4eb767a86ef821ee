//! The neighbour cache of a shard: link addresses of hosts and routers on the link, for ARP and NDP alike.
//!
//! After RFC 4861, 7.3, simplified: an entry is being asked for, or known. A known one is asked again by unicast once it
//! is old and in use, and forgotten when nobody answers. Bounded, because anybody on the link can fill it.

use crate::packet::Mac;
use crate::slab::Key;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use anykernel::nic::TxMeta;
use core::net::IpAddr;

/// Most entries of a shard.
const MAX_ENTRIES: usize = 512;
/// Most entries that are being asked for.
const MAX_INCOMPLETE: usize = 64;
/// Most packets that wait for one answer.
const MAX_WAITING: usize = 4;
/// Questions before giving up, and the time between them (RFC 4861, 10: MAX_MULTICAST_SOLICIT, RETRANS_TIMER).
const TRIES: u8 = 3;
const RETRY_NS: u64 = 1_000_000_000;
/// A known address is asked again after this long (RFC 4861, 10: REACHABLE_TIME).
const FRESH_NS: u64 = 30_000_000_000;

/// Who waits for an address.
#[derive(Default)]
pub(crate) struct Waiting {
    pub(crate) packets: Vec<(Vec<u8>, TxMeta)>,
    pub(crate) flows: Vec<Key>,
}

enum State {
    Incomplete { tries: u8, next_ns: u64, waiting: Waiting },
    Known { mac: Mac, confirmed_ns: u64, probes: u8, next_ns: u64 },
}

/// What is to be done about an entry.
pub(crate) enum Action {
    /// Ask for the address: of everybody, or of this one.
    Solicit(usize, IpAddr, Option<Mac>),
    /// Nobody answered.
    Failed(Waiting),
}

/// The cache.
#[derive(Default)]
pub(crate) struct Neighbors {
    entries: BTreeMap<(usize, IpAddr), State>,
    incomplete: usize,
    /// Nothing is due before this.
    next_ns: Option<u64>,
}

impl Neighbors {
    /// The link address, if it is known. The second value asks for a unicast solicitation: the entry is old.
    pub(crate) fn lookup(&mut self, iface: usize, addr: IpAddr, now_ns: u64) -> Option<(Mac, bool)> {
        match self.entries.get_mut(&(iface, addr))? {
            State::Incomplete { .. } => None,
            State::Known { mac, confirmed_ns, probes, next_ns } => {
                let mut probe = false;
                if now_ns >= *confirmed_ns + FRESH_NS && *probes == 0 {
                    *probes = 1;
                    *next_ns = now_ns + RETRY_NS;
                    probe = true;
                    self.next_ns = Some(self.next_ns.map_or(*next_ns, |due| due.min(*next_ns)));
                }
                Some((*mac, probe))
            }
        }
    }

    /// The entry of an address that is not known, and whether it has to be asked for now. `None`: too many are asked for.
    pub(crate) fn ask(&mut self, iface: usize, addr: IpAddr, now_ns: u64) -> Option<(&mut Waiting, bool)> {
        let mut is_new = false;
        if !self.entries.contains_key(&(iface, addr)) {
            if self.incomplete >= MAX_INCOMPLETE {
                return None;
            }
            self.make_room();
            let next_ns = now_ns + RETRY_NS;
            let state = State::Incomplete { tries: 1, next_ns, waiting: Waiting::default() };
            self.entries.insert((iface, addr), state);
            self.incomplete += 1;
            self.next_ns = Some(self.next_ns.map_or(next_ns, |due| due.min(next_ns)));
            is_new = true;
        }
        match self.entries.get_mut(&(iface, addr))? {
            State::Incomplete { waiting, .. } => Some((waiting, is_new)),
            State::Known { .. } => None,
        }
    }

    /// Somebody said where `addr` is. Entries that exist are updated; one is made only if `create`. Returns who waited.
    pub(crate) fn learn(
        &mut self,
        iface: usize,
        addr: IpAddr,
        mac: Mac,
        create: bool,
        now_ns: u64,
    ) -> Result<Waiting, Unwanted> {
        let known = State::Known { mac, confirmed_ns: now_ns, probes: 0, next_ns: 0 };
        match self.entries.get_mut(&(iface, addr)) {
            Some(state) => match core::mem::replace(state, known) {
                State::Incomplete { waiting, .. } => {
                    self.incomplete -= 1;
                    Ok(waiting)
                }
                State::Known { .. } => Ok(Waiting::default()),
            },
            None if create => {
                self.make_room();
                self.entries.insert((iface, addr), known);
                Ok(Waiting::default())
            }
            None => Err(Unwanted),
        }
    }

    /// Forgets everything about an interface whose addresses changed.
    pub(crate) fn forget(&mut self, iface: usize) {
        self.entries.retain(|(of, _), state| *of != iface || matches!(state, State::Incomplete { .. }));
    }

    /// When [`Neighbors::on_time`] has something to do.
    pub(crate) fn next_deadline_ns(&self) -> Option<u64> {
        self.next_ns
    }

    /// Questions to repeat and entries to give up.
    pub(crate) fn on_time(&mut self, now_ns: u64, actions: &mut Vec<Action>) {
        if self.next_ns.is_none_or(|due| due > now_ns) {
            return;
        }
        let mut next: Option<u64> = None;
        let incomplete = &mut self.incomplete;
        self.entries.retain(|(iface, addr), state| {
            let due = match state {
                State::Incomplete { tries, next_ns, waiting } => {
                    if *next_ns <= now_ns {
                        if *tries >= TRIES {
                            *incomplete -= 1;
                            actions.push(Action::Failed(core::mem::take(waiting)));
                            return false;
                        }
                        *tries += 1;
                        *next_ns =
                            if hypercall::planted!("forgotten-timer") { u64::MAX } else { now_ns + RETRY_NS };
                        actions.push(Action::Solicit(*iface, *addr, None));
                    }
                    *next_ns
                }
                State::Known { probes: 0, .. } => return true,
                State::Known { mac, probes, next_ns, .. } => {
                    if *next_ns <= now_ns {
                        if *probes >= TRIES {
                            return false;
                        }
                        *probes += 1;
                        *next_ns = now_ns + RETRY_NS;
                        actions.push(Action::Solicit(*iface, *addr, Some(*mac)));
                    }
                    *next_ns
                }
            };
            next = Some(next.map_or(due, |next| next.min(due)));
            true
        });
        self.next_ns = next;
    }

    /// Drops the known entry that was confirmed longest ago when the cache is full.
    fn make_room(&mut self) {
        if self.entries.len() < MAX_ENTRIES {
            return;
        }
        let oldest = self
            .entries
            .iter()
            .filter_map(|(key, state)| match state {
                State::Known { confirmed_ns, .. } => Some((*confirmed_ns, *key)),
                State::Incomplete { .. } => None,
            })
            .min();
        if let Some((_, key)) = oldest {
            self.entries.remove(&key);
        }
    }
}

/// An address that nobody here wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unwanted;

impl Waiting {
    /// Keeps a packet; gives it back when enough wait.
    pub(crate) fn push(&mut self, frame: Vec<u8>, meta: TxMeta) -> Result<(), Vec<u8>> {
        if self.packets.len() >= MAX_WAITING {
            return Err(frame);
        }
        self.packets.push((frame, meta));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::Ipv4Addr;

    fn addr(n: u32) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n))
    }

    #[test]
    fn asks_three_times_then_fails() {
        let mut cache = Neighbors::default();
        let (waiting, ask) = cache.ask(0, addr(1), 0).unwrap();
        assert!(ask);
        waiting.push(alloc::vec![1], TxMeta::default()).unwrap();
        assert!(!cache.ask(0, addr(1), 0).unwrap().1);
        let mut solicits = 1;
        let mut failed = 0;
        for second in 1..10 {
            let mut actions = Vec::new();
            cache.on_time(second * RETRY_NS, &mut actions);
            for action in actions {
                match action {
                    Action::Solicit(..) => solicits += 1,
                    Action::Failed(waiting) => failed += waiting.packets.len(),
                }
            }
        }
        assert_eq!((solicits, failed), (3, 1));
        assert_eq!(cache.next_deadline_ns(), None);
    }

    #[test]
    fn a_flood_stays_bounded_and_does_not_push_out_questions() {
        let mut cache = Neighbors::default();
        cache.ask(0, addr(0), 0).unwrap();
        for n in 1..10_000 {
            assert!(cache.learn(0, addr(n), [2; 6], true, u64::from(n)).is_ok());
        }
        assert!(cache.entries.len() <= MAX_ENTRIES);
        assert_eq!(cache.learn(0, addr(0), [1; 6], false, 1).map(|_| ()), Ok(()));
        for n in 20_000..30_000 {
            let _ = cache.ask(0, addr(n), 0);
        }
        assert_eq!(cache.incomplete, MAX_INCOMPLETE);
        assert_eq!(cache.learn(0, addr(40_000), [1; 6], false, 1).map(|_| ()), Err(Unwanted));
    }

    #[test]
    fn an_old_entry_is_probed_and_forgotten() {
        let mut cache = Neighbors::default();
        assert!(cache.learn(0, addr(1), [3; 6], true, 0).is_ok());
        assert_eq!(cache.lookup(0, addr(1), 1), Some(([3; 6], false)));
        assert_eq!(cache.lookup(0, addr(1), FRESH_NS), Some(([3; 6], true)));
        let mut actions = Vec::new();
        for second in 1..5 {
            cache.on_time(FRESH_NS + second * RETRY_NS, &mut actions);
        }
        assert_eq!(actions.len(), 2);
        assert_eq!(cache.lookup(0, addr(1), FRESH_NS), None);
    }
}
