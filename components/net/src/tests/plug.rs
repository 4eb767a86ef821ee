//! Interfaces that come and go while the stack runs.

use super::world::{SECOND, Spec, World};
use anykernel::socket::NetError;

/// Unplugged, its connections fail at once; plugged in again, new ones work. A second interface gets a number of its own.
#[test]
fn an_interface_goes_and_comes_back() {
    for shards in [1, 3] {
        let specs = [Spec { shards, ..Spec::v4(1) }, Spec::v4(2)];
        let mut world = World::new(&specs);
        world.listen(1, "10.0.0.2:80", 8);
        for round in 0..3 {
            let local = std::format!("10.0.0.1:{}", 50_000 + round);
            let flow = world.connect(0, &local, "10.0.0.2:80").unwrap();
            assert!(world.run(SECOND, |world| world.connected(0, flow) == Some(Ok(()))), "round {round}");
            assert!(world.send(0, flow, &[7; 3000]).is_some_and(|sent| sent.is_ok()));
            world.unplug(0);
            let told = |world: &mut World| world.recv(0, flow) == Some(Err(NetError::AddrNotAvailable));
            assert!(world.run(SECOND, told), "{shards} shards, round {round}");
            assert!(world.nodes[0].shards.iter().all(|shard| !shard.routes.is_ours([10, 0, 0, 1].into())));
            world.plug(0, 0, &specs[0]);
            world.settle();
        }
        world.plug(0, 1, &Spec::v4(3));
        world.settle();
        for shard in &world.nodes[0].shards {
            assert!(shard.routes.is_ours([10, 0, 0, 1].into()) && shard.routes.is_ours([10, 0, 0, 3].into()));
            assert_eq!((shard.io.ports.len(), shard.routes.interfaces.len()), (2, 2));
        }
    }
}
