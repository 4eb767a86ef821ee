//! QEMU's machine protocol, as far as tests and benchmarks need it: plugging, and asking.

use crate::Failure;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A connection to a QEMU that was started with `-qmp unix:PATH,server=on,wait=off`.
#[derive(Debug)]
pub struct Qmp(BufReader<UnixStream>);

fn told(error: std::io::Error) -> Failure {
    Failure::new(format!("QMP: {error}"))
}

impl Qmp {
    /// Connects as soon as QEMU listens, and gives it `patience` for that and for each answer.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, Failure> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > patience => return Err(told(error)),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        stream.set_read_timeout(Some(patience)).map_err(told)?;
        let mut this = Self(BufReader::new(stream));
        this.read()?;
        this.ask("qmp_capabilities", json!({}))?;
        Ok(this)
    }

    fn read(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        match self.0.read_line(&mut line).map_err(told)? {
            0 => Err(Failure::new("QMP: QEMU has ended")),
            _ => serde_json::from_str(&line).map_err(|error| Failure::new(format!("QMP: {error}"))),
        }
    }

    /// Has a command carried out. Events in front of its answer are skipped.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, Failure> {
        let text = json!({ "execute": command, "arguments": arguments });
        self.0.get_mut().write_all(format!("{text}\n").as_bytes()).map_err(told)?;
        loop {
            let mut answer = self.read()?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(Failure::new(format!("QMP: {command}: {error}")));
            }
        }
    }

    /// Waits for the event of this name, in front of which others are skipped.
    pub fn event(&mut self, name: &str) -> Result<(), Failure> {
        while self.read()?["event"] != name {}
        Ok(())
    }
}
