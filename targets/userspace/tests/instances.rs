//! Many instances live in one process, and give everything back. One test, because it counts what the process has.

use anykernel_userspace::link::Wire;
use anykernel_userspace::{ConsoleSink, HostDisk, Instance, Link};
use hypercall::{Clock, Error, Exit, ExitStatus, HostBlock, Memory, Threads};

const INSTANCES: usize = 200;

fn count(dir: &str) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

fn start_all(image: &[u8]) -> Vec<Instance> {
    let wires = (0..INSTANCES / 2).map(|_| Wire::pair(1500)).flat_map(|(a, b)| [a, b]);
    wires
        .map(|wire| {
            Instance::builder()
                .name("one of many")
                .memory(16 << 20)
                .console(ConsoleSink::Null)
                .disk(HostDisk::in_memory(image).unwrap())
                .link(Link::Wire(wire))
                .start()
                .unwrap()
        })
        .collect()
}

#[test]
fn two_hundred_instances_give_everything_back() {
    let image = vec![0; 1 << 20];
    // What a process makes once and keeps is made here.
    drop(start_all(&image));

    let before = (count("/proc/self/fd"), count("/proc/self/task"));
    let instances = start_all(&image);
    assert!(count("/proc/self/fd") >= before.0 + INSTANCES, "each instance has a disk of its own");
    let host = instances[7].host();
    assert_eq!(host.disk_count(), 1);
    // Instances do not see each other's ends.
    assert_eq!(instances[0].run(|_| ExitStatus::Failure), ExitStatus::Failure);
    assert_eq!(instances[1].run(|kernel| kernel.host().exit(ExitStatus::Usage)), ExitStatus::Usage);
    assert_eq!(instances[1].host().exit_status(), Some(ExitStatus::Usage));
    assert_eq!(instances[2].host().exit_status(), None);
    // A thread that ends the domain stops the whole instance, and only that.
    let kernel = instances[3].kernel().clone();
    let inside = kernel.host();
    kernel.spawn("ends", None, move || inside.exit(ExitStatus::Failure)).unwrap();
    while !kernel.stopping() {
        std::thread::yield_now();
    }
    drop(kernel);
    assert_eq!(instances[3].run(|_| ExitStatus::Success), ExitStatus::Failure);
    assert!(!instances[4].kernel().stopping());
    drop(instances);
    let after = (count("/proc/self/fd"), count("/proc/self/task"));
    assert_eq!(before, after, "descriptors and threads");

    // A handle that outlives its instance finds nothing, also when its slot is used again.
    let others = start_all(&image);
    assert_eq!(host.disk_count(), 0);
    assert_eq!(host.disk_info(0), Err(Error::Gone));
    assert_eq!(host.alloc_pages(1).unwrap_err(), Error::Gone);
    assert!(host.monotonic_ns() > 0);
    host.yield_now();
    drop(others);
}
