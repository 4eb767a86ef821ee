//! From a path to an inode (path_resolution(7)).
//!
//! The walk keeps the places it came through: `..` goes back to the last of them, which is right on both sides of a mount
//! and after links, and stays at the root.

use super::table::{Mount, Table};
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::{FileKind, FsError, Inode, Result};
use hypercall::Host;

/// Symbolic links on the way, as on Linux.
const MAX_LINKS: u32 = 40;
/// Longest path, as on Linux (PATH_MAX).
const MAX_PATH: usize = 4096;

/// What to do with a symbolic link in the last component.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    Follow,
    Keep,
}

/// An inode and how it was reached.
pub(super) struct Place<H: Host> {
    pub(super) mount: Arc<Mount<H>>,
    pub(super) inode: Arc<dyn Inode>,
    pub(super) number: u64,
    pub(super) kind: FileKind,
    /// Absolute, without links, `.` and `..`; empty for the root.
    pub(super) path: Vec<u8>,
}

impl<H: Host> Place<H> {
    pub(super) fn child_path(&self, name: &[u8]) -> Vec<u8> {
        let mut path = Vec::with_capacity(self.path.len() + 1 + name.len());
        path.extend_from_slice(&self.path);
        path.push(b'/');
        path.extend_from_slice(name);
        path
    }
}

/// A place on the way. Its path is a prefix of the walk's.
struct Step<H: Host> {
    mount: Arc<Mount<H>>,
    inode: Arc<dyn Inode>,
    number: u64,
    kind: FileKind,
    path_len: usize,
}

impl<H: Host> Clone for Step<H> {
    fn clone(&self) -> Self {
        Self { mount: self.mount.clone(), inode: self.inode.clone(), ..*self }
    }
}

impl<H: Host> Step<H> {
    fn root_of(mount: &Arc<Mount<H>>) -> Self {
        Self {
            mount: mount.clone(),
            inode: mount.root.clone(),
            number: mount.root_number,
            kind: FileKind::Directory,
            path_len: mount.path.len(),
        }
    }

    fn into_place(self, path: &[u8]) -> Place<H> {
        Place {
            mount: self.mount,
            inode: self.inode,
            number: self.number,
            kind: self.kind,
            path: path.get(..self.path_len).unwrap_or_default().to_vec(),
        }
    }
}

/// Where a walk ended.
pub(super) struct Found<H: Host> {
    /// The directory that holds the last component; the place itself if `name` is empty.
    pub(super) parent: Place<H>,
    /// The last component, after links; empty if the path ended in `.`, `..` or at the root.
    pub(super) name: Vec<u8>,
    /// What is there. `None`: nothing, but the directory exists.
    pub(super) place: Option<Place<H>>,
    /// The path ended in a slash.
    pub(super) must_be_directory: bool,
}

impl<H: Host> Found<H> {
    pub(super) fn existing(self) -> Result<Place<H>> {
        self.place.ok_or(FsError::NotFound)
    }
}

/// What is left of the path: the rest of each link's target that is being followed, the innermost last.
struct Rest<'a> {
    path: &'a [u8],
    targets: Vec<(Vec<u8>, usize)>,
}

impl Rest<'_> {
    /// The next component, and whether a slash follows it.
    fn next(&mut self, name: &mut Vec<u8>) -> bool {
        name.clear();
        while let Some((target, at)) = self.targets.last_mut() {
            let (component, used) = split(target.get(*at..).unwrap_or_default());
            *at += used;
            if !component.is_empty() {
                name.extend_from_slice(component);
                return true;
            }
            self.targets.pop();
        }
        let (component, used) = split(self.path);
        name.extend_from_slice(component);
        self.path = self.path.get(used..).unwrap_or_default();
        !component.is_empty()
    }

    /// No component is left; and whether what is left has a slash, so that the last one must be a directory.
    fn last(&self) -> (bool, bool) {
        let mut slash = false;
        let targets = self.targets.iter().map(|(target, at)| target.get(*at..).unwrap_or_default());
        for part in targets.chain([self.path]) {
            if part.iter().any(|byte| *byte != b'/') {
                return (false, false);
            }
            slash |= !part.is_empty();
        }
        (true, slash)
    }
}

