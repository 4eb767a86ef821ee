//! [`crate::Console`].

use super::support::{MS, STUCK_NS, Stop, ensure, helper, wait_until};
use crate::Host;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

/// As far as it shows without reading back: every call returns, also two at once.
pub(super) fn returns<H: Host>(host: H) -> Result<(), Stop> {
    host.console_write(b"");
    let thread = helper(host, None, move || host.console_write(b"conformance: console, thread 1\n"))?;
    host.console_write(b"conformance: console, thread 0\n");
    thread.finish()
}

/// How often `needle` is in what the console showed, once all of it had time to come out.
fn seen(read_back: &mut dyn FnMut() -> Vec<u8>, needle: &[u8]) -> usize {
    read_back().windows(needle.len()).filter(|window| *window == needle).count()
}

pub(super) fn whole<H: Host>(host: H, read_back: &mut dyn FnMut() -> Vec<u8>) -> Result<(), Stop> {
    let mut line = b"conformance: ".to_vec();
    line.extend((0..500).map(|index| b'a' + (index % 26) as u8));
    line.push(b'\n');
    let before = seen(read_back, &line);
    host.console_write(&line);
    let came = wait_until(host, 500 * MS, || seen(read_back, &line) == before + 1);
    ensure!(came, "a line of {} bytes did not come out whole", line.len());
    Ok(())
}

pub(super) fn not_torn<H: Host>(host: H, read_back: &mut dyn FnMut() -> Vec<u8>) -> Result<(), Stop> {
    const LINES: usize = 50;
    let (one, two) = (b"conformance: one one one one\n", b"conformance: two two two two\n");
    let before = seen(read_back, one) + seen(read_back, two);
    // Both begin at once.
    let ready = Arc::new(AtomicU32::new(0));
    let meet = move |ready: &AtomicU32| {
        ready.fetch_add(1, SeqCst);
        wait_until(host, STUCK_NS, || ready.load(SeqCst) == 2);
    };
    let its_ready = ready.clone();
    let thread = helper(host, None, move || {
        meet(&its_ready);
        for _ in 0..LINES {
            host.console_write(one);
        }
    })?;
    meet(&ready);
    for _ in 0..LINES {
        host.console_write(two);
    }
    thread.finish()?;
    let mut whole = 0;
    wait_until(host, 500 * MS, || {
        whole = seen(read_back, one) + seen(read_back, two) - before;
        whole == 2 * LINES
    });
    ensure!(
        whole == 2 * LINES,
        "of {} lines that two threads wrote at once, {whole} came out whole",
        2 * LINES
    );
    Ok(())
}
