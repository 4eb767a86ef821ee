//! Disk images with known content, made by the standard tools: what every target must read to the last byte.

use crate::sh::{Result, quiet, work_dir};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An image and the checksums of its files.
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    /// (path without leading slash, lower-case hex)
    pub(crate) sums: Vec<(String, String)>,
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{}: {error}", path.display())
}

/// A number sequence that is the same on every machine (SplitMix64).
pub(crate) struct Sequence(pub(crate) u64);

impl Sequence {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn fill(path: &Path, bytes: usize, sequence: &mut Sequence) -> Result {
    let mut content = Vec::with_capacity(bytes + 8);
    while content.len() < bytes {
        content.extend_from_slice(&sequence.next().to_le_bytes());
    }
    content.truncate(bytes);
    fs::write(path, content).map_err(io(path))
}

/// Writes `files` files with names and sizes of all sorts below `dir`.
fn make_tree(dir: &Path, files: usize, long_names: bool) -> Result {
    let mut sequence = Sequence(42);
    for number in 0..files {
        let mut path = dir.to_path_buf();
        // A few big directories and many small ones.
        match number % 3 {
            0 => path.push("flat"),
            1 => path.push(format!("d{}/e{}", number % 7, number % 31)),
            _ => path.push(format!("package-{:03}", number % 211)),
        }
        fs::create_dir_all(&path).map_err(io(&path))?;
        path.push(match number % 5 {
            0 => format!("{number}.html"),
            1 => format!("file number {number}.txt"),
            2 if long_names => format!("größe-{number}-{}", "x".repeat(80)),
            3 => format!("{number}.tar.gz"),
            _ => format!("copyright{number}"),
        });
        let size = match number % 50 {
            0 => 0,
            1 => 1_000_000 + (sequence.next() % 500_000) as usize,
            2..10 => 4096 * (sequence.next() % 20) as usize,
            _ => (sequence.next() % 6000) as usize,
        };
        fill(&path, size, &mut sequence)?;
    }
    Ok(())
}

/// All regular files below `dir` with their checksums, sorted; also written to `dir/SHA256SUMS`.
fn sum_tree(dir: &Path) -> Result<Vec<(String, String)>> {
    let mut sums = Vec::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next).map_err(io(&next))? {
            let entry = entry.map_err(io(&next))?;
            let path = entry.path();
            let kind = entry.file_type().map_err(io(&path))?;
            // Only names that the list, a URL and every file system can hold.
            let name = path.strip_prefix(dir).ok().and_then(|name| name.to_str()).map(str::to_string);
            if kind.is_dir() {
                todo.push(path);
            } else if let Some(name) = name.filter(|name| kind.is_file() && !name.contains('\n')) {
                sums.push((name, sum_file(&path)?));
            }
        }
    }
    sums.sort();
    let list: String = sums.iter().map(|(name, sum)| format!("{sum}  {name}\n")).collect();
    let path = dir.join("SHA256SUMS");
    fs::write(&path, list).map_err(io(&path))?;
    Ok(sums)
}

pub(crate) fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sum_file(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path).map_err(io(path))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer).map_err(io(path))? {
            0 => return Ok(hex(hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// An ext4 image with Debian's default features of `files` files. Directory `/fat` waits for a mount.
pub(crate) fn ext4(name: &str, files: usize) -> Result<Image> {
    let dir = work_dir("images")?;
    let tree = dir.join(format!("{name}.tree"));
    let _ = fs::remove_dir_all(&tree);
    fs::create_dir_all(tree.join("fat")).map_err(io(&tree))?;
    make_tree(&tree, files, true)?;
    let link = tree.join("link to flat");
    std::os::unix::fs::symlink("flat", &link).map_err(io(&link))?;
    let sums = sum_tree(&tree)?;
    let path = dir.join(format!("{name}.ext4"));
    mkfs_ext4(&tree, &path)?;
    fs::remove_dir_all(&tree).map_err(io(&tree))?;
    Ok(Image { path, sums })
}

/// An ext4 image of `/usr/share/doc`, filled up to over 10,000 files: the issue's real input. `output.sha256` lists them.
pub(crate) fn documentation(output: &Path) -> Result {
    let tree = work_dir("images")?.join("documentation.tree");
    let _ = fs::remove_dir_all(&tree);
    fs::create_dir_all(tree.join("fat")).map_err(io(&tree))?;
    quiet(
        Command::new("cp")
            .args(["-r", "--no-dereference", "--preserve=timestamps", "/usr/share/doc"])
            .arg(&tree),
    )?;
    make_tree(&tree.join("made"), 10_000, true)?;
    let sums = sum_tree(&tree)?;
    mkfs_ext4(&tree, output)?;
    let list = output.with_added_extension("sha256");
    fs::copy(tree.join("SHA256SUMS"), &list).map_err(io(&list))?;
    fs::remove_dir_all(&tree).map_err(io(&tree))?;
    eprintln!("{}: {} files; {}", output.display(), sums.len(), list.display());
    Ok(())
}

fn mkfs_ext4(tree: &Path, path: &Path) -> Result {
    let used = quiet(Command::new("du").args(["-sm", "--apparent-size"]).arg(tree))?;
    let used: u64 =
        String::from_utf8_lossy(&used).split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(64);
    let _ = fs::remove_file(path);
    quiet(
        Command::new("/sbin/mkfs.ext4")
            .args(["-q", "-F", "-L", "anykernel", "-d"])
            .arg(tree)
            .arg(path)
            .arg(format!("{}M", used * 2 + 128)),
    )
    .map(drop)
}

/// A FAT32 image filled by mtools.
pub(crate) fn fat32(name: &str, files: usize) -> Result<Image> {
    let dir = work_dir("images")?;
    let tree = dir.join(format!("{name}.tree"));
    let _ = fs::remove_dir_all(&tree);
    fs::create_dir_all(&tree).map_err(io(&tree))?;
    make_tree(&tree, files, true)?;
    let sums = sum_tree(&tree)?;
    let path = dir.join(format!("{name}.fat"));
    let file = fs::File::create(&path).map_err(io(&path))?;
    file.set_len(96 << 20).map_err(io(&path))?;
    drop(file);
    quiet(Command::new("/sbin/mkfs.fat").args(["-F", "32", "-s", "1", "-n", "ANYKERNEL"]).arg(&path))?;
    let mut copy = Command::new("mcopy");
    copy.args(["-s", "-Q", "-i"]).arg(&path).env("MTOOLS_SKIP_CHECK", "1").env("LC_ALL", "C.UTF-8");
    for entry in fs::read_dir(&tree).map_err(io(&tree))? {
        copy.arg(entry.map_err(io(&tree))?.path());
    }
    quiet(copy.arg("::/"))?;
    fs::remove_dir_all(&tree).map_err(io(&tree))?;
    Ok(Image { path, sums })
}

/// What fsck.fat says of an image: nothing, if it is clean.
pub(crate) fn check_fat(path: &Path) -> Result {
    quiet(Command::new("/sbin/fsck.fat").arg("-n").arg(path)).map(drop)
}
