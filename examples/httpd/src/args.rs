//! The options of the server: `httpd [--root DIR] [--port N] ...`.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::str::FromStr;

/// One line per option, for `--help` texts.
pub const HELP: &str = "\
--root DIR               directory to serve (default /)
--port N                 TCP port, 1 to 65535 (default 80)
--idle-seconds N         close a connection without a request after this long (default 30)
--header-seconds N       a request's header must be complete within this time (default 10)
--send-seconds N         a client must take some data within this time (default 30)
--max-header-bytes N     largest request header, 512 to 65536 (default 16384)
--workers N              threads (default: one per CPU, at least 2)
--no-listing             refuse to list directories without index.html
";

/// How to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Served directory.
    pub root: String,
    /// TCP port.
    pub port: u16,
    /// How long a connection may wait for its next request, in nanoseconds.
    pub idle_ns: u64,
    /// How long a request header may take from its first byte, in nanoseconds.
    pub header_ns: u64,
    /// How long a client may take no data at all, in nanoseconds.
    pub send_ns: u64,
    /// Largest request header in bytes.
    pub max_header_bytes: usize,
    /// Threads; `None`: one per CPU, at least two.
    pub workers: Option<u32>,
    /// List directories.
    pub listing: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            root: "/".into(),
            port: 80,
            idle_ns: 30_000_000_000,
            header_ns: 10_000_000_000,
            send_ns: 30_000_000_000,
            max_header_bytes: 16 << 10,
            workers: None,
            listing: true,
        }
    }
}

impl Options {
    /// Reads arguments as they come after the program's name. The error is one line for a person.
    pub fn parse(args: &[String]) -> Result<Self, String> {
        let mut options = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let (name, inline) = match arg.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (arg.as_str(), None),
            };
            let mut value = || {
                inline.clone().or_else(|| args.next().cloned()).ok_or_else(|| format!("{name} needs a value"))
            };
            match name {
                "--root" => {
                    options.root = value()?;
                    if !options.root.starts_with('/') {
                        return Err(format!("--root {}: give an absolute path, as in /srv", options.root));
                    }
                }
                "--port" => options.port = number(name, &value()?, 1..=65535)?,
                "--idle-seconds" => options.idle_ns = seconds(name, &value()?)?,
                "--header-seconds" => options.header_ns = seconds(name, &value()?)?,
                "--send-seconds" => options.send_ns = seconds(name, &value()?)?,
                "--max-header-bytes" => options.max_header_bytes = number(name, &value()?, 512..=65536)?,
                "--workers" => options.workers = Some(number(name, &value()?, 1..=256)?),
                "--no-listing" => options.listing = false,
                _ => return Err(format!("unknown option {name}; known are {}", names().join(", "))),
            }
        }
        Ok(options)
    }
}

fn names() -> Vec<&'static str> {
    HELP.lines().filter_map(|line| line.split(' ').next()).collect()
}

fn number<T: FromStr + PartialOrd + core::fmt::Display>(
    name: &str,
    text: &str,
    range: core::ops::RangeInclusive<T>,
) -> Result<T, String> {
    text.parse()
        .ok()
        .filter(|value| range.contains(value))
        .ok_or_else(|| format!("{name} {text}: give a number from {} to {}", range.start(), range.end()))
}

fn seconds(name: &str, text: &str) -> Result<u64, String> {
    Ok(number::<u64>(name, text, 1..=86_400)? * 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, String> {
        Options::parse(&args.iter().map(|arg| arg.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn reads_both_forms() {
        let options = parse(&["--port=8080", "--root", "/srv", "--no-listing"]).expect("valid");
        assert_eq!((options.port, options.root.as_str(), options.listing), (8080, "/srv", false));
    }

    #[test]
    fn says_what_is_wrong() {
        assert!(parse(&["--port", "0"]).unwrap_err().contains("1 to 65535"));
        assert!(parse(&["--port"]).unwrap_err().contains("needs a value"));
        let unknown = parse(&["--prot", "1"]).unwrap_err();
        assert!(unknown.contains("unknown option --prot; known are --root, --port"), "{unknown}");
        assert!(!unknown.contains('\n'), "{unknown}");
        assert!(parse(&["--root", "srv"]).unwrap_err().contains("absolute"));
    }
}
