//! The image under measurement: one large file and a tree of many small ones.

use crate::runner::{Result, run};
use std::fs::{self, File};
use std::io::{Error, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes of the large file, `/big`.
pub(super) const BIG_BYTES: u64 = 1 << 30;
/// Directories below `/small`.
const DIRECTORIES: usize = 100;
/// Files in each of them.
const FILES: usize = 100;
/// Files of the tree `/small`.
pub(super) const SMALL_FILES: usize = DIRECTORIES * FILES;

/// Bytes that neither are zeros nor compress: a hole needs no reading.
fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Half of them 1 KiB, a quarter 2 KiB, up to 256 KiB; 5 KiB in the mean, as in a tree of sources.
fn small_len(index: u32) -> usize {
    let byte = (index.wrapping_mul(2_654_435_761) >> 24) as u8;
    1024 << byte.leading_zeros()
}

fn tree(root: &Path) -> std::io::Result<()> {
    let block = noise(1 << 20);
    fs::create_dir_all(root)?;
    let mut big = File::create(root.join("big"))?;
    for _ in 0..BIG_BYTES >> 20 {
        big.write_all(&block)?;
    }
    for directory in 0..DIRECTORIES {
        let path = root.join("small").join(format!("directory{directory:02}"));
        fs::create_dir_all(&path)?;
        for file in 0..FILES {
            let len = small_len((directory * FILES + file) as u32);
            fs::write(path.join(format!("file{file:02}")), &block[..len])?;
        }
    }
    Ok(())
}

/// Makes it in `dir`, which has 2.5 GiB of room.
pub(super) fn make(dir: &Path) -> Result<PathBuf> {
    let line = |error: Error| format!("{}: {error}", dir.display());
    let (root, image) = (dir.join("tree"), dir.join("bench.ext4"));
    tree(&root).map_err(line)?;
    run(Command::new("/sbin/mkfs.ext4").args(["-q", "-F", "-d"]).arg(&root).arg(&image).arg("1300M"))?;
    fs::remove_dir_all(&root).map_err(line)?;
    Ok(image)
}
