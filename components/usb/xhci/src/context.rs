//! Device and input contexts (xHCI 1.2, 6.2).

use crate::dma::vouch;
use alloc::vec::Vec;
use anykernel::driver::{DmaMemory, Quiet};
use anykernel_usb::controller::{EndpointKind, EndpointSpec, HubSpec, Place, Speed};
use hypercall::{Dma, Result};

/// Contexts of a device: its own and 31 endpoints'.
const CONTEXTS: usize = 32;

/// Endpoint 0, as index in the device context (4.5.1).
pub(crate) const CONTROL: u8 = 1;

/// The index of an endpoint in the device context.
pub(crate) fn index_of(address: u8) -> u8 {
    match address & 0xf {
        0 => CONTROL,
        number => number * 2 + u8::from(address & 0x80 != 0),
    }
}

/// What goes into an endpoint's context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EndpointContext {
    words: [u32; 5],
}

impl EndpointContext {
    /// Of endpoint 0.
    pub(crate) fn control(max_packet: u16, dequeue: u64) -> Self {
        Self::new(4, 0, 0, max_packet, 8, 0, dequeue)
    }

    /// Of a bulk or interrupt endpoint; `None` for other kinds.
    pub(crate) fn of(spec: &EndpointSpec, speed: Speed, dequeue: u64) -> Option<Self> {
        let is_in = spec.address & 0x80 != 0;
        let kind = match (spec.kind, is_in) {
            (EndpointKind::Bulk, false) => 2,
            (EndpointKind::Interrupt, false) => 3,
            (EndpointKind::Bulk, true) => 6,
            (EndpointKind::Interrupt, true) => 7,
            _ => return None,
        };
        let burst = match speed {
            Speed::Super | Speed::SuperPlus => spec.max_burst,
            Speed::High => spec.additional,
            _ => 0,
        };
        if spec.kind == EndpointKind::Bulk {
            // Typical lengths of transfers (4.14.1.1).
            return Some(Self::new(kind, 0, burst, spec.max_packet, 3072, 0, dequeue));
        }
        let interval = match speed {
            // Frames, as the power of two of microframes that is not longer (6.2.3.6).
            Speed::Low | Speed::Full => 3 + spec.interval.max(1).ilog2(),
            _ => u32::from(spec.interval.clamp(1, 16)) - 1,
        };
        let payload = match speed {
            Speed::Super | Speed::SuperPlus => u32::from(spec.bytes_per_interval),
            _ => u32::from(spec.max_packet) * (u32::from(burst) + 1),
        };
        Some(Self::new(kind, interval, burst, spec.max_packet, payload as u16, payload, dequeue))
    }

    fn new(
        kind: u32,
        interval: u32,
        burst: u8,
        max_packet: u16,
        average: u16,
        payload: u32,
        dequeue: u64,
    ) -> Self {
        const THREE_TRIES: u32 = 3 << 1;
        let second = THREE_TRIES | kind << 3 | u32::from(burst) << 8 | u32::from(max_packet) << 16;
        let fifth = u32::from(average) | (payload & 0xffff) << 16;
        Self { words: [interval << 16, second, dequeue as u32, (dequeue >> 32) as u32, fifth] }
    }
}

/// What goes into a slot context.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlotContext {
    pub(crate) place: Place,
    pub(crate) hub: Option<HubSpec>,
    /// The highest index of an endpoint.
    pub(crate) last: u8,
    pub(crate) interrupter: u16,
}

impl SlotContext {
    fn words(&self) -> [u32; 3] {
        let speed = match self.place.speed {
            Speed::Full => 1,
            Speed::Low => 2,
            Speed::High => 3,
            Speed::Super => 4,
            Speed::SuperPlus => 5,
        };
        let mut words = [self.place.route & 0xf_ffff | speed << 20 | u32::from(self.last) << 27, 0, 0];
        let [first, second, third] = &mut words;
        *second = u32::from(self.place.root_port.0) << 16;
        *third = u32::from(self.interrupter) << 22;
        if let Some(translator) = self.place.translator {
            *first |= u32::from(translator.multiple) << 25;
            *third |= translator.hub.0 & 0xff | u32::from(translator.port) << 8;
        }
        if let Some(hub) = self.hub {
            *first |= 1 << 26 | u32::from(hub.multiple_translators) << 25;
            *second |= u32::from(hub.ports) << 24;
            *third |= u32::from(hub.think_time & 3) << 16;
        }
        words
    }
}

/// The memory of a slot: what the controller keeps there, and what we ask it for.
pub(crate) struct Contexts<H: Dma> {
    output: DmaMemory<H>,
    input: DmaMemory<H>,
    /// 32 or 64 bytes.
    stride: usize,
}

