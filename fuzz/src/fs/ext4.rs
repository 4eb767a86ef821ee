//! ext4: a good image, changed field by field, with the checksums made right again so that the change is looked at.
//!
//! Layout and checksums are written from the ext4 disk layout documentation of the Linux kernel.

use super::disk::{Changes, Overlay, patch, peek};
use super::images;
use crate::host::FuzzHost;
use crate::input::Input;
use anykernel::Kernel;
use anykernel::config::Config;
use anykernel::fs::FsType;
use anykernel_vfs::ext4::Ext4;
use std::sync::{Arc, OnceLock};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Super,
    Group,
    Inode,
    Directory,
    Extents,
    Index,
    Journal,
}

/// A structure of an image: where it is and whose.
#[derive(Debug, Clone, Copy)]
struct Structure {
    kind: Kind,
    at: usize,
    len: usize,
    inode: u32,
}

struct Image {
    bytes: &'static [u8],
    structures: Vec<Structure>,
    checksums: bool,
    seed: u32,
    inode_bytes: usize,
    group_bytes: usize,
    tables: Vec<usize>,
    inodes_per_group: u32,
}

fn crc32c(mut crc: u32, data: &[u8]) -> u32 {
    static TABLE: OnceLock<[u32; 256]> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        core::array::from_fn(|n| {
            (0..8).fold(n as u32, |c, _| if c & 1 != 0 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 })
        })
    });
    let mut step = |byte: u8| crc = crc >> 8 ^ table[usize::from(crc as u8 ^ byte)];
    // Eight at a time, because each turn of a loop is counted and its end compared.
    let (words, rest) = data.as_chunks::<8>();
    for &[a, b, c, d, e, f, g, h] in words {
        [a, b, c, d, e, f, g, h].into_iter().for_each(&mut step);
    }
    rest.iter().copied().for_each(step);
    crc
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

impl Image {
    /// Finds the structures of a good image.
    fn index(bytes: &'static [u8]) -> Self {
        let sb = &bytes[1024..2048];
        let block = 1024usize << le32(sb, 24);
        let incompat = le32(sb, 0x60);
        let checksums = le32(sb, 0x64) & 0x400 != 0;
        let inode_bytes = usize::from(le16(sb, 0x58));
        let group_bytes = if incompat & 0x80 != 0 { usize::from(le16(sb, 0xfe)) } else { 32 };
        let inodes_per_group = le32(sb, 40);
        let groups = (le32(sb, 0) / inodes_per_group) as usize;
        let descriptors = (le32(sb, 20) as usize + 1) * block;
        let mut image = Self {
            bytes,
            structures: vec![Structure { kind: Kind::Super, at: 1024, len: 1024, inode: 0 }],
            checksums,
            seed: crc32c(!0, &sb[0x68..0x78]),
            inode_bytes,
            group_bytes,
            tables: Vec::new(),
            inodes_per_group,
        };
        for group in 0..groups {
            let at = descriptors + group * group_bytes;
            image.structures.push(Structure { kind: Kind::Group, at, len: group_bytes, inode: group as u32 });
            let table = le32(bytes, at + 8) as usize * block;
            image.tables.push(table);
            for index in 0..inodes_per_group {
                let at = table + index as usize * inode_bytes;
                let inode = group as u32 * inodes_per_group + index + 1;
                let raw = &bytes[at..at + inode_bytes];
                let mode = le16(raw, 0) & 0xf000;
                if mode == 0 || inode < 11 && inode != 2 && inode != 8 {
                    continue;
                }
                image.structures.push(Structure { kind: Kind::Inode, at, len: inode_bytes, inode });
                image.blocks_of(raw, mode, inode, block);
            }
        }
        image
    }

    /// Directory blocks, extent blocks and indirect blocks of an inode.
    fn blocks_of(&mut self, raw: &[u8], mode: u16, inode: u32, block: usize) {
        let kind = match (mode, inode) {
            (0x4000, _) => Some(Kind::Directory),
            (_, 8) => Some(Kind::Journal),
            _ => None,
        };
        let flags = le32(raw, 32);
        let mut add = |kind: Kind, number: u32| {
            let at = number as usize * block;
            if number != 0 && at + block <= self.bytes.len() && self.structures.len() < 4000 {
                self.structures.push(Structure { kind, at, len: block, inode });
            }
        };
        if flags & 0x1000_0000 != 0 {
            return; // In the inode itself.
        }
        if flags & 0x8_0000 != 0 {
            let mut nodes = vec![raw[40..100].to_vec()];
            while let Some(node) = nodes.pop() {
                for entry in 0..usize::from(le16(&node, 2)) {
                    let at = 12 + 12 * entry;
                    if le16(&node, 6) == 0 {
                        // The journal's first blocks are the interesting ones.
                        let most = if inode == 8 { 12 } else { u32::from(le16(&node, at + 4)) };
                        if let Some(kind) = kind {
                            (0..most).for_each(|n| add(kind, le32(&node, at + 8) + n));
                        }
                    } else {
                        let child = le32(&node, at + 4);
                        add(Kind::Extents, child);
                        nodes.push(self.bytes[child as usize * block..][..block].to_vec());
                    }
                }
            }
        } else if mode == 0x4000 || mode == 0x8000 {
            for slot in 0..15 {
                let number = le32(raw, 40 + 4 * slot);
                match kind {
                    Some(kind) if slot < 12 => add(kind, number),
                    _ if slot >= 12 => add(Kind::Index, number),
                    _ => {}
                }
            }
        }
    }

