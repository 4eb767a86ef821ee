//! A directory: its slots, an index of its names, and where there is room for more.

use super::bpb::Root;
use super::chain::{Chain, Extent};
use super::entry::{DELETED, Entry, Found, Parser, SLOT, Seen};
use super::meta::Meta;
use super::name;
use super::volume::{Volume, parse_slots};
use alloc::vec;
use alloc::vec::Vec;
use anykernel::fs::{FsError, Result};
use anykernel::sync::RwLock;
use core::sync::atomic::{AtomicU64, AtomicUsize};
use hypercall::Host;

/// Most slots of a directory (fatgen103: 2 MiB); what is beyond is not looked at.
const MAX_SLOTS: u32 = 65_536;
/// How much of a directory is read at a time.
const READ_BYTES: usize = 16 << 10;

/// A directory.
pub(super) struct Dir<H: Host> {
    /// First cluster; 0: a fixed root.
    pub(super) start: u32,
    /// Byte offset of its entry on the device; 0: the root.
    pub(super) place: AtomicU64,
    /// What the index took when it was made, in bytes.
    pub(super) index_bytes: AtomicUsize,
    pub(super) state: RwLock<H, DirState>,
}

enum Area {
    Fixed { offset: u64, bytes: u32 },
    Chain(Chain),
}

pub(super) struct DirState {
    area: Area,
    /// Removed.
    pub(super) dead: bool,
    index: Option<Index>,
}

/// What is in a directory, by name. Sorted lists, because growing them can be refused when memory is short.
#[derive(Default)]
struct Index {
    /// Both names (long and short) of each entry.
    names: Vec<Name>,
    /// Free slots before `end`: first slot and how many.
    holes: Vec<(u32, u32)>,
    /// All slots from here on are free.
    end: u32,
    /// Entries.
    count: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    hash: u64,
    slot: u32,
    first_slot: u32,
}

impl Index {
    fn names_of(found: &Found) -> [Name; 2] {
        [name::hash(&found.name), name::hash(&name::show_short(&found.entry.short(), 0))].map(|hash| Name {
            hash,
            slot: found.slot,
            first_slot: found.first_slot,
        })
    }

    /// Makes room for one more entry and one more hole, so that `add` and `remove` cannot fail.
    fn reserve(&mut self) -> Result<()> {
        self.names.try_reserve(2).map_err(|_| FsError::NoMemory)?;
        self.holes.try_reserve(2).map_err(|_| FsError::NoMemory)
    }

    fn add(&mut self, found: &Found) {
        for name in Self::names_of(found) {
            if let Err(at) = self.names.binary_search(&name) {
                self.names.insert(at, name);
            }
        }
        self.count += 1;
    }

    fn remove(&mut self, found: &Found) {
        for name in Self::names_of(found) {
            if let Ok(at) = self.names.binary_search(&name) {
                self.names.remove(at);
            }
        }
        self.count = self.count.saturating_sub(1);
        self.add_hole(found.first_slot, found.slot + 1 - found.first_slot);
    }

    /// The entries whose name may be one with this hash.
    fn candidates(&self, hash: u64) -> impl Iterator<Item = Name> + '_ {
        let from = self.names.partition_point(|name| name.hash < hash);
        self.names.iter().skip(from).take_while(move |name| name.hash == hash).copied()
    }

    fn add_hole(&mut self, first: u32, len: u32) {
        let at = self.holes.partition_point(|(other, _)| *other < first);
        let after = self.holes.get(at).copied().filter(|(other, _)| *other == first + len);
        let len = len + after.map_or(0, |(_, len)| len);
        if after.is_some() {
            self.holes.remove(at);
        }
        match at.checked_sub(1).and_then(|before| self.holes.get_mut(before)) {
            Some((before, before_len)) if *before + *before_len == first => *before_len += len,
            _ => self.holes.insert(at, (first, len)),
        }
    }

    /// The first place with `len` free slots; it may reach beyond `end`.
    fn place_for(&self, len: u32) -> u32 {
        let fits = self.holes.iter().find(|(first, hole)| *hole >= len || *first + *hole == self.end);
        fits.map_or(self.end, |(first, _)| *first)
    }

    fn take(&mut self, first: u32, len: u32) {
        if let Ok(at) = self.holes.binary_search_by_key(&first, |(first, _)| *first) {
            let (_, hole) = self.holes.remove(at);
            if hole > len {
                self.holes.insert(at, (first + len, hole - len));
            }
        }
        self.end = self.end.max(first + len);
    }
}

