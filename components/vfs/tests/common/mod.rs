//! What the tests of this directory share.
#![allow(dead_code, reason = "each test uses a part")]

use anykernel::block::{BlockDevice, BlockError, BlockInfo, Op, Rejected, Request};
use std::collections::VecDeque;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

/// A read-only disk in memory.
pub(crate) struct Image {
    info: BlockInfo,
    content: Vec<u8>,
    queue: Mutex<VecDeque<Request>>,
}

impl Image {
    pub(crate) fn device(content: Vec<u8>) -> Arc<dyn BlockDevice> {
        let info = BlockInfo {
            name: "disk0".into(),
            sector_size: 512,
            sectors: content.len() as u64 / 512,
            read_only: true,
            max_request_bytes: 128 << 10,
            max_buffers: usize::MAX,
            queue_depth: 16,
            needs_flush: false,
        };
        Arc::new(Self { info, content, queue: Mutex::default() })
    }
}

impl BlockDevice for Image {
    fn info(&self) -> &BlockInfo {
        &self.info
    }

    fn submit(&self, request: Request) -> Result<(), Rejected> {
        let mut queue = self.queue.lock().unwrap();
        if queue.len() == self.info.queue_depth {
            return Err(Rejected { request, reason: None });
        }
        queue.push_back(request);
        Ok(())
    }

    fn poll(&self) {
        loop {
            let next = self.queue.lock().unwrap().pop_front();
            let Some(mut request) = next else { return };
            let mut at = request.sector as usize * 512;
            let mut result = if request.op == Op::Write { Err(BlockError::ReadOnly) } else { Ok(()) };
            for buffer in &mut request.buffers {
                match self.content.get(at..at + buffer.len()) {
                    Some(there) => buffer.copy_from_slice(there),
                    None => result = Err(BlockError::Invalid),
                }
                at += buffer.len();
            }
            request.done.clone().complete(request, result);
        }
    }
}

/// A directory that goes away again; in memory where that exists, because thousands of files take long on a disk.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Runs a program of e2fsprogs, which `cargo xtask test` installs; without it the test fails.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}; apt-get install e2fsprogs"));
    // e2fsck says with 1 that it changed something, as it was asked to.
    let good = output.status.success() || program == "e2fsck" && output.status.code() == Some(1);
    assert!(good, "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Makes an ext4 image of a tree at `path`.
pub(crate) fn make_image(path: &Path, tree: &Path, options: &[&str], size: &str) {
    let mut arguments = vec!["-q", "-F"];
    arguments.extend(options);
    arguments.extend(["-d", tree.to_str().unwrap(), path.to_str().unwrap(), size]);
    run("mkfs.ext4", &arguments);
}
