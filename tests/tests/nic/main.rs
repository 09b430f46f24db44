//! What becomes of frames at an interface, case by case: one thing is changed, and the ruling with it.

mod nodes;

use std::{cell::Cell, collections::HashMap};

use authd::policy::{
    compile::{Moment, Options, Registry, compile},
    diagnostic::Source,
    image::Image,
    load::texts,
};
use authd_common::{
    address::Address,
    nic::{Ruling, Sockets, rule},
    parse::Packet,
    reason::Reason,
    syn::{NodeKey, NodeKeyId, Speaker, Speakers, Spoken},
    tables::{
        Flow, FlowKey, Grant, GrantKey, IdentityEntry, Listener, Slot, UNMANAGED, VouchedKey, listener_flags, role,
    },
};
use jiff::Timestamp;

const POLICY: &str = r#"
trust_domain = "example.org"
[[workload]]
name = "db"
kind = "service"
cgroup = "/db"
[[workload]]
name = "other"
kind = "service"
cgroup = "/other"
[[peer]]
name = "office"
networks = ["192.0.2.0/25"]
[[peer]]
name = "partner"
networks = ["198.51.100.7"]
[[service]]
name = "sql"
workload = "db"
ports = ["tcp/7001", "udp/7002"]
[[rule]]
name = "office-sql"
from = ["office"]
to = ["sql"]
[[rule]]
name = "partner-sql"
from = ["partner"]
to = ["sql"]
require = ["api-key"]
[[authority]]
name = "nodes"
bundle = "nodes.crt"
trust_domain = "example.org"
[[node]]
name = "a"
spiffe_id = "spiffe://example.org/node/a"
speaks_for = ["spiffe://example.org/web"]
[[peer]]
name = "web"
spiffe_id = "spiffe://example.org/web"
[[service]]
name = "ledger"
workload = "db"
ports = ["tcp/7003", "tcp/7004"]
[[service]]
name = "both"
workload = "db"
ports = ["tcp/7005"]
[[rule]]
name = "web-ledger"
from = ["web"]
to = ["ledger"]
require = ["node"]
[[rule]]
name = "web-both"
from = ["web"]
to = ["both"]
require = ["node"]
[[rule]]
name = "partner-both"
from = ["partner"]
to = ["both"]
require = ["api-key"]
"#;

const NETNS: u64 = 7;
const NOW: u64 = 1_000_000_000_000;
const GENERATION: u32 = 5;
const EPOCH: u64 = 3;
const NODE: [u8; 4] = [192, 0, 2, 1];
const OFFICE: [u8; 4] = [192, 0, 2, 2];
const STRANGER: [u8; 4] = [192, 0, 2, 200];
const PARTNER: [u8; 4] = [198, 51, 100, 7];
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const GRANT: Grant = Grant { slot: 4, serial: 9 };
const LABEL: u32 = 0x000a_0b0c;

/// The node as it is in most cases: `db` has its ports, nothing is remembered, the partner has a grant that lives.
struct Node {
    image: Image,
    registry: Registry,
    db: u32,
    other: u32,
    listener: Option<Listener>,
    identity: Option<IdentityEntry>,
    flow: Option<Flow>,
    connected: bool,
    asked_of_connections: Cell<bool>,
    slot: Slot,
    grant: Option<Grant>,
    generation: u32,
    speakers: HashMap<u32, Speaker>,
    keys: HashMap<NodeKeyId, NodeKey>,
    spoken: HashMap<FlowKey, Spoken>,
    /// Grants of callers for whom another node vouches.
    vouched: Option<Grant>,
}

impl Node {
    fn new() -> Self {
        Self::with_policy(POLICY)
    }

    /// One whose rules ask for no node's word.
    fn without_nodes() -> Self {
        Self::with_policy(POLICY.split("[[authority]]").next().expect("its beginning"))
    }

    fn with_policy(policy: &str) -> Self {
        let model = texts(vec![Source { name: "policy.toml".into(), text: policy.into() }]).model.expect("it is sound");
        let options = Options::default();
        let mut registry = Registry::default();
        registry.assign(&model, &options);
        let moment = Moment { wall: Timestamp::UNIX_EPOCH, monotonic: NOW };
        let image = compile(&model, &mut registry, &options, moment).expect("it compiles");
        let number = |name| registry.workloads.number(name).expect("it has a number");
        let (db, other) = (number("db"), number("other"));
        Self {
            image,
            registry,
            db,
            other,
            listener: Some(Listener { epoch: EPOCH, cgroup: 1, workload: db, flags: 0 }),
            identity: None,
            flow: None,
            connected: false,
            asked_of_connections: Cell::new(false),
            slot: Slot { until: NOW + 1, serial: GRANT.serial, rule: 0 },
            grant: Some(GRANT),
            generation: GENERATION,
            speakers: HashMap::new(),
            keys: HashMap::new(),
            spoken: HashMap::new(),
            vouched: None,
        }
    }