impl<H: Host> Dir<H> {
    /// Reads where the directory is, not yet what is in it.
    pub(super) fn open(volume: &Volume<H>, start: u32, place: u64) -> Result<Self> {
        let area = match volume.table.layout.root {
            Root::Fixed { offset, bytes } if start == 0 => Area::Fixed { offset, bytes },
            _ => {
                let mut chain = Chain::new(start);
                let most = u64::from(MAX_SLOTS) * SLOT as u64;
                let most = most.div_ceil(u64::from(volume.table.layout.cluster_bytes)) as u32;
                chain.extend_to(&volume.table, &volume.meta.read(), most)?;
                Area::Chain(chain)
            }
        };
        let state = DirState { area, dead: false, index: None };
        Ok(Self {
            start,
            place: AtomicU64::new(place),
            index_bytes: AtomicUsize::new(0),
            state: RwLock::new(volume.host, state),
        })
    }
}

impl DirState {
    /// How many slots there is room for now.
    fn capacity<H: Host>(&self, volume: &Volume<H>) -> u32 {
        let slots = match &self.area {
            Area::Fixed { bytes, .. } => u64::from(*bytes) / SLOT as u64,
            Area::Chain(chain) => {
                u64::from(chain.known()) * u64::from(volume.table.layout.cluster_bytes) / SLOT as u64
            }
        };
        slots.min(MAX_SLOTS.into()) as u32
    }

    /// Where the slots from `slot` on are: byte offset, and bytes in one piece.
    fn run<H: Host>(&self, volume: &Volume<H>, slot: u32, len: usize) -> Result<(u64, usize)> {
        let at = u64::from(slot) * SLOT as u64;
        let run = match &self.area {
            Area::Fixed { offset, bytes } => {
                let left = u64::from(*bytes).checked_sub(at).ok_or(FsError::Corrupt)?;
                Some((offset + at, len.min(left as usize)))
            }
            Area::Chain(chain) => chain.run(&volume.table, at, len).map(|run| (run.offset, run.len)),
        };
        run.filter(|(_, len)| *len >= SLOT).ok_or(FsError::Corrupt)
    }

    /// The byte offset of a slot.
    pub(super) fn place<H: Host>(&self, volume: &Volume<H>, slot: u32) -> Result<u64> {
        self.run(volume, slot, SLOT).map(|(offset, _)| offset)
    }

    /// The clusters, for when the directory is removed.
    pub(super) fn extents(&self) -> Vec<Extent> {
        match &self.area {
            Area::Fixed { .. } => Vec::new(),
            Area::Chain(chain) => chain.extents().collect(),
        }
    }

    /// Bytes on the device.
    pub(super) fn bytes<H: Host>(&self, volume: &Volume<H>) -> u64 {
        match &self.area {
            Area::Fixed { bytes, .. } => u64::from(*bytes),
            Area::Chain(chain) => u64::from(chain.known()) * u64::from(volume.table.layout.cluster_bytes),
        }
    }

    /// Shows the slots from `slot` on to `sink`, until it returns `false` or the directory ends.
    pub(super) fn scan<H: Host>(
        &self,
        volume: &Volume<H>,
        meta: &Meta,
        slot: u32,
        sink: &mut dyn FnMut(u32, Seen) -> bool,
    ) -> Result<()> {
        let capacity = self.capacity(volume);
        let mut parser = Parser::new();
        let mut slot = slot;
        let mut buf = vec![0; READ_BYTES];
        while slot < capacity {
            let most = ((capacity - slot) as usize * SLOT).min(READ_BYTES);
            let (offset, len) = self.run(volume, slot, most)?;
            let piece = buf.get_mut(..len).ok_or(FsError::Corrupt)?;
            volume.read_meta(meta, offset, piece)?;
            if !parse_slots(&mut parser, slot, piece, sink) {
                return Ok(());
            }
            slot += (len / SLOT) as u32;
        }
        Ok(())
    }

    /// Bytes that the index takes.
    pub(super) fn index_bytes(&self) -> usize {
        let bytes = |index: &Index| {
            index.names.capacity() * size_of::<Name>() + index.holes.capacity() * size_of::<(u32, u32)>()
        };
        self.index.as_ref().map_or(0, bytes)
    }

    /// Whether the index is there; [`DirState::build_index`] makes it.
    pub(super) fn is_indexed(&self) -> bool {
        self.index.is_some()
    }

