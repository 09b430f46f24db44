//! Tools, the servers that offer them, and who approves their calls.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use toml::Spanned;

use super::{Builder, issuers::is_safe, place, rules::sorted};
use crate::{
    decisions::schema::ALL_TOOLS,
    policy::{
        diagnostic::{Place, Source},
        file::{self, ArgumentShape, Arguments},
        model::{Approvers, Argument, ArgumentType, McpServer, Model, Reach, Record, StepUp, Tool},
    },
};

/// How long a call waits for an approval, unless its approvers say.
const DEFAULT_WAIT: Duration = Duration::from_secs(900);
const LONGEST_WAIT: Duration = Duration::from_secs(86_400);
/// How long an approval can be used, unless its approvers say.
const DEFAULT_VALID: Duration = Duration::from_secs(300);
const LONGEST_VALID: Duration = Duration::from_secs(3_600);
/// Types within types.
const DEEPEST: usize = 8;
const MOST_ARGUMENTS: usize = 256;

impl Builder {
    pub(super) fn mcp_servers(&mut self, raw: Vec<(Source, Spanned<file::McpServer>)>) -> Vec<McpServer> {
        let mut servers = Vec::new();
        for (source, raw) in raw {
            let at = place(&source, raw.as_ref().name.span());
            let name = raw.as_ref().name.as_ref().clone();
            self.name(&at, &name);
            match self.mcp_servers.get(&name) {
                Some((_, first)) => self.duplicate(&at, &first.clone(), "MCP server", &name),
                None => drop(self.mcp_servers.insert(name, (servers.len(), at.clone()))),
            }
            servers.push(self.mcp_server(&source, raw.into_inner(), at));
        }
        servers
    }

    fn mcp_server(&mut self, source: &Source, raw: file::McpServer, at: Place) -> McpServer {
        let file::McpServer { name, url, command, user, environment, audience, scopes } = raw;
        self.scopes(source, &scopes);
        if let Some(audience) = audience.as_ref().filter(|audience| audience.as_ref().is_empty()) {
            let help = "write the `aud` that the server asks for";
            self.error("bad_audience", &place(source, audience.span()), "an audience cannot be empty", help);
        }
        let reach = match (url, command) {
            (Some(url), None) => {
                let why = "this server is called, not started";
                self.unused_if(source, &user, "user", why);
                self.unused_if(source, &environment, "environment", why);
                if !is_safe(url.as_ref()) {
                    let message = format!("`{}` is no https URL", url.as_ref());
                    let help = "calls must not go over a connection that anybody can change; http is for loopback only";
                    self.error("bad_url", &place(source, url.span()), message, help);
                }
                Reach::Url(url.into_inner())
            }
            (None, Some(command)) => {
                let why = "a command of this node is shown no token";
                self.unused_if(source, &audience, "audience", why);
                self.unused_if(source, &scopes.first().cloned(), "scopes", why);
                self.command(source, &at, command, user, environment)
            }
            _ => {
                let message = format!("MCP server `{}` needs either `url` or `command`", name.as_ref());
                self.error("mcp_reach", &at, message, "say how it is reached, in one way");
                Reach::Url(String::new())
            }
        };
        McpServer {
            reach,
            audience: audience.map(Spanned::into_inner),
            scopes: sorted(scopes.into_iter().map(Spanned::into_inner)),
            name: name.into_inner(),
            place: at,
        }
    }

    fn command(
        &mut self,
        source: &Source,
        at: &Place,
        command: Spanned<Vec<Spanned<String>>>,
        user: Option<Spanned<String>>,
        environment: Option<Spanned<BTreeMap<Spanned<String>, Spanned<String>>>>,
    ) -> Reach {
        let is_program = |text: &str| text.starts_with('/') && !text.ends_with('/') && !text.contains("/../");
        match command.as_ref().first() {
            Some(program) if is_program(program.as_ref()) => {}
            program => {
                let span = program.map_or(command.span(), Spanned::span);
                let help = "write the program's absolute path first: no shell and no search path is asked";
                self.error("bad_command", &place(source, span), "the command names no program by its path", help);
            }
        }
        for text in command.as_ref().iter().filter(|text| text.as_ref().contains('\0')) {
            let message = "a program's argument ends at a NUL character";
            self.error("bad_command", &place(source, text.span()), message, "remove the character");
        }
        if user.is_none() {
            let help = "add `user = \"...\"`: a server that authd starts has no privileges but that user's";
            self.error("no_user", at, "nothing says as which Unix user the command runs", help);
        }
        if let Some(user) = &user {
            self.user(source, user);
            if user.as_ref() == "root" || user.as_ref().parse() == Ok(0_u32) {
                let help = "name a user who may do what its tools do, and nothing else";
                self.error("root_command", &place(source, user.span()), "no server is started as root", help);
            }
        }
        let mut variables = BTreeMap::new();
        for (name, value) in environment.into_iter().flat_map(Spanned::into_inner) {
            if name.as_ref().is_empty() || name.as_ref().contains(['=', '\0']) || value.as_ref().contains('\0') {
                let message = format!("`{}` cannot be set in an environment", name.as_ref().escape_default());
                let help = "use letters, digits and `_` in names; no NUL character in values";
                self.error("bad_environment", &place(source, name.span()), message, help);
            }
            variables.insert(name.into_inner(), value.into_inner());
        }
        Reach::Command {
            argv: command.into_inner().into_iter().map(Spanned::into_inner).collect(),
            user: user.map(Spanned::into_inner).unwrap_or_default(),
            environment: variables,
        }
    }

