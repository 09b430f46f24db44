//! `authd approve`: what waits for a person, and that person's word.
//!
//! What is shown was chosen by an agent, or by whoever told it what to do: nothing of it reaches the terminal but what can be seen.

use std::{fmt::Write, path::Path, process::ExitCode};

use anyhow::Context;
use hyper::{HeaderMap, Method, header::AUTHORIZATION};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    ask,
    grant::{secret, text_of},
    settings, unexpected,
};
use crate::{
    cli::ApproveCommand,
    client::{self, Target},
    config::Config,
    daemon::admin::{Answer, Request},
    decisions::{
        approvals::By,
        asked::{self, Listed, Question, Shown, ShownGroup},
        call::{Agent, Delegation},
    },
};

/// Where the values of details begin.
const INDENT: usize = 14;

pub fn run(config: Option<&Path>, command: ApproveCommand) -> anyhow::Result<ExitCode> {
    let config = match settings(config) {
        Ok(config) => config,
        Err(code) => return Ok(code),
    };
    let mut token = None;
    let (question, json) = match command {
        ApproveCommand::List { json } => (Question::List, json),
        ApproveCommand::Show { id, json } => (Question::Show { id }, json),
        ApproveCommand::Grant { id, approvers, token_file, reason, json } => {
            token = token_file;
            (Question::Grant { id, approvers, text: reason }, json)
        }
        ApproveCommand::Deny { id, reason, json } => (Question::Deny { id, text: reason }, json),
    };
    // Root asks on the operators' socket, which works without the control process; everybody else, and whoever shows a token, on
    // the workloads'.
    let answer = match &token {
        None if nix::unistd::geteuid().is_root() => match ask(&config, &Request::Approvals(question))? {
            Answer::Approvals(answer) => answer,
            other => return Err(unexpected(other)),
        },
        _ => over_http(&config, question, token.as_deref())?,
    };
    let now = Timestamp::now();
    match answer {
        asked::Answer::Refused { reason, message } => {
            if json {
                println!("{}", serde_json::json!({ "reason": reason, "message": message }));
            }
            eprintln!("authd: {reason}: {message}");
            return Ok(ExitCode::from(super::FAILED));
        }
        asked::Answer::Listed { approvals } if json => println!("{}", serde_json::to_string(&approvals)?),
        asked::Answer::Shown(shown) | asked::Answer::Granted(shown) | asked::Answer::Denied(shown) if json => {
            println!("{}", serde_json::to_string(&shown)?);
        }
        asked::Answer::Listed { approvals } => print!("{}", table(&approvals, now)),
        asked::Answer::Shown(shown) => print!("{}", details(&shown, now)),
        asked::Answer::Granted(shown) => {
            let Listed { id, tool, agent, until, .. } = &shown.listed;
            let left = until.duration_since(now).as_secs();
            let agent = plain(&agent.workload);
            println!("{id} is approved: {agent} can call {} once, within {}", plain(tool), span(left));
        }
        asked::Answer::Denied(shown) => println!("{} is denied", shown.listed.id),
    }
    Ok(ExitCode::SUCCESS)
}

/// The same question on the workloads' socket, which everybody can reach.
fn over_http(config: &Config, question: Question, token: Option<&Path>) -> anyhow::Result<asked::Answer> {
    let (method, path, body) = match question {
        Question::List => (Method::GET, "/v1/approvals".to_owned(), Value::Null),
        Question::Show { id } => (Method::GET, format!("/v1/approvals/{id}"), Value::Null),
        Question::Grant { id, approvers, text } => {
            let body = json!({ "approvers": approvers, "reason": text });
            (Method::POST, format!("/v1/approvals/{id}/grant"), body)
        }
        Question::Deny { id, text } => (Method::POST, format!("/v1/approvals/{id}/deny"), json!({ "reason": text })),
    };
    let mut headers = HeaderMap::new();
    if let Some(file) = token {
        headers.insert(AUTHORIZATION, secret(&format!("Bearer {}", text_of(file)?))?);
    }
    let target = Target::Socket(config.control.socket.clone());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let body = if body.is_null() { Vec::new() } else { serde_json::to_vec(&body)? };
    let answer = runtime.block_on(client::ask(&target, None, method, &path, headers, body))?;
    let value: Value = serde_json::from_slice(&answer.body).context("the answer is no JSON")?;
    if answer.status.is_success() {
        return Ok(serde_json::from_value(value)?);
    }
    let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
    Ok(asked::Answer::Refused { reason: text("reason"), message: text("detail") })
}

