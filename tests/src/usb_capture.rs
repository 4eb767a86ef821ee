//! Captures of what went over USB, as tshark reads them.

use std::process::Command;

/// Has tshark decode a capture of what went over USB, of which the end may be missing, and checks it: no transfer is malformed,
/// what was completed was submitted, and a disk said who it is.
pub fn check(mut bytes: &[u8]) {
    let (mut whole, mut at) = (0, 24);
    while let Some(len) = bytes.get(at + 8..at + 12) {
        whole = at;
        at += 16 + u32::from_le_bytes(len.try_into().unwrap()) as usize;
    }
    bytes = bytes.get(..at).unwrap_or(&bytes[..whole]);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let fields = ["usb.urb_type", "usb.transfer_type", "usb.urb_id", "_ws.malformed"];
    let mut tshark = Command::new("tshark");
    tshark.arg("-r").arg(file.path()).args(["-T", "fields", "-E", "separator=|"]);
    for field in fields {
        tshark.args(["-e", field]);
    }
    let output = tshark.output().expect("tshark runs: apt-get install tshark");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split('|').collect()).collect();
    let count =
        |column: usize, wanted: &str| lines.iter().filter(|line| line[column].contains(wanted)).count();
    // QEMU's disk has an answer that tshark takes for cut short; what is below it is whole.
    let whole = |line: &Vec<&str>| line[3].is_empty() || line[3].contains("Malformed Packet: SCSI");
    assert!(lines.len() > 20 && lines.iter().all(whole), "{text}");
    let (submitted, completed) = (count(0, "S"), count(0, "C"));
    assert!(completed > 10 && completed <= submitted, "{submitted} submitted, {completed} completed: {text}");
    // Control and bulk.
    assert!(count(1, "0x02") >= 2 && count(1, "0x03") > 8, "{text}");
    // In the bytes: of a device that was configured before, tshark does not know that it speaks SCSI.
    let product = b"QEMU HARDDISK";
    assert!(bytes.windows(product.len()).any(|part| part == product), "no disk said who it is: {text}");
}
