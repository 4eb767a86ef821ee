//! The executor.

use crate::sync::{Mutex, MutexGuard};
use crate::timer::{TimerKey, TimerQueue};
use alloc::collections::VecDeque;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use async_task::{FallibleTask, Runnable};
use core::future::Future;
use core::pin::{Pin, pin};
use core::task::{Context, Poll, Waker};
use hypercall::Host;
use hypercall::atomic::{AtomicU32, Ordering::Relaxed};
use slab::Slab;

struct State {
    ready: VecDeque<Runnable>,
    /// A waker of every task that is not finished, to reach those that wait when the executor stops.
    active: Slab<Waker>,
    timers: TimerQueue<Waker>,
    /// Threads in [`Executor::run`].
    threads: u32,
    /// Those of them that found nothing to do and park, or are about to.
    sleepers: u32,
    /// How many of them were told to look again and have not done so yet.
    notified: u32,
    stopping: bool,
}

/// How many timers are fired before a task is run.
const TIMERS_PER_ROUND: usize = 32;

/// Runs tasks on the threads that call [`Executor::run`].
///
/// Woken tasks run in the order of their wakes, each on whichever thread is free.
/// [`crate::Kernel::start_executor`] makes one with a thread on every CPU.
pub struct Executor<H: Host> {
    host: H,
    /// Changes whenever sleepers are notified; what they park on. Written under the lock of `state`.
    wakeups: AtomicU32,
    state: Mutex<H, State>,
}

/// Takes a task out of [`State::active`] when its future is dropped, finished or not.
struct Active<H: Host> {
    executor: Weak<Executor<H>>,
    index: usize,
}

impl<H: Host> Drop for Active<H> {
    fn drop(&mut self) {
        if let Some(executor) = self.executor.upgrade() {
            let waker = executor.state.lock().active.try_remove(self.index);
            drop(waker);
        }
    }
}

impl<H: Host> Executor<H> {
    /// An executor without tasks and threads.
    pub fn new(host: H) -> Arc<Self> {
        let state = State {
            ready: VecDeque::new(),
            active: Slab::new(),
            timers: TimerQueue::default(),
            threads: 0,
            sleepers: 0,
            notified: 0,
            stopping: false,
        };
        Arc::new(Self { host, wakeups: AtomicU32::new(0), state: Mutex::new(host, state) })
    }

    /// The host whose time [`Executor::sleep_until`] follows.
    pub fn host(&self) -> H {
        self.host
    }

    /// Adds a task that runs until it is ready or the executor stops (a stopped one drops it at once). Context: thread.
    pub fn spawn(self: &Arc<Self>, future: impl Future<Output = ()> + Send + 'static) {
        drop(self.spawn_join(future));
    }

    /// Adds a task whose value is wanted. Context: thread.
    pub fn spawn_join<T: Send + 'static>(
        self: &Arc<Self>,
        future: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<T> {
        let mut state = self.state.lock();
        let stopping = state.stopping;
        let entry = state.active.vacant_entry();
        let active = Active { executor: Arc::downgrade(self), index: entry.key() };
        let executor = Arc::downgrade(self);
        let (runnable, task) = async_task::spawn(
            async move {
                let _active = active;
                future.await
            },
            move |runnable| match executor.upgrade() {
                Some(executor) => executor.schedule(runnable),
                // Nobody is left to run the task; dropping the runnable drops its future.
                None => drop(runnable),
            },
        );
        if stopping {
            drop(state);
            drop(runnable);
        } else {
            entry.insert(runnable.waker());
            state.ready.push_back(runnable);
            self.notify(state);
        }
        JoinHandle(Some(task.fallible()))
    }

    /// Puts a woken task into the queue. Called by wakers, on any thread, with whatever locks the waking side holds.
    fn schedule(&self, runnable: Runnable) {
        let mut state = self.state.lock();
        state.ready.push_back(runnable);
        self.notify(state);
    }

    /// Releases the lock and wakes one sleeper, if one is needed for what was just added.
    fn notify(&self, mut state: MutexGuard<'_, H, State>) {
        let needed = state.notified < state.sleepers;
        if needed {
            state.notified += 1;
            if !hypercall::planted!("lost-wakeup") {
                self.wakeups.fetch_add(1, Relaxed);
            }
        }
        drop(state);
        if needed {
            self.host.unpark(&self.wakeups, 1);
        }
    }

