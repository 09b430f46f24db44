//! Why a flow is allowed or denied: the kernel's own verdict function over an image, and each rule's part in it.
//!
//! Enters: a model with its image, and a question. Leaves: an [`Explanation`]. Never: another opinion than the kernel's.

use std::{fmt, net::IpAddr};

use authd_common::{
    address::Address,
    reason::Reason,
    tables::UNMANAGED,
    verdict::{Action, FarEnd, Opener, Verdict, decide_in, decide_out},
};
use serde::Serialize;

use super::{
    compile::{Builtin, Moment, Options, Registry, is_in_force},
    file::Proof,
    image::Image,
    model::{Model, Object, Rule, Service, Subject},
    network::{display, from_ip, protocol_name},
};

/// Who asks for the flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum From {
    Workload(usize),
    Unmanaged,
    /// A caller that is not on this node.
    Remote(Address),
    /// One that its certificate alone names: from an address of no peer that has networks.
    Peer(usize),
}

impl From {
    /// A name of the policy, `unmanaged`, or an address. A peer with networks stands for the first address of the first one.
    pub fn parse(text: &str, model: &Model) -> Option<Self> {
        if text == "unmanaged" {
            return Some(Self::Unmanaged);
        }
        if let Some(index) = model.workloads.iter().position(|w| w.name == text) {
            return Some(Self::Workload(index));
        }
        if let Some(index) = model.peers.iter().position(|p| p.name == text) {
            let network = model.peers[index].networks.first();
            return Some(network.map_or(Self::Peer(index), |network| Self::Remote(network.address)));
        }
        text.parse::<IpAddr>().ok().map(|address| Self::Remote(from_ip(address)))
    }

    fn is_remote(self) -> bool {
        matches!(self, Self::Remote(_) | Self::Peer(_))
    }
}

/// Where it goes: `10.0.0.7:443/tcp`, `[fd00::1]:53/udp`, `10.0.0.7/icmp`, `10.0.0.7/proto/47`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct To {
    pub address: Address,
    pub protocol: u8,
    pub port: u16,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is no destination: write ADDRESS:PORT/tcp, [ADDRESS]:PORT/udp, ADDRESS/icmp or ADDRESS/proto/NUMBER")]
pub struct ToError(String);

impl std::str::FromStr for To {
    type Err = ToError;

    fn from_str(text: &str) -> Result<Self, ToError> {
        let wrong = || ToError(text.to_owned());
        let (end, protocol) = text.split_once('/').ok_or_else(wrong)?;
        let protocol = match protocol {
            "tcp" => authd_common::tables::IPPROTO_TCP,
            "udp" => authd_common::tables::IPPROTO_UDP,
            "icmp" => authd_common::tables::IPPROTO_ICMP,
            "icmpv6" => authd_common::tables::IPPROTO_ICMPV6,
            other => other.strip_prefix("proto/").and_then(|n| n.parse().ok()).ok_or_else(wrong)?,
        };
        let with_port = matches!(protocol, authd_common::tables::IPPROTO_TCP | authd_common::tables::IPPROTO_UDP);
        if with_port {
            let end: std::net::SocketAddr = end.parse().map_err(|_| wrong())?;
            return Ok(Self { address: from_ip(end.ip()), protocol, port: end.port() });
        }
        let address: IpAddr = end.trim_matches(['[', ']']).parse().map_err(|_| wrong())?;
        Ok(Self { address: from_ip(address), protocol, port: 0 })
    }
}

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = protocol_name(self.protocol);
        match (display(&self.address), self.port) {
            (address, 0) => write!(f, "{address}/{protocol}"),
            (address, port) => write!(f, "{}/{protocol}", std::net::SocketAddr::new(address, port)),
        }
    }
}

/// One side's verdict on a flow.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    /// `outbound` (may the caller open it?) or `inbound` (may it be accepted?).
    pub side: &'static str,
    /// The workload whose rules were asked.
    pub workload: String,
    pub verdict: &'static str,
    pub reason: &'static str,
    pub rule: Option<String>,
    /// What the deciding rule asks for, if that is what lacks. As policies write it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<&'static str>,
    /// Every other rule that names either side, and why it did not decide.
    pub others: Vec<Other>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Other {
    pub rule: String,
    pub why: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    pub from: String,
    pub to: String,
    pub at: String,
    /// What happens in the end: the strictest step.
    pub verdict: &'static str,
    pub reason: &'static str,
    pub rule: Option<String>,
    /// Of the daemon, if it was asked.
    pub generation: Option<u32>,
    pub steps: Vec<Step>,
}

/// What a question is asked about.
pub struct Policy<'a> {
    pub model: &'a Model,
    pub registry: &'a Registry,
    pub options: &'a Options,
    pub image: &'a Image,
    pub moment: Moment,
}

