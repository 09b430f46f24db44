//! Who a caller is: a workload of this node, a peer at an address, an operator; and by what names each is revoked.
//!
//! Enters: a connection's other end as the kernel knows it, the policy in force. Leaves: whom rules and records name. Never:
//! what a caller says of itself.

use std::{
    fs,
    net::{IpAddr, TcpStream},
    os::unix::fs::MetadataExt,
};

use authd_common::{address::Address, tables::UNMANAGED};

use super::{Daemon, control::Who, granting::refusal};
use crate::{
    audit::record::Record,
    dataplane::{
        attestation::{self, AttestError, Attested},
        sockets::message::Owner,
    },
    grants::{Holder, proof::Shown, terms::Claimant},
    ipc::{Caller, Refusal, VouchedCaller, Workload},
    policy::{
        file::Kind,
        model::{Model, Peer},
        network::from_ip,
        pattern::instance_name,
    },
    proofs::x509::identity::VerifiedCertificate,
    store::revoked::Revoked,
};

/// A caller, under the policy in force.
pub(super) struct Known {
    pub claimant: Owned,
    pub holder: Holder,
    pub workload: u32,
    pub scope: u64,
    pub address: Address,
}

pub(super) enum Owned {
    Workload { index: usize, spiffe_id: String },
    Address(IpAddr),
}

impl Owned {
    pub fn borrow(&self) -> Claimant<'_> {
        match self {
            Self::Workload { index, spiffe_id } => Claimant::Workload { index: *index, spiffe_id },
            Self::Address(address) => Claimant::Address(*address),
        }
    }
}

impl Daemon {
    /// Who a caller is, under the policy in force.
    pub(super) fn known(&self, who: &Who) -> Result<Known, Refusal> {
        let prepared = &self.active.prepared;
        let (model, registry) = (&prepared.model, &prepared.registry);
        match who {
            Who::Remote { address, .. } => {
                let address = address.ip();
                if address.is_loopback() {
                    // Loopback is this node: who calls there is known by its cgroup.
                    let message = "callers of this node ask on the Unix socket";
                    return Err(refusal("local_caller", message));
                }
                Ok(Known {
                    claimant: Owned::Address(address),
                    holder: Holder::Address { address, netns: self.ledger.own_namespace() },
                    workload: UNMANAGED,
                    scope: self.ledger.own_namespace(),
                    address: from_ip(address),
                })
            }
            Who::Admin { .. } => {
                Err(refusal("caller_unmanaged", "operators hold no grants; workloads ask on the workloads' socket"))
            }
            Who::Local(attested) => {
                let unmanaged = || refusal("caller_unmanaged", "no workload of the policy matches the caller's cgroup");
                let path = self.base.below(&attested.cgroup).ok_or_else(unmanaged)?;
                let (number, instance, own) = self.instance_at(&path).ok_or_else(unmanaged)?;
                let name = registry.workloads.name(number).ok_or_else(unmanaged)?;
                let index = model.workloads.iter().position(|w| w.name == name).ok_or_else(unmanaged)?;
                let spiffe_id = spiffe_id(model, index, &own);
                Ok(Known {
                    claimant: Owned::Workload { index, spiffe_id },
                    holder: Holder::Workload { name: name.to_owned(), cgroup: own, instance },
                    workload: number,
                    scope: instance,
                    address: Address::UNSPECIFIED,
                })
            }
        }
    }

    /// Everybody whose grants are a caller's.
    pub(super) fn holders(&self, who: &Who) -> Result<Vec<Holder>, Refusal> {
        let known = self.known(who)?;
        Ok([known.holder].into_iter().chain(self.vouched_for(who).map(|caller| caller.holder())).collect())
    }