fn table(approvals: &[Listed], now: Timestamp) -> String {
    let row = |id: &str, state: &str, tool: &str, agent: &str, subject: &str, when: &str| {
        format!("{id:<12} {state:<14} {tool:<20} {agent:<20} {subject:<24} {when}\n")
    };
    let rows = approvals.iter().map(|listed| {
        let Listed { id, state, tool, agent, delegation, approvers: _, requested: _, until } = listed;
        let subject = delegation.as_ref().map_or_else(|| "itself".to_owned(), |delegation| plain(&delegation.subject));
        let when = match state.as_str() {
            "pending" | "granted" => format!("{} left", span(until.duration_since(now).as_secs())),
            _ => format!("{} ago", span(now.duration_since(*until).as_secs())),
        };
        row(&id.to_string(), &plain(state), &plain(tool), &plain(&agent.workload), &subject, &when)
    });
    std::iter::once(row("ID", "STATE", "TOOL", "AGENT", "FOR", "TIME")).chain(rows).collect()
}

fn details(shown: &Shown, now: Timestamp) -> String {
    let Shown { listed, arguments, call_sha256, uids, policies, who, by } = shown;
    let Listed { id, state, tool, agent, delegation, approvers, requested, until } = listed;
    let time = |time: &Timestamp| {
        let left = time.duration_since(now).as_secs();
        let relative = if left > 0 { format!("in {}", span(left)) } else { format!("{} ago", span(-left)) };
        format!("{time:.0} ({relative})")
    };
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        // A String takes everything.
        let _ = writeln!(out, "{name:<INDENT$}{}", value.replace('\n', &format!("\n{:INDENT$}", "")));
    };
    line(
        &id.to_string(),
        match state.as_str() {
            "pending" => "waits for approval",
            "granted" => "is approved, and was not used",
            "denied" => "was denied",
            "used" => "was approved, and used",
            "expired" => "was not approved, or not used, in time",
            "revoked" => "ended: the agent, or the one for whom it acts, was revoked",
            "policy_changed" => "ended: the policy was replaced",
            _ => "is in a state that this command does not know",
        },
    );
    line("tool", &plain(tool));
    line("arguments", &whole(arguments));
    let Agent { workload, cgroup, instance: _, spiffe_id } = agent;
    line("agent", &format!("{}\n{}\n{}", plain(workload), plain(spiffe_id), plain(cgroup)));
    match delegation {
        None => line("for", "itself: no token says that it acts for somebody"),
        Some(Delegation { issuer, subject, actors }) => {
            line("for", &format!("{}\nas {} says", plain(subject), plain(issuer)));
            if !actors.is_empty() {
                let actors: Vec<String> = actors.iter().map(|actor| plain(&actor.subject)).collect();
                line("through", &actors.join("\n"));
            }
        }
    }
    let users: Vec<String> = uids.iter().map(u32::to_string).collect();
    line("asked", &format!("{}, by uid {}", time(requested), users.join(" and ")));
    line("policies", &plain(&policies.join(", ")));
    match by {
        Some(By { at, approvers, uid, user, token, text }) => {
            let name = if approvers.is_empty() { "nobody's" } else { approvers };
            let mut said = format!("{}, by {} (uid {uid}), in {} name", time(at), plain(user), plain(name));
            if let Some(token) = token {
                let _ = write!(said, "\nas {}, as {} says", plain(&token.subject), plain(&token.issuer));
            }
            if !text.is_empty() {
                let _ = write!(said, "\n{}", plain(text));
            }
            line("decided", &said);
        }
        None if who.is_empty() => {
            line("approvers", &format!("{}, of whom the policy in force has none", plain(&approvers.join(", "))))
        }
        None => {
            let groups: Vec<String> = who.iter().map(|group| group_line(group, &time)).collect();
            line("approvers", &groups.join("\n"));
        }
    }
    line(if matches!(state.as_str(), "pending" | "granted") { "until" } else { "ended" }, &time(until));
    line("call", &format!("SHA-256 {call_sha256}"));
    if state == "pending" {
        let _ = write!(out, "\nauthd approve grant {id} --reason '...'\nauthd approve deny {id} --reason '...'\n");
    }
    out
}

