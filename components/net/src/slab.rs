//! Numbered slots whose numbers are reused only with a new generation.

use alloc::vec::Vec;

/// Names an entry of one slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) index: u32,
    generation: u32,
}

struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// A growing table of `T`.
pub(crate) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Adds `value`; gives it back when there is no memory for the table.
    pub(crate) fn insert(&mut self, value: T) -> Result<Key, T> {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                // Room in `free` for every slot, so that removing never allocates.
                let slots = self.slots.len() + 1;
                if self.slots.try_reserve(1).is_err()
                    || self.free.try_reserve(slots.saturating_sub(self.free.len())).is_err()
                {
                    return Err(value);
                }
                self.slots.push(Slot { generation: 0, value: None });
                (slots - 1) as u32
            }
        };
        let Some(slot) = self.slots.get_mut(index as usize) else { return Err(value) };
        slot.value = Some(value);
        Ok(Key { index, generation: slot.generation })
    }

    pub(crate) fn get(&self, key: Key) -> Option<&T> {
        self.slots.get(key.index as usize).filter(|slot| slot.generation == key.generation)?.value.as_ref()
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        self.slots
            .get_mut(key.index as usize)
            .filter(|slot| slot.generation == key.generation)?
            .value
            .as_mut()
    }

    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.index as usize).filter(|slot| slot.generation == key.generation)?;
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(key.index);
        Some(value)
    }

    /// Takes a value out but keeps its slot, for [`Slab::put_back`].
    pub(crate) fn remove_for(&mut self, key: Key) -> Option<T> {
        self.slots.get_mut(key.index as usize).filter(|slot| slot.generation == key.generation)?.value.take()
    }

    /// Puts back what [`Slab::remove_for`] took.
    pub(crate) fn put_back(&mut self, key: Key, value: T) {
        if let Some(slot) = self.slots.get_mut(key.index as usize) {
            slot.value = Some(value);
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            Some((Key { index: index as u32, generation: slot.generation }, slot.value.as_ref()?))
        })
    }
}
