//! One request's header, parsed and checked.

use alloc::string::String;
use alloc::vec::Vec;

/// Headers in one request; more are refused.
const MAX_HEADERS: usize = 64;

/// What the server does for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Head,
    /// Known to HTTP, not allowed here.
    NotAllowed,
    /// Unknown.
    NotImplemented,
}

/// What we need of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: Method,
    /// Decoded and normalised: absolute, no `.` or `..`; a trailing slash is kept.
    pub(crate) path: Vec<u8>,
    /// The raw query with its `?`, for redirects; empty without.
    pub(crate) query: String,
    /// Whether the connection stays open afterwards.
    pub(crate) keep_alive: bool,
    /// Whether the client understands chunked bodies (HTTP/1.1).
    pub(crate) http11: bool,
    /// Bytes of body that follow and are skipped.
    pub(crate) body_bytes: u64,
    pub(crate) range: Option<String>,
    pub(crate) if_range: Option<String>,
    pub(crate) if_match: Option<String>,
    pub(crate) if_none_match: Option<String>,
    pub(crate) if_modified_since: Option<String>,
    pub(crate) if_unmodified_since: Option<String>,
}

/// A request that cannot be served, by its status code. The connection closes after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadRequest(pub(crate) u16);

/// Parses the header at the start of `bytes`. `Ok(None)`: not complete yet. The number is the header's length.
pub(crate) fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, BadRequest> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let length = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(BadRequest(431)),
        Err(httparse::Error::Version) => return Err(BadRequest(505)),
        Err(_) => return Err(BadRequest(400)),
    };
    let http11 = parsed.version == Some(1);
    let method = match parsed.method.unwrap_or_default() {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        "POST" | "PUT" | "DELETE" | "CONNECT" | "OPTIONS" | "TRACE" | "PATCH" => Method::NotAllowed,
        _ => Method::NotImplemented,
    };
    let (path, query) = target(parsed.path.unwrap_or_default()).ok_or(BadRequest(400))?;
    let mut request = Request {
        method,
        path,
        query,
        keep_alive: http11,
        http11,
        body_bytes: 0,
        range: None,
        if_range: None,
        if_match: None,
        if_none_match: None,
        if_modified_since: None,
        if_unmodified_since: None,
    };
    let (mut hosts, mut lengths) = (0, 0);
    for header in parsed.headers.iter() {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        // A value that is not UTF-8 is treated as not understood, except where it must be.
        let text = core::str::from_utf8(header.value).ok().map(str::trim);
        if is("host") {
            hosts += 1;
        } else if is("connection") {
            for option in text.unwrap_or_default().split(',').map(str::trim) {
                if option.eq_ignore_ascii_case("close") {
                    request.keep_alive = false;
                } else if option.eq_ignore_ascii_case("keep-alive") && !http11 {
                    request.keep_alive = true;
                }
            }
        } else if is("content-length") {
            lengths += 1;
            let digits =
                text.filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
            request.body_bytes = digits.and_then(|text| text.parse().ok()).ok_or(BadRequest(400))?;
        } else if is("transfer-encoding") {
            // We take no bodies; skipping a chunked one is not worth the ways to smuggle requests in it.
            return Err(BadRequest(if method == Method::NotImplemented { 501 } else { 411 }));
        } else {
            let slot = if is("range") {
                &mut request.range
            } else if is("if-range") {
                &mut request.if_range
            } else if is("if-match") {
                &mut request.if_match
            } else if is("if-none-match") {
                &mut request.if_none_match
            } else if is("if-modified-since") {
                &mut request.if_modified_since
            } else if is("if-unmodified-since") {
                &mut request.if_unmodified_since
            } else {
                continue;
            };
            *slot = text.map(String::from);
        }
    }
    // RFC 9112, 3.2: exactly one Host in HTTP/1.1.
    if hosts > 1 || (http11 && hosts == 0) || lengths > 1 {
        return Err(BadRequest(400));
    }
    Ok(Some((request, length)))
}

