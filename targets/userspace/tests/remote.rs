//! Files over 9P: the application `files` and its client, both here; and messages that make no sense, in both directions.

use anykernel::config::Config;
use anykernel::fs::{DirEntry, FileKind, FsError, Inode, Namespace, OpenOptions, Timestamp};
use anykernel_userspace::remote::Remote;
use anykernel_userspace::runner::{self, Target};
use anykernel_userspace::{ConsoleSink, Instance, NetSpec, Publish, RunSpec, gateway};
use files::{Broken, Options, Session, wire};
use hypercall::ExitStatus;
use proptest::collection::vec;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::sync::Arc;

fn free_port() -> SocketAddrV4 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port())
}

fn entries(directory: &Arc<dyn Inode>) -> Vec<DirEntry> {
    let (mut found, mut cursor) = (Vec::new(), Some(0));
    while let Some(from) = cursor {
        cursor = directory
            .read_dir(from, &mut |entry| {
                found.push(entry);
                true
            })
            .unwrap();
    }
    found
}

/// Everything that a file system can, on a server's tmpfs.
fn use_it(names: &dyn Namespace) {
    assert_eq!(names.stats(b"/").unwrap().kind, "tmpfs");
    names.create(b"/dir", FileKind::Directory, None).unwrap();
    assert_eq!(names.create(b"/dir/", FileKind::Directory, None), Err(FsError::Exists));
    // More than goes in one message.
    let content: Vec<u8> = (0..700_001u32).map(|n| (n * 7 / 3) as u8).collect();
    let file = names.open(b"/dir/file", OpenOptions::CREATE).unwrap();
    assert_eq!(file.write_at(0, &content).unwrap(), content.len());
    file.inode.sync().unwrap();
    let time = Timestamp { seconds: 1_700_000_000, nanos: 5 };
    file.inode.set_modified(time).unwrap();
    let metadata = names.resolve(b"//dir/./../dir/file", true).unwrap().metadata().unwrap();
    assert_eq!((metadata.kind, metadata.size, metadata.modified), (FileKind::File, 700_001, time));
    assert_eq!(metadata.inode, file.metadata().unwrap().inode);
    let mut back = vec![0; content.len() + 9];
    assert_eq!(file.read_at(0, &mut back).unwrap(), content.len());
    assert!(back.starts_with(&content));
    assert_eq!(file.read_at(700_000, &mut back).unwrap(), 1);

    names.create(b"/link", FileKind::Symlink, Some(b"dir/../dir/file")).unwrap();
    names.create(b"/turn", FileKind::Symlink, Some(b"/turn")).unwrap();
    assert_eq!(names.resolve(b"/link", true).unwrap().metadata().unwrap().size, 700_001);
    assert_eq!(names.resolve(b"/link", false).unwrap().read_link().unwrap(), b"dir/../dir/file");
    assert!(matches!(names.resolve(b"/turn/x", true), Err(FsError::Loop)));
    assert!(matches!(names.resolve(b"/none", true), Err(FsError::NotFound)));
    assert!(matches!(names.resolve(b"/dir/file/x", true), Err(FsError::NotDirectory)));

    let long = "n".repeat(200);
    for number in 0..1_500 {
        names.create(format!("/dir/{long}{number:04}").as_bytes(), FileKind::Directory, None).unwrap();
    }
    let mut found = entries(&names.resolve(b"/dir", true).unwrap());
    found.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(found.len(), 1_501);
    assert_eq!((found[0].name.as_slice(), found[0].kind), (&b"file"[..], FileKind::File));
    assert_eq!(found[1_500].name, format!("{long}1499").as_bytes());
    assert_eq!(found[1_500].kind, FileKind::Directory);

    names.rename(b"/dir/file", b"/moved").unwrap();
    assert_eq!(names.remove(b"/dir"), Err(FsError::NotEmpty));
    let open = names.open(b"/moved", OpenOptions::READ).unwrap();
    names.remove(b"/moved").unwrap();
    assert_eq!(open.read_at(0, &mut back[..10]).unwrap(), 10, "an open file lives on");
    open.inode.truncate(3).unwrap();
    assert_eq!(open.metadata().unwrap().size, 3);
    names.sync().unwrap();
}

#[test]
fn files_of_another_instance_are_as_if_they_were_here() {
    let (address, other) = (free_port(), free_port());
    let options = Options { key: "secret".into(), once: true, port: other.port(), ..Options::default() };
    let config = Config {
        log: "warn".into(),
        app: std::iter::once("files".into()).chain(options.to_words()).collect(),
        interfaces: vec![gateway::guest_interface()],
        ..Config::default()
    };
    let publish = vec![Publish { host: address, guest: options.port }];
    let spec = RunSpec { publish, net: NetSpec::User, ..RunSpec::new(config) };
    let run = std::thread::spawn(move || runner::run(Target::Userspace, &spec).unwrap());
    let wrong = Remote::connect(address, "secreT", || false).expect_err("with another key");
    assert!(wrong.line.contains("attaching"), "{wrong}");
    let remote = Remote::connect(address, "secret", || false).unwrap().unwrap();
    use_it(&*remote);
    // With a file that somebody still has.
    let kept = remote.resolve(b"/link", false).unwrap();
    remote.close();
    assert!(matches!(kept.metadata(), Err(FsError::Device(_))));
    assert_eq!(run.join().unwrap(), ExitStatus::Success, "it ends with its one client");
}

