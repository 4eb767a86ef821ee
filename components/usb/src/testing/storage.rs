//! A stick: mass storage on the bulk-only transport, with everything that sticks are known to do wrong.

use super::build::Descriptors;
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypercall::UsbSpeed;
use hypercall::testing::{UsbModel, UsbReply, UsbStandard, usb_reply};
use std::sync::Mutex;

/// What is wrong with a stick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Every so many commands end with a status of another tag.
    WrongTag(u32),
    /// Every so many commands end with a phase error.
    PhaseError(u32),
    /// Every so many reads and writes stall in their data.
    StallData(u32),
    /// Every so many statuses stall first.
    StallStatus(u32),
    /// Reads leave out their last sector and say so.
    Residue(u32),
    /// Says that a residue is left when none is.
    FalseResidue,
    /// Every so many reads end with half of their data, without a word.
    ShortData(u32),
    /// Sends more than was asked for.
    LongData,
    /// Never answers a command again.
    Mute,
    /// Sends an empty packet in front of a status.
    EmptyStatus,
    /// The status is cut.
    ShortStatus,
    /// Every so many commands are aborted with sense data.
    Aborts(u32),
    /// Sector size 0 and other nonsense.
    NoCapacity,
    /// Does not know SYNCHRONIZE CACHE and MODE SENSE.
    Minimal,
    /// Comes back from a reset with another product number.
    ChangesAtReset,
    /// Stalls everything but endpoint 0.
    StallAll,
    /// Refuses GET MAX LUN.
    NoMaxLun,
    /// Not ready for the first so many questions.
    SlowStart(u32),
}

/// What a test sees and changes of a stick.
#[derive(Debug, Default)]
pub struct StorageState {
    /// Its medium, in sectors of 512 bytes; `None`: taken out.
    pub medium: Option<Vec<u8>>,
    /// Write-protected.
    pub read_only: bool,
    /// What is wrong with it.
    pub faults: Vec<Fault>,
    /// Commands seen.
    pub commands: u32,
    /// SYNCHRONIZE CACHE commands seen.
    pub flushes: u32,
    /// Bulk-only resets seen.
    pub resets: u32,
    /// The medium changed: told once.
    pub attention: bool,
    /// How many units it says it has.
    pub units: u8,
}

#[derive(Debug)]
enum Phase {
    Command,
    /// So many bytes to go from the host.
    Take {
        left: usize,
        at: usize,
        sink: bool,
    },
    /// These bytes go to the host.
    Give {
        bytes: Vec<u8>,
        sent: usize,
        wanted: usize,
    },
    /// The status goes to the host.
    Status([u8; 13]),
    /// Broken: waits for a reset.
    Dead,
}

/// A stick that can be plugged in.
pub struct StorageModel {
    standard: UsbStandard,
    speed: UsbSpeed,
    state: Arc<Mutex<StorageState>>,
    phase: Phase,
    /// The status behind the data.
    next: [u8; 13],
    sense: [u8; 3],
    stall_status: bool,
    empty_status: bool,
}

impl StorageModel {
    /// A high speed stick with `medium`, which also speaks UAS in its alternate setting 1.
    pub fn new(medium: Vec<u8>) -> (Self, Arc<Mutex<StorageState>>) {
        Self::with_speed(medium, UsbSpeed::High)
    }

    /// As [`StorageModel::new`], at another speed.
    pub fn with_speed(medium: Vec<u8>, speed: UsbSpeed) -> (Self, Arc<Mutex<StorageState>>) {
        let (is_super, packet) = match speed {
            UsbSpeed::Super | UsbSpeed::SuperPlus => (true, 1024),
            UsbSpeed::High => (false, 512),
            _ => (false, 64),
        };
        let mut build = Descriptors::new(0x46f4, 0x0001, [0; 3], is_super).interface(0, 0, 2, [8, 6, 0x50]);
        for endpoint in [0x81, 0x02] {
            build = build.endpoint(endpoint, 2, packet);
            if is_super {
                build = build.raw(&[6, 0x30, 15, 0, 0, 0]);
            }
        }
        let standard = build.interface(0, 1, 0, [8, 6, 0x62]).build();
        let state = StorageState { medium: Some(medium), units: 1, ..StorageState::default() };
        let state = Arc::new(Mutex::new(state));
        let model = Self {
            standard,
            speed,
            state: state.clone(),
            phase: Phase::Command,
            next: [0; 13],
            sense: [0; 3],
            stall_status: false,
            empty_status: false,
        };
        (model, state)
    }