/// Splits a request target into normalised path and query.
fn target(raw: &str) -> Option<(Vec<u8>, String)> {
    // absolute-form, as a proxy would send it
    let raw = match raw.strip_prefix("http://").or_else(|| raw.strip_prefix("https://")) {
        Some(rest) => rest.find('/').and_then(|slash| rest.get(slash..)).unwrap_or("/"),
        None => raw,
    };
    if !raw.starts_with('/') {
        // `OPTIONS *` and `CONNECT host` are answered by method.
        return Some((b"/".to_vec(), String::new()));
    }
    let (path, query) = match raw.find('?') {
        Some(mark) => raw.split_at(mark),
        None => (raw, ""),
    };
    normalise(&percent_decode(path.as_bytes())?).map(|path| (path, query.into()))
}

/// Undoes percent-encoding; `None` if it is malformed or hides a NUL.
fn percent_decode(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut bytes = bytes.iter().copied();
    while let Some(byte) = bytes.next() {
        let byte = if byte == b'%' {
            let mut digit = || char::from(bytes.next()?).to_digit(16);
            (digit()? << 4 | digit()?) as u8
        } else {
            byte
        };
        if byte == 0 {
            return None;
        }
        out.push(byte);
    }
    Some(out)
}

/// Removes empty, `.` and `..` components (RFC 3986, 5.2.4); `None` if it climbs out of the root.
fn normalise(path: &[u8]) -> Option<Vec<u8>> {
    let mut parts: Vec<&[u8]> = Vec::new();
    let mut directory = false;
    for part in path.split(|byte| *byte == b'/') {
        directory = matches!(part, b"" | b"." | b"..");
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    let mut out = Vec::with_capacity(path.len());
    for part in parts {
        out.push(b'/');
        out.extend_from_slice(part);
    }
    if directory {
        out.push(b'/');
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use proptest::prelude::*;

    fn path(raw: &str) -> Result<Vec<u8>, BadRequest> {
        parse(format!("GET {raw} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
            .map(|parsed| parsed.expect("whole").0.path)
    }

    #[test]
    fn normalises_targets() {
        assert_eq!(path("/").as_deref(), Ok(&b"/"[..]));
        assert_eq!(path("/a//b/./c/../d%20e?x=1").as_deref(), Ok(&b"/a/b/d e"[..]));
        assert_eq!(path("/a/").as_deref(), Ok(&b"/a/"[..]));
        assert_eq!(path("http://host/x").as_deref(), Ok(&b"/x"[..]));
        for bad in ["/..", "/a/../../b", "/%2e%2e/x", "/%", "/%0", "/%zz", "/%00"] {
            assert_eq!(path(bad), Err(BadRequest(400)), "{bad}");
        }
    }

    #[test]
    fn refuses_what_could_smuggle() {
        for (text, status) in [
            ("GET / HTTP/1.1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
            ("GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
            ("\x01\x02\x03\r\n\r\n", 400),
        ] {
            assert_eq!(parse(text.as_bytes()), Err(BadRequest(status)), "{text:?}");
        }
    }

    #[test]
    fn keep_alive_follows_version_and_header() {
        let keep = |text: &str| parse(text.as_bytes()).expect("valid").expect("whole").0.keep_alive;
        assert!(keep("GET / HTTP/1.1\r\nHost: a\r\n\r\n"));
        assert!(!keep("GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n"));
        assert!(!keep("GET / HTTP/1.0\r\n\r\n"));
        assert!(keep("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"));
    }

    proptest! {
        #[test]
        fn never_panics_and_stays_in_the_root(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn paths_never_climb(raw in "/[a./%2eE]{0,30}") {
            if let Ok(path) = path(&raw) {
                prop_assert!(path.starts_with(b"/"));
                prop_assert!(!path.split(|b| *b == b'/').any(|part| part == b".."));
            }
        }
    }
}