    pub(super) fn build_index<H: Host>(&mut self, volume: &Volume<H>, meta: &Meta) -> Result<()> {
        if self.index.is_some() {
            return Ok(());
        }
        let mut index = Index { end: self.capacity(volume), ..Index::default() };
        let mut room = Ok(());
        self.scan(volume, meta, 0, &mut |slot, seen| {
            room = index.reserve();
            match seen {
                _ if room.is_err() => {}
                Seen::Entry(found) => {
                    // Put in order at the end.
                    index.names.extend(Index::names_of(&found));
                    index.count += 1;
                }
                Seen::Free => index.add_hole(slot, 1),
                Seen::End => index.end = slot,
                Seen::Part | Seen::Label(_) => {}
            }
            room.is_ok()
        })?;
        room?;
        index.names.sort_unstable();
        index.names.dedup();
        self.index = Some(index);
        Ok(())
    }

    fn index(&self) -> Result<&Index> {
        self.index.as_ref().ok_or(FsError::Corrupt)
    }

    fn index_mut(&mut self) -> Result<&mut Index> {
        self.index.as_mut().ok_or(FsError::Corrupt)
    }

    pub(super) fn is_empty(&self) -> Result<bool> {
        Ok(self.index()?.count == 0)
    }

    /// The entry called `name`, in capitals or not, by its long or its short name.
    pub(super) fn find<H: Host>(&self, volume: &Volume<H>, meta: &Meta, name: &str) -> Result<Option<Found>> {
        for candidate in self.index()?.candidates(name::hash(name)) {
            let found = self.read(volume, meta, candidate.first_slot, candidate.slot)?;
            if let Some(found) = found
                && (name::same(&found.name, name)
                    || name::same(&name::show_short(&found.entry.short(), 0), name))
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The entry whose slots are `first` to `slot`.
    fn read<H: Host>(&self, volume: &Volume<H>, meta: &Meta, first: u32, slot: u32) -> Result<Option<Found>> {
        let mut parser = Parser::new();
        for at in first..=slot {
            let mut bytes = [0; SLOT];
            volume.read_meta(meta, self.place(volume, at)?, &mut bytes)?;
            if let Seen::Entry(found) = parser.feed(at, &bytes) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Adds an entry of which the name was found to be free. Returns its slot. On an error nothing is added.
    pub(super) fn insert<H: Host>(
        &mut self,
        volume: &Volume<H>,
        meta: &mut Meta,
        name: &str,
        slots: &[[u8; SLOT]],
    ) -> Result<Found> {
        let len = slots.len() as u32;
        self.index_mut()?.reserve()?;
        let first = self.index()?.place_for(len);
        let end = first + len;
        while self.capacity(volume) < end {
            self.grow(volume, meta)?;
        }
        for (slot, bytes) in (first..).zip(slots) {
            volume.write_meta(meta, self.place(volume, slot)?, bytes)?;
        }
        if end > self.index()?.end && end < self.capacity(volume) {
            // What is behind the last entry may be anything; it was hidden by the end mark that is now overwritten.
            volume.write_meta(meta, self.place(volume, end)?, &[0])?;
        }
        let entry = Entry(slots.last().copied().ok_or(FsError::Invalid)?);
        let found = Found { slot: end - 1, first_slot: first, entry, name: name.into() };
        let index = self.index_mut()?;
        index.take(first, len);
        index.add(&found);
        Ok(found)
    }

    /// Adds a cluster of free slots.
    fn grow<H: Host>(&mut self, volume: &Volume<H>, meta: &mut Meta) -> Result<()> {
        let full = self.capacity(volume) >= MAX_SLOTS;
        let Area::Chain(chain) = &mut self.area else { return Err(FsError::NoSpace) };
        let tail = chain.last().filter(|_| !full).ok_or(FsError::NoSpace)?;
        let extents = volume.allocate(meta, 1, Some(tail))?;
        let Some(extent) = extents.first().copied() else { return Err(FsError::NoSpace) };
        let layout = &volume.table.layout;
        volume.table.disk.zero(layout.cluster_offset(extent.cluster), layout.cluster_bytes.into())?;
        volume.link_later(meta, tail, extent.cluster)?;
        chain.push(extent)
    }

    /// Removes an entry.
    pub(super) fn remove<H: Host>(
        &mut self,
        volume: &Volume<H>,
        meta: &mut Meta,
        found: &Found,
    ) -> Result<()> {
        self.index_mut()?.reserve()?;
        for slot in found.first_slot..=found.slot {
            volume.write_meta(meta, self.place(volume, slot)?, &[DELETED])?;
        }
        self.index_mut()?.remove(found);
        Ok(())
    }

    /// Changes an entry in place; its name stays.
    pub(super) fn update<H: Host>(
        &self,
        volume: &Volume<H>,
        meta: &mut Meta,
        found: &Found,
        entry: &Entry,
    ) -> Result<()> {
        volume.write_meta(meta, self.place(volume, found.slot)?, &entry.0)
    }
}
