//! File systems: what came with checksums is read whole and compared; what can be written is written and read back.

use crate::report::Report;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::fs::{FileKind, FsError, Namespace, OpenOptions};
use hypercall::Host;
use sha2::{Digest, Sha256};

type Outcome = Result<(), String>;

fn at(path: &[u8]) -> impl Fn(FsError) -> String + '_ {
    move |error| format!("{}: {error}", String::from_utf8_lossy(path))
}

fn namespace<H: Host>(kernel: &Kernel<H>) -> Result<Arc<dyn Namespace>, String> {
    kernel.namespace().ok_or_else(|| "no vfs component runs".to_string())
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = directory.to_vec();
    if !path.ends_with(b"/") {
        path.push(b'/');
    }
    path.extend_from_slice(name.strip_prefix(b"./").unwrap_or(name));
    path
}

/// Reads the file at `path` in pieces of `step` bytes, hands them to `sink`, and returns their sum.
fn read_all(
    files: &dyn Namespace,
    path: &[u8],
    step: usize,
    sink: &mut dyn FnMut(&[u8]),
) -> Result<u64, String> {
    let file = files.open(path, OpenOptions::READ).map_err(at(path))?;
    let mut buffer = vec![0; step];
    let mut offset = 0;
    loop {
        match file.read_at(offset, &mut buffer).map_err(at(path))? {
            0 => return Ok(offset),
            n => {
                sink(&buffer[..n]);
                offset += n as u64;
            }
        }
    }
}

