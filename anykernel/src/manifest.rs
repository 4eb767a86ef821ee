//! Manifests: what a component may use, checked before it starts.

use alloc::string::{String, ToString};
use core::fmt;
use hypercall::{Call, ContractVersion, Grants};
use serde_json::{Value, json};

pub use hypercall::Capability;

/// What a component is and may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Manifest {
    /// `net`, `vfs`, `ext4`, `virtio-blk`.
    pub name: &'static str,
    /// One line for a person.
    pub summary: &'static str,
    /// Capabilities of the core contract.
    pub core: &'static [Capability],
    /// Contracts with the versions it was compiled against; the core contract always among them.
    pub contracts: &'static [ContractVersion],
}

impl Manifest {
    /// Everything it may use: what [`hypercall::layers::Granted`] holds it to.
    pub fn grants(&self) -> Grants {
        let drivers = self.contracts.iter().filter_map(|contract| Capability::of_contract(contract.name));
        drivers.fold(Grants::of(self.core), Grants::and)
    }

    /// The hypercalls it may make, in the order of the contracts.
    pub fn calls(&self) -> impl Iterator<Item = Call> {
        let grants = self.grants();
        Call::ALL.iter().copied().filter(move |call| grants.has(call.capability()))
    }

    /// As one line of JSON: `component`, `summary`, `core` (names of capabilities), `contracts` (`name`, `major`,
    /// `minor`) and `hypercalls` (names).
    pub fn to_json(&self) -> String {
        let contract =
            |one: &ContractVersion| json!({"name": one.name, "major": one.major, "minor": one.minor});
        json!({
            "component": self.name,
            "summary": self.summary,
            "core": self.core.iter().map(|one| one.name()).collect::<Value>(),
            "contracts": self.contracts.iter().map(contract).collect::<Value>(),
            "hypercalls": self.calls().map(Call::name).collect::<Value>(),
        })
        .to_string()
    }
}

/// For a person: a line that says what it is, one for each capability with its hypercalls, one with the contracts.
impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.summary)?;
        let grants = self.grants();
        for capability in Capability::ALL.iter().filter(|one| grants.has(**one)) {
            write!(f, "\n  {:<8}", capability.name())?;
            for call in capability.calls() {
                write!(f, " {}", call.name())?;
            }
        }
        write!(f, "\n  built against")?;
        for (index, contract) in self.contracts.iter().enumerate() {
            write!(f, "{} {contract}", if index > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kernel;
    use crate::config::Config;
    use alloc::format;
    use hypercall::testing::TestHost;

    const PROBE: Manifest = Manifest {
        name: "probe",
        summary: "a \"test\"",
        core: &[Capability::Clock, Capability::Entropy],
        contracts: &[ContractVersion::CORE, ContractVersion::BLOCK],
    };

    #[test]
    fn tells_people_and_programs_the_same() {
        assert_eq!(
            format!("{PROBE}"),
            "probe: a \"test\"\n  clock    monotonic_ns realtime_ns\n  entropy  fill_random\n  \
             block    disk_count disk_info disk_read disk_write disk_flush\n  built against core 1.0, block 1.0"
        );
        let value: Value = serde_json::from_str(&PROBE.to_json()).unwrap();
        assert_eq!(value["component"], "probe");
        assert_eq!(value["summary"], "a \"test\"");
        assert_eq!(value["core"], json!(["clock", "entropy"]));
        assert_eq!(value["contracts"][1], json!({"name": "block", "major": 1, "minor": 0}));
        assert_eq!(value["hypercalls"].as_array().unwrap().len(), 8);
    }

    #[test]
    fn grants_are_what_it_lists() {
        let grants = PROBE.grants();
        assert!(grants.has(Capability::Clock) && grants.has(Capability::Block));
        assert!(!grants.has(Capability::Link) && !grants.has(Capability::Threads));
    }

    #[test]
    fn a_component_of_another_release_is_not_admitted() {
        let kernel = Kernel::new(TestHost::new(), Config::default());
        assert_eq!(kernel.admit(PROBE), Ok(()));
        const FUTURE: &[ContractVersion] = &[ContractVersion::new("core", 2, 0)];
        const UNKNOWN: &[ContractVersion] = &[ContractVersion::CORE, ContractVersion::new("nvme", 1, 0)];
        let future = Manifest { contracts: FUTURE, ..PROBE };
        assert_eq!(
            format!("{}", kernel.admit(future).unwrap_err()),
            "probe: the component needs contract core 2.0, this host has core 1.0: build both from one release"
        );
        let unknown = Manifest { contracts: UNKNOWN, ..PROBE };
        assert_eq!(
            format!("{}", kernel.admit(unknown).unwrap_err()),
            "probe: the component needs contract nvme 1.0, which this host does not have"
        );
        let silent = Manifest { contracts: &[], ..PROBE };
        assert_eq!(
            format!("{}", kernel.admit(silent).unwrap_err()),
            "probe: its manifest does not say which core contract it was built against"
        );
        assert_eq!(kernel.manifests(), [PROBE]);
    }
}
