//! What is written down about a guest while it runs: a trace, a recording, frames, USB.

use super::channel::GuestMemory;
use crate::control::Control;
use crate::link::Pcap;
use crate::record::Recording;
use crate::trace::Trace;
use crate::{Failure, NetSpec, RunSpec, replay, usb_pcap};
use std::fs::File;
use std::io::BufReader;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::thread::JoinHandle;

/// Everything that a [`RunSpec`] asks for.
#[derive(Default)]
pub(super) struct Watch {
    trace: Option<Trace>,
    recording: Option<Recording>,
    frames: Option<Frames>,
    usb: Option<usb_pcap::Pipe>,
    args: Vec<String>,
}

impl Watch {
    /// Begins, before a guest with `memory` bytes starts.
    pub(super) fn start(target: &str, spec: &RunSpec, memory: u64) -> Result<Self, Failure> {
        let mut watch = Self::default();
        if let Some(path) = spec.pcap.as_ref().filter(|_| !matches!(spec.net, NetSpec::None | NetSpec::Usb)) {
            let frames = Frames::start(path)?;
            watch.args.extend(frames.args());
            watch.frames = Some(frames);
        }
        if let Some(path) = &spec.usb_pcap {
            let pipe = usb_pcap::Pipe::start(path)?;
            watch.args.extend(pipe.args());
            watch.usb = Some(pipe);
        }
        if let Some(path) = &spec.trace {
            let memory = GuestMemory::new(memory)?;
            watch.args.extend(memory.args());
            let control = spec.control.as_deref().map(Control::listen).transpose()?;
            let events = move || memory.find().and_then(|channel| Some((channel.events()?, channel.notes())));
            watch.trace = Some(Trace::follow(path, &spec.config.hostname, control, events)?);
        }
        if let Some(path) = &spec.record {
            let memory = GuestMemory::new(memory)?;
            watch.args.extend(memory.args());
            let header = replay::header(target, spec);
            let bytes = move || memory.find().and_then(|channel| channel.bytes());
            watch.recording = Some(Recording::follow(path, &header, spec.record_limit, bytes)?);
        }
        Ok(watch)
    }

    /// What QEMU is told about it.
    pub(super) fn args(&self) -> &[String] {
        &self.args
    }

    /// The guest has ended.
    pub(super) fn finish(self) -> Result<(), Failure> {
        self.frames.map_or(Ok(()), Frames::finish)?;
        self.usb.map_or(Ok(()), usb_pcap::Pipe::finish)?;
        self.trace.map_or(Ok(()), Trace::finish)?;
        self.recording.map_or(Ok(()), Recording::finish)
    }
}

/// The pipe through which QEMU says the link's frames, in a format that Wireshark calls old.
struct Frames {
    /// Open as long as QEMU may want to open it by its name.
    pipe: OwnedFd,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Frames {
    fn start(path: &Path) -> Result<Self, Failure> {
        let pcap = Pcap::create(path)?;
        let fail = |error: std::io::Error| Failure::new(format!("recording frames: {error}"));
        let (from, pipe) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|error| fail(error.into()))?;
        let body = move || {
            let result = pcap.record_old(BufReader::new(File::from(from)));
            pcap.flush();
            result
        };
        let thread = std::thread::Builder::new().name("pcap".into()).spawn(body).map_err(fail)?;
        Ok(Self { pipe, thread })
    }

    fn args(&self) -> [String; 2] {
        let file = format!("/proc/{}/fd/{}", std::process::id(), self.pipe.as_raw_fd());
        ["-object".into(), format!("filter-dump,id=dump0,netdev=net0,file={file}")]
    }

    fn finish(self) -> Result<(), Failure> {
        drop(self.pipe);
        match self.thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Failure::new(format!("recording frames: {error}"))),
            Err(_) => Err(Failure::new("recording frames: the thread panicked")),
        }
    }
}
