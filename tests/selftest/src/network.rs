//! The network stack, against itself (own address) and its gateway.

use crate::report::Report;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use anykernel::Kernel;
use anykernel::socket::{NetError, Shutdown, SocketProvider, TcpListener, TcpStream, UdpSocket};
use anykernel::task::block_on_until;
use core::future::{Future, poll_fn};
use core::net::{IpAddr, Ipv4Addr, SocketAddr};
use hypercall::Host;

type Outcome = Result<(), String>;

const SECOND: u64 = 1_000_000_000;

fn net(what: &'static str) -> impl Fn(NetError) -> String {
    move |error| format!("{what}: {error}")
}

fn within<H: Host>(host: H, seconds: u64, future: impl Future<Output = Outcome>) -> Outcome {
    let deadline = host.monotonic_ns() + seconds * SECOND;
    block_on_until(host, future, Some(deadline))
        .unwrap_or_else(|| Err(format!("not done within {seconds} s")))
}

pub(crate) fn run<H: Host>(kernel: &Arc<Kernel<H>>, report: &mut Report<H>) {
    let host = kernel.host();
    let Some(sockets) = kernel.sockets() else {
        report.result("network/configured", Err("no net component runs"));
        return;
    };
    let sockets = &*sockets;
    report.result(
        "network/configured",
        within(host, 20, async {
            poll_fn(|cx| sockets.poll_configured(cx)).await.map_err(net("configuration"))
        }),
    );
    let own = own_ipv4(sockets);
    report.result("network/tcp-loopback", within(host, 30, tcp(kernel, sockets, Ipv4Addr::LOCALHOST.into())));
    match own {
        Some(own) => {
            report.result("network/tcp-own-address", within(host, 30, tcp(kernel, sockets, own)));
            report.result("network/udp", within(host, 20, udp(sockets, own)));
            report.result("network/refused", within(host, 20, refused(sockets, own)));
        }
        None => report.result("network/address", Err("no interface has an IPv4 address")),
    }
    match sockets.interfaces().iter().find_map(|interface| interface.gateways.first().copied()) {
        Some(gateway) => report.result(
            "network/ping-gateway",
            within(host, 20, async {
                let mut ping = sockets.ping(gateway).map_err(net("ping"))?;
                poll_fn(|cx| ping.poll_reply(cx)).await.map_err(net("reply")).map(|_| ())
            }),
        ),
        None => report.result("network/gateway", Err("no gateway is configured")),
    }
}

fn own_ipv4(sockets: &dyn SocketProvider) -> Option<IpAddr> {
    sockets
        .interfaces()
        .iter()
        .flat_map(|interface| interface.addresses.iter())
        .map(|(address, _)| *address)
        .find(|address| address.is_ipv4() && !address.is_loopback())
}

/// A connection to ourselves: half a megabyte each way, half-close, end of stream.
async fn tcp<H: Host>(kernel: &Arc<Kernel<H>>, sockets: &dyn SocketProvider, address: IpAddr) -> Outcome {
    const BYTES: usize = 500_000;
    let listener = sockets.listen(SocketAddr::new(address, 0), 8).map_err(net("listen"))?;
    let to = SocketAddr::new(address, listener.local_addr().port());
    let host = kernel.host();
    let echo = move || {
        let listener = TcpListener(listener);
        let _ = within(host, 25, async {
            let stream = listener.accept().await.map_err(net("accept"))?;
            let mut buffer = vec![0; 8192];
            loop {
                match stream.recv(&mut buffer).await.map_err(net("echo recv"))? {
                    0 => break,
                    n => stream.send_all(&buffer[..n]).await.map_err(net("echo send"))?,
                }
            }
            stream.0.shutdown(Shutdown::Write).map_err(net("echo shutdown"))
        });
    };
    let spec = hypercall::ThreadSpec { name: "echo", cpu: None };
    let thread = host.spawn(spec, alloc::boxed::Box::new(echo)).map_err(|error| error.to_string())?;
    let outcome = async {
        let stream = TcpStream::connect(sockets, to).await.map_err(net("connect"))?;
        let sent: Vec<u8> = (0..BYTES as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let (mut offset, mut received, mut buffer) = (0, Vec::with_capacity(BYTES), vec![0; 8192]);
        let mut closed = false;
        // Both directions at once: neither side's buffer may stall the other.
        poll_fn(|cx| {
            use core::task::Poll;
            while offset < BYTES {
                match stream.0.poll_send(cx, &sent[offset..]) {
                    Poll::Ready(Ok(n)) => offset += n,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(net("send")(error))),
                    Poll::Pending => break,
                }
            }
            if offset == BYTES && !closed {
                closed = true;
                if let Err(error) = stream.0.shutdown(Shutdown::Write) {
                    return Poll::Ready(Err(net("shutdown")(error)));
                }
            }
            loop {
                match stream.0.poll_recv(cx, &mut buffer) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Ok(())),
                    Poll::Ready(Ok(n)) => received.extend_from_slice(&buffer[..n]),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(net("recv")(error))),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await?;
        if received == sent {
            Ok(())
        } else {
            Err(format!("{} bytes came back of {BYTES}, or they differ", received.len()))
        }
    }
    .await;
    host.join(thread).map_err(|error| error.to_string())?;
    outcome
}

async fn udp(sockets: &dyn SocketProvider, address: IpAddr) -> Outcome {
    let a = UdpSocket(sockets.bind(SocketAddr::new(address, 0)).map_err(net("bind"))?);
    let b = UdpSocket(sockets.bind(SocketAddr::new(address, 0)).map_err(net("bind"))?);
    let mut buffer = [0; 2048];
    for size in [0, 1, 512, 1400] {
        let data = vec![0x5a; size];
        a.send_to(&data, b.0.local_addr()).await.map_err(net("send"))?;
        let (got, from) = b.recv_from(&mut buffer).await.map_err(net("recv"))?;
        if buffer[..got] != data[..] || from != a.0.local_addr() {
            return Err(format!("a datagram of {size} bytes came as {got} bytes from {from}"));
        }
    }
    Ok(())
}

async fn refused(sockets: &dyn SocketProvider, address: IpAddr) -> Outcome {
    match TcpStream::connect(sockets, SocketAddr::new(address, 9)).await {
        Err(NetError::Refused | NetError::Reset) => Ok(()),
        Err(error) => Err(format!("connecting to a closed port: {error}")),
        Ok(_) => Err("connecting to a closed port worked".into()),
    }
}