    /// A Unix user, who does not have to exist where the policy is checked.
    fn user(&mut self, source: &Source, user: &Spanned<String>) {
        let text = user.as_ref();
        let number = text.bytes().all(|b| b.is_ascii_digit());
        // useradd(8), and what directories hand out.
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.@$".contains(c);
        let sound = if number {
            text.parse::<u32>().is_ok_and(|id| id != u32::MAX)
        } else {
            text.len() <= 255 && text.chars().all(allowed) && !text.starts_with('-')
        };
        if !sound {
            let message = format!("`{text}` cannot be a Unix user");
            self.error("bad_user", &place(source, user.span()), message, "write a user's name or number");
        }
    }

    pub(super) fn approvers(&mut self, raw: Vec<(Source, Spanned<file::Approvers>)>) -> Vec<Approvers> {
        let mut names: HashMap<String, Place> = HashMap::new();
        let mut all = Vec::new();
        for (source, raw) in raw {
            let at = place(&source, raw.as_ref().name.span());
            let name = raw.as_ref().name.as_ref().clone();
            self.name(&at, &name);
            if let Some(first) = names.get(&name) {
                self.duplicate(&at, first, "approvers", &name);
            }
            names.insert(name, at.clone());
            all.extend(self.approvers_of(&source, raw.into_inner(), at));
        }
        all
    }

    /// `None` only after an error.
    fn approvers_of(&mut self, source: &Source, raw: file::Approvers, at: Place) -> Option<Approvers> {
        let file::Approvers { name, users, issuer, audience, subjects, acr, max_age, ttl, valid, may_be_subject } = raw;
        if users.is_empty() {
            let message = format!("nobody is among approvers `{}`", name.as_ref());
            let help = "add `users`: who approves is known by the kernel, whatever token is asked for besides";
            self.error("no_approver", &at, message, help);
        }
        for user in &users {
            self.user(source, user);
        }
        for text in acr.iter().filter(|text| text.as_ref().is_empty()) {
            self.error("bad_acr", &place(source, text.span()), "no token has an empty `acr`", "remove it");
        }
        for subject in subjects.iter().filter(|subject| subject.as_ref().is_empty()) {
            let help = "write the `sub` of an approver";
            self.error("bad_subject", &place(source, subject.span()), "no token has such a subject", help);
        }
        let max_age = max_age.map(|text| (text.span(), self.duration(source, &text)));
        let step_up = match issuer {
            None => {
                let why = "no token is asked of these approvers";
                self.unused_if(source, &audience, "audience", why);
                self.unused_if(source, &subjects.first().cloned(), "subjects", why);
                self.unused_if(source, &acr.first().cloned(), "acr", why);
                self.unused_if(source, &max_age.map(|(span, _)| Spanned::new(span, ())), "max_age", why);
                None
            }
            Some(issuer) => {
                if subjects.is_empty() {
                    let message = "everybody with a token of that issuer could approve";
                    let help = "name the approvers in `subjects`";
                    self.error("no_approver", &place(source, issuer.span()), message, help);
                }
                let audience = audience.map(Spanned::into_inner).unwrap_or_default();
                if audience.is_empty() {
                    let message = "any token of an approver would do, also one that an agent was given";
                    let help = "say in `audience` for whom tokens for approvals are";
                    self.error("no_audience", &place(source, issuer.span()), message, help);
                }
                Some(StepUp {
                    issuer: self.named_issuer(source, &issuer)?,
                    audience,
                    subjects: sorted(subjects.into_iter().map(Spanned::into_inner)),
                    acr: sorted(acr.into_iter().map(Spanned::into_inner)),
                    max_age: match max_age {
                        None => None,
                        Some((_, max_age)) => Some(max_age?),
                    },
                })
            }
        };
        Some(Approvers {
            name: name.into_inner(),
            users: sorted(users.into_iter().map(Spanned::into_inner)),
            step_up,
            ttl: self.bounded(source, ttl, "ttl", DEFAULT_WAIT, LONGEST_WAIT)?,
            valid: self.bounded(source, valid, "valid", DEFAULT_VALID, LONGEST_VALID)?,
            may_be_subject,
            place: at,
        })
    }

