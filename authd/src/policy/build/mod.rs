//! From raw files to the model.
//!
//! Enters: files as they are written. Leaves: a [`Model`] in which nothing can dangle, or the list of all that is wrong.
//! Never: tables.

mod certificates;
mod delegations;
mod issuers;
mod nodes;
mod permits;
mod rules;
mod tools;

use std::{collections::HashMap, ops::Range, sync::Arc, time::Duration};

use toml::Spanned;

use super::{
    diagnostic::{Diagnostic, Place, Source},
    file::{self, Inbound, Kind, Mode, Texts},
    model::{INSTANCE, Issuer, Model, Peer, Service, Subject, Workload, is_name},
    network::{Network, Ports},
    pattern::Pattern,
};

/// Names that mean something by themselves.
const RESERVED: [&str; 3] = ["any", "unmanaged", "builtin"];
const DEFAULT_LOCAL: [&str; 2] = ["127.0.0.0/8", "::1"];

/// The rules, workloads and services of all files together.
pub fn build(files: Vec<(Source, file::File)>) -> (Option<Model>, Vec<Diagnostic>) {
    let mut builder = Builder::default();
    let mut raw = Raw::default();
    for (source, file) in files {
        let file::File {
            trust_domain,
            mode,
            workload,
            peer,
            node,
            service,
            issuer,
            authority,
            delegation,
            tool,
            approvers,
            mcp_server,
            rule,
        } = file;
        builder.once(&source, "trust_domain", trust_domain, &mut raw.trust_domain);
        builder.once(&source, "mode", mode, &mut raw.mode);
        raw.workloads.extend(workload.into_iter().map(|w| (source.clone(), w)));
        raw.peers.extend(peer.into_iter().map(|p| (source.clone(), p)));
        raw.nodes.extend(node.into_iter().map(|n| (source.clone(), n)));
        raw.services.extend(service.into_iter().map(|s| (source.clone(), s)));
        raw.issuers.extend(issuer.into_iter().map(|i| (source.clone(), i)));
        raw.authorities.extend(authority.into_iter().map(|a| (source.clone(), a)));
        raw.delegations.extend(delegation.into_iter().map(|d| (source.clone(), d)));
        raw.tools.extend(tool.into_iter().map(|t| (source.clone(), t)));
        raw.approvers.extend(approvers.into_iter().map(|a| (source.clone(), a)));
        raw.mcp_servers.extend(mcp_server.into_iter().map(|s| (source.clone(), s)));
        raw.rules.extend(rule.into_iter().map(|r| (source.clone(), r)));
    }
    let model = builder.model(raw);
    let complete = !builder.diagnostics.iter().any(Diagnostic::is_error);
    (complete.then_some(model), builder.diagnostics)
}

#[derive(Default)]
struct Raw {
    trust_domain: Option<(Place, String)>,
    mode: Option<(Place, Mode)>,
    workloads: Vec<(Source, Spanned<file::Workload>)>,
    peers: Vec<(Source, Spanned<file::Peer>)>,
    nodes: Vec<(Source, Spanned<file::Node>)>,
    services: Vec<(Source, Spanned<file::Service>)>,
    issuers: Vec<(Source, Spanned<file::Issuer>)>,
    authorities: Vec<(Source, Spanned<file::Authority>)>,
    delegations: Vec<(Source, Spanned<file::Delegation>)>,
    tools: Vec<(Source, Spanned<file::Tool>)>,
    approvers: Vec<(Source, Spanned<file::Approvers>)>,
    mcp_servers: Vec<(Source, Spanned<file::McpServer>)>,
    rules: Vec<(Source, Spanned<file::Rule>)>,
}

#[derive(Default)]
struct Builder {
    diagnostics: Vec<Diagnostic>,
    callers: HashMap<String, (Subject, Place)>,
    services: HashMap<String, (usize, Place)>,
    authorities: HashMap<String, (usize, Place)>,
    issuers: HashMap<String, (usize, Place)>,
    mcp_servers: HashMap<String, (usize, Place)>,
}

