//! What tasks wait for: time, transfers, commands.

use super::{Engine, Failure, Over};
use crate::controller::{ControllerError, Outcome, Token};
use alloc::sync::Arc;
use anykernel::timer::TimerKey;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use hypercall::Host;

/// See [`Engine::sleep_until`].
pub(crate) struct Sleep<H: Host> {
    engine: Arc<Engine<H>>,
    deadline_ns: u64,
    key: Option<TimerKey>,
}

impl<H: Host> Sleep<H> {
    pub(super) fn new(engine: Arc<Engine<H>>, deadline_ns: u64) -> Self {
        Self { engine, deadline_ns, key: None }
    }
}

impl<H: Host> Future for Sleep<H> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.engine.now_ns() >= self.deadline_ns {
            return Poll::Ready(());
        }
        if let Some(key) = self.key.take() {
            self.engine.bus.lock().timers.cancel(key);
        }
        self.key = Some(self.engine.arm(self.deadline_ns, cx.waker().clone()));
        Poll::Pending
    }
}

impl<H: Host> Drop for Sleep<H> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.engine.bus.lock().timers.cancel(key);
        }
    }
}

/// A transfer in flight. Dropped, it is cancelled and its buffers are lost; one that is late is cancelled and still
/// waited for.
pub(crate) struct Transferring<H: Host> {
    engine: Arc<Engine<H>>,
    token: u64,
    deadline_ns: u64,
    key: Option<TimerKey>,
    late: bool,
    taken: bool,
}

impl<H: Host> Transferring<H> {
    pub(super) fn new(engine: Arc<Engine<H>>, token: u64, deadline_ns: u64) -> Self {
        Self { engine, token, deadline_ns, key: None, late: false, taken: false }
    }

    /// Ends it soon. It is still to be waited for.
    pub(crate) fn cancel(&self) {
        self.engine.bus.lock().controller.cancel(Token(self.token));
    }
}

impl<H: Host> Future for Transferring<H> {
    type Output = Over;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Over> {
        let this = &mut *self;
        let mut bus = this.engine.bus.lock();
        let over = bus.transfers.get_mut(&this.token).and_then(|pending| {
            pending.waker = Some(cx.waker().clone());
            pending.over.take()
        });
        if let Some(mut over) = over {
            bus.transfers.remove(&this.token);
            if let Some(key) = this.key.take() {
                bus.timers.cancel(key);
            }
            this.taken = true;
            if this.late && over.result == Err(Failure::Cancelled) {
                over.result = Err(Failure::TimedOut);
            }
            return Poll::Ready(over);
        }
        if this.deadline_ns != u64::MAX && !this.late {
            if this.engine.now_ns() >= this.deadline_ns {
                this.late = true;
                bus.controller.cancel(Token(this.token));
                // The answer may be there already.
                cx.waker().wake_by_ref();
            } else if this.key.is_none() {
                drop(bus);
                this.key = Some(this.engine.arm(this.deadline_ns, cx.waker().clone()));
            }
        }
        Poll::Pending
    }
}

impl<H: Host> Drop for Transferring<H> {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut bus = self.engine.bus.lock();
        if let Some(key) = self.key.take() {
            bus.timers.cancel(key);
        }
        let Some(pending) = bus.transfers.get_mut(&self.token) else { return };
        if pending.over.is_some() {
            bus.transfers.remove(&self.token);
        } else {
            pending.orphan = true;
            bus.controller.cancel(Token(self.token));
        }
    }
}

/// A command in flight. Dropped, it goes on all the same.
pub(crate) struct Commanding<H: Host> {
    engine: Arc<Engine<H>>,
    tag: u64,
    taken: bool,
}

impl<H: Host> Commanding<H> {
    pub(super) fn new(engine: Arc<Engine<H>>, tag: u64) -> Self {
        Self { engine, tag, taken: false }
    }
}

impl<H: Host> Future for Commanding<H> {
    type Output = Result<Outcome, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let mut bus = this.engine.bus.lock();
        let Some(command) = bus.commands.get_mut(&this.tag) else {
            return Poll::Ready(Err(Failure::Controller(ControllerError::Dead)));
        };
        match command.result {
            Some(result) => {
                bus.commands.remove(&this.tag);
                this.taken = true;
                Poll::Ready(result.map_err(Failure::Controller))
            }
            None => {
                command.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<H: Host> Drop for Commanding<H> {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut bus = self.engine.bus.lock();
        if let Some(command) = bus.commands.get_mut(&self.tag) {
            if command.result.is_some() {
                bus.commands.remove(&self.tag);
            } else {
                command.orphan = true;
            }
        }
    }
}
