//! USB devices of the host, broken.

use super::*;

impl HostUsb for Wrong {
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()> {
        if self.is(Fault::UsbWatchForever) && signal.is_none() {
            return Ok(());
        }
        self.host.usb_watch(signal)
    }
    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        self.host.usb_devices(&mut |mut info| {
            if self.is(Fault::UsbBusZero) {
                info.path = UsbPath::root(0);
            }
            found(info);
            if self.is(Fault::UsbListsTwice) {
                found(info);
            }
        });
    }
    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        let len = self.host.usb_descriptors(device, buf)?;
        Ok(if self.is(Fault::UsbDescriptorsCut) { len - 1 } else { len })
    }
    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()> {
        let signal = match self.fault {
            Fault::UsbSignalNever => Arc::new(Signal::new()),
            Fault::UsbKeepsSignal => {
                self.memo.irqs.lock().unwrap().push(signal.clone());
                signal
            }
            _ => signal,
        };
        match self.host.usb_open(device, signal) {
            Err(Error::Busy) if self.is(Fault::UsbOpensTwice) => Ok(()),
            Err(Error::NotFound) if self.is(Fault::UsbStrangersOpened) => Ok(()),
            other => other,
        }
    }
    fn usb_close(&self, device: UsbDeviceId) {
        *self.memo.completion.lock().unwrap() = None;
        self.host.usb_close(device);
    }
    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()> {
        self.host.usb_configure(device, configuration)
    }
    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()> {
        match self.host.usb_claim(device, interface) {
            Err(Error::Invalid) if self.is(Fault::UsbClaimsAnything) => Ok(()),
            other => other,
        }
    }
    fn usb_release(&self, device: UsbDeviceId, interface: u8) {
        self.host.usb_release(device, interface);
        if self.is(Fault::UsbReleaseForgets) {
            while self.host.usb_reap(device).is_some() {}
        }
    }
    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()> {
        self.host.usb_set_alternate(device, interface, alternate)
    }
    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()> {
        if self.is(Fault::UsbHaltStays) {
            return Err(Error::Io);
        }
        self.host.usb_clear_halt(device, endpoint)
    }
    fn usb_reset(&self, device: UsbDeviceId) -> Result<()> {
        if self.is(Fault::UsbResetKills) {
            self.host.usb_close(device);
            return Ok(());
        }
        self.host.usb_reset(device)
    }
    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        self.host.usb_submit(device, transfer).map_err(|mut refused| {
            if self.is(Fault::UsbKeepsRefused) {
                refused.transfer.data.clear();
            }
            refused
        })
    }
    fn usb_cancel(&self, device: UsbDeviceId, tag: u64) {
        if !self.is(Fault::UsbCancelSilent) {
            self.host.usb_cancel(device, tag);
        }
    }
    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion> {
        if let Some(again) = self.memo.completion.lock().unwrap().take() {
            return Some(again);
        }
        let mut over = self.host.usb_reap(device)?;
        // The last of the eight that `once` submits.
        let eighth = over.transfer.tag == 17;
        match self.fault {
            Fault::UsbControlZeroes => over.transfer.data.iter_mut().for_each(|buffer| buffer.fill(0)),
            Fault::UsbFillsFirst => {
                if let Some(second) = over.transfer.data.get_mut(1) {
                    second.fill(0);
                }
            }
            Fault::UsbShortAsFull => over.actual = over.transfer.len(),
            Fault::UsbStallAsDone if over.status == UsbStatus::Stall => over.status = UsbStatus::Done,
            Fault::UsbCompletesTwice if eighth => {
                *self.memo.completion.lock().unwrap() = Some(over.clone());
            }
            Fault::UsbLoses if eighth => return None,
            _ => {}
        }
        Some(over)
    }
}
