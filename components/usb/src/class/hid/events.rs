//! From reports to events: what is different from the report before.

use super::report::{Field, Layout};
use alloc::vec::Vec;
use anykernel::input::{Axis, InputKind};

const PAGE_DESKTOP: u32 = 1;
const PAGE_KEYBOARD: u32 = 7;
const PAGE_BUTTON: u32 = 9;
/// Too many keys at once: the array says nothing (HID Usage Tables 1.5, 10, usages 1 to 3).
const ROLL_OVER: u32 = PAGE_KEYBOARD << 16 | 1;

/// A device's layout, and its last report of each number.
pub struct Decoder {
    layout: Layout,
    /// Values of each field; of an array, the usages that are on.
    last: Vec<Vec<u32>>,
}

impl Decoder {
    /// Nothing is pressed.
    pub fn new(layout: Layout) -> Self {
        let last = layout.fields.iter().map(|_| Vec::new()).collect();
        Self { layout, last }
    }

    /// What reports look like.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Takes a report and tells what it changes. `false`: it is none (too short, or of a number that is not known).
    pub fn report(&mut self, bytes: &[u8], tell: &mut dyn FnMut(InputKind)) -> bool {
        let (number, body) = match (self.layout.numbered, bytes.split_first()) {
            (true, Some((number, body))) => (*number, body),
            (true, None) => return false,
            (false, _) => (0, bytes),
        };
        // One that is cut short says nothing at all.
        let mine = |field: &&Field| field.report == number;
        let whole = |field: &Field| field.value(body, field.count.saturating_sub(1)).is_some();
        let mut fields = self.layout.fields.iter().filter(mine).peekable();
        if fields.peek().is_none() || !fields.all(whole) {
            return false;
        }
        for (field, last) in self.layout.fields.iter().zip(&mut self.last) {
            if field.report == number {
                if field.array {
                    selected(field, body, last, tell);
                } else {
                    values(field, body, last, tell);
                }
            }
        }
        true
    }

    /// Everything is let go: the device is gone.
    pub fn release(&mut self, tell: &mut dyn FnMut(InputKind)) {
        for (field, last) in self.layout.fields.iter().zip(&mut self.last) {
            if field.array {
                last.drain(..).for_each(|usage| tell(switch(usage, false)));
            } else if !field.relative && field.bits == 1 {
                for (index, value) in last.drain(..).enumerate() {
                    if value != 0 {
                        tell(switch(field.usage(index as u32), false));
                    }
                }
            }
        }
    }

    /// Whether it has keys, and whether it moves a pointer.
    pub fn kinds(&self) -> (bool, bool) {
        let has = |wanted: &dyn Fn(u32) -> bool| {
            self.layout.fields.iter().any(|field| field.usages.iter().any(|usage| wanted(*usage)))
        };
        let letters = has(&|usage| (PAGE_KEYBOARD << 16 | 4..PAGE_KEYBOARD << 16 | 0x66).contains(&usage));
        (letters, has(&|usage| usage == PAGE_DESKTOP << 16 | 0x30))
    }
}

/// A usage that is on or off.
fn switch(usage: u32, pressed: bool) -> InputKind {
    let number = usage as u16;
    match usage >> 16 {
        PAGE_KEYBOARD => InputKind::Key { usage: number, pressed },
        PAGE_BUTTON => InputKind::Button { number, pressed },
        page => InputKind::Control { page: page as u16, usage: number, value: i32::from(pressed) },
    }
}

fn axis(usage: u32) -> Option<Axis> {
    match (usage >> 16, usage & 0xffff) {
        (PAGE_DESKTOP, 0x30) => Some(Axis::X),
        (PAGE_DESKTOP, 0x31) => Some(Axis::Y),
        (PAGE_DESKTOP, 0x38) => Some(Axis::Wheel),
        (PAGE_DESKTOP, other @ 0x32..=0x37) => Some(Axis::Other(other as u16)),
        _ => None,
    }
}

fn selected(field: &Field, body: &[u8], last: &mut Vec<u32>, tell: &mut dyn FnMut(InputKind)) {
    let mut now: Vec<u32> = Vec::new();
    for index in 0..field.count {
        let Some(value) = field.value(body, index) else { return };
        match field.selected(value) {
            Some(ROLL_OVER) => return,
            // No key.
            None | Some(0) => {}
            Some(usage) if usage & 0xffff == 0 || now.contains(&usage) => {}
            Some(usage) => now.push(usage),
        }
    }
    last.iter().filter(|usage| !now.contains(usage)).for_each(|usage| tell(switch(*usage, false)));
    now.iter().filter(|usage| !last.contains(usage)).for_each(|usage| tell(switch(*usage, true)));
    *last = now;
}

fn values(field: &Field, body: &[u8], last: &mut Vec<u32>, tell: &mut dyn FnMut(InputKind)) {
    last.resize(field.count as usize, 0);
    for (index, before) in (0u32..).zip(last) {
        let Some(value) = field.value(body, index) else { return };
        let usage = field.usage(index);
        let (min, max) = field.logical;
        if field.relative {
            match axis(usage) {
                _ if value == 0 => {}
                Some(axis) => tell(InputKind::Motion { axis, delta: value }),
                None => tell(InputKind::Control { page: (usage >> 16) as u16, usage: usage as u16, value }),
            }
        } else if value as u32 != *before {
            *before = value as u32;
            match axis(usage) {
                Some(axis) => tell(InputKind::Position { axis, value, min, max }),
                None if field.bits == 1 => tell(switch(usage, value != 0)),
                None => tell(InputKind::Control { page: (usage >> 16) as u16, usage: usage as u16, value }),
            }
        }
    }
}
