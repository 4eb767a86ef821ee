//! Direct memory access and interrupts, broken.

use super::*;

// SAFETY: not kept, as with `Memory` above; memory stays valid in every case.
unsafe impl Dma for Wrong {
    fn dma_alloc(&self, len: usize, align: usize) -> Result<DmaBlock> {
        match self.fault {
            // As an allocator that only knows cache lines.
            Fault::DmaMisaligned if align > 64 && len < 1 << 20 => {
                let block = self.host.dma_alloc(len + align, align)?;
                // SAFETY: inside of what was allocated.
                Ok(DmaBlock { cpu: unsafe { block.cpu.add(64) }, device: DmaAddr(block.device.0 + 64), len })
            }
            Fault::DmaNotZeroed => {
                let block = self.host.dma_alloc(len, align)?;
                if self.once_in(3) {
                    // SAFETY: the block's own last byte.
                    unsafe { block.cpu.add(len - 1).write(1) };
                }
                Ok(block)
            }
            Fault::DmaShared if len > 1000 && len < 2000 => {
                let mut pages = self.memo.pages.lock().unwrap();
                if pages.is_empty() {
                    let block = self.host.dma_alloc(8192, 4096)?;
                    pages.push((block.cpu.as_ptr() as usize, block.device.0 as usize));
                }
                let (cpu, device) = pages[0];
                Ok(DmaBlock {
                    cpu: NonNull::new(cpu as *mut u8).unwrap(),
                    device: DmaAddr(device as u64),
                    len,
                })
            }
            _ => self.host.dma_alloc(len, align),
        }
    }
    unsafe fn dma_free(&self, block: DmaBlock) {
        if !matches!(self.fault, Fault::DmaMisaligned | Fault::DmaShared) {
            // SAFETY: the caller's promise.
            unsafe { self.host.dma_free(block) }
        }
    }
    unsafe fn dma_map(&self, buf: NonNull<[u8]>, direction: DmaDirection) -> Result<DmaAddr> {
        if self.is(Fault::DmaMapOverlaps) {
            return Ok(DmaAddr(0x1000 + self.memo.calls.fetch_add(1, SeqCst) * 64));
        }
        if self.is(Fault::DmaMapClobbers) {
            // SAFETY: the caller's buffer.
            unsafe { buf.cast::<u8>().write(0xee) };
        }
        // SAFETY: the caller's promise.
        unsafe { self.host.dma_map(buf, direction) }
    }
    unsafe fn dma_unmap(&self, device: DmaAddr, buf: NonNull<[u8]>, direction: DmaDirection) {
        if !self.is(Fault::DmaMapOverlaps) {
            // SAFETY: the caller's promise.
            unsafe { self.host.dma_unmap(device, buf, direction) }
        }
    }
}

impl Irq for Wrong {
    fn irq_attach(&self, source: IrqSource, cpu: CpuId, signal: Arc<Signal>) -> Result<IrqId> {
        let inner = match self.fault {
            Fault::IrqNever => Arc::new(Signal::new()),
            _ => signal.clone(),
        };
        let irq = self.host.irq_attach(source, cpu, inner)?;
        if matches!(self.fault, Fault::IrqTwice | Fault::IrqAfterDetach) {
            self.memo.irqs.lock().unwrap().push(signal);
        }
        Ok(irq)
    }
    fn irq_unmask(&self, irq: IrqId) {
        if !self.is(Fault::IrqStaysMasked) {
            self.host.irq_unmask(irq);
        }
    }
    fn irq_detach(&self, irq: IrqId) {
        self.host.irq_detach(irq);
        if self.is(Fault::IrqTwice) {
            self.memo.irqs.lock().unwrap().clear();
        }
    }
}
