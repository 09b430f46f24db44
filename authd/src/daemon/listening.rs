//! What the SYN of a connection to this node's own listener says of its caller.
//!
//! Enters: a connection that was accepted. Leaves: the label by which another node vouches for who opened it. Never: a label
//! that was not said truly, or that was said before for the same connection.

use std::os::fd::BorrowedFd;

use authd_common::{
    parse::parse,
    syn::{self, NodeKey, NodeKeyId, Speaker, Speakers, Spoken},
    tables::{FlowKey, root_flags},
};

use super::{Daemon, clock, control::Who};
use crate::dataplane::{introductions, object::NodeMaps};

impl Daemon {
    /// Whom another node vouches that a caller of the listener is. Nothing refuses a connection to the listener: who is not
    /// vouched for may have other proofs, and one that says something wrong is as good as one that says nothing.
    pub fn listen_to(&mut self, connection: BorrowedFd<'_>, who: &mut Who) {
        let Who::Remote { label, .. } = who else { return };
        if self.active.prepared.image.flags & root_flags::HEARS == 0 {
            return;
        }
        let headers = introductions::syn(connection).unwrap_or_else(|error| {
            tracing::warn!(%error, "the SYN of a connection to the listener");
            None
        });
        let Some(headers) = headers else { return };
        let Ok(packet) = parse(headers.as_slice()) else { return };
        let heard = syn::hear(&self.writer.maps().nodes, headers.as_slice(), &packet);
        if heard.is_vouched() && self.writer.use_up(&packet, &heard) {
            *label = heard.label;
        }
    }
}

/// As the kernel's programs read them.
impl Speakers for NodeMaps {
    fn speaker(&self, label: u32) -> Option<Speaker> {
        self.speakers.get(&label, 0).ok()
    }

    fn node_key(&self, id: &NodeKeyId) -> Option<NodeKey> {
        self.keys.get(id, 0).ok()
    }

    fn spoken(&self, key: &FlowKey) -> Option<Spoken> {
        self.spoken.get(key, 0).ok()
    }

    fn time(&self) -> u64 {
        clock::monotonic()
    }
}
