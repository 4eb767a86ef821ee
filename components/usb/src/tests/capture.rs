//! The capture, as another program reads it.

use super::support::World;
use crate::testing::{HidModel, KEYBOARD, StorageModel};
use crate::usbmon::{Tap, file_header};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use std::process::Command;
use std::sync::Mutex;

#[test]
fn tshark_decodes_it() {
    let world = World::new(2);
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let sink = bytes.clone();
    world.stack.set_tap(Some(Tap::new(move |record| sink.lock().unwrap().extend_from_slice(record))));
    assert_eq!(bytes.lock().unwrap()[..], file_header());
    world.bus.plug(1, StorageModel::new(std::vec![5; 64 << 10]).0);
    let (keyboard, state) = HidModel::new(KEYBOARD, 1);
    world.bus.plug(2, keyboard);
    state.lock().unwrap().reports.push_back(std::vec![0, 0, 4, 0, 0, 0, 0, 0]);
    world.settle();
    world.run(50);
    let file = std::env::temp_dir().join(std::format!("usb-capture-{}.pcap", std::process::id()));
    std::fs::write(&file, &*bytes.lock().unwrap()).unwrap();
    let fields = [
        "usb.urb_type",
        "usb.transfer_type",
        "usb.bus_id",
        "usb.urb_status",
        "usb.idVendor",
        "scsi.inquiry.product_id",
        "_ws.malformed",
    ];
    let mut tshark = Command::new("tshark");
    tshark.arg("-r").arg(&file).args(["-T", "fields", "-E", "separator=|"]);
    for field in fields {
        tshark.args(["-e", field]);
    }
    let output = tshark.output().expect("tshark runs: apt-get install tshark");
    std::fs::remove_file(&file).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split('|').collect()).collect();
    let count =
        |column: usize, wanted: &str| lines.iter().filter(|line| line[column].contains(wanted)).count();
    assert!(lines.len() > 60, "{text}");
    assert_eq!(count(6, "") - count(6, "alformed"), lines.len(), "nothing is malformed: {text}");
    // Each that was submitted is over, but for one report that is waited for.
    assert!(count(0, "S") - count(0, "C") <= 2, "{text}");
    assert!(count(1, "0x02") > 20 && count(1, "0x03") > 10 && count(1, "0x01") >= 2, "{text}");
    assert_eq!(count(2, "1"), lines.len(), "the bus: {text}");
    assert!(count(4, "0x46f4") >= 1 && count(4, "0x0627") >= 1, "{text}");
    assert!(count(5, "model stick") >= 1, "{text}");
}