impl Builder {
    fn model(&mut self, raw: Raw) -> Model {
        let Raw {
            trust_domain,
            mode,
            workloads,
            peers,
            nodes,
            services,
            issuers,
            authorities,
            delegations,
            tools,
            approvers,
            mcp_servers,
            rules,
        } = raw;
        let trust_domain = self.trust_domain(trust_domain);
        let authorities = self.authorities(authorities);
        let issuers: Vec<Issuer> =
            issuers.into_iter().filter_map(|(source, issuer)| self.issuer(&source, issuer.into_inner())).collect();
        let issuers: Vec<Issuer> = issuers.into_iter().chain([Issuer::own()]).collect();
        for (index, issuer) in issuers.iter().enumerate() {
            self.issuers.insert(issuer.name.clone(), (index, issuer.place.clone()));
        }
        // Names first: a rule may stand before what it names.
        for (index, (source, workload)) in workloads.iter().enumerate() {
            self.caller(source, &workload.as_ref().name, Subject::Workload(index));
        }
        for (index, (source, peer)) in peers.iter().enumerate() {
            self.caller(source, &peer.as_ref().name, Subject::Peer(index));
        }
        for (index, (source, service)) in services.iter().enumerate() {
            let name = &service.as_ref().name;
            let at = place(source, name.span());
            self.name(&at, name.as_ref());
            if let Some((_, first)) = self.services.get(name.as_ref()) {
                self.duplicate(&at, &first.clone(), "service", name.as_ref());
            } else {
                self.services.insert(name.as_ref().clone(), (index, at));
            }
        }
        let workloads: Vec<Workload> = workloads.into_iter().map(|(s, w)| self.workload(&s, w.into_inner())).collect();
        let peers: Vec<Peer> = peers.into_iter().map(|(s, p)| self.peer(&s, p.into_inner())).collect();
        let services: Vec<Service> =
            services.into_iter().map(|(s, v)| self.service(&s, v.into_inner(), &workloads)).collect();
        self.ambiguous_patterns(&workloads);
        let mut model = Model {
            trust_domain,
            observe: mode.is_some_and(|(_, mode)| mode == Mode::Observe),
            workloads,
            peers,
            nodes: Vec::new(),
            services,
            authorities,
            issuers,
            delegations: Vec::new(),
            mcp_servers: self.mcp_servers(mcp_servers),
            approvers: self.approvers(approvers),
            tools: Vec::new(),
            actions: Arc::default(),
            rules: Vec::new(),
        };
        model.nodes = self.nodes(nodes, &model);
        model.delegations = self.delegations(delegations, &model);
        let mut names: HashMap<String, Place> = HashMap::new();
        for (source, rule) in rules {
            let rule = self.rule(&source, rule.into_inner(), &model);
            if let Some(first) = names.get(&rule.name) {
                self.duplicate(&rule.place, first, "rule", &rule.name);
            }
            names.insert(rule.name.clone(), rule.place.clone());
            model.rules.push(rule);
        }
        model.rules.sort_by(|a, b| a.name.cmp(&b.name));
        model.tools = self.tools(tools, &model);
        model
    }

    fn error(&mut self, code: &'static str, at: &Place, message: impl Into<String>, help: impl Into<String>) {
        self.diagnostics.push(Diagnostic::error(code, at.clone(), message, help));
    }

    fn duplicate(&mut self, at: &Place, first: &Place, what: &str, name: &str) {
        let diagnostic = Diagnostic::error(
            "duplicate_name",
            at.clone(),
            format!("{what} `{name}` is defined twice"),
            "give one of them another name",
        );
        self.diagnostics.push(diagnostic.with_related(first, "first defined here"));
    }

    fn once<T>(&mut self, source: &Source, key: &str, value: Option<Spanned<T>>, slot: &mut Option<(Place, T)>) {
        let Some(value) = value else { return };
        let at = place(source, value.span());
        match slot {
            None => *slot = Some((at, value.into_inner())),
            Some((first, _)) => {
                let diagnostic = Diagnostic::error(
                    "duplicate_setting",
                    at,
                    format!("`{key}` is set in more than one place"),
                    "keep one of them: it holds for the whole policy",
                );
                self.diagnostics.push(diagnostic.with_related(first, "first set here"));
            }
        }
    }

    /// SPIFFE-ID 2.1: lower case letters, digits, dots, dashes and underscores, at most 255 bytes.
    fn trust_domain(&mut self, given: Option<(Place, String)>) -> String {
        let Some((at, domain)) = given else {
            self.diagnostics.push(Diagnostic::general(
                "no_trust_domain",
                "no file sets `trust_domain`",
                "add `trust_domain = \"example.org\"` at the top of one file: workloads' SPIFFE IDs begin with it",
            ));
            return String::new();
        };
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-_".contains(c);
        if domain.is_empty() || domain.len() > 255 || !domain.chars().all(allowed) {
            self.error(
                "bad_trust_domain",
                &at,
                format!("`{domain}` cannot be a trust domain"),
                "use lower case letters, digits, `.`, `-` and `_` only, without `spiffe://`",
            );
        }
        domain
    }

