//! Tasks: futures run by threads, and waiting for one future on the calling thread.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::task::Wake;
use core::future::Future;
use core::pin::{Pin, pin};
use core::task::{Context, Poll, Waker};

use crate::sync::Mutex;
use crate::timer::TimerQueue;
use hypercall::{Host, Signal};

struct ThreadWaker<H> {
    host: H,
    signal: Signal,
}

impl<H: Host> Wake for ThreadWaker<H> {
    fn wake(self: Arc<Self>) {
        self.signal.raise(&self.host);
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.signal.raise(&self.host);
    }
}

/// Runs `future` on the calling thread until it is ready, or gives up at `deadline_ns` with `None`.
/// Context: thread. Blocks.
pub fn block_on_until<H: Host, F: Future>(host: H, future: F, deadline_ns: Option<u64>) -> Option<F::Output> {
    let mut future = pin!(future);
    let thread = Arc::new(ThreadWaker { host, signal: Signal::new() });
    let waker = Waker::from(thread.clone());
    let mut cx = Context::from_waker(&waker);
    loop {
        let seen = thread.signal.count();
        if let Poll::Ready(value) = future.as_mut().poll(&mut cx) {
            return Some(value);
        }
        if !thread.signal.wait(&host, seen, deadline_ns) {
            return None;
        }
    }
}

/// Runs `future` on the calling thread until it is ready. Context: thread. Blocks.
pub fn block_on<H: Host, F: Future>(host: H, future: F) -> F::Output {
    loop {
        // Without a deadline only `Some` comes back.
        if let Some(value) = block_on_until(host, future, None) {
            return value;
        }
        unreachable!("a wait without deadline timed out");
    }
}

type BoxedTask = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Queue {
    next_id: u64,
    ready: VecDeque<u64>,
    tasks: BTreeMap<u64, BoxedTask>,
    timers: TimerQueue<Waker>,
    stopping: bool,
}

/// Runs tasks on the threads that call [`Executor::run`]; usually one executor and one thread per CPU.
pub struct Executor<H: Host> {
    host: H,
    signal: Signal,
    queue: Mutex<H, Queue>,
}

struct TaskWaker<H: Host> {
    executor: Arc<Executor<H>>,
    id: u64,
}

impl<H: Host> Wake for TaskWaker<H> {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        let mut queue = self.executor.queue.lock();
        if !queue.ready.contains(&self.id) {
            queue.ready.push_back(self.id);
            drop(queue);
            self.executor.signal.raise(&self.executor.host);
        }
    }
}

impl<H: Host> Executor<H> {
    /// An executor without tasks.
    pub fn new(host: H) -> Arc<Self> {
        let queue = Queue {
            next_id: 0,
            ready: VecDeque::new(),
            tasks: BTreeMap::new(),
            timers: TimerQueue::default(),
            stopping: false,
        };
        Arc::new(Self { host, signal: Signal::new(), queue: Mutex::new(host, queue) })
    }

    /// Adds a task. Context: thread.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        let mut queue = self.queue.lock();
        let id = queue.next_id;
        queue.next_id += 1;
        queue.tasks.insert(id, Box::pin(future));
        queue.ready.push_back(id);
        drop(queue);
        self.signal.raise(&self.host);
    }

    /// Ready at `deadline_ns`.
    pub async fn sleep_until(&self, deadline_ns: u64) {
        let mut armed = None;
        core::future::poll_fn(|cx| {
            if self.host.monotonic_ns() >= deadline_ns {
                return Poll::Ready(());
            }
            let mut queue = self.queue.lock();
            if let Some(key) = armed.take() {
                queue.timers.cancel(key);
            }
            armed = Some(queue.timers.insert(deadline_ns, cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }

    /// Makes every [`Executor::run`] return; tasks that are left are dropped.
    pub fn stop(&self) {
        self.queue.lock().stopping = true;
        self.signal.raise(&self.host);
    }

    /// Runs tasks on this thread until [`Executor::stop`]. Context: thread. Blocks.
    pub fn run(self: &Arc<Self>) {
        loop {
            let seen = self.signal.count();
            let now = self.host.monotonic_ns();
            let mut queue = self.queue.lock();
            if queue.stopping {
                let tasks = core::mem::take(&mut queue.tasks);
                drop(queue);
                drop(tasks);
                return;
            }
            if let Some(waker) = queue.timers.pop_due(now) {
                drop(queue);
                waker.wake();
                continue;
            }
            let next = queue.ready.pop_front().and_then(|id| queue.tasks.remove(&id).map(|task| (id, task)));
            let deadline = queue.timers.next_deadline_ns();
            let idle = next.is_none() && queue.ready.is_empty();
            drop(queue);
            if let Some((id, mut task)) = next {
                let waker = Waker::from(Arc::new(TaskWaker { executor: self.clone(), id }));
                if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                    self.queue.lock().tasks.insert(id, task);
                }
            } else if idle {
                self.signal.wait(&self.host, seen, deadline);
            }
        }
    }
}
