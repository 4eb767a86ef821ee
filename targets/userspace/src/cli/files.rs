//! `ls`, `tree`, `stat` and `cat`: looking into images without root. They write nothing to them.

use super::image::{ImagePath, Mounted, Reader, join, shown};
use super::{Outcome, output_failure, size};
use anykernel::fs::{FileKind, Inode, Metadata, OpenOptions, Timestamp};
use anykernel_userspace::{Failure, interrupt};
use clap::Args;
use hypercall::ExitStatus;
use serde_json::json;
use std::io::{BufWriter, Write};
use std::sync::Arc;

pub(super) use super::copy::Cp;

/// How deep `tree` and `ls -R` go. A sound file system is never near; a corrupt one may have loops.
pub(super) const DEEPEST: usize = 256;

fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        _ => "special",
    }
}

/// `-rw-r--r--`, as ls(1) has it.
fn mode_string(metadata: &Metadata) -> String {
    let kind = match metadata.kind {
        FileKind::File => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        _ => '?',
    };
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = metadata.mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, metadata.mode & special != 0) {
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// `2026-11-21 13:05:09`, UTC.
fn date(time: Timestamp) -> String {
    let days = time.seconds.div_euclid(86_400);
    let second = time.seconds.rem_euclid(86_400);
    let (year, month, day) = anykernel::calendar::date(days);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
}

fn to_json(name: &str, metadata: &Metadata, target: Option<String>) -> serde_json::Value {
    let mut value = json!({
        "name": name,
        "kind": kind_name(metadata.kind),
        "size": metadata.size,
        "allocated": metadata.allocated,
        "inode": metadata.inode,
        "mode": format!("{:04o}", metadata.mode),
        "links": metadata.links,
        "uid": metadata.uid,
        "gid": metadata.gid,
        "modified": metadata.modified.seconds,
    });
    if let Some(target) = target {
        value["target"] = target.into();
    }
    value
}

fn link_target(inode: &Arc<dyn Inode>, metadata: &Metadata) -> Option<String> {
    (metadata.kind == FileKind::Symlink)
        .then(|| inode.read_link().map_or_else(|error| format!("({error})"), |target| shown(&target)))
}

/// List a directory of an image
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel ls disk.img                  the root directory
  anykernel ls -l disk.img:/etc          with mode, owner, size and date (UTC)
  anykernel ls -R disk.img:2:/           everything on partition 2
  anykernel ls --json disk.img:/etc      one JSON object per entry
  anykernel ls usb:1-2:/                 the stick at 1-2, without mounting it
  anykernel ls usb:1-2:/ --on rumprun    the same, read by a unikernel that gets the stick
  anykernel ls usb:1-1:/ --on rumprun --usb disk:stick.img
                                         an image as a stick that QEMU plays")]
pub(super) struct Ls {
    /// Where to look
    #[arg(value_name = "IMAGE[:PARTITION]:/PATH", required = true)]
    places: Vec<ImagePath>,
    /// Long: mode, links, owner, size, date
    #[arg(short)]
    long: bool,
    /// Names that begin with a dot, too
    #[arg(short, long)]
    all: bool,
    /// Directories below, too
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Sizes as in 1.4M
    #[arg(short = 'H', long)]
    human: bool,
    /// One JSON object per entry
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reader: Reader,
}

impl Ls {
    pub(super) fn run(self) -> Outcome {
        let mut out = BufWriter::new(std::io::stdout().lock());
        for place in &self.places {
            let mounted = place.mount(false, &self.reader)?;
            let inode = mounted.resolve(&place.path, true)?;
            let metadata = inode.metadata().map_err(|error| mounted.failure(&place.path, error))?;
            if metadata.kind == FileKind::Directory {
                self.directory(&mut out, &mounted, &inode, &place.path, 0)?;
            } else {
                self.entry(&mut out, &place.path, &place.path, &inode, &metadata)?;
            }
            mounted.finish()?;
        }
        out.flush().map_err(output_failure)?;
        Ok(ExitStatus::Success)
    }

    fn directory(
        &self,
        out: &mut impl Write,
        mounted: &Mounted,
        inode: &Arc<dyn Inode>,
        path: &str,
        depth: usize,
    ) -> Result<(), Failure> {
        if self.recursive && !self.json {
            let gap = if depth == 0 { "" } else { "\n" };
            writeln!(out, "{gap}{}:", shown(path.as_bytes())).map_err(output_failure)?;
        }
        let mut below = Vec::new();
        for entry in mounted.entries(inode, path)? {
            if interrupt::interrupted() {
                return Err(Failure::new("interrupted"));
            }
            if !self.all && entry.name.starts_with(b".") {
                continue;
            }
            let full = join(path, &entry.name);
            if self.long || self.json || self.recursive {
                let child = inode.lookup(&entry.name).map_err(|error| mounted.failure(&full, error))?;
                let metadata = child.metadata().map_err(|error| mounted.failure(&full, error))?;
                self.entry(out, &shown(&entry.name), &full, &child, &metadata)?;
                if self.recursive && metadata.kind == FileKind::Directory && depth < DEEPEST {
                    below.push((child, full));
                }
            } else {
                writeln!(out, "{}", shown(&entry.name)).map_err(output_failure)?;
            }
        }
        for (child, full) in below {
            self.directory(out, mounted, &child, &full, depth + 1)?;
        }
        Ok(())
    }

    fn entry(
        &self,
        out: &mut impl Write,
        name: &str,
        path: &str,
        inode: &Arc<dyn Inode>,
        metadata: &Metadata,
    ) -> Result<(), Failure> {
        let target = link_target(inode, metadata);
        let result = if self.json {
            writeln!(out, "{}", to_json(path, metadata, target))
        } else if self.long {
            let length = if self.human { size::human(metadata.size) } else { metadata.size.to_string() };
            let arrow = target.map(|target| format!(" -> {target}")).unwrap_or_default();
            let Metadata { links, uid, gid, .. } = metadata;
            let (mode, date) = (mode_string(metadata), date(metadata.modified));
            writeln!(out, "{mode} {links:>3} {uid:>5} {gid:>5} {length:>10} {date} {name}{arrow}")
        } else {
            writeln!(out, "{name}")
        };
        result.map_err(output_failure)
    }
}

/// Show a directory of an image with everything below it
#[derive(Args)]
#[command(after_help = "Example:
  anykernel tree disk.img:1:/boot")]
pub(super) struct Tree {
    /// Where to begin
    #[arg(value_name = "IMAGE[:PARTITION]:/PATH")]
    place: ImagePath,
    /// Go this many levels down
    #[arg(short = 'L', long, value_name = "N", default_value_t = DEEPEST)]
    levels: usize,
    #[command(flatten)]
    reader: Reader,
}

impl Tree {
    pub(super) fn run(self) -> Outcome {
        let mut out = BufWriter::new(std::io::stdout().lock());
        let mounted = self.place.mount(false, &self.reader)?;
        let root = mounted.resolve(&self.place.path, true)?;
        writeln!(out, "{}", shown(self.place.path.as_bytes())).map_err(output_failure)?;
        let mut count = (0, 0);
        self.below(&mut out, &mounted, &root, &self.place.path, "", &mut count, 1)?;
        writeln!(out, "\n{} directories, {} files", count.0, count.1).map_err(output_failure)?;
        out.flush().map_err(output_failure)?;
        mounted.finish()?;
        Ok(ExitStatus::Success)
    }

    #[expect(clippy::too_many_arguments, reason = "the state of a recursion")]
    fn below(
        &self,
        out: &mut impl Write,
        mounted: &Mounted,
        directory: &Arc<dyn Inode>,
        path: &str,
        indent: &str,
        count: &mut (u64, u64),
        level: usize,
    ) -> Result<(), Failure> {
        if level > self.levels.min(DEEPEST) {
            return Ok(());
        }
        let entries = mounted.entries(directory, path)?;
        let last = entries.len().saturating_sub(1);
        for (i, entry) in entries.iter().enumerate() {
            if interrupt::interrupted() {
                return Err(Failure::new("interrupted"));
            }
            let full = join(path, &entry.name);
            let child = directory.lookup(&entry.name).map_err(|error| mounted.failure(&full, error))?;
            let metadata = child.metadata().map_err(|error| mounted.failure(&full, error))?;
            let (branch, stem) = if i == last { ("└── ", "    ") } else { ("├── ", "│   ") };
            let arrow =
                link_target(&child, &metadata).map(|target| format!(" -> {target}")).unwrap_or_default();
            writeln!(out, "{indent}{branch}{}{arrow}", shown(&entry.name)).map_err(output_failure)?;
            if metadata.kind == FileKind::Directory {
                count.0 += 1;
                self.below(out, mounted, &child, &full, &format!("{indent}{stem}"), count, level + 1)?;
            } else {
                count.1 += 1;
            }
        }
        Ok(())
    }
}

/// Show everything about a file of an image
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel stat disk.img:/etc/hostname
  anykernel stat --json disk.img:/etc/hostname disk.img:/etc/passwd")]
pub(super) struct Stat {
    /// The files
    #[arg(value_name = "IMAGE[:PARTITION]:/PATH", required = true)]
    places: Vec<ImagePath>,
    /// What a symbolic link leads to, instead of the link
    #[arg(short = 'L', long)]
    dereference: bool,
    /// One JSON object per file
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reader: Reader,
}

impl Stat {
    pub(super) fn run(self) -> Outcome {
        let mut out = BufWriter::new(std::io::stdout().lock());
        for place in &self.places {
            let mounted = place.mount(false, &self.reader)?;
            let inode = mounted.resolve(&place.path, self.dereference)?;
            let metadata = inode.metadata().map_err(|error| mounted.failure(&place.path, error))?;
            let target = link_target(&inode, &metadata);
            let result = if self.json {
                writeln!(out, "{}", to_json(&place.path, &metadata, target))
            } else {
                let Metadata { size, allocated, inode, links, uid, gid, .. } = metadata;
                let arrow = target.map(|target| format!(" -> {target}")).unwrap_or_default();
                writeln!(out, "    file: {}{arrow}", shown(place.path.as_bytes()))
                    .and_then(|()| {
                        writeln!(out, "    kind: {} on {}", kind_name(metadata.kind), mounted.kind)
                    })
                    .and_then(|()| writeln!(out, "    size: {size} bytes, {allocated} on the disk"))
                    .and_then(|()| writeln!(out, "   inode: {inode}, {links} links"))
                    .and_then(|()| {
                        writeln!(out, "    mode: {:04o} {}", metadata.mode, mode_string(&metadata))
                    })
                    .and_then(|()| writeln!(out, "   owner: {uid}:{gid}"))
                    .and_then(|()| writeln!(out, "modified: {} UTC", date(metadata.modified)))
                    .and_then(|()| writeln!(out, "accessed: {} UTC", date(metadata.accessed)))
                    .and_then(|()| writeln!(out, " changed: {} UTC", date(metadata.changed)))
            };
            result.map_err(output_failure)?;
            mounted.finish()?;
        }
        out.flush().map_err(output_failure)?;
        Ok(ExitStatus::Success)
    }
}

/// Write files of an image to standard output
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel cat disk.img:/etc/hostname
  anykernel cat disk.img:/var/log/syslog | less")]
pub(super) struct Cat {
    /// The files
    #[arg(value_name = "IMAGE[:PARTITION]:/PATH", required = true)]
    places: Vec<ImagePath>,
    #[command(flatten)]
    reader: Reader,
}

impl Cat {
    pub(super) fn run(self) -> Outcome {
        let mut out = std::io::stdout().lock();
        let mut buf = vec![0; 1 << 20];
        for place in &self.places {
            let mounted = place.mount(false, &self.reader)?;
            let fail = |error| mounted.failure(&place.path, error);
            let file = mounted.names.open(place.path.as_bytes(), OpenOptions::READ).map_err(fail)?;
            if file.metadata().map_err(fail)?.kind == FileKind::Directory {
                return Err(fail(anykernel::fs::FsError::IsDirectory));
            }
            let mut offset = 0;
            loop {
                let n = file.read_at(offset, &mut buf).map_err(fail)?;
                if n == 0 {
                    break;
                }
                out.write_all(&buf[..n]).map_err(output_failure)?;
                offset += n as u64;
            }
            drop(file);
            mounted.finish()?;
        }
        out.flush().map_err(output_failure)?;
        Ok(ExitStatus::Success)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let at = |seconds| date(Timestamp { seconds, nanos: 0 });
        assert_eq!(at(0), "1970-01-01 00:00:00");
        assert_eq!(at(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(at(1_795_266_309), "2026-11-21 13:05:09");
        assert_eq!(at(-1), "1969-12-31 23:59:59");
        at(i64::MAX);
        at(i64::MIN);
    }

    #[test]
    fn modes() {
        let metadata = |kind, mode| Metadata {
            inode: 1,
            kind,
            mode,
            size: 0,
            allocated: 0,
            links: 1,
            uid: 0,
            gid: 0,
            modified: Timestamp::default(),
            accessed: Timestamp::default(),
            changed: Timestamp::default(),
        };
        assert_eq!(mode_string(&metadata(FileKind::File, 0o644)), "-rw-r--r--");
        assert_eq!(mode_string(&metadata(FileKind::Directory, 0o1777)), "drwxrwxrwt");
        assert_eq!(mode_string(&metadata(FileKind::File, 0o4654)), "-rwSr-xr--");
    }
}