impl<H: Dma + Copy> Contexts<H> {
    pub(crate) fn new(host: H, stride: usize) -> Result<Self> {
        let output = DmaMemory::new(host, CONTEXTS * stride, 4096)?;
        match DmaMemory::new(host, (CONTEXTS + 1) * stride, 4096) {
            Ok(input) => Ok(Self { output, input, stride }),
            Err(error) => {
                output.free(&vouch());
                Err(error)
            }
        }
    }

    /// For the array of device contexts.
    pub(crate) fn output(&self) -> u64 {
        self.output.device_addr(0)
    }

    /// Writes an input context and says where it is. Endpoints in `add` are added or changed, those in `drop` dropped.
    pub(crate) fn input(
        &self,
        slot: Option<&SlotContext>,
        add: &[(u8, EndpointContext)],
        drop: &[u8],
    ) -> u64 {
        for offset in (0..self.input.len()).step_by(4) {
            self.input.write32(offset, 0);
        }
        let flags =
            |indices: &mut dyn Iterator<Item = u8>| indices.fold(0u32, |all, one| all | 1 << (one & 31));
        self.input.write32(0, flags(&mut drop.iter().copied()));
        let slot_flag = u32::from(slot.is_some());
        self.input.write32(4, flags(&mut add.iter().map(|(index, _)| *index)) | slot_flag);
        let put = |context: usize, words: &[u32]| {
            for (i, word) in words.iter().enumerate() {
                self.input.write32(context * self.stride + 4 * i, *word);
            }
        };
        if let Some(slot) = slot {
            put(1, &slot.words());
        }
        for (index, context) in add {
            put(1 + usize::from(index & 31), &context.words);
        }
        self.input.device_addr(0)
    }

    /// The address on the bus that the controller gave the device.
    pub(crate) fn address(&self) -> u8 {
        self.output.read32(12) as u8
    }

    /// Where the controller is in the ring of an endpoint that it stopped (6.2.3).
    pub(crate) fn dequeue(&self, index: u8) -> u64 {
        let at = usize::from(index & 31) * self.stride + 8;
        (u64::from(self.output.read32(at)) | u64::from(self.output.read32(at + 4)) << 32) & !0xf
    }

    pub(crate) fn free(self, quiet: &Quiet) {
        self.output.free(quiet);
        self.input.free(quiet);
    }
}

/// The largest index among endpoints that stay and come.
pub(crate) fn last_index(indices: impl Iterator<Item = u8>) -> u8 {
    indices.max().unwrap_or(CONTROL).max(CONTROL)
}

/// Addresses to indices.
pub(crate) fn indices(addresses: &[u8]) -> Vec<u8> {
    addresses.iter().map(|address| index_of(*address)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anykernel_usb::controller::{RootPort, Slot, Translator};

    fn interrupt(interval: u8) -> EndpointSpec {
        EndpointSpec {
            address: 0x81,
            kind: EndpointKind::Interrupt,
            max_packet: 8,
            additional: 0,
            max_burst: 0,
            bytes_per_interval: 0,
            interval,
        }
    }

    #[test]
    fn intervals_are_powers_of_two_of_microframes() {
        let interval =
            |speed, interval_| EndpointContext::of(&interrupt(interval_), speed, 0).unwrap().words[0] >> 16;
        assert_eq!(interval(Speed::Full, 1), 3);
        assert_eq!(interval(Speed::Low, 10), 6);
        assert_eq!(interval(Speed::Full, 255), 10);
        assert_eq!(interval(Speed::High, 1), 0);
        assert_eq!(interval(Speed::High, 16), 15);
        assert_eq!(interval(Speed::Super, 0), 0);
    }

    #[test]
    fn places_are_laid_out_as_specified() {
        let mut slot = SlotContext {
            place: Place {
                root_port: RootPort(5),
                route: 0x21,
                speed: Speed::Full,
                translator: Some(Translator { hub: Slot(7), port: 3, multiple: true }),
            },
            hub: None,
            last: 4,
            interrupter: 2,
        };
        assert_eq!(slot.words(), [0x21 | 1 << 20 | 1 << 25 | 4 << 27, 5 << 16, 7 | 3 << 8 | 2 << 22]);
        slot.place.translator = None;
        slot.hub = Some(HubSpec { ports: 8, think_time: 1, multiple_translators: false });
        assert_eq!(slot.words(), [0x21 | 1 << 20 | 1 << 26 | 4 << 27, 5 << 16 | 8 << 24, 1 << 16 | 2 << 22]);
    }

    #[test]
    fn endpoints_have_their_indices() {
        assert_eq!([0, 0x80, 1, 0x81, 0xf, 0x8f].map(index_of), [1, 1, 2, 3, 30, 31]);
    }
}