    fn bounded(
        &mut self,
        source: &Source,
        text: Option<Spanned<String>>,
        key: &str,
        default: Duration,
        longest: Duration,
    ) -> Option<Duration> {
        let Some(text) = text else { return Some(default) };
        let duration = self.duration(source, &text)?;
        if duration > longest {
            let message = format!("`{key}` is {}h at most", longest.as_secs() / 3_600);
            self.error("long_approval", &place(source, text.span()), message, format!("choose a shorter `{key}`"));
        }
        Some(duration)
    }

    pub(super) fn tools(&mut self, raw: Vec<(Source, Spanned<file::Tool>)>, model: &Model) -> Vec<Tool> {
        let mut names: HashMap<String, Place> = HashMap::new();
        let mut offered: HashMap<(usize, String), Place> = HashMap::new();
        let mut tools = Vec::new();
        for (source, raw) in raw {
            let tool = self.tool(&source, raw.into_inner(), model);
            if let Some(first) = names.get(&tool.name) {
                self.duplicate(&tool.place, first, "tool", &tool.name);
            } else if let Some(server) = tool.server
                && let Some(first) = offered.insert((server, tool.mcp_name.clone()), tool.place.clone())
            {
                let what = format!("tool of MCP server `{}`", model.mcp_servers[server].name);
                self.duplicate(&tool.place, &first, &what, &tool.mcp_name);
            }
            names.insert(tool.name.clone(), tool.place.clone());
            tools.push(tool);
        }
        tools.sort_by(|a, b| a.name.cmp(&b.name));
        tools
    }

    fn tool(&mut self, source: &Source, raw: file::Tool, model: &Model) -> Tool {
        let file::Tool { name, server, mcp_name, service, permit, arguments, other_arguments } = raw;
        let at = place(source, name.span());
        self.name(&at, name.as_ref());
        if name.as_ref() == ALL_TOOLS {
            let message = "`tools` is the name of all tools together: `action in Action::\"tools\"`";
            self.error("reserved_name", &at, message, "choose another name");
        }
        if server.is_none() {
            self.unused_if(source, &mcp_name, "mcp_name", "no MCP server offers this tool");
        }
        if let Some(mcp_name) = &mcp_name {
            let printable = mcp_name.as_ref().chars().all(|c| !c.is_control());
            if mcp_name.as_ref().is_empty() || mcp_name.as_ref().len() > 128 || !printable {
                let message = format!("`{}` cannot be a tool's name", mcp_name.as_ref().escape_default());
                let help = "write the name as the server lists it: 1 to 128 characters";
                self.error("bad_mcp_name", &place(source, mcp_name.span()), message, help);
            }
        }
        let server = server.and_then(|server| {
            let found = self.mcp_servers.get(server.as_ref()).map(|(index, _)| *index);
            if found.is_none() {
                let known = self.mcp_servers.keys().cloned().collect();
                let help = self.similar(server.as_ref(), known, "define it as an `[[mcp_server]]`");
                let message = format!("no MCP server is called `{}`", server.as_ref());
                self.error("unknown_mcp_server", &place(source, server.span()), message, help);
            }
            found
        });
        let service = service.and_then(|service| {
            let found = self.services.get(service.as_ref()).map(|(index, _)| *index);
            if found.is_none() {
                let known = self.services.keys().cloned().collect();
                let help = self.similar(service.as_ref(), known, "define it as a `[[service]]`");
                let message = format!("no service is called `{}`", service.as_ref());
                self.error("unknown_service", &place(source, service.span()), message, help);
            }
            found
        });
        let found = permit.as_ref().map(|permit| model.rules.iter().find(|rule| rule.name == *permit.as_ref()));
        if let (Some(permit), Some(Some(rule))) = (&permit, found)
            && rule.permit.is_none()
        {
            let message = format!("no action opens rule `{}`", permit.as_ref());
            let help = "add `\"action\"` to what it requires, or leave `permit` out";
            self.error("permit_without_action", &place(source, permit.span()), message, help);
        }
        if let (Some(permit), Some(None)) = (&permit, found) {
            let known = model.rules.iter().map(|rule| rule.name.clone()).collect();
            let help = self.similar(permit.as_ref(), known, "define it as a `[[rule]]`");
            let message = format!("no rule is called `{}`", permit.as_ref());
            self.error("unknown_rule", &place(source, permit.span()), message, help);
        }
        let mut budget = MOST_ARGUMENTS;
        Tool {
            server,
            mcp_name: mcp_name.map_or_else(|| name.as_ref().clone(), Spanned::into_inner),
            service,
            permit: permit.map(Spanned::into_inner),
            arguments: self.arguments(source, &at, arguments, 1, &mut budget),
            other_arguments,
            name: name.into_inner(),
            place: at,
        }
    }

