//! Counters of the component. Every frame that is not used has a reason with a counter.

use anykernel::counter::Counter;

macro_rules! counters {
    ($($(#[$doc:meta])* $field:ident = $name:literal,)*) => {
        /// All counters of the stack, shared by its shards.
        #[derive(Debug, Clone, Default)]
        pub struct NetCounters {
            $($(#[$doc])* pub $field: Counter,)*
        }

        impl NetCounters {
            /// Makes every counter by its name.
            pub fn new(mut by_name: impl FnMut(&str) -> Counter) -> Self {
                Self { $($field: by_name($name),)* }
            }
        }
    };
}

counters! {
    /// Frames received.
    rx_frames = "net.rx_frames",
    /// Bytes received, Ethernet headers included.
    rx_bytes = "net.rx_bytes",
    /// Frames sent.
    tx_frames = "net.tx_frames",
    /// Bytes sent, Ethernet headers included.
    tx_bytes = "net.tx_bytes",
    /// Frames passed to another shard.
    steered = "net.steered",
    /// Packets of others passed on.
    forwarded = "net.forwarded",
    /// TCP connections accepted.
    accepted = "net.tcp.accepted",
    /// TCP connections opened by us and established.
    connected = "net.tcp.connected",
    /// Resets sent to segments that no connection wanted.
    resets_sent = "net.tcp.resets_sent",
    /// Connections given up because the peer fell silent.
    timeouts = "net.tcp.timeouts",
    /// Connections reset by the peer.
    resets_received = "net.tcp.resets_received",
    /// Connections whose segments routers may cut, because a router asked for shorter ones.
    fragmentable = "net.tcp.fragmentable",
    /// Connections whose segments became shorter, because a router asked for it.
    narrowed = "net.tcp.narrowed",
    /// Connections that waited for nothing and were made to go on.
    roused = "net.tcp.roused",
    /// SYN-ACKs sent again.
    synack_retries = "net.tcp.synack_retries",
    /// Dropped: shorter than its headers say, or a header that makes no sense.
    drop_malformed = "net.drop.malformed",
    /// Dropped: not for our link or IP address.
    drop_not_ours = "net.drop.not_ours",
    /// Dropped: a packet of others whose time to live was over.
    drop_ttl = "net.drop.ttl",
    /// Dropped: a packet of others that there is no route for, or that may not be passed on.
    drop_no_route = "net.drop.no_route",
    /// Dropped: a packet of others that is too long for its next link and may not be cut.
    drop_too_long = "net.drop.too_long",
    /// Dropped: a wrong IP, TCP, UDP or ICMP checksum.
    drop_checksum = "net.drop.checksum",
    /// Dropped: an EtherType, protocol or message that we do not speak.
    drop_protocol = "net.drop.protocol",
    /// Dropped: an address that may not appear there (multicast source, loopback on a wire).
    drop_address = "net.drop.address",
    /// Dropped: fragments that overlap, are late, or exceed the bounds of reassembly.
    drop_fragment = "net.drop.fragment",
    /// Dropped: data beyond the window, or behind the end that the peer named.
    drop_window = "net.drop.window",
    /// Dropped: no listener, socket or connection for it (answered with an error where one is due).
    drop_no_socket = "net.drop.no_socket",
    /// Dropped: the backlog of a listener was full.
    drop_backlog = "net.drop.backlog",
    /// Dropped: the limit of connections was reached, or no memory was left for one.
    drop_no_memory = "net.drop.no_memory",
    /// Dropped: the receive queue of a UDP socket was full.
    drop_udp_full = "net.drop.udp_full",
    /// Dropped: the ring between two shards was full.
    drop_ring_full = "net.drop.ring_full",
    /// Dropped: the transmit queue stayed full.
    drop_tx_full = "net.drop.tx_full",
    /// Dropped: the next hop did not answer ARP or NDP, or too much waited for it.
    drop_unresolved = "net.drop.unresolved",
    /// Dropped: ARP or NDP messages that nobody asked for.
    drop_neighbor = "net.drop.neighbor",
    /// Dropped: a message that our rate limit kept from being answered.
    drop_rate_limit = "net.drop.rate_limit",
}
