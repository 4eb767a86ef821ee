//! The recorder's files: any bytes are read to their end, or refused at a place; what was written is what is read.
//!
//! The header, a JSON document, is left to the tests of `anykernel replay`: reading one looks at the whole program.

use crate::input::Input;
use crate::watch;
use hypercall::layers::recorded::{CorruptChunk, Event, MAGIC, Record, crc32, take_chunk};

/// Appends a chunk.
fn chunk(file: &mut Vec<u8>, content: &[u8]) {
    file.extend((content.len() as u32).to_le_bytes());
    file.extend(crc32(content).to_le_bytes());
    file.extend(content);
}

/// One execution. The first byte says what the rest is: a file; records, in chunks of any size; or changes to a whole
/// recording.
pub fn run(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    let mut file = MAGIC.to_vec();
    match how & 3 {
        0 | 1 => file = rest.to_vec(),
        2 => {
            let len = 1 + usize::from(how >> 4) * 7;
            rest.chunks(len).for_each(|part| chunk(&mut file, part));
            let read = read(&file);
            assert_eq!(read.as_deref(), Ok(rest), "the records are not what was written");
        }
        _ => {
            chunk(&mut file, b"{}");
            chunk(&mut file, &example());
            change(&mut file, &mut Input::new(rest));
        }
    }
    match read(&file) {
        Ok(bytes) => records(&bytes),
        Err(CorruptChunk(at)) => assert!((MAGIC.len()..file.len()).contains(&at)),
    }
}

/// All chunks as one.
fn read(file: &[u8]) -> Result<Vec<u8>, CorruptChunk> {
    let (mut at, mut bytes) = (MAGIC.len(), Vec::new());
    while let Some((content, next)) = take_chunk(file, at)? {
        watch::step();
        assert_eq!(next, at + 8 + content.len());
        bytes.extend_from_slice(content);
        at = next;
    }
    assert!(bytes.len() <= file.len());
    Ok(bytes)
}

/// Reads records as a replay does: it comes to an end, and each means the same when written.
fn records(mut rest: &[u8]) {
    loop {
        watch::step();
        let before = rest.len();
        let Ok(record) = Record::take(&mut rest) else {
            assert_eq!(rest.len(), before, "nothing is taken of what makes no sense");
            return;
        };
        assert!(rest.len() < before && !record.event.name().is_empty());
        let mut written = Vec::new();
        record.put(&mut written);
        assert!(written.len() <= before - rest.len(), "what is written is the shortest form");
        assert_eq!(Record::take(&mut &written[..]).as_ref(), Ok(&record));
    }
}

/// Records of every kind.
fn example() -> Vec<u8> {
    let mut bytes = Vec::new();
    use Event::{Begin, End, Enter, Leave, Outside, Preempt, Raise};
    let events = [Begin, Raise, Outside, Enter, Preempt, Leave, End];
    let calls = hypercall::Call::ALL.iter().map(|call| Event::Call(*call));
    for (index, event) in calls.chain(events).enumerate() {
        let (thread, arguments) = (index as u32 % 5, vec![index as u64, u64::MAX]);
        let data = vec![index as u8; index];
        Record { event, thread, arguments, results: vec![0, 1 << (index % 64)], data }.put(&mut bytes);
    }
    bytes
}

/// Changes a file here and there, and makes the checksums right again, or not.
fn change(file: &mut Vec<u8>, input: &mut Input) {
    while !input.is_empty() {
        watch::step();
        let choice = input.u8();
        let at = input.below(file.len().max(1)).min(file.len());
        let bytes = input.bytes(1 + usize::from(choice >> 2) % 32);
        match choice & 3 {
            0 => file.truncate(at),
            1 => drop(file.splice(at..at, bytes)),
            _ => {
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
        watch::step();
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(content) = file.get(at + 8..at + 8 + len) else { return };
        let sum = crc32(content).to_le_bytes();
        file[at + 4..at + 8].copy_from_slice(&sum);
        at += 8 + len;
    }
}
