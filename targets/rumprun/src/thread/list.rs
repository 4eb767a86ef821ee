//! Lists of threads, linked through the threads themselves: putting a thread into one cannot fail.

use super::Thread;
use core::cell::Cell;
use core::ptr::NonNull;

/// Link of run queues and wait buckets: a thread is in at most one of them.
pub(crate) const QUEUE_LINK: usize = 0;
/// Link of the timer lists.
pub(crate) const TIMER_LINK: usize = 1;

/// Neighbours in a list.
#[derive(Clone, Copy, Default)]
pub(crate) struct Link {
    next: Option<NonNull<Thread>>,
    previous: Option<NonNull<Thread>>,
}

/// A thread's links, one per kind of list.
pub(crate) type Links = [Cell<Link>; 2];

/// A list of threads. Its owner keeps it under a lock, which also covers the link `LINK` of the members.
pub(crate) struct List<const LINK: usize> {
    first: Option<NonNull<Thread>>,
    last: Option<NonNull<Thread>>,
}

// SAFETY: members are reached under the owner's lock only.
unsafe impl<const LINK: usize> Send for List<LINK> {}

/// # Safety
/// The thread is alive, and the caller holds the lock that covers its link.
unsafe fn link<'a, const LINK: usize>(thread: NonNull<Thread>) -> &'a Cell<Link> {
    // SAFETY: by the caller.
    unsafe { &(*thread.as_ptr()).links[LINK] }
}

impl<const LINK: usize> List<LINK> {
    pub(crate) const fn new() -> Self {
        Self { first: None, last: None }
    }

    pub(crate) fn first(&self) -> Option<NonNull<Thread>> {
        self.first
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    /// The member after `thread`.
    ///
    /// # Safety
    /// `thread` is in this list.
    pub(crate) unsafe fn next(&self, thread: NonNull<Thread>) -> Option<NonNull<Thread>> {
        // SAFETY: by the caller.
        unsafe { link::<LINK>(thread) }.get().next
    }

    /// Adds a thread at the end.
    ///
    /// # Safety
    /// `thread` lives until it is taken out, and is in no list of this kind.
    pub(crate) unsafe fn push(&mut self, thread: NonNull<Thread>) {
        // SAFETY: by the caller; members live.
        unsafe {
            link::<LINK>(thread).set(Link { next: None, previous: self.last });
            match self.last {
                Some(last) => {
                    let cell = link::<LINK>(last);
                    cell.set(Link { next: Some(thread), ..cell.get() });
                }
                None => self.first = Some(thread),
            }
        }
        self.last = Some(thread);
    }

    /// Adds a thread before the first member that `after` is true of.
    ///
    /// # Safety
    /// As [`List::push`].
    pub(crate) unsafe fn insert_before(
        &mut self,
        thread: NonNull<Thread>,
        after: impl Fn(NonNull<Thread>) -> bool,
    ) {
        let mut at = self.first;
        while let Some(member) = at
            && !after(member)
        {
            // SAFETY: `member` is in the list.
            at = unsafe { self.next(member) };
        }
        // SAFETY: by the caller, and `member` is in the list.
        unsafe {
            let Some(member) = at else { return self.push(thread) };
            let cell = link::<LINK>(member);
            let previous = cell.get().previous;
            cell.set(Link { previous: Some(thread), ..cell.get() });
            link::<LINK>(thread).set(Link { next: Some(member), previous });
            match previous {
                Some(previous) => {
                    let cell = link::<LINK>(previous);
                    cell.set(Link { next: Some(thread), ..cell.get() });
                }
                None => self.first = Some(thread),
            }
        }
    }

    /// Takes a member out.
    ///
    /// # Safety
    /// `thread` is in this list.
    pub(crate) unsafe fn remove(&mut self, thread: NonNull<Thread>) {
        // SAFETY: by the caller; its neighbours are members too.
        unsafe {
            let Link { next, previous } = link::<LINK>(thread).take();
            match next {
                Some(next) => {
                    let cell = link::<LINK>(next);
                    cell.set(Link { previous, ..cell.get() });
                }
                None => self.last = previous,
            }
            match previous {
                Some(previous) => {
                    let cell = link::<LINK>(previous);
                    cell.set(Link { next, ..cell.get() });
                }
                None => self.first = next,
            }
        }
    }
}