    /// Makes the checksum of a structure right.
    fn fix(&self, changes: &mut Changes, structure: Structure) {
        if !self.checksums {
            return;
        }
        let mut raw = vec![0; structure.len];
        peek(self.bytes, changes, structure.at, &mut raw);
        let end = structure.len;
        let mut put = |at: usize, value: &[u8]| patch(self.bytes, changes, structure.at + at, value);
        match structure.kind {
            Kind::Super => {
                let sum = crc32c(!0, &raw[..0x3fc]);
                put(0x3fc, &sum.to_le_bytes());
            }
            Kind::Group => {
                raw[30..32].fill(0);
                let sum = crc32c(crc32c(self.seed, &structure.inode.to_le_bytes()), &raw[..self.group_bytes]);
                put(30, &(sum as u16).to_le_bytes());
            }
            Kind::Inode => {
                raw[124..126].fill(0);
                let wide = end > 128 && le16(&raw, 128) >= 4;
                if wide {
                    raw[130..132].fill(0);
                }
                let sum = crc32c(self.owner(&structure, le32(&raw, 100)), &raw);
                put(124, &(sum as u16).to_le_bytes());
                if wide {
                    put(130, &((sum >> 16) as u16).to_le_bytes());
                }
            }
            Kind::Directory => {
                let generation = self.generation(structure.inode);
                // The root of an index has its checksum behind its entries, other blocks in a last entry of its own.
                let limit =
                    if le16(&raw, 4) == 12 && raw[6] == 1 && raw[29] == 8 { Some(32usize) } else { None };
                if let Some(at) = limit {
                    let (most, count) = (usize::from(le16(&raw, at)), usize::from(le16(&raw, at + 2)));
                    let tail = at + most * 8;
                    if tail + 8 > end || at + count * 8 > end {
                        return;
                    }
                    let sum = crc32c(self.owner(&structure, generation), &raw[..at + count * 8]);
                    let sum = crc32c(crc32c(sum, &raw[tail..tail + 4]), &[0; 4]);
                    put(tail + 4, &sum.to_le_bytes());
                } else {
                    let sum = crc32c(self.owner(&structure, generation), &raw[..end - 12]);
                    put(end - 4, &sum.to_le_bytes());
                }
            }
            Kind::Extents => {
                let at = 12 + 12 * usize::from(le16(&raw, 4));
                if at + 4 <= end {
                    let sum = crc32c(self.owner(&structure, self.generation(structure.inode)), &raw[..at]);
                    put(at, &sum.to_le_bytes());
                }
            }
            Kind::Index | Kind::Journal => {}
        }
    }

    fn owner(&self, structure: &Structure, generation: u32) -> u32 {
        crc32c(crc32c(self.seed, &structure.inode.to_le_bytes()), &generation.to_le_bytes())
    }

    fn generation(&self, inode: u32) -> u32 {
        let (group, index) = ((inode - 1) / self.inodes_per_group, (inode - 1) % self.inodes_per_group);
        le32(self.bytes, self.tables[group as usize] + index as usize * self.inode_bytes + 100)
    }
}

