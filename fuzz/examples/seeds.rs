//! Makes the images of `images/` with mkfs.ext4, debugfs, e2fsck, mkfs.fat, mtools and sfdisk, and the seeds of
//! `corpus/`. Run in `fuzz/`: `cargo run --no-default-features --example seeds`. Needs e2fsprogs, dosfstools, mtools, fdisk.
//!
//! `seeds --pcap FILE` adds the frames of a capture (`anykernel run --pcap`, tcpdump) to the seeds of `frames`, and
//! `seeds --recording NAME.rec` some records of a recording (`anykernel run --record`) to those of `recording`, as `NAME-0` and on.

use anykernel_fuzz::fs::images::pack;
use hypercall::layers::recorded::{MAGIC, Record, take_chunk};
use std::path::{Path, PathBuf};
use std::process::Command;

type Result<T> = std::result::Result<T, String>;

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("MTOOLS_SKIP_CHECK", "1")
        // The same image from the same tree, every time.
        .env("E2FSPROGS_FAKE_TIME", "1700000000")
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .output()
        .map_err(|error| format!("{program}: {error}; apt-get install e2fsprogs dosfstools mtools fdisk"))?;
    // e2fsck says with 1 that it changed something, as it was asked to.
    let good = output.status.success() || program == "e2fsck" && output.status.code() == Some(1);
    let said = String::from_utf8_lossy(&output.stderr);
    if good { Ok(()) } else { Err(format!("{program} {}: {said}", arguments.join(" "))) }
}