    fn rules(&self, frame: &[u8]) -> Ruling {
        // Of every rule, whatever it asks for.
        let granted = |key: GrantKey| match key {
            GrantKey { workload: UNMANAGED, scope: NETNS, address, .. } if address == Address::v4(PARTNER) => {
                self.grant
            }
            _ => None,
        };
        // A label's grants are of the first rule of the set that was asked for.
        let first_rule = Cell::new(0);
        let vouched = |VouchedKey { set, label }| {
            first_rule.set(self.image.sets[&set][0]);
            self.vouched.filter(|_| label == LABEL)
        };
        let slot = |slot| (slot == GRANT.slot).then_some(Slot { rule: first_rule.get(), ..self.slot });
        let view = self
            .image
            .at(NOW)
            .numbered(self.generation)
            .with_vouched(vouched)
            .with_identities(|cgroup| self.identity.filter(|_| cgroup == 1))
            .with_grants(granted, slot);
        rule(&view, self, frame)
    }

    fn refuses(&self, frame: &[u8], reason: Reason) {
        match self.rules(frame) {
            Ruling::Refused { verdict, .. } => assert_eq!(verdict.reason, reason),
            other => panic!("{other:?}, not {}", reason.name()),
        }
    }

    fn passes(&self, frame: &[u8]) -> Option<Flow> {
        match self.rules(frame) {
            Ruling::Passes { remember, .. } => remember,
            other => panic!("{other:?}"),
        }
    }
}

impl Speakers for Node {
    fn speaker(&self, label: u32) -> Option<Speaker> {
        self.speakers.get(&label).copied()
    }

    fn node_key(&self, id: &NodeKeyId) -> Option<NodeKey> {
        self.keys.get(id).copied()
    }

    fn spoken(&self, key: &FlowKey) -> Option<Spoken> {
        self.spoken.get(key).copied()
    }

    fn time(&self) -> u64 {
        NOW
    }
}

impl Sockets for Node {
    fn netns(&self) -> u64 {
        NETNS
    }

    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        assert_eq!(key.netns, NETNS);
        self.flow
    }

    fn listener(&self, key: &FlowKey) -> Option<Listener> {
        assert_eq!((key.source, key.ports >> 16), (Address::UNSPECIFIED, 0), "it is keyed by who is called alone");
        self.listener.filter(|listener| listener.epoch == EPOCH)
    }

    fn is_connected(&self, packet: &Packet) -> bool {
        self.asked_of_connections.set(true);
        assert_eq!((packet.destination, packet.source_port), (Address::v4(NODE), 40_000));
        self.connected
    }
}

fn tcp(source: [u8; 4], flags: u8) -> Vec<u8> {
    let mut transport = vec![0x9c, 0x40, 0x1b, 0x59, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
    frame(source, 6, &mut transport)
}

fn udp(source: [u8; 4]) -> Vec<u8> {
    frame(source, 17, &mut vec![0x9c, 0x40, 0x1b, 0x5a, 0, 8, 0, 0])
}

fn frame(source: [u8; 4], protocol: u8, transport: &mut Vec<u8>) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0, 0, 20 + transport.len() as u8, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
    frame.extend(source);
    frame.extend(NODE);
    frame.append(transport);
    frame
}

fn remembered() -> Flow {
    Flow { until: 0, grant: Grant::NONE, generation: GENERATION, role: u32::from(role::SERVER), ..Flow::default() }
}

#[test]
fn rules_decide_about_those_who_are_not_known() {
    let node = Node::new();
    assert_eq!(node.passes(&tcp(OFFICE, SYN)), None, "who only asks gets no place");
    assert_eq!(node.passes(&tcp(OFFICE, ACK)), Some(remembered()));
    assert_eq!(node.passes(&udp(OFFICE)), Some(remembered()));
    for frame in [tcp(STRANGER, SYN), tcp(STRANGER, ACK), tcp(STRANGER, SYN | ACK), udp(STRANGER)] {
        node.refuses(&frame, Reason::NoRule);
    }
}

