//! The socket provider with threads: two instances joined by a host link.

use anykernel::Kernel;
use anykernel::config::{Config, Interface};
use anykernel::nic::{Nic, NicCaps, NicInfo, NicQueue, RxMeta, TxFull, TxMeta};
use anykernel::socket::{NetError, Shutdown, SocketProvider, TcpListener, TcpStream, UdpSocket};
use anykernel::task::{block_on, block_on_until};
use hypercall::testing::TestHost;
use hypercall::{Clock, Signal};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};

const SECOND: u64 = 1_000_000_000;

struct Instance {
    host: TestHost,
    kernel: Arc<Kernel<TestHost>>,
    net: Arc<dyn SocketProvider>,
}

impl Instance {
    fn new(host: TestHost, last: u8) -> Self {
        let interface = Interface {
            ipv4: format!("10.0.0.{last}/24"),
            ipv6: format!("fd00::{last}/64"),
            gateway: None,
            routes: vec![],
            // The first does not answer: it is this host, where nobody listens.
            dns: if last == 1 { vec!["10.0.0.1".into(), "10.0.0.2".into()] } else { vec![] },
        };
        let config = Config { interfaces: vec![interface], ..Config::default() };
        let kernel = Kernel::new(host, config);
        anykernel_net::hostlink::register(&kernel).unwrap();
        anykernel_net::start(&kernel).unwrap();
        let net = kernel.sockets().unwrap();
        Self { host, kernel, net }
    }

    fn within<F: Future>(&self, seconds: u64, future: F) -> F::Output {
        let deadline = self.host.monotonic_ns() + seconds * SECOND;
        block_on_until(self.host, future, Some(deadline)).expect("in time")
    }

    fn end(self) {
        let Self { kernel, net, .. } = self;
        drop(net);
        kernel.shutdown();
        assert_eq!(Arc::strong_count(&kernel), 1, "threads and the stack let go of the kernel");
    }
}

fn pair() -> (Instance, Instance) {
    let (a, b) = (TestHost::new(), TestHost::new());
    a.add_link_to(&b);
    (Instance::new(a, 1), Instance::new(b, 2))
}

/// Echoes every connection until its end.
fn serve(server: &Instance, addr: &str) -> SocketAddr {
    let executor = server.kernel.start_executor("echo").unwrap();
    let listener = TcpListener(server.net.listen(addr.parse().unwrap(), 64).unwrap());
    let at = listener.0.local_addr();
    let spawner = executor.clone();
    executor.spawn(async move {
        while let Ok(stream) = listener.accept().await {
            spawner.spawn(async move {
                let mut buf = [0u8; 4096];
                while let Ok(n @ 1..) = stream.recv(&mut buf).await {
                    if stream.send_all(&buf[..n]).await.is_err() {
                        break;
                    }
                }
                let _ = stream.0.shutdown(Shutdown::Write);
            });
        }
    });
    at
}

async fn exchange(net: &dyn SocketProvider, to: SocketAddr, bytes: usize, seed: u8) {
    let stream = TcpStream::connect(net, to).await.unwrap();
    let data: Vec<u8> = (0..bytes).map(|at| (at ^ (at >> 8)) as u8 ^ seed).collect();
    let (mut sent, mut got) = (0, Vec::new());
    let mut buf = vec![0; 16384];
    // Never more in flight than the echo's buffers hold, so that neither side waits for the other for ever.
    while got.len() < bytes {
        if sent < bytes && sent - got.len() < 16384 {
            sent += stream.send(&data[sent..bytes.min(sent + 8192)]).await.unwrap();
            continue;
        }
        let n = stream.recv(&mut buf).await.unwrap();
        assert!(n > 0, "end after {} of {bytes}", got.len());
        got.extend_from_slice(&buf[..n]);
    }
    assert!(got == data, "what came back differs");
    stream.0.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.recv(&mut buf).await, Ok(0));
}

#[test]
fn echo_over_both_versions_from_many_threads() {
    let (client, server) = pair();
    let at = serve(&server, "[::]:7");
    client.within(10, std::future::poll_fn(|cx| client.net.poll_configured(cx))).unwrap();
    server.within(10, std::future::poll_fn(|cx| server.net.poll_configured(cx))).unwrap();
    std::thread::scope(|scope| {
        for seed in 0..8u8 {
            let client = &client;
            scope.spawn(move || {
                let to: SocketAddr =
                    if seed % 2 == 0 { "10.0.0.2:7" } else { "[fd00::2]:7" }.parse().unwrap();
                assert_eq!(to.port(), at.port());
                for _ in 0..4 {
                    client.within(60, exchange(&*client.net, to, 100_000, seed));
                }
            });
        }
    });
    client.end();
    server.end();
}

