//! [`crate::Dma`], as far as it shows without a device.
#![expect(unsafe_code, reason = "allocates and maps memory")]

use super::support::{Stop, ensure};
use crate::{Dma, DmaAddr, DmaBlock, DmaDirection, Error, Host};
use alloc::vec::Vec;
use core::ptr::NonNull;

/// A block that is given back when dropped.
struct Owned<H: Host + Dma>(H, Option<DmaBlock>);

impl<H: Host + Dma> Owned<H> {
    fn new(host: H, len: usize, align: usize) -> Result<Self, Stop> {
        match host.dma_alloc(len, align) {
            Ok(block) => {
                let same = block.len == len;
                let owned = Self(host, Some(block));
                ensure!(same, "dma_alloc({len}, {align}) returned a block of another length");
                Ok(owned)
            }
            Err(error) => Err(Stop::Fail(alloc::format!("dma_alloc({len}, {align}) failed: {error}"))),
        }
    }

    fn block(&self) -> Result<&DmaBlock, Stop> {
        self.1.as_ref().ok_or_else(|| Stop::Fail("no block".into()))
    }

    /// Where the driver and the device see it, and its length.
    fn place(&self) -> Result<(u64, u64, u64), Stop> {
        let block = self.block()?;
        Ok((block.cpu.as_ptr().addr() as u64, block.device.0, block.len as u64))
    }

    /// Reads byte by byte: the alignment is not to be trusted here.
    fn first_other_than(&self, value: u8) -> Result<Option<usize>, Stop> {
        let block = self.block()?;
        // SAFETY: by the contract the block is valid for reads of its length until it is freed.
        Ok((0..block.len).find(|index| unsafe { block.cpu.add(*index).read_volatile() } != value))
    }

    fn fill(&self, value: u8) -> Result<(), Stop> {
        let block = self.block()?;
        for index in 0..block.len {
            // SAFETY: by the contract the block is valid for writes of its length until it is freed.
            unsafe { block.cpu.add(index).write_volatile(value) };
        }
        Ok(())
    }
}

impl<H: Host + Dma> Drop for Owned<H> {
    fn drop(&mut self) {
        if let Some(block) = self.1.take() {
            // SAFETY: it came from this host, and no device ever knew it.
            unsafe { self.0.dma_free(block) }
        }
    }
}

pub(super) fn refuses<H: Host + Dma>(host: H) -> Result<(), Stop> {
    for (len, align) in [(0, 64), (64, 0), (64, 48), (64, 131_072)] {
        let result = host.dma_alloc(len, align).map(|block| Owned(host, Some(block)).place().is_ok());
        ensure!(
            result == Err(Error::Invalid),
            "dma_alloc({len}, {align}) returned {result:?} instead of Invalid"
        );
    }
    let result = host.dma_alloc(usize::MAX / 2, 4096).map(|block| Owned(host, Some(block)).place().is_ok());
    let refused = matches!(result, Err(Error::NoMemory | Error::Invalid));
    ensure!(refused, "dma_alloc of {} bytes returned {result:?} instead of NoMemory", usize::MAX / 2);
    Ok(())
}

pub(super) fn aligned<H: Host + Dma>(host: H) -> Result<(), Stop> {
    for align in [1, 2, 16, 64, 512, 4096, 16_384, 65_536] {
        for len in [1, 24, 4096] {
            let (cpu, device, _) = Owned::new(host, len, align)?.place()?;
            let fine = cpu.is_multiple_of(align as u64) && device.is_multiple_of(align as u64);
            ensure!(fine, "dma_alloc({len}, {align}) gave {cpu:#x}, for the device {device:#x}");
        }
    }
    Ok(())
}

