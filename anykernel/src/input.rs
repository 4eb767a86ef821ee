//! What an input device is: a stream of events from keyboards, mice and the like.

use alloc::string::String;
use alloc::sync::Arc;
use hypercall::Signal;

/// What an input device is. Constant while it exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputInfo {
    /// Registry name: `usb1-2i0`.
    pub name: String,
    /// For people.
    pub product: String,
    /// It has keys of a keyboard.
    pub keyboard: bool,
    /// It moves a pointer.
    pub pointer: bool,
}

/// A direction of movement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Axis {
    /// To the right.
    X,
    /// Down.
    Y,
    /// A wheel, away from the user.
    Wheel,
    /// Another axis, by its usage on the generic desktop page (HID Usage Tables 1.5, 4).
    Other(u16),
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InputKind {
    /// A key, by its usage on the keyboard page (HID Usage Tables 1.5, 10).
    Key {
        /// 4 is `a`, 40 is Enter, 225 is the left Shift key.
        usage: u16,
        /// Down, or up.
        pressed: bool,
    },
    /// A button; 1 is the first.
    Button {
        /// Which.
        number: u16,
        /// Down, or up.
        pressed: bool,
    },
    /// A movement.
    Motion {
        /// Which way.
        axis: Axis,
        /// How far, in the device's units.
        delta: i32,
    },
    /// A place.
    Position {
        /// On which axis.
        axis: Axis,
        /// Between the next two.
        value: i32,
        /// Least value.
        min: i32,
        /// Greatest value.
        max: i32,
    },
    /// Any other control, whose value is another one now.
    Control {
        /// Usage page.
        page: u16,
        /// Usage.
        usage: u16,
        /// Its value; for a control that is on or off, 1 or 0.
        value: i32,
    },
}

/// An event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InputEvent {
    /// When it arrived, in [`hypercall::Clock::monotonic_ns`].
    pub time_ns: u64,
    /// What it was.
    pub kind: InputKind,
}

/// An input device.
pub trait InputDevice: Send + Sync {
    /// What it is.
    fn info(&self) -> &InputInfo;

    /// Takes the oldest event. Those that nobody takes are dropped, the newest first, and counted. Context: thread. Never blocks.
    fn read(&self) -> Option<InputEvent>;

    /// From now on `signal` is raised when there are events or the device is gone; `None` ends it. Context: thread.
    fn watch(&self, signal: Option<Arc<Signal>>);

    /// Whether it was unplugged: what is left can still be read.
    fn gone(&self) -> bool;
}

/// The character of a key on a US keyboard (HID Usage Tables 1.5, 10); Enter is a line feed. `None`: it has none.
pub fn ascii(usage: u16, shift: bool) -> Option<char> {
    const PLAIN: &[u8] = b"1234567890\n\x1b\x08\t -=[]\\\\;'`,./";
    const SHIFTED: &[u8] = b"!@#$%^&*()\n\x1b\x08\t _+{}||:\"~<>?";
    let byte = match usage {
        4..=29 => (if shift { b'A' } else { b'a' }) + (usage - 4) as u8,
        30..=56 => *(if shift { SHIFTED } else { PLAIN }).get(usize::from(usage) - 30)?,
        _ => return None,
    };
    Some(char::from(byte))
}

#[cfg(test)]
mod tests {
    use super::ascii;

    #[test]
    fn keys_have_characters() {
        let keys =
            [(4, 'a', 'A'), (29, 'z', 'Z'), (30, '1', '!'), (39, '0', ')'), (40, '\n', '\n'), (44, ' ', ' ')];
        for (usage, plain, shifted) in
            keys.into_iter().chain([(45, '-', '_'), (51, ';', ':'), (56, '/', '?')])
        {
            assert_eq!((ascii(usage, false), ascii(usage, true)), (Some(plain), Some(shifted)), "{usage}");
        }
        for usage in [0, 1, 3, 57, 225, 0xffff] {
            assert_eq!(ascii(usage, false), None);
        }
    }
}
