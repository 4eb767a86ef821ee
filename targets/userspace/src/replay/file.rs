//! Recordings, read back.

use crate::RunSpec;
use anykernel::config::Config;
use anykernel_usb::Options;
use hypercall::layers::recorded::{CorruptChunk, Event, MAGIC, NoRecord, Record, digest, take_chunk};
use hypercall::{Call, ContractVersion};
use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::OnceLock;

/// Raised when an old replayer would misunderstand a new recording.
const FORMAT: u64 = 2;

/// The contracts that a recording knows.
const CONTRACTS: [ContractVersion; 8] = [
    ContractVersion::CORE,
    ContractVersion::DMA,
    ContractVersion::MMIO,
    ContractVersion::PCI,
    ContractVersion::IRQ,
    ContractVersion::BLOCK,
    ContractVersion::LINK,
    ContractVersion::USB,
];

/// Why a recording cannot be replayed. Each is one line that says what to do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordingError {
    /// The file cannot be read.
    #[error("{0}: is the path right?")]
    Io(String),
    /// It begins otherwise.
    #[error("it is not a recording: make one with `anykernel run APP --record FILE`")]
    NotARecording,
    /// Nothing in it is whole.
    #[error("it is cut short before its first call: record again")]
    Empty,
    /// Its chunks are whole, but not what is in them.
    #[error("call {0} of it makes no sense: record again, and please report it")]
    Invalid(u64),
    /// A chunk whose checksum is wrong, and the byte where it begins.
    #[error("it is corrupt at byte {0}: copy it again from where it was recorded, or record again")]
    Corrupt(usize),
    /// Made by another version of this program.
    #[error(
        "it was made by another version ({what}: {theirs}, here {ours}): replay it with that one, or record again"
    )]
    OtherVersion {
        /// Of what.
        what: String,
        /// The recording's.
        theirs: String,
        /// This program's.
        ours: String,
    },
    /// It needs a component that this program does not have.
    #[error("it needs the component {0}, which this build does not have: replay it with a build that has it")]
    MissingComponent(String),
    /// It is of an application that this program does not have.
    #[error(
        "it is of the application {0}, which this build does not have: replay it with a build that has it"
    )]
    MissingApplication(String),
}

/// What a recording is of.
#[derive(Debug, Clone)]
pub struct Header {
    /// `userspace`, `rumprun` or `linux-module`.
    pub target: String,
    /// The domain's configuration, which names the application.
    pub config: Config,
    /// Whether USB was among its components.
    pub usb: bool,
    /// Whether this very program made it.
    pub same_build: bool,
}

/// A recording in memory.
#[derive(Debug)]
pub struct RecordingFile {
    /// What it is of.
    pub header: Header,
    /// Its records, as bytes; the last one may be cut.
    pub records: Vec<u8>,
    /// Whether the file ends in the middle of something.
    pub cut: bool,
}

/// The components that a domain has on `target`, the last ones only with USB.
fn components(target: &str) -> &'static [&'static str] {
    match target {
        "rumprun" => &["virtio", "vfs", "net", "usb", "xhci"],
        "userspace" | "linux-module" => &["hostblk", "hostlink", "vfs", "net", "usb"],
        _ => &[],
    }
}

/// Whether a domain on `target` has USB.
fn has_usb(target: &str, spec: &RunSpec) -> bool {
    match target {
        "rumprun" => !spec.usb.is_empty() || spec.config.app.first().is_some_and(|app| app == "usb"),
        _ => Options::of_config(&spec.config).is_some(),
    }
}

/// The names and numbers of calls, as one number.
fn calls() -> String {
    let names: Vec<&str> = Call::ALL.iter().map(|call| call.name()).collect();
    format!("{:016x}", digest(names.join(" ").as_bytes()))
}

/// Which build of this program runs.
fn build() -> &'static str {
    static BUILD: OnceLock<String> = OnceLock::new();
    BUILD.get_or_init(|| {
        let program = std::fs::read("/proc/self/exe").unwrap_or_default();
        format!("{}-{:016x}", env!("CARGO_PKG_VERSION"), digest(&program))
    })
}

