//! Ctrl-C (SIGINT) and SIGTERM end everything that a command started.
//!
//! Whoever starts something that must end registers how with [`on_interrupt`] and keeps the guard. The command
//! itself then ends in the usual way, because what it waits for has ended.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

type Hook = Box<dyn Fn() + Send>;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static NEXT: AtomicU64 = AtomicU64::new(0);
static HOOKS: Mutex<Vec<(u64, Hook)>> = Mutex::new(Vec::new());

/// Exit code after a second signal, which does not wait: 128 + SIGINT, as shells have it.
const IMPATIENT: i32 = 130;

/// Catches the signals from now on. Call once, early, in a command's `main`.
pub fn install() {
    // Fails only when called twice, which changes nothing.
    let _ = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(IMPATIENT);
        }
        run_hooks();
    });
}

/// Does what a signal would do.
pub fn request() {
    if !INTERRUPTED.swap(true, Ordering::SeqCst) {
        run_hooks();
    }
}

fn run_hooks() {
    for (_, hook) in HOOKS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        hook();
    }
}

/// Whether a signal came.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Takes its hook away when dropped.
#[must_use = "dropping the guard takes the hook away"]
#[derive(Debug)]
pub struct Guard(u64);

/// Calls `hook` when a signal comes, on a thread of its own; at once if one came before. A hook must not register others.
pub fn on_interrupt(hook: impl Fn() + Send + 'static) -> Guard {
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut hooks = HOOKS.lock().unwrap_or_else(PoisonError::into_inner);
    if interrupted() {
        hook();
    }
    hooks.push((id, Box::new(hook)));
    Guard(id)
}

impl Drop for Guard {
    fn drop(&mut self) {
        HOOKS.lock().unwrap_or_else(PoisonError::into_inner).retain(|(id, _)| *id != self.0);
    }
}
