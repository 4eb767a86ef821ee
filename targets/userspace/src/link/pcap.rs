//! Frames to a file in pcapng (draft-ietf-opsawg-pcapng), for Wireshark and tcpdump.

use crate::Failure;
use crate::host::Recover;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

/// From the instance's point of view; the values are those of the `epb_flags` option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Received = 1,
    Sent = 2,
}

/// A recording of the frames of one instance's links.
#[derive(Debug)]
pub struct Pcap(Mutex<Writer>);

#[derive(Debug)]
struct Writer {
    file: BufWriter<File>,
    /// `interfaces[i]` is the link whose number in the file is `i`.
    interfaces: Vec<usize>,
    failed: bool,
}

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const LINKTYPE_ETHERNET: u16 = 1;
const OPTION_IF_NAME: u16 = 2;
const OPTION_IF_TSRESOL: u16 = 9;
const OPTION_EPB_FLAGS: u16 = 2;

fn option(to: &mut Vec<u8>, code: u16, value: &[u8]) {
    to.extend_from_slice(&code.to_le_bytes());
    to.extend_from_slice(&(value.len() as u16).to_le_bytes());
    to.extend_from_slice(value);
    pad(to);
}

fn pad(to: &mut Vec<u8>) {
    to.resize(to.len().next_multiple_of(4), 0);
}

impl Writer {
    fn block(&mut self, kind: u32, body: &[u8]) {
        let len = (body.len() as u32 + 12).to_le_bytes();
        for part in [&kind.to_le_bytes()[..], &len, body, &len] {
            if let Err(error) = self.file.write_all(part)
                && !std::mem::replace(&mut self.failed, true)
            {
                log::error!("recording frames: {error}: the file ends here");
            }
        }
    }

    /// The number of `link` in the file.
    fn interface(&mut self, link: usize, mtu: u16) -> u32 {
        if let Some(number) = self.interfaces.iter().position(|known| *known == link) {
            return number as u32;
        }
        let mut body = Vec::new();
        body.extend_from_slice(&LINKTYPE_ETHERNET.to_le_bytes());
        body.extend_from_slice(&[0, 0]);
        body.extend_from_slice(&(u32::from(mtu) + 14).to_le_bytes());
        option(&mut body, OPTION_IF_NAME, format!("nic{link}").as_bytes());
        // Times count 10^-9 s.
        option(&mut body, OPTION_IF_TSRESOL, &[9]);
        option(&mut body, 0, &[]);
        self.block(INTERFACE_DESCRIPTION, &body);
        self.interfaces.push(link);
        self.interfaces.len() as u32 - 1
    }
}

impl Pcap {
    /// Begins a new file. Failures are lines for a person.
    pub fn create(path: &Path) -> Result<Self, Failure> {
        let file =
            File::create(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
        let mut writer =
            Writer { file: BufWriter::with_capacity(256 << 10, file), interfaces: Vec::new(), failed: false };
        let mut body = Vec::new();
        body.extend_from_slice(&0x1a2b_3c4d_u32.to_le_bytes());
        body.extend_from_slice(&[1, 0, 0, 0]);
        // The section's length is not known.
        body.extend_from_slice(&u64::MAX.to_le_bytes());
        writer.block(SECTION_HEADER, &body);
        Ok(Self(Mutex::new(writer)))
    }

    pub(crate) fn record(&self, link: usize, mtu: u16, direction: Direction, frame: &[u8]) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let len = (frame.len() as u32).to_le_bytes();
        let mut writer = self.0.lock().recover();
        if writer.failed {
            return;
        }
        let interface = writer.interface(link, mtu);
        let mut body = Vec::with_capacity(frame.len() + 40);
        body.extend_from_slice(&interface.to_le_bytes());
        body.extend_from_slice(&((now >> 32) as u32).to_le_bytes());
        body.extend_from_slice(&(now as u32).to_le_bytes());
        body.extend_from_slice(&len);
        body.extend_from_slice(&len);
        body.extend_from_slice(frame);
        pad(&mut body);
        option(&mut body, OPTION_EPB_FLAGS, &(direction as u32).to_le_bytes());
        option(&mut body, 0, &[]);
        writer.block(ENHANCED_PACKET, &body);
    }

    /// Writes out what is buffered.
    pub fn flush(&self) {
        let mut writer = self.0.lock().recover();
        if let Err(error) = writer.file.flush()
            && !std::mem::replace(&mut writer.failed, true)
        {
            log::error!("recording frames: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_well_formed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let pcap = Pcap::create(file.path()).unwrap();
        pcap.record(0, 1500, Direction::Sent, &[0xaa; 61]);
        pcap.record(1, 1500, Direction::Received, &[0xbb; 60]);
        pcap.flush();
        let bytes = std::fs::read(file.path()).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let mut kinds = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let len = word(at + 4) as usize;
            assert_eq!(len % 4, 0);
            assert_eq!(word(at + len - 4) as usize, len, "both lengths agree");
            kinds.push(word(at));
            at += len;
        }
        assert_eq!(at, bytes.len());
        use {ENHANCED_PACKET as E, INTERFACE_DESCRIPTION as I, SECTION_HEADER as S};
        assert_eq!(kinds, [S, I, E, I, E]);
    }
}
