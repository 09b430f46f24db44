//! Sockets of flows whose grants ended: found, and closed under their applications.
//!
//! Enters: grants that ended. Leaves: how many flows rested on them, and which sockets could not be closed. Never: a packet's
//! fate, which the grant's slot decided before.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use authd_common::tables::{Grant, Tag};

use super::Daemon;
use crate::{
    dataplane::{
        object,
        sockets::{
            self, Destroyed,
            message::{Protocol, Socket},
            namespaces::Namespace,
        },
    },
    grants::flows::{Flow, Key},
};

/// After a list of sockets that is not complete, there is another one no earlier than this.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

impl Daemon {
    /// Destroys the sockets of flows that rested on grants that ended. Their packets are dropped already.
    pub(super) fn close_sockets(&mut self, ended: &[Grant]) -> (usize, Destroyed) {
        if ended.is_empty() {
            return (0, Destroyed::default());
        }
        self.catch_up();
        let now = Instant::now();
        self.find_flows();
        let flows: Vec<Flow> = ended.iter().flat_map(|grant| self.ledger.flows.take(*grant)).collect();
        let sockets: Vec<sockets::Flow> = flows.iter().filter_map(socket_of).collect();
        let result = self.ledger.sockets.destroy(&sockets, now);
        for (flow, error) in result.failed.iter().take(3) {
            tracing::warn!(?flow, %error, "a socket stays open; its packets are dropped");
        }
        (flows.len(), result)
    }

    /// Learns of flows of which no event told. Before anything is revoked, so that no revocation waits for it.
    pub fn find_flows(&mut self) {
        let now = Instant::now();
        if !self.ledger.flows.is_complete() || self.ledger.look_again.is_some_and(|at| at <= now) {
            self.look_at_sockets(now);
        }
    }

    /// Lists the kernel's sockets with what they remember: events were lost, or were an earlier daemon's.
    fn look_at_sockets(&mut self, now: Instant) {
        let discovered = self.ledger.sockets.discover();
        let tags = self.writer.maps().tags.as_fd();
        let dumped = self.ledger.sockets.dump(tags, &discovered.namespaces, now);
        for found in &dumped.found {
            let Some(tag) = found.tag.as_deref().and_then(object::tag) else { continue };
            if tag.grant.is_some() {
                self.ledger.flows.enter(flow_of(&found.flow, &tag), tag.grant);
            }
        }
        self.ledger.flows.complete();
        // Where it may not look now, it may later; but not with every revocation, each of which would wait for it.
        let is_blind = !dumped.failed.is_empty() || discovered.incomplete.is_some();
        self.ledger.look_again = is_blind.then(|| now + LOOK_AGAIN);
    }
}

/// The socket of a flow, if the kernel can close it: protocols without ports have none of their own.
fn socket_of(flow: &Flow) -> Option<sockets::Flow> {
    let Key { cookie, remote, remote_port, protocol } = flow.key;
    Some(sockets::Flow {
        namespace: Namespace { cookie: flow.netns, pid: flow.pid },
        socket: Socket {
            protocol: Protocol::from_number(protocol)?,
            local: flow.local,
            local_port: flow.local_port,
            remote,
            remote_port,
            interface: 0,
            cookie,
        },
    })
}

fn flow_of(found: &sockets::Flow, tag: &Tag) -> Flow {
    let Socket { protocol, local, local_port, remote, remote_port, cookie, .. } = found.socket;
    Flow {
        key: Key { cookie, remote, remote_port, protocol: protocol.number() },
        netns: found.namespace.cookie,
        pid: tag.pid,
        local,
        local_port,
    }
}
