//! `manifest` and `schema`.

use super::{Outcome, output_failure};
use anykernel::config::SCHEMA;
use anykernel::nearest;
use anykernel_userspace::link::Wire;
use anykernel_userspace::{ConsoleSink, Failure, HostDisk, Instance, Link};
use clap::Args;
use hypercall::ExitStatus;
use serde_json::json;
use std::io::Write;

/// Show what a component may use: hypercalls and driver contracts
#[derive(Args)]
#[command(after_help = "Examples:
  anykernel manifest            all components
  anykernel manifest net        one
  anykernel manifest --json     one JSON object a line")]
pub(super) struct Manifest {
    /// The component; all of them without it
    component: Option<String>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

impl Manifest {
    pub(super) fn run(self) -> Outcome {
        // Manifests are what components say when they start, so a small instance is started.
        let (wire, _other) = Wire::pair(1500);
        let disk = HostDisk::in_memory(&[0; 4096]).map_err(|error| Failure::new(error.to_string()))?;
        let instance = Instance::builder()
            .console(ConsoleSink::Null)
            .disk(disk)
            .link(Link::Wire(wire))
            .start()
            .map_err(|error| Failure::new(error.to_string()))?;
        let mut manifests = instance.kernel().manifests();
        // Those that a process has no use for.
        manifests.extend([
            anykernel_virtio::BLK_MANIFEST,
            anykernel_virtio::NET_MANIFEST,
            anykernel_xhci::MANIFEST,
            anykernel_usb::MANIFEST,
            anykernel_usb::PLATFORM_MANIFEST,
        ]);
        manifests.sort_by_key(|manifest| manifest.name);
        manifests.dedup_by_key(|manifest| manifest.name);
        if let Some(name) = &self.component {
            if !manifests.iter().any(|manifest| manifest.name == name) {
                let names: Vec<_> = manifests.iter().map(|manifest| manifest.name).collect();
                let hint = match nearest(name, names.iter().copied()) {
                    Some(nearest) => format!("did you mean {nearest}?"),
                    None => format!("there are {}", names.join(", ")),
                };
                return Err(Failure::usage(format!("no component is called {name:?}: {hint}")));
            }
            manifests.retain(|manifest| manifest.name == name);
        }
        let mut out = std::io::stdout().lock();
        for manifest in manifests {
            let core: Vec<_> =
                manifest.core.iter().map(|capability| format!("{capability:?}").to_lowercase()).collect();
            let contracts: Vec<_> = manifest.contracts.iter().map(ToString::to_string).collect();
            let result = if self.json {
                let line = json!({
                    "component": manifest.name, "summary": manifest.summary, "core": core,
                    "contracts": manifest.contracts.iter().map(|contract| json!({
                        "name": contract.name, "major": contract.major, "minor": contract.minor,
                    })).collect::<Vec<_>>(),
                });
                writeln!(out, "{line}")
            } else {
                let (name, summary) = (manifest.name, manifest.summary);
                let (core, contracts) = (core.join(", "), contracts.join(", "));
                writeln!(out, "{name}: {summary}\n  core:      {core}\n  contracts: {contracts}")
            };
            result.map_err(output_failure)?;
        }
        Ok(ExitStatus::Success)
    }
}

/// Print the JSON schema of the configuration document
#[derive(Args)]
#[command(after_help = "Example:
  anykernel schema > anykernel.schema.json      for your editor and your scripts")]
pub(super) struct Schema {}

impl Schema {
    pub(super) fn run(self) -> Outcome {
        std::io::stdout().lock().write_all(SCHEMA.as_bytes()).map_err(output_failure)?;
        Ok(ExitStatus::Success)
    }
}
