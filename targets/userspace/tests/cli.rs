//! The command, as scripts and people meet it: what it says and how it exits when something is wrong.

use assert_cmd::Command;
use predicates::prelude::*;
use std::path::PathBuf;
use std::time::Duration;

fn anykernel() -> Command {
    let mut command = Command::cargo_bin("anykernel").unwrap();
    command.timeout(Duration::from_secs(60));
    command
}

/// Standard error is this one line, which contains every one of `parts`.
fn fails_with(command: &mut Command, code: i32, parts: &[&str]) {
    let output = command.assert().failure().code(code).get_output().clone();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "one line: {text}");
    assert!(text.starts_with("anykernel: "), "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

#[test]
fn help_teaches_by_examples() {
    anykernel().arg("--help").assert().success().stdout(predicate::str::contains("Examples:"));
    anykernel().assert().code(2);
    for command in [
        "run", "demo", "replay", "top", "simulate", "ls", "tree", "stat", "cat", "cp", "usb", "fuzz",
        "manifest", "schema",
    ] {
        let contains = predicate::str::contains("Example")
            .and(predicate::str::contains("anykernel ").and(predicate::str::contains(command)));
        anykernel().args([command, "--help"]).assert().success().stdout(contains);
    }
}

#[test]
fn an_unknown_application_is_named_with_its_nearest() {
    fails_with(anykernel().args(["run", "htpd"]), 2, &["htpd", "did you mean httpd"]);
    fails_with(anykernel().args(["run", "xyzzy"]), 2, &["xyzzy", "selftest"]);
}

#[test]
fn usage_errors_exit_with_2() {
    for args in [
        &["run", "httpd", "--publish", "80"][..],
        &["run", "httpd", "--cpus", "0"],
        &["run", "httpd", "--memory", "lots"],
        &["run", "httpd", "--net", "bridge:x"],
        &["run", "httpd", "--on", "mars"],
        &["run", "httpd", "--mount", "disk0"],
        &["frobnicate"],
    ] {
        anykernel().args(args).assert().code(2);
    }
    fails_with(
        anykernel().args(["run", "httpd", "--memory", "64K"]),
        2,
        &["too little memory", "--memory 4M"],
    );
    let args = ["run", "httpd", "--net", "none", "--publish", "8080:80"];
    fails_with(anykernel().args(args), 2, &["--publish", "--net user"]);
    fails_with(anykernel().args(["run", "httpd", "--mount", "disk0:/x"]), 2, &["disk0", "--disk"]);
    fails_with(anykernel().args(["run", "httpd", "--mount", "dsik0:/x"]), 2, &["dsik0", "--disk"]);
    fails_with(
        anykernel().args(["run", "httpd", "--mount", "tmpsf:/x"]),
        2,
        &["tmpsf", "did you mean tmpfs"],
    );
    fails_with(anykernel().args(["cp", "a", "b"]), 2, &["IMAGE:/path"]);
    // An option that would have no effect.
    fails_with(
        anykernel().args(["run", "httpd", "--address", "10.0.0.1/8"]),
        2,
        &["--address", "--net tap:NAME"],
    );
    fails_with(
        anykernel().args(["run", "httpd", "--pcap", "/nowhere/a.pcapng"]),
        1,
        &["there is no directory /nowhere"],
    );
}

/// Before minutes go into building what it would boot.
#[test]
fn a_missing_qemu_is_said_at_once() {
    for target in ["rumprun", "linux-module"] {
        let mut command = anykernel();
        command.env("PATH", "/nowhere").args(["run", "httpd", "--on", target]);
        fails_with(&mut command, 1, &["qemu-system-x86_64 is not installed", "--on userspace"]);
    }
}

#[test]
fn a_missing_image_is_said_so_by_every_command() {
    for args in [
        &["run", "httpd", "--disk", "/nowhere/a.img"][..],
        &["ls", "/nowhere/a.img:/"],
        &["tree", "/nowhere/a.img:/"],
        &["stat", "/nowhere/a.img:/x"],
        &["cat", "/nowhere/a.img:/x"],
        &["cp", "/nowhere/a.img:/x", "."],
    ] {
        fails_with(anykernel().args(args), 1, &["/nowhere/a.img", "no such file"]);
    }
}

#[test]
fn what_is_no_file_system_is_refused() {
    let dir = Dir::new();
    let noise: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for (name, content) in
        [("zeros.img", vec![0; 1 << 20]), ("noise.img", noise), ("short.img", vec![7; 600])]
    {
        let path = dir.file(name, &content);
        fails_with(
            anykernel().args(["run", "httpd", "--disk"]).arg(&path),
            1,
            &[name, "no file system", "raw image"],
        );
        fails_with(anykernel().arg("ls").arg(&path), 1, &[name, "no file system"]);
        assert_eq!(std::fs::read(&path).unwrap(), content, "nothing is written");
    }
    let empty = dir.file("empty.img", b"");
    fails_with(anykernel().arg("ls").arg(empty), 1, &["empty"]);
    let tiny = dir.file("tiny.img", b"hello");
    fails_with(anykernel().arg("ls").arg(tiny), 1, &["shorter than one sector"]);
    fails_with(anykernel().arg("ls").arg(dir.0.path()), 1, &["a directory"]);
}

const SITE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/site.ext4");

#[test]
fn a_cut_or_corrupt_image_is_refused() {
    let dir = Dir::new();
    let image = std::fs::read(SITE).unwrap();
    let mut corrupt = image.clone();
    corrupt[1024 + 4..1024 + 8].fill(0xff);
    let mut group = image.clone();
    group[2048..2112].fill(0x5a);
    let cases = [("cut.img", image[..200_000].to_vec()), ("corrupt.img", corrupt), ("group.img", group)];
    for (name, content) in cases {
        let path = dir.file(name, &content);
        fails_with(anykernel().args(["run", "httpd", "--net", "none", "--disk"]).arg(&path), 1, &[name]);
        fails_with(anykernel().arg("ls").arg(&path), 1, &[name]);
        assert!(std::fs::read(&path).unwrap() == content, "nothing is written");
    }
}

#[test]
fn images_are_read_without_writing() {
    let before = std::fs::read(SITE).unwrap();
    let place = |path: &str| format!("{SITE}:{path}");
    anykernel().args(["ls", SITE]).assert().success().stdout("docs\nindex.html\npicture.svg\nstyle.css\n");
    anykernel().args(["ls", "-l", &place("/docs")]).assert().success().stdout(
        predicate::str::contains("lrwxrwxrwx").and(predicate::str::contains("latest -> targets.txt")),
    );
    anykernel()
        .args(["tree", SITE])
        .assert()
        .success()
        .stdout(predicate::str::contains("1 directories, 8 files"));
    let index =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/site/index.html")).unwrap();
    anykernel().args(["cat", &place("/index.html")]).assert().success().stdout(index);
    let output =
        anykernel().args(["stat", "--json", &place("/docs/latest")]).assert().success().get_output().clone();
    let stat: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&stat["kind"], &stat["target"]), (&"symlink".into(), &"targets.txt".into()));
    fails_with(anykernel().args(["cat", &place("/nope")]), 1, &["/nope", "no such file"]);
    fails_with(anykernel().args(["cat", &place("/docs")]), 1, &["is a directory"]);
    fails_with(anykernel().args(["ls", &format!("{SITE}:3:/")]), 1, &["no partition 3"]);

    let dir = Dir::new();
    let to = dir.0.path().join("copy");
    anykernel().args(["cp", &place("/")]).arg(&to).assert().code(2);
    anykernel().args(["cp", "-r", &place("/")]).arg(&to).assert().success();
    for file in ["index.html", "docs/numbers.csv", "docs/latest"] {
        let original = std::path::Path::new(SITE).with_file_name("site").join(file);
        assert!(std::fs::read(to.join(file)).unwrap() == std::fs::read(original).unwrap(), "{file} differs");
    }
    assert_eq!(std::fs::read_link(to.join("docs/latest")).unwrap(), std::path::Path::new("targets.txt"));
    // A second time over what is there.
    anykernel().args(["cp", "-r", &place("/")]).arg(&to).assert().success();
    let readme = dir.file("readme.txt", b"x");
    fails_with(anykernel().arg("cp").arg(readme).arg(place("/")), 1, &["read-only"]);
    assert!(std::fs::read(SITE).unwrap() == before, "the image was written to");
}

