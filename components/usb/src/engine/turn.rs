//! A right that goes round.

use alloc::collections::VecDeque;
use anykernel::sync::Mutex;
use core::task::{Poll, Waker};
use hypercall::Host;

/// A right that one task has at a time, in the order of asking.
pub(crate) struct Turn<H: Host> {
    state: Mutex<H, TurnState>,
}

#[derive(Default)]
struct TurnState {
    next: u64,
    /// Tickets not served yet, lowest first, with who waits.
    queue: VecDeque<(u64, Option<Waker>)>,
}

impl<H: Host> Turn<H> {
    pub(crate) fn new(host: H) -> Self {
        Self { state: Mutex::new(host, TurnState::default()) }
    }

    /// Waits for the turn; it ends when what this returns is dropped.
    pub(crate) async fn take(&self) -> TurnGuard<'_, H> {
        let ticket = {
            let mut state = self.state.lock();
            state.next += 1;
            let ticket = state.next;
            state.queue.push_back((ticket, None));
            ticket
        };
        let guard = TurnGuard { turn: self, ticket };
        core::future::poll_fn(|cx| {
            let mut state = self.state.lock();
            if state.queue.front().is_some_and(|first| first.0 == ticket) {
                return Poll::Ready(());
            }
            if let Some(mine) = state.queue.iter_mut().find(|one| one.0 == ticket) {
                mine.1 = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
        guard
    }
}

pub(crate) struct TurnGuard<'a, H: Host> {
    turn: &'a Turn<H>,
    ticket: u64,
}

impl<H: Host> Drop for TurnGuard<'_, H> {
    fn drop(&mut self) {
        let mut state = self.turn.state.lock();
        state.queue.retain(|one| one.0 != self.ticket);
        let next = state.queue.front_mut().and_then(|first| first.1.take());
        drop(state);
        if let Some(waker) = next {
            waker.wake();
        }
    }
}
