//! The same for callers for whom another node vouches: what a SYN says, and what is remembered of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use authd::policy::network::from_ip;
use authd_common::{
    nic::{Behind, Ruling, lacks_alike, network_offset},
    parse::parse,
    reason::Reason,
    syn::{Heard, NodeKey, NodeKeyId, Speaker, Spoken, hear_answer, mac, option, syn_key},
    tables::{Flow, FlowKey, Grant, Slot, role},
    verdict::{FarEnd, Verdict, decide_in},
};

use crate::{ACK, GENERATION, GRANT, LABEL, NODE, NOW, Node, OFFICE, PARTNER, STRANGER, SYN, remembered};

const SECRET: [u64; 2] = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
const NUMBER: u32 = 3;
const KEY_ID: u32 = 5;
const SEQUENCE: u32 = 0x1234_5678;
/// Guarded by rules that ask for a node's word: by these alone, twice, and by one beside another that asks for an API key.
const LEDGER: u16 = 7003;
const LEDGER_TOO: u16 = 7004;
const BOTH: u16 = 7005;

/// One that knows whom `LABEL` means.
fn knowing() -> Node {
    let mut node = Node::new();
    node.speakers.insert(LABEL, Speaker { until: NOW + 1, node: NUMBER, reserved: 0 });
    node.keys.insert(NodeKeyId { node: NUMBER, key_id: KEY_ID }, NodeKey { secret: SECRET, until: NOW + 1 });
    node.vouched = Some(GRANT);
    node
}

/// A TCP segment, by what matters of it.
#[derive(Clone)]
struct Segment {
    source: IpAddr,
    destination: IpAddr,
    ports: (u16, u16),
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    options: Vec<u8>,
    /// Words of the header, if it says something else than is true.
    offset: Option<u8>,
    tags: Vec<[u8; 2]>,
    /// Of the IP header.
    ip_options: usize,
}

impl Segment {
    fn bare() -> Self {
        Self {
            source: STRANGER.into(),
            destination: NODE.into(),
            ports: (40_000, LEDGER),
            sequence: SEQUENCE,
            acknowledged: 0,
            flags: SYN,
            options: Vec::new(),
            offset: None,
            tags: Vec::new(),
            ip_options: 0,
        }
    }

    /// A SYN that says the truth, behind what SYNs say anyway.
    fn sound() -> Self {
        Self { options: vec![2, 4, 5, 0xb4], ..Self::bare() }.signed(SECRET, KEY_ID, LABEL)
    }

    fn v6() -> Self {
        let address = |last| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last));
        Self { source: address(1), destination: address(2), ..Self::bare() }
    }

    fn signed(mut self, secret: [u64; 2], key_id: u32, label: u32) -> Self {
        let said = option(mac(secret, &self.key(), key_id, label), key_id, label);
        self.options.extend(said.iter().flat_map(|word| word.to_ne_bytes()));
        self
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut segment = self.clone();
        change(&mut segment);
        segment
    }

    /// What comes after a SYN that was answered: one number higher, and without a word of who it is.
    fn then(&self) -> Self {
        self.with(|ack| {
            ack.flags = ACK;
            ack.sequence = self.sequence.wrapping_add(1);
            ack.options.clear();
        })
    }

    fn key(&self) -> FlowKey {
        syn_key((from_ip(self.source), self.ports.0), (from_ip(self.destination), self.ports.1), self.sequence)
    }

    fn frame(&self) -> Vec<u8> {
        let mut tcp = [self.ports.0.to_be_bytes(), self.ports.1.to_be_bytes()].concat();
        tcp.extend([self.sequence.to_be_bytes(), self.acknowledged.to_be_bytes()].concat());
        let words = self.offset.unwrap_or((5 + self.options.len() / 4) as u8);
        tcp.extend([words << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(&self.options);
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for tag in &self.tags {
            frame.extend([tag[0], tag[1], 0, 7]);
        }
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let header = 20 + self.ip_options;
                frame.extend([8, 0, 0x40 | (header / 4) as u8, 0, 0, (header + tcp.len()) as u8]);
                frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
                frame.extend([source.octets(), destination.octets()].concat());
                frame.extend(vec![1; self.ip_options]);
            }
            (source, destination) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, tcp.len() as u8, 6, 64]);
                frame.extend([from_ip(source).octets(), from_ip(destination).octets()].concat());
            }
        }
        frame.extend(tcp);
        frame
    }
}

