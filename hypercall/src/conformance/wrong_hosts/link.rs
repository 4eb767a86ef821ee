//! Links of the host, broken.

use super::*;

impl HostLink for Wrong {
    fn link_count(&self) -> u32 {
        self.host.link_count()
    }
    fn link_open(&self, link: u32, signal: Arc<Signal>) -> Result<LinkInfo> {
        match self.fault {
            Fault::LinkSignalNever => self.host.link_open(link, Arc::new(Signal::new())),
            Fault::LinkOpensTwice => match self.host.link_open(link, signal.clone()) {
                Err(Error::Busy) => {
                    self.host.link_close(link);
                    self.host.link_open(link, signal)
                }
                other => other,
            },
            _ => self.host.link_open(link, signal),
        }
    }
    fn link_send(&self, link: u32, frame: &[u8]) -> Result<()> {
        match self.fault {
            Fault::FrameCut if frame.len() == 1514 => self.host.link_send(link, &frame[..1500]),
            // Two queues without an order between them: short frames overtake.
            Fault::FramesSwapped if (70..90).contains(&frame.len()) => {
                let mut held = self.memo.frame.lock().unwrap();
                match held.take() {
                    Some(first) => {
                        self.host.link_send(link, frame)?;
                        self.host.link_send(link, &first)
                    }
                    None => {
                        *held = Some(frame.to_vec());
                        Ok(())
                    }
                }
            }
            _ => self.host.link_send(link, frame),
        }
    }
    fn link_receive(&self, link: u32, buf: &mut [u8]) -> Result<usize> {
        self.host.link_receive(link, buf)
    }
    fn link_close(&self, link: u32) {
        self.host.link_close(link);
    }
}