    fn name(&mut self, at: &Place, name: &str) {
        if !is_name(name) {
            self.error(
                "bad_name",
                at,
                format!("`{name}` cannot be a name"),
                "use 1 to 64 letters, digits, `-`, `_` and `.`, beginning with a letter or digit",
            );
        } else if RESERVED.contains(&name) {
            self.error(
                "reserved_name",
                at,
                format!("`{name}` is a word of the policy language"),
                "choose another name",
            );
        }
    }

    fn caller(&mut self, source: &Source, name: &Spanned<String>, subject: Subject) {
        let at = place(source, name.span());
        self.name(&at, name.as_ref());
        if let Some((_, first)) = self.callers.get(name.as_ref()) {
            self.duplicate(&at, &first.clone(), "workload or peer", name.as_ref());
        } else {
            self.callers.insert(name.as_ref().clone(), (subject, at));
        }
    }

    /// A tenant or an environment.
    fn label(&mut self, source: &Source, what: &str, label: Option<Spanned<String>>) -> Option<String> {
        let label = label?;
        let at = place(source, label.span());
        let label = label.into_inner();
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if label.is_empty() || label.len() > 64 || !label.chars().all(allowed) {
            self.error(
                "bad_label",
                &at,
                format!("`{label}` cannot be a {what}"),
                "use 1 to 64 letters, digits, `-`, `_` and `.`",
            );
        }
        Some(label)
    }

    fn workload(&mut self, source: &Source, raw: file::Workload) -> Workload {
        let file::Workload { name, kind, cgroup, tenant, environment, mode, raw_sockets, inbound, spiffe_id } = raw;
        let at = place(source, name.span());
        let kind_at = place(source, kind.span());
        let kind = kind.into_inner();
        if kind == Kind::Partner {
            self.error(
                "bad_kind",
                &kind_at,
                "a workload of this node cannot be a partner",
                "use service, job, agent, gateway or person; partners are `[[peer]]`s",
            );
        }
        let cgroup_at = place(source, cgroup.span());
        let mut patterns = Vec::new();
        for text in Texts::spanned(cgroup) {
            let at = place(source, text.span());
            match Pattern::parse(text.as_ref()) {
                Ok(pattern) => patterns.push((pattern, at)),
                Err(error) => self.error(
                    "bad_cgroup",
                    &at,
                    format!("`{}` is no cgroup pattern: {error}", text.as_ref()),
                    "write a path below the enforced root, such as `/system.slice/payments-*.service`",
                ),
            }
        }
        if patterns.is_empty() && !self.diagnostics.iter().any(|d| d.code == "bad_cgroup") {
            self.error(
                "no_cgroup",
                &cgroup_at,
                format!("workload `{}` has no cgroup", name.as_ref()),
                "say by which cgroup it is recognised",
            );
        }
        let many = patterns.len() > 1 || patterns.iter().any(|(pattern, _)| pattern.has_wildcard());
        let spiffe_path = self.spiffe_path(source, name.as_ref(), kind, many, spiffe_id);
        Workload {
            patterns,
            kind,
            tenant: self.label(source, "tenant", tenant),
            environment: self.label(source, "environment", environment),
            observe: mode == Mode::Observe,
            raw_sockets,
            closed: match inbound {
                Some(inbound) => inbound == Inbound::Closed,
                None => matches!(kind, Kind::Agent | Kind::Job),
            },
            spiffe_path,
            name: name.into_inner(),
            place: at,
        }
    }

    /// SPIFFE-ID 2.2. Agents and jobs with many instances are told apart by default.
    fn spiffe_path(
        &mut self,
        source: &Source,
        name: &str,
        kind: Kind,
        many: bool,
        given: Option<Spanned<String>>,
    ) -> String {
        let Some(given) = given else {
            let apart = many && matches!(kind, Kind::Agent | Kind::Job);
            return if apart { format!("/{name}/{{instance}}") } else { format!("/{name}") };
        };
        let at = place(source, given.span());
        let path = given.into_inner();
        let plain = path.replace(INSTANCE, "i");
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let segment = |s: &str| !s.is_empty() && s != "." && s != ".." && s.chars().all(allowed);
        let sound = plain.strip_prefix('/').is_some_and(|rest| rest.split('/').all(segment)) && path.len() <= 1024;
        if !sound {
            self.error(
                "bad_spiffe_id",
                &at,
                format!("`{path}` is no path of a SPIFFE ID"),
                "write a path such as `/payments/{instance}`: letters, digits, `-`, `_`, `.` between slashes",
            );
        }
        path
    }

