//! The applications of this workspace, by name.

use anykernel::Kernel;
use hypercall::{ExitStatus, Host};
use std::sync::Arc;

/// Name and what it is, of each application that every target can run.
pub const APPS: &[(&str, &str)] = &[
    ("httpd", "serves the mounted files over HTTP on port 80"),
    ("selftest", "checks the kernel it runs in and prints the verdicts as JSON lines"),
    ("usb", "shows USB devices: usb list, usb watch SECONDS, usb keys, usb read FILE"),
    ("netbench", "the server side of the network benchmarks"),
    ("contractbench", "measures what a contract call costs"),
];

/// Runs the application `name`; `None` if there is none of that name.
pub fn run<H: Host>(name: &str, kernel: &Arc<Kernel<H>>) -> Option<ExitStatus> {
    Some(match name {
        "httpd" => httpd::main(kernel),
        "selftest" => selftest::main(kernel),
        "usb" => usb_app::main(kernel),
        "netbench" => netbench::main(kernel),
        "contractbench" => contractbench::main(kernel),
        _ => return None,
    })
}

/// The candidate that `word` was probably meant to be.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let all = candidates.into_iter().map(|candidate| (distance(word, candidate), candidate));
    all.min()
        .filter(|(distance, candidate)| *distance <= candidate.len().max(word.len()).div_ceil(2))
        .map(|(_, name)| name)
}

/// Levenshtein's distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_was_meant() {
        let names = || APPS.iter().map(|(name, _)| *name);
        assert_eq!(nearest("htpd", names()), Some("httpd"));
        assert_eq!(nearest("self-test", names()), Some("selftest"));
        assert_eq!(nearest("zzz", names()), None);
    }

    #[test]
    fn distances() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
    }
}