/// A device with room for one frame, which tells of room only to whoever asks for its signal.
#[derive(Clone, Default)]
struct Narrow(Arc<Mutex<NarrowState>>);

#[derive(Default)]
struct NarrowState {
    sent: usize,
    full: bool,
    refused: bool,
}

impl Nic for Narrow {
    fn info(&self) -> &NicInfo {
        static INFO: OnceLock<NicInfo> = OnceLock::new();
        let caps = NicCaps::empty();
        INFO.get_or_init(|| NicInfo { name: "nic0".into(), mac: [2; 6], mtu: 1500, caps, queues: 1 })
    }
    fn open_queue(&self, _: u16, _: Arc<Signal>) -> hypercall::Result<Box<dyn NicQueue>> {
        Ok(Box::new(self.clone()))
    }
}

impl NicQueue for Narrow {
    fn receive(&mut self, _: usize, _: &mut dyn FnMut(&[u8], RxMeta)) -> usize {
        0
    }
    fn transmit(&mut self, len: usize, _: TxMeta, fill: &mut dyn FnMut(&mut [u8])) -> Result<(), TxFull> {
        let mut state = self.0.lock().unwrap();
        if state.full {
            state.refused = true;
            return Err(TxFull);
        }
        fill(&mut vec![0; len]);
        state.full = true;
        state.sent += 1;
        Ok(())
    }
    fn flush(&mut self) {}
    fn arm(&mut self) -> bool {
        let mut state = self.0.lock().unwrap();
        let room = std::mem::take(&mut state.refused);
        state.full &= !room;
        room
    }
}

