//! Our numbers are those of the `virtio-spec` crate.

use crate::spec;
use virtio_spec::{blk, net};

#[test]
fn features_agree_with_virtio_spec() {
    let common = [
        (spec::feature::INDIRECT_DESC, virtio_spec::F::INDIRECT_DESC),
        (spec::feature::EVENT_IDX, virtio_spec::F::EVENT_IDX),
        (spec::feature::VERSION_1, virtio_spec::F::VERSION_1),
        (spec::feature::ACCESS_PLATFORM, virtio_spec::F::ACCESS_PLATFORM),
    ];
    for (ours, theirs) in common {
        assert_eq!(u128::from(ours), theirs.bits().to_ne(), "{theirs:?}");
    }
    let blk = [
        (spec::blk::F_SIZE_MAX, blk::F::SIZE_MAX),
        (spec::blk::F_SEG_MAX, blk::F::SEG_MAX),
        (spec::blk::F_RO, blk::F::RO),
        (spec::blk::F_BLK_SIZE, blk::F::BLK_SIZE),
        (spec::blk::F_FLUSH, blk::F::FLUSH),
        (spec::blk::F_MQ, blk::F::MQ),
    ];
    for (ours, theirs) in blk {
        assert_eq!(u128::from(ours), theirs.bits().to_ne(), "{theirs:?}");
    }
    let net = [
        (spec::net::F_CSUM, net::F::CSUM),
        (spec::net::F_GUEST_CSUM, net::F::GUEST_CSUM),
        (spec::net::F_MTU, net::F::MTU),
        (spec::net::F_MAC, net::F::MAC),
        (spec::net::F_GUEST_TSO4, net::F::GUEST_TSO4),
        (spec::net::F_GUEST_TSO6, net::F::GUEST_TSO6),
        (spec::net::F_HOST_TSO4, net::F::HOST_TSO4),
        (spec::net::F_HOST_TSO6, net::F::HOST_TSO6),
        (spec::net::F_MRG_RXBUF, net::F::MRG_RXBUF),
        (spec::net::F_STATUS, net::F::STATUS),
        (spec::net::F_CTRL_VQ, net::F::CTRL_VQ),
        (spec::net::F_MQ, net::F::MQ),
    ];
    for (ours, theirs) in net {
        assert_eq!(u128::from(ours), theirs.bits().to_ne(), "{theirs:?}");
    }
}