    /// The same device plugged in again: medium and faults are as they were.
    pub fn again(&self) -> Self {
        let mut standard = self.standard.clone();
        standard.reset();
        Self {
            standard,
            speed: self.speed,
            state: self.state.clone(),
            phase: Phase::Command,
            next: [0; 13],
            sense: [0; 3],
            stall_status: false,
            empty_status: false,
        }
    }

    /// Another stick around the state of one.
    pub fn around(state: &Arc<Mutex<StorageState>>) -> Self {
        let (mut model, _) = Self::new(Vec::new());
        model.state = state.clone();
        model
    }

    fn command(&mut self, packet: &[u8]) -> UsbReply {
        let state = self.state.clone();
        let mut state = state.lock().unwrap();
        let valid = packet.len() == 31 && packet.starts_with(b"USBC") && (1..=16).contains(&packet[14]);
        if !valid {
            self.phase = Phase::Dead;
            return UsbReply::Stall;
        }
        state.commands += 1;
        let count = state.commands;
        let every = |fault: &dyn Fn(&Fault) -> Option<u32>| {
            state.faults.iter().filter_map(fault).any(|n| n > 0 && count.is_multiple_of(n))
        };
        let mut tag: [u8; 4] = packet[4..8].try_into().unwrap();
        let wanted = u32::from_le_bytes(packet[8..12].try_into().unwrap()) as usize;
        let is_in = packet[12] & 0x80 != 0;
        let lun = packet[13];
        let command = packet[15..31].to_vec();
        let (wrong_tag, phase_error, stall_data, stall_status, short, aborted, residue_fault) = (
            every(&|fault| if let Fault::WrongTag(n) = fault { Some(*n) } else { None }),
            every(&|fault| if let Fault::PhaseError(n) = fault { Some(*n) } else { None }),
            every(&|fault| if let Fault::StallData(n) = fault { Some(*n) } else { None }),
            every(&|fault| if let Fault::StallStatus(n) = fault { Some(*n) } else { None }),
            every(&|fault| if let Fault::ShortData(n) = fault { Some(*n) } else { None }),
            every(&|fault| if let Fault::Aborts(n) = fault { Some(*n) } else { None }),
            every(&|fault| if let Fault::Residue(n) = fault { Some(*n) } else { None }),
        );
        let has = |fault: Fault| state.faults.contains(&fault);
        let (mute, false_residue, long) = (has(Fault::Mute), has(Fault::FalseResidue), has(Fault::LongData));
        let (empty, cut) = (has(Fault::EmptyStatus), has(Fault::ShortStatus));
        if mute {
            self.phase = Phase::Dead;
            return UsbReply::Ack(packet.len());
        }
        let mut status = 0;
        let answer = if aborted && command[0] != 3 {
            self.sense = [0x0b, 0, 0];
            Err(())
        } else {
            self.scsi(&mut state, lun, &command)
        };
        let moves_data = matches!(command[0], 0x28 | 0x88 | 0x2a | 0x8a);
        let mut residue = wanted as u32;
        let data = match answer {
            Err(()) => {
                status = 1;
                Err(())
            }
            Ok(mut data) => {
                if let Answer::Give(bytes) = &mut data {
                    bytes.truncate(wanted);
                    if moves_data && short {
                        bytes.truncate(wanted / 2);
                    } else if moves_data && residue_fault {
                        bytes.truncate(wanted.saturating_sub(512));
                        residue = (wanted - bytes.len()) as u32;
                    } else {
                        residue = (wanted - bytes.len()) as u32;
                    }
                    if long {
                        bytes.extend([0xee; 700]);
                    }
                    if moves_data && short {
                        residue = 0;
                    }
                } else {
                    residue = 0;
                }
                Ok(data)
            }
        };
        if false_residue && moves_data {
            residue = wanted as u32 / 2;
        }
        if wrong_tag {
            tag[0] ^= 0x80;
        }
        if phase_error {
            status = 2;
        }
        self.next = [0; 13];
        self.next[..4].copy_from_slice(b"USBS");
        self.next[4..8].copy_from_slice(&tag);
        self.next[8..12].copy_from_slice(&residue.to_le_bytes());
        self.next[12] = status;
        if cut {
            self.next[0] = 0;
        }
        self.stall_status = stall_status;
        self.empty_status = empty;
        self.phase = match data {
            _ if moves_data && stall_data && wanted > 0 => {
                let endpoint = if is_in { 0x81 } else { 0x02 };
                self.next[8..12].copy_from_slice(&(wanted as u32).to_le_bytes());
                self.next[12] = 1;
                self.sense = [0x0b, 0, 0];
                self.standard.halted.push(endpoint);
                Phase::Status(self.next)
            }
            Err(()) if wanted > 0 && is_in => {
                // 6.7.2: nothing to send, so the endpoint is halted, and the status follows.
                self.standard.halted.push(0x81);
                Phase::Status(self.next)
            }
            Err(()) if wanted > 0 => Phase::Take { left: wanted, at: 0, sink: true },
            Ok(Answer::Give(bytes)) if wanted > 0 => Phase::Give { bytes, sent: 0, wanted },
            Ok(Answer::Take(at)) if wanted > 0 => Phase::Take { left: wanted, at, sink: false },
            _ => Phase::Status(self.next),
        };
        UsbReply::Ack(packet.len())
    }

