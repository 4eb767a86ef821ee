//! A small FAT volume, made here so that a scenario needs no tools.

const SECTOR: usize = 512;
const FAT_SECTORS: usize = 6;
const ROOT_ENTRIES: usize = 128;
const SECTORS: usize = 2048;

/// An empty FAT12 volume of 1 MiB (Microsoft "FAT: General Overview of On-Disk Format" 1.03, "Boot Sector and BPB").
pub(super) fn fat() -> Vec<u8> {
    let mut image = vec![0; SECTORS * SECTOR];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0xeb, 0x3c, 0x90]);
    put(3, b"ANYKERNL");
    put(11, &(SECTOR as u16).to_le_bytes());
    // One sector in a cluster, one reserved, two tables.
    put(13, &[1, 1, 0, 2]);
    put(17, &(ROOT_ENTRIES as u16).to_le_bytes());
    put(19, &(SECTORS as u16).to_le_bytes());
    put(21, &[0xf8]);
    put(22, &(FAT_SECTORS as u16).to_le_bytes());
    put(24, &[32, 0, 2, 0]);
    put(36, &[0x80, 0, 0x29, 1, 2, 3, 4]);
    put(43, b"SIMULATION ");
    put(54, b"FAT12   ");
    put(510, &[0x55, 0xaa]);
    for table in 0..2 {
        put((1 + table * FAT_SECTORS) * SECTOR, &[0xf8, 0xff, 0xff]);
    }
    image
}
