//! The net component: Ethernet, IP, UDP, TCP, and the NIC drivers of the host-link kind.
