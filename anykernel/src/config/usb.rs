//! Which USB devices are meant.

use hypercall::UsbPath;

/// What an entry of [`Config::usb`](super::Config::usb) picks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UsbSelector {
    /// Whatever is plugged in there: `1-2.3`.
    Place(UsbPath),
    /// Vendor and product (USB 2.0, 9.6.1): `46f4:0001`.
    Product(u16, u16),
    /// The class of the device or of one of its interfaces: `class:03`.
    Class(u8),
}

impl UsbSelector {
    /// Reads one; numbers are hexadecimal.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |text: &str, digits: usize| {
            let fits = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            fits.then(|| u16::from_str_radix(text, 16).ok()).flatten()
        };
        match text.split_once(':') {
            Some(("class", class)) => {
                hex(class, 2).and_then(|class| u8::try_from(class).ok()).map(Self::Class)
            }
            Some((vendor, product)) => Some(Self::Product(hex(vendor, 4)?, hex(product, 4)?)),
            // A root hub is nobody's to take.
            None => UsbPath::parse(text).filter(|path| path.parent().is_some()).map(Self::Place),
        }
    }
}

impl From<UsbPath> for UsbSelector {
    fn from(place: UsbPath) -> Self {
        Self::Place(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_picked_by_place_product_or_class() {
        let place = UsbPath::parse("1-2.3").unwrap();
        assert_eq!(UsbSelector::parse("1-2.3"), Some(UsbSelector::Place(place)));
        assert_eq!(UsbSelector::parse("46f4:0001"), Some(UsbSelector::Product(0x46f4, 1)));
        assert_eq!(UsbSelector::parse("class:03"), Some(UsbSelector::Class(3)));
        for text in [
            "",
            "usb1",
            "1",
            "46f4:",
            "46f4:1",
            "46f4:00011",
            "46f4:+001",
            "class:3",
            "class:003",
            "klass:03",
        ] {
            assert_eq!(UsbSelector::parse(text), None, "{text}");
        }
    }
}
