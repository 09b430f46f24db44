//! What changes between two policies: verdicts of pairs of callers and services, and definitions.

pub mod definitions;

use std::collections::{BTreeMap, BTreeSet};

use authd_common::{
    address::Address,
    tables::{IPPROTO_TCP, IPPROTO_UDP},
};
use serde::Serialize;

use self::definitions::Definition;
use super::{
    compile::{CompileError, Moment, Options, Registry, compile},
    explain::{From, Policy, To},
    model::Model,
    network::Ports,
};

/// One pair whose verdict changes, at one of the service's addresses and ports.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Change {
    pub from: String,
    pub service: String,
    pub to: String,
    pub before: String,
    pub after: String,
}

/// All that changes.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Difference {
    pub verdicts: Vec<Change>,
    /// Flows alone do not show them all: what is asked of a token, what a tool may be called with, how long a grant lives.
    pub definitions: Vec<Definition>,
}

/// Compares verdicts for all callers that either policy names, at the edges of all services that either policy names.
pub fn diff(old: &Model, new: &Model, options: &Options, moment: Moment) -> Result<Vec<Change>, CompileError> {
    let prepared = |model: &Model| -> Result<_, CompileError> {
        let mut registry = Registry::default();
        registry.assign(model, options);
        let image = compile(model, &mut registry, options, moment)?;
        Ok((registry, image))
    };
    let ((old_registry, old_image), (new_registry, new_image)) = (prepared(old)?, prepared(new)?);
    let before = Policy { model: old, registry: &old_registry, options, image: &old_image, moment };
    let after = Policy { model: new, registry: &new_registry, options, image: &new_image, moment };
    let mut places: BTreeMap<&str, BTreeSet<(Address, u8, u16)>> = BTreeMap::new();
    for service in old.services.iter().chain(&new.services) {
        let spots = places.entry(&service.name).or_default();
        for network in &service.networks {
            for ports in &service.ports {
                spots.extend(samples(ports).into_iter().map(|(protocol, port)| (network.address, protocol, port)));
            }
        }
    }
    // No packet shows who they are: the verdict is about what they show besides.
    let by_certificate: BTreeSet<&str> = old
        .peers
        .iter()
        .chain(&new.peers)
        .filter(|peer| peer.networks.is_empty())
        .map(|peer| peer.name.as_str())
        .collect();
    let callers: BTreeSet<&str> = old
        .workloads
        .iter()
        .chain(&new.workloads)
        .map(|w| w.name.as_str())
        .chain(old.peers.iter().chain(&new.peers).map(|p| p.name.as_str()))
        .chain(["unmanaged"])
        .filter(|name| !by_certificate.contains(name))
        .collect();
    let mut changes = Vec::new();
    for caller in callers {
        for (service, spots) in &places {
            for (address, protocol, port) in spots {
                let to = To { address: *address, protocol: *protocol, port: *port };
                let (old_verdict, new_verdict) = (describe(&before, caller, to), describe(&after, caller, to));
                if old_verdict != new_verdict {
                    changes.push(Change {
                        from: caller.to_owned(),
                        service: (*service).to_owned(),
                        to: to.to_string(),
                        before: old_verdict,
                        after: new_verdict,
                    });
                }
            }
        }
    }
    Ok(changes)
}

/// Verdict and reason. A rule's new name is no change.
fn describe(policy: &Policy<'_>, caller: &str, to: To) -> String {
    match From::parse(caller, policy.model) {
        None => "allowed (unmanaged)".to_owned(),
        Some(from) => {
            let explanation = policy.explain(from, to);
            format!("{} ({})", explanation.verdict, explanation.reason)
        }
    }
}

/// First and last port of a range; for `any`, one of each protocol.
fn samples(ports: &Ports) -> Vec<(u8, u16)> {
    match *ports {
        Ports::Tcp { first, last } => vec![(IPPROTO_TCP, first.max(1)), (IPPROTO_TCP, last)],
        Ports::Udp { first, last } => vec![(IPPROTO_UDP, first.max(1)), (IPPROTO_UDP, last)],
        Ports::Other(protocol) => vec![(protocol, 0)],
        Ports::Any => vec![(IPPROTO_TCP, 1), (IPPROTO_UDP, 1), (1, 0)],
    }
}
