//! Frames to a file in pcapng (draft-ietf-opsawg-pcapng), for Wireshark and tcpdump.

use crate::Failure;
use crate::host::Recover;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

/// From the instance's point of view; the values are those of the `epb_flags` option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Unknown = 0,
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
        self.record_at(now, link, mtu, direction, frame);
    }

    fn record_at(&self, time_ns: u64, link: usize, mtu: u16, direction: Direction, frame: &[u8]) {
        let len = (frame.len() as u32).to_le_bytes();
        let mut writer = self.0.lock().recover();
        if writer.failed {
            return;
        }
        let interface = writer.interface(link, mtu);
        let mut body = Vec::with_capacity(frame.len() + 40);
        body.extend_from_slice(&interface.to_le_bytes());
        body.extend_from_slice(&((time_ns >> 32) as u32).to_le_bytes());
        body.extend_from_slice(&(time_ns as u32).to_le_bytes());
        body.extend_from_slice(&len);
        body.extend_from_slice(&len);
        body.extend_from_slice(frame);
        pad(&mut body);
        option(&mut body, OPTION_EPB_FLAGS, &(direction as u32).to_le_bytes());
        option(&mut body, 0, &[]);
        writer.block(ENHANCED_PACKET, &body);
    }

    /// Records what `from` says in the old format (draft-ietf-opsawg-pcap), times in microseconds, as QEMU writes it, until it
    /// ends.
    pub(crate) fn record_old(&self, mut from: impl Read) -> std::io::Result<()> {
        const MAGIC: u32 = 0xa1b2_c3d4;
        const LONGEST: usize = 1 << 18;
        let word = |bytes: &[u8], at: usize| {
            bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
        };
        let mut header = [0; 24];
        match from.read_exact(&mut header) {
            // Nothing was begun.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        if word(&header, 0) != MAGIC {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut frame = Vec::new();
        loop {
            let mut packet = [0; 16];
            match from.read_exact(&mut packet) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            }
            let time_us = u64::from(word(&packet, 0)) * 1_000_000 + u64::from(word(&packet, 4));
            let len = word(&packet, 8) as usize;
            if len > LONGEST {
                return Err(ErrorKind::InvalidData.into());
            }
            frame.resize(len, 0);
            from.read_exact(&mut frame)?;
            self.record_at(time_us * 1000, 0, 65521, Direction::Unknown, &frame);
        }
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
    fn the_old_format_is_taken_in() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let pcap = Pcap::create(file.path()).unwrap();
        let mut old: Vec<u8> = [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65536, 1]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        pcap.record_old(&old[..]).unwrap();
        for word in [7_u32, 5, 60, 60] {
            old.extend(word.to_le_bytes());
        }
        old.extend([0xcc; 60]);
        pcap.record_old(&old[..]).unwrap();
        pcap.record_old(&[][..]).unwrap();
        // Cut short in the middle of a frame, or something else altogether.
        assert!(pcap.record_old(&old[..90]).is_err());
        assert!(pcap.record_old(&[0; 24][..]).is_err());
        pcap.flush();
        let bytes = std::fs::read(file.path()).unwrap();
        let time = 7_000_005_000_u64;
        let words = [0, (time >> 32) as u32, time as u32, 60, 60];
        let packet: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).chain([0xcc; 60]).collect();
        assert!(bytes.windows(packet.len()).any(|part| part == packet));
    }

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
