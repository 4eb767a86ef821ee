//! One command at a time, with every recovery that the specification knows (Bulk-Only Transport 1.0, 5.3 and 6.7).

use super::bot::{CBW_LEN, CSW_LEN, Direction, Verdict, command_wrapper, judge_status};
use crate::controller::EndpointKind;
use crate::descriptor::Setting;
use crate::device::{Device, zeroed};
use crate::engine::Failure;
use crate::quirks::Quirks;
use crate::request;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::counter::Counter;
use hypercall::Host;

/// How long a wrapper may take.
const WRAPPER_TIMEOUT_MS: u64 = 5_000;
/// Recoveries that fail in a row before the device is given up.
const MOST_FAILURES: u32 = 4;

/// What came of a command.
pub(super) struct Done {
    pub(super) data: Vec<Box<[u8]>>,
    /// Bytes of the data that count.
    pub(super) actual: usize,
    pub(super) result: Result<(), CommandError>,
}

/// Why a command came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CommandError {
    /// Ask for the sense data.
    Check,
    /// The transport failed and was recovered: the command may be tried again.
    Transport,
    /// The transport is beyond recovery.
    Dead(Failure),
}

pub(super) struct Transport<H: Host> {
    pub(super) device: Arc<Device<H>>,
    pub(super) interface: u8,
    bulk_in: u8,
    bulk_out: u8,
    tag: u32,
    failures: u32,
    recoveries: Counter,
}

/// Why a command has to be followed by a reset recovery, or that the device is no more.
enum Broken {
    Recover,
    Gone,
}

impl<H: Host> Transport<H> {
    pub(super) fn new(device: Arc<Device<H>>, setting: &Setting, recoveries: Counter) -> Option<Self> {
        let bulk_in = setting.endpoint(EndpointKind::Bulk, true)?.address;
        let bulk_out = setting.endpoint(EndpointKind::Bulk, false)?.address;
        Some(Self {
            device,
            interface: setting.interface,
            bulk_in,
            bulk_out,
            tag: 0,
            failures: 0,
            recoveries,
        })
    }

    /// GET MAX LUN (3.2). A device that does not know it has one.
    pub(super) async fn luns(&self) -> Result<u8, Failure> {
        if self.device.identity.quirks.contains(Quirks::SINGLE_LUN) {
            return Ok(1);
        }
        match self.device.control_in(request::setup(0xa1, 0xfe, 0, u16::from(self.interface), 1)).await {
            Ok(answer) => Ok(answer.first().map_or(0, |last| last & 15) + 1),
            Err(Failure::Gone) => Err(Failure::Gone),
            Err(_) => Ok(1),
        }
    }