    fn peer(&mut self, source: &Source, raw: file::Peer) -> Peer {
        let file::Peer { name, kind, networks, spiffe_id, dns, subject, tenant, environment } = raw;
        let at = place(source, name.span());
        if networks.is_empty() && spiffe_id.is_none() && dns.is_none() && subject.is_none() {
            self.error(
                "unidentified_peer",
                &at,
                format!("nothing says how peer `{}` is known", name.as_ref()),
                "add `networks = [\"192.0.2.0/24\"]`, or `spiffe_id`, `dns` or `subject` of its certificate",
            );
        }
        Peer {
            networks: self.networks(source, networks),
            spiffe_id: spiffe_id.and_then(|text| self.spiffe_id(source, text)),
            dns: dns.and_then(|text| self.dns(source, text)),
            subject: subject.and_then(|text| self.certificate_subject(source, text)),
            kind: kind.unwrap_or(Kind::Partner),
            tenant: self.label(source, "tenant", tenant),
            environment: self.label(source, "environment", environment),
            name: name.into_inner(),
            place: at,
        }
    }

    fn networks(&mut self, source: &Source, texts: Vec<Spanned<String>>) -> Vec<Network> {
        let mut networks: Vec<Network> =
            texts.into_iter().filter_map(|text| self.network(&place(source, text.span()), text.as_ref())).collect();
        networks.sort();
        networks.dedup();
        networks
    }

    fn network(&mut self, at: &Place, text: &str) -> Option<Network> {
        match Network::parse(text) {
            Ok(network) => Some(network),
            Err(error) => {
                self.error("bad_network", at, error.to_string(), "correct the address");
                None
            }
        }
    }

    fn service(&mut self, source: &Source, raw: file::Service, workloads: &[Workload]) -> Service {
        let file::Service { name, addresses, workload, ports, sensitivity, tenant, environment } = raw;
        let at = place(source, name.span());
        let local = workload.as_ref().and_then(|w| match self.callers.get(w.as_ref()) {
            Some((Subject::Workload(index), _)) => Some(*index),
            _ => None,
        });
        if let Some(workload) = &workload
            && local.is_none()
        {
            let help = self.similar(workload.as_ref(), self.workload_names(), "define it as a `[[workload]]`");
            let message =
                format!("service `{}` is offered by `{}`, which is no workload", name.as_ref(), workload.as_ref());
            self.error("unknown_workload", &place(source, workload.span()), message, help);
        }
        let mut networks = Vec::new();
        match addresses {
            Some(addresses) if addresses.is_empty() => self.error(
                "no_addresses",
                &at,
                format!("service `{}` has no address", name.as_ref()),
                "list where it is called, or leave `addresses` out of a service with `workload`",
            ),
            Some(addresses) => networks = self.networks(source, addresses),
            None if workload.is_none() => self.error(
                "no_addresses",
                &at,
                format!("nothing says where service `{}` is", name.as_ref()),
                "add `addresses = [\"10.20.0.0/16\"]`, or `workload = \"...\"` for one of this node",
            ),
            None => networks = DEFAULT_LOCAL.iter().filter_map(|text| Network::parse(text).ok()).collect(),
        }
        let mut parsed = Vec::new();
        if ports.is_empty() {
            self.error(
                "no_ports",
                &at,
                format!("service `{}` has no port", name.as_ref()),
                "add `ports = [\"tcp/443\"]`",
            );
        }
        for text in ports {
            match Ports::parse(text.as_ref()) {
                Ok(ports) => parsed.extend(ports),
                Err(error) => {
                    let at = place(source, text.span());
                    self.error("bad_ports", &at, error.to_string(), "correct the port");
                }
            }
        }
        parsed.sort();
        parsed.dedup();
        let tenant = self.inherited(source, "tenant", tenant, local.and_then(|w| workloads[w].tenant.clone()));
        let environment =
            self.inherited(source, "environment", environment, local.and_then(|w| workloads[w].environment.clone()));
        Service {
            name: name.into_inner(),
            workload: local,
            networks,
            ports: parsed,
            sensitivity,
            tenant,
            environment,
            place: at,
        }
    }

