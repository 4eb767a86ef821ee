//! Questions to a device before it has drivers: its descriptors and strings (USB 2.0, 9.4.3).

use crate::controller::{Slot, Token, Transfer};
use crate::descriptor::{kind, text};
use crate::device::{CONTROL_TIMEOUT_MS, zeroed};
use crate::engine::{Engine, Failure};
use crate::request;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypercall::Host;

/// How often one descriptor is asked for.
const TRIES: u32 = 2;

/// Questions to a device that is none yet.
pub(crate) struct Asking<'a, H: Host> {
    pub(crate) engine: &'a Arc<Engine<H>>,
    pub(crate) slot: Slot,
}

impl<H: Host> Asking<'_, H> {
    async fn control(&self, setup: [u8; 8], len: u16) -> Result<Vec<u8>, Failure> {
        let transfer = Transfer {
            token: Token(0),
            slot: self.slot,
            endpoint: 0,
            setup: Some(setup),
            data: zeroed(usize::from(len))?,
            zero_packet: false,
        };
        let over = self.engine.transfer(transfer, CONTROL_TIMEOUT_MS).await;
        over.result?;
        let mut answer = over.data.into_iter().next().unwrap_or_default().into_vec();
        answer.truncate(over.actual);
        Ok(answer)
    }

    /// A descriptor, asked for a few times.
    pub(crate) async fn descriptor(&self, kind: u8, index: u8, len: u16) -> Result<Vec<u8>, Failure> {
        let mut last = Failure::Error;
        for _ in 0..TRIES {
            match self.control(request::get_descriptor(kind, index, 0, len), len).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    /// The strings with these indices in the device's first language. One that it refuses stays empty.
    pub(crate) async fn strings(&self, indices: [u8; 3], strings: &mut [String; 3]) -> Result<(), Failure> {
        if indices == [0; 3] {
            return Ok(());
        }
        let languages = match self.control(request::get_descriptor(kind::STRING, 0, 0, 255), 255).await {
            Ok(answer) => answer,
            Err(Failure::Stall) => return Ok(()),
            Err(failure) => return Err(failure),
        };
        let &[_, _, l0, l1, ..] = &languages[..] else { return Ok(()) };
        let language = u16::from_le_bytes([l0, l1]);
        for (index, string) in indices.into_iter().zip(strings).filter(|(index, _)| *index != 0) {
            match self.control(request::get_descriptor(kind::STRING, index, language, 255), 255).await {
                Ok(answer) => *string = text(&answer),
                Err(Failure::Stall | Failure::Overflow) => {}
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }
}
