//! One running instance: its host, its configuration, and what components registered.

use crate::block::BlockDevice;
use crate::config::Config;
use crate::counter::{Counter, Counters};
use crate::fs::{FsType, Namespace};
use crate::input::InputDevice;
use crate::manifest::Manifest;
use crate::nic::Nic;
use crate::socket::SocketProvider;
use crate::sync::Mutex;
use crate::task::Executor;
use alloc::{boxed::Box, string::String, sync::Arc, vec::Vec};
use core::any::Any;
use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};
use hypercall::layers::ByteRing;
use hypercall::{CpuId, Host, Refusal, Signal, ThreadId, ThreadSpec};

/// Why an instance or a component did not start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartError {
    /// Built against another contract than this host has.
    Refused {
        /// Which component.
        component: &'static str,
        /// In what they differ.
        refusal: Refusal,
    },
    /// The configuration is wrong; the line says where and what to do.
    Config(String),
    /// A hypercall failed while `what` was set up.
    Host {
        /// What was being done, as in "starting thread net0".
        what: String,
        /// How it failed.
        error: hypercall::Error,
    },
    /// Something else, in one line that says what to do.
    Other(String),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Refused { component, refusal } => write!(f, "{component}: {refusal}"),
            StartError::Config(line) | StartError::Other(line) => f.write_str(line),
            StartError::Host { what, error } => write!(f, "{what}: {error}"),
        }
    }
}

impl core::error::Error for StartError {}

struct Registry<H: Host> {
    manifests: Vec<Manifest>,
    block_devices: Vec<Arc<dyn BlockDevice>>,
    nics: Vec<Arc<dyn Nic>>,
    inputs: Vec<Arc<dyn InputDevice>>,
    fs_types: Vec<Arc<dyn FsType>>,
    namespace: Option<Arc<dyn Namespace>>,
    sockets: Option<Arc<dyn SocketProvider>>,
    provided: Vec<Arc<dyn Any + Send + Sync>>,
    counters: Counters,
    threads: Vec<ThreadId>,
    executors: Vec<Arc<Executor<H>>>,
    stop_signals: Vec<Arc<Signal>>,
    stop_hooks: Vec<Box<dyn FnOnce() + Send>>,
}

/// One instance.
pub struct Kernel<H: Host> {
    host: H,
    config: Config,
    stopping: AtomicBool,
    registry: Mutex<H, Registry<H>>,
}

impl<H: Host> Kernel<H> {
    /// An instance on `host` with the given configuration and nothing registered.
    pub fn new(host: H, config: Config) -> Arc<Self> {
        let registry = Registry {
            manifests: Vec::new(),
            block_devices: Vec::new(),
            nics: Vec::new(),
            inputs: Vec::new(),
            fs_types: Vec::new(),
            namespace: None,
            sockets: None,
            provided: Vec::new(),
            counters: Counters(Vec::new()),
            threads: Vec::new(),
            executors: Vec::new(),
            stop_signals: Vec::new(),
            stop_hooks: Vec::new(),
        };
        Arc::new(Self {
            host,
            config,
            stopping: AtomicBool::new(false),
            registry: Mutex::new(host, registry),
        })
    }

