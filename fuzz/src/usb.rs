//! What a USB device sends: descriptors, reports of hubs and of input devices, status wrappers and SCSI answers, blocks of
//! Ethernet frames.

pub mod devices;
pub mod xhci;

use anykernel_usb::controller::Speed;
use anykernel_usb::descriptor::{Configuration, DeviceDescriptor, HubDescriptor, MAX_SETTINGS, text};
use anykernel_usb::hid::{Decoder, Layout};
use anykernel_usb::hub_port_status;
use anykernel_usb::net::{Builder, NtbParameters, parse_ntb};
use anykernel_usb::storage::{bot, scsi};

const SPEEDS: [Speed; 5] = [Speed::Low, Speed::Full, Speed::High, Speed::Super, Speed::SuperPlus];

/// Device and configuration descriptors, and strings: what is found is within bounds and nothing is found twice.
pub fn descriptors(data: &[u8]) {
    text(data);
    for speed in SPEEDS {
        if let Ok(device) = DeviceDescriptor::parse(data, speed) {
            assert!((1..=8).contains(&device.configurations));
        }
    }
    let Ok(configuration) = Configuration::parse(data) else { return };
    assert!((1..=MAX_SETTINGS).contains(&configuration.settings.len()));
    for (index, setting) in configuration.settings.iter().enumerate() {
        let numbers = (setting.interface, setting.alternate);
        let earlier = &configuration.settings[..index];
        assert!(earlier.iter().all(|other| (other.interface, other.alternate) != numbers));
        let extra: usize = setting.extras().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(extra, setting.extra.len(), "what is kept is whole");
        for endpoint in &setting.endpoints {
            for spec in SPEEDS.iter().filter_map(|speed| endpoint.spec(*speed)) {
                assert!((1..=1024).contains(&spec.max_packet) && spec.address & 0x0f != 0);
                assert!(spec.max_burst <= 15 && spec.additional <= 2);
            }
        }
    }
}

/// Hub descriptors, and the status of ports.
pub fn hub(data: &[u8]) {
    if let Ok(hub) = HubDescriptor::parse(data) {
        assert!((1..=HubDescriptor::MAX_PORTS).contains(&hub.ports));
    }
    for status in data.as_chunks::<4>().0 {
        for super_speed in [false, true] {
            let status = hub_port_status(*status, super_speed);
            assert!(!status.enabled || status.speed.is_some(), "a port that is enabled has a speed");
        }
    }
}

/// Status wrappers, and the answers to SCSI commands.
pub fn storage(data: &[u8]) {
    let (tag, rest) =
        data.split_first_chunk().map_or((0, data), |(tag, rest)| (u32::from_le_bytes(*tag), rest));
    if let bot::Verdict::Passed { residue } = bot::judge_status(rest, tag, 4096) {
        assert!(residue <= 4096);
    }
    if let Some(inquiry) = scsi::Inquiry::parse(data) {
        assert!(inquiry.name.is_ascii() && inquiry.name.len() <= 31);
    }
    scsi::sense(data);
    scsi::write_protected(data);
    let short = scsi::capacity_10(data).map(|(last, size)| (u64::from(last), size));
    for (last, size) in scsi::capacity_16(data).into_iter().chain(short) {
        if let Some(capacity) = scsi::checked_capacity(last, size) {
            assert!(capacity.sectors.checked_mul(u64::from(capacity.sector_size)).is_some());
            let (command, len) = scsi::transfer(true, last, 1);
            assert!(
                bot::command_wrapper(tag, capacity.sector_size, bot::Direction::Out, 0, &command[..len])
                    .len()
                    == bot::CBW_LEN
            );
        }
    }
}

/// A report descriptor, and reports: the first byte says how long the descriptor is, then each report begins with its length.
pub fn hid(data: &[u8]) {
    let Some((len, rest)) = data.split_first() else { return };
    let (descriptor, mut rest) = rest.split_at(usize::from(*len).min(rest.len()));
    let Ok(layout) = Layout::parse(descriptor) else { return };
    assert!(layout.longest <= 4097);
    let mut decoder = Decoder::new(layout);
    let (mut reports, mut events) = (1, 0usize);
    while let Some((len, behind)) = rest.split_first() {
        let (report, behind) = behind.split_at(usize::from(*len).min(behind.len()));
        decoder.report(report, &mut |_| events += 1);
        (rest, reports) = (behind, reports + 1);
    }
    decoder.release(&mut |_| events += 1);
    assert!(events <= 2 * 2048 * reports, "{events} events of {reports} reports");
}

/// Blocks of Ethernet frames: never more comes out than is in them, and what is made of it again is the same.
pub fn ncm(data: &[u8]) {
    let (mut frames, mut total) = (Vec::new(), 0);
    let _ = parse_ntb(data, &mut |frame| {
        total += frame.len();
        frames.push(frame.to_vec());
    });
    assert!(total <= data.len(), "{total} bytes out of {}", data.len());
    let Some(parameters) =
        NtbParameters::parse(data.get(data.len().saturating_sub(28)..).unwrap_or_default())
    else {
        return;
    };
    let mut block = Builder::new(parameters);
    let kept: Vec<_> = frames.into_iter().take_while(|frame| block.add(frame)).collect();
    let bytes = block.finish(1);
    assert!(bytes.len() <= parameters.out_max as usize);
    let mut again = Vec::new();
    assert_eq!(parse_ntb(&bytes, &mut |frame| again.push(frame.to_vec())), Ok(kept.len()));
    assert_eq!(again, kept);
}
