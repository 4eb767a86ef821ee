//! Time.

/// Monotonic and wall-clock time, both in nanoseconds.
pub trait Clock {
    /// Nanoseconds since some fixed moment of this domain's life; below 2^63, which is 292 years.
    ///
    /// Never goes back, on any CPU, seen in any order that happens-before allows. Resolution at worst 1 us where
    /// the platform can. Context: any, interrupt included. Never blocks, cannot fail.
    ///
    /// Counterparts: `rumpuser_clock_gettime(RUMPUSER_CLOCK_ABSMONO)`; LKL `time()`.
    fn monotonic_ns(&self) -> u64;

    /// Nanoseconds since 1970-01-01 00:00 UTC; below 2^63. May jump when the host's clock is set.
    ///
    /// Context: any. Never blocks. A host that does not know the time returns 0.
    ///
    /// Counterpart: `rumpuser_clock_gettime(RUMPUSER_CLOCK_RELWALL)`.
    fn realtime_ns(&self) -> u64;
}
