//! The file that tells how to see a finding again: one line of text, then the input.
//!
//! `anykernel-fuzz 1 TARGET\n`, or `anykernel-fuzz 1 TARGET PLANT\n` for a bug that was planted.

/// What a reproducer begins with.
pub const MAGIC: &str = "anykernel-fuzz ";
const VERSION: &str = "1";

/// A reproducer.
#[derive(Debug, PartialEq, Eq)]
pub struct Reproducer<'a> {
    /// Which target.
    pub target: &'a str,
    /// The bug that was planted; empty: none.
    pub plant: &'a str,
    /// The input.
    pub input: &'a [u8],
}

impl<'a> Reproducer<'a> {
    /// Reads a file. The error is one line.
    pub fn parse(file: &'a [u8]) -> Result<Self, String> {
        let end = file.iter().take(200).position(|byte| *byte == b'\n').ok_or("it is no reproducer")?;
        let line = std::str::from_utf8(&file[..end]).map_err(|_| "it is no reproducer")?;
        let mut words = line.strip_prefix(MAGIC).ok_or("it is no reproducer")?.split(' ');
        match words.next() {
            Some(VERSION) => {}
            Some(other) => {
                return Err(format!("it is of version {other}, this program reads version {VERSION}"));
            }
            None => return Err("it is no reproducer".into()),
        }
        let target = words.next().filter(|name| !name.is_empty()).ok_or("it names no target")?;
        Ok(Self { target, plant: words.next().unwrap_or_default(), input: &file[end + 1..] })
    }

    /// Writes the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let plant = if self.plant.is_empty() { String::new() } else { format!(" {}", self.plant) };
        let mut file = format!("{MAGIC}{VERSION} {}{plant}\n", self.target).into_bytes();
        file.extend(self.input);
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_wrote_and_refuses_the_rest() {
        for plant in ["", "ring-toctou"] {
            let one = Reproducer { target: "ext4", plant, input: b"\n\x00 input" };
            assert_eq!(Reproducer::parse(&one.to_bytes()).as_ref(), Ok(&one));
        }
        for bad in [&b""[..], b"anykernel-fuzz\n", b"\x7fELF\n", b"anykernel-fuzz 1 \n"] {
            assert!(Reproducer::parse(bad).is_err());
        }
        let newer = Reproducer::parse(b"anykernel-fuzz 2 ext4\nx").unwrap_err();
        assert_eq!(newer, "it is of version 2, this program reads version 1");
    }
}