fn tool(program: &str, args: &[&str]) -> Vec<u8> {
    let output = std::process::Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    output.stdout
}

#[test]
fn copies_into_a_fat_image_and_back() {
    let dir = Dir::new();
    let image = dir.0.path().join("stick.img");
    let image = image.to_str().unwrap();
    tool("mkfs.fat", &["-C", image, "8192"]);
    let site = std::path::Path::new(SITE).with_file_name("site");
    anykernel().args(["cp", "-r"]).arg(&site).arg(format!("{image}:/a long name")).assert().success();
    let note = dir.file("note.txt", b"hello");
    anykernel().arg("cp").arg(&note).arg(format!("{image}:/")).assert().success();
    // Over what is there, and shorter.
    std::fs::write(&note, b"bye").unwrap();
    anykernel().arg("cp").arg(&note).arg(format!("{image}:/")).assert().success();
    tool("fsck.fat", &["-n", image]);
    assert_eq!(tool("mtype", &["-i", image, "::/note.txt"]), b"bye");
    let numbers = std::fs::read(site.join("docs/numbers.csv")).unwrap();
    assert!(tool("mtype", &["-i", image, "::/a long name/docs/numbers.csv"]) == numbers);
    let before = std::fs::read(image).unwrap();
    let back = dir.0.path().join("back");
    anykernel().args(["cp", "-r", &format!("{image}:/a long name")]).arg(&back).assert().success();
    assert!(std::fs::read(back.join("docs/numbers.csv")).unwrap() == numbers);
    anykernel().args(["ls", "-R", image]).assert().success().stdout(predicate::str::contains("numbers.csv"));
    assert!(std::fs::read(image).unwrap() == before, "reading wrote to the image");
    // More than fits.
    let big = dir.file("big.bin", &vec![1; 10 << 20]);
    fails_with(anykernel().arg("cp").arg(big).arg(format!("{image}:/")), 1, &["/big.bin", "no space"]);
    tool("fsck.fat", &["-n", image]);
}

