//! Descriptors of models.

use hypercall::testing::UsbStandard;
use std::vec;

/// Puts descriptors together.
pub struct Descriptors {
    standard: UsbStandard,
}

impl Descriptors {
    /// A device of this vendor and product with one empty configuration.
    pub fn new(vendor: u16, product: u16, class: [u8; 3], super_speed: bool) -> Self {
        let (usb, max_packet) = if super_speed { (0x0300u16, 9) } else { (0x0200, 64) };
        let mut device = vec![18, 1];
        device.extend(usb.to_le_bytes());
        device.extend(class);
        device.push(max_packet);
        device.extend(vendor.to_le_bytes());
        device.extend(product.to_le_bytes());
        device.extend([0, 1, 1, 2, 3, 1]);
        let mut standard = UsbStandard { device, ..UsbStandard::default() };
        standard.strings = vec!["anykernel", "model", "1"];
        standard.configurations = vec![vec![9, 2, 9, 0, 0, 1, 0, 0x80, 50]];
        Self { standard }
    }

    fn add(mut self, bytes: &[u8]) -> Self {
        let configuration = self.standard.configurations.last_mut().expect("one at least");
        configuration.extend(bytes);
        let len = configuration.len() as u16;
        configuration[2..4].copy_from_slice(&len.to_le_bytes());
        if bytes[1] == 4 && bytes[3] == 0 {
            configuration[4] += 1;
        }
        self
    }

    /// Begins another configuration with this value.
    pub fn configuration(mut self, value: u8) -> Self {
        self.standard.configurations.push(vec![9, 2, 9, 0, 0, value, 0, 0x80, 50]);
        self.standard.device[17] += 1;
        self
    }

    /// Adds a setting of an interface.
    pub fn interface(self, number: u8, alternate: u8, endpoints: u8, class: [u8; 3]) -> Self {
        let [class, subclass, protocol] = class;
        self.add(&[9, 4, number, alternate, endpoints, class, subclass, protocol, 0])
    }

    /// Adds an endpoint: 2 bulk, 3 interrupt.
    pub fn endpoint(self, address: u8, kind: u8, max_packet: u16) -> Self {
        let [low, high] = max_packet.to_le_bytes();
        self.add(&[7, 5, address, kind, low, high, if kind == 3 { 4 } else { 0 }])
    }

    /// Adds anything.
    pub fn raw(self, bytes: &[u8]) -> Self {
        self.add(bytes)
    }

    /// All of it.
    pub fn build(self) -> UsbStandard {
        self.standard
    }
}
