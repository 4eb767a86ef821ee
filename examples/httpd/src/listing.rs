//! Directory listings.

use crate::date;
use alloc::string::String;
use alloc::vec::Vec;
use anykernel::fs::{DirEntry, FileKind, FsError, Inode, Result};
use core::fmt::Write;

/// Directories with more names than this are listed in part, and say so.
const MAX_ENTRIES: usize = 20_000;

/// The page for `directory`, which the client knows as `path` (decoded, with a trailing slash).
pub(crate) fn page(directory: &dyn Inode, path: &[u8]) -> Result<String> {
    let mut entries: Vec<DirEntry> = Vec::new();
    let mut cursor = 0;
    let mut short_of_memory = false;
    loop {
        let next = directory.read_dir(cursor, &mut |entry| {
            short_of_memory |= entries.try_reserve(1).is_err();
            if short_of_memory || entries.len() >= MAX_ENTRIES {
                return false;
            }
            entries.push(entry);
            true
        })?;
        match next {
            Some(next) if entries.len() < MAX_ENTRIES && !short_of_memory && next != cursor => cursor = next,
            _ => break,
        }
    }
    if short_of_memory {
        return Err(FsError::NoMemory);
    }
    entries.sort_by(|a, b| {
        (a.kind != FileKind::Directory, &a.name).cmp(&(b.kind != FileKind::Directory, &b.name))
    });

    let mut html = String::new();
    html.try_reserve(512 + entries.len() * 128).map_err(|_| FsError::NoMemory)?;
    let title = escape_html(&String::from_utf8_lossy(path));
    // Writing to a String cannot fail.
    let _ = writeln!(
        html,
        "<!DOCTYPE html><html><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>Index of {title}</title><style>body{{font:14px/1.5 system-ui,sans-serif;margin:2em}}\
         td{{padding:0 1.5em 0 0}}td.n{{text-align:right}}</style></head><body><h1>Index of {title}</h1><table>"
    );
    if path != b"/" {
        html.push_str("<tr><td><a href=\"../\">../</a></td><td></td><td></td></tr>\n");
    }
    for entry in &entries {
        let slash = if entry.kind == FileKind::Directory { "/" } else { "" };
        let link = percent_encode(&entry.name);
        let name = escape_html(&String::from_utf8_lossy(&entry.name));
        let (mut size, mut time) = (String::new(), String::new());
        if let Ok(metadata) = directory.lookup(&entry.name).and_then(|inode| inode.metadata()) {
            time = date::format_http(metadata.modified.seconds);
            if metadata.kind == FileKind::File {
                let _ = write!(size, "{}", metadata.size);
            }
        }
        let _ = writeln!(
            html,
            "<tr><td><a href=\"./{link}{slash}\">{name}{slash}</a></td><td class=\"n\">{size}</td><td>{time}</td></tr>"
        );
    }
    html.push_str("</table>");
    if entries.len() == MAX_ENTRIES {
        let _ = write!(html, "<p>Only the first {MAX_ENTRIES} names are shown.</p>");
    }
    html.push_str("</body></html>\n");
    Ok(html)
}

/// Encodes one path component for a URL (RFC 3986 unreserved characters stay).
pub(crate) fn percent_encode(name: &[u8]) -> String {
    let mut out = String::with_capacity(name.len());
    for &byte in name {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

fn escape_html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_out() {
        assert_eq!(escape_html("<a \"b\" & 'c'>"), "&lt;a &quot;b&quot; &amp; &#39;c&#39;&gt;");
        assert_eq!(percent_encode("a b/ä?".as_bytes()), "a%20b%2F%C3%A4%3F");
    }
}