/// The first component (empty if there is none) and how many bytes it takes with the slashes before it.
fn split(path: &[u8]) -> (&[u8], usize) {
    let start = path.iter().position(|byte| *byte != b'/').unwrap_or(path.len());
    let rest = path.get(start..).unwrap_or_default();
    let len = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
    (rest.get(..len).unwrap_or_default(), start + len)
}

/// Walks `path`. Errors: [`FsError::NotFound`] if a directory on the way is missing or `path` is empty,
/// [`FsError::NotDirectory`], [`FsError::Loop`], [`FsError::BadName`] for a path over 4,096 bytes or with a zero
/// byte, [`FsError::Invalid`] for a relative one, and what file systems report.
pub(super) fn walk<H: Host>(table: &Arc<Table<H>>, path: &[u8], last: Last) -> Result<Found<H>> {
    match path.first() {
        None => return Err(FsError::NotFound),
        Some(b'/') => {}
        Some(_) => return Err(FsError::Invalid),
    }
    if path.len() > MAX_PATH || path.contains(&0) {
        return Err(FsError::BadName);
    }
    let root = table.at(b"").ok_or(FsError::NotFound)?;
    let mut above: Vec<Step<H>> = Vec::new();
    let mut here = Step::root_of(root);
    // Where we are, or a little further.
    let mut so_far = Vec::with_capacity(path.len() + 1);
    let mut rest = Rest { path, targets: Vec::new() };
    let mut links = 0;
    let mut name = Vec::new();
    while rest.next(&mut name) {
        if here.kind != FileKind::Directory {
            return Err(FsError::NotDirectory);
        }
        match name.as_slice() {
            b"." => continue,
            b".." => {
                if let Some(parent) = above.pop() {
                    here = parent;
                }
                continue;
            }
            _ => {}
        }
        so_far.truncate(here.path_len);
        let (is_last, slash) = rest.last();
        let found = here.mount.dentries.lookup(&here.inode, here.number, &name)?;
        let Some(child) = found else {
            if is_last {
                let parent = here.into_place(&so_far);
                return Ok(Found { parent, name, place: None, must_be_directory: slash });
            }
            return Err(FsError::NotFound);
        };
        if child.kind == FileKind::Symlink && (!is_last || slash || last == Last::Follow) {
            links += 1;
            if links > MAX_LINKS {
                return Err(FsError::Loop);
            }
            let target = child.inode.read_link()?;
            if target.is_empty() || target.contains(&0) {
                return Err(FsError::NotFound);
            }
            if target.first() == Some(&b'/') {
                above.clear();
                here = Step::root_of(root);
            }
            rest.targets.push((target, 0));
            continue;
        }
        if child.kind != FileKind::Directory && slash {
            return Err(FsError::NotDirectory);
        }
        so_far.push(b'/');
        so_far.extend_from_slice(&name);
        let covering = if table.branches() { table.at(&so_far) } else { None };
        let step = match covering {
            Some(mount) => Step::root_of(mount),
            None => Step {
                mount: here.mount.clone(),
                inode: child.inode,
                number: child.number,
                kind: child.kind,
                path_len: so_far.len(),
            },
        };
        if is_last {
            let place = Some(step.into_place(&so_far));
            return Ok(Found { parent: here.into_place(&so_far), name, place, must_be_directory: slash });
        }
        above.push(core::mem::replace(&mut here, step));
    }
    let place = Some(here.clone().into_place(&so_far));
    let parent = here.into_place(&so_far);
    Ok(Found { parent, name: Vec::new(), place, must_be_directory: true })
}
