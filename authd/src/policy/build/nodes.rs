//! Other nodes, and rules that ask for their word.

use std::{collections::HashMap, net::SocketAddr};

use toml::Spanned;

use super::{Builder, place};
use crate::{
    policy::{
        diagnostic::{Diagnostic, Place, Source},
        file::{self, Proof},
        model::{Model, Node, Object, Peer, SpiffePattern, Subject},
        network::{Network, Ports},
    },
    proofs::x509::spiffe::SpiffeId,
};

/// What only one node can have, and where it was first.
#[derive(Default)]
struct Taken {
    names: HashMap<String, Place>,
    spiffe_ids: HashMap<SpiffeId, Place>,
    /// With the number of the node.
    networks: HashMap<Network, (usize, Place)>,
}

impl Builder {
    pub(super) fn nodes(&mut self, raw: Vec<(Source, Spanned<file::Node>)>, model: &Model) -> Vec<Node> {
        let mut taken = Taken::default();
        raw.into_iter()
            .enumerate()
            .filter_map(|(index, (source, raw))| self.node(&source, index, raw.into_inner(), &mut taken, model))
            .collect()
    }

    fn node(
        &mut self,
        source: &Source,
        index: usize,
        raw: file::Node,
        taken: &mut Taken,
        model: &Model,
    ) -> Option<Node> {
        let file::Node { name, spiffe_id, authority, address, networks, speaks_for } = raw;
        let at = place(source, name.span());
        self.name(&at, name.as_ref());
        if let Some(first) = taken.names.get(name.as_ref()) {
            self.duplicate(&at, first, "node", name.as_ref());
        } else {
            taken.names.insert(name.as_ref().clone(), at.clone());
        }
        let named = authority.is_some();
        let authority = authority.and_then(|name| self.named_authority(source, &name));
        let known = !named || authority.is_some();
        let spiffe_id = self.node_id(source, spiffe_id, authority, known, taken, model);
        if let Some(first) = networks.first()
            && address.is_none()
        {
            self.error(
                "no_node_address",
                &place(source, first.span()),
                format!("nothing says where the authd of node `{}` is told who calls there", name.as_ref()),
                "add `address = \"192.0.2.2:7443\"`, or remove `networks`",
            );
        }
        let address = address.and_then(|text| self.node_address(source, &text));
        let networks = self.node_networks(source, index, networks, taken);
        let speaks_for = speaks_for.into_iter().filter_map(|text| self.pattern(source, &text)).collect();
        Some(Node {
            name: name.into_inner(),
            spiffe_id: spiffe_id?,
            authority,
            address,
            networks,
            speaks_for,
            place: at,
        })
    }

    fn node_id(
        &mut self,
        source: &Source,
        text: Spanned<String>,
        authority: Option<usize>,
        known: bool,
        taken: &mut Taken,
        model: &Model,
    ) -> Option<SpiffeId> {
        let at = place(source, text.span());
        let id = self.spiffe_id(source, text)?;
        if model.authorities.is_empty() {
            self.error(
                "no_authority",
                &at,
                "the node shows a certificate, and no authority vouches for any",
                "define an `[[authority]]` with the bundle of its CAs",
            );
        } else if known {
            self.spoken_for(&at, &id, authority, model);
        }
        if let Some(first) = taken.spiffe_ids.get(&id) {
            let diagnostic = Diagnostic::error(
                "shared_spiffe_id",
                at,
                format!("two nodes are `{id}`: nothing would tell them apart"),
                "give each node's authd a certificate of its own",
            );
            self.diagnostics.push(diagnostic.with_related(first, "the other one"));
        } else {
            taken.spiffe_ids.insert(id.clone(), at);
        }
        Some(id)
    }

    fn node_address(&mut self, source: &Source, text: &Spanned<String>) -> Option<SocketAddr> {
        let listens = |address: &SocketAddr| {
            let ip = address.ip().to_canonical();
            address.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && ip == address.ip()
        };
        let address = text.as_ref().parse().ok().filter(listens);
        if address.is_none() {
            self.error(
                "bad_address",
                &place(source, text.span()),
                format!("`{}` is no address and port where an authd could listen", text.as_ref()),
                "write `192.0.2.2:7443` or `[2001:db8::2]:7443` (names are not resolved)",
            );
        }
        address
    }

    /// Of nested networks the more exact one says whose it is; the same one cannot be two nodes'.
    fn node_networks(
        &mut self,
        source: &Source,
        node: usize,
        texts: Vec<Spanned<String>>,
        taken: &mut Taken,
    ) -> Vec<Network> {
        let mut networks = Vec::new();
        for text in texts {
            let at = place(source, text.span());
            let Some(network) = self.network(&at, text.as_ref()) else { continue };
            networks.push(network);
            match taken.networks.get(&network) {
                None => drop(taken.networks.insert(network, (node, at))),
                Some((other, first)) if *other != node => {
                    let diagnostic = Diagnostic::error(
                        "shared_network",
                        at,
                        format!("`{network}` belongs to two nodes, and a connection to there is for one"),
                        "leave it to one of them, or write more exact networks",
                    );
                    self.diagnostics.push(diagnostic.with_related(first, "the other one"));
                }
                Some(_) => {}
            }
        }
        networks.sort();
        networks.dedup();
        networks
    }