fn write(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    std::fs::write(path, content).map_err(|error| format!("{}: {error}", path.display()))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Fifty files and directories of all kinds.
fn make_tree(top: &Path) -> Result<()> {
    let io = |error: std::io::Error| error.to_string();
    std::fs::create_dir_all(top.join("a/b/c")).map_err(io)?;
    std::fs::create_dir_all(top.join("many")).map_err(io)?;
    for number in 0..40usize {
        write(&top.join(format!("many/file {number}")), vec![b'x'; number * 37])?;
    }
    write(&top.join("a/large"), vec![7; 60_000])?;
    write(&top.join("a/b/c/small"), "small")?;
    write(&top.join("empty"), "")?;
    let sparse = std::fs::File::create(top.join("a/sparse")).map_err(io)?;
    for at in 0..12 {
        std::os::unix::fs::FileExt::write_at(&sparse, b"data", at * 20_000).map_err(io)?;
    }
    std::os::unix::fs::symlink("../a/large", top.join("a/link")).map_err(io)?;
    std::os::unix::fs::symlink("x/".repeat(60), top.join("a/slow")).map_err(io)
}

/// What sound USB devices send.
fn usb_seeds(put: &dyn Fn(&str, &str, &[u8]) -> Result<()>) -> Result<()> {
    let device = [18, 1, 0, 2, 0, 0, 0, 64, 9, 18, 1, 0, 0, 1, 1, 2, 3, 1];
    put("usb_descriptors", "device", &device)?;
    let storage = [
        9, 2, 44, 0, 1, 1, 0, 128, 50, 9, 4, 0, 0, 2, 8, 6, 80, 0, 7, 5, 129, 2, 0, 4, 0, 6, 48, 15, 0, 0, 0,
        7, 5, 2, 2, 0, 4, 0, 6, 48, 15, 0, 0, 0,
    ];
    put("usb_descriptors", "storage", &storage)?;
    put("usb_descriptors", "string", &[8, 3, b'a', 0, 0x3d, 0xd8, 0, 0xde])?;
    // No lies; then time, keys, frames, reads and writes, and each device pulled out and plugged in.
    let honest = [
        0, 0, 2, 7, 0, 0, 4, 0, 0, 0, 0, 0, 8, 60, 0, 9, 9, 1, 10, 0, 16, 0, 0, 11, 0, 8, 0, 8, 1, 3, 1, 1,
        5, 1, 2, 5, 0, 2, 11, 0, 16, 5, 4, 2, 9, 9, 3, 2, 5, 2, 1,
    ];
    put("usb_devices", "honest", &honest)?;
    for lie in [0xc0, 0xe0, 0xe8, 0xf0, 0xf4, 0xf7, 0xfb, 0xfd, 0xff] {
        let mut lies = [0; 64];
        lies.iter_mut().skip(usize::from(lie) % 11).step_by(11).for_each(|byte| *byte = lie);
        put("usb_devices", &format!("lie-{lie:02x}"), &[&[64, 0][..], &lies, &honest[2..]].concat())?;
    }
    let keyboard = [
        5, 1, 9, 6, 161, 1, 5, 7, 25, 224, 41, 231, 21, 0, 37, 1, 117, 1, 149, 8, 129, 2, 149, 1, 117, 8,
        129, 1, 149, 6, 117, 8, 21, 0, 37, 101, 5, 7, 25, 0, 41, 101, 129, 0, 192,
    ];
    let reports = [8, 2, 0, 4, 0, 0, 0, 0, 0, 8, 0, 0, 1, 1, 1, 1, 1, 1, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    put("usb_hid", "keyboard", &[&[keyboard.len() as u8], &keyboard[..], &reports[..]].concat())?;
    let mouse = [
        5, 1, 9, 2, 161, 1, 133, 5, 5, 9, 25, 1, 41, 3, 21, 0, 37, 1, 149, 3, 117, 1, 129, 2, 149, 1, 117, 5,
        129, 3, 5, 1, 9, 48, 9, 49, 21, 129, 37, 127, 117, 8, 149, 2, 129, 6, 192,
    ];
    put("usb_hid", "mouse", &[&[mouse.len() as u8], &mouse[..], &[4, 5, 1, 10, 246]].concat())?;
    put("usb_hub", "usb2", &[9, 41, 4, 0, 0, 10, 0, 0, 255, 3, 5, 1, 0])?;
    put("usb_hub", "usb3", &[12, 42, 4, 0, 0, 10, 0, 0, 0, 0, 0, 0, 3, 2, 17, 0])?;
    let block = [
        b'N', b'C', b'M', b'H', 12, 0, 1, 0, 48, 0, 28, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
        16, b'N', b'C', b'M', b'0', 20, 0, 0, 0, 12, 0, 8, 0, 20, 0, 8, 0, 0, 0, 0, 0,
    ];
    put("usb_ncm", "block", &block)?;
    let parameters = [28, 0, 1, 0, 0, 64, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0, 0, 32, 0, 0, 4, 0, 2, 0, 4, 0, 0, 0];
    let (head, rest) = block.split_at(8);
    // As long as the transfer, parameters and all.
    put("usb_ncm", "again", &[head, &[0, 0], &rest[2..], &parameters[..]].concat())?;
    put("usb_storage", "status", &[7, 0, 0, 0, b'U', b'S', b'B', b'S', 7, 0, 0, 0, 0, 0, 0, 0, 0])?;
    put("usb_storage", "sense", &[0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x28, 0, 0, 0, 0, 0])?;
    let inquiry = b"\0\x80\x04\x02\x1f\0\0\0QEMU    QEMU HARDDISK   2.5+";
    put("usb_storage", "inquiry", inquiry)?;
    put("usb_storage", "capacity", &[0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 2, 0])
}

struct Maker {
    scratch: PathBuf,
    images: PathBuf,
}

impl Maker {
    fn keep(&self, name: &str) -> Result<()> {
        let image = std::fs::read(self.scratch.join("image")).map_err(|error| error.to_string())?;
        write(&self.images.join(format!("{name}.img")), pack(&image))
    }

    fn fresh(&self, bytes: u64) -> Result<PathBuf> {
        let path = self.scratch.join("image");
        let file = std::fs::File::create(&path).map_err(|error| error.to_string())?;
        file.set_len(bytes).map_err(|error| error.to_string())?;
        Ok(path)
    }

    fn ext4(&self, name: &str, options: &[&str], size: &str, tree: &Path) -> Result<()> {
        let path = self.scratch.join("image");
        let _ = std::fs::remove_file(&path);
        let uuid = "01234567-89ab-cdef-0123-456789abcdef";
        let mut arguments =
            vec!["-q", "-F", "-U", uuid, "-E", "hash_seed=01234567-89ab-cdef-0123-456789abcdef"];
        arguments.extend(options);
        arguments.extend(["-d", text(tree), text(&path), size]);
        run("mkfs.ext4", &arguments)?;
        run("e2fsck", &["-f", "-y", "-D", text(&path)])?;
        if name.ends_with("dirty") {
            // A journal with transactions that were committed, one of them revoking a block.
            let (script, content) = (self.scratch.join("script"), self.scratch.join("content"));
            write(&content, vec![0; 3 * 1024])?;
            let c = content.display();
            write(
                &script,
                format!("jo\njw -b 3500,3501,3502 {c}\njw -r 3501\njw -b 3502,3503,3504 {c}\njc\n"),
            )?;
            run("debugfs", &["-w", "-f", text(&script), text(&path)])?;
        }
        self.keep(name)
    }

    fn fat(&self, name: &str, width: &str, bytes: u64) -> Result<()> {
        let path = self.fresh(bytes)?;
        run("mkfs.fat", &["-F", width, "-s", "1", "-n", "LABEL", "-i", "12345678", text(&path)])?;
        if width == "32" {
            return self.keep(name); // mtools takes a small one for another kind.
        }
        run("mmd", &["-i", text(&path), "::d1", "::d1/d2", "::A directory"])?;
        let content = self.scratch.join("content");
        for (to, len) in
            [("::A.TXT", 100), ("::longer name.html", 3000), ("::d1/x", 512), ("::A directory/b.txt", 0)]
        {
            write(&content, vec![b'y'; len])?;
            run("mcopy", &["-i", text(&path), text(&content), to])?;
        }
        self.keep(name)
    }

    fn table(&self, name: &str, script: &str) -> Result<()> {
        let path = self.fresh(4 << 20)?;
        let file = self.scratch.join("script");
        write(&file, script)?;
        run("sh", &["-c", &format!("sfdisk -q {} < {}", path.display(), file.display())])?;
        self.keep(name)
    }
}

/// The seeds of every target that says something about its form.
fn corpus(top: &Path) -> Result<()> {
    let put = |target: &str, name: &str, content: &[u8]| {
        let folder = top.join(target);
        std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
        write(&folder.join(name), content)
    };
    put("config", "whole", br#"{"hostname":"a","log":"debug","app":["httpd","--port","80"],"mounts":[{"source":"disk0","target":"/","kind":"ext4","read_only":true}],"interfaces":[{"ipv4":"10.0.2.15/24","ipv6":"auto","gateway":"10.0.2.2","dns":["10.0.2.3"]}],"workers":2,"tcp":{"receive_bytes":65536,"send_bytes":65536,"connections":100},"cache":{"bytes":1048576,"read_ahead_bytes":65536}}"#)?;
    put("config", "small", br#"{"interfaces":[{"ipv4":"dhcp"}]}"#)?;
    for image in 0..6u8 {
        put("ext4", &format!("good-{image}"), &[image])?;
        for structure in [0u8, 1, 3, 9, 30] {
            put("ext4", &format!("field-{image}-{structure}"), &[image, structure, 0, 1, 3])?;
        }
    }
    for image in 0..3u8 {
        put(
            "fat",
            &format!("whole-{image}"),
            &[
                image, 0, 0, 3, 4, 0, 3, 7, 0, 0x10, 0x10, 3, 0, 11, 12, 13, 14, 0, 3, 9, 0, 3, 11, 0, 3, 0,
                7, 12,
            ],
        )?;
        put("fat", &format!("damaged-{image}"), &[0x80 | image, 2, 1, 2, 0, 4, 5, 2, 8, 0, 6, 15, 13, 15])?;
    }
    for kind in 0..anykernel_fuzz::net::frames::TEMPLATES as u8 {
        put("frames", &format!("template-{kind}"), &[0, kind, 0, 0, kind, 0, 13, 0xff, 14, 3])?;
        put("hostlink", &format!("template-{kind}"), &[2, 0, 0, kind, 10, 100, 0, 7, 0, 3])?;
    }
    // By prologue: both ends, one to three steps of the handshake; then data, an answer, an end.
    for how in 0..8u8 {
        let story =
            [how, 9, 50, 14, 13, 0, 0, 0, 0, 0, 5, 0, 0, 0, 8, 14, 15, 4, 0, 1, 0, 0x40, 11, 4, 15, 6];
        put("tcp", &format!("state-{how}"), &story)?;
    }
    put("dhcp", "lease", &[0, 0, 0, 0, 0, 1, 0, 0, 15, 3, 9, 0, 0])?;
    put("dns", "answer", &[0, 0, 0, 1, 0, 0, 9, 0, 0, 0, 1, 0, 1, 1, 0])?;
    put("dns", "alias", &[0, 0, 0, 2, 0, 2, 4, 0, 0, 0, 3, 7, 0, 0])?;
    for piece in 0..24u8 {
        put("http", &format!("piece-{piece}"), &[0, 1, piece, 1, 12, 1, 13, 12, 13])?;
    }
    for table in 0..2u8 {
        for mounts in [0x00, 0x10, 0x20] {
            put("partition", &format!("table-{table}-{mounts:02x}"), &[table | mounts])?;
        }
    }
    usb_seeds(&put)?;
    put("recording", "whole", &[3])?;
    put("recording", "changed", &[3, 0x82, 40, 0, 1, 7, 2, 60, 0, 1, 9])?;
    put(
        "recording",
        "header",
        b"\x01{\"format\":1,\"target\":\"userspace\",\"contracts\":{\"core\":\"1.0\"}}",
    )?;
    put("recording", "file", b"\0AKREC01\n\x02\0\0\0\x43\xbf\xa6\xa3{}")?;
    for how in 0..8u8 {
        let blk =
            [how, 12, 0, 0, 3, 1, 0, 5, 8, 4, 5, 11, 2, 3, 9, 5, 0, 0, 0, 0, 0, 20, 0, 4, 4, 0, 3, 2, 5, 1];
        put("virtio_blk", &format!("how-{how}"), &blk)?;
        let net = [
            how, 16, 0, 0, 60, 0, 7, 2, 4, 0, 90, 0, 5, 7, 0, 100, 0, 3, 2, 0, 0, 0, 0, 0, 40, 0, 2, 3, 1, 10,
        ];
        put("virtio_net", &format!("how-{how}"), &net)?;
    }
    for lie in 0..16u8 {
        let one = [lie, lie % 8, 2, 0, 1, 0, 0, 3, 0, 0, 0, 6];
        let story: Vec<u8> = (0..6).flat_map(|_| one).collect();
        put("xhci", &format!("lie-{lie:02}"), &[&[20, 0][..], &story].concat())?;
        put("xhci", &format!("late-{lie:02}"), &[&[255, 0][..], &story].concat())?;
    }
    // The same on PCI: one after another a line, vectors, and one or two capabilities that say something else.
    for (number, told) in [&[0u8][..], &[0x10], &[1, 80, 2], &[0x12, 108, 0, 76, 15]].into_iter().enumerate()
    {
        let (ops, device) = ([3u8, 1, 0, 5, 8, 4, 5, 11, 2, 3, 9, 5], [0, 0, 0, 0, 0, 20, 0, 4, 4, 0, 3, 2]);
        put("virtio_blk", &format!("pci-{number}"), &[&[0x10, 12, 0], &ops[..], told, &device].concat())?;
        let (ops, device) = ([0u8, 60, 0, 7, 2, 4, 0, 90, 0, 5, 7, 0], [0, 0, 0, 0, 0, 40, 0, 2, 3, 1]);
        put("virtio_net", &format!("pci-{number}"), &[&[0x10, 12, 0], &ops[..], told, &device].concat())?;
    }
    Ok(())
}

/// The frames of a capture as seeds, eight to each.
fn pcap(path: &str, top: &Path) -> Result<()> {
    let file = std::fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    if file.get(..4) != Some(&[0xd4, 0xc3, 0xb2, 0xa1]) && file.get(..4) != Some(&[0x4d, 0x3c, 0xb2, 0xa1]) {
        return Err(format!("{path}: not a little-endian pcap file; write one with tcpdump -w"));
    }
    let (mut at, mut frames) = (24, Vec::new());
    while let Some(len) = file.get(at + 8..at + 12) {
        let len = u32::from_le_bytes(len.try_into().expect("4 bytes")) as usize;
        let Some(frame) = file.get(at + 16..at + 16 + len) else { break };
        frames.push(&frame[..len.min(1514)]);
        at += 16 + len;
    }
    for (index, some) in frames.chunks(8).enumerate().take(16) {
        let mut seed = Vec::new();
        for frame in some {
            seed.extend([0, 255]);
            seed.extend((frame.len() as u16).to_le_bytes());
            seed.extend(*frame);
        }
        write(&top.join(format!("frames/pcap-{index}")), seed)?;
    }
    Ok(())
}

/// Records of a recording as seeds: a few of its beginning, and as many as are worth it of its beginning and its middle.
fn recording(path: &str, top: &Path) -> Result<()> {
    let file = std::fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    let chunk = |at| take_chunk(&file, at).ok().flatten();
    let (_, mut at) =
        chunk(MAGIC.len()).filter(|_| file.starts_with(MAGIC)).ok_or(format!("{path}: not a recording"))?;
    let mut records = Vec::new();
    while let Some((content, next)) = chunk(at) {
        records.extend(content);
        at = next;
    }
    // Where one ends and the next begins.
    let (mut rest, mut ends) = (&records[..], vec![0]);
    while Record::take(&mut rest).is_ok() {
        ends.push(records.len() - rest.len());
    }
    let name = Path::new(path).file_stem().unwrap_or_default().display();
    let middle = ends[ends.len() / 2];
    for (index, (from, most)) in [(0, 300), (0, 3900), (middle, 3900)].into_iter().enumerate() {
        let to = ends.iter().rfind(|end| **end <= from + most).map_or(from, |end| *end);
        let seed = [&[2 | (index as u8 * 7) << 4][..], &records[from..to]].concat();
        write(&top.join(format!("recording/{name}-{index}")), seed)?;
    }
    Ok(())
}

fn make() -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpus_folder = here.join("corpus");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, path] = arguments.as_slice()
        && flag == "--pcap"
    {
        return pcap(path, &corpus_folder);
    }
    if let [flag, path] = arguments.as_slice()
        && flag == "--recording"
    {
        return recording(path, &corpus_folder);
    }
    let scratch = std::env::temp_dir().join(format!("anykernel-seeds-{}", std::process::id()));
    let tree = scratch.join("tree");
    make_tree(&tree)?;
    let maker = Maker { scratch: scratch.clone(), images: here.join("images") };
    let small = ["-b", "1024", "-N", "96", "-m", "0"];
    let with = |more: &[&'static str]| [&small[..], more].concat();
    maker.ext4("ext4", &with(&["-O", "^has_journal"]), "1M", &tree)?;
    maker.ext4("ext4-nocsum", &with(&["-O", "^has_journal,^metadata_csum"]), "1M", &tree)?;
    maker.ext4("ext2", &with(&["-t", "ext2"]), "1M", &tree)?;
    maker.ext4("ext4-inline", &with(&["-O", "^has_journal,inline_data", "-I", "256"]), "1M", &tree)?;
    maker.ext4("ext4-dirty", &with(&["-O", "^metadata_csum", "-J", "size=1"]), "4M", &tree)?;
    for number in 0..150 {
        write(&tree.join(format!("many/a rather long file name {number}")), "")?;
    }
    maker.ext4("ext4-htree", &["-b", "1024", "-N", "256", "-m", "0", "-O", "^has_journal"], "1M", &tree)?;
    maker.fat("fat12", "12", 256 << 10)?;
    maker.fat("fat16", "16", 2200 << 10)?;
    maker.fat("fat32", "32", 256 << 10)?;
    maker.table("mbr", "label: dos\nstart=2048, size=1024, type=83\nstart=3072, size=2048, type=5\nstart=3073, size=500, type=c\n")?;
    maker.table("gpt", "label: gpt\nlabel-id: 01234567-89ab-cdef-0123-456789abcdef\nstart=2048, size=1024, uuid=01234567-89ab-cdef-0123-456789abcde0\nstart=3072, size=2048, uuid=01234567-89ab-cdef-0123-456789abcde1\n")?;
    corpus(&corpus_folder)?;
    std::fs::remove_dir_all(&scratch).map_err(|error| error.to_string())
}

fn main() -> std::process::ExitCode {
    match make() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(line) => {
            eprintln!("seeds: {line}");
            std::process::ExitCode::FAILURE
        }
    }
}
