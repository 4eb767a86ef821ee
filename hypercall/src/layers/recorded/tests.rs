use super::*;
use crate::testing::TestHost;
use crate::{Call, Clock, ParkResult, ThreadSpec, Threads, conformance};
use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

fn recorder() -> (&'static Recorder, ByteRing) {
    let ring = ByteRing::new(32 << 20).unwrap();
    (Box::leak(Box::new(Recorder::new(ring))), ring)
}

fn records(ring: ByteRing) -> Vec<Record> {
    let mut bytes = Vec::new();
    ring.read(&mut bytes);
    let mut rest = &bytes[..];
    let records = core::iter::from_fn(|| Record::take(&mut rest)).collect();
    assert!(rest.is_empty(), "{} bytes are no record", rest.len());
    records
}