    /// The host.
    pub fn host(&self) -> H {
        self.host
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Admits a component: checks its contracts against the host's. Components call this first.
    pub fn admit(&self, manifest: Manifest) -> Result<(), StartError> {
        if !manifest.contracts.iter().any(|contract| contract.name == hypercall::ContractVersion::CORE.name) {
            let line = "its manifest does not say which core contract it was built against";
            return Err(StartError::Other(alloc::format!("{}: {line}", manifest.name)));
        }
        hypercall::check_versions(manifest.contracts, self.host.contracts())
            .map_err(|refusal| StartError::Refused { component: manifest.name, refusal })?;
        self.registry.lock().manifests.push(manifest);
        Ok(())
    }

    /// The manifests of all admitted components.
    pub fn manifests(&self) -> Vec<Manifest> {
        self.registry.lock().manifests.clone()
    }

    /// Registers a block device.
    pub fn add_block_device(&self, device: Arc<dyn BlockDevice>) {
        self.registry.lock().block_devices.push(device);
    }

    /// Forgets the block device `name`, which is gone, and its partitions. Whoever uses them sees errors.
    pub fn remove_block_device(&self, name: &str) {
        let of_it = |other: &str| {
            let rest = other.strip_prefix(name);
            rest.is_some_and(|rest| {
                let number = rest.strip_prefix('p').filter(|number| !number.is_empty());
                rest.is_empty()
                    || number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
            })
        };
        let mut registry = self.registry.lock();
        let (gone, left) =
            core::mem::take(&mut registry.block_devices).into_iter().partition(|one| of_it(&one.info().name));
        registry.block_devices = left;
        drop(registry);
        drop::<Vec<_>>(gone);
    }

    /// All block devices, in the order of registration.
    pub fn block_devices(&self) -> Vec<Arc<dyn BlockDevice>> {
        self.registry.lock().block_devices.clone()
    }

    /// Registers a network interface. A network stack that runs already takes it in. Context: thread; may wait for the stack.
    pub fn add_nic(&self, nic: Arc<dyn Nic>) {
        let mut registry = self.registry.lock();
        registry.nics.push(nic.clone());
        let sockets = registry.sockets.clone();
        drop(registry);
        if let Some(sockets) = sockets {
            let name = nic.info().name.clone();
            if let Err(error) = sockets.attach(nic) {
                log::error!("{name}: the network stack does not take it: {error}");
            }
        }
    }

    /// Forgets the network interface `name`, which is gone. Connections over it fail. Context: as [`Kernel::add_nic`].
    pub fn remove_nic(&self, name: &str) {
        let mut registry = self.registry.lock();
        let (gone, left) =
            core::mem::take(&mut registry.nics).into_iter().partition(|one| one.info().name == name);
        registry.nics = left;
        let sockets = registry.sockets.clone();
        drop(registry);
        sockets.into_iter().for_each(|sockets| sockets.detach(name));
        drop::<Vec<_>>(gone);
    }

    /// A name that no network interface has: `nic0`, `nic1`, ...
    pub fn free_nic_name(&self) -> String {
        let registry = self.registry.lock();
        let free = |name: &String| registry.nics.iter().all(|nic| nic.info().name != *name);
        (0..=registry.nics.len()).map(|index| alloc::format!("nic{index}")).find(free).unwrap_or_default()
    }

    /// All network interfaces, in the order of registration.
    pub fn nics(&self) -> Vec<Arc<dyn Nic>> {
        self.registry.lock().nics.clone()
    }

    /// Registers an input device.
    pub fn add_input(&self, device: Arc<dyn InputDevice>) {
        self.registry.lock().inputs.push(device);
    }

    /// Forgets the input device `name`, which is gone.
    pub fn remove_input(&self, name: &str) {
        let mut registry = self.registry.lock();
        let (gone, left) =
            core::mem::take(&mut registry.inputs).into_iter().partition(|one| one.info().name == name);
        registry.inputs = left;
        drop(registry);
        drop::<Vec<_>>(gone);
    }

    /// All input devices, in the order of registration.
    pub fn inputs(&self) -> Vec<Arc<dyn InputDevice>> {
        self.registry.lock().inputs.clone()
    }

    /// Registers a kind of file system.
    pub fn add_fs_type(&self, kind: Arc<dyn FsType>) {
        self.registry.lock().fs_types.push(kind);
    }

    /// All kinds of file systems.
    pub fn fs_types(&self) -> Vec<Arc<dyn FsType>> {
        self.registry.lock().fs_types.clone()
    }

    /// Sets the tree of mounts (the vfs component does).
    pub fn set_namespace(&self, namespace: Arc<dyn Namespace>) {
        self.registry.lock().namespace = Some(namespace);
    }

    /// The tree of mounts, if a vfs component runs.
    pub fn namespace(&self) -> Option<Arc<dyn Namespace>> {
        self.registry.lock().namespace.clone()
    }

    /// Sets the network stack (the net component does).
    pub fn set_sockets(&self, sockets: Arc<dyn SocketProvider>) {
        self.registry.lock().sockets = Some(sockets);
    }

    /// The network stack, if a net component runs.
    pub fn sockets(&self) -> Option<Arc<dyn SocketProvider>> {
        self.registry.lock().sockets.clone()
    }

    /// Keeps something that components offer to applications and that has no registry of its own, for [`Kernel::provided`].
    pub fn provide(&self, one: Arc<dyn Any + Send + Sync>) {
        self.registry.lock().provided.push(one);
    }

    /// Everything of type `T` that was provided, in that order.
    pub fn provided<T: Any + Send + Sync>(&self) -> Vec<Arc<T>> {
        let all = self.registry.lock().provided.clone();
        all.into_iter().filter_map(|one| one.downcast().ok()).collect()
    }

    /// The counter `name`, made at first use.
    pub fn counter(&self, name: &str) -> Counter {
        self.registry.lock().counters.get_or_add(name)
    }

    /// All counters with their values.
    pub fn counters(&self) -> Vec<(String, u64)> {
        self.registry.lock().counters.0.iter().map(|(name, counter)| (name.clone(), counter.get())).collect()
    }

    /// Starts a thread that writes all counters to `to` twice a second, as lines of a name and a number with an empty one after
    /// the last; what nobody reads in time is left out.
    pub fn report_counters(self: &Arc<Self>, to: ByteRing) -> Result<(), StartError> {
        const PERIOD_NS: u64 = 500_000_000;
        let (kernel, signal) = (Arc::downgrade(self), Arc::new(Signal::new()));
        self.raise_on_stop(signal.clone());
        self.spawn("counters", None, move || {
            loop {
                let seen = signal.count();
                let Some(kernel) = kernel.upgrade() else { return };
                let mut text = String::new();
                for (name, value) in kernel.counters() {
                    // A string takes everything.
                    let _ = writeln!(text, "{name} {value}");
                }
                text.push('\n');
                if to.has_room_for(text.len()) {
                    to.write(text.as_bytes(), || false);
                }
                let (host, stopping) = (kernel.host(), kernel.stopping());
                drop(kernel);
                if stopping {
                    return;
                }
                signal.wait(&host, seen, Some(host.monotonic_ns().saturating_add(PERIOD_NS)));
            }
        })
    }

    /// Starts a thread that [`Kernel::shutdown`] joins. It must return soon after [`Kernel::stopping`] turned true; if it
    /// sleeps on a signal, give that to [`Kernel::raise_on_stop`].
    pub fn spawn(
        &self,
        name: &str,
        cpu: Option<CpuId>,
        entry: impl FnOnce() + Send + 'static,
    ) -> Result<(), StartError> {
        let thread = self
            .host
            .spawn(ThreadSpec { name, cpu }, Box::new(entry))
            .map_err(|error| StartError::Host { what: alloc::format!("starting thread {name}"), error })?;
        self.registry.lock().threads.push(thread);
        Ok(())
    }

    /// Starts an executor with one thread bound to each CPU, at most `config.workers` of them unless that is 0.
    /// It stops with the instance; tasks that are left are dropped then. Context: thread.
    pub fn start_executor(&self, name: &str) -> Result<Arc<Executor<H>>, StartError> {
        let cpus = self.host.cpu_count();
        let threads = if self.config.workers == 0 { cpus } else { self.config.workers.min(cpus) };
        self.start_executor_on(name, (0..threads).map(CpuId))
    }

    /// Starts an executor with one thread on each of `cpus`: with a single one, its tasks never change the CPU.
    pub fn start_executor_on(
        &self,
        name: &str,
        cpus: impl IntoIterator<Item = CpuId>,
    ) -> Result<Arc<Executor<H>>, StartError> {
        let executor = Executor::new(self.host);
        self.registry.lock().executors.push(executor.clone());
        for cpu in cpus {
            let running = executor.clone();
            let name = alloc::format!("{name}{}", cpu.0);
            if let Err(error) = self.spawn(&name, Some(cpu), move || running.run()) {
                executor.stop();
                return Err(error);
            }
        }
        // The instance may have been stopped while the list did not have this one yet.
        if self.stopping() {
            executor.stop();
        }
        Ok(executor)
    }

    /// `executor` stops when the instance does. For an executor whose threads the caller starts.
    pub fn stop_executor_on_stop(&self, executor: Arc<Executor<H>>) {
        self.registry.lock().executors.push(executor.clone());
        if self.stopping() {
            executor.stop();
        }
    }

    /// `signal` is raised when the instance stops.
    pub fn raise_on_stop(&self, signal: Arc<Signal>) {
        self.registry.lock().stop_signals.push(signal);
    }

    /// `hook` runs on the thread that shuts down, after all threads were joined; last registered, first run.
    pub fn run_on_stop(&self, hook: impl FnOnce() + Send + 'static) {
        self.registry.lock().stop_hooks.push(Box::new(hook));
    }

    /// Whether the instance is on its way down.
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Sleeps until the instance is on its way down: what an application's main thread does when others serve.
    /// Context: thread. Blocks.
    pub fn wait_for_stop(&self) {
        let stop = Arc::new(Signal::new());
        self.raise_on_stop(stop.clone());
        loop {
            let seen = stop.count();
            if self.stopping() {
                return;
            }
            stop.wait(&self.host, seen, None);
        }
    }

    /// Asks every thread to end; does not wait. Context: thread.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let registry = self.registry.lock();
        let signals = registry.stop_signals.clone();
        let executors = registry.executors.clone();
        drop(registry);
        for signal in signals {
            signal.raise(&self.host);
        }
        for executor in executors {
            executor.stop();
        }
    }

