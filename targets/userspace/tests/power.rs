//! What a simulated power cut leaves of a FAT volume, in the eyes of tools that are not ours: fsck.fat and mtools
//! (`cargo xtask install`).

use anykernel_userspace::sim::PowerCut;
use anykernel_userspace::sim::scenario::{self, Options, Wreck};
use proptest::prelude::*;
use proptest::sample::Index;
use sha2::{Digest, Sha256};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::LazyLock;

/// Damage that a file system without a journal cannot avoid, by how lines of fsck.fat begin. Everything else that it may say
/// is a bug: clusters of two files, chains that end too early or run into free clusters, names without content.
const ALLOWED: &[&str] = &[
    // What it says of itself and of the whole.
    "fsck.fat ",
    "Leaving filesystem unchanged",
    // Cut off before the last write: new content that no name refers to yet, old content that no name refers to any more.
    "Reclaimed ",
    // The same at the end of a file that grew: its chain is linked before its size is written.
    "File size is ",
    "Truncating file to ",
    // The table is there twice, and the copies are written one after the other.
    "FATs differ but appear to be intact",
    "Using first FAT",
    "Automatically using first FAT",
    // A hint that is not kept up to date while the volume is mounted (FAT specification, "FSI_Free_Count").
    "Free cluster summary",
    "Auto-correcting",
    // The mark that it was not unmounted, which is the truth.
    "Dirty bit is set",
    "Automatically removing dirty bit",
    // Of FAT32 it stands in the boot sector, and not in the copy of that.
    "There are differences between boot sector and its backup",
    "This is mostly harmless. Differences: ",
    "65:01/00",
    "Not automatically fixing this",
    // A long name takes several entries; in two sectors they are not written at once.
    "Orphaned long file name part",
    "Auto-deleting",
];

fn run(command: &mut Command) -> Output {
    command.env("LC_ALL", "C.UTF-8").env("MTOOLS_SKIP_CHECK", "1");
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; `cargo xtask install` installs it"))
}

/// Empty volumes of each width, made by mkfs.fat.
static IMAGES: LazyLock<[Vec<u8>; 3]> = LazyLock::new(|| {
    [("12", 1 << 20), ("16", 4 << 20), ("32", 34 << 20)].map(|(bits, bytes)| {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        let mut mkfs = Command::new("/sbin/mkfs.fat");
        let made = run(mkfs.args(["-F", bits, "-s", "1", "-i", "12345678"]).arg(file.path()));
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        std::fs::read(file.path()).unwrap()
    })
});

/// What fsck.fat finds that may not be there. Lines of paths only say where.
fn damage(image: &Path) -> Vec<String> {
    let said = run(Command::new("/sbin/fsck.fat").arg("-n").arg(image));
    assert!(matches!(said.status.code(), Some(0 | 1)), "fsck.fat broke: {said:?}");
    let text = String::from_utf8(said.stdout).unwrap();
    let mut bad = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let name = image.to_str().unwrap();
        // A chain may be longer than its file ("> N bytes"), never shorter.
        let short = line.starts_with("File size is ") && !line.contains("chain length is >");
        let place = line.starts_with('/') && !line.contains(": ");
        let allowed =
            ALLOWED.iter().any(|begins| line.starts_with(begins)) || line.starts_with(name) || place;
        if short || !allowed {
            bad.push(line.to_string());
        }
    }
    bad
}

/// Synced files that mtools does not find as they were.
fn lost(image: &Path, wreck: &Wreck) -> Vec<String> {
    let mut bad = Vec::new();
    for (path, content) in &wreck.synced {
        let got = run(Command::new("mtype").arg("-i").arg(image).arg(format!("::{path}")));
        if Sha256::digest(&got.stdout) != Sha256::digest(content) {
            let why = String::from_utf8_lossy(&got.stderr).trim().to_string();
            bad.push(format!("{path}: {} bytes of {}, or others; {why}", got.stdout.len(), content.len()));
        }
    }
    bad
}

fn judge(options: &Options, width: usize, at: u64, cut: PowerCut) -> Result<usize, String> {
    let wreck = scenario::wreck(options, IMAGES[width].clone(), at, cut);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &wreck.image).unwrap();
    let damage = damage(file.path());
    let lost = lost(file.path(), &wreck);
    if wreck.findings.is_empty() && damage.is_empty() && lost.is_empty() {
        return Ok(wreck.synced.len());
    }
    Err(format!("before: {:?}\nfsck.fat: {damage:?}\nlost: {lost:?}", wreck.findings))
}

fn options(seed: u64) -> Options {
    Options { scenario: "power-cuts".into(), seed, ..Options::default() }
}

/// How many power cuts; PROPTEST_CASES asks for more.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 50, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whenever the power fails and whatever the disk had written of what it held: synced files are whole, and the rest costs
    /// clusters only.
    #[test]
    fn a_power_cut_costs_clusters_only(
        seed in 1u64..100_000,
        width in prop_oneof![4 => Just(0usize), 3 => Just(1), 1 => Just(2)],
        at in any::<Index>(),
        cut in prop_oneof![
            4 => Just(PowerCut::Random),
            1 => Just(PowerCut::LoseAll),
            1 => Just(PowerCut::KeepAll),
            2 => (0usize..20).prop_map(PowerCut::KeepFirst),
        ],
    ) {
        let options = options(seed);
        let whole = scenario::wreck(&options, IMAGES[width].clone(), 0, cut);
        let at = 1 + at.index(whole.writes as usize) as u64;
        let judged = judge(&options, width, at, cut);
        prop_assert!(judged.is_ok(), "cut at write {at} of {}: {}", whole.writes, judged.unwrap_err());
    }
}

/// Without a power cut there is nothing to find at all, and every file is there.
#[test]
fn a_shutdown_leaves_a_clean_volume() {
    for (width, image) in IMAGES.iter().enumerate() {
        let wreck = scenario::wreck(&options(3), image.clone(), 0, PowerCut::LoseAll);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &wreck.image).unwrap();
        let said = run(Command::new("/sbin/fsck.fat").arg("-n").arg(file.path()));
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout));
        assert!(!wreck.synced.is_empty() && wreck.writes > 20, "{width}: {wreck:?}");
        assert_eq!(lost(file.path(), &wreck), Vec::<String>::new());
    }
}

/// The judge sees damage: a table that was cut off makes files end too early.
#[test]
fn the_judge_sees_what_is_not_allowed() {
    let mut wreck = scenario::wreck(&options(3), IMAGES[0].clone(), 0, PowerCut::KeepAll);
    // Both tables of the volume that mkfs.fat makes: two sectors to begin with are enough for every file.
    let table = 512..3 * 512;
    let kept = wreck.image[512..515].to_vec();
    wreck.image[table].fill(0);
    wreck.image[512..515].copy_from_slice(&kept);
    let sectors = u16::from_le_bytes([wreck.image[22], wreck.image[23]]) as usize;
    let first = wreck.image[512..3 * 512].to_vec();
    wreck.image[(1 + sectors) * 512..][..first.len()].copy_from_slice(&first);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &wreck.image).unwrap();
    assert_ne!(damage(file.path()), Vec::<String>::new());
    assert_ne!(lost(file.path(), &wreck), Vec::<String>::new());
}