#[test]
fn a_grant_is_looked_for_and_remembered() {
    let mut node = Node::new();
    assert_eq!(node.passes(&tcp(PARTNER, ACK)), Some(Flow { grant: GRANT, ..remembered() }));
    node.slot.until = 0;
    node.refuses(&tcp(PARTNER, SYN), Reason::ProofRequired);
    node.grant = None;
    node.refuses(&tcp(PARTNER, ACK), Reason::ProofRequired);
}

#[test]
fn what_is_remembered_holds_as_long_as_its_verdict() {
    let mut node = Node::new();
    // Somebody else's rule would refuse it: that it passes is what is remembered.
    let frame = tcp(STRANGER, ACK);
    for (flow, holds) in [
        (remembered(), true),
        (Flow { generation: GENERATION - 1, ..remembered() }, false),
        (Flow { generation: 0, ..remembered() }, false),
        (Flow { until: NOW + 1, ..remembered() }, true),
        (Flow { until: NOW, ..remembered() }, false),
        (Flow { grant: GRANT, ..remembered() }, true),
        (Flow { grant: Grant { serial: 8, ..GRANT }, ..remembered() }, false),
        (Flow { grant: Grant { slot: 5, ..GRANT }, ..remembered() }, false),
    ] {
        node.flow = Some(flow);
        assert_eq!(node.rules(&frame) == Ruling::Known, holds, "{flow:?}");
        assert!(holds || !node.rules(&frame).passes(), "{flow:?}");
    }
    node.flow = Some(Flow { grant: GRANT, ..remembered() });
    node.slot.until = 0;
    node.refuses(&frame, Reason::NoRule);
}

#[test]
fn a_new_connection_is_never_a_known_flow() {
    let mut node = Node::new();
    node.flow = Some(remembered());
    node.refuses(&tcp(STRANGER, SYN), Reason::NoRule);
    node.flow = Some(Flow { role: u32::from(role::CLIENT), ..remembered() });
    node.refuses(&tcp(STRANGER, SYN), Reason::NoRule);
}

#[test]
fn an_answer_is_left_to_its_socket_in_any_generation() {
    let mut node = Node::new();
    node.flow = Some(Flow { role: u32::from(role::CLIENT), generation: 1, ..remembered() });
    assert_eq!(node.rules(&udp(STRANGER)), Ruling::Known);
    assert_eq!(node.rules(&tcp(STRANGER, SYN | ACK)), Ruling::Known);
}

#[test]
fn a_connection_that_is_not_remembered_is_left_to_its_socket() {
    let mut node = Node::new();
    node.connected = true;
    assert_eq!(node.rules(&tcp(STRANGER, ACK)), Ruling::Connected);
    assert!(node.asked_of_connections.replace(false));
    // Nobody looks for one where none can be.
    node.refuses(&tcp(STRANGER, SYN), Reason::NoRule);
    node.refuses(&udp(STRANGER), Reason::NoRule);
    assert!(!node.asked_of_connections.get());
}

#[test]
fn only_what_is_known_to_be_guarded_is_touched() {
    let mut node = Node::new();
    let frame = tcp(STRANGER, SYN);
    let listener = node.listener;
    for other in [
        None,
        listener.map(|l| Listener { epoch: EPOCH - 1, ..l }),
        listener.map(|l| Listener { flags: listener_flags::SHARED, ..l }),
    ] {
        node.listener = other;
        assert_eq!(node.rules(&frame), Ruling::Untouched, "{other:?}");
    }
    // Another workload has the port, and does not guard it; or nobody's process has it.
    node.listener = listener.map(|l| Listener { workload: node.other, ..l });
    node.passes(&frame);
    node.listener = listener.map(|l| Listener { workload: UNMANAGED, ..l });
    node.passes(&frame);
    node.listener = listener;
    node.refuses(&frame, Reason::NoRule);
}

#[test]
fn a_cgroup_is_whose_it_is_now() {
    let mut node = Node::new();
    let frame = tcp(STRANGER, SYN);
    node.identity = Some(IdentityEntry { workload: node.other, flags: 0, instance: 0 });
    node.passes(&frame);
    node.listener = node.listener.map(|l| Listener { workload: node.other, ..l });
    node.identity = Some(IdentityEntry { workload: node.db, flags: 0, instance: 0 });
    node.refuses(&frame, Reason::NoRule);
}