#[test]
fn what_finds_the_device_full_is_sent_when_there_is_room() {
    let nic = Narrow::default();
    let interface = Interface { ipv4: "10.0.0.1/24".into(), ipv6: "none".into(), ..Interface::default() };
    let kernel = Kernel::new(TestHost::new(), Config { interfaces: vec![interface], ..Config::default() });
    kernel.add_nic(Arc::new(nic.clone()));
    anykernel_net::start(&kernel).unwrap();
    let net = kernel.sockets().unwrap();
    let socket = UdpSocket(net.bind("0.0.0.0:5000".parse().unwrap()).unwrap());
    let sent = |count: usize| {
        let start = std::time::Instant::now();
        while nic.0.lock().unwrap().sent < count {
            assert!(start.elapsed().as_secs() < 10, "frame {count} was never sent");
            std::thread::yield_now();
        }
        // The thread goes to sleep.
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    sent(1); // Our address is announced.
    for datagram in 0..3 {
        block_on(kernel.host(), socket.send_to(b"all of you", "10.0.0.255:9".parse().unwrap())).unwrap();
        sent(2 + datagram);
    }
    drop((socket, net));
    kernel.shutdown();
}

#[test]
fn udp_ping_and_refusal() {
    let (client, server) = pair();
    let to: SocketAddr = "10.0.0.2:5000".parse().unwrap();
    let ours = UdpSocket(client.net.bind("0.0.0.0:0".parse().unwrap()).unwrap());
    let theirs = UdpSocket(server.net.bind(to).unwrap());
    let mut buf = [0u8; 2000];
    client.within(10, ours.send_to(b"hello", to)).unwrap();
    let (n, from) = server.within(10, theirs.recv_from(&mut buf)).unwrap();
    assert_eq!(&buf[..n], b"hello");
    assert_eq!(from, SocketAddr::new([10, 0, 0, 1].into(), ours.0.local_addr().port()));
    server.within(10, theirs.send_to(b"back", from)).unwrap();
    assert_eq!(client.within(10, ours.recv_from(&mut buf)).unwrap(), (4, to));

    let nobody: SocketAddr = "10.0.0.2:5001".parse().unwrap();
    client.within(10, ours.send_to(b"?", nobody)).unwrap();
    assert_eq!(client.within(10, ours.recv_from(&mut buf)), Err(NetError::Refused));

    let mut ping = client.net.ping("10.0.0.2".parse().unwrap()).unwrap();
    client.within(10, std::future::poll_fn(|cx| ping.poll_reply(cx))).unwrap();
    let mut own = client.net.ping("127.0.0.1".parse().unwrap()).unwrap();
    client.within(10, std::future::poll_fn(|cx| own.poll_reply(cx))).unwrap();

    let refused = client.within(10, TcpStream::connect(&*client.net, "10.0.0.2:9".parse().unwrap()));
    assert_eq!(refused.err(), Some(NetError::Refused));
    drop((ours, theirs, ping, own));
    client.end();
    server.end();
}

#[test]
fn addresses_in_use_and_not_ours() {
    let (client, server) = pair();
    let any = "0.0.0.0:80".parse().unwrap();
    let listener = client.net.listen(any, 1).unwrap();
    assert_eq!(client.net.listen(any, 1).err(), Some(NetError::AddrInUse));
    drop(listener);
    drop(client.net.listen(any, 1).unwrap());
    let foreign = "10.9.9.9:80".parse().unwrap();
    assert_eq!(client.net.listen(foreign, 1).err(), Some(NetError::AddrNotAvailable));
    assert_eq!(client.net.bind(foreign).err(), Some(NetError::AddrNotAvailable));
    assert_eq!(client.net.connect("8.8.8.8:80".parse().unwrap()).err(), Some(NetError::Unreachable));
    let first = client.net.bind("0.0.0.0:53".parse().unwrap()).unwrap();
    assert_eq!(client.net.bind("0.0.0.0:53".parse().unwrap()).err(), Some(NetError::AddrInUse));
    drop(first);
    let mut literal = client.net.lookup("10.1.2.3").unwrap();
    let found = block_on(client.host, std::future::poll_fn(|cx| literal.poll_addresses(cx))).unwrap();
    assert_eq!(found, ["10.1.2.3".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(client.net.lookup("no servers.example").err(), Some(NetError::Invalid));
    assert_eq!(server.net.lookup("no-servers.example").err(), Some(NetError::Unreachable));
    client.end();
    server.end();
}

#[test]
fn a_lossy_link_loses_no_data() {
    let (a, b) = (TestHost::new(), TestHost::new());
    let (here, there) = a.add_link_to(&b);
    a.lose_frames(here, 50);
    b.lose_frames(there, 70);
    let (client, server) = (Instance::new(a, 1), Instance::new(b, 2));
    serve(&server, "0.0.0.0:7");
    client.within(100, exchange(&*client.net, "10.0.0.2:7".parse().unwrap(), 200_000, 1));
    client.end();
    server.end();
}

/// An answer as RFC 1035 draws it: `files.example` is an alias of `a.example` at 10.7.7.7; nothing else exists.
fn dns_answer(query: &[u8]) -> Vec<u8> {
    let known = query[12..].to_ascii_lowercase().starts_with(b"\x05files\x07example\0");
    let mut answer = query.to_vec();
    answer[2..4].copy_from_slice(if known { &[0x81, 0x80] } else { &[0x81, 0x83] });
    let kind = query[query.len() - 3];
    if known {
        answer[7] = if kind == 1 { 2 } else { 1 };
        // The alias, with both names compressed: its owner is the question, its target ends with "example".
        answer.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 60, 0, 4, 1, b'a', 0xc0, 18]);
        if kind == 1 {
            let alias_at = (query.len() + 12) as u8;
            answer.extend([0xc0, alias_at, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 7, 7, 7]);
        }
    }
    answer
}

#[test]
fn names() {
    let (client, server) = pair();
    let socket = UdpSocket(server.net.bind("0.0.0.0:53".parse().unwrap()).unwrap());
    let executor = server.kernel.start_executor("dns").unwrap();
    executor.spawn(async move {
        let mut buf = [0u8; 512];
        while let Ok((n, from)) = socket.recv_from(&mut buf).await {
            // A forger who does not know the identifier comes first.
            let mut forged = dns_answer(&buf[..n]);
            forged[0] ^= 1;
            let last = forged.len() - 1;
            forged[last] = 66;
            let _ = socket.send_to(&forged, from).await;
            let _ = socket.send_to(&dns_answer(&buf[..n]), from).await;
        }
    });
    let look = |name: &str| {
        let mut lookup = client.net.lookup(name).unwrap();
        client.within(20, std::future::poll_fn(|cx| lookup.poll_addresses(cx)))
    };
    assert_eq!(look("files.example"), Ok(vec!["10.7.7.7".parse().unwrap()]));
    assert_eq!(look("Files.Example."), Ok(vec!["10.7.7.7".parse().unwrap()]));
    assert_eq!(look("missing.example"), Err(NetError::NameNotFound));
    client.end();
    server.end();
}