    /// Ready at `deadline_ns` of [`hypercall::Clock::monotonic_ns`], or later by as long as a task runs without giving
    /// way. Only while some thread runs this executor; the future itself may be polled anywhere.
    pub fn sleep_until(&self, deadline_ns: u64) -> Sleep<'_, H> {
        Sleep { executor: self, deadline_ns, armed: None }
    }

    /// The value of `future`, or `None` (and the future is dropped) if it is not ready at `deadline_ns`.
    pub async fn timeout<F: Future>(&self, deadline_ns: u64, future: F) -> Option<F::Output> {
        let mut future = pin!(future);
        let mut sleep = self.sleep_until(deadline_ns);
        core::future::poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending => Pin::new(&mut sleep).poll(cx).map(|()| None),
        })
        .await
    }

    /// How many timers are armed.
    #[cfg(test)]
    pub(super) fn timers(&self) -> usize {
        self.state.lock().timers.len()
    }

    /// Makes every [`Executor::run`] return after the task it runs now; all other tasks are dropped, on those threads.
    /// Context: thread. Does not wait.
    pub fn stop(&self) {
        self.state.lock().stopping = true;
        self.wakeups.fetch_add(1, Relaxed);
        self.host.unpark(&self.wakeups, u32::MAX);
    }

    /// Runs tasks on this thread until [`Executor::stop`]. Any number of threads may. Context: thread. Blocks.
    pub fn run(&self) {
        let mut due = Vec::new();
        self.state.lock().threads += 1;
        loop {
            let mut state = self.state.lock();
            if state.stopping {
                state.threads -= 1;
                drop(state);
                return self.drop_tasks();
            }
            if !state.timers.is_empty() {
                let now_ns = self.host.monotonic_ns();
                while due.len() < TIMERS_PER_ROUND
                    && let Some(waker) = state.timers.pop_due(now_ns)
                {
                    due.push(waker);
                }
            }
            if !due.is_empty() {
                drop(state);
                due.drain(..).for_each(Waker::wake);
                state = self.state.lock();
            }
            if let Some(runnable) = state.ready.pop_front() {
                drop(state);
                runnable.run();
                continue;
            }
            if state.stopping {
                continue;
            }
            state.sleepers += 1;
            let seen = self.wakeups.load(Relaxed);
            let deadline_ns = state.timers.next_deadline_ns();
            drop(state);
            self.host.park(&self.wakeups, seen, deadline_ns);
            let mut state = self.state.lock();
            state.sleepers -= 1;
            // Whoever leaves first takes a notification with it, whether it was meant for it or not: it looks at the
            // queue, which is all that a notification asks for.
            state.notified = state.notified.saturating_sub(1);
        }
    }

    /// Drops every task that is not being polled by another thread just now (that thread drops it).
    pub(crate) fn drop_tasks(&self) {
        loop {
            let mut state = self.state.lock();
            let ready = core::mem::take(&mut state.ready);
            let active = core::mem::take(&mut state.active);
            let timers = core::mem::take(&mut state.timers);
            drop(state);
            if ready.is_empty() && active.is_empty() {
                return;
            }
            drop((ready, timers));
            // A wake brings a waiting task into the queue, from where the next round drops it.
            active.into_iter().for_each(|(_, waker)| waker.wake());
        }
    }
}

impl<H: Host> Drop for Executor<H> {
    fn drop(&mut self) {
        // Wakers that others hold must not keep futures alive that nobody will poll again.
        let active = core::mem::take(&mut self.state.get_mut().active);
        active.into_iter().for_each(|(_, waker)| waker.wake());
    }
}

/// What [`Executor::sleep_until`] returns. Dropping it cancels the timer.
pub struct Sleep<'a, H: Host> {
    executor: &'a Executor<H>,
    deadline_ns: u64,
    armed: Option<TimerKey>,
}

impl<H: Host> Sleep<'_, H> {
    fn cancel(&mut self) {
        if let Some(key) = self.armed.take() {
            let waker = self.executor.state.lock().timers.cancel(key);
            drop(waker);
        }
    }
}

impl<H: Host> Future for Sleep<'_, H> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.executor.host.monotonic_ns() >= self.deadline_ns {
            self.cancel();
            return Poll::Ready(());
        }
        let executor = self.executor;
        let mut state = executor.state.lock();
        if let Some(waker) = self.armed.and_then(|key| state.timers.get_mut(key)) {
            let old = (!waker.will_wake(cx.waker())).then(|| core::mem::replace(waker, cx.waker().clone()));
            drop(state);
            drop(old);
        } else {
            let earliest = state.timers.next_deadline_ns().is_none_or(|next| self.deadline_ns < next);
            self.armed = Some(state.timers.insert(self.deadline_ns, cx.waker().clone()));
            // If all threads sleep towards later deadlines, one must look again. One that does not sleep looks before it
            // does; to wake another for it would cost a hypercall for every timer of an otherwise idle executor.
            if earliest && state.sleepers == state.threads {
                executor.notify(state);
            }
        }
        Poll::Pending
    }
}

impl<H: Host> Drop for Sleep<'_, H> {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Waits for a task of [`Executor::spawn_join`]: its value, or `None` if the executor stopped first. Dropping it lets
/// the task run on alone.
pub struct JoinHandle<T>(Option<FallibleTask<T>>);

impl<T> JoinHandle<T> {
    /// Drops the task's future, at once or after the poll that runs now.
    pub fn cancel(mut self) {
        drop(self.0.take());
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        match &mut self.0 {
            Some(task) => Pin::new(task).poll(cx),
            None => Poll::Ready(None),
        }
    }
}

impl<T> Drop for JoinHandle<T> {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.detach();
        }
    }
}
