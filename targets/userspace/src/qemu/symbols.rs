//! Packing an image for bare metal: what is loaded, and a table with the names of all functions for its backtraces.
//!
//! The linker cannot make that table, as it has to come after linking. The image has room for it after its data, and a
//! word pair `SYMBOL_TABLE` that says where it is. The format is that of `symbols.rs` in the rumprun target.

use object::elf::{FileHeader64, PF_R, PT_LOAD, ProgramHeader64};
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::{LittleEndian, Object, ObjectSymbol, U32, U64};
use std::collections::BTreeMap;

type Header = FileHeader64<LittleEndian>;
type Segment = ProgramHeader64<LittleEndian>;

const PAGE: u64 = 4096;
/// Longest name that is kept, in bytes.
const MAX_NAME: usize = 120;

/// Why an ELF file cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// Not an ELF file, or damaged.
    #[error("not a sound ELF file: {0}")]
    Elf(#[from] object::Error),
    /// It was not linked as an image.
    #[error("not an image of the rumprun target: it has no symbol {0}")]
    Missing(&'static str),
    /// No room for one more segment header.
    #[error("no room for a program header")]
    NoRoom,
}

/// The table: functions by distance from the image's start.
fn table(functions: &BTreeMap<u32, String>) -> Vec<u8> {
    let mut names = Vec::new();
    let mut known: BTreeMap<&str, u32> = BTreeMap::new();
    let mut out = (functions.len() as u32).to_le_bytes().to_vec();
    let names_at = 4 + 8 * functions.len() as u32;
    for (distance, name) in functions {
        let at = *known.entry(name).or_insert_with(|| {
            let at = names_at + names.len() as u32;
            names.push(name.len() as u8);
            names.extend(name.as_bytes());
            at
        });
        out.extend(distance.to_le_bytes());
        out.extend(at.to_le_bytes());
    }
    out.extend(names);
    out
}

/// A name as a person writes it, without hash, cut to [`MAX_NAME`].
fn shown(mangled: &str) -> String {
    let mut name = format!("{:#}", rustc_demangle::demangle(mangled));
    let mut end = name.len().min(MAX_NAME);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    name
}

/// Packs `elf`, an image as the linker left it.
pub fn pack(elf: &[u8]) -> Result<Vec<u8>, PackError> {
    let file = ElfFile64::<LittleEndian>::parse(elf)?;
    let address = |name: &'static str| {
        file.symbol_by_name(name).map(|symbol| symbol.address()).ok_or(PackError::Missing(name))
    };
    let (start, text_end, end) = (address("image_start")?, address("text_end")?, address("image_end")?);
    let pointer = address("SYMBOL_TABLE")?;
    let functions: BTreeMap<u32, String> = file
        .symbols()
        .filter(|symbol| (start..text_end).contains(&symbol.address()))
        .filter_map(|symbol| Some((symbol.address(), symbol.name().ok()?)))
        .filter(|(_, name)| !name.is_empty() && !matches!(*name, "image_start" | "text_end"))
        .map(|(address, name)| ((address - start) as u32, shown(name)))
        .collect();
    let table = table(&functions);

    let endian = LittleEndian;
    let header = Header::parse(elf)?;
    let segments = header.program_headers(endian, elf)?;
    let loaded: Vec<&Segment> = segments.iter().filter(|segment| segment.p_type(endian) == PT_LOAD).collect();
    let data_end = loaded.iter().map(|s| s.p_offset(endian) + s.p_filesz(endian)).max().unwrap_or(0);
    let data_start = loaded.iter().map(|s| s.p_offset(endian)).min().unwrap_or(0);
    let headers_end = header.e_phoff(endian) + ((segments.len() + 1) * size_of::<Segment>()) as u64;
    if headers_end > data_start {
        return Err(PackError::NoRoom);
    }
    let mut out = elf.get(..data_end as usize).ok_or(PackError::Missing("segments"))?.to_vec();
    let place = data_end.next_multiple_of(PAGE);
    out.resize(place as usize, 0);
    out.extend(&table);

    // Where an address of the image is in the file.
    let in_file = |address: u64| {
        loaded
            .iter()
            .find(|s| (s.p_vaddr(endian)..s.p_vaddr(endian) + s.p_filesz(endian)).contains(&address))
            .map(|s| (address - s.p_vaddr(endian) + s.p_offset(endian)) as usize)
    };
    let slot = in_file(pointer).ok_or(PackError::Missing("SYMBOL_TABLE"))?;
    let words = [end, end + table.len() as u64].map(u64::to_le_bytes);
    out.get_mut(slot..slot + 16)
        .ok_or(PackError::Missing("SYMBOL_TABLE"))?
        .copy_from_slice(words.as_flattened());

    // Program headers: as they were, and one for the table. What is loaded at `end` lies as far from its physical address
    // as the rest of the image.
    let distance = loaded.first().map_or(0, |s| s.p_vaddr(endian).wrapping_sub(s.p_paddr(endian)));
    let segment = Segment {
        p_type: U32::new(endian, PT_LOAD),
        p_flags: U32::new(endian, PF_R),
        p_offset: U64::new(endian, place),
        p_vaddr: U64::new(endian, end),
        p_paddr: U64::new(endian, end.wrapping_sub(distance)),
        p_filesz: U64::new(endian, table.len() as u64),
        p_memsz: U64::new(endian, table.len() as u64),
        p_align: U64::new(endian, PAGE),
    };
    let at = header.e_phoff(endian) as usize + size_of_val(segments);
    out[at..at + size_of::<Segment>()].copy_from_slice(object::bytes_of(&segment));
    let mut header = *header;
    header.e_phnum.set(endian, segments.len() as u16 + 1);
    // Sections are the linker's business, and gone.
    header.e_shoff.set(endian, 0);
    header.e_shnum.set(endian, 0);
    header.e_shstrndx.set(endian, 0);
    out[..size_of::<Header>()].copy_from_slice(object::bytes_of(&header));
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_equal_names() {
        let functions = [(0, "a"), (4, "b"), (8, "a")].map(|(at, name)| (at, name.to_string())).into();
        let table = table(&functions);
        assert_eq!(table.len(), 4 + 3 * 8 + 4);
        assert_eq!(table[8..12], table[24..28]);
    }

    #[test]
    fn names_are_readable_and_short() {
        assert_eq!(shown("_ZN4core3fmt5Write9write_fmt17h0123456789abcdefE"), "core::fmt::Write::write_fmt");
        assert_eq!(shown("plain"), "plain");
        assert_eq!(shown(&"ä".repeat(100)).len(), MAX_NAME);
    }

    #[test]
    fn refuses_what_is_no_image() {
        assert!(matches!(pack(b"no ELF"), Err(PackError::Elf(_))));
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(matches!(pack(&program), Err(PackError::Missing("image_start"))));
    }
}