fn group_line(group: &ShownGroup, time: &impl Fn(&Timestamp) -> String) -> String {
    let ShownGroup { name, users, step_up, until, valid_seconds, may_be_subject } = group;
    let users = if users.is_empty() { "nobody on this node".to_owned() } else { users.join(", ") };
    let mut text = format!("{}: {}, until {}", plain(name), plain(&users), time(until));
    if let Some(issuer) = step_up {
        let _ = write!(text, "; with a fresh token of {}", plain(issuer));
        if !may_be_subject {
            text.push_str(", and not the one for whom the agent acts");
        }
    }
    let valid = span(i64::try_from(*valid_seconds).unwrap_or(i64::MAX));
    let _ = write!(text, "; the call can then be made within {valid}");
    text
}

/// The whole call, one member a line. Escapes stand for what cannot be seen, so that it is still the same JSON.
fn whole(arguments: &str) -> String {
    let value: Option<serde_json::Value> = serde_json::from_str(arguments).ok();
    let pretty = value.and_then(|value| serde_json::to_string_pretty(&value).ok());
    // The breaks of lines are ours: those of the agent are escaped in canonical text.
    visible(&pretty.unwrap_or_else(|| arguments.to_owned()), &['\n'])
}

/// A name or a sentence, on one line.
fn plain(text: &str) -> String {
    visible(text, &[])
}

fn visible(text: &str, breaks: &[char]) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if breaks.contains(&c) || is_seen(c) {
            out.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                // A String takes everything.
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out
}

/// Whether a terminal shows it, where it stands, and nothing else of it: no controls, no marks that turn the direction of text, and
/// nothing of no width.
fn is_seen(c: char) -> bool {
    const BLANK: [std::ops::RangeInclusive<char>; 8] = [
        '\u{034f}'..='\u{034f}',
        '\u{115f}'..='\u{1160}',
        '\u{17b4}'..='\u{17b5}',
        '\u{180b}'..='\u{180f}',
        '\u{3164}'..='\u{3164}',
        '\u{fe00}'..='\u{fe0f}',
        '\u{ffa0}'..='\u{ffa0}',
        '\u{e0000}'..='\u{e0fff}',
    ];
    match c {
        ' '..='~' => true,
        '\0'..='\u{9f}' => false,
        _ if BLANK.iter().any(|range| range.contains(&c)) => false,
        // Unicode's controls, formats, separators and unassigned numbers are escaped; a mark that combines is not, behind a letter.
        _ => ['a', c].iter().collect::<String>().escape_debug().count() == 2,
    }
}