impl Node {
    fn rule_of(&self, verdict: &Verdict) -> Option<&str> {
        self.registry.rules.name(verdict.rule)
    }

    /// It passes for what it says, which is to be remembered.
    fn believes(&self, segment: &Segment) {
        match self.rules(&segment.frame()) {
            Ruling::Passes { verdict, remember: None, spoken: Some(spoken) } => {
                assert_eq!((verdict.reason, verdict.grant), (Reason::Rule, GRANT));
                assert_eq!(spoken, (segment.key(), Spoken { label: LABEL, key_id: KEY_ID, used: 0, reserved: 0 }));
            }
            other => panic!("{other:?}"),
        }
    }

    fn disbelieves(&self, segment: &Segment, reason: Reason) {
        self.refuses(&segment.frame(), reason);
    }

    fn remembers(&mut self, segment: &Segment) {
        self.spoken.insert(segment.key(), Spoken { label: LABEL, key_id: KEY_ID, used: 0, reserved: 0 });
    }
}

#[test]
fn a_syn_that_says_the_truth_passes_and_is_remembered() {
    let node = knowing();
    node.believes(&Segment::sound());
    // Alone, and with as much before it as there is room for.
    for before in [0, 4, 20, 24] {
        node.believes(&Segment { options: vec![1; before], ..Segment::bare() }.signed(SECRET, KEY_ID, LABEL));
    }
    // In segments of any kind that ask for a connection: with ECN, with data.
    node.believes(&Segment::sound().with(|syn| syn.flags = SYN | 0xc0));
    match node.rules(&Segment::sound().frame()) {
        Ruling::Passes { verdict, .. } => assert_eq!(node.rule_of(&verdict), Some("web-ledger")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn nothing_is_remembered_of_a_syn_that_says_nothing_and_passes_anyway() {
    let node = knowing();
    let free = Segment::bare().with(|syn| (syn.source, syn.ports.1) = (OFFICE.into(), 7001));
    match node.rules(&free.frame()) {
        Ruling::Passes { remember: None, spoken: None, .. } => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_says_nothing_is_refused() {
    let node = knowing();
    node.disbelieves(&Segment::bare(), Reason::NodeIdentityMissing);
    // Another kind, another length, another experiment.
    for octet in 0..4 {
        let syn = Segment::sound().with(|syn| syn.options[4 + octet] ^= 1);
        node.disbelieves(&syn, Reason::NodeIdentityMissing);
    }
}

#[test]
fn nobody_else_listens_to_it() {
    // A policy without such rules has no use for what SYNs say, and nobody pays for looking.
    let mut node = knowing();
    node.image = Node::without_nodes().image;
    let syn = Segment::sound().with(|syn| (syn.source, syn.ports.1) = (OFFICE.into(), 7001));
    match node.rules(&syn.frame()) {
        Ruling::Passes { spoken: None, .. } => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_label_or_a_key_that_nobody_has_is_unknown() {
    let mut node = knowing();
    let said = |key_id, label| Segment::bare().signed(SECRET, key_id, label);
    node.disbelieves(&said(KEY_ID, LABEL ^ 1), Reason::NodeKeyUnknown);
    node.disbelieves(&said(KEY_ID, 0), Reason::NodeKeyUnknown);
    node.disbelieves(&said(KEY_ID ^ 1, LABEL), Reason::NodeKeyUnknown);
    // The key of the label's node counts, not one that another node has under this id.
    let known = node.keys.remove(&NodeKeyId { node: NUMBER, key_id: KEY_ID }).expect("it has one");
    node.keys.insert(NodeKeyId { node: NUMBER + 1, key_id: KEY_ID }, known);
    node.disbelieves(&Segment::sound(), Reason::NodeKeyUnknown);
    node.speakers.clear();
    node.disbelieves(&Segment::sound(), Reason::NodeKeyUnknown);
}

#[test]
fn the_mac_is_of_everything_that_it_is_said_of() {
    let mut node = knowing();
    // Another key of the same node with the same secret, and another caller of the same node.
    node.keys.insert(NodeKeyId { node: NUMBER, key_id: KEY_ID ^ 1 }, NodeKey { secret: SECRET, until: NOW + 1 });
    node.speakers.insert(LABEL ^ 1, Speaker { until: NOW + 1, node: NUMBER, reserved: 0 });
    for sound in [Segment::sound(), Segment::v6().signed(SECRET, KEY_ID, LABEL)] {
        node.believes(&sound);
        let last = sound.options.len() - 16;
        let mut changed: Vec<Segment> = Vec::new();
        for bit in 0..32 {
            changed.push(sound.with(|syn| syn.sequence ^= 1 << bit));
        }
        for bit in 0..16 {
            changed.push(sound.with(|syn| syn.ports.0 ^= 1 << bit));
        }
        changed.push(sound.with(|syn| syn.ports.1 = LEDGER_TOO));
        let octets = if sound.source.is_ipv4() { 4 } else { 16 };
        for octet in 0..octets {
            changed.push(sound.with(|syn| syn.source = flipped(syn.source, octet)));
            changed.push(sound.with(|syn| syn.destination = flipped(syn.destination, octet)));
        }
        // The MAC, key id, and label.
        for octet in 4..12 {
            changed.extend((0..8).map(|bit| sound.with(|syn| syn.options[last + octet] ^= 1 << bit)));
        }
        changed.push(sound.with(|syn| syn.options[last + 12] ^= 1));
        changed.push(sound.with(|syn| syn.options[last + 15] ^= 1));
        for (number, syn) in changed.iter().enumerate() {
            match node.rules(&syn.frame()) {
                Ruling::Refused { verdict, .. } => assert_eq!(verdict.reason, Reason::NodeMacWrong, "{number}"),
                other => panic!("{number}: {other:?}"),
            }
        }
    }
    for secret in [[SECRET[0] ^ 1, SECRET[1]], [SECRET[0], SECRET[1] ^ 1 << 63]] {
        node.disbelieves(&Segment::bare().signed(secret, KEY_ID, LABEL), Reason::NodeMacWrong);
    }
}

fn flipped(address: IpAddr, octet: usize) -> IpAddr {
    match address {
        IpAddr::V4(v4) => IpAddr::V4(Ipv4Addr::from_bits(v4.to_bits() ^ 1 << (8 * octet))),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() ^ 1 << (8 * octet))),
    }
}

#[test]
fn what_came_to_its_end_is_told_to_whoever_has_the_key() {
    let forged = Segment::sound().with(|syn| syn.sequence += 1);
    let mut node = knowing();
    for until in [0, NOW - 1, NOW] {
        node.keys.insert(NodeKeyId { node: NUMBER, key_id: KEY_ID }, NodeKey { secret: SECRET, until });
        node.disbelieves(&Segment::sound(), Reason::NodeKeyExpired);
        node.disbelieves(&forged, Reason::NodeMacWrong);
    }
    let mut node = knowing();
    for until in [0, NOW - 1, NOW] {
        node.speakers.insert(LABEL, Speaker { until, node: NUMBER, reserved: 0 });
        node.disbelieves(&Segment::sound(), Reason::NodeKeyExpired);
        node.disbelieves(&forged, Reason::NodeMacWrong);
    }
}

#[test]
fn a_syn_comes_again_until_its_handshake_came_to_its_end() {
    let mut node = knowing();
    let syn = Segment::sound();
    let spoken = Spoken { label: LABEL, key_id: KEY_ID, used: 0, reserved: 0 };
    node.spoken.insert(syn.key(), spoken);
    node.believes(&syn);
    node.spoken.insert(syn.key(), Spoken { used: 1, ..spoken });
    node.disbelieves(&syn, Reason::NodeReplay);
    // Who has no key does not learn that it came before.
    node.disbelieves(&syn.with(|syn| syn.options[8] ^= 1), Reason::NodeMacWrong);
    // Another connection is another one.
    let next = Segment { sequence: SEQUENCE + 1, ..Segment::bare() }.signed(SECRET, KEY_ID, LABEL);
    node.believes(&next);
}

#[test]
fn a_caller_whom_no_rule_names_is_refused_for_that() {
    let mut node = knowing();
    node.vouched = None;
    node.disbelieves(&Segment::sound(), Reason::CallerNotNamed);
    node.vouched = Some(Grant { serial: 8, ..GRANT });
    node.disbelieves(&Segment::sound(), Reason::CallerNotNamed);
    node.vouched = Some(GRANT);
    for until in [0, NOW] {
        node.slot.until = until;
        node.disbelieves(&Segment::sound(), Reason::CallerNotNamed);
    }
    // Another caller's grant is of no use.
    let mut node = knowing();
    node.speakers.insert(LABEL ^ 1, Speaker { until: NOW + 1, node: NUMBER, reserved: 0 });
    node.disbelieves(&Segment::bare().signed(SECRET, KEY_ID, LABEL ^ 1), Reason::CallerNotNamed);
}

#[test]
fn the_end_of_the_handshake_finds_what_its_beginning_said() {
    for syn in [Segment::sound(), Segment { sequence: u32::MAX, ..Segment::bare() }, Segment::v6()] {
        let mut node = knowing();
        node.connected = false;
        let ack = syn.then();
        if syn.source.is_ipv4() {
            node.disbelieves(&ack, Reason::NodeIdentityMissing);
        }
        node.remembers(&syn);
        let flow = Flow { grant: GRANT, label: LABEL, ..remembered() };
        assert_eq!(node.passes(&ack.frame()), Some(flow));
        // It counts when it was said, whatever became of key and label, and as long as the caller has its grant.
        node.keys.clear();
        node.speakers.clear();
        assert_eq!(node.passes(&ack.frame()), Some(flow));
        let used = Spoken { label: LABEL, key_id: KEY_ID, used: 1, reserved: 0 };
        node.spoken.insert(syn.key(), used);
        assert_eq!(node.passes(&ack.frame()), Some(flow));
        if syn.source.is_ipv6() {
            continue;
        }
        for other in [
            ack.with(|ack| ack.sequence = ack.sequence.wrapping_add(1)),
            ack.with(|ack| ack.sequence = ack.sequence.wrapping_sub(1)),
            ack.with(|ack| ack.source = OFFICE.into()),
            ack.with(|ack| ack.ports.1 = LEDGER_TOO),
            // What is said in another segment than a SYN is not listened to.
            syn.with(|ack| ack.flags = ACK),
            syn.with(|ack| ack.flags = SYN | ACK),
        ] {
            node.disbelieves(&other, Reason::NodeIdentityMissing);
        }
        node.vouched = None;
        node.disbelieves(&ack, Reason::CallerNotNamed);
    }
}

#[test]
fn a_listeners_answer_finds_it_too() {
    let syn = Segment::sound();
    let mut node = knowing();
    let answer = |acknowledged| Segment {
        source: syn.destination,
        destination: syn.source,
        ports: (syn.ports.1, syn.ports.0),
        sequence: 77,
        acknowledged,
        flags: SYN | ACK,
        ..Segment::bare()
    };
    let heard = |node: &Node, segment: &Segment| {
        let frame = segment.frame();
        let at = network_offset(&frame[..]).expect("an IP packet");
        let bytes = Behind { frame: &frame[..], at };
        hear_answer(node, &bytes, &parse(&bytes).expect("a segment"))
    };
    assert_eq!(heard(&node, &answer(SEQUENCE + 1)), Heard::NOTHING);
    node.remembers(&syn);
    let meant = Heard { key_id: KEY_ID, label: LABEL, sequence: SEQUENCE, lacking: 0 };
    assert_eq!(heard(&node, &answer(SEQUENCE + 1)), meant);
    for other in [answer(SEQUENCE), answer(SEQUENCE + 2), answer(SEQUENCE + 1).with(|a| a.destination = OFFICE.into())]
    {
        assert_eq!(heard(&node, &other), Heard::NOTHING);
    }
}

#[test]
fn a_flow_that_is_remembered_with_its_caller_needs_no_syn() {
    let mut node = knowing();
    // Long after the handshake.
    let segment = Segment::bare().with(|ack| (ack.flags, ack.sequence) = (ACK, SEQUENCE + 1_000));
    let older = Flow { generation: GENERATION - 1, grant: GRANT, label: LABEL, ..remembered() };
    node.flow = Some(older);
    assert_eq!(node.passes(&segment.frame()), Some(Flow { generation: GENERATION, ..older }));
    // By a grant that the caller has now, which may be another one.
    node.flow = Some(Flow { grant: Grant { slot: 5, serial: 1 }, ..older });
    assert_eq!(node.passes(&segment.frame()), Some(Flow { generation: GENERATION, ..older }));
    node.vouched = None;
    node.disbelieves(&segment, Reason::CallerNotNamed);
    node.vouched = Some(GRANT);
    // Nobody's, or somebody else's.
    node.flow = Some(Flow { label: 0, ..older });
    node.disbelieves(&segment, Reason::NodeIdentityMissing);
    node.flow = Some(Flow { label: LABEL ^ 1, ..older });
    node.disbelieves(&segment, Reason::CallerNotNamed);
    node.flow = None;
    node.disbelieves(&segment, Reason::NodeIdentityMissing);
}

#[test]
fn a_new_connection_says_itself_who_it_is() {
    let mut node = knowing();
    for flow in
        [Flow { label: LABEL, grant: GRANT, ..remembered() }, Flow { generation: 1, label: LABEL, ..remembered() }]
    {
        node.flow = Some(flow);
        node.disbelieves(&Segment::bare(), Reason::NodeIdentityMissing);
        node.disbelieves(&Segment::sound().with(|syn| syn.sequence += 1), Reason::NodeMacWrong);
        node.flow = Some(Flow { role: u32::from(role::CLIENT), ..flow });
        node.disbelieves(&Segment::bare(), Reason::NodeIdentityMissing);
    }
}

#[test]
fn only_the_last_option_of_the_header_is_listened_to() {
    let node = knowing();
    let sound = Segment::sound();
    for behind in [vec![1, 1, 1, 1], vec![0; 4], vec![2, 4, 5, 0xb4]] {
        node.disbelieves(&sound.with(|syn| syn.options.extend(behind)), Reason::NodeIdentityMissing);
    }
    // Behind the header it is data, and a header that ends before it does not have it.
    let words = (5 + sound.options.len() / 4) as u8;
    for offset in [0, 4, 5, 8, words - 1, words + 1, 15] {
        node.disbelieves(&sound.with(|syn| syn.offset = Some(offset)), Reason::NodeIdentityMissing);
    }
    // A header with no room but for the option's beginning: what lies there is the fixed part.
    for offset in 0..9 {
        let syn = Segment::bare().signed(SECRET, KEY_ID, LABEL).with(|syn| syn.offset = Some(offset));
        node.disbelieves(&syn, Reason::NodeIdentityMissing);
    }
}

#[test]
fn a_frame_that_ends_within_the_option_says_nothing() {
    let node = knowing();
    for sound in [Segment::sound(), Segment::v6().signed(SECRET, KEY_ID, LABEL)] {
        let frame = sound.frame();
        for missing in 1..=16 {
            node.refuses(&frame[..frame.len() - missing], Reason::NodeIdentityMissing);
        }
        // As far as the flags it is a SYN; what ends before that is no packet, and goes to the stack, which drops it.
        let flags = frame.len() - sound.options.len() - 6;
        for length in flags..frame.len() {
            node.refuses(&frame[..length], Reason::NodeIdentityMissing);
        }
        assert_eq!(node.rules(&frame[..flags - 1]), Ruling::Untouched);
    }
}

#[test]
fn it_is_found_wherever_the_header_lies() {
    let node = knowing();
    for sound in [Segment::sound(), Segment::v6().signed(SECRET, KEY_ID, LABEL)] {
        for tags in [vec![], vec![[0x81, 0]], vec![[0x88, 0xa8], [0x81, 0]]] {
            let tagged = sound.with(|syn| syn.tags = tags);
            node.believes(&tagged);
            node.disbelieves(&tagged.with(|syn| syn.sequence += 1), Reason::NodeMacWrong);
            node.disbelieves(&tagged.with(|syn| syn.options.clear()), Reason::NodeIdentityMissing);
        }
        node.believes(&sound.with(|syn| syn.ip_options = 40));
    }
}

#[test]
fn an_address_that_is_granted_is_not_vouched_for() {
    let node = knowing();
    // It holds a grant of every rule, as an address.
    let from_partner = Segment::bare().with(|syn| syn.source = PARTNER.into());
    node.disbelieves(&from_partner, Reason::NodeIdentityMissing);
    node.disbelieves(&from_partner.with(|syn| syn.flags = ACK), Reason::NodeIdentityMissing);
    let wrong = from_partner.clone().signed(SECRET, KEY_ID, LABEL).with(|syn| syn.sequence += 1);
    node.disbelieves(&wrong, Reason::NodeMacWrong);
}

#[test]
fn either_of_two_rules_opens_to_its_own_callers() {
    let both = Segment::bare().with(|syn| (syn.source, syn.ports.1) = (PARTNER.into(), BOTH));
    let said = both.clone().signed(SECRET, KEY_ID, LABEL);
    let forged = said.with(|syn| syn.sequence += 1);
    let passes_by = |node: &Node, syn: &Segment, rule: &str| match node.rules(&syn.frame()) {
        Ruling::Passes { verdict, .. } => assert_eq!(node.rule_of(&verdict), Some(rule)),
        other => panic!("{other:?}, not by {rule}"),
    };
    let mut node = knowing();
    let vouched = node.vouched;
    // By its address, whatever the SYN says, or is wrong about.
    node.vouched = None;
    for syn in [&both, &said, &forged] {
        passes_by(&node, syn, "partner-both");
    }
    // By its node's word.
    (node.grant, node.vouched) = (None, vouched);
    passes_by(&node, &said, "web-both");
    // By both: who showed proofs is not said to pass on a word.
    node.grant = Some(GRANT);
    passes_by(&node, &said, "partner-both");
    // By neither. Who says nothing may have meant to show a key; who says something wrong is told of that.
    node.grant = None;
    node.disbelieves(&both, Reason::ProofRequired);
    node.disbelieves(&forged, Reason::NodeMacWrong);
    node.disbelieves(&both.clone().signed(SECRET, KEY_ID ^ 1, LABEL), Reason::NodeKeyUnknown);
    node.vouched = None;
    node.disbelieves(&said, Reason::CallerNotNamed);
    // A grant that ended is as good as none, of either.
    (node.grant, node.vouched) = (Some(GRANT), vouched);
    node.slot = Slot { until: NOW, ..node.slot };
    node.disbelieves(&both, Reason::ProofRequired);
    node.disbelieves(&said, Reason::CallerNotNamed);
    // From elsewhere the API key is not asked for.
    let elsewhere = both.with(|syn| syn.source = STRANGER.into());
    node.disbelieves(&elsewhere, Reason::NodeIdentityMissing);
}

/// Why a SYN may say nothing that counts.
const LACKING: [Reason; 5] = [
    Reason::NodeIdentityMissing,
    Reason::NodeKeyUnknown,
    Reason::NodeKeyExpired,
    Reason::NodeMacWrong,
    Reason::NodeReplay,
];

#[test]
fn what_was_refused_is_refused_again_only_for_the_same_reason() {
    let of_nodes = [&LACKING[..], &[Reason::CallerNotNamed]].concat();
    let mut alike = 0;
    for refused in Reason::ALL {
        for lacking in Reason::ALL {
            let meant = match (of_nodes.contains(refused), lacking) {
                (true, _) => refused == lacking,
                // Refused by rules that do not ask: a packet that says nothing meets the same ones.
                (false, Reason::NodeIdentityMissing) => true,
                (false, _) => false,
            };
            assert_eq!(lacks_alike(refused.code(), lacking.code().into()), meant, "{refused:?} {lacking:?}");
            alike += u32::from(meant);
        }
        // Who is vouched for lacks nothing, and is never refused unheard.
        assert!(!lacks_alike(refused.code(), 0), "{refused:?}");
    }
    assert_eq!(alike as usize, Reason::ALL.len());
}

#[test]
fn what_is_refused_again_would_be_refused_by_rules() {
    let mut node = knowing();
    node.grant = None;
    let view = node.image.at(NOW).with_grants(|_| None, |_| None);
    for port in [7001, LEDGER, BOTH] {
        for source in [PARTNER, STRANGER] {
            let verdict = |lacking: Reason| {
                let mut far = FarEnd::remote(from_ip(source.into()), crate::NETNS);
                far.introduce(&Heard { lacking: lacking.code().into(), ..Heard::NOTHING });
                decide_in(&view, &node.image.root(), node.db, &far, 6, port)
            };
            for first in LACKING {
                let refused = verdict(first);
                assert!(!refused.action.passes());
                for next in LACKING {
                    if lacks_alike(refused.reason.code(), next.code().into()) {
                        assert_eq!(verdict(next), refused, "{first:?} {next:?} {port}");
                    }
                }
                let silent = first == Reason::NodeIdentityMissing;
                assert!(!silent || lacks_alike(refused.reason.code(), first.code().into()), "{first:?} {port}");
            }
        }
    }
}