    /// A service of this node lies where its workload lies.
    fn inherited(
        &mut self,
        source: &Source,
        what: &str,
        own: Option<Spanned<String>>,
        workload: Option<String>,
    ) -> Option<String> {
        let at = own.as_ref().map(|own| place(source, own.span()));
        let own = self.label(source, what, own);
        match (at, own, workload) {
            (Some(at), Some(own), Some(workload)) if own != workload => {
                self.error(
                    "contradiction",
                    &at,
                    format!("the service's {what} is `{own}`, its workload's is `{workload}`"),
                    "leave it out: a service of this node has its workload's",
                );
                Some(own)
            }
            (_, own, workload) => own.or(workload),
        }
    }

    /// `90s`, `15m`, `8h`.
    fn duration(&mut self, source: &Source, text: &Spanned<String>) -> Option<Duration> {
        let value = text.as_ref();
        let split = value.len().saturating_sub(1);
        let parsed = value.is_char_boundary(split).then(|| value.split_at(split)).and_then(|(number, unit)| {
            let scale = match unit {
                "s" => 1,
                "m" => 60,
                "h" => 3600,
                _ => return None,
            };
            let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            let seconds = number.parse::<u64>().ok().filter(|n| digits && *n > 0)?.checked_mul(scale)?;
            Some(Duration::from_secs(seconds))
        });
        if parsed.is_none() {
            self.error(
                "bad_duration",
                &place(source, text.span()),
                format!("`{value}` is no duration"),
                "write a whole number with a unit: 90s, 15m, 8h",
            );
        }
        parsed
    }

    /// Two patterns that can match the same cgroup, neither longer nor more literal than the other.
    fn ambiguous_patterns(&mut self, workloads: &[Workload]) {
        type Group<'a> = Vec<(usize, &'a Pattern, &'a Place)>;
        let mut groups: HashMap<(usize, usize), Group<'_>> = HashMap::new();
        for (index, workload) in workloads.iter().enumerate() {
            for (pattern, at) in &workload.patterns {
                groups.entry(pattern.specificity()).or_default().push((index, pattern, at));
            }
        }
        for group in groups.into_values() {
            let mut literal: HashMap<&Pattern, (usize, &Place)> = HashMap::new();
            let mut globs: Vec<(usize, &Pattern, &Place)> = Vec::new();
            for (index, pattern, at) in group {
                let clash = if pattern.has_wildcard() {
                    globs.iter().find(|(_, other, _)| other.intersects(pattern)).map(|(_, _, at)| *at)
                } else {
                    literal.get(pattern).map(|(_, at)| *at)
                };
                if let Some(first) = clash {
                    let diagnostic = Diagnostic::error(
                        "ambiguous_cgroup",
                        at.clone(),
                        "another pattern matches the same cgroups and is just as exact",
                        "make one of them longer or more literal",
                    );
                    self.diagnostics.push(diagnostic.with_related(first, "the other one"));
                    continue;
                }
                if pattern.has_wildcard() {
                    globs.push((index, pattern, at));
                } else {
                    literal.insert(pattern, (index, at));
                }
            }
        }
    }

    fn workload_names(&self) -> Vec<String> {
        self.callers.iter().filter(|(_, (s, _))| matches!(s, Subject::Workload(_))).map(|(n, _)| n.clone()).collect()
    }

    /// A remedy for a name that nobody has.
    fn similar(&self, name: &str, known: Vec<String>, otherwise: &str) -> String {
        similar(name, known.iter().map(String::as_str), otherwise)
    }
}

/// A remedy for a name that nobody has.
pub fn similar<'a>(name: &str, known: impl Iterator<Item = &'a str>, otherwise: &str) -> String {
    let nearest = known.map(|k| (distance(name, k), k)).min();
    match nearest {
        Some((distance, nearest)) if distance <= 2 => format!("did you mean `{nearest}`?"),
        _ => otherwise.to_owned(),
    }
}

fn place(source: &Source, span: Range<usize>) -> Place {
    Place { source: source.clone(), span }
}

/// Edits between two words (Levenshtein), for remedies only.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = (diagonal + usize::from(x != *y)).min(above + 1).min(row[j] + 1);
            diagonal = above;
        }
    }
    row[b.len()]
}