/// `40 s`, `13 min`, `2 h 5 min`.
fn span(seconds: i64) -> String {
    match seconds.max(0) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decisions::{
        approvals::{
            Approvals, Approver, Entry,
            tests::{ALICE, approver, entry, groups, id, later, noon, policy},
        },
        call::Arguments,
    };

    fn approvals(entry: Entry) -> Approvals {
        let mut approvals = Approvals::load([entry]);
        approvals.policy_changed(noon(), policy(), groups());
        approvals
    }

    fn shown(approvals: &Approvals) -> Shown {
        Shown::new(approvals.get(&id(1)).unwrap(), approvals)
    }

    #[test]
    fn an_operator_sees_what_would_happen_for_whom_and_until_when() {
        let mut entry = entry(1);
        entry.call.arguments = Arguments::read(br#"{"amount":"120.00","order":{"id":"o-1"}}"#).unwrap();
        let hash = entry.call.hash();
        let expected = format!(
            r#"000000000001  waits for approval
tool          refund
arguments     {{
                "amount": "120.00",
                "order": {{
                  "id": "o-1"
                }}
              }}
agent         support
              spiffe://example.org/support/support-1
              /agents/support-1
for           carol
              as https://idp.example.org says
through       spiffe://example.org/router
asked         2026-11-26T12:00:00Z (2 min ago), by uid 2001
policies      large-refunds
approvers     leads: alice, agent, until 2026-11-26T12:15:00Z (in 13 min); the call can then be made within 5 min
until         2026-11-26T12:15:00Z (in 13 min)
call          SHA-256 {hash}

authd approve grant 000000000001 --reason '...'
authd approve deny 000000000001 --reason '...'
"#
        );
        assert_eq!(details(&shown(&approvals(entry)), later(120)), expected);
    }

    #[test]
    fn what_was_decided_is_shown_and_not_offered_again() {
        let mut approvals = approvals(entry(1));
        approvals.grant(later(60), &id(1), Approver { text: "ticket\n42".to_owned(), ..approver(ALICE) }).unwrap();
        let text = details(&shown(&approvals), later(120));
        assert!(text.contains("is approved, and was not used"), "{text}");
        let said = "decided       2026-11-26T12:01:00Z (60 s ago), by alice (uid 1001), in leads name\n              ticket\\u000a42\n";
        assert!(text.contains(said), "{text}");
        assert!(!text.contains("authd approve"), "{text}");
    }

    #[test]
    fn nothing_that_an_agent_wrote_moves_the_terminal() {
        let evil = "a\u{1b}[2J\u{9b}31m\u{202e}b\u{200b}\u{feff}\u{2028}\u{7f}\u{ad}\u{3164}\u{fe0f}\u{e0041}\u{301}é漢\u{1f600}\\u0041";
        let mut entry = entry(1);
        let json = serde_json::json!({ "note": evil, "a\nb": 1 });
        entry.call.arguments = Arguments::read(json.to_string().as_bytes()).unwrap();
        entry.call.delegation.as_mut().unwrap().subject = evil.to_owned();
        entry.policies = vec![evil.to_owned()];
        let shown = shown(&approvals(entry));
        let lines = details(&shown, later(1)) + &table(std::slice::from_ref(&shown.listed), later(1));
        let unseen: Vec<char> = lines.chars().filter(|c| *c != '\n' && !is_seen(*c)).collect();
        assert!(unseen.is_empty(), "{unseen:?}");
        assert_eq!(plain("\u{301}é漢\u{1f600} ~"), "\u{301}é漢\u{1f600} ~", "what can be seen stays");
        assert_eq!(plain("\n\u{202e}\u{e0041}"), "\\u000a\\u202e\\udb40\\udc41");
        assert_eq!(plain("\u{9b}\u{7f}\u{3164}\u{fe0f}\u{200b}"), "\\u009b\\u007f\\u3164\\ufe0f\\u200b");
        // What is shown of the arguments is JSON of the same meaning.
        let again: serde_json::Value = serde_json::from_str(&whole(&shown.arguments)).unwrap();
        assert_eq!(again, json);
    }

    #[test]
    fn the_list_has_one_line_each() {
        let mut alone = entry(1);
        alone.call.delegation = None;
        let mut approvals = approvals(alone);
        approvals.deny(later(30), &id(1), approver(ALICE)).unwrap();
        approvals.put(entry(2));
        let lines: Vec<Listed> = approvals.list().into_iter().map(Listed::new).collect();
        let text = table(&lines, later(300));
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["ID", "STATE", "TOOL", "AGENT", "FOR", "TIME"]);
        assert_eq!(lines[1], ["000000000002", "pending", "refund", "support", "carol", "10", "min", "left"]);
        assert_eq!(lines[2], ["000000000001", "denied", "refund", "support", "itself", "4", "min", "ago"]);
    }
}
