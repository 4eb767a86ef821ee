//! The recorder's files: any bytes are read, or refused with one line; what was read is what is in the file.

use crate::input::Input;
use crate::watch;
use anykernel::config::Config;
use anykernel_userspace::record::{MAGIC, crc32};
use anykernel_userspace::replay::{RecordingError, RecordingFile, header};
use hypercall::layers::recorded::{Event, Record};

/// Appends a chunk.
fn chunk(file: &mut Vec<u8>, content: &[u8]) {
    file.extend((content.len() as u32).to_le_bytes());
    file.extend(crc32(content).to_le_bytes());
    file.extend(content);
}

/// One execution. The first byte says what the rest is: a file; a header, with its checksum made right; records below a good
/// header, in chunks of any size; or changes to a whole recording.
pub fn run(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    let target = ["userspace", "rumprun", "linux-module"][usize::from(how >> 2) % 3];
    let config = Config { app: vec!["httpd".into()], ..Config::default() };
    let good = header(target, &config).to_string();
    let mut file = MAGIC.to_vec();
    let mut expected = None;
    match how & 3 {
        0 => file = rest.to_vec(),
        1 => chunk(&mut file, rest),
        2 => {
            chunk(&mut file, good.as_bytes());
            let len = 1 + usize::from(how >> 4) * 7;
            rest.chunks(len).for_each(|part| chunk(&mut file, part));
            expected = Some(rest.to_vec());
        }
        _ => {
            chunk(&mut file, good.as_bytes());
            chunk(&mut file, &example());
            change(&mut file, &mut Input::new(rest));
        }
    }
    match RecordingFile::parse(&file) {
        Ok(read) => {
            assert!(read.records.len() <= file.len());
            if let Some(expected) = expected {
                assert!(read.records == expected && !read.cut, "the records are not what was written");
                assert!(read.header.target == target && read.header.config == config);
            }
            records(&read.records);
        }
        Err(error) => {
            let line = error.to_string();
            assert!(
                !line.is_empty() && line.len() < 8192 && !line.contains('\n'),
                "{line:?} is not one line"
            );
            let whole = matches!(how & 3, 2) && Record::take(&mut &rest[..]).is_some();
            assert!(!whole, "what was written is refused: {line}");
            assert!(!matches!(error, RecordingError::Io(_)), "nothing was opened");
        }
    }
}

/// Reads records as a replay does: it comes to an end, and each means the same when written.
fn records(mut rest: &[u8]) {
    loop {
        watch::step();
        let before = rest.len();
        let Some(record) = Record::take(&mut rest) else {
            assert_eq!(rest.len(), before, "nothing is taken of what makes no sense");
            return;
        };
        assert!(rest.len() < before && !record.event.name().is_empty());
        let mut written = Vec::new();
        record.put(&mut written);
        assert_eq!(Record::take(&mut &written[..]).as_ref(), Some(&record));
        assert!(written.len() <= before - rest.len(), "the shortest form");
    }
}

/// Records of every kind.
fn example() -> Vec<u8> {
    let mut bytes = Vec::new();
    let events = [Event::Begin, Event::Raise, Event::Outside, Event::Enter, Event::Leave, Event::End];
    let calls = hypercall::Call::ALL.iter().map(|call| Event::Call(*call));
    for (index, event) in calls.chain(events).enumerate() {
        let (thread, arguments) = (index as u32 % 5, vec![index as u64, u64::MAX]);
        let data = vec![index as u8; index];
        Record { event, thread, arguments, results: vec![0, 1 << index], data }.put(&mut bytes);
    }
    bytes
}

/// Changes a file here and there. Half of them change what is in a chunk, and make its checksum right again.
fn change(file: &mut Vec<u8>, input: &mut Input) {
    while !input.is_empty() {
        let choice = input.u8();
        let at = input.below(file.len().max(1));
        match choice & 3 {
            0 => file.truncate(at),
            1 => drop(file.splice(at..at, input.bytes(usize::from(choice >> 2)))),
            _ => {
                let bytes = input.bytes(1 + usize::from(choice >> 2) % 16);
                let end = file.len().min(at + bytes.len());
                file[at..end].copy_from_slice(&bytes[..end - at]);
            }
        }
        if choice & 0x80 != 0 {
            mend(file);
        }
    }
}

/// Makes the checksum of every chunk right.
fn mend(file: &mut [u8]) {
    let mut at = MAGIC.len();
    while let Some(head) = file.get(at..at + 8) {
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(content) = file.get(at + 8..at + 8 + len) else { return };
        let sum = crc32(content).to_le_bytes();
        file[at + 4..at + 8].copy_from_slice(&sum);
        at += 8 + len;
    }
}
