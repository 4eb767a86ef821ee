//! What blocks on the host, done on a thread of its own, in order.

use crate::device::Platform;
use crate::engine::Failure;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::sync::Mutex;
use core::future::Future;
use core::pin::Pin;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Poll, Waker};
use hypercall::{Error, Host, HostUsb, Signal, UsbDeviceId, UsbDeviceInfo};

/// The list is looked at this often where the host does not tell of hot plug.
const LIST_NS: u64 = 1_000_000_000;

type Job<H> = Box<dyn FnOnce(&H) + Send>;

/// Does what blocks, in order, and looks at the list of devices.
pub(super) struct Worker<H: Host> {
    host: H,
    /// Raised for jobs, and by the host for hot plug.
    pub(super) signal: Arc<Signal>,
    /// What its results wake.
    engine_signal: Arc<Signal>,
    jobs: Mutex<H, VecDeque<Job<H>>>,
    /// Somebody does the jobs; otherwise they are done at once by whoever has them.
    running: AtomicBool,
    /// What is there, whether that is news, and who waits for news.
    list: Mutex<H, (Vec<UsbDeviceInfo>, bool, Option<Waker>)>,
}

impl<H: Host + HostUsb> Worker<H> {
    pub(super) fn new(host: H, engine_signal: Arc<Signal>) -> Self {
        Self {
            host,
            signal: Arc::new(Signal::new()),
            engine_signal,
            jobs: Mutex::new(host, VecDeque::new()),
            running: AtomicBool::new(false),
            list: Mutex::new(host, (Vec::new(), false, None)),
        }
    }

    /// From now on, or no longer, a thread is in [`Worker::run`].
    pub(super) fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::Release);
    }

    /// Has `job` done; the future is for its result.
    pub(super) fn call<T: Send + 'static>(&self, job: impl FnOnce(&H) -> T + Send + 'static) -> Call<H, T> {
        let state = Arc::new(Mutex::new(self.host, (None, None)));
        let (result, engine) = (state.clone(), self.engine_signal.clone());
        let job: Job<H> = Box::new(move |host| {
            let value = job(host);
            let waker: Option<Waker> = {
                let mut state = result.lock();
                state.0 = Some(value);
                state.1.take()
            };
            waker.into_iter().for_each(Waker::wake);
            engine.raise(host);
        });
        let mut jobs = self.jobs.lock();
        // While they are locked nobody stops doing them.
        if self.running.load(Ordering::Acquire) {
            jobs.push_back(job);
            drop(jobs);
            self.signal.raise(&self.host);
        } else {
            drop(jobs);
            job(&self.host);
        }
        Call { state }
    }

    /// Lists what is there, and tells whoever watches if it has changed.
    pub(super) fn look(&self) {
        let mut found = Vec::new();
        self.host.usb_devices(&mut |info| found.push(info));
        let mut list = self.list.lock();
        if list.0 != found {
            (list.0, list.1) = (found, true);
            let waker = list.2.take();
            drop(list);
            waker.into_iter().for_each(Waker::wake);
            self.engine_signal.raise(&self.host);
        }
    }

    /// What was there when somebody last looked.
    pub(super) fn listed(&self) -> Vec<UsbDeviceInfo> {
        self.list.lock().0.clone()
    }

    /// Waits until that has changed.
    pub(super) async fn changed(&self) {
        core::future::poll_fn(|cx| {
            let mut list = self.list.lock();
            if core::mem::take(&mut list.1) {
                return Poll::Ready(());
            }
            list.2 = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// What the thread does.
    pub(super) fn run(&self, told: bool, stopping: impl Fn() -> bool) {
        loop {
            let seen = self.signal.count();
            while let Some(job) = self.next_job() {
                job(&self.host);
            }
            if stopping() {
                break;
            }
            self.look();
            let deadline_ns = (!told).then(|| self.host.monotonic_ns().saturating_add(LIST_NS));
            self.signal.wait(&self.host, seen, deadline_ns);
        }
        let jobs = self.jobs.lock();
        self.set_running(false);
        drop(jobs);
        while let Some(job) = self.next_job() {
            job(&self.host);
        }
    }

    fn next_job(&self) -> Option<Job<H>> {
        self.jobs.lock().pop_front()
    }
}

/// A result, and who waits for it.
type Awaited<T> = (Option<T>, Option<Waker>);

pub(super) struct Call<H: Host, T> {
    state: Arc<Mutex<H, Awaited<T>>>,
}

impl<H: Host, T> Future for Call<H, T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut core::task::Context<'_>) -> Poll<T> {
        let mut state = self.state.lock();
        match state.0.take() {
            Some(value) => Poll::Ready(value),
            None => {
                state.1 = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// One open device of the platform.
pub(super) struct PlatformDevice<H: Host> {
    pub(super) worker: Arc<Worker<H>>,
    pub(super) id: UsbDeviceId,
}

type Operation = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

impl<H: Host + HostUsb> PlatformDevice<H> {
    fn call(&self, job: impl FnOnce(&H, UsbDeviceId) -> hypercall::Result<()> + Send + 'static) -> Operation {
        let id = self.id;
        let call = self.worker.call(move |host| job(host, id));
        Box::pin(async move { call.await.map_err(failure) })
    }
}

fn failure(error: Error) -> Failure {
    match error {
        Error::Gone => Failure::Gone,
        error => Failure::Host(error),
    }
}

impl<H: Host + HostUsb> Platform for PlatformDevice<H> {
    fn claim(&self, interface: u8) -> Operation {
        self.call(move |host, id| host.usb_claim(id, interface))
    }
    fn set_alternate(&self, interface: u8, alternate: u8) -> Operation {
        self.call(move |host, id| host.usb_set_alternate(id, interface, alternate))
    }
    fn clear_halt(&self, endpoint: u8) -> Operation {
        self.call(move |host, id| host.usb_clear_halt(id, endpoint))
    }
    fn reset(&self) -> Operation {
        self.call(|host, id| host.usb_reset(id))
    }
}