pub(super) fn zeroed<H: Host + Dma>(host: H) -> Result<(), Stop> {
    for len in [64, 4096, 64, 5000, 4096, 64] {
        let block = Owned::new(host, len, 64)?;
        let dirty = block.first_other_than(0)?;
        ensure!(dirty.is_none(), "dma_alloc({len}, 64): not zeroed at byte {}", dirty.unwrap_or(0));
        block.fill(0xa5)?;
    }
    Ok(())
}

pub(super) fn exclusive<H: Host + Dma>(host: H) -> Result<(), Stop> {
    let mut blocks = Vec::new();
    for mark in 1..=12u8 {
        let block = Owned::new(host, 1000 + usize::from(mark), 16)?;
        block.fill(mark)?;
        blocks.push((mark, block));
    }
    for (mark, block) in &blocks {
        ensure!(block.first_other_than(*mark)?.is_none(), "what was written to one block shows in another");
        for (other_mark, other) in &blocks {
            let ((cpu, device, len), (other_cpu, other_device, other_len)) = (block.place()?, other.place()?);
            let apart = |a: u64, b: u64| a + len <= b || b + other_len <= a;
            let fine = mark == other_mark || apart(cpu, other_cpu) && apart(device, other_device);
            ensure!(fine, "two blocks overlap at {cpu:#x}, for the device {device:#x}");
        }
    }
    Ok(())
}

/// A mapping made and ended in one call.
fn map_and_unmap<H: Host + Dma>(host: H, buf: &mut [u8], direction: DmaDirection) -> Result<DmaAddr, Stop> {
    let whole = NonNull::from(buf);
    // SAFETY: the buffer is borrowed exclusively over both calls, and no device knows the mapping.
    unsafe {
        match host.dma_map(whole, direction) {
            Ok(at) => {
                host.dma_unmap(at, whole, direction);
                Ok(at)
            }
            Err(error) => Err(Stop::Fail(alloc::format!("dma_map of {} bytes failed: {error}", whole.len()))),
        }
    }
}

pub(super) fn map_keeps_data<H: Host + Dma>(host: H) -> Result<(), Stop> {
    let content: Vec<u8> = (0..1514u32).map(|index| index as u8).collect();
    for len in [1, 14, 512, 1514] {
        let (mut buf, before) = (content.clone(), &content);
        let Some(part) = buf.get_mut(..len) else { continue };
        map_and_unmap(host, part, DmaDirection::ToDevice)?;
        ensure!(buf == *before, "a buffer of {len} bytes changed while it was mapped for a device to read");
        let Some(part) = buf.get_mut(..len) else { continue };
        map_and_unmap(host, part, DmaDirection::FromDevice)?;
        ensure!(buf.get(len..) == before.get(len..), "a mapping of {len} bytes changed what lies behind it");
    }
    Ok(())
}

pub(super) fn maps_apart<H: Host + Dma>(host: H) -> Result<(), Stop> {
    let mut buffers: Vec<Vec<u8>> = (0..8).map(|index| alloc::vec![index; 2048]).collect();
    let mut mapped: Vec<(DmaAddr, NonNull<[u8]>)> = Vec::new();
    let mut failed = None;
    for buffer in &mut buffers {
        let whole = NonNull::from(&mut buffer[..]);
        // SAFETY: `buffers` is not touched before every mapping has ended, just below.
        match unsafe { host.dma_map(whole, DmaDirection::ToDevice) } {
            Ok(at) => mapped.push((at, whole)),
            Err(error) => failed = Some(error),
        }
    }
    for (at, whole) in &mapped {
        // SAFETY: the arguments of the `dma_map` above, once each.
        unsafe { host.dma_unmap(*at, *whole, DmaDirection::ToDevice) };
    }
    ensure!(failed.is_none(), "8 mappings of 2 KiB at once: {failed:?}");
    mapped.sort_by_key(|(at, _)| *at);
    let overlap = mapped.windows(2).any(|pair| matches!(pair, [one, two] if one.0.0 + 2048 > two.0.0));
    ensure!(!overlap, "two buffers mapped at once have one address for the device");
    Ok(())
}
