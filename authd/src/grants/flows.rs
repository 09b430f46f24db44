//! Which flows rest on which grant, as the kernel tells it.
//!
//! Enters: kernel events, in order. Leaves: the sockets to destroy when a grant ends. Never: a claim to know all; once events
//! were lost, or before a daemon has seen them all, [`Flows::is_complete`] says so, and the kernel's sockets are listed.

use std::collections::HashMap;

use authd_common::{
    address::Address,
    event::{Event, kind},
    tables::{ConversationKey, Grant},
};

/// One flow of one socket.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    /// Socket cookie.
    pub cookie: u64,
    pub remote: Address,
    pub remote_port: u16,
    pub protocol: u8,
}

/// Where its socket is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flow {
    pub key: Key,
    pub netns: u64,
    pub pid: u32,
    pub local: Address,
    pub local_port: u16,
}

#[derive(Default)]
pub struct Flows {
    by_grant: HashMap<Grant, HashMap<Key, Flow>>,
    by_key: HashMap<Key, Grant>,
    incomplete: bool,
}

impl Flows {
    /// Takes notice of an event. Returns the grant on which a flow rested that ended.
    pub fn told(&mut self, event: &Event) -> Option<Grant> {
        let key = Key {
            cookie: event.cookie,
            remote: event.remote,
            remote_port: event.remote_port,
            protocol: event.protocol,
        };
        match event.kind {
            kind::OPENED | kind::RESUMED | kind::REGRANTED => {
                self.closed(&key);
                if event.grant.is_some() {
                    let flow = Flow {
                        key,
                        netns: event.netns,
                        pid: event.pid,
                        local: event.local,
                        local_port: event.local_port,
                    };
                    self.enter(flow, event.grant);
                }
            }
            kind::CLOSED => return self.closed(&key),
            // One that was cut has a socket still.
            _ => {}
        }
        None
    }

    /// Notes a flow that was found by looking at sockets.
    pub fn enter(&mut self, flow: Flow, grant: Grant) {
        self.by_key.insert(flow.key, grant);
        self.by_grant.entry(grant).or_default().insert(flow.key, flow);
    }

    /// The same of an exchange, whose end no event tells.
    pub fn conversation_ended(&mut self, key: &ConversationKey) -> Option<Grant> {
        self.closed(&Key {
            cookie: key.cookie,
            remote: key.remote,
            remote_port: key.remote_port,
            protocol: key.protocol,
        })
    }

    /// On which grant it was.
    fn closed(&mut self, key: &Key) -> Option<Grant> {
        let grant = self.by_key.remove(key)?;
        if let Some(flows) = self.by_grant.get_mut(&grant) {
            flows.remove(key);
            if flows.is_empty() {
                self.by_grant.remove(&grant);
            }
        }
        Some(grant)
    }

    /// The flows that rest, or rested last, on a grant. They are forgotten here.
    pub fn take(&mut self, grant: Grant) -> Vec<Flow> {
        let flows: Vec<Flow> = self.by_grant.remove(&grant).unwrap_or_default().into_values().collect();
        for flow in &flows {
            self.by_key.remove(&flow.key);
        }
        flows
    }

    /// Whether every flow with a grant is known here.
    pub fn is_complete(&self) -> bool {
        !self.incomplete
    }

    /// There may be flows that nothing was told of.
    pub fn miss(&mut self) {
        self.incomplete = true;
    }

    /// All of the kernel's sockets were looked at.
    pub fn complete(&mut self) {
        self.incomplete = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(of: u8, cookie: u64, slot: u32) -> Event {
        Event {
            sequence: 0,
            time: 0,
            cgroup: 0,
            peer_cgroup: 0,
            cookie,
            netns: 1,
            bytes_out: 0,
            bytes_in: 0,
            packets_out: 0,
            packets_in: 0,
            duration: 0,
            count: 1,
            local: Address::v4([127, 0, 0, 1]),
            remote: Address::v4([127, 0, 0, 2]),
            comm: [0; 2],
            grant: Grant { slot, serial: 1 },
            generation: 1,
            workload: 1,
            peer_workload: 0,
            rule: 1,
            pid: 1,
            uid: 0,
            cpu: 0,
            local_port: 1,
            remote_port: 2,
            reason: 1,
            kind: of,
            action: 1,
            direction: 1,
            protocol: 6,
            flags: 0,
            reserved: 0,
        }
    }

    const FIRST: Grant = Grant { slot: 1, serial: 1 };
    const SECOND: Grant = Grant { slot: 2, serial: 1 };

    #[test]
    fn flows_are_known_from_opening_to_closing() {
        let mut flows = Flows::default();
        flows.told(&event(kind::OPENED, 7, 1));
        flows.told(&event(kind::OPENED, 8, 1));
        flows.told(&event(kind::OPENED, 9, 0));
        flows.told(&event(kind::CLOSED, 8, 1));
        assert_eq!(flows.take(FIRST).iter().map(|f| f.key.cookie).collect::<Vec<_>>(), [7]);
        assert!(flows.by_key.is_empty() && flows.by_grant.is_empty());
    }

    #[test]
    fn a_flow_that_went_over_to_another_grant_is_that_ones() {
        let mut flows = Flows::default();
        flows.told(&event(kind::OPENED, 7, 1));
        flows.told(&event(kind::REGRANTED, 7, 2));
        assert!(flows.take(FIRST).is_empty());
        assert_eq!(flows.take(SECOND).len(), 1);
    }

    #[test]
    fn a_flow_ends_once_and_says_on_which_grant() {
        let mut flows = Flows::default();
        assert_eq!(flows.told(&event(kind::OPENED, 7, 1)), None);
        // Nothing has ended with a flow that goes on, and what was not seen to begin did not end either.
        assert_eq!(flows.told(&event(kind::RESUMED, 7, 1)), None);
        assert_eq!(flows.told(&event(kind::CLOSED, 9, 1)), None);
        assert_eq!(flows.told(&event(kind::CLOSED, 7, 1)), Some(FIRST));
        assert_eq!(flows.told(&event(kind::CLOSED, 7, 1)), None);
    }

    #[test]
    fn a_flow_that_was_cut_still_has_a_socket() {
        let mut flows = Flows::default();
        flows.told(&event(kind::OPENED, 7, 1));
        flows.told(&event(kind::CUT, 7, 1));
        assert_eq!(flows.take(FIRST).len(), 1);
    }
}