    /// Stops, joins every thread, runs the stop hooks, syncs file systems and forgets everything registered, so that
    /// nothing keeps the instance alive. Context: a thread that this kernel did not spawn. Blocks.
    pub fn shutdown(&self) {
        self.stop();
        loop {
            let threads = core::mem::take(&mut self.registry.lock().threads);
            if threads.is_empty() {
                break;
            }
            for thread in threads {
                // A thread that ended by panic has nothing left to wait for.
                let _ = self.host.join(thread);
            }
            self.stop();
        }
        let hooks = core::mem::take(&mut self.registry.lock().stop_hooks);
        for hook in hooks.into_iter().rev() {
            hook();
        }
        if let Some(namespace) = self.namespace()
            && let Err(error) = namespace.sync()
        {
            log::error!("sync at shutdown: {error}");
        }
        let mut registry = self.registry.lock();
        let namespace = registry.namespace.take();
        let sockets = registry.sockets.take();
        let devices = core::mem::take(&mut registry.block_devices);
        let nics = core::mem::take(&mut registry.nics);
        let inputs = core::mem::take(&mut registry.inputs);
        let kinds = core::mem::take(&mut registry.fs_types);
        let signals = core::mem::take(&mut registry.stop_signals);
        let executors = core::mem::take(&mut registry.executors);
        drop(registry);
        // Its own threads do so when they end, unless they ended by a panic; tasks often hold their executor.
        executors.iter().for_each(|executor| executor.drop_tasks());
        drop((namespace, sockets, devices, nics, inputs, kinds, signals, executors));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercall::Threads;
    use hypercall::testing::TestHost;
    extern crate std;

    #[test]
    fn an_executor_runs_on_every_cpu_and_ends_with_the_instance() {
        let host = TestHost::new();
        let kernel = Kernel::new(host, Config::default());
        let executor = kernel.start_executor("app").unwrap();
        assert_eq!(crate::task::block_on(host, executor.spawn_join(async { 5 })), Some(5));
        let waiting = executor.spawn_join(core::future::pending::<()>());
        kernel.shutdown();
        assert_eq!(crate::task::block_on(host, waiting), None);
        assert_eq!(Arc::strong_count(&executor), 1);
    }

    /// A task that holds its executor keeps nothing alive, although the thread that would drop it is gone.
    #[test]
    fn a_thread_that_panicked_leaves_no_tasks_behind() {
        let kernel = Kernel::new(TestHost::new(), Config::default());
        let executor = kernel.start_executor_on("app", [CpuId(0)]).unwrap();
        let (held, its) = (Arc::new(()), executor.clone());
        let mine = held.clone();
        executor.spawn(async move {
            core::future::pending::<()>().await;
            drop((its, mine));
        });
        executor.spawn(async { std::panic::resume_unwind(Box::new("on purpose")) });
        let threads = core::mem::take(&mut kernel.registry.lock().threads);
        for thread in threads {
            assert!(kernel.host.join(thread).is_err());
        }
        drop(executor);
        kernel.shutdown();
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[test]
    fn workers_limits_the_threads() {
        let kernel = Kernel::new(TestHost::new(), Config { workers: 1, ..Config::default() });
        kernel.start_executor("app").unwrap();
        assert_eq!(kernel.registry.lock().threads.len(), 1);
        kernel.shutdown();
    }

    #[test]
    fn an_executor_on_a_cpu_that_is_not_there_is_refused() {
        let kernel = Kernel::new(TestHost::new(), Config::default());
        let error = kernel.start_executor_on("app", [CpuId(99)]).err().unwrap();
        assert_eq!(alloc::format!("{error}"), "starting thread app99: invalid argument");
        kernel.shutdown();
    }

    #[test]
    fn shutdown_wakes_joins_and_runs_hooks_backwards() {
        let host = TestHost::new();
        let kernel = Kernel::new(host, Config::default());
        let signal = Arc::new(Signal::new());
        kernel.raise_on_stop(signal.clone());
        let order = Arc::new(Mutex::new(host, Vec::new()));
        let (waiting, its_order) = (kernel.clone(), order.clone());
        kernel
            .spawn("waits", None, move || {
                while !waiting.stopping() {
                    let seen = signal.count();
                    if !waiting.stopping() {
                        signal.wait(&waiting.host(), seen, None);
                    }
                }
                its_order.lock().push("thread");
            })
            .unwrap();
        for name in ["first", "second"] {
            let order = order.clone();
            kernel.run_on_stop(move || order.lock().push(name));
        }
        kernel.shutdown();
        assert_eq!(*order.lock(), ["thread", "second", "first"]);
        assert!(kernel.stopping());
        // Nothing keeps it alive.
        assert_eq!(Arc::strong_count(&kernel), 1);
        kernel.shutdown();
    }

    /// A thread that is started while the instance stops is joined too.
    #[test]
    fn shutdown_joins_late_threads() {
        let kernel = Kernel::new(TestHost::new(), Config::default());
        let done = Arc::new(AtomicBool::new(false));
        let (late, its_done) = (kernel.clone(), done.clone());
        kernel
            .spawn("early", None, move || {
                std::thread::sleep(core::time::Duration::from_millis(5));
                late.spawn("late", None, move || {
                    std::thread::sleep(core::time::Duration::from_millis(5));
                    its_done.store(true, Ordering::SeqCst);
                })
                .unwrap();
            })
            .unwrap();
        kernel.shutdown();
        assert!(done.load(Ordering::SeqCst));
    }

    #[test]
    fn counters_are_reported_until_the_end() {
        let (kernel, ring) = (Kernel::new(TestHost::new(), Config::default()), ByteRing::new(4096).unwrap());
        kernel.counter("net.drops").add(2);
        kernel.report_counters(ring).unwrap();
        kernel.counter("vfs.hits").add(7);
        kernel.shutdown();
        let mut text = Vec::new();
        ring.read(&mut text);
        let text = String::from_utf8(text).unwrap();
        assert!(text.ends_with("net.drops 2\nvfs.hits 7\n\n"), "{text}");
    }

    #[test]
    fn counters_are_shared_by_name() {
        let kernel = Kernel::new(TestHost::new(), Config::default());
        kernel.counter("net.drops").add(2);
        kernel.counter("net.drops").increment();
        kernel.counter("vfs.hits");
        assert_eq!(kernel.counters(), [("net.drops".into(), 3), ("vfs.hits".into(), 0)]);
    }
}
