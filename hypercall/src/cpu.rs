//! CPU identity.

/// Index of a CPU of this domain: 0 .. [`Cpus::cpu_count`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CpuId(pub u32);

/// Which CPUs there are.
pub trait Cpus {
    /// How many CPUs this domain runs on; at least 1, at most 4096, constant. Context: any.
    /// Counterpart: `rumpuser_getparam(RUMPUSER_PARAM_NCPU)`.
    fn cpu_count(&self) -> u32;

    /// The CPU that runs the caller. A hint unless the thread is bound to a CPU or interrupts are off; always below
    /// [`Cpus::cpu_count`]. Context: any. Counterpart: `rumpuser_curlwp` and its virtual CPU.
    fn current_cpu(&self) -> CpuId;
}