/// Fields worth changing: offset and length.
fn fields(kind: Kind) -> &'static [(usize, usize)] {
    match kind {
        Kind::Super => &[
            (0, 4),
            (4, 4),
            (12, 4),
            (16, 4),
            (20, 4),
            (24, 4),
            (28, 4),
            (32, 4),
            (36, 4),
            (40, 4),
            (56, 2),
            (58, 2),
            (76, 4),
            (84, 4),
            (88, 2),
            (92, 4),
            (96, 4),
            (100, 4),
            (206, 2),
            (224, 4),
            (254, 2),
            (260, 4),
            (264, 4),
            (336, 4),
            (340, 4),
            (344, 4),
            (350, 2),
            (375, 1),
            (624, 4),
        ],
        Kind::Group => {
            &[(0, 4), (4, 4), (8, 4), (12, 2), (14, 2), (16, 2), (18, 2), (28, 2), (32, 4), (36, 4), (40, 4)]
        }
        Kind::Inode => &[
            (0, 2),
            (4, 4),
            (26, 2),
            (28, 4),
            (32, 4),
            (40, 2),
            (42, 2),
            (44, 2),
            (46, 2),
            (52, 4),
            (56, 2),
            (58, 2),
            (60, 4),
            (64, 4),
            (68, 2),
            (72, 4),
            (88, 4),
            (92, 4),
            (96, 4),
            (100, 4),
            (104, 4),
            (108, 4),
            (128, 2),
            (132, 4),
            (160, 4),
            (164, 4),
            (168, 4),
            (172, 4),
        ],
        Kind::Directory => &[
            (0, 4),
            (4, 2),
            (6, 1),
            (7, 1),
            (8, 4),
            (12, 4),
            (16, 2),
            (18, 1),
            (24, 4),
            (28, 1),
            (29, 1),
            (30, 1),
            (32, 2),
            (34, 2),
            (36, 4),
            (40, 4),
            (44, 4),
            (48, 4),
        ],
        Kind::Extents => {
            &[(0, 2), (2, 2), (4, 2), (6, 2), (12, 4), (16, 2), (18, 2), (20, 4), (24, 4), (28, 2), (32, 4)]
        }
        Kind::Index => &[(0, 4), (4, 4), (8, 4), (64, 4), (1020, 4)],
        Kind::Journal => &[
            (0, 4),
            (4, 4),
            (8, 4),
            (12, 4),
            (16, 4),
            (20, 4),
            (24, 4),
            (28, 4),
            (36, 4),
            (40, 4),
            (64, 4),
            (80, 1),
        ],
    }
}

/// Changes the image as the input says.
fn mutate(image: &Image, input: &mut Input) -> Changes {
    let mut changes = Changes::new();
    let mut count = 0;
    while !input.is_empty() && count < 24 {
        count += 1;
        let structure = image.structures[input.below(image.structures.len())];
        let how = input.u8();
        let (at, len) = if how & 0x80 == 0 {
            let known = fields(structure.kind);
            let (at, len) = known[input.below(known.len())];
            if at + len <= structure.len { (at, len) } else { (0, 4) }
        } else {
            let len = [1, 2, 4, 8][usize::from(how >> 5 & 3)];
            (input.below(structure.len - len + 1), len)
        };
        let mut value = [0; 8];
        peek(image.bytes, &changes, structure.at + at, &mut value[..len]);
        let old = u64::from_le_bytes(value);
        let new = match how & 15 {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => old.wrapping_add(1),
            4 => old.wrapping_sub(1),
            5 => old ^ 1 << (input.u8() & 63),
            6 => 1 << (input.u8() & 63),
            7 => 0x7fff_ffff_7fff,
            8 => old.wrapping_add(input.u8().into()),
            9 => input.u8().into(),
            10 => input.u16().into(),
            11 => input.u32().into(),
            12 => old << 1,
            13 => old >> 1,
            14 => {
                // What another structure says at the same place.
                let other = image.structures[input.below(image.structures.len())];
                peek(image.bytes, &changes, other.at + at.min(other.len - len), &mut value[..len]);
                u64::from_le_bytes(value)
            }
            _ => input.u64(),
        };
        patch(image.bytes, &mut changes, structure.at + at, &new.to_le_bytes()[..len]);
        if how & 0x10 == 0 {
            image.fix(&mut changes, structure);
        }
    }
    changes
}

fn images() -> &'static [Image] {
    static IMAGES: OnceLock<Vec<Image>> = OnceLock::new();
    IMAGES.get_or_init(|| images::ext4().iter().map(|bytes| Image::index(bytes)).collect())
}

/// Mounts and walks; says how many names there were.
fn walk(image: &Image, changes: Changes) -> usize {
    let host = FuzzHost::fresh();
    let kernel = Kernel::new(host, Config::default());
    let kind = Ext4::new(&kernel, super::cache(host));
    let disk: Arc<dyn anykernel::block::BlockDevice> = Overlay::new(image.bytes, changes, true);
    let mut names = 0;
    match kind.mount(Some(disk.clone()), true) {
        Ok(fs) => {
            let _ = fs.stats();
            if let Ok(root) = fs.root() {
                names = super::visit(root);
            }
        }
        Err(_) => {
            let _ = kind.probe(&disk);
            if let Some(line) = kind.explain(&disk) {
                assert!(!line.contains('\n'), "{line:?} is not one line");
            }
        }
    }
    names
}

/// One execution.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let all = images();
    let image = &all[usize::from(input.u8()) % all.len()];
    let changes = mutate(image, &mut input);
    walk(image, changes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_images_are_read_whole_and_their_checksums_are_right() {
        for (number, image) in images().iter().enumerate() {
            let mut changes = Changes::new();
            for structure in &image.structures {
                image.fix(&mut changes, *structure);
            }
            for (sector, content) in &changes {
                assert!(
                    image.bytes[sector * 512..].starts_with(content),
                    "image {number}: sector {sector} was right"
                );
            }
            assert!(walk(image, changes) >= 50, "image {number} has its names");
        }
    }
}
