//! USB of the host, recorded. A transfer is one record where it is submitted and one where it is reaped; that it is over is
//! a signal of the host like any other.

use super::host::list;
use super::record::{USB_STATUS, outcome, receives, submitted, usb_device_words};
use super::{Recorded, Use};
use crate::*;
use alloc::sync::Arc;
use alloc::vec::Vec;

impl<H: HostUsb + Threads + Clock> Recorded<H> {
    /// A call about a device that may block.
    fn usb_call(&self, call: Call, arguments: &[u64], body: impl FnOnce(&H) -> Result<()>) -> Result<()> {
        let result = self.blocking(body);
        self.note(call, arguments, &[outcome(&result)], &[]);
        result
    }
}

impl<H: HostUsb + Threads + Clock> HostUsb for Recorded<H> {
    fn usb_watch(&self, signal: Option<Arc<Signal>>) -> Result<()> {
        self.recorder().end_use(self.host(), Use::UsbWatch);
        let watches = signal.is_some();
        let (shadow, number) = signal.map(|signal| self.recorder().add_source(signal)).unzip();
        let result = self.host().usb_watch(shadow);
        if let Some(number) = number {
            self.recorder().begin_use(self.host(), number, result.is_ok().then_some(Use::UsbWatch));
        }
        let results = [outcome(&result), number.unwrap_or(u64::MAX)];
        self.note(Call::UsbWatch, &[watches.into()], &results, &[]);
        result
    }
    fn usb_devices(&self, found: &mut dyn FnMut(UsbDeviceInfo)) {
        let mut devices = Vec::new();
        self.host().usb_devices(&mut |device| devices.push(device));
        let words = list(devices.iter().flat_map(|device| usb_device_words(*device)));
        self.note(Call::UsbDevices, &[], &[], &words);
        devices.into_iter().for_each(found);
    }
    fn usb_descriptors(&self, device: UsbDeviceId, buf: &mut [u8]) -> Result<usize> {
        let result = self.host().usb_descriptors(device, buf);
        let data = result.as_ref().ok().and_then(|len| buf.get(..*len)).unwrap_or_default();
        self.note(Call::UsbDescriptors, &[device.0, buf.len() as u64], &[outcome(&result)], data);
        result
    }
    fn usb_open(&self, device: UsbDeviceId, signal: Arc<Signal>) -> Result<()> {
        let (shadow, number) = self.recorder().add_source(signal);
        let result = self.blocking(|host| host.usb_open(device, shadow));
        self.recorder().begin_use(self.host(), number, result.is_ok().then_some(Use::Usb(device.0)));
        self.note(Call::UsbOpen, &[device.0], &[outcome(&result), number], &[]);
        result
    }
    fn usb_close(&self, device: UsbDeviceId) {
        self.blocking(|host| host.usb_close(device));
        self.note(Call::UsbClose, &[device.0], &[], &[]);
        self.recorder().end_use(self.host(), Use::Usb(device.0));
    }
    fn usb_configure(&self, device: UsbDeviceId, configuration: u8) -> Result<()> {
        let arguments = [device.0, configuration.into()];
        self.usb_call(Call::UsbConfigure, &arguments, |host| host.usb_configure(device, configuration))
    }
    fn usb_claim(&self, device: UsbDeviceId, interface: u8) -> Result<()> {
        let arguments = [device.0, interface.into()];
        self.usb_call(Call::UsbClaim, &arguments, |host| host.usb_claim(device, interface))
    }
    fn usb_release(&self, device: UsbDeviceId, interface: u8) {
        self.blocking(|host| host.usb_release(device, interface));
        self.note(Call::UsbRelease, &[device.0, interface.into()], &[], &[]);
    }
    fn usb_set_alternate(&self, device: UsbDeviceId, interface: u8, alternate: u8) -> Result<()> {
        let arguments = [device.0, interface.into(), alternate.into()];
        self.usb_call(Call::UsbSetAlternate, &arguments, |host| {
            host.usb_set_alternate(device, interface, alternate)
        })
    }
    fn usb_clear_halt(&self, device: UsbDeviceId, endpoint: u8) -> Result<()> {
        let arguments = [device.0, endpoint.into()];
        self.usb_call(Call::UsbClearHalt, &arguments, |host| host.usb_clear_halt(device, endpoint))
    }
    fn usb_reset(&self, device: UsbDeviceId) -> Result<()> {
        self.usb_call(Call::UsbReset, &[device.0], |host| host.usb_reset(device))
    }
    fn usb_submit(&self, device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        let arguments = submitted(device, &transfer);
        let result = self.host().usb_submit(device, transfer);
        let told = result.as_ref().map(drop).map_err(|refused| refused.error);
        self.note(Call::UsbSubmit, &arguments, &[outcome(&told)], &[]);
        result
    }
    fn usb_cancel(&self, device: UsbDeviceId, tag: u64) {
        self.host().usb_cancel(device, tag);
        self.note(Call::UsbCancel, &[device.0, tag], &[], &[]);
    }
    fn usb_reap(&self, device: UsbDeviceId) -> Option<UsbCompletion> {
        let completion = self.host().usb_reap(device);
        match &completion {
            None => self.note(Call::UsbReap, &[device.0], &[0], &[]),
            Some(UsbCompletion { transfer, actual, status }) => {
                let code = USB_STATUS.iter().position(|one| one == status).unwrap_or(usize::MAX);
                let results = [1, transfer.tag, *actual as u64, code as u64];
                let len = if receives(transfer) { transfer.len().min(*actual) } else { 0 };
                let mut data = alloc::vec![0; len];
                transfer.gather(&mut data);
                self.note(Call::UsbReap, &[device.0], &results, &data);
            }
        }
        completion
    }
}
