//! The policy with every name resolved and every value in range.
//!
//! Enters: raw files. Leaves: a [`Model`] in which nothing can dangle, or the list of all that is wrong. Never: tables.

use std::{collections::HashMap, ops::Range, time::Duration};

use jiff::tz::TimeZone;
use toml::Spanned;

use super::{
    diagnostic::{Diagnostic, Place, Source},
    file::{self, Inbound, Kind, Mode, Proof, Sensitivity, Texts},
    network::{Network, Ports},
    pattern::{Pattern, Patterns},
    schedule::{self, Schedule},
};

#[derive(Clone, Debug)]
pub struct Model {
    pub trust_domain: String,
    pub observe: bool,
    pub workloads: Vec<Workload>,
    pub peers: Vec<Peer>,
    pub services: Vec<Service>,
    /// By name: where several decide alike, the first is the one that is named.
    pub rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
pub struct Workload {
    pub name: String,
    pub kind: Kind,
    pub patterns: Vec<(Pattern, Place)>,
    pub tenant: Option<String>,
    pub environment: Option<String>,
    pub observe: bool,
    pub raw_sockets: bool,
    /// Ports that no service guards accept nobody.
    pub closed: bool,
    /// Path of the SPIFFE ID, with `{instance}` where the instance's name goes.
    pub spiffe_path: String,
    pub place: Place,
}

impl Workload {
    /// Operators must be able to reach what they log in through; agents and jobs are nothing that they log in through.
    pub fn has_failsafe(&self) -> bool {
        !matches!(self.kind, Kind::Agent | Kind::Job)
    }
}

#[derive(Clone, Debug)]
pub struct Peer {
    pub name: String,
    pub kind: Kind,
    pub networks: Vec<Network>,
    pub tenant: Option<String>,
    pub environment: Option<String>,
    pub place: Place,
}

#[derive(Clone, Debug)]
pub struct Service {
    pub name: String,
    /// The local workload that offers it, by index: calls to it are guarded.
    pub workload: Option<usize>,
    /// Where it is called.
    pub networks: Vec<Network>,
    pub ports: Vec<Ports>,
    pub sensitivity: Sensitivity,
    pub tenant: Option<String>,
    pub environment: Option<String>,
    pub place: Place,
}

impl Service {
    /// One that every policy has.
    pub fn builtin(name: &str, networks: Vec<Network>, ports: Vec<Ports>) -> Self {
        Self {
            name: name.to_owned(),
            workload: None,
            networks,
            ports,
            sensitivity: Sensitivity::Low,
            tenant: None,
            environment: None,
            place: Place::nowhere(),
        }
    }

    pub fn has_port(&self, protocol: u8, port: u16) -> bool {
        self.ports.iter().any(|ports| ports.contains(protocol, port))
    }
}

/// Who a rule is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Subject {
    /// Everybody: workloads, unmanaged processes, remote callers.
    Any,
    /// Processes of this node that no workload matches.
    Unmanaged,
    Workload(usize),
    Peer(usize),
}

/// What a rule is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Object {
    /// Every address and port, and every guarded service.
    Any,
    Service(usize),
}

#[derive(Clone, Debug)]
pub struct Rule {
    pub name: String,
    pub from: Vec<Subject>,
    pub to: Vec<Object>,
    pub deny: bool,
    pub observe: bool,
    pub require: Vec<Proof>,
    pub grant_ttl: Option<Duration>,
    pub when: Option<Schedule>,
    pub place: Place,
}

impl Rule {
    /// One that every policy has: everybody may, if no rule denies it.
    pub fn builtin(name: &str, to: Object) -> Self {
        Self {
            name: name.to_owned(),
            from: vec![Subject::Any],
            to: vec![to],
            deny: false,
            observe: false,
            require: Vec::new(),
            grant_ttl: None,
            when: None,
            place: Place::nowhere(),
        }
    }

    /// Whether what the rule requires is there without anybody showing anything.
    pub fn is_met_by(&self, attested: bool) -> bool {
        self.require.iter().all(|proof| attested && *proof == Proof::Cgroup)
    }
}