impl Policy<'_> {
    pub fn explain(&self, from: From, to: To) -> Explanation {
        let view = self.image.at(self.moment.monotonic);
        let root = self.image.root();
        let mut steps = Vec::new();
        let mut verdicts = Vec::new();
        let number =
            |workload: usize| self.registry.workloads.number(&self.model.workloads[workload].name).unwrap_or(UNMANAGED);
        if let From::Workload(workload) = from {
            let opener = Opener { workload: number(workload), instance: 0 };
            let verdict = decide_out(&view, &root, &opener, &to.address, to.protocol, to.port);
            steps.push(self.step("outbound", workload, from, to, verdict));
            verdicts.push(verdict);
        }
        // Workloads that offer a service at this address. From elsewhere, whatever address of this node is called: a service's
        // own addresses are where callers of this node reach it.
        let is_there = |s: &Service| from.is_remote() || s.networks.iter().any(|n| n.contains(&to.address));
        let offers = |s: &&Service| is_there(s) && s.has_port(to.protocol, to.port);
        let mut guards: Vec<usize> = self.model.services.iter().filter(offers).filter_map(|s| s.workload).collect();
        guards.sort_unstable();
        guards.dedup();
        for guard in guards {
            let caller = match from {
                From::Workload(workload) => FarEnd::local(number(workload), 0),
                From::Unmanaged => FarEnd::local(UNMANAGED, 0),
                From::Remote(address) => FarEnd::remote(address, 0),
                From::Peer(_) => FarEnd::remote(Address::UNSPECIFIED, 0),
            };
            let verdict = decide_in(&view, &root, number(guard), &caller, to.protocol, to.port);
            steps.push(self.step("inbound", guard, from, to, verdict));
            verdicts.push(verdict);
        }
        let whole = verdicts.into_iter().reduce(Verdict::and).unwrap_or(Verdict::allow(match from.is_remote() {
            false => Reason::Unmanaged,
            true => Reason::Unguarded,
        }));
        Explanation {
            from: self.name_of(from),
            to: to.to_string(),
            at: self.moment.wall.to_string(),
            verdict: whole.action.name(),
            reason: whole.reason.name(),
            rule: self.rule_name(whole.rule),
            generation: None,
            steps,
        }
    }

    fn name_of(&self, from: From) -> String {
        match from {
            From::Workload(index) => self.model.workloads[index].name.clone(),
            From::Unmanaged => "unmanaged".to_owned(),
            From::Remote(address) => display(&address).to_string(),
            From::Peer(index) => self.model.peers[index].name.clone(),
        }
    }

    fn rule_name(&self, number: u32) -> Option<String> {
        self.registry.rules.name(number).map(str::to_owned)
    }

    fn step(&self, side: &'static str, workload: usize, from: From, to: To, verdict: Verdict) -> Step {
        let decided = self.rule_name(verdict.rule);
        let builtin = Builtin::new(self.options);
        let others = self
            .model
            .rules
            .iter()
            .map(|rule| (rule, self.model.services.as_slice()))
            .chain(builtin.rules.iter().map(|rule| (rule, builtin.services.as_slice())))
            .filter(|(rule, _)| decided.as_deref() != Some(rule.name.as_str()))
            .filter_map(|(rule, services)| {
                let why = self.why_not(rule, services, side, workload, from, to, verdict)?;
                Some(Other { rule: rule.name.clone(), why })
            })
            .collect();
        let lacks_proofs = matches!(verdict.reason, Reason::ProofRequired | Reason::NodeIdentityMissing);
        let lacks = self.model.rules.iter().find(|rule| lacks_proofs && decided.as_deref() == Some(rule.name.as_str()));
        Step {
            side,
            workload: self.model.workloads[workload].name.clone(),
            verdict: verdict.action.name(),
            reason: verdict.reason.name(),
            requires: lacks.map_or_else(Vec::new, |rule| rule.require.iter().map(|proof| proof.name()).collect()),
            rule: decided,
            others,
        }
    }

    /// Why a rule that names one side or the other did not decide. `None` for a rule that names neither.
    #[expect(clippy::too_many_arguments, reason = "one question, asked of one rule")]
    fn why_not(
        &self,
        rule: &Rule,
        services: &[Service],
        side: &str,
        workload: usize,
        from: From,
        to: To,
        verdict: Verdict,
    ) -> Option<String> {
        let names_caller = rule.from.iter().any(|subject| match (subject, from) {
            (Subject::Any, _) => true,
            (Subject::Unmanaged, From::Unmanaged) => true,
            (Subject::Workload(named), From::Workload(caller)) => *named == caller,
            (Subject::Peer(peer), From::Peer(caller)) => *peer == caller,
            (Subject::Peer(peer), From::Remote(address)) => {
                let networks = &self.model.peers[*peer].networks;
                networks.is_empty() || networks.iter().any(|network| network.contains(&address))
            }
            _ => false,
        });
        let covers = |object: &Object| match object {
            Object::Any => true,
            Object::Service(index) => {
                let service = &services[*index];
                let place = if side == "inbound" {
                    service.workload == Some(workload)
                } else {
                    service.networks.iter().any(|network| network.contains(&to.address))
                };
                place && service.has_port(to.protocol, to.port)
            }
        };
        let names_service = rule.to.iter().any(covers);
        match (names_caller, names_service) {
            (false, false) => None,
            (false, true) => {
                let named: Vec<&str> = rule.from.iter().map(|subject| self.model.subject_name(*subject)).collect();
                Some(format!("is about callers {}", named.join(", ")))
            }
            (true, false) => Some(format!("covers {}", self.describe_objects(rule, services))),
            (true, true) => Some(self.why_matching_did_not_decide(rule, from, verdict)),
        }
    }

    fn why_matching_did_not_decide(&self, rule: &Rule, from: From, verdict: Verdict) -> String {
        if !is_in_force(rule, self.moment.wall) {
            let next = rule.when.as_ref().and_then(|schedule| schedule.next_change(self.moment.wall));
            return match next {
                Some(next) => format!("is not in force now; it will be from {next}"),
                None => "is never in force".to_owned(),
            };
        }
        if !rule.deny && verdict.reason == Reason::DeniedByRule {
            return "allows it, and a denial wins".to_owned();
        }
        if !rule.deny && !rule.is_met_by(!from.is_remote()) {
            if rule.is_vouched() {
                let lacks =
                    if from.is_remote() { "no node vouched for the caller" } else { "the caller is on this node" };
                return format!("requires {}, and {lacks}", names(&rule.require));
            }
            let proofs = names(&rule.require);
            return format!("requires {proofs}, which nobody showed");
        }
        if rule.deny && rule.observe {
            return "denies it, and is only observed".to_owned();
        }
        if verdict.reason == Reason::Failsafe {
            return "does not apply to ports of the failsafe list".to_owned();
        }
        match (rule.deny, verdict.action) {
            (false, Action::Allow | Action::Observe) => "allows it too; another rule was named first".to_owned(),
            (true, _) => "denies it too; another rule was named first".to_owned(),
            (false, Action::Deny) => "allows it, and something else refused it".to_owned(),
        }
    }

    fn describe_objects(&self, rule: &Rule, services: &[Service]) -> String {
        let describe = |object: &Object| match object {
            Object::Any => "everything".to_owned(),
            Object::Service(index) => {
                let service = &services[*index];
                let networks: Vec<String> = service.networks.iter().take(3).map(ToString::to_string).collect();
                let ports: Vec<String> = service.ports.iter().take(3).map(ToString::to_string).collect();
                let more = if service.networks.len() > 3 || service.ports.len() > 3 { ", ..." } else { "" };
                format!("`{}` ({} on {}{more})", service.name, ports.join(", "), networks.join(", "))
            }
        };
        rule.to.iter().map(describe).collect::<Vec<_>>().join("; ")
    }
}