    /// Who made the socket at the other end of a connection to the loopback listener.
    pub(super) fn attest_maker(&mut self, connection: &TcpStream) -> Result<Who, AttestError> {
        let Owner { uid, cgroup } = attestation::maker(connection)?;
        // A cgroup that is not below the enforced one is nobody's of the policy.
        // The whole tree is walked for one that is not there: nobody makes this process do it all the time.
        if self.strangers.contains(&cgroup) {
            return Err(AttestError::NoCgroup);
        }
        let Some(path) = self.tree.path_of(cgroup) else {
            self.strangers.insert(cgroup);
            return Err(AttestError::NoCgroup);
        };
        // Another one may have its path by now.
        let there = fs::metadata(self.base.path.join(path.trim_start_matches('/')));
        if there.is_ok_and(|found| found.ino() == cgroup) {
            Ok(Who::Local(Attested { pid: 0, uid, cgroup: self.base.above(&path) }))
        } else {
            Err(AttestError::NoCgroup)
        }
    }

    /// Workload number, instance and the instance's path, of a cgroup below the enforced root.
    pub(super) fn instance_at(&self, path: &str) -> Option<(u32, u64, String)> {
        let entry = self.tree.nearest(path)?;
        (entry.workload != UNMANAGED).then(|| {
            let own = self.active.patterns.instance_path(path).unwrap_or(path).to_owned();
            (entry.workload, entry.instance, own)
        })
    }

    /// What is known of a local caller, for control and for records.
    pub fn introduce(&self, who: &Who) -> Caller {
        match who {
            Who::Remote { address, .. } => {
                let vouched = self.vouched_for(who).map(|caller| VouchedCaller {
                    node: caller.node.clone(),
                    spiffe_id: caller.spiffe_id.as_str().to_owned(),
                });
                Caller::Remote { address: *address, vouched }
            }
            Who::Admin { uid, .. } => Caller::Admin { uid: *uid },
            Who::Local(attested) => {
                let workload = self.known(who).ok().and_then(|known| match (known.holder, known.claimant) {
                    (Holder::Workload { name, cgroup, .. }, Owned::Workload { spiffe_id, .. }) => {
                        Some(Workload { name, spiffe_id, cgroup })
                    }
                    _ => None,
                });
                Caller::Local { workload, uid: attested.uid, tcp: attested.pid == 0 }
            }
        }
    }

    /// The same for a record.
    pub fn describe(&self, who: &Who, record: &mut Record) {
        match who {
            Who::Remote { address, .. } => {
                record.remote_address = Some(address.ip());
                record.remote_port = Some(address.port());
                if let Some(caller) = self.vouched_for(who) {
                    record.peer_node = Some(caller.node.clone());
                    record.peer_spiffe_id = Some(caller.spiffe_id.as_str().to_owned());
                }
            }
            Who::Admin { uid, .. } => record.uid = Some(*uid),
            Who::Local(attested) => {
                record.pid = Some(attested.pid);
                record.uid = Some(attested.uid);
                record.cgroup = Some(attested.cgroup.clone());
                if let Caller::Local { workload: Some(workload), .. } = self.introduce(who) {
                    record.workload = Some(workload.name);
                    record.spiffe_id = Some(workload.spiffe_id);
                    record.cgroup = Some(workload.cgroup);
                }
            }
        }
    }
}

pub(super) fn spiffe_id(model: &Model, index: usize, own: &str) -> String {
    let path = model.workloads[index].spiffe_path.replace("{instance}", &instance_name(own));
    format!("spiffe://{}{path}", model.trust_domain)
}

/// Everything by which a holder is revoked, besides its proofs.
pub(super) fn holder_names(holder: &Holder, proofs: &[Shown], model: &Model) -> Vec<Revoked> {
    match holder {
        Holder::Workload { name, cgroup, .. } => {
            let mut names = vec![Revoked::Workload(name.clone()), Revoked::Instance(cgroup.clone())];
            if let Some(index) = model.workloads.iter().position(|w| w.name == *name) {
                names.push(Revoked::SpiffeId(spiffe_id(model, index, cgroup)));
                if model.workloads[index].kind == Kind::Agent {
                    names.push(Revoked::Agent(name.clone()));
                }
            }
            names
        }
        Holder::Address { address, .. } => peer_names(Some(*address), proofs, model),
        Holder::Vouched { spiffe_id, .. } => {
            let meant = model.peers.iter().filter(|peer| peer.spiffe_id.as_ref() == Some(spiffe_id));
            meant.map(|peer| Revoked::Peer(peer.name.clone())).collect()
        }
    }
}

