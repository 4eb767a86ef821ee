//! The core contract, broken.

use super::*;

impl Versions for Wrong {
    fn contracts(&self) -> &'static [ContractVersion] {
        if self.is(Fault::NoVersion) { &[] } else { self.host.contracts() }
    }
}

impl Clock for Wrong {
    fn monotonic_ns(&self) -> u64 {
        let now = self.host.monotonic_ns();
        match self.fault {
            Fault::TimeGoesBack if self.once_in(1000) => now.saturating_sub(1_000_000),
            // CPU 0, on which the test's own thread counts too, is behind.
            Fault::TimeSkewsBetweenCpus => now + 2_000_000 * u64::from(self.host.current_cpu().0),
            Fault::ClockTicksAt100Hz => now / 10_000_000 * 10_000_000,
            _ => now,
        }
    }
    fn realtime_ns(&self) -> u64 {
        if self.is(Fault::WallTimeStandsStill) { 1_700_000_000_000_000_000 } else { self.host.realtime_ns() }
    }
}

// SAFETY: not kept: the wrong hosts hand out pages that break the contract, to a suite that expects as much. Memory
// stays valid in every case.
unsafe impl Memory for Wrong {
    fn alloc_pages(&self, count: usize) -> Result<Pages> {
        match self.fault {
            Fault::ZeroPagesGranted if count == 0 => {
                self.host.alloc_pages(1).map(|pages| Pages { count: 0, ..pages })
            }
            Fault::PagesMisaligned if (1..1 << 20).contains(&count) => {
                let pages = self.host.alloc_pages(count + 1)?;
                // SAFETY: inside of what was allocated.
                Ok(Pages { base: unsafe { pages.base.add(64) }, count })
            }
            Fault::PagesNotZeroed | Fault::PagesShared if (1..1 << 20).contains(&count) => {
                let mut kept = self.memo.pages.lock().unwrap();
                let known = match self.fault {
                    // The next allocation of a size gets the memory of the last one, in use or not.
                    Fault::PagesShared => kept.iter().find(|one| one.0 == count).map(|one| one.1),
                    _ => kept.iter().position(|one| one.0 == count).map(|index| kept.swap_remove(index).1),
                };
                if let Some(base) = known.and_then(|base| NonNull::new(base as *mut u8)) {
                    if self.is(Fault::PagesShared) {
                        // SAFETY: memory that is never freed.
                        unsafe { base.write_bytes(0, count * PAGE_SIZE) };
                    }
                    return Ok(Pages { base, count });
                }
                let pages = self.host.alloc_pages(count)?;
                if self.is(Fault::PagesShared) {
                    kept.push((count, pages.base.as_ptr() as usize));
                }
                Ok(pages)
            }
            _ => self.host.alloc_pages(count),
        }
    }
    unsafe fn free_pages(&self, pages: Pages) {
        match self.fault {
            Fault::PagesNotZeroed => {
                self.memo.pages.lock().unwrap().push((pages.count, pages.base.as_ptr() as usize));
            }
            // Leaked: they are shared, or not where the allocator gave them out.
            Fault::PagesShared | Fault::PagesMisaligned | Fault::ZeroPagesGranted => {}
            // SAFETY: the caller's promise.
            _ => unsafe { self.host.free_pages(pages) },
        }
    }
    fn memory_bytes(&self) -> u64 {
        self.host.memory_bytes()
    }
}

