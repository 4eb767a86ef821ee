//! USB of the host is not recorded: a recorded domain has none.

use super::Recorded;
use crate::*;
use alloc::sync::Arc;

impl<H> HostUsb for Recorded<H> {
    fn usb_watch(&self, _signal: Option<Arc<Signal>>) -> Result<()> {
        Err(Error::Unsupported)
    }
    fn usb_devices(&self, _found: &mut dyn FnMut(UsbDeviceInfo)) {}
    fn usb_descriptors(&self, _device: UsbDeviceId, _buf: &mut [u8]) -> Result<usize> {
        Err(Error::Unsupported)
    }
    fn usb_open(&self, _device: UsbDeviceId, _signal: Arc<Signal>) -> Result<()> {
        Err(Error::Unsupported)
    }
    fn usb_close(&self, _device: UsbDeviceId) {}
    fn usb_configure(&self, _device: UsbDeviceId, _configuration: u8) -> Result<()> {
        Err(Error::Unsupported)
    }
    fn usb_claim(&self, _device: UsbDeviceId, _interface: u8) -> Result<()> {
        Err(Error::Unsupported)
    }
    fn usb_release(&self, _device: UsbDeviceId, _interface: u8) {}
    fn usb_set_alternate(&self, _device: UsbDeviceId, _interface: u8, _alternate: u8) -> Result<()> {
        Err(Error::Unsupported)
    }
    fn usb_clear_halt(&self, _device: UsbDeviceId, _endpoint: u8) -> Result<()> {
        Err(Error::Unsupported)
    }
    fn usb_reset(&self, _device: UsbDeviceId) -> Result<()> {
        Err(Error::Unsupported)
    }
    fn usb_submit(&self, _device: UsbDeviceId, transfer: UsbTransfer) -> Result<(), UsbRefused> {
        Err(UsbRefused { transfer, error: Error::Unsupported })
    }
    fn usb_cancel(&self, _device: UsbDeviceId, _tag: u64) {}
    fn usb_reap(&self, _device: UsbDeviceId) -> Option<UsbCompletion> {
        None
    }
}