fn names(proofs: &[Proof]) -> String {
    proofs.iter().map(|proof| proof.name()).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = |rule: &Option<String>| rule.as_ref().map_or(String::new(), |rule| format!(" by rule {rule}"));
        writeln!(f, "{} -> {} at {}", self.from, self.to, self.at)?;
        write!(f, "{} ({}){}", self.verdict, self.reason, by(&self.rule))?;
        match self.generation {
            Some(generation) => writeln!(f, ", generation {generation}")?,
            None => writeln!(f)?,
        }
        for step in &self.steps {
            let (side, workload) = (step.side, &step.workload);
            write!(f, "\n{side} of {workload}: {} ({}){}", step.verdict, step.reason, by(&step.rule))?;
            match &step.requires[..] {
                [] => writeln!(f)?,
                ["node"] => writeln!(f, ", which requires node: that the caller's node vouches for it")?,
                proofs => writeln!(f, ", which requires {}", proofs.join(", "))?,
            }
            for other in &step.others {
                writeln!(f, "  rule {} {}", other.rule, other.why)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_as_people_write_them() {
        let to: To = "10.0.0.7:443/tcp".parse().unwrap();
        assert_eq!(to.to_string(), "10.0.0.7:443/tcp");
        let to: To = "[fd00::1]:53/udp".parse().unwrap();
        assert_eq!(to.to_string(), "[fd00::1]:53/udp");
        for text in ["10.0.0.7/icmp", "fd00::1/icmpv6", "10.0.0.7/proto/47"] {
            assert_eq!(text.parse::<To>().unwrap().to_string(), text);
        }
        for text in ["10.0.0.7", "10.0.0.7/tcp", "10.0.0.7:70000/tcp", "host:1/tcp", "10.0.0.7/proto/300"] {
            assert!(text.parse::<To>().is_err(), "{text}");
        }
    }
}
