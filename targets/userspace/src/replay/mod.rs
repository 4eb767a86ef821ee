//! `anykernel replay`: a recorded domain again, in this process, whatever target it was recorded on.
//!
//! [`file`] reads the recording, [`engine`] keeps the order of its threads and compares their calls, [`host`] answers them, and
//! [`domain`] sets up what the target had set up.

mod domain;
mod engine;
mod file;
mod host;
mod usb;

pub use engine::{End, Outcome, anykernel_replay_stop};
pub use file::{Header, RecordingError, RecordingFile, header};
pub use host::Replayed;

use std::panic::AssertUnwindSafe;

/// What a panic said.
fn message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".into())
}

/// Replays a recording, up to its record `until` or to its end. Threads that were in the middle of something stay there: a
/// process replays once. With `debugged`, [`anykernel_replay_stop`] is called at `until` and the replay goes on.
pub fn replay(recording: RecordingFile, until: Option<u64>, debugged: bool) -> Outcome {
    let RecordingFile { header, records, .. } = recording;
    let engine: &'static engine::Engine = Box::leak(Box::new(engine::Engine::new(records, until, debugged)));
    let stop = domain::Stop::default();
    let conductor = stop.clone();
    std::thread::spawn(move || engine.conduct(|why| conductor.act(why)));
    std::thread::Builder::new()
        .name("0:main".into())
        .spawn(move || {
            let body = AssertUnwindSafe(|| domain::run(&header, Replayed(engine), &stop));
            if let Err(payload) = std::panic::catch_unwind(body) {
                engine.panicked(message(&*payload));
            }
        })
        .map_or_else(|error| engine.panicked(format!("no thread: {error}")), drop);
    engine.wait()
}
