//! USB of the host, as recorded.

use super::host::{Replayed, copy, outcome, result, words};
use hypercall::layers::recorded::{USB_STATUS, submitted, usb_device_of};
use hypercall::*;
use std::sync::Arc;

impl Replayed {
    fn about(&self, call: Call, arguments: &[u64]) -> Result<()> {
        outcome(&self.call(call, arguments))
    }
}

impl HostUsb for Replayed {
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()> {
        let record = self.call(Call::UsbWatch, &[signal.is_some().into()]);
        outcome(&record)?;
        if let Some(signal) = signal {
            self.0.add_signal(result(&record, 1), signal);
        }
        Ok(())
    }
    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        let record = self.call(Call::UsbDevices, &[]);
        let words: Vec<u64> = words(&record).collect();
        words.as_chunks::<3>().0.iter().filter_map(|device| usb_device_of(*device)).for_each(found);
    }
    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        let record = self.call(Call::UsbDescriptors, &[device.0, buf.len() as u64]);
        outcome(&record).map(|()| copy(&record, buf))
    }
    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()> {
        let record = self.call(Call::UsbOpen, &[device.0]);
        outcome(&record)?;
        self.0.add_signal(result(&record, 1), signal);
        Ok(())
    }
    fn usb_close(&self, device: UsbDeviceId) {
        self.call(Call::UsbClose, &[device.0]);
        self.0.transfers(|transfers| transfers.retain(|(of, _), _| *of != device.0));
    }
    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()> {
        self.about(Call::UsbConfigure, &[device.0, configuration.into()])
    }
    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()> {
        self.about(Call::UsbClaim, &[device.0, interface.into()])
    }
    fn usb_release(&self, device: UsbDeviceId, interface: u8) {
        self.call(Call::UsbRelease, &[device.0, interface.into()]);
    }
    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()> {
        self.about(Call::UsbSetAlternate, &[device.0, interface.into(), alternate.into()])
    }
    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()> {
        self.about(Call::UsbClearHalt, &[device.0, endpoint.into()])
    }
    fn usb_reset(&self, device: UsbDeviceId) -> Result<()> {
        self.about(Call::UsbReset, &[device.0])
    }
    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        match self.about(Call::UsbSubmit, &submitted(device, &transfer)) {
            Ok(()) => {
                self.0.transfers(|transfers| transfers.insert((device.0, transfer.tag), transfer));
                Ok(())
            }
            Err(error) => Err(UsbRefused { transfer, error }),
        }
    }
    fn usb_cancel(&self, device: UsbDeviceId, tag: u64) {
        self.call(Call::UsbCancel, &[device.0, tag]);
    }
    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion> {
        let record = self.call(Call::UsbReap, &[device.0]);
        let [1, tag, actual, status] = record.results[..] else { return None };
        let mut transfer = self.0.transfers(|transfers| transfers.remove(&(device.0, tag)))?;
        transfer.scatter(&record.data);
        let actual = usize::try_from(actual).unwrap_or(usize::MAX).min(transfer.len());
        let status = usize::try_from(status).ok().and_then(|code| USB_STATUS.get(code));
        Some(UsbCompletion { transfer, actual, status: *status.unwrap_or(&UsbStatus::Error) })
    }
}
