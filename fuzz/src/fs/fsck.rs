//! A checker for FAT volumes (fatgen103), for every execution: what fsck.fat would complain of, in memory.

use std::collections::BTreeSet;

struct Volume<'a> {
    bytes: &'a [u8],
    sector: usize,
    cluster: usize,
    fat: usize,
    copies: usize,
    root: usize,
    root_entries: usize,
    data: usize,
    clusters: u32,
    width: u32,
    used: BTreeSet<u32>,
}

type Result<T> = core::result::Result<T, String>;

fn le16(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Says what is wrong with the volume, if anything. It must have been unmounted cleanly.
pub fn check(bytes: &[u8]) -> Result<()> {
    let sector = le16(bytes, 11) as usize;
    let cluster = sector * usize::from(bytes[13]);
    let fat = le16(bytes, 14) as usize * sector;
    let copies = usize::from(bytes[16]);
    let root_entries = le16(bytes, 17) as usize;
    let total = match le16(bytes, 19) {
        0 => le32(bytes, 32),
        total => total,
    };
    let wide = le16(bytes, 22) == 0;
    let fat_bytes = if wide { le32(bytes, 36) } else { le16(bytes, 22) } as usize * sector;
    let root = fat + copies * fat_bytes;
    let data = root + (root_entries * 32).next_multiple_of(sector);
    let clusters = ((total as usize * sector - data) / cluster) as u32;
    let width = if wide {
        32
    } else if clusters < 4085 {
        12
    } else {
        16
    };
    let mut volume = Volume {
        bytes,
        sector,
        cluster,
        fat,
        copies,
        root,
        root_entries,
        data,
        clusters,
        width,
        used: BTreeSet::new(),
    };
    for copy in 1..volume.copies {
        let of = |copy: usize| &bytes[fat + copy * fat_bytes..][..fat_bytes];
        if of(0) != of(copy) {
            return Err(format!("table {copy} differs from the first"));
        }
    }
    let top = if wide {
        let chain = volume.chain(le32(bytes, 44), "the root")?;
        volume.content(&chain)
    } else {
        bytes[volume.root..volume.root + volume.root_entries * 32].to_vec()
    };
    volume.directory(&top, 0, 0, "")?;
    let lost = (2..volume.clusters + 2)
        .filter(|&n| volume.entry(n) != 0 && !volume.is_bad(n) && !volume.used.contains(&n))
        .count();
    if lost > 0 {
        return Err(format!("{lost} clusters are in no file"));
    }
    if wide {
        let info = le16(bytes, 48) as usize * volume.sector;
        let (free, told) = (volume.clusters - volume.used.len() as u32, le32(bytes, info + 488));
        if told != u32::MAX && told != free {
            return Err(format!("{told} clusters are said to be free, {free} are"));
        }
    }
    Ok(())
}

impl Volume<'_> {
    fn entry(&self, n: u32) -> u32 {
        let fat = &self.bytes[self.fat..];
        let n = n as usize;
        match self.width {
            12 => {
                let pair = le16(fat, n + n / 2);
                if n & 1 == 0 { pair & 0xfff } else { pair >> 4 }
            }
            16 => le16(fat, 2 * n),
            _ => le32(fat, 4 * n) & 0x0fff_ffff,
        }
    }

    fn end(&self) -> u32 {
        (1u32 << if self.width == 32 { 28 } else { self.width }) - 8
    }

    fn is_bad(&self, n: u32) -> bool {
        self.entry(n) == self.end() - 1
    }

    fn chain(&mut self, first: u32, path: &str) -> Result<Vec<u32>> {
        let (mut chain, mut at) = (Vec::new(), first);
        loop {
            if !(2..self.clusters + 2).contains(&at) {
                return Err(format!("{path}: cluster {at} does not exist"));
            }
            if !self.used.insert(at) {
                return Err(format!("{path}: cluster {at} is used twice"));
            }
            chain.push(at);
            match self.entry(at) {
                next if next >= self.end() => return Ok(chain),
                next => at = next,
            }
        }
    }

    fn content(&self, chain: &[u32]) -> Vec<u8> {
        let place = |n: &u32| &self.bytes[self.data + (*n as usize - 2) * self.cluster..][..self.cluster];
        chain.iter().flat_map(place).copied().collect()
    }

    fn directory(&mut self, content: &[u8], own: u32, parent: u32, path: &str) -> Result<()> {
        let mut names = BTreeSet::new();
        let mut long: Vec<&[u8]> = Vec::new();
        for (index, raw) in content.chunks_exact(32).enumerate() {
            if raw[0] == 0 {
                if !long.is_empty() {
                    return Err(format!("{path}: the listing ends inside a long name"));
                }
                return Ok(());
            }
            if raw[0] == 0xe5 {
                if !long.is_empty() {
                    return Err(format!("{path}: a long name without its file"));
                }
                continue;
            }
            if raw[11] & 0x3f == 0x0f {
                long.push(raw);
                continue;
            }
            let name = String::from_utf8_lossy(&raw[..11]).into_owned();
            let here = format!("{path}/{name}");
            check_long(&long, raw).map_err(|what| format!("{here}: {what}"))?;
            long.clear();
            if raw[11] & 8 != 0 {
                continue; // The volume's label.
            }
            if !names.insert(raw[..11].to_vec()) {
                return Err(format!("{here} is there twice"));
            }
            let first = le16(raw, 26) | if self.width == 32 { le16(raw, 20) << 16 } else { 0 };
            let size = le32(raw, 28) as usize;
            if raw[..11] == *b".          " || raw[..11] == *b"..         " {
                let wanted = if index == 0 { own } else { parent };
                if index > 1 || first != wanted {
                    return Err(format!("{here} is cluster {first}, not {wanted}"));
                }
            } else if raw[11] & 16 != 0 {
                let chain = self.chain(first, &here)?;
                let content = self.content(&chain);
                if !content.starts_with(b".          ") || content.get(32..43) != Some(b"..         ") {
                    return Err(format!("{here}: does not begin with . and .."));
                }
                self.directory(&content, first, own, &here)?;
            } else if first == 0 {
                if size != 0 {
                    return Err(format!("{here}: {size} bytes in no cluster"));
                }
            } else {
                let chain = self.chain(first, &here)?;
                if chain.len() != size.div_ceil(self.cluster) {
                    return Err(format!("{here}: {size} bytes in {} clusters", chain.len()));
                }
            }
        }
        Ok(())
    }
}

fn check_long(long: &[&[u8]], short: &[u8]) -> Result<()> {
    let sum = short[..11].iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    for (index, raw) in long.iter().enumerate() {
        let order = (long.len() - index) as u8 | if index == 0 { 0x40 } else { 0 };
        if raw[0] != order || raw[13] != sum {
            return Err(format!("its long name is part {:#x} with sum {:#x}", raw[0], raw[13]));
        }
    }
    Ok(())
}
