//! From a request to what is sent: which file, which status, which parts.

use crate::args::Options;
use crate::range::{self, ByteRange, Ranges};
use crate::request::{Method, Request};
use crate::response::{Head, error_page};
use crate::{date, listing, mime};
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use anykernel::fs::{FileKind, FsError, Inode, Metadata, Namespace};

/// What follows the header.
pub(crate) enum Body {
    /// Nothing.
    Empty,
    /// This.
    Bytes(Vec<u8>),
    /// Parts of a file, each after its prelude (empty but for multipart), then `trailer`.
    File { inode: Arc<dyn Inode>, parts: Vec<(Vec<u8>, ByteRange)>, trailer: Vec<u8> },
}

/// A whole answer.
pub(crate) struct Reply {
    pub(crate) head: Vec<u8>,
    pub(crate) body: Body,
}

/// An answer that is only a status, with a page for people.
pub(crate) fn status_reply(
    status: u16,
    now_ns: u64,
    keep_alive: bool,
    http11: bool,
    send_body: bool,
) -> Reply {
    let page = error_page(status);
    let mut head = Head::new(status, now_ns);
    if status == 405 {
        head.field("Allow", "GET, HEAD");
    }
    head.field("Content-Type", "text/html; charset=utf-8");
    head.field("Content-Length", &format!("{}", page.len()));
    let body = if send_body { Body::Bytes(page.into_bytes()) } else { Body::Empty };
    Reply { head: head.finish(keep_alive, http11), body }
}

/// Answers a well-formed request.
pub(crate) fn reply(files: &dyn Namespace, options: &Options, request: &Request, now_ns: u64) -> Reply {
    let send_body = request.method != Method::Head;
    let status = |code| status_reply(code, now_ns, request.keep_alive, request.http11, send_body);
    match request.method {
        Method::NotAllowed => return status(405),
        Method::NotImplemented => return status(501),
        Method::Get | Method::Head => {}
    }
    match find(files, options, request) {
        Ok(Found::File(inode, metadata)) => file(inode, &metadata, request, now_ns),
        Ok(Found::Page(page)) => {
            let mut head = Head::new(200, now_ns);
            head.field("Content-Type", "text/html; charset=utf-8");
            head.field("Content-Length", &format!("{}", page.len()));
            let body = if send_body { Body::Bytes(page.into_bytes()) } else { Body::Empty };
            Reply { head: head.finish(request.keep_alive, request.http11), body }
        }
        Ok(Found::Redirect(location)) => {
            let mut head = Head::new(301, now_ns);
            head.field("Location", &location);
            head.field("Content-Length", "0");
            Reply { head: head.finish(request.keep_alive, request.http11), body: Body::Empty }
        }
        Ok(Found::Forbidden) => status(403),
        Err(error) => {
            let code = match error {
                FsError::NotFound | FsError::NotDirectory | FsError::BadName | FsError::Loop => 404,
                FsError::NoMemory => 503,
                FsError::Unsupported => 403,
                _ => {
                    log::warn!("httpd: {}: {error}", String::from_utf8_lossy(&request.path).escape_debug());
                    500
                }
            };
            status(code)
        }
    }
}

enum Found {
    File(Arc<dyn Inode>, Metadata),
    Page(String),
    Redirect(String),
    Forbidden,
}

fn find(files: &dyn Namespace, options: &Options, request: &Request) -> Result<Found, FsError> {
    let mut path = Vec::from(options.root.trim_end_matches('/').as_bytes());
    path.extend_from_slice(&request.path);
    let wants_directory = path.ends_with(b"/");
    let inode = files.resolve(&path, true)?;
    let metadata = inode.metadata()?;
    match metadata.kind {
        FileKind::File if wants_directory => Err(FsError::NotDirectory),
        FileKind::File => Ok(Found::File(inode, metadata)),
        FileKind::Directory if !wants_directory => {
            let encoded: Vec<String> =
                request.path.split(|byte| *byte == b'/').map(listing::percent_encode).collect();
            Ok(Found::Redirect(format!("{}/{}", encoded.join("/"), escape_query(&request.query))))
        }
        FileKind::Directory => {
            path.extend_from_slice(b"index.html");
            match files.resolve(&path, true) {
                Ok(index) => {
                    let metadata = index.metadata()?;
                    if metadata.kind == FileKind::File {
                        return Ok(Found::File(index, metadata));
                    }
                }
                Err(FsError::NotFound) => {}
                Err(error) => return Err(error),
            }
            if options.listing {
                listing::page(&*inode, &request.path).map(Found::Page)
            } else {
                Ok(Found::Forbidden)
            }
        }
        _ => Ok(Found::Forbidden),
    }
}

/// A query goes back in a redirect with nothing but visible ASCII in it.
fn escape_query(query: &str) -> String {
    query.chars().filter(|character| character.is_ascii_graphic()).collect()
}

/// Strong as long as the file system's clock is finer than two changes of one length.
fn entity_tag(metadata: &Metadata) -> String {
    format!(
        "\"{:x}-{:x}-{:x}{:08x}\"",
        metadata.inode, metadata.size, metadata.modified.seconds, metadata.modified.nanos
    )
}

/// RFC 9110, 13.2.2: the order of preconditions. `Some` is the status that ends the request.
fn precondition(request: &Request, tag: &str, modified: i64) -> Option<u16> {
    let date = |text: &Option<String>| text.as_deref().and_then(date::parse_http);
    if let Some(tags) = &request.if_match {
        if !tag_listed(tags, tag, true) {
            return Some(412);
        }
    } else if date(&request.if_unmodified_since).is_some_and(|since| modified > since) {
        return Some(412);
    }
    if let Some(tags) = &request.if_none_match {
        if tag_listed(tags, tag, false) {
            return Some(304);
        }
    } else if date(&request.if_modified_since).is_some_and(|since| modified <= since) {
        return Some(304);
    }
    None
}