#[test]
fn an_image_is_not_written_by_two() {
    let dir = Dir::new();
    let image = dir.0.path().join("stick.img");
    tool("mkfs.fat", &["-C", image.to_str().unwrap(), "2048"]);
    let held = std::fs::File::open(&image).unwrap();
    held.lock().unwrap();
    let place = format!("{}:/", image.display());
    fails_with(anykernel().args(["ls", &place]), 1, &["being written", "wait"]);
    held.unlock().unwrap();
    held.lock_shared().unwrap();
    anykernel().args(["ls", &place]).assert().success();
    let note = dir.file("note.txt", b"x");
    fails_with(anykernel().arg("cp").arg(note).arg(&place), 1, &["in use"]);
}

#[test]
fn manifests_and_the_schema_are_shown() {
    let output = anykernel().args(["manifest", "--json"]).assert().success().get_output().stdout.clone();
    let lines = String::from_utf8(output).unwrap();
    let names: Vec<_> = lines
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["component"]
                .as_str()
                .unwrap()
                .to_string()
        })
        .collect();
    for name in ["net", "vfs", "usb", "xhci", "virtio-blk", "virtio-net", "hostblk", "hostlink"] {
        assert!(names.iter().any(|known| known == name), "{name} is not among {names:?}");
    }
    anykernel().args(["manifest", "net"]).assert().success().stdout(predicate::str::contains("core 1."));
    fails_with(anykernel().args(["manifest", "vsf"]), 2, &["vsf", "did you mean vfs"]);
    let schema = anykernel().arg("schema").assert().success().get_output().stdout.clone();
    assert!(
        serde_json::from_slice::<serde_json::Value>(&schema).unwrap()["properties"]["mounts"].is_object()
    );
}

#[test]
fn a_bad_configuration_is_a_usage_error() {
    let dir = Dir::new();
    let unknown = dir.file("unknown.json", br#"{"hostnam":"x"}"#);
    fails_with(anykernel().args(["run", "httpd", "--config"]).arg(unknown), 2, &["unknown.json", "hostnam"]);
    let broken = dir.file("broken.json", b"{");
    fails_with(anykernel().args(["run", "httpd", "--config"]).arg(broken), 2, &["broken.json"]);
    fails_with(anykernel().args(["run", "httpd", "--config", "/nowhere.json"]), 2, &["/nowhere.json"]);
}

#[test]
fn a_missing_tap_says_what_to_do() {
    // Too long for an interface on any system.
    anykernel().args(["run", "httpd", "--net", "tap:this-name-is-too-long"]).assert().code(2);
}

#[test]
fn a_directory_needs_minus_r() {
    let dir = Dir::new();
    let image = dir.file("a.img", &vec![0; 1 << 20]);
    let mut to = image.clone().into_os_string();
    to.push(":/");
    fails_with(anykernel().arg("cp").arg(dir.0.path()).arg(to), 2, &["is a directory", "-r"]);
}
