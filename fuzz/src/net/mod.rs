//! The network stack as it runs in a process: the component, its NIC driver over a host link, and the other end of that
//! link played from the input.

pub mod dhcp;
pub mod dns;
pub mod frames;
pub mod hostlink;
pub mod tcp;
pub mod wire;

use crate::host::{FuzzHost, Script};
use anykernel::Kernel;
use anykernel::config::{Config, Interface};
use anykernel::socket::SocketProvider;
use hypercall::LinkInfo;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// An instance with a network.
pub struct Station {
    /// Its host.
    pub host: FuzzHost,
    /// The instance.
    pub kernel: Arc<Kernel<FuzzHost>>,
    /// Its sockets.
    pub sockets: Arc<dyn SocketProvider>,
}

/// The configuration of 10.0.0.2, whose router and name server is 10.0.0.1.
pub fn static_config(ipv6: &str) -> Config {
    let interface = Interface {
        routes: Vec::new(),
        ipv4: "10.0.0.2/24".into(),
        ipv6: ipv6.into(),
        gateway: Some("10.0.0.1".into()),
        dns: vec!["10.0.0.1".into()],
        ..Interface::default()
    };
    let mut config = Config { interfaces: vec![interface], ..Config::default() };
    (config.tcp.receive_bytes, config.tcp.send_bytes, config.tcp.connections) = (8192, 8192, 16);
    config
}

impl Station {
    /// Starts the stack on a link with this description.
    pub fn start(config: Config, info: LinkInfo) -> Option<Self> {
        let host = FuzzHost::fresh();
        host.link(|link| link.info = Some(info));
        let kernel = Kernel::new(host, config);
        let started = anykernel_net::hostlink::register(&kernel).and_then(|()| anykernel_net::start(&kernel));
        match (started, kernel.sockets()) {
            (Ok(()), Some(sockets)) => Some(Self { host, kernel, sockets }),
            _ => {
                kernel.shutdown();
                None
            }
        }
    }

    /// On an ordinary Ethernet link.
    pub fn ordinary(config: Config) -> Self {
        Self::start(config, LinkInfo { mac: wire::STACK_MAC, mtu: 1500 }).expect("an ordinary link")
    }

    /// Runs the stack until `script` is over.
    pub fn run(self, script: impl Script + 'static) {
        self.host.run_thread(script);
        self.kernel.shutdown();
    }
}

/// A context whose waker does nothing: scripts poll again by themselves.
pub fn context() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

/// What a poll gave, if anything.
pub fn ready<T>(poll: Poll<T>) -> Option<T> {
    match poll {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// A time that may pass, in nanoseconds: from the blink of an eye to minutes.
pub fn pause(choice: u8) -> u64 {
    const MS: u64 = 1_000_000;
    [MS, 12 * MS, 45 * MS, 250 * MS, 1001 * MS, 3100 * MS, 11_000 * MS, 61_000 * MS, 601_000 * MS]
        [usize::from(choice) % 9]
}
