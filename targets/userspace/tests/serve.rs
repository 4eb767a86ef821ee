//! The whole way: an image, the stack, the gateway, an application, and clients on the host.

use anykernel::config::Config;
use anykernel::socket::{Shutdown, TcpListener as GuestListener, TcpStream as GuestStream};
use anykernel::task::Executor;
use anykernel_userspace::{ConsoleSink, Instance, PosixHost, gateway};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A guest that runs the echo service on a port, with its gateway.
struct Echo {
    gateway: Option<gateway::Gateway>,
    instance: Option<Instance>,
    executor: Arc<Executor<PosixHost>>,
    address: SocketAddr,
    nobody: SocketAddr,
}

async fn echo(stream: GuestStream) {
    let mut buf = vec![0; 64 << 10];
    while let Ok(n) = stream.recv(&mut buf).await {
        if n == 0 {
            // Half-close: the client still reads what is on its way.
            let _ = stream.0.shutdown(Shutdown::Write);
            break;
        }
        if stream.send_all(&buf[..n]).await.is_err() {
            break;
        }
    }
}

impl Echo {
    fn start(cpus: u32) -> Self {
        let publish: Vec<_> = ["0:7", "0:9"].iter().map(|text| text.parse().unwrap()).collect();
        let bound = gateway::bind(&publish).unwrap();
        let addresses = bound.addresses();
        let (gateway, link) = bound.start().unwrap();
        let config = Config { interfaces: vec![gateway::guest_interface()], ..Config::default() };
        let instance = Instance::builder()
            .cpus(cpus)
            .memory(256 << 20)
            .config(config)
            .console(ConsoleSink::Null)
            .link(link)
            .start()
            .unwrap();
        let kernel = instance.kernel().clone();
        let executor = Executor::new(kernel.host());
        let listener = kernel.sockets().unwrap().listen((Ipv4Addr::UNSPECIFIED, 7).into(), 1024).unwrap();
        let spawner = executor.clone();
        executor.spawn(async move {
            let listener = GuestListener(listener);
            while let Ok(stream) = listener.accept().await {
                spawner.spawn(echo(stream));
            }
        });
        for _ in 0..cpus {
            let executor = executor.clone();
            kernel.spawn("echo", None, move || executor.run()).unwrap();
        }
        Self {
            gateway: Some(gateway),
            instance: Some(instance),
            executor,
            address: addresses[0].0,
            nobody: addresses[1].0,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        drop(self.gateway.take());
        self.executor.stop();
        drop(self.instance.take());
    }
}

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Sends `data`, closes that direction, and reads until the end.
fn exchange(mut stream: TcpStream, data: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    std::thread::scope(|scope| {
        let mut sender = stream.try_clone().unwrap();
        scope.spawn(move || {
            sender.write_all(data).unwrap();
            sender.shutdown(std::net::Shutdown::Write).unwrap();
        });
        stream.read_to_end(&mut answer).unwrap();
    });
    answer
}

#[test]
fn bytes_come_back_whole_after_half_close() {
    let echo = Echo::start(1);
    for len in [0, 1, 1000, 100_000, 8 << 20] {
        let data = pattern(len, len as u32);
        assert!(exchange(echo.connect(), &data) == data, "{len} bytes differ");
    }
}

#[test]
fn many_connections_at_once_on_two_cpus() {
    let echo = Echo::start(2);
    std::thread::scope(|scope| {
        for client in 0..64 {
            let echo = &echo;
            scope.spawn(move || {
                for round in 0..4 {
                    let data = pattern(30_000 + client * 100, round);
                    assert!(exchange(echo.connect(), &data) == data, "client {client} round {round}");
                }
            });
        }
    });
}

#[test]
fn a_client_that_does_not_read_is_held_back_and_harms_nobody() {
    let echo = Echo::start(1);
    let mut stalled = echo.connect();
    stalled.set_nonblocking(true).unwrap();
    let block = pattern(1 << 20, 7);
    let (mut sent, mut idle) = (0, Instant::now());
    // Until nothing has been accepted for a while; everything in between is full then.
    while idle.elapsed() < Duration::from_secs(1) {
        match stalled.write(&block) {
            Ok(n) => (sent, idle) = (sent + n, Instant::now()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(5))
            }
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 256 << 20, "{sent} bytes are buffered somewhere");
    }
    let data = pattern(200_000, 1);
    assert!(exchange(echo.connect(), &data) == data);
    // It reads after all, and gets everything.
    stalled.set_nonblocking(false).unwrap();
    stalled.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stalled.shutdown(std::net::Shutdown::Write).unwrap();
    let mut received = Vec::new();
    stalled.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), sent);
    assert!(received.chunks(block.len()).all(|chunk| !chunk.is_empty()));
}

#[test]
fn a_port_without_a_listener_resets() {
    let echo = Echo::start(1);
    let mut stream = TcpStream::connect(echo.nobody).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn clients_that_break_off_harm_nobody() {
    let echo = Echo::start(1);
    for _ in 0..50 {
        let mut stream = echo.connect();
        stream.write_all(&pattern(50_000, 3)).unwrap();
        // Unread data makes this a reset.
    }
    let data = pattern(100_000, 9);
    assert!(exchange(echo.connect(), &data) == data);
}

const SITE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/demo");

fn files_below(dir: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files_below(&path, found) } else { found.push(path) }
    }
}

/// A running command that is ended with the test.
struct Server(Child);