/// Names that mean something by themselves.
const RESERVED: [&str; 3] = ["any", "unmanaged", "builtin"];
const MAX_GRANT_TTL: Duration = Duration::from_secs(24 * 3600);
const DEFAULT_LOCAL: [&str; 2] = ["127.0.0.0/8", "::1"];

/// The rules, workloads and services of all files together.
pub fn build(files: Vec<(Source, file::File)>) -> (Option<Model>, Vec<Diagnostic>) {
    let mut builder = Builder::default();
    let mut raw = Raw::default();
    for (source, file) in files {
        let file::File { trust_domain, mode, workload, peer, service, issuer, rule } = file;
        builder.once(&source, "trust_domain", trust_domain, &mut raw.trust_domain);
        builder.once(&source, "mode", mode, &mut raw.mode);
        raw.workloads.extend(workload.into_iter().map(|w| (source.clone(), w)));
        raw.peers.extend(peer.into_iter().map(|p| (source.clone(), p)));
        raw.services.extend(service.into_iter().map(|s| (source.clone(), s)));
        raw.issuers.extend(issuer.into_iter().map(|i| (source.clone(), i)));
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
    services: Vec<(Source, Spanned<file::Service>)>,
    issuers: Vec<(Source, Spanned<file::Issuer>)>,
    rules: Vec<(Source, Spanned<file::Rule>)>,
}

#[derive(Default)]
struct Builder {
    diagnostics: Vec<Diagnostic>,
    callers: HashMap<String, (Subject, Place)>,
    services: HashMap<String, (usize, Place)>,
    issuers: HashMap<String, Place>,
}

impl Builder {
    fn model(&mut self, raw: Raw) -> Model {
        let Raw { trust_domain, mode, workloads, peers, services, issuers, rules } = raw;
        let trust_domain = self.trust_domain(trust_domain);
        for (source, issuer) in issuers {
            self.issuer(&source, issuer.into_inner());
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
            services,
            rules: Vec::new(),
        };
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

    /// Names become path segments of SPIFFE IDs and words of command lines.
    fn name(&mut self, at: &Place, name: &str) {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) || !name.starts_with(char::is_alphanumeric)
        {
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

    fn issuer(&mut self, source: &Source, raw: file::Issuer) {
        let file::Issuer { name, kind, issuer, jwks_url, jwks_file, introspection_url, algorithms, max_ttl } = raw;
        let at = place(source, name.span());
        self.name(&at, name.as_ref());
        if let Some(first) = self.issuers.get(name.as_ref()) {
            self.duplicate(&at, &first.clone(), "issuer", name.as_ref());
        }
        if !issuer.as_ref().starts_with("https://") {
            self.error(
                "bad_issuer",
                &place(source, issuer.span()),
                format!("issuer `{}` is no https URL", issuer.as_ref()),
                "write the `iss` claim exactly as the issuer's tokens carry it (RFC 8414, 2)",
            );
        }
        for url in [&jwks_url, &introspection_url].into_iter().flatten() {
            if !url.as_ref().starts_with("https://") {
                self.error(
                    "bad_url",
                    &place(source, url.span()),
                    format!("`{}` is no https URL", url.as_ref()),
                    "keys and answers must not come over a connection that anybody can change",
                );
            }
        }
        match kind {
            file::IssuerKind::Jwt if jwks_url.is_none() == jwks_file.is_none() => self.error(
                "issuer_keys",
                &at,
                format!("issuer `{}` needs either `jwks_url` or `jwks_file`", name.as_ref()),
                "say where its public keys are, in one way",
            ),
            file::IssuerKind::Jwt if algorithms.is_empty() => self.error(
                "issuer_algorithms",
                &at,
                format!("issuer `{}` accepts no algorithm", name.as_ref()),
                "list what it signs with, such as `algorithms = [\"ES256\"]`",
            ),
            file::IssuerKind::Introspection if introspection_url.is_none() => self.error(
                "issuer_introspection",
                &at,
                format!("issuer `{}` has no `introspection_url`", name.as_ref()),
                "say where tokens are introspected (RFC 7662)",
            ),
            _ => {}
        }
        // RFC 7518, 3.1, and RFC 8037: asymmetric ones only. A shared secret would let every verifier sign.
        const KNOWN: [&str; 9] = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"];
        for algorithm in &algorithms {
            if !KNOWN.contains(&algorithm.as_ref().as_str()) {
                self.error(
                    "bad_algorithm",
                    &place(source, algorithm.span()),
                    format!("`{}` is no signature algorithm that authd accepts", algorithm.as_ref()),
                    format!("use some of {}", KNOWN.join(", ")),
                );
            }
        }
        if let Some(max_ttl) = max_ttl {
            self.duration(source, &max_ttl);
        }
        self.issuers.insert(name.into_inner(), at);
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
        let plain = path.replace("{instance}", "i");
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
        for (key, value) in [("spiffe_id", &spiffe_id), ("dns", &dns), ("subject", &subject)] {
            if let Some(value) = value {
                self.error(
                    "unenforceable_peer",
                    &place(source, value.span()),
                    format!("peer `{}` is known by `{key}`, and nothing checks certificates of peers yet", name.as_ref()),
                    "name the networks that it calls from instead",
                );
            }
        }
        if networks.is_empty() && spiffe_id.is_none() && dns.is_none() && subject.is_none() {
            self.error(
                "unidentified_peer",
                &at,
                format!("nothing says how peer `{}` is known", name.as_ref()),
                "add `networks = [\"192.0.2.0/24\"]`",
            );
        }
        Peer {
            networks: self.networks(source, networks),
            kind: kind.unwrap_or(Kind::Partner),
            tenant: self.label(source, "tenant", tenant),
            environment: self.label(source, "environment", environment),
            name: name.into_inner(),
            place: at,
        }
    }

    fn networks(&mut self, source: &Source, texts: Vec<Spanned<String>>) -> Vec<Network> {
        let mut networks = Vec::new();
        for text in texts {
            match Network::parse(text.as_ref()) {
                Ok(network) => networks.push(network),
                Err(error) => {
                    let at = place(source, text.span());
                    self.error("bad_network", &at, error.to_string(), "correct the address");
                }
            }
        }
        networks.sort();
        networks.dedup();
        networks
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
            let message = format!("service `{}` is offered by `{}`, which is no workload", name.as_ref(), workload.as_ref());
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

    fn rule(&mut self, source: &Source, raw: file::Rule, model: &Model) -> Rule {
        let file::Rule {
            name,
            from,
            to,
            action,
            mode,
            require,
            token,
            grant_ttl,
            across_tenants,
            across_environments,
            when,
        } = raw;
        let at = place(source, name.span());
        self.name(&at, name.as_ref());
        let deny = action == file::Action::Deny;
        if from.is_empty() || to.is_empty() {
            let (side, help) =
                if from.is_empty() { ("nobody", "name who may call") } else { ("nothing", "name what may be called") };
            self.error("empty_rule", &at, format!("rule `{}` is about {side}", name.as_ref()), help);
        }
        let subjects: Vec<(Subject, Place)> =
            from.into_iter().filter_map(|text| self.subject(source, text)).collect();
        let objects: Vec<(Object, Place)> = to.into_iter().filter_map(|text| self.object(source, text)).collect();
        for (subject, at) in &subjects {
            for (object, _) in &objects {
                self.enforceable(at, *subject, *object, model);
                if !deny {
                    self.boundary(at, *subject, *object, model, Label::Tenant, across_tenants);
                    self.boundary(at, *subject, *object, model, Label::Environment, across_environments);
                }
            }
        }
        let proofs = self.require(source, require, deny, token.as_ref(), &at);
        if let Some(token) = token {
            let file::Token { issuer, audience: _, scopes: _, bound: _ } = token.into_inner();
            if !self.issuers.contains_key(issuer.as_ref()) {
                let help = self.similar(issuer.as_ref(), self.issuers.keys().cloned().collect(), "define an `[[issuer]]`");
                let message = format!("no issuer is called `{}`", issuer.as_ref());
                self.error("unknown_issuer", &place(source, issuer.span()), message, help);
            }
        }
        let grant_ttl = grant_ttl.and_then(|ttl| {
            let at = place(source, ttl.span());
            let duration = self.duration(source, &ttl)?;
            if duration > MAX_GRANT_TTL {
                self.error("long_grant", &at, "a grant lives for a day at most", "choose a shorter `grant_ttl`");
            }
            Some(duration)
        });
        Rule {
            name: name.into_inner(),
            from: sorted(subjects.into_iter().map(|(s, _)| s)),
            to: sorted(objects.into_iter().map(|(o, _)| o)),
            deny,
            observe: mode == Mode::Observe,
            require: proofs,
            grant_ttl,
            when: when.and_then(|when| self.when(source, when.into_inner())),
            place: at,
        }
    }

    fn subject(&mut self, source: &Source, text: Spanned<String>) -> Option<(Subject, Place)> {
        let at = place(source, text.span());
        let subject = match text.as_ref().as_str() {
            "any" => Subject::Any,
            "unmanaged" => Subject::Unmanaged,
            name => match self.callers.get(name) {
                Some((subject, _)) => *subject,
                None => {
                    let names = self.callers.keys().cloned().collect();
                    let help = self.similar(name, names, "define it as a `[[workload]]` or a `[[peer]]`");
                    self.error("unknown_caller", &at, format!("no workload or peer is called `{name}`"), help);
                    return None;
                }
            },
        };
        Some((subject, at))
    }

    fn object(&mut self, source: &Source, text: Spanned<String>) -> Option<(Object, Place)> {
        let at = place(source, text.span());
        let object = match text.as_ref().as_str() {
            "any" => Object::Any,
            name => match self.services.get(name) {
                Some((index, _)) => Object::Service(*index),
                None => {
                    let names = self.services.keys().cloned().collect();
                    let help = self.similar(name, names, "define it as a `[[service]]`");
                    self.error("unknown_service", &at, format!("no service is called `{name}`"), help);
                    return None;
                }
            },
        };
        Some((object, at))
    }

    /// Callers that authd does not hold by their cgroup can only be kept out of services that it guards.
    fn enforceable(&mut self, at: &Place, subject: Subject, object: Object, model: &Model) {
        let Object::Service(index) = object else { return };
        let service = &model.services[index];
        if service.workload.is_some() {
            return;
        }
        let who = match subject {
            Subject::Peer(peer) => format!("peer `{}`", model.peers[peer].name),
            Subject::Unmanaged => "unmanaged processes".to_owned(),
            Subject::Any | Subject::Workload(_) => return,
        };
        self.error(
            "unenforceable",
            at,
            format!("nothing on this node decides whether {who} may call `{}`, which is elsewhere", service.name),
            "name a workload as the caller, or a service with `workload = ...`",
        );
    }

    fn boundary(&mut self, at: &Place, subject: Subject, object: Object, model: &Model, label: Label, across: bool) {
        if across {
            return;
        }
        let (what, flag) = match label {
            Label::Tenant => ("tenant", "across_tenants"),
            Label::Environment => ("environment", "across_environments"),
        };
        let of_service = |s: &Service| match label {
            Label::Tenant => s.tenant.clone(),
            Label::Environment => s.environment.clone(),
        };
        let of_workload = |w: &Workload| match label {
            Label::Tenant => w.tenant.clone(),
            Label::Environment => w.environment.clone(),
        };
        let of_peer = |p: &Peer| match label {
            Label::Tenant => p.tenant.clone(),
            Label::Environment => p.environment.clone(),
        };
        let callers: Vec<Option<String>> = match subject {
            Subject::Workload(index) => vec![of_workload(&model.workloads[index])],
            Subject::Peer(index) => vec![of_peer(&model.peers[index])],
            Subject::Unmanaged => return,
            Subject::Any => model.workloads.iter().map(of_workload).chain(model.peers.iter().map(of_peer)).collect(),
        };
        let services: Vec<&Service> = match object {
            Object::Service(index) => vec![&model.services[index]],
            Object::Any => model.services.iter().collect(),
        };
        for service in services {
            let Some(theirs) = of_service(service) else { continue };
            if let Some(Some(caller)) = callers.iter().find(|c| c.as_ref().is_some_and(|c| *c != theirs)) {
                self.error(
                    "boundary",
                    at,
                    format!("the rule lets {what} `{caller}` call `{}` of {what} `{theirs}`", service.name),
                    format!("add `{flag} = true` if that is meant"),
                );
                return;
            }
        }
    }

    fn require(
        &mut self,
        source: &Source,
        require: Vec<Spanned<Proof>>,
        deny: bool,
        token: Option<&Spanned<file::Token>>,
        rule: &Place,
    ) -> Vec<Proof> {
        let mut proofs: Vec<Proof> = Vec::new();
        for proof in require {
            let at = place(source, proof.span());
            if deny {
                self.error(
                    "deny_requires",
                    &at,
                    "a deny rule requires nothing: it denies whoever it names",
                    "remove `require`, or make it an allow rule",
                );
                break;
            }
            let proof = proof.into_inner();
            if proofs.contains(&proof) {
                self.error("duplicate_proof", &at, "the same proof is required twice", "remove one");
            } else {
                proofs.push(proof);
            }
        }
        match (token, proofs.contains(&Proof::Token)) {
            (Some(token), false) => self.error(
                "unused_token",
                &place(source, token.span()),
                "the rule says what a token has to be, and requires none",
                "add `\"token\"` to `require`",
            ),
            (None, true) => self.error(
                "any_token",
                rule,
                "the rule requires a token and does not say which",
                "add `token = { issuer = \"...\", audience = \"...\" }`",
            ),
            _ => {}
        }
        proofs
    }

    fn when(&mut self, source: &Source, when: file::When) -> Option<Schedule> {
        let file::When { days, hours, zone } = when;
        let mut week = [days.is_none(); 7];
        let mut sound = true;
        for text in days.map(Texts::spanned).unwrap_or_default() {
            match schedule::parse_days(text.as_ref()) {
                Ok(days) => days.into_iter().enumerate().for_each(|(day, on)| week[day] |= on),
                Err(error) => {
                    self.error("bad_days", &place(source, text.span()), error.to_string(), "correct the day");
                    sound = false;
                }
            }
        }
        let hours = match hours {
            None => (0, 24 * 60),
            Some(text) => match schedule::parse_hours(text.as_ref()) {
                Ok(hours) => hours,
                Err(error) => {
                    self.error("bad_hours", &place(source, text.span()), error.to_string(), "correct the hours");
                    return None;
                }
            },
        };
        let zone = match zone {
            None => TimeZone::UTC,
            Some(text) => match schedule::parse_zone(text.as_ref()) {
                Ok(zone) => zone,
                Err(error) => {
                    self.error("bad_zone", &place(source, text.span()), error.to_string(), "correct the zone");
                    return None;
                }
            },
        };
        sound.then(|| Schedule::new(week, hours, zone))
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
        let mut groups: HashMap<(usize, usize), Vec<(usize, &Pattern, &Place)>> = HashMap::new();
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
        let nearest = known.into_iter().map(|k| (distance(name, &k), k)).min();
        match nearest {
            Some((distance, nearest)) if distance <= 2 => format!("did you mean `{nearest}`?"),
            _ => otherwise.to_owned(),
        }
    }
}

#[derive(Clone, Copy)]
enum Label {
    Tenant,
    Environment,
}

impl Model {
    /// All patterns, with the numbers that the given function has for workloads.
    pub fn patterns(&self, number: impl Fn(usize) -> u32) -> Patterns {
        Patterns::new(
            self.workloads
                .iter()
                .enumerate()
                .flat_map(|(index, workload)| workload.patterns.iter().map(move |(pattern, _)| (index, pattern)))
                .map(|(index, pattern)| (number(index), pattern)),
        )
    }

    pub fn subject_name(&self, subject: Subject) -> &str {
        match subject {
            Subject::Any => "any",
            Subject::Unmanaged => "unmanaged",
            Subject::Workload(index) => &self.workloads[index].name,
            Subject::Peer(index) => &self.peers[index].name,
        }
    }
}

fn place(source: &Source, span: Range<usize>) -> Place {
    Place { source: source.clone(), span }
}

fn sorted<T: Ord>(items: impl Iterator<Item = T>) -> Vec<T> {
    let mut items: Vec<T> = items.collect();
    items.sort();
    items.dedup();
    items
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