    fn scsi(&mut self, state: &mut StorageState, lun: u8, command: &[u8]) -> Result<Answer, ()> {
        let mut sense = |key: u8, asc: u8, ascq: u8| {
            self.sense = [key, asc, ascq];
            Err(())
        };
        if lun >= state.units.max(1) {
            return sense(5, 0x25, 0);
        }
        match command[0] {
            0x12 => {
                let mut bytes = std::vec![0, 0x80, 4, 2, 31, 0, 0, 0];
                bytes.extend(b"ANYKERNLmodel stick     1.0 ");
                return Ok(Answer::Give(bytes));
            }
            0x03 => {
                let mut bytes = std::vec![0; 18];
                (bytes[0], bytes[2], bytes[7], bytes[12], bytes[13]) =
                    (0x70, self.sense[0], 10, self.sense[1], self.sense[2]);
                self.sense = [0; 3];
                return Ok(Answer::Give(bytes));
            }
            _ => {}
        }
        if let Some(Fault::SlowStart(left)) =
            state.faults.iter_mut().find(|fault| matches!(fault, Fault::SlowStart(1..)))
        {
            *left -= 1;
            return sense(2, 4, 1);
        }
        let minimal = state.faults.contains(&Fault::Minimal);
        let no_capacity = state.faults.contains(&Fault::NoCapacity);
        if core::mem::take(&mut state.attention) {
            return sense(6, 0x28, 0);
        }
        let read_only = state.read_only;
        let Some(medium) = &mut state.medium else { return sense(2, 0x3a, 0) };
        let sectors = medium.len() / 512;
        let be32 = |at: usize| u32::from_be_bytes(command[at..at + 4].try_into().unwrap()) as usize;
        let range = match command[0] {
            0x28 | 0x2a => Some((be32(2), usize::from(u16::from_be_bytes([command[7], command[8]])))),
            0x88 | 0x8a => Some((be32(6), be32(10))),
            _ => None,
        };
        match (command[0], range) {
            (0x00, _) => Ok(Answer::None),
            (0x25, _) if no_capacity => Ok(Answer::Give(std::vec![0, 0, 0, 9, 0, 0, 0, 0])),
            (0x25, _) => {
                let mut bytes = (sectors as u32 - 1).to_be_bytes().to_vec();
                bytes.extend(512u32.to_be_bytes());
                Ok(Answer::Give(bytes))
            }
            (0x1a, _) if !minimal => Ok(Answer::Give(std::vec![3, 0, if read_only { 0x80 } else { 0 }, 0])),
            (0x35, _) if !minimal => {
                state.flushes += 1;
                Ok(Answer::None)
            }
            (0x2a | 0x8a, _) if read_only => sense(7, 0x27, 0),
            (opcode, Some((lba, count))) => {
                if lba + count > sectors {
                    return sense(5, 0x21, 0);
                }
                let (from, to) = (lba * 512, (lba + count) * 512);
                Ok(if matches!(opcode, 0x28 | 0x88) {
                    Answer::Give(medium[from..to].to_vec())
                } else {
                    Answer::Take(from)
                })
            }
            _ => sense(5, 0x20, 0),
        }
    }
}