impl Server {
    fn start(args: &[&str]) -> (Self, BufReader<std::process::ChildStdout>) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_anykernel"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        (Self(child), stdout)
    }

    fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    fn wait(&mut self) -> i32 {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(30) {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code().expect("an exit code");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("it does not end");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(address: &str, path: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!(
        answer.starts_with(b"HTTP/1.1 200 "),
        "{path}: {}",
        String::from_utf8_lossy(&answer[..answer.len().min(200)])
    );
    let end = answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
    answer.split_off(end)
}

#[test]
fn httpd_serves_every_file_of_an_ext4_image_and_ends_on_a_signal() {
    for signal in ["INT", "TERM"] {
        let image = format!("{SITE}/site.ext4");
        let before = std::fs::read(&image).unwrap();
        let args = ["run", "httpd", "--json", "--cpus", "2", "--disk", &image, "--publish", "0:80"];
        let (mut server, stdout) = Server::start(&args);
        let mut events =
            stdout.lines().map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap());
        let published = events.find(|event| event["event"] == "publish").expect("a publish event");
        let address = published["host"].as_str().unwrap();
        let mut files = Vec::new();
        files_below(Path::new(&format!("{SITE}/site")), &mut files);
        assert!(files.len() > 5);
        for file in files {
            let path = file.to_str().unwrap().strip_prefix(&format!("{SITE}/site")).unwrap();
            assert!(get(address, path) == std::fs::read(&file).unwrap(), "{path} differs");
        }
        server.signal(signal);
        assert_eq!(server.wait(), 0, "SIG{signal}");
        let exit = events.find(|event| event["event"] == "exit").expect("an exit event");
        assert_eq!(exit["status"], 0);
        assert!(exit["counters"].as_object().is_some_and(|counters| !counters.is_empty()));
        assert!(std::fs::read(&image).unwrap() == before, "the image was written to");
    }
}

/// The status line's code and the body, however the connection ends.
fn try_get(address: &str, path: &str) -> (Option<u16>, Vec<u8>) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    // A reset says that the transfer broke off.
    let _ = stream.read_to_end(&mut answer);
    let code = answer.get(9..12).and_then(|code| std::str::from_utf8(code).ok()?.parse().ok());
    let end = answer.windows(4).position(|end| end == b"\r\n\r\n").map_or(answer.len(), |end| end + 4);
    (code, answer.split_off(end))
}

#[test]
fn an_image_that_is_cut_while_it_is_served_harms_only_what_was_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let (files, image) = (dir.path().join("files"), dir.path().join("image.ext4"));
    std::fs::create_dir(&files).unwrap();
    let content = pattern(4 << 20, 99);
    for name in ["a", "b", "c"] {
        std::fs::write(files.join(name), &content).unwrap();
    }
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-d"])
        .arg(&files)
        .arg(&image)
        .arg("32M")
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let whole = std::fs::read(&image).unwrap();
    let args = ["run", "httpd", "--json", "--disk", image.to_str().unwrap(), "--publish", "0:80"];
    let (mut server, stdout) = Server::start(&args);
    let mut events =
        stdout.lines().map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap());
    let published = events.find(|event| event["event"] == "publish").expect("a publish event");
    let address = published["host"].as_str().unwrap();
    assert!(get(address, "/a") == content);
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.set_len(8192).unwrap();
    let (code, body) = try_get(address, "/b");
    assert!(code != Some(200) || body.len() < content.len(), "{code:?} and {} bytes of nothing", body.len());
    // The server goes on, and so does the image when it is back.
    assert!(try_get(address, "/nothing").0.is_some());
    std::fs::write(&image, &whole).unwrap();
    assert!(get(address, "/c") == content);
    server.signal("INT");
    assert_eq!(server.wait(), 0);
    assert!(std::fs::read(&image).unwrap() == whole, "the image was written to");
}

#[test]
fn trace_and_frames_are_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let (trace, frames) = (dir.path().join("trace.json"), dir.path().join("frames.pcapng"));
    let image = format!("{SITE}/site.ext4");
    let mut args = vec!["run", "httpd", "--json", "--disk", &image, "--publish", "0:80"];
    args.extend(["--trace", trace.to_str().unwrap(), "--pcap", frames.to_str().unwrap()]);
    let (mut server, stdout) = Server::start(&args);
    let mut events =
        stdout.lines().map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap());
    let published = events.find(|event| event["event"] == "publish").expect("a publish event");
    let page = get(published["host"].as_str().unwrap(), "/docs/contract.txt");
    server.signal("INT");
    assert_eq!(server.wait(), 0);
    let trace: serde_json::Value = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    let calls = trace["traceEvents"].as_array().unwrap();
    for name in ["disk_read", "link_send", "park"] {
        assert!(calls.iter().any(|call| call["name"] == name), "no {name} in the trace");
    }
    let frames = std::fs::read(frames).unwrap();
    assert!(frames.windows(40).any(|part| part == &page[..40]), "the page is not among the frames");
}

#[test]
fn a_port_in_use_is_said_so() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let (mut server, _) =
        Server::start(&["run", "httpd", "--disk", &format!("{SITE}/site.ext4"), "-p", &format!("{port}:80")]);
    assert_eq!(server.wait(), 1);
    let mut text = String::new();
    server.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.contains(&format!("port {port}")) && text.contains("in use"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn the_demo_works() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (mut demo, mut stdout) = Server::start(&["demo", "--once", "--port", &port.to_string()]);
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    assert_eq!(demo.wait(), 0, "{text}");
    assert!(text.contains(&format!("http://127.0.0.1:{port}/ answered")), "{text}");

    let (mut demo, mut stdout) = Server::start(&["demo", "--port", &port.to_string()]);
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains(&format!("http://127.0.0.1:{port}/")), "{line}");
    assert!(get(&format!("127.0.0.1:{port}"), "/").starts_with(b"<!DOCTYPE html>"));
    demo.signal("INT");
    assert_eq!(demo.wait(), 0);
}
