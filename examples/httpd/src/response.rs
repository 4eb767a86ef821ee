//! Status line, header fields and error pages.

use crate::date;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

/// The reason phrase of a status code.
pub(crate) fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        206 => "Partial Content",
        301 => "Moved Permanently",
        304 => "Not Modified",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        416 => "Range Not Satisfiable",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Unknown",
    }
}

/// A header under construction.
pub(crate) struct Head(String);

impl Head {
    /// Status line, Server and Date (left out if the platform does not know the time).
    pub(crate) fn new(status: u16, now_ns: u64) -> Self {
        let mut text = String::with_capacity(320);
        // Writing to a String cannot fail.
        let _ = write!(text, "HTTP/1.1 {status} {}\r\nServer: anykernel\r\n", reason(status));
        let mut head = Self(text);
        if now_ns != 0 {
            head.field("Date", &date::format_http((now_ns / 1_000_000_000) as i64));
        }
        head
    }

    /// Adds a field. `value` has no line breaks: callers build it from numbers, dates and escaped paths only.
    pub(crate) fn field(&mut self, name: &str, value: &str) {
        debug_assert!(!value.contains(['\r', '\n']));
        let _ = write!(self.0, "{name}: {value}\r\n");
    }

    /// Adds Connection where it differs from the version's default, and the empty line.
    pub(crate) fn finish(mut self, keep_alive: bool, http11: bool) -> Vec<u8> {
        match (keep_alive, http11) {
            (false, _) => self.field("Connection", "close"),
            (true, false) => self.field("Connection", "keep-alive"),
            (true, true) => {}
        }
        self.0.push_str("\r\n");
        self.0.into_bytes()
    }
}

/// A small page for a status.
pub(crate) fn error_page(status: u16) -> String {
    let reason = reason(status);
    format!(
        "<!DOCTYPE html><html><head><title>{status} {reason}</title></head>\
         <body><h1>{status} {reason}</h1></body></html>\n"
    )
}
