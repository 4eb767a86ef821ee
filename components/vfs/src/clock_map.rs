//! A bounded map that forgets what was not used lately (CLOCK). Under the block cache, the dentry cache and the inode caches.

use alloc::vec::Vec;

const NONE: u32 = u32::MAX;

struct Slot<K, V> {
    hash: u32,
    next: u32,
    referenced: bool,
    /// `None`: free.
    entry: Option<(K, V)>,
}

/// At most `capacity` entries. Callers bring the hash of a key, so that they choose how to compute it, and can look up by
/// parts of a key without building one.
pub(crate) struct ClockMap<K, V> {
    heads: Vec<u32>,
    slots: Vec<Slot<K, V>>,
    free: Vec<u32>,
    hand: usize,
    capacity: usize,
}

impl<K: PartialEq, V> ClockMap<K, V> {
    /// Takes memory as it fills.
    pub(crate) const fn new(capacity: usize) -> Self {
        let capacity = if capacity == 0 { 1 } else { capacity };
        Self { heads: Vec::new(), slots: Vec::new(), free: Vec::new(), hand: 0, capacity }
    }

    fn bucket(&self, hash: u32) -> usize {
        hash as usize & self.heads.len().wrapping_sub(1)
    }

    fn find(&self, hash: u32, is: impl Fn(&K) -> bool) -> Option<u32> {
        let mut at = *self.heads.get(self.bucket(hash))?;
        while let Some(slot) = self.slots.get(at as usize) {
            if slot.hash == hash && slot.entry.as_ref().is_some_and(|(key, _)| is(key)) {
                return Some(at);
            }
            at = slot.next;
        }
        None
    }

    /// The value whose key has this hash and satisfies `is`.
    pub(crate) fn get(&mut self, hash: u32, is: impl Fn(&K) -> bool) -> Option<&mut V> {
        let at = self.find(hash, is)?;
        let slot = self.slots.get_mut(at as usize)?;
        slot.referenced = true;
        slot.entry.as_mut().map(|(_, value)| value)
    }

    /// The same, which does not count as a use.
    pub(crate) fn peek(&mut self, hash: u32, is: impl Fn(&K) -> bool) -> Option<&mut V> {
        let at = self.find(hash, is)?;
        self.slots.get_mut(at as usize)?.entry.as_mut().map(|(_, value)| value)
    }

    /// Adds or replaces. Returns what had to go, for the caller to drop where that may take long. Without memory nothing
    /// is added: this is a cache.
    pub(crate) fn insert(&mut self, hash: u32, key: K, value: V) -> Option<(K, V)> {
        self.insert_beside(hash, key, value, |_| false).unwrap_or_else(Some)
    }

    /// The same where values for which `stays` holds may not go. `Err`: nothing was added, as there is no memory or
    /// every value has to stay.
    pub(crate) fn insert_beside(
        &mut self,
        hash: u32,
        key: K,
        value: V,
        stays: impl Fn(&V) -> bool,
    ) -> Result<Option<(K, V)>, (K, V)> {
        let removed = self.remove(hash, |known| *known == key);
        let mut evicted = None;
        let index = match self.free.pop() {
            Some(index) => index,
            None => match self.grow() {
                Some(index) => index,
                None => {
                    let Some(index) = self.victim(stays) else { return Err((key, value)) };
                    evicted = self.unlink(index);
                    index
                }
            },
        };
        let bucket = self.bucket(hash);
        if let (Some(head), Some(slot)) = (self.heads.get_mut(bucket), self.slots.get_mut(index as usize)) {
            let next = core::mem::replace(head, index);
            *slot = Slot { hash, next, referenced: false, entry: Some((key, value)) };
        }
        Ok(evicted.or(removed))
    }

    /// A new slot. `None`: there are as many as there may be, or there is no memory.
    fn grow(&mut self) -> Option<u32> {
        if self.slots.len() >= self.capacity {
            return None;
        }
        if self.heads.is_empty() {
            let buckets = self.capacity.next_power_of_two();
            self.heads.try_reserve_exact(buckets).ok()?;
            self.heads.resize(buckets, NONE);
        }
        self.slots.try_reserve(1).ok()?;
        self.free.try_reserve(self.slots.len() + 1).ok()?;
        self.slots.push(Slot { hash: 0, next: NONE, referenced: false, entry: None });
        u32::try_from(self.slots.len() - 1).ok()
    }

    fn victim(&mut self, stays: impl Fn(&V) -> bool) -> Option<u32> {
        for _ in 0..2 * self.slots.len() {
            let index = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = self.slots.get_mut(index)?;
            let may_go = slot.entry.as_ref().is_some_and(|(_, value)| !stays(value));
            if may_go && !core::mem::take(&mut slot.referenced) {
                return u32::try_from(index).ok();
            }
        }
        None
    }