impl Threads for Wrong {
    fn spawn(&self, spec: ThreadSpec<'_>, entry: Box<dyn FnOnce() + Send + 'static>) -> Result<ThreadId> {
        let spec = match self.fault {
            Fault::UnknownCpuAccepted if spec.cpu.is_some_and(|cpu| cpu.0 >= self.cpu_count()) => {
                ThreadSpec { cpu: None, ..spec }
            }
            Fault::CpuBindingIgnored if spec.cpu == Some(CpuId(1)) => {
                ThreadSpec { cpu: Some(CpuId(0)), ..spec }
            }
            _ => spec,
        };
        let thread = self.host.spawn(spec, entry)?;
        self.memo.threads.lock().unwrap().push(thread);
        Ok(thread)
    }
    fn join(&self, thread: ThreadId) -> Result<()> {
        match self.fault {
            Fault::JoinReturnsEarly if !TestHost::is_current(thread) => {
                let mut started = self.memo.threads.lock().unwrap();
                let index = started.iter().position(|one| *one == thread).ok_or(Error::NotFound)?;
                started.swap_remove(index);
                let host = self.host;
                std::thread::spawn(move || host.join(thread));
                Ok(())
            }
            Fault::JoinTwice => match self.host.join(thread) {
                Err(Error::NotFound) if self.memo.word.swap(thread.0 as u32, SeqCst) == thread.0 as u32 => {
                    Ok(())
                }
                Ok(()) => {
                    self.memo.word.store(thread.0 as u32, SeqCst);
                    Ok(())
                }
                other => other,
            },
            _ => self.host.join(thread),
        }
    }
    fn park(&self, word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> ParkResult {
        match self.fault {
            // Looks, and sleeps in a second step: what happens in between is lost.
            Fault::CompareThenSleep => {
                if word.load(SeqCst) != expected {
                    return ParkResult::Changed;
                }
                std::thread::sleep(Duration::from_micros(50));
                self.host.park(word, word.load(SeqCst), deadline_ns)
            }
            Fault::ExpectedIgnored => self.host.park(word, word.load(SeqCst), deadline_ns),
            Fault::DeadlineIgnored => self.host.park(word, expected, None),
            Fault::DeadlineEarly => {
                self.host.park(word, expected, deadline_ns.map(|deadline| deadline.saturating_sub(500_000)))
            }
            Fault::ParkSpins => {
                if word.load(SeqCst) != expected {
                    return ParkResult::Changed;
                }
                let late = deadline_ns.is_some_and(|deadline| self.monotonic_ns() >= deadline);
                if late { ParkResult::TimedOut } else { ParkResult::Woken }
            }
            _ => self.host.park(word, expected, deadline_ns),
        }
    }
    fn unpark(&self, word: &AtomicU32, count: u32) -> u32 {
        match self.fault {
            // Twice, and only where somebody sleeps: more than a slow machine is forgiven, and nothing is left for other checks.
            Fault::UnparkLost
                if self.host.sleepers(word) > 0
                    && self.once_in(100)
                    && self.memo.word.fetch_add(1, SeqCst) < 2 =>
            {
                0
            }
            Fault::UnparkWakesAll if count > 0 => self.host.unpark(word, u32::MAX).min(count),
            Fault::UnparkWakesOne => self.host.unpark(word, count.min(1)),
            Fault::UnparkCountsNone => {
                self.host.unpark(word, count);
                0
            }
            Fault::UnparkWakesStrangers => {
                self.host.wake_everybody();
                self.host.unpark(word, count)
            }
            _ => self.host.unpark(word, count),
        }
    }
    fn yield_now(&self) {
        self.host.yield_now();
    }
}

impl Cpus for Wrong {
    fn cpu_count(&self) -> u32 {
        self.host.cpu_count()
    }
    fn current_cpu(&self) -> CpuId {
        match self.fault {
            // Numbers from 1.
            Fault::CpuOutOfRange => CpuId(self.host.current_cpu().0 + 2),
            _ => self.host.current_cpu(),
        }
    }
}

impl Entropy for Wrong {
    fn fill_random(&self, buf: &mut [u8]) -> Result<()> {
        match self.fault {
            Fault::RandomConstant => {
                buf.iter_mut().enumerate().for_each(|(index, byte)| *byte = index as u8 | 1)
            }
            Fault::RandomShort => {
                let whole = buf.len() / 8 * 8;
                return self.host.fill_random(&mut buf[..whole]);
            }
            _ => return self.host.fill_random(buf),
        }
        Ok(())
    }
}

impl Params for Wrong {
    fn param(&self, key: &str, buf: &mut [u8]) -> Result<usize> {
        match self.fault {
            Fault::UnknownParamEmpty => match self.host.param(key, buf) {
                Err(Error::NotFound) => Ok(0),
                other => other,
            },
            // Only in buffers that are nearly large enough, so that larger ones still see the whole.
            Fault::ParamTruncates | Fault::ParamWritesBeforeRefusing => match self.host.param(key, buf) {
                Err(Error::BufferTooSmall) => {
                    let mut whole = [0; 256];
                    let len = self.host.param(key, &mut whole)?;
                    buf.copy_from_slice(&whole[..buf.len()]);
                    if self.is(Fault::ParamTruncates) && buf.len() + 1 == len {
                        Ok(buf.len())
                    } else {
                        Err(Error::BufferTooSmall)
                    }
                }
                other => other,
            },
            _ => self.host.param(key, buf),
        }
    }
}

impl Console for Wrong {
    fn console_write(&self, bytes: &[u8]) {
        match self.fault {
            Fault::ConsoleTears => bytes.chunks(7).for_each(|part| {
                self.host.console_write(part);
                std::thread::sleep(Duration::from_micros(100));
            }),
            Fault::ConsoleCuts => self.host.console_write(&bytes[..bytes.len().min(256)]),
            _ => self.host.console_write(bytes),
        }
    }
}

impl Exit for Wrong {
    fn exit(&self, status: ExitStatus) -> ! {
        self.host.exit(status)
    }
}