    fn pattern(&mut self, source: &Source, text: &Spanned<String>) -> Option<SpiffePattern> {
        match text.as_ref().parse() {
            Ok(pattern) => Some(pattern),
            Err(error) => {
                self.error(
                    "bad_spiffe_id",
                    &place(source, text.span()),
                    format!("`{}` stands for no callers: it {error}", text.as_ref()),
                    "write a SPIFFE ID in full, or `spiffe://example.org/ns/*` for all below a path: `*` is a whole \
                     last part",
                );
                None
            }
        }
    }

    /// Where a rule asks for a node's word, if it does.
    pub(super) fn node_place(&self, source: &Source, require: &[Spanned<Proof>]) -> Option<Place> {
        require.iter().find(|proof| *proof.as_ref() == Proof::Node).map(|proof| place(source, proof.span()))
    }

    /// A node vouches for SPIFFE IDs of its own callers, in their TCP connections to services of this node.
    pub(super) fn vouchable(
        &mut self,
        rule: &Place,
        node: &Place,
        proofs: &[Proof],
        subjects: &[(Subject, Place)],
        objects: &[(Object, Place)],
        model: &Model,
    ) {
        if proofs.contains(&Proof::Cgroup) {
            self.error(
                "mixed_proofs",
                node,
                "whom this kernel attests is on this node, and whom another node vouches for is not",
                "require one of them, or write two rules: either lets callers in then",
            );
        }
        for (subject, at) in subjects {
            self.vouchable_caller(at, *subject, model);
        }
        let any = subjects.iter().any(|(subject, _)| *subject == Subject::Any);
        for (object, at) in objects {
            self.vouchable_service(at, *object, any, model);
        }
        let peers: Vec<&Peer> = subjects
            .iter()
            .filter_map(|(subject, _)| match subject {
                Subject::Peer(index) => Some(&model.peers[*index]),
                _ => None,
            })
            .collect();
        // Who calls is known by a grant of its identity, where from by the cell: the kernel does not pair them.
        let differ = |with: fn(&Peer, &Peer) -> bool| peers.windows(2).any(|two| !with(two[0], two[1]));
        if !any && differ(|a, b| a.spiffe_id == b.spiffe_id) && differ(|a, b| a.networks == b.networks) {
            self.error(
                "mixed_peers",
                rule,
                "the rule's peers differ in SPIFFE ID and in networks, and each would be let in from the others' networks",
                "write a rule for each",
            );
        }
    }

    fn vouchable_caller(&mut self, at: &Place, subject: Subject, model: &Model) {
        match subject {
            Subject::Any => {}
            Subject::Unmanaged | Subject::Workload(_) => {
                let who = match subject {
                    Subject::Workload(index) => format!("`{}` is", model.workloads[index].name),
                    _ => "unmanaged processes are".to_owned(),
                };
                self.error(
                    "local_caller",
                    at,
                    format!("{who} on this node, and no other node vouches for its callers"),
                    "write a rule of their own for callers of this node: `cgroup` is their proof",
                );
            }
            Subject::Peer(index) => {
                let peer = &model.peers[index];
                if peer.dns.is_some() || peer.subject.is_some() {
                    self.error(
                        "unvouched_peer",
                        at,
                        format!("peer `{}` is known by `dns` or `subject`, and nodes vouch for SPIFFE IDs", peer.name),
                        "name a peer with `spiffe_id`, or require `mtls`",
                    );
                }
            }
        }
    }

    fn vouchable_service(&mut self, at: &Place, object: Object, any_caller: bool, model: &Model) {
        let help = "name services with `workload = ...`";
        let Object::Service(index) = object else {
            self.error(
                "unvouched_service",
                at,
                "a node's word counts where a connection is accepted, and `any` is more than services of this node",
                help,
            );
            return;
        };
        let service = &model.services[index];
        // Of other callers this is said elsewhere.
        if service.workload.is_none() && any_caller {
            let message =
                format!("a node's word counts where a connection is accepted, and `{}` is elsewhere", service.name);
            self.error("unvouched_service", at, message, help);
        }
        if !service.ports.iter().any(|ports| matches!(ports, Ports::Tcp { .. } | Ports::Any)) {
            self.error(
                "no_tcp",
                at,
                format!("a node vouches in the SYN of TCP, and `{}` has no TCP port", service.name),
                "require another proof",
            );
        }
    }
}
