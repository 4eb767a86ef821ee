//! Which files Linux knows, by the numbers that it knows them by.

use anykernel::fs::Inode;
use std::collections::HashMap;
use std::sync::Arc;

/// The root directory (fuse(4)).
pub(super) const ROOT: u64 = 1;
/// Numbers of our own begin here: for files whose own number another one still has.
const OWN: u64 = 1 << 63;

struct Node {
    inode: Arc<dyn Inode>,
    /// How often Linux was told of it.
    lookups: u64,
    /// Its number in the file system.
    key: u64,
}

/// Files that Linux was told of and did not forget.
pub(super) struct Nodes {
    by_number: HashMap<u64, Node>,
    /// Those that have a name, by their number in the file system.
    by_key: HashMap<u64, u64>,
    next: u64,
}

impl Nodes {
    pub(super) fn new(root: Arc<dyn Inode>, key: u64) -> Self {
        let by_number = HashMap::from([(ROOT, Node { inode: root, lookups: 1, key })]);
        Self { by_number, by_key: HashMap::from([(key, ROOT)]), next: OWN }
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<dyn Inode>> {
        self.by_number.get(&number).map(|node| node.inode.clone())
    }

    /// Linux is told of `inode`, whose number in the file system is `key`: under which number.
    pub(super) fn enter(&mut self, inode: Arc<dyn Inode>, key: u64) -> u64 {
        if let Some(number) = self.by_key.get(&key).copied()
            && let Some(node) = self.by_number.get_mut(&number)
        {
            node.lookups += 1;
            return number;
        }
        let number = if key > ROOT && key < OWN && !self.by_number.contains_key(&key) {
            key
        } else {
            self.next += 1;
            self.next
        };
        self.by_number.insert(number, Node { inode, lookups: 1, key });
        self.by_key.insert(key, number);
        number
    }

    /// Linux forgets `count` times that it was told of it.
    pub(super) fn forget(&mut self, number: u64, count: u64) {
        let Some(node) = self.by_number.get_mut(&number).filter(|_| number != ROOT) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups == 0 {
            let key = node.key;
            self.by_number.remove(&number);
            if self.by_key.get(&key) == Some(&number) {
                self.by_key.remove(&key);
            }
        }
    }

    /// The file with this number has no name any more: another one may get its number.
    pub(super) fn unname(&mut self, key: u64) {
        self.by_key.remove(&key);
    }

    /// A file has another number in the file system now.
    pub(super) fn renumber(&mut self, before: u64, now: u64) {
        if before != now
            && let Some(number) = self.by_key.remove(&before)
            && let Some(node) = self.by_number.get_mut(&number)
        {
            node.key = now;
            self.by_key.insert(now, number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anykernel::fs::{DirEntry, FsError, Metadata, Result};

    struct Stub;

    impl Inode for Stub {
        fn metadata(&self) -> Result<Metadata> {
            Err(FsError::Unsupported)
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> Result<usize> {
            Err(FsError::Unsupported)
        }
        fn lookup(&self, _: &[u8]) -> Result<Arc<dyn Inode>> {
            Err(FsError::NotFound)
        }
        fn read_dir(&self, _: u64, _: &mut dyn FnMut(DirEntry) -> bool) -> Result<Option<u64>> {
            Ok(None)
        }
        fn as_any(&self) -> &dyn core::any::Any {
            self
        }
    }

    #[test]
    fn a_file_has_one_number_until_it_is_forgotten_as_often_as_told() {
        let mut nodes = Nodes::new(Arc::new(Stub), 2);
        let number = nodes.enter(Arc::new(Stub), 77);
        assert_eq!((number, nodes.enter(Arc::new(Stub), 77)), (77, 77));
        nodes.forget(number, 1);
        assert!(nodes.get(number).is_some());
        nodes.forget(number, 1);
        assert!(nodes.get(number).is_none() && nodes.by_key.len() == 1);
        nodes.forget(ROOT, 9);
        nodes.forget(4711, 1);
        assert!(nodes.get(ROOT).is_some());
    }

    #[test]
    fn a_removed_file_that_is_open_keeps_its_number() {
        let mut nodes = Nodes::new(Arc::new(Stub), 2);
        let old = nodes.enter(Arc::new(Stub), 77);
        nodes.unname(77);
        let new = nodes.enter(Arc::new(Stub), 77);
        assert_ne!(old, new);
        nodes.forget(old, 1);
        assert_eq!(nodes.enter(Arc::new(Stub), 77), new);
    }

    #[test]
    fn a_renamed_file_keeps_its_number() {
        let mut nodes = Nodes::new(Arc::new(Stub), 2);
        let number = nodes.enter(Arc::new(Stub), 77);
        nodes.renumber(77, 99);
        assert_eq!(nodes.enter(Arc::new(Stub), 99), number);
        assert_ne!(nodes.enter(Arc::new(Stub), 77), number);
    }

    #[test]
    fn no_file_gets_the_number_of_the_root() {
        let mut nodes = Nodes::new(Arc::new(Stub), 2);
        for key in [0, 1, u64::MAX] {
            let number = nodes.enter(Arc::new(Stub), key);
            assert!(number > OWN, "{key}");
        }
    }
}
