//! The file allocation table: one entry per cluster, of 12, 16 or 32 bits.
//!
//! Source: fatgen103, "FAT Data Structure".

use super::bpb::{Layout, Width};
use super::bytes::{le16, le32, put};
use crate::cache::CachedDevice;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::{FsError, Result};
use core::ops::Range;
use hypercall::Host;

/// Entries that are read together: whole bytes in every width, and few requests for a walk along a chain.
const WINDOW_ENTRIES: u32 = 2048;

/// Ends a chain, in every width once it is cut to it.
pub(super) const END_OF_CHAIN: u32 = 0x0fff_ffff;

/// What an entry says of its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    Free,
    Next(u32),
    End,
    /// Marked bad, reserved, or not a cluster of this volume.
    Broken,
}

/// The tables of one volume.
pub(super) struct Table<H: Host> {
    pub(super) disk: Arc<CachedDevice<H>>,
    pub(super) layout: Layout,
}

struct Window {
    /// First entry.
    first: u32,
    bytes: Vec<u8>,
    dirty: Option<Range<usize>>,
}

impl<H: Host> Table<H> {
    /// To read or change entries; near ones cost no further access to the cache.
    pub(super) fn cursor(&self) -> Cursor<'_, H> {
        Cursor { table: self, window: None }
    }

    fn window_bytes(&self) -> usize {
        WINDOW_ENTRIES as usize
            * match self.layout.width {
                Width::Fat12 => 3,
                Width::Fat16 => 4,
                Width::Fat32 => 8,
            }
            / 2
    }

    fn load(&self, entry: u32) -> Result<Window> {
        let number = entry / WINDOW_ENTRIES;
        let start = u64::from(number) * self.window_bytes() as u64;
        let left = self.layout.fat_bytes.checked_sub(start).ok_or(FsError::Corrupt)?;
        let len = (self.window_bytes() as u64).min(left) as usize;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(|_| FsError::NoMemory)?;
        bytes.resize(len, 0);
        let copy = u64::from(self.layout.only_fat.unwrap_or(0));
        self.disk.read_at(self.layout.fat_offset + copy * self.layout.fat_bytes + start, &mut bytes)?;
        Ok(Window { first: number * WINDOW_ENTRIES, bytes, dirty: None })
    }

    /// Writes what changed to every copy of the table that is in use.
    fn store(&self, window: &mut Window) -> Result<()> {
        let Some(dirty) = window.dirty.clone() else { return Ok(()) };
        let bytes = window.bytes.get(dirty.clone()).ok_or(FsError::Corrupt)?;
        let number = window.first / WINDOW_ENTRIES;
        let start = u64::from(number) * self.window_bytes() as u64 + dirty.start as u64;
        let copies = match self.layout.only_fat {
            Some(only) => only..only + 1,
            None => 0..self.layout.fats,
        };
        for copy in copies {
            let table = self.layout.fat_offset + u64::from(copy) * self.layout.fat_bytes;
            self.disk.write_at(table + start, bytes)?;
        }
        window.dirty = None;
        Ok(())
    }

    /// What the value of an entry means.
    fn link(&self, value: u32) -> Link {
        let end = match self.layout.width {
            Width::Fat12 => 0xff8,
            Width::Fat16 => 0xfff8,
            Width::Fat32 => 0x0fff_fff8,
        };
        match value {
            0 => Link::Free,
            next if self.layout.is_cluster(next) => Link::Next(next),
            value if value >= end => Link::End,
            _ => Link::Broken,
        }
    }
}

/// A place in the tables.
pub(super) struct Cursor<'a, H: Host> {
    table: &'a Table<H>,
    window: Option<Window>,
}

impl<H: Host> Cursor<'_, H> {
    /// The window with `entry`, and the number of the entry in it.
    fn seek(&mut self, entry: u32) -> Result<(&mut Window, usize)> {
        let known = self
            .window
            .as_ref()
            .is_some_and(|window| window.first / WINDOW_ENTRIES == entry / WINDOW_ENTRIES);
        if !known {
            self.finish()?;
            self.window = Some(self.table.load(entry)?);
        }
        let window = self.window.as_mut().ok_or(FsError::Corrupt)?;
        Ok((window, (entry % WINDOW_ENTRIES) as usize))
    }

    /// The bits of an entry. 0 and 1 are not clusters but have entries.
    pub(super) fn value(&mut self, entry: u32) -> Result<u32> {
        let width = self.table.layout.width;
        let (window, index) = self.seek(entry)?;
        Ok(match width {
            Width::Fat12 => {
                let pair = u32::from(le16(&window.bytes, index * 3 / 2));
                if index.is_multiple_of(2) { pair & 0xfff } else { pair >> 4 }
            }
            Width::Fat16 => u32::from(le16(&window.bytes, index * 2)),
            Width::Fat32 => le32(&window.bytes, index * 4) & 0x0fff_ffff,
        })
    }

    /// Changes an entry. Bits that the width does not have are cut off; the upper four of FAT32 are kept.
    pub(super) fn set(&mut self, entry: u32, value: u32) -> Result<()> {
        let width = self.table.layout.width;
        let (window, index) = self.seek(entry)?;
        let range = match width {
            Width::Fat12 => {
                let at = index * 3 / 2;
                let pair = le16(&window.bytes, at);
                let value = (value & 0xfff) as u16;
                let pair =
                    if index.is_multiple_of(2) { pair & 0xf000 | value } else { pair & 0xf | value << 4 };
                put(&mut window.bytes, at, &pair.to_le_bytes());
                at..at + 2
            }
            Width::Fat16 => {
                put(&mut window.bytes, index * 2, &(value as u16).to_le_bytes());
                index * 2..index * 2 + 2
            }
            Width::Fat32 => {
                let kept = le32(&window.bytes, index * 4) & 0xf000_0000;
                put(&mut window.bytes, index * 4, &(kept | value & 0x0fff_ffff).to_le_bytes());
                index * 4..index * 4 + 4
            }
        };
        let dirty = window.dirty.take().unwrap_or(range.clone());
        window.dirty = Some(dirty.start.min(range.start)..dirty.end.max(range.end));
        Ok(())
    }

    /// What the entry of `cluster` says.
    pub(super) fn link(&mut self, cluster: u32) -> Result<Link> {
        let value = self.value(cluster)?;
        Ok(self.table.link(value))
    }

    /// Writes what was set. Without this call, the last changes are lost.
    pub(super) fn finish(&mut self) -> Result<()> {
        match &mut self.window {
            Some(window) => self.table.store(window),
            None => Ok(()),
        }
    }
}