enum Answer {
    None,
    Give(Vec<u8>),
    Take(usize),
}

impl UsbModel for StorageModel {
    fn speed(&self) -> UsbSpeed {
        self.speed
    }

    fn descriptors(&self) -> Vec<u8> {
        self.standard.descriptors()
    }

    fn control(&mut self, setup: [u8; 8], data: &mut [u8]) -> UsbReply {
        match (setup[0], setup[1]) {
            (0x21, 0xff) => {
                self.state.lock().unwrap().resets += 1;
                self.phase = Phase::Command;
                UsbReply::Ack(0)
            }
            (0xa1, 0xfe) => {
                let state = self.state.lock().unwrap();
                if state.faults.contains(&Fault::NoMaxLun) {
                    return UsbReply::Stall;
                }
                usb_reply(data, &[state.units - 1])
            }
            _ => self.standard.control(setup, data).unwrap_or(UsbReply::Stall),
        }
    }

    fn packet_out(&mut self, endpoint: u8, packet: &[u8]) -> UsbReply {
        if self.standard.halted.contains(&endpoint)
            || self.state.lock().unwrap().faults.contains(&Fault::StallAll)
        {
            return UsbReply::Stall;
        }
        match &mut self.phase {
            Phase::Command => self.command(packet),
            Phase::Take { left, at, sink } => {
                let mut state = self.state.lock().unwrap();
                let n = packet.len().min(*left);
                if let Some(medium) = &mut state.medium
                    && !*sink
                {
                    medium[*at..*at + n].copy_from_slice(&packet[..n]);
                }
                *at += n;
                *left -= n;
                if *left == 0 {
                    self.phase = Phase::Status(self.next);
                }
                UsbReply::Ack(packet.len())
            }
            Phase::Dead => UsbReply::Nak,
            _ => UsbReply::Nak,
        }
    }

    fn packet_in(&mut self, endpoint: u8, room: &mut [u8]) -> UsbReply {
        if self.standard.halted.contains(&endpoint)
            || self.state.lock().unwrap().faults.contains(&Fault::StallAll)
        {
            return UsbReply::Stall;
        }
        match &mut self.phase {
            Phase::Give { bytes, sent, wanted } => {
                let packet = match self.speed {
                    UsbSpeed::Super | UsbSpeed::SuperPlus => 1024,
                    UsbSpeed::High => 512,
                    _ => 64,
                };
                let rest = &bytes[*sent..];
                if rest.is_empty() {
                    // The host wants more than there is, and no short packet told the end (6.7.2).
                    self.phase = Phase::Status(self.next);
                    self.standard.halted.push(endpoint);
                    return UsbReply::Stall;
                }
                let n = rest.len().min(packet);
                if n > room.len() {
                    self.phase = Phase::Dead;
                    return UsbReply::Babble;
                }
                let reply = usb_reply(room, &rest[..n]);
                *sent += n;
                if *sent == bytes.len() && (n < packet || *sent >= *wanted) {
                    self.phase = Phase::Status(self.next);
                }
                reply
            }
            Phase::Status(status) => {
                if core::mem::take(&mut self.stall_status) {
                    self.standard.halted.push(endpoint);
                    return UsbReply::Stall;
                }
                if core::mem::take(&mut self.empty_status) {
                    return UsbReply::Ack(0);
                }
                let status = *status;
                self.phase = Phase::Command;
                let len = if status[0] == 0 { 9 } else { 13 };
                usb_reply(room, &status[..len])
            }
            Phase::Command | Phase::Take { .. } | Phase::Dead => UsbReply::Nak,
        }
    }

    fn bus_reset(&mut self) {
        self.standard.reset();
        self.phase = Phase::Command;
        if self.state.lock().unwrap().faults.contains(&Fault::ChangesAtReset) {
            self.standard.device[10] = self.standard.device[10].wrapping_add(1);
        }
    }
}
