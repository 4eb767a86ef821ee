//! Hosts around a host: tracing, grants.