#[test]
fn options_are_words_and_words_are_options() {
    let find = vec!["usb1-1".into(), "usb2-1".into()];
    let options = Options { port: 9, key: "k".into(), once: true, find, partition: Some(3), write: true };
    assert_eq!(Options::parse(&options.to_words()), Ok(options));
    assert_eq!(Options::parse(&[]), Ok(Options::default()));
    for bad in [&["--port"][..], &["--port", "70000"], &["--partition", "x"], &["x"]] {
        let words: Vec<String> = bad.iter().map(|word| (*word).into()).collect();
        assert!(Options::parse(&words).is_err(), "{bad:?}");
    }
}

/// Requests that are nearly right: numbers of a few bytes, a name now and then.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        (0..4u32).prop_map(|small| small.to_le_bytes().to_vec()),
        any::<u64>().prop_map(|wide| wide.to_le_bytes().to_vec()),
        prop_oneof![Just(""), Just("."), Just(".."), Just("a"), Just("a/b"), Just("9P2000.L")]
            .prop_map(|name| [&(name.len() as u16).to_le_bytes(), name.as_bytes()].concat()),
        vec(any::<u8>(), 0..9),
    ];
    let kind = prop_oneof![(0..64u8).prop_map(|half| half * 2), any::<u8>()];
    (kind, vec(part, 0..8)).prop_map(|(kind, parts)| {
        let mut message = wire::Writer::new(kind, 7);
        message.bytes(&parts.concat());
        message.finish()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a client says has an answer that is no longer than was agreed to, or ends the connection.
    #[test]
    fn a_server_takes_any_message(requests in vec(request(), 1..60), rough in vec(any::<u8>(), 0..40)) {
        let instance = Instance::builder().console(ConsoleSink::Null).start().unwrap();
        let mut session = Session::new(instance.kernel().namespace().unwrap(), "");
        let mut hello = wire::Writer::new(wire::op::VERSION, wire::NO_TAG);
        hello.u32(8192).string(wire::VERSION);
        session.answer(&hello.finish()).unwrap();
        let mut attach = wire::Writer::new(wire::op::ATTACH, 1);
        attach.u32(0).u32(wire::NO_FID).string(b"").string(b"").u32(0);
        session.answer(&attach.finish()).unwrap();
        for request in &requests {
            match session.answer(request) {
                Ok(answer) => {
                    prop_assert!(answer.len() <= wire::MSIZE as usize && answer.len() >= wire::HEADER);
                    let (len, kind, tag) = wire::header(answer.first_chunk().unwrap());
                    prop_assert_eq!((len as usize, tag), (answer.len(), 7));
                    prop_assert!(kind == wire::op::LERROR || kind == request[4] + 1);
                }
                Err(Broken) => prop_assert_eq!(request[4] % 2, 1),
            }
        }
        let _ = session.answer(&rough);
        drop(session);
        instance.shutdown();
    }

    /// Whatever a server says is an error or an answer, and the end of it is one.
    #[test]
    fn a_client_takes_any_answer(answers in vec(vec(any::<u8>(), 0..80), 0..12)) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port());
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut hello = wire::Writer::new(wire::op::VERSION + 1, wire::NO_TAG);
            hello.u32(8192).string(wire::VERSION);
            let mut attached = wire::Writer::new(wire::op::ATTACH + 1, 0);
            attached.qid(FileKind::Directory, 1);
            let answers = answers.into_iter().map(|answer| {
                // The type that was asked for, mostly.
                let kind = answer.first().map_or(0, |byte| byte % 4);
                move |asked: u8| {
                    let mut message = wire::Writer::new(if kind == 0 { wire::op::LERROR } else { asked + 1 }, 0);
                    message.bytes(&answer);
                    message.finish()
                }
            });
            let fixed = [hello.finish(), attached.finish()];
            let mut fixed = fixed.into_iter();
            let mut answers = answers;
            let mut start = [0; wire::HEADER];
            while stream.read_exact(&mut start).is_ok() {
                let (len, kind, _) = wire::header(&start);
                let mut body = vec![0; len as usize - wire::HEADER];
                let answer = fixed.next().or_else(|| answers.next().map(|make| make(kind)));
                let Some(answer) = answer.filter(|_| stream.read_exact(&mut body).is_ok()) else { return };
                if stream.write_all(&answer).is_err() {
                    return;
                }
            }
        });
        let remote = Remote::connect(address, "", || false).unwrap().unwrap();
        let _ = remote.stats(b"/");
        let _ = remote.resolve(b"/a/b", true).and_then(|inode| inode.metadata());
        let _ = remote.open(b"/a", OpenOptions::CREATE).and_then(|file| file.read_at(0, &mut [0; 100]));
        if let Ok(root) = remote.resolve(b"/", true) {
            let mut seen = 0;
            let _ = root.read_dir(0, &mut |_| { seen += 1; true });
            prop_assert!(seen < 10);
            let _ = root.write_at(0, b"abc");
        }
        remote.close();
        server.join().unwrap();
    }
}