/// Peers that whoever calls from an address with these proofs may be; without an address, through a proxy, only the
/// certificate tells.
pub(super) fn peer_names(address: Option<IpAddr>, proofs: &[Shown], model: &Model) -> Vec<Revoked> {
    let certificate: Option<&VerifiedCertificate> = proofs.iter().find_map(|shown| match shown {
        Shown::Mtls(certificate) => Some(&**certificate),
        _ => None,
    });
    let is_meant = |peer: &&Peer| {
        let calls_from = |address: IpAddr| peer.networks.iter().any(|network| network.contains(&from_ip(address)));
        let from_there = peer.networks.is_empty() || address.is_none_or(calls_from);
        let named = match peer.has_certificate() {
            true => certificate.is_some_and(|certificate| peer.is_named_by(certificate)),
            false => address.is_some(),
        };
        from_there && named
    };
    model.peers.iter().filter(is_meant).map(|peer| Revoked::Peer(peer.name.clone())).collect()
}

pub(super) fn is_same_holder(one: &Holder, other: &Holder) -> bool {
    match (one, other) {
        (Holder::Workload { name, instance, .. }, Holder::Workload { name: other, instance: others, .. }) => {
            name == other && instance == others
        }
        (one, other) => one == other,
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::{
        policy::{diagnostic::Source, load::texts},
        proofs::testing,
    };

    const POLICY: &str = r#"
        trust_domain = "example.org"
        [[authority]]
        name = "ca"
        bundle = "ca.crt"
        trust_domain = "other.example"
        [[peer]]
        name = "by-network"
        networks = ["192.0.2.0/24"]
        [[peer]]
        name = "by-certificate"
        spiffe_id = "spiffe://other.example/a"
        [[peer]]
        name = "by-both"
        networks = ["192.0.2.0/24"]
        spiffe_id = "spiffe://other.example/b"
    "#;

    fn certificate(id: &str) -> Shown {
        Shown::Mtls(Box::new(testing::certificate("ca", id, Timestamp::MAX)))
    }

    /// A peer of which only its certificate is known can be revoked too, wherever it calls from.
    #[test]
    fn a_peer_is_revoked_by_whatever_it_is_known_by() {
        let policy = texts(vec![Source { name: "p.toml".into(), text: POLICY.into() }]);
        let model = policy.model.unwrap_or_else(|| panic!("{:?}", policy.diagnostics));
        let names = |address: Option<[u8; 4]>, proofs: &[Shown]| -> Vec<String> {
            let names = peer_names(address.map(IpAddr::from), proofs, &model);
            names.iter().map(|name| name.to_string().replace("peer ", "")).collect()
        };
        let (a, b) = (certificate("spiffe://other.example/a"), certificate("spiffe://other.example/b"));
        let (inside, outside) = (Some([192, 0, 2, 7]), Some([203, 0, 113, 7]));
        assert_eq!(names(inside, &[]), ["by-network"]);
        assert_eq!(names(outside, &[]), [""; 0]);
        assert_eq!(names(outside, std::slice::from_ref(&a)), ["by-certificate"]);
        assert_eq!(names(inside, &[a]), ["by-network", "by-certificate"]);
        assert_eq!(names(inside, std::slice::from_ref(&b)), ["by-network", "by-both"]);
        assert_eq!(names(outside, std::slice::from_ref(&b)), [""; 0]);
        assert_eq!(names(None, &[b]), ["by-both"]);
        assert_eq!(names(None, &[]), [""; 0]);
    }
}
