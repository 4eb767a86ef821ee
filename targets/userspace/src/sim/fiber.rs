//! Stacks and the switch between them.
#![expect(unsafe_code, reason = "switches stacks")]

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::Cell;
use std::ptr::{NonNull, null};

thread_local! {
    /// Of the fiber that runs; null on the OS thread's own stack.
    static YIELDER: Cell<*const Yielder<(), ()>> = const { Cell::new(null()) };
    /// Stacks that are free, shared by all simulations of this OS thread: mapping one costs as much as a thousand switches.
    static FREE: Cell<Vec<DefaultStack>> = const { Cell::new(Vec::new()) };
}

/// Most stacks that are kept.
const MOST_FREE: usize = 4096;

/// A body with a stack of its own.
pub(super) struct Fiber(Coroutine<(), (), (), DefaultStack>);

fn take_stack(bytes: usize) -> std::io::Result<DefaultStack> {
    use corosensei::stack::Stack;
    let mut free = FREE.take();
    let found = free
        .iter()
        .rposition(|stack| stack.base().get() - stack.limit().get() >= bytes)
        .map(|at| free.swap_remove(at));
    FREE.set(free);
    match found {
        Some(stack) => Ok(stack),
        None => DefaultStack::new(bytes),
    }
}

fn give_stack(stack: DefaultStack) {
    let mut free = FREE.take();
    if free.len() < MOST_FREE {
        free.push(stack);
    }
    FREE.set(free);
}

impl Fiber {
    /// `body` must not unwind. Errors: no memory for the stack.
    pub(super) fn new(stack_bytes: usize, body: impl FnOnce() + 'static) -> std::io::Result<Self> {
        let stack = take_stack(stack_bytes)?;
        Ok(Self(Coroutine::with_stack(stack, move |yielder, ()| {
            YIELDER.set(yielder);
            body();
        })))
    }

    /// Runs it until it suspends or ends. `true`: it has ended.
    pub(super) fn resume(&mut self) -> bool {
        let before = YIELDER.get();
        let result = self.0.resume(());
        YIELDER.set(before);
        matches!(result, CoroutineResult::Return(()))
    }

    /// Gives the stack back. What lives on it is forgotten if the body has not ended.
    pub(super) fn recycle(mut self) {
        if !self.0.done() {
            // SAFETY: nothing refers to the stack: the body is `'static` code that shares what it has by counted
            // references, and a word that it parked on is only ever compared as an address.
            unsafe { self.0.force_reset() };
        }
        give_stack(self.0.into_stack());
    }
}

/// Suspends the running fiber until it is resumed. Panics outside of one.
pub(super) fn suspend() {
    let yielder = YIELDER.get();
    let running = NonNull::new(yielder.cast_mut()).expect("called in a fiber");
    // SAFETY: set by the fiber that runs now, by its start or below, and its yielder lives as long as it runs.
    unsafe { running.as_ref() }.suspend(());
    YIELDER.set(yielder);
}