/// The header of a recording that is to be made.
pub fn header(target: &str, spec: &RunSpec) -> Value {
    let usb = has_usb(target, spec);
    let components = components(target).iter().filter(|name| usb || !["usb", "xhci"].contains(name));
    let contracts: serde_json::Map<_, _> = CONTRACTS
        .iter()
        .map(|one| (one.name.into(), format!("{}.{}", one.major, one.minor).into()))
        .collect();
    json!({
        "format": FORMAT,
        "target": target,
        "build": build(),
        "calls": calls(),
        "contracts": contracts,
        "components": components.collect::<Vec<_>>(),
        "config": spec.config.to_json(),
    })
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Self, RecordingError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|_| RecordingError::Corrupt(MAGIC.len()))?;
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let same = |what: &str, theirs: String, ours: String| match theirs == ours {
            true => Ok(()),
            false => Err(RecordingError::OtherVersion { what: what.into(), theirs, ours }),
        };
        same("format", value["format"].to_string(), FORMAT.to_string())?;
        for contract in CONTRACTS {
            let theirs = value["contracts"][contract.name].as_str().unwrap_or("none").to_owned();
            same(
                &format!("contract {}", contract.name),
                theirs,
                format!("{}.{}", contract.major, contract.minor),
            )?;
        }
        same("table of calls", text("calls"), calls())?;
        let target = text("target");
        let known = components(&target);
        if known.is_empty() {
            return Err(RecordingError::MissingComponent(format!("target {target}")));
        }
        let has = || value["components"].as_array().into_iter().flatten().filter_map(Value::as_str);
        for component in has() {
            if !known.contains(&component) {
                return Err(RecordingError::MissingComponent(component.into()));
            }
        }
        let config = Config::parse(&text("config")).map_err(|theirs| RecordingError::OtherVersion {
            what: "configuration".into(),
            theirs,
            ours: "other keys".into(),
        })?;
        let app = config.app.first().cloned().unwrap_or_default();
        if !crate::apps::APPS.iter().any(|(name, _)| *name == app) {
            return Err(RecordingError::MissingApplication(app));
        }
        let usb = has().any(|component| component == "usb");
        Ok(Self { target, config, usb, same_build: text("build") == build() })
    }
}

impl From<CorruptChunk> for RecordingError {
    fn from(chunk: CorruptChunk) -> Self {
        Self::Corrupt(chunk.0)
    }
}

impl RecordingFile {
    /// Reads a file.
    pub fn open(path: &Path) -> Result<Self, RecordingError> {
        let io = |error: std::io::Error| RecordingError::Io(error.to_string());
        let mut file = File::open(path).map_err(io)?;
        // So much only: it may be a large disk, or endless.
        let mut bytes = Vec::new();
        file.by_ref().take(MAGIC.len() as u64).read_to_end(&mut bytes).map_err(io)?;
        if bytes == MAGIC {
            file.read_to_end(&mut bytes).map_err(io)?;
        }
        Self::parse(bytes)
    }

    /// Reads what was in a file.
    pub fn parse(mut bytes: Vec<u8>) -> Result<Self, RecordingError> {
        if !bytes.starts_with(MAGIC) {
            return Err(RecordingError::NotARecording);
        }
        let (header, mut at) = take_chunk(&bytes, MAGIC.len())?.ok_or(RecordingError::Empty)?;
        let header = Header::parse(header)?;
        // The records move together where they are: there may be a gigabyte of them.
        let mut len = 0;
        while let Some((content, next)) = take_chunk(&bytes, at)? {
            let content = next - content.len()..next;
            let moved = content.len();
            bytes.copy_within(content, len);
            (at, len) = (next, len + moved);
        }
        let cut = at != bytes.len();
        bytes.truncate(len);
        let (mut rest, mut calls) = (&bytes[..], 0);
        loop {
            match Record::take(&mut rest) {
                Ok(record) if shows_a_time(&record) => calls += 1,
                Ok(_) => return Err(RecordingError::Invalid(calls + 1)),
                // Where the file ends in the middle of something, its last record may, too.
                Err(NoRecord::Cut) => break,
                Err(NoRecord::Invalid) => return Err(RecordingError::Invalid(calls + 1)),
            }
        }
        if calls == 0 {
            return Err(RecordingError::Empty);
        }
        Ok(Self { header, records: bytes, cut })
    }
}