fn sha256(files: &dyn Namespace, path: &[u8], step: usize) -> Result<String, String> {
    let mut hash = Sha256::new();
    read_all(files, path, step, &mut |bytes| hash.update(bytes))?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Lines that [`hold`] writes.
const HELD_LINES: usize = 10_000;

/// Writes a file and leaves it to others to sync it.
pub(crate) fn hold<H: Host>(kernel: &Arc<Kernel<H>>, report: &mut Report<H>, path: &[u8]) {
    let write = || -> Outcome {
        let text: String = (0..HELD_LINES).map(|line| format!("line {line}\n")).collect();
        let file = namespace(kernel)?.open(path, OpenOptions::CREATE).map_err(at(path))?;
        file.write_at(0, text.as_bytes()).map(drop).map_err(at(path))
    };
    report.result("hold/written", write());
}

/// Every file named in `directory/SHA256SUMS` has the checksum given there, read by several threads at once.
pub(crate) fn checksums<H: Host>(
    kernel: &Arc<Kernel<H>>,
    report: &mut Report<H>,
    group: &str,
    directory: &'static [u8],
) {
    report.result(&format!("{group}/checksums"), check_sums(kernel, directory));
}

fn check_sums<H: Host>(kernel: &Arc<Kernel<H>>, directory: &'static [u8]) -> Outcome {
    let files = namespace(kernel)?;
    let mut sums = Vec::new();
    let list = join(directory, b"SHA256SUMS");
    read_all(&*files, &list, 4096, &mut |bytes| sums.extend_from_slice(bytes))?;
    let sums = String::from_utf8(sums).map_err(|_| "SHA256SUMS is not UTF-8".to_string())?;
    let lines: Vec<(String, String)> = sums
        .lines()
        .filter_map(|line| line.split_once("  "))
        .map(|(sum, name)| (sum.to_string(), name.to_string()))
        .collect();
    if lines.is_empty() {
        return Err("SHA256SUMS names no file".into());
    }
    let workers = kernel.host().cpu_count().clamp(2, 8) as usize;
    let lines = Arc::new(lines);
    let failures = Arc::new(anykernel::sync::Mutex::new(kernel.host(), Vec::<String>::new()));
    let mut threads = Vec::new();
    for worker in 0..workers {
        let (files, lines, failures) = (files.clone(), lines.clone(), failures.clone());
        let entry = move || {
            // Different sizes of reads take different ways through the cache.
            let step = [65_536, 4_096, 1_000, 17_000][worker % 4];
            for (sum, name) in lines.iter().skip(worker).step_by(workers) {
                let path = join(directory, name.as_bytes());
                match sha256(&*files, &path, step) {
                    Ok(found) if found == *sum => {}
                    Ok(found) => failures.lock().push(format!("{name}: sha256 is {found}, should be {sum}")),
                    Err(line) => failures.lock().push(line),
                }
            }
        };
        let spec = hypercall::ThreadSpec { name: "sums", cpu: None };
        let thread =
            kernel.host().spawn(spec, alloc::boxed::Box::new(entry)).map_err(|error| error.to_string())?;
        threads.push(thread);
    }
    for thread in threads {
        kernel.host().join(thread).map_err(|error| error.to_string())?;
    }
    let failures = failures.lock();
    match failures.first() {
        None => Ok(()),
        Some(first) => Err(format!("{} of {} files differ; the first: {first}", failures.len(), lines.len())),
    }
}

/// A read-only mount refuses every change.
pub(crate) fn read_only<H: Host>(kernel: &Arc<Kernel<H>>, report: &mut Report<H>) {
    let check = || -> Outcome {
        let files = namespace(kernel)?;
        let stats = files.stats(b"/").map_err(at(b"/"))?;
        if stats.kind != "ext4" || !stats.read_only {
            return Err(format!("/ is {}, expected a read-only ext4", stats.kind));
        }
        for result in [
            files.open(b"/selftest-new", OpenOptions::CREATE).map(|_| ()),
            files.create(b"/selftest-dir", FileKind::Directory, None),
            files.remove(b"/SHA256SUMS"),
            files.rename(b"/SHA256SUMS", b"/OTHER"),
        ] {
            if result != Err(FsError::ReadOnly) {
                return Err(format!("a change was answered with {result:?}, expected ReadOnly"));
            }
        }
        for (path, expected) in
            [(&b"/no/such/file"[..], FsError::NotFound), (b"/SHA256SUMS/below", FsError::NotDirectory)]
        {
            match files.resolve(path, true) {
                Err(error) if error == expected => {}
                other => return Err(format!("{}: {:?}", String::from_utf8_lossy(path), other.err())),
            }
        }
        Ok(())
    };
    report.result("ext4/read-only", check());
}

/// Files and directories are made, grown, cut, renamed and removed, and read back as written.
pub(crate) fn read_write<H: Host>(
    kernel: &Arc<Kernel<H>>,
    report: &mut Report<H>,
    group: &str,
    directory: &[u8],
) {
    report.result(&format!("{group}/write"), check_writes(kernel, directory));
}

fn check_writes<H: Host>(kernel: &Arc<Kernel<H>>, directory: &[u8]) -> Outcome {
    let files = namespace(kernel)?;
    let base = join(directory, b"selftest directory");
    files.create(&base, FileKind::Directory, None).map_err(at(&base))?;
    let first = join(&base, "Ein langer Name, größer als 8.3.text".as_bytes());
    let second = join(&base, b"renamed.bin");
    let content: Vec<u8> = (0..300_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let file = files.open(&first, OpenOptions::CREATE).map_err(at(&first))?;
    // Out of order and across cluster borders.
    for range in [150_000..300_000, 0..70_001, 70_001..150_000] {
        let wrote = file.write_at(range.start as u64, &content[range.clone()]).map_err(at(&first))?;
        if wrote != range.len() {
            return Err(format!("{wrote} of {} bytes written", range.len()));
        }
    }
    file.inode.sync().map_err(at(&first))?;
    let same = |path: &[u8], expected: &[u8]| -> Outcome {
        let mut found = Vec::new();
        read_all(&*files, path, 10_000, &mut |bytes| found.extend_from_slice(bytes))?;
        if found == expected {
            Ok(())
        } else {
            Err(format!("{} bytes read differ from what was written", found.len()))
        }
    };
    same(&first, &content)?;
    file.inode.truncate(123_456).map_err(at(&first))?;
    same(&first, &content[..123_456])?;
    files.rename(&first, &second).map_err(at(&second))?;
    same(&second, &content[..123_456])?;
    if files.resolve(&first, true).err() != Some(FsError::NotFound) {
        return Err("the old name is still there after a rename".into());
    }
    if files.remove(&base) != Err(FsError::NotEmpty) {
        return Err("a directory that is not empty was removed".into());
    }
    for number in 0..100 {
        let path = join(&base, format!("file number {number}.txt").as_bytes());
        let file = files.open(&path, OpenOptions::CREATE).map_err(at(&path))?;
        file.write_at(0, format!("{number}").as_bytes()).map_err(at(&path))?;
    }
    let mut count = 0;
    let listed = files.resolve(&base, true).map_err(at(&base))?;
    let mut cursor = Some(0);
    while let Some(from) = cursor {
        cursor = listed
            .read_dir(from, &mut |_| {
                count += 1;
                true
            })
            .map_err(at(&base))?;
    }
    if count != 101 {
        return Err(format!("{count} names listed, expected 101"));
    }
    for number in 0..50 {
        let path = join(&base, format!("file number {number}.txt").as_bytes());
        files.remove(&path).map_err(at(&path))?;
    }
    files.sync().map_err(at(&base))
}