    /// Carries out a command with its data. What went wrong in between is recovered before this returns.
    pub(super) async fn command(
        &mut self,
        lun: u8,
        command: &[u8],
        direction: Direction,
        data: Vec<Box<[u8]>>,
        timeout_ms: u64,
    ) -> Done {
        self.tag = self.tag.wrapping_add(1);
        let len = data.iter().map(|buffer| buffer.len()).sum::<usize>();
        let mut done = Done { data: Vec::new(), actual: 0, result: Ok(()) };
        match self.attempt(lun, command, direction, data, len, timeout_ms, &mut done).await {
            Ok(Verdict::Passed { residue }) => {
                self.failures = 0;
                if !self.device.identity.quirks.contains(Quirks::IGNORE_RESIDUE) {
                    done.actual = done.actual.min(len.saturating_sub(residue as usize));
                }
            }
            Ok(Verdict::Failed) => {
                self.failures = 0;
                done.result = Err(CommandError::Check);
            }
            Ok(Verdict::Phase | Verdict::Invalid) | Err(Broken::Recover) => {
                done.result = Err(self.recover().await);
            }
            Err(Broken::Gone) => done.result = Err(CommandError::Dead(Failure::Gone)),
        }
        done
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one command")]
    async fn attempt(
        &self,
        lun: u8,
        command: &[u8],
        direction: Direction,
        data: Vec<Box<[u8]>>,
        len: usize,
        timeout_ms: u64,
        done: &mut Done,
    ) -> Result<Verdict, Broken> {
        let wrapper = command_wrapper(self.tag, len as u32, direction, lun, command);
        // Command and data are queued at once: the controller goes from one to the next by itself. The status is not: QEMU's
        // model (7.2) forgets a status that is asked for while its data is still under way.
        let sent = self.device.pipe(self.bulk_out, alloc::vec![wrapper], WRAPPER_TIMEOUT_MS);
        let endpoint = if direction == Direction::In { self.bulk_in } else { self.bulk_out };
        let moving = (len > 0).then(|| self.device.pipe(endpoint, data, timeout_ms));

        let sent = self.device.end_of(sent).await;
        if sent.result.is_err() || sent.actual != CBW_LEN {
            // Nothing comes after a command that did not arrive; but the buffers must come back.
            if let Some(moving) = moving {
                moving.cancel();
                done.data = moving.await.data;
            }
            return Err(self.broken(sent.result));
        }
        if let Some(moving) = moving {
            let over = self.device.end_of(moving).await;
            (done.data, done.actual) = (over.data, over.actual);
            match over.result {
                Ok(()) => {
                    if direction == Direction::In
                        && let Some(verdict) = self.status_for_data(done, len)
                    {
                        done.actual = 0;
                        return Ok(verdict);
                    }
                }
                // The device ends the data early like this (6.7.2, 6.7.3).
                Err(Failure::Stall) => {
                    self.device.clear_halt(endpoint).await.map_err(|failure| self.broken(Err(failure)))?;
                }
                Err(failure) => return Err(self.broken(Err(failure))),
            }
        }
        let room = zeroed(CSW_LEN).map_err(|failure| self.broken(Err(failure)))?;
        let mut over = self.device.end_of(self.device.pipe(self.bulk_in, room, timeout_ms)).await;
        for _ in 0..2 {
            match over.result {
                Ok(()) => {
                    let bytes =
                        over.data.first().and_then(|data| data.get(..over.actual)).unwrap_or_default();
                    // An empty packet instead of a status: ask again (as for a stall).
                    if !bytes.is_empty() {
                        return Ok(judge_status(bytes, self.tag, len as u32));
                    }
                }
                // 6.7.2: clear it and ask once more.
                Err(Failure::Stall) => {
                    self.device
                        .clear_halt(self.bulk_in)
                        .await
                        .map_err(|failure| self.broken(Err(failure)))?;
                }
                Err(failure) => return Err(self.broken(Err(failure))),
            }
            let room = zeroed(CSW_LEN).map_err(|failure| self.broken(Err(failure)))?;
            over = self.device.end_of(self.device.pipe(self.bulk_in, room, timeout_ms)).await;
        }
        match over.result {
            Ok(()) => {
                let bytes = over.data.first().and_then(|data| data.get(..over.actual)).unwrap_or_default();
                Ok(judge_status(bytes, self.tag, len as u32))
            }
            Err(failure) => Err(self.broken(Err(failure))),
        }
    }

    /// A device without data for us may send its status where the data would be.
    fn status_for_data(&self, done: &Done, len: usize) -> Option<Verdict> {
        if done.actual != CSW_LEN || len == CSW_LEN {
            return None;
        }
        let bytes = done.data.first()?.get(..CSW_LEN)?;
        match judge_status(bytes, self.tag, len as u32) {
            Verdict::Passed { residue } if residue as usize == len => Some(Verdict::Passed { residue }),
            Verdict::Failed => Some(Verdict::Failed),
            _ => None,
        }
    }

    fn broken(&self, result: Result<(), Failure>) -> Broken {
        if result == Err(Failure::Gone) || self.device.is_gone() { Broken::Gone } else { Broken::Recover }
    }

    /// Reset recovery (5.3.4); a reset of the port where that does not help.
    async fn recover(&mut self) -> CommandError {
        self.failures += 1;
        self.recoveries.increment();
        if self.failures > MOST_FAILURES {
            return CommandError::Dead(Failure::Error);
        }
        let result = match self.failures {
            1 | 2 => self.reset_recovery().await,
            _ => Err(Failure::Error),
        };
        let result = match result {
            Err(failure) if failure != Failure::Gone => self.device.reset().await,
            other => other,
        };
        match result {
            Ok(()) => CommandError::Transport,
            Err(failure) => CommandError::Dead(failure),
        }
    }

    async fn reset_recovery(&self) -> Result<(), Failure> {
        let reset = request::setup(0x21, 0xff, 0, u16::from(self.interface), 0);
        self.device.control_out(reset, &[]).await?;
        self.device.clear_halt(self.bulk_in).await?;
        self.device.clear_halt(self.bulk_out).await
    }
}