/// Whether a clock, if it is one, shows less than the contract's limit: components add to it.
fn shows_a_time(record: &Record) -> bool {
    let clock = matches!(record.event, Event::Call(Call::MonotonicNs | Call::RealtimeNs));
    !clock || record.results.iter().all(|ns| ns >> 63 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Recording;

    fn file(header: &Value) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (recording, ring) = Recording::start(file.path(), header, 1 << 20).unwrap();
        // One call of thread 0, without numbers and bytes.
        assert!(ring.write(&[0, 0, 0, 0, 0], || false));
        recording.finish().unwrap();
        std::fs::read(file.path()).unwrap()
    }

    fn spec() -> RunSpec {
        RunSpec::new(Config { app: vec!["httpd".into()], ..Config::default() })
    }

    #[test]
    fn what_was_written_is_read() {
        let bytes = file(&header("rumprun", &spec()));
        let read = RecordingFile::parse(bytes.clone()).unwrap();
        assert_eq!((read.header.target.as_str(), read.cut, read.header.same_build), ("rumprun", false, true));
        assert_eq!(read.records, [0; 5]);
        assert!(RecordingFile::parse([&bytes[..], &[1, 2, 3]].concat()).unwrap().cut);
    }

    #[test]
    fn records_are_looked_at_whatever_their_checksum_says() {
        let with = |records: &[u8]| {
            let file = tempfile::NamedTempFile::new().unwrap();
            let (recording, ring) =
                Recording::start(file.path(), &header("rumprun", &spec()), 1 << 20).unwrap();
            assert!(ring.write(records, || false));
            recording.finish().unwrap();
            RecordingFile::open(file.path()).map(|read| read.records)
        };
        assert_eq!(with(&[0, 0, 0, 0, 0, 1, 0]).unwrap(), [0, 0, 0, 0, 0, 1, 0], "the last one may be cut");
        assert_eq!(with(&[0, 0, 0, 0, 0, 0xee, 0]).unwrap_err(), RecordingError::Invalid(2));
        assert_eq!(with(&[0, 0, 0, 0, 0, 1, 0, 99]).unwrap_err(), RecordingError::Invalid(2));
        let endless = [0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(with(&endless).unwrap_err(), RecordingError::Invalid(1));
        // A clock that shows 2^63 ns.
        let late = [&[Call::MonotonicNs as u8, 0, 0, 1][..], &[0x80; 9], &[1, 0]].concat();
        assert_eq!(with(&late).unwrap_err(), RecordingError::Invalid(1));
        assert_eq!(with(&[]).unwrap_err(), RecordingError::Empty);
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        let bytes = file(&header("rumprun", &spec()));
        let error = |bytes: &[u8]| RecordingFile::parse(bytes.to_vec()).unwrap_err();
        assert_eq!(error(b"PK"), RecordingError::NotARecording);
        assert_eq!(error(&bytes[..bytes.len() - 1]), RecordingError::Empty);
        // Each byte, of the magic, of lengths, of checksums, of the header, of records.
        for at in 0..bytes.len() {
            for bit in [0x01, 0x10, 0x80] {
                let mut wrong = bytes.clone();
                wrong[at] ^= bit;
                let error = error(&wrong);
                let expected = match at {
                    0..8 => error == RecordingError::NotARecording,
                    _ => matches!(error, RecordingError::Corrupt(_) | RecordingError::Empty),
                };
                assert!(expected && error.to_string().lines().count() == 1, "{at}: {error}");
            }
        }
        let with = |key: &str, value: Value| {
            let mut header = header("rumprun", &spec());
            header[key] = value;
            error(&file(&header))
        };
        assert!(matches!(with("format", 1.into()), RecordingError::OtherVersion { .. }));
        assert!(matches!(with("contracts", json!({ "core": "9.0" })), RecordingError::OtherVersion { .. }));
        assert_eq!(with("components", json!(["nvme"])), RecordingError::MissingComponent("nvme".into()));
        let other = Config { app: vec!["other".into()], ..Config::default() };
        assert_eq!(
            with("config", other.to_json().into()),
            RecordingError::MissingApplication("other".into())
        );
        for line in [with("format", 1.into()).to_string(), error(b"").to_string()] {
            assert_eq!(line.lines().count(), 1);
        }
    }
}