    fn unlink(&mut self, index: u32) -> Option<(K, V)> {
        let slot = self.slots.get_mut(index as usize)?;
        let entry = slot.entry.take();
        let (hash, next) = (slot.hash, slot.next);
        let bucket = self.bucket(hash);
        let head = self.heads.get_mut(bucket)?;
        if *head == index {
            *head = next;
            return entry;
        }
        let mut at = *head;
        while let Some(slot) = self.slots.get_mut(at as usize) {
            if slot.next == index {
                slot.next = next;
                break;
            }
            at = slot.next;
        }
        entry
    }

    /// Takes an entry out.
    pub(crate) fn remove(&mut self, hash: u32, is: impl Fn(&K) -> bool) -> Option<(K, V)> {
        let index = self.find(hash, is)?;
        let entry = self.unlink(index);
        self.free.push(index);
        entry
    }

    /// Takes everything out.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = (K, V)> + use<K, V> {
        let slots = core::mem::take(&mut self.slots);
        self.heads = Vec::new();
        self.free = Vec::new();
        self.hand = 0;
        slots.into_iter().filter_map(|slot| slot.entry)
    }

    /// What is in it.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        self.slots.iter_mut().filter_map(|slot| slot.entry.as_mut()).map(|(key, value)| (&*key, value))
    }

    /// Drops those for which `stays` does not hold.
    pub(crate) fn retain(&mut self, mut stays: impl FnMut(&K, &mut V) -> bool) {
        for at in 0..self.slots.len() {
            let Some(slot) = self.slots.get_mut(at) else { return };
            if slot.entry.as_mut().is_some_and(|(key, value)| !stays(key, value))
                && let Ok(index) = u32::try_from(at)
            {
                self.unlink(index);
                self.free.push(index);
            }
        }
    }

    /// Entries in it.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// A hash of a number and a name, for names that strangers choose: `seed` keeps them from choosing collisions.
pub(crate) fn hash_name(seed: u64, number: u64, name: &[u8]) -> u32 {
    let mut state = mix(seed ^ number);
    for chunk in name.chunks(8) {
        let mut word = [0; 8];
        if let Some(part) = word.get_mut(..chunk.len()) {
            part.copy_from_slice(chunk);
        }
        state = mix(state ^ u64::from_le_bytes(word));
    }
    (mix(state ^ name.len() as u64) >> 32) as u32
}

/// Folded 128-bit multiplication: each bit of the input reaches each bit of the result.
fn mix(value: u64) -> u64 {
    let product = u128::from(value ^ 0x2d35_8dcc_aa6c_78a5) * 0x9e37_79b9_7f4a_7c15_u128;
    (product as u64) ^ ((product >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        #[test]
        fn never_tells_a_wrong_value(ops in prop::collection::vec((0..40u32, 0..6u8), 1..400), capacity in 1..32usize) {
            let mut map = ClockMap::new(capacity);
            let mut model = HashMap::new();
            for (at, (key, op)) in ops.into_iter().enumerate() {
                let hash = key % 7;
                match op {
                    0 => {
                        if let Some((gone, _)) = map.insert(hash, key, at) {
                            model.remove(&gone);
                        }
                        model.insert(key, at);
                    }
                    1 => prop_assert_eq!(map.get(hash, |k| *k == key).copied(), model.get(&key).copied()),
                    2 => prop_assert_eq!(map.peek(hash, |k| *k == key).copied(), model.get(&key).copied()),
                    3 => {
                        map.retain(|k, _| k % 8 != key % 8);
                        model.retain(|k, _| k % 8 != key % 8);
                    }
                    4 => {
                        let full = model.len() == capacity && !model.contains_key(&key);
                        let stay = model.values().filter(|value| **value % 2 == 0).count();
                        match map.insert_beside(hash, key, at, |value| value % 2 == 0) {
                            Ok(gone) => {
                                if let Some((gone, value)) = gone {
                                    prop_assert!(gone == key || value % 2 == 1);
                                    model.remove(&gone);
                                }
                                model.insert(key, at);
                            }
                            Err((given, _)) => {
                                prop_assert_eq!(given, key);
                                prop_assert!(full && stay == capacity);
                            }
                        }
                    }
                    _ => prop_assert_eq!(map.remove(hash, |k| *k == key).map(|(_, v)| v), model.remove(&key)),
                }
                prop_assert_eq!(map.len(), model.len());
                prop_assert!(map.len() <= capacity);
                let inside: HashMap<_, _> = map.iter_mut().map(|(key, value)| (*key, *value)).collect();
                prop_assert_eq!(&inside, &model);
            }
            prop_assert_eq!(map.clear().count(), model.len());
            prop_assert_eq!(map.len(), 0);
        }
    }

    #[test]
    fn keeps_what_is_used() {
        let mut map = ClockMap::new(8);
        for key in 0..100u32 {
            map.insert(key, key, ());
            assert!(map.get(0, |k| *k == 0).is_some());
        }
    }

    #[test]
    fn names_hash_apart() {
        let hashes: std::collections::HashSet<_> =
            (0..10_000u32).map(|i| hash_name(1, 2, std::format!("file{i}").as_bytes())).collect();
        assert!(hashes.len() > 9_990);
        assert_ne!(hash_name(1, 2, b"a"), hash_name(1, 2, b"a\0"));
    }
}