/// Whether `tag` is in the list of a conditional header. Weak tags never match where `strong` is asked.
fn tag_listed(list: &str, tag: &str, strong: bool) -> bool {
    list.trim() == "*"
        || list.split(',').map(str::trim).any(|candidate| match candidate.strip_prefix("W/") {
            Some(weak) => !strong && weak == tag,
            None => candidate == tag,
        })
}

fn file(inode: Arc<dyn Inode>, metadata: &Metadata, request: &Request, now_ns: u64) -> Reply {
    let tag = entity_tag(metadata);
    let modified = metadata.modified.seconds;
    let size = metadata.size;
    let media_type = mime::of(name_for_type(&request.path));
    let status = precondition(request, &tag, modified);

    let mut ranges = Ranges::Whole;
    if status.is_none()
        && request.method == Method::Get
        && let Some(value) = &request.range
    {
        // If-Range: an outdated part is useless to the client, so it gets the whole file.
        let current = request.if_range.as_deref().is_none_or(|condition| {
            condition.trim() == tag || date::parse_http(condition).is_some_and(|date| date == modified)
        });
        if current {
            ranges = range::parse(value, size);
        }
    }
    let status = status.unwrap_or(match &ranges {
        Ranges::Whole => 200,
        Ranges::Parts(_) => 206,
        Ranges::Unsatisfiable => 416,
    });

    let mut head = Head::new(status, now_ns);
    if status != 416 && status != 412 {
        head.field("ETag", &tag);
        head.field("Last-Modified", &date::format_http(modified));
    }
    let mut body = Body::Empty;
    match (status, ranges) {
        (200, _) => {
            head.field("Accept-Ranges", "bytes");
            head.field("Content-Type", media_type);
            head.field("Content-Length", &format!("{size}"));
            if size > 0 {
                let whole = ByteRange { first: 0, last: size - 1 };
                body = Body::File { inode, parts: Vec::from([(Vec::new(), whole)]), trailer: Vec::new() };
            }
        }
        (206, Ranges::Parts(parts)) => match parts.as_slice() {
            [part] => {
                head.field("Content-Type", media_type);
                head.field("Content-Range", &format!("bytes {}-{}/{size}", part.first, part.last));
                head.field("Content-Length", &format!("{}", part.len()));
                body = Body::File { inode, parts: Vec::from([(Vec::new(), *part)]), trailer: Vec::new() };
            }
            parts => {
                // The tag is as unlikely in a body as any random boundary, and repeatable.
                let boundary = format!("anykernel-{}", tag.trim_matches('"'));
                let parts: Vec<_> = parts
                    .iter()
                    .map(|part| {
                        let prelude = format!(
                            "\r\n--{boundary}\r\nContent-Type: {media_type}\r\nContent-Range: bytes {}-{}/{size}\r\n\r\n",
                            part.first, part.last
                        );
                        (prelude.into_bytes(), *part)
                    })
                    .collect();
                let trailer = format!("\r\n--{boundary}--\r\n").into_bytes();
                let length: u64 =
                    parts.iter().map(|(prelude, part)| prelude.len() as u64 + part.len()).sum::<u64>()
                        + trailer.len() as u64;
                head.field("Content-Type", &format!("multipart/byteranges; boundary={boundary}"));
                head.field("Content-Length", &format!("{length}"));
                body = Body::File { inode, parts, trailer };
            }
        },
        (416, _) => {
            head.field("Content-Range", &format!("bytes */{size}"));
            head.field("Content-Length", "0");
        }
        (412, _) => head.field("Content-Length", "0"),
        _ => {}
    }
    if request.method == Method::Head {
        body = Body::Empty;
    }
    Reply { head: head.finish(request.keep_alive, request.http11), body }
}

/// The last component; a directory's index is HTML.
fn name_for_type(path: &[u8]) -> &[u8] {
    match path.rsplit(|byte| *byte == b'/').next() {
        Some(b"") | None => b"index.html",
        Some(name) => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(fields: &str) -> Request {
        let text = format!("GET /x HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
        crate::request::parse(text.as_bytes()).expect("valid").expect("whole").0
    }

    #[test]
    fn preconditions_follow_the_order_of_the_rfc() {
        let tag = "\"t\"";
        for (fields, expected) in [
            ("", None),
            ("If-None-Match: \"t\"\r\n", Some(304)),
            ("If-None-Match: \"a\", W/\"t\"\r\n", Some(304)),
            ("If-None-Match: *\r\n", Some(304)),
            ("If-None-Match: \"other\"\r\nIf-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n", None),
            ("If-Modified-Since: Sun, 06 Nov 1994 08:49:37 GMT\r\n", Some(304)),
            ("If-Modified-Since: Sun, 06 Nov 1994 08:49:36 GMT\r\n", None),
            ("If-Modified-Since: soon\r\n", None),
            ("If-Match: W/\"t\"\r\n", Some(412)),
            ("If-Match: \"t\"\r\n", None),
            ("If-Unmodified-Since: Sun, 06 Nov 1994 08:49:36 GMT\r\n", Some(412)),
        ] {
            assert_eq!(precondition(&request(fields), tag, 784_111_777), expected, "{fields}");
        }
    }
}
