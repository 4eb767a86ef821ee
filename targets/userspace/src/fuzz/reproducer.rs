//! The file that shows a finding again: a line of text that says what it is of, then the input.
//!
//! ```text
//! anykernel-fuzz 2 {"target":"tcp","plant":null,"harness":"…","bug":"…","input":"…"}
//! ```

use hypercall::layers::recorded::digest;
use serde_json::{Value, json};
use std::path::Path;

/// What a reproducer begins with.
const MAGIC: &str = "anykernel-fuzz ";
/// Raised when an old reader would misunderstand a new file.
const VERSION: &str = "2";
/// No first line is longer.
const MOST_BYTES: usize = 1000;

/// A reproducer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reproducer {
    pub(super) target: String,
    /// The bug that was planted.
    pub(super) plant: Option<String>,
    /// Which harness it was found with: that gives the input its meaning.
    pub(super) harness: String,
    /// The finding's number.
    pub(super) bug: String,
    pub(super) input: Vec<u8>,
}

/// Why a file shows nothing. Each is one line that says what to do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReproducerError {
    #[error("it is no reproducer: `anykernel fuzz` writes them to fuzz/artifacts/TARGET/")]
    NotAReproducer,
    #[error("it is a reproducer of version {0}, here {VERSION}: fuzz again, or use the version that made it")]
    OtherVersion(String),
    #[error("it is corrupt in its first line: copy it again from where it was found")]
    CorruptHeader,
    #[error("its input is cut or corrupt: copy it again from where it was found")]
    CorruptInput,
}

/// Whether a file begins as a reproducer does.
pub fn is_reproducer(path: &Path) -> bool {
    let mut begin = [0; MAGIC.len()];
    let read =
        std::fs::File::open(path).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut begin));
    read.is_ok() && begin == *MAGIC.as_bytes()
}

impl Reproducer {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let header = json!({
            "target": self.target,
            "plant": self.plant,
            "harness": self.harness,
            "bug": self.bug,
            "input": format!("{:016x}", digest(&self.input)),
        });
        let mut file = format!("{MAGIC}{VERSION} {header}\n").into_bytes();
        file.extend(&self.input);
        file
    }

    pub(super) fn parse(file: &[u8]) -> Result<Self, ReproducerError> {
        let rest = file.strip_prefix(MAGIC.as_bytes()).ok_or(ReproducerError::NotAReproducer)?;
        let end = rest.iter().take(MOST_BYTES).position(|byte| *byte == b'\n');
        let (line, input) = rest.split_at(end.ok_or(ReproducerError::CorruptHeader)?);
        let line = std::str::from_utf8(line).map_err(|_| ReproducerError::CorruptHeader)?;
        let (version, header) = line.split_once(' ').ok_or(ReproducerError::CorruptHeader)?;
        if version != VERSION {
            let version = version.chars().filter(char::is_ascii_alphanumeric).collect();
            return Err(ReproducerError::OtherVersion(version));
        }
        let header: Value = serde_json::from_str(header).map_err(|_| ReproducerError::CorruptHeader)?;
        let text = |key: &str| header[key].as_str().map(str::to_owned).ok_or(ReproducerError::CorruptHeader);
        let input = input[1..].to_vec();
        if text("input")? != format!("{:016x}", digest(&input)) {
            return Err(ReproducerError::CorruptInput);
        }
        let plant = header["plant"].as_str().map(str::to_owned);
        Ok(Self { target: text("target")?, plant, harness: text("harness")?, bug: text("bug")?, input })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_is_damaged_is_refused() {
        for plant in [None, Some("ring-toctou".to_owned())] {
            let one = Reproducer {
                target: "ext4".into(),
                plant,
                harness: "00".into(),
                bug: "5c678a52".into(),
                input: b"\n\x00 input".to_vec(),
            };
            let bytes = one.to_bytes();
            assert_eq!(Reproducer::parse(&bytes), Ok(one.clone()));
            assert_eq!(Reproducer::parse(&bytes[..bytes.len() - 1]), Err(ReproducerError::CorruptInput));
            for at in 0..bytes.len() {
                let mut wrong = bytes.clone();
                wrong[at] ^= 0x80;
                let error = Reproducer::parse(&wrong).expect_err("damaged");
                assert_eq!(error.to_string().lines().count(), 1);
            }
        }
        let newer = Reproducer::parse(b"anykernel-fuzz 3 {}\nx");
        assert_eq!(newer, Err(ReproducerError::OtherVersion("3".into())));
        assert_eq!(Reproducer::parse(b"\x7fELF"), Err(ReproducerError::NotAReproducer));
        assert_eq!(Reproducer::parse(b"anykernel-fuzz 2"), Err(ReproducerError::CorruptHeader));
    }
}