    fn arguments(
        &mut self,
        source: &Source,
        tool: &Place,
        arguments: Arguments,
        depth: usize,
        budget: &mut usize,
    ) -> Record {
        let mut record = Record::default();
        for (name, shape) in arguments.0 {
            let at = place(source, name.span());
            *budget = match budget.checked_sub(1) {
                Some(rest) => rest,
                None => {
                    let message = format!("a tool has {MOST_ARGUMENTS} arguments at most");
                    self.error("bad_argument", tool, message, "leave out what no policy looks at: `other_arguments`");
                    return record;
                }
            };
            // A list or a table has no place for a question mark of its own.
            let (text, optional_name) = match name.as_ref().strip_suffix('?') {
                Some(text) => (text, true),
                None => (name.as_ref().as_str(), false),
            };
            if !is_argument(text) {
                let message = format!("`{}` cannot be an argument that policies see", text.escape_default());
                let help =
                    "use 1 to 128 printable ASCII characters without quotes and backslashes, and not `__` in front";
                self.error("bad_argument", &at, message, help);
            }
            let Some(mut argument) = self.argument(source, tool, shape, depth, budget) else { continue };
            argument.optional |= optional_name;
            if record.0.insert(text.to_owned(), argument).is_some() {
                let message = format!("argument `{text}` is there twice");
                self.error("duplicate_name", &at, message, "remove one of the two");
            }
        }
        record
    }

    /// `None` only after an error.
    fn argument(
        &mut self,
        source: &Source,
        tool: &Place,
        shape: Spanned<ArgumentShape>,
        depth: usize,
        budget: &mut usize,
    ) -> Option<Argument> {
        let at = place(source, shape.span());
        if depth > DEEPEST {
            let message = format!("more than {DEEPEST} types are within each other");
            self.error("bad_argument", &at, message, "leave out what no policy looks at: `other_arguments`");
            return None;
        }
        let (kind, optional) = match shape.into_inner() {
            ArgumentShape::Name(name) => {
                let (plain, optional) = match name.strip_suffix('?') {
                    Some(plain) => (plain, true),
                    None => (name.as_str(), false),
                };
                let Some(kind) = ArgumentType::named(plain) else {
                    let known = ArgumentType::NAMED.iter().map(|(name, _)| (*name).to_owned()).collect();
                    let names: Vec<&str> = ArgumentType::NAMED.iter().map(|(name, _)| *name).collect();
                    let otherwise = format!("use one of {}", names.join(", "));
                    let help = self.similar(plain, known, &otherwise);
                    self.error("bad_argument", &at, format!("`{plain}` is no type of an argument"), help);
                    return None;
                };
                (kind, optional)
            }
            ArgumentShape::Record(arguments) => {
                (ArgumentType::Record(self.arguments(source, tool, arguments, depth + 1, budget)), false)
            }
            ArgumentShape::Set(elements) => {
                let count = elements.len();
                let [element] = <[_; 1]>::try_from(elements)
                    .map_err(|_| {
                        let message = format!("a list of {count} types says nothing of its elements");
                        self.error("bad_argument", &at, message, "write one type in brackets, such as [\"string\"]");
                    })
                    .ok()?;
                let element_at = place(source, element.span());
                let element = self.argument(source, tool, element, depth + 1, budget)?;
                if element.optional {
                    let help = "remove the question mark; a list that can be missing is written \"name?\" = [...]";
                    self.error("bad_argument", &element_at, "an element of a list cannot be missing", help);
                }
                (ArgumentType::Set(Box::new(element.kind)), false)
            }
        };
        Some(Argument { kind, optional })
    }
}

/// Names that need no escapes in a Cedar schema, and mean nothing to Cedar's JSON.
fn is_argument(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\' | b'\'');
    (1..=128).contains(&text.len()) && text.bytes().all(allowed) && !text.starts_with("__")
}
