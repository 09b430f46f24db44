//! Whoever takes the control process over: what it can say to dataplane, and what its sandbox lets it do.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use authd_common::{
    syn::{LabelKey, NodeKey, NodeKeyId, Speaker, Voice},
    tables::names,
};
use authd_tests::{
    daemon::{Daemon, PATIENCE},
    probe,
    sandbox::Sandbox,
    trust::{Authority, ISSUER},
};
use jiff::{SignedDuration, Timestamp};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{
    Verdict,
    agents::exchange,
    grants::{ONE, Scene, TWO},
    reload::wait_until,
    trial,
};

pub fn trials() -> Vec<Trial> {
    vec![trial("a_taken_over_control_can_do_nothing_to_the_node", can_do_nothing_to_the_node)]
}

/// In which kernels have no part.
pub fn of_callers() -> Vec<Trial> {
    vec![
        trial("a_taken_over_control_gives_no_grant_beyond_a_rule", gives_no_grant_beyond_a_rule),
        trial("a_taken_over_control_undoes_no_revocation", undoes_no_revocation),
        trial("a_taken_over_control_exchanges_under_no_other_issuers_name", exchanges_under_no_other_name),
        trial("a_taken_over_control_ends_grants_of_certificates_that_it_names", ends_what_it_names),
        trial("a_taken_over_control_that_talks_nonsense_is_ended", nonsense_ends_it),
        trial("a_taken_over_control_puts_no_text_into_metrics", puts_no_text_into_metrics),
        trial("a_taken_over_control_makes_no_node_that_the_policy_does_not_name", makes_no_node),
        trial("a_taken_over_control_lets_no_node_speak_for_others", lets_no_node_speak_for_others),
        trial("a_taken_over_control_makes_no_session_longer", makes_no_session_longer),
        trial("a_taken_over_control_speaks_to_no_unknown_node", speaks_to_no_unknown_node),
    ]
}

fn taken_over() -> Result<Scene> {
    Scene::started("", |sandbox| {
        let program = probe::binary().display().to_string();
        Daemon::start_with_environment(sandbox, &[("AUTHD_TEST_CONTROL", program)])
    })
}

impl Scene {
    /// Lets the control process say something in the name of a caller, and returns what dataplane answers.
    fn says(&self, cgroup: &str, message: &Value) -> Result<Value> {
        let outcome = self.tells(cgroup, &message.to_string())?;
        serde_json::from_str(&outcome).with_context(|| format!("{outcome}\n{}", self.daemon.log()))
    }

    fn tells(&self, cgroup: &str, line: &str) -> Result<String> {
        let socket = self.sandbox.directory().join("workload.sock");
        let socket = socket.to_str().context("a path")?;
        let outcome = self.sandbox.probe(cgroup, &["say", socket, line]);
        Ok(outcome.with_context(|| self.daemon.log())?.detail)
    }

    /// A grant that control asks for with proofs that nobody showed.
    fn claims(&self, cgroup: &str, rule: &str, proofs: &Value, more: &Value) -> Result<Value> {
        let mut wanted = json!({ "rule": rule, "proofs": proofs });
        for (name, value) in more.as_object().into_iter().flatten() {
            wanted[name] = value.clone();
        }
        self.says(cgroup, &json!({ "message": "grant", "question": 1, "connection": "CONNECTION", "wanted": wanted }))
    }

    fn claim_is_refused(&self, cgroup: &str, rule: &str, proofs: &Value, reason: &str) -> Result<()> {
        let answer = self.claims(cgroup, rule, proofs, &json!({}))?;
        ensure!(answer["refusal"]["reason"] == reason, "{reason} was expected for {rule} {proofs}: {answer}");
        self.daemon.wait_for(reason, |r| r.event == "grant_refused" && r.reason.as_deref() == Some(reason))?;
        Ok(())
    }
}

/// A token that control says it verified, for everything that the rule `token` asks.
fn token(changed: &Value) -> Value {
    let now = Timestamp::now();
    let mut token = json!({
        "proof": "token", "issuer": "corp", "iss": "https://idp.example.org", "subject": "one", "audience": ["ledger"],
        "scopes": ["ledger:write"], "jti": "invented", "hash": "00".repeat(32), "bound_to": [],
        "issued_at": now, "not_after": now + SignedDuration::from_hours(24 * 365),
    });
    for (name, value) in changed.as_object().into_iter().flatten() {
        token[name] = value.clone();
    }
    token
}

fn gives_no_grant_beyond_a_rule() -> Result<Verdict> {
    let scene = taken_over()?;
    // This is what it can do: claim a proof that the rule asks of this caller. And no more of it than the rule gives.
    let answer = scene.claims(ONE, "token", &json!([token(&json!({}))]), &json!({ "seconds": u32::MAX }))?;
    let until: Timestamp = answer["grant"]["until"].as_str().with_context(|| answer.to_string())?.parse()?;
    ensure!(until <= Timestamp::now() + SignedDuration::from_mins(10), "grant_ttl is ten minutes: {answer}");
    let id = answer["grant"]["id"].as_str().context("an id")?.to_owned();
    scene.opens(ONE, 7101)?;
    scene.is_closed(TWO, 7101)?;
    // Not for less than the rule asks.
    for (changed, reason) in [
        (json!({ "issuer": "other" }), "token_wrong_issuer"),
        (json!({ "iss": "https://elsewhere.example" }), "token_wrong_issuer"),
        (json!({ "audience": ["other"] }), "token_wrong_audience"),
        (json!({ "scopes": [] }), "token_wrong_scope"),
        (json!({ "not_after": Timestamp::now() - SignedDuration::from_mins(5) }), "proof_over"),
    ] {
        scene.claim_is_refused(TWO, "token", &json!([token(&changed)]), reason)?;
    }
    scene.claim_is_refused(TWO, "token", &json!([]), "authorization_missing")?;
    scene.claim_is_refused(
        TWO,
        "both",
        &json!([token(&json!({ "bound_to": ["certificate"] }))]),
        "certificate_missing",
    )?;
    // Not an API key, which only dataplane can check: neither as a proof nor with a hash that it makes up.
    let key = json!({ "proof": "api-key", "id": "2e3n8nazzq", "name": "k", "not_after": "2099-01-01T00:00:00Z" });
    scene.claim_is_refused(TWO, "key", &json!([key]), "api_key_missing")?;
    let made = scene.daemon.command(&["key", "create", "--name", "k"])?;
    let made = String::from_utf8(made.stdout)?;
    let public = made.trim().strip_prefix("authd_").and_then(|rest| rest.get(..10)).context("an id")?;
    let guess = json!({ "api_key": { "id": public, "hash": "00".repeat(32) } });
    let answer = scene.claims(TWO, "key", &json!([]), &guess)?;
    ensure!(answer["refusal"]["reason"] == "api_key_unknown", "{answer}");
    // Not for somebody whom the rule does not name, not in another one's name, not for a connection that is not there.
    scene.claim_is_refused("/agents/a", "certificate", &json!([]), "rule_not_for_caller")?;
    scene.claim_is_refused("/servers", "token", &json!([token(&json!({}))]), "caller_unmanaged")?;
    let grant = json!({ "rule": "token", "proofs": [token(&json!({}))] });
    let answer =
        scene.says(TWO, &json!({ "message": "grant", "question": 2, "connection": 987_654, "wanted": grant }))?;
    ensure!(answer["refusal"]["reason"] == "caller_gone", "{answer}");
    // Not the end of somebody else's grant, and no operator's power.
    let answer =
        scene.says(TWO, &json!({ "message": "return", "question": 3, "connection": "CONNECTION", "grant": id }))?;
    ensure!(answer["refusal"]["reason"] == "grant_unknown", "{answer}");
    let revoke = json!({
        "message": "revoke", "question": 4, "connection": "CONNECTION", "what": "workload one", "text": "",
    });
    let answer = scene.says(TWO, &revoke)?;
    ensure!(answer["refusal"]["reason"] == "not_an_operator", "{answer}");
    scene.opens(ONE, 7101)?;
    Ok(Verdict::Ran)
}

fn undoes_no_revocation() -> Result<Verdict> {
    let scene = taken_over()?;
    let proofs = json!([token(&json!({}))]);
    ensure!(scene.claims(ONE, "token", &proofs, &json!({}))?["message"] == "granted");
    scene.revoke(&["token", "https://idp.example.org", "invented"])?;
    scene.is_closed(ONE, 7101)?;
    scene.claim_is_refused(ONE, "token", &proofs, "token_revoked")?;
    scene.revoke(&["workload", "one"])?;
    // Whatever it invents: the caller is known without it.
    scene.claim_is_refused(ONE, "token", &json!([token(&json!({ "jti": "another" }))]), "workload_revoked")?;
    scene.revoke(&["issuer", "https://idp.example.org"])?;
    scene.claim_is_refused(TWO, "token", &json!([token(&json!({ "jti": "another" }))]), "issuer_revoked")?;
    scene.claim_is_refused(
        TWO,
        "token",
        &json!([token(&json!({ "iss": "https://y.example" }))]),
        "token_wrong_issuer",
    )?;
    scene.is_closed(ONE, 7101)?;
    Ok(Verdict::Ran)
}

/// What policies say of one issuer's people holds of nobody whom another one calls so.
fn exchanges_under_no_other_name() -> Result<Verdict> {
    let scene = exchange::Scene::started("", |sandbox| {
        let program = probe::binary().display().to_string();
        Daemon::start_with_environment(sandbox, &[("AUTHD_TEST_CONTROL", program)])
    })?;
    let socket = scene.sandbox.directory().join("workload.sock").display().to_string();
    let exchanged = |name: &str, iss: &str| -> Result<Value> {
        let now = Timestamp::now();
        let subject = json!({
            "issuer_name": name, "issuer": iss, "subject": "alice", "client_id": null, "audience": ["ledger"],
            "scopes": ["ledger:read"], "jti": "invented", "key_id": null, "token_hash": vec![0; 32],
            "issued_at": now, "expires": now + SignedDuration::from_mins(5), "not_after": now + SignedDuration::from_mins(5),
            "confirmation": { "x5t_s256": null, "jkt": null }, "act": null, "may_act": null, "tenant": null, "subject_issuer": null, "acr": null,
            "auth_time": null,
        });
        let wanted = json!({
            "subject": subject, "asked": { "audience": ["ledger"], "scopes": ["ledger:read"], "lifetime": null },
            "holds": { "x5t_s256": null, "jkt": vec![1; 32] },
        });
        let message = json!({ "message": "exchange", "question": 1, "connection": "CONNECTION", "exchange": wanted });
        let outcome = scene.sandbox.probe("/agents/a.scope", &["say", &socket, &message.to_string()])?;
        serde_json::from_str(&outcome.detail).with_context(|| format!("{outcome:?}\n{}", scene.daemon.log()))
    };
    // So far it can go: a token of an issuer that a delegation is about.
    let answer = exchanged("corp", ISSUER)?;
    ensure!(answer["message"] == "exchanged", "{answer}");
    for (name, iss) in [("corp", "https://elsewhere.example"), ("own", ISSUER), ("corp", exchange::OWN), ("no", ISSUER)]
    {
        let answer = exchanged(name, iss)?;
        ensure!(answer["refusal"]["reason"] == "token_wrong_issuer", "{name} {iss}: {answer}");
    }
    Ok(Verdict::Ran)
}

/// It can say that an issuer revoked a certificate. That closes flows, and no others.
fn ends_what_it_names() -> Result<Verdict> {
    let scene = taken_over()?;
    let (hash, end) = (|digits: &str| digits.repeat(32), "2099-01-01T00:00:00Z");
    let certificate = json!({
        "proof": "mtls", "authority": "ca", "spiffe_id": "spiffe://example.org/one", "dns_names": [], "subject": "",
        "serial": "01", "issuer": "", "issuer_hash": hash("11"), "fingerprint": hash("22"), "key_hash": hash("33"),
        "not_after": end, "valid_until": end, "issuers": [],
    });
    ensure!(scene.claims(ONE, "token", &json!([token(&json!({}))]), &json!({}))?["message"] == "granted");
    ensure!(scene.claims(ONE, "certificate", &json!([certificate]), &json!({}))?["message"] == "granted");
    let list = |authority: &str, digits: &str| -> Result<()> {
        let message = json!({ "message": "listed", "authority": authority, "certificate": hash(digits) });
        scene.tells(TWO, &format!("raw {message}"))?;
        // Answered after it.
        scene.says(TWO, &json!({ "message": "held", "question": 5, "connection": "CONNECTION" }))?;
        Ok(())
    };
    // The token's hash, another certificate, its key, and another authority's word.
    for (authority, digits) in [("ca", "00"), ("ca", "44"), ("ca", "33"), ("other", "22")] {
        list(authority, digits)?;
        scene.opens(ONE, 7101)?;
        scene.opens(ONE, 7102)?;
    }
    list("ca", "22")?;
    scene.is_closed(ONE, 7102)?;
    scene.opens(ONE, 7101)?;
    let ended = scene.daemon.wait_for("the end", |r| r.event == "grant_revoked")?;
    ensure!(ended.reason.as_deref() == Some("certificate_revoked"), "{ended:?}");
    Ok(Verdict::Ran)
}

fn nonsense_ends_it() -> Result<Verdict> {
    let scene = taken_over()?;
    ensure!(scene.claims(ONE, "token", &json!([token(&json!({}))]), &json!({}))?["message"] == "granted");
    let deep = format!("raw {}", "[".repeat(10_000));
    for line in [
        "raw {",
        "raw {\"message\":\"apply\"}",
        "raw {\"message\":\"ready\",\"generation\":1,\"and\":2}",
        "raw ",
        &deep,
    ] {
        let before = scene.daemon.control_pid()?;
        scene.tells(TWO, line)?;
        wait_until("another control process", || Ok(scene.daemon.control_pid().is_ok_and(|pid| pid != before)))?;
        wait_until("it is ready", || Ok(scene.daemon.status()?.control_ready))?;
    }
    let ends = scene.daemon.records()?.iter().filter(|r| r.event == "control_ended").count();
    ensure!(ends >= 5, "{ends} ends are on record");
    // Grants do not depend on it.
    scene.opens(ONE, 7101)?;
    scene.is_closed(TWO, 7101)?;
    Ok(Verdict::Ran)
}

fn puts_no_text_into_metrics() -> Result<Verdict> {
    let scene = taken_over()?;
    let counts = |counts: Value| json!({ "message": "counted", "counts": counts }).to_string();
    let say = |line: &str| scene.tells(TWO, line).map(drop);
    let text = || {
        let output = scene.daemon.command(&["status", "--prometheus"])?;
        anyhow::Ok(String::from_utf8(output.stdout)?)
    };
    let sample = |name: &str| {
        let text = text()?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok());
        anyhow::Ok(value.unwrap_or_default())
    };
    let (good, other) = ("authd_tls_handshakes_total{result=\"ok\"}", "authd_tls_handshakes_total{result=\"other\"}");
    // This is what it can do: count under names that exist.
    let handshake = json!({ "counted": "handshake", "result": "ok" });
    say(&counts(json!([[handshake, u32::MAX], [handshake, u32::MAX]])))?;
    wait_until("the sum", || Ok(sample(good)? == 2 * u64::from(u32::MAX)))?;

    // No name of its own, of nobody whom the policy does not have, and not a line more for all that it invents.
    let evil = "x\"} 1\nauthd_invented{a=\"";
    let mut invented = 0;
    let invent = |number: u32| {
        let name = format!("{evil}{number}");
        json!([
            [{ "counted": "handshake", "result": name }, 1],
            [{ "counted": "proof", "proof": "token", "result": name }, 1],
            [{ "counted": "proof", "proof": "api-key", "result": "accepted" }, 1],
            [{ "counted": "fetch", "issuer": name, "kind": "jwks", "result": "ok" }, 1],
            [{ "counted": "fetch", "issuer": "invented", "kind": "jwks", "result": "ok" }, 1],
            [{ "counted": "fetch", "issuer": "corp", "kind": "introspection", "result": name }, 1],
        ])
    };
    let ends = |number: u32| {
        let name = format!("{evil}{number}");
        let ends = json!([
            [{ "ending": "bundle", "authority": name }, "9999-12-30T22:00:00Z"],
            [{ "ending": "lists", "authority": "invented" }, "9999-12-30T22:00:00Z"],
        ]);
        json!({ "message": "ends", "ends": ends }).to_string()
    };
    let mut lines = 0;
    for number in 0..20 {
        say(&counts(invent(number)))?;
        say(&ends(number))?;
        invented += 1;
        wait_until("it was heard", || Ok(sample(other)? == invented))?;
        let now = text()?;
        ensure!(number == 0 || now.lines().count() == lines, "{lines} lines were enough before: {now}");
        ensure!(!now.contains("invented") && !now.contains("api-key\",result=\"accepted"), "{now}");
        lines = now.lines().count();
    }
    // Nor an API key that it says was shown, with a request that dataplane refuses.
    let key = json!({ "proof": "api-key", "id": "2e3n8nazzq", "name": "k", "not_after": "2099-01-01T00:00:00Z" });
    scene.claim_is_refused(TWO, "no-such-rule", &json!([key]), "rule_unknown")?;
    ensure!(!text()?.contains("api-key\",result=\"accepted"), "{}", text()?);

    // A number that is none ends it, and what was counted stays.
    for times in ["-1", "4294967296", "1.5", "1e400", "\"1\"", "null"] {
        let before = scene.daemon.control_pid()?;
        let handshake = r#"{"counted":"handshake","result":"ok"}"#;
        say(&format!(r#"raw {{"message":"counted","counts":[[{handshake},{times}]]}}"#))?;
        wait_until("another control process", || Ok(scene.daemon.control_pid().is_ok_and(|pid| pid != before)))?;
        wait_until("it is ready", || Ok(scene.daemon.status()?.control_ready))?;
    }
    ensure!(sample(good)? == 2 * u64::from(u32::MAX) && sample(other)? == invented, "{}", text()?);
    let file = scene.sandbox.directory().join("metrics.prom");
    wait_until("the file", || Ok(std::fs::read_to_string(&file).is_ok_and(|text| text.contains(other))))?;
    ensure!(!std::fs::read_to_string(&file)?.contains("invented"));
    Ok(Verdict::Ran)
}

fn can_do_nothing_to_the_node() -> Result<Verdict> {
    let scene = taken_over()?;
    let told = scene.tells(ONE, "sandbox")?;
    let attempts: BTreeMap<String, String> = serde_json::from_str(&told).with_context(|| told.clone())?;
    ensure!(attempts.len() >= 19, "{attempts:?}");
    for (what, came_of_it) in &attempts {
        let expected: &[&str] = match what.as_str() {
            "read the policy" | "read passwords" | "leave its root" => &["ENOENT"],
            "write in its root" => &["EACCES"],
            "inherited descriptors" => &[""],
            _ => &["EPERM"],
        };
        ensure!(expected.contains(&came_of_it.as_str()), "{what}: {came_of_it}");
    }
    // Nor does anybody find its memory: it is not dumpable.
    let status = std::fs::metadata(format!("/proc/{}/mem", scene.daemon.control_pid()?))?;
    ensure!(std::os::unix::fs::MetadataExt::uid(&status) == 0, "its files in /proc are root's");
    Ok(Verdict::Ran)
}

const NODES: &str = r#"
trust_domain = "example.org"
[[authority]]
name = "nodes"
bundle = "nodes.crt"
trust_domain = "example.org"
[[authority]]
name = "other"
bundle = "nodes.crt"
trust_domain = "example.org"
[[node]]
name = "a"
spiffe_id = "spiffe://example.org/node/a"
authority = "nodes"
speaks_for = ["spiffe://example.org/web"]
[[node]]
name = "b"
spiffe_id = "spiffe://example.org/node/b"
authority = "nodes"
address = "192.0.2.2:7443"
networks = ["192.0.2.2"]
[[workload]]
name = "db"
kind = "service"
cgroup = "/db"
[[peer]]
name = "web"
spiffe_id = "spiffe://example.org/web"
[[peer]]
name = "batch"
spiffe_id = "spiffe://example.org/batch"
[[service]]
name = "sql"
workload = "db"
ports = ["tcp/7001"]
[[rule]]
name = "web-sql"
from = ["web"]
to = ["sql"]
require = ["node"]
[[rule]]
name = "batch-sql"
from = ["batch"]
to = ["sql"]
require = ["node"]
"#;

const WEB: &str = "spiffe://example.org/web";
const BATCH: &str = "spiffe://example.org/batch";
const LISTENER: &str = "127.0.0.1:7443";
/// Of the sessions that control invents.
const KEY: [u8; 16] = [7; 16];

/// A node among others, whose control is taken over.
struct Neighbour {
    daemon: Daemon,
    sandbox: Sandbox,
}

impl Neighbour {
    fn taken_over(settings: &str) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let authority = Authority::new("nodes")?;
        std::fs::write(sandbox.policy_directory().join("nodes.crt"), authority.pem())?;
        authority.issue_spiffe(sandbox.directory(), "node", "spiffe://example.org/node/here")?;
        let file = |name: &str| sandbox.directory().join(name);
        sandbox.add_settings(&format!(
            "control.listen = {LISTENER:?}\ncontrol.certificate = {:?}\ncontrol.key = {:?}\n{settings}",
            file("node.pem"),
            file("node.key"),
        ))?;
        sandbox.write_policy(NODES)?;
        let program = probe::binary().display().to_string();
        let daemon = Daemon::start_inside_with(&sandbox, &[("AUTHD_TEST_CONTROL", program)])?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        Ok(Self { daemon, sandbox })
    }

    /// Lets the control process say something in the name of somebody who connected to the listener.
    fn tells(&self, line: &str) -> Result<String> {
        self.sandbox.netns.within(|| {
            let mut stream = TcpStream::connect(LISTENER)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            writeln!(stream, "{line}")?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer)?;
            Ok(answer)
        })
    }

    fn says(&self, message: &Value) -> Result<Value> {
        let answer = self.tells(&message.to_string())?;
        serde_json::from_str(&answer).with_context(|| format!("{answer}\n{}", self.daemon.log()))
    }

    /// That nobody is told anything, and that it was heard.
    fn hears(&self, message: &Value) -> Result<()> {
        let before = self.daemon.control_pid()?;
        self.tells(&format!("raw {message}"))?;
        let answer = self.says(&json!({ "message": "held", "question": 8, "connection": "CONNECTION" }))?;
        ensure!(answer["question"] == 8 && self.daemon.control_pid()? == before, "{answer}\n{}", self.daemon.log());
        Ok(())
    }

    fn is_refused(&self, message: &Value, reason: &str) -> Result<()> {
        let answer = self.says(message)?;
        ensure!(answer["refusal"]["reason"] == reason, "{reason} was expected for {message}: {answer}");
        Ok(())
    }

    fn refusal_is_told(&self, reason: &str) -> Result<()> {
        self.daemon.wait_for(reason, |r| r.event == "node_refused" && r.reason.as_deref() == Some(reason))?;
        Ok(())
    }

    fn labels_of_others(&self) -> Result<Vec<u32>> {
        Ok(self.sandbox.table::<u32, Speaker>(names::SPEAKERS)?.into_iter().map(|(label, _)| label).collect())
    }

    fn keys_of_others(&self) -> Result<usize> {
        Ok(self.sandbox.table::<NodeKeyId, NodeKey>(names::NODE_KEYS)?.len())
    }
}

/// A session that control says another node opened, with a certificate that nobody showed.
fn session(changed: &Value, speaks_for: &[&str]) -> Value {
    let (hash, end) = (|digits: &str| digits.repeat(32), "2099-01-01T00:00:00Z");
    let mut certificate = json!({
        "authority": "nodes", "spiffe_id": "spiffe://example.org/node/a", "dns_names": [], "subject": "",
        "serial": "01", "issuer": "", "issuer_hash": hash("11"), "fingerprint": hash("22"), "key_hash": hash("33"),
        "not_after": end, "valid_until": end, "issuers": [],
    });
    for (name, value) in changed.as_object().into_iter().flatten() {
        certificate[name] = value.clone();
    }
    json!({
        "message": "node_session", "question": 7, "connection": "CONNECTION", "certificate": certificate,
        "key": KEY, "speaks_for": speaks_for,
    })
}

fn makes_no_node() -> Result<Verdict> {
    let neighbour = Neighbour::taken_over("")?;
    for (changed, reason) in [
        (json!({ "spiffe_id": "spiffe://example.org/node/c" }), "node_unknown"),
        (json!({ "spiffe_id": "spiffe://example.org/node" }), "node_unknown"),
        (json!({ "spiffe_id": WEB }), "node_unknown"),
        (json!({ "spiffe_id": null, "dns_names": ["a"], "subject": "CN=a" }), "node_unknown"),
        (json!({ "authority": "other" }), "node_unknown"),
        (json!({ "authority": "invented" }), "node_unknown"),
        (json!({ "valid_until": Timestamp::now() - SignedDuration::from_mins(5) }), "certificate_expired"),
        (json!({ "valid_until": Timestamp::now() }), "certificate_expired"),
    ] {
        neighbour.is_refused(&session(&changed, &[WEB]), reason)?;
        neighbour.refusal_is_told(reason)?;
    }
    // Nodes come from elsewhere, to the listener.
    let socket = neighbour.sandbox.directory().join("workload.sock");
    let socket = socket.to_str().context("a path")?;
    for cgroup in ["/db", "/elsewhere"] {
        let line = session(&json!({}), &[WEB]).to_string();
        let outcome = neighbour.sandbox.probe(cgroup, &["say", socket, &line])?;
        let answer: Value = serde_json::from_str(&outcome.detail).with_context(|| format!("{outcome:?}"))?;
        ensure!(answer["refusal"]["reason"] == "node_not_remote", "{cgroup}: {answer}");
        neighbour.refusal_is_told("node_not_remote")?;
    }
    let mut gone = session(&json!({}), &[WEB]);
    gone["connection"] = json!(987_654);
    neighbour.is_refused(&gone, "caller_gone")?;
    ensure!(neighbour.labels_of_others()?.is_empty() && neighbour.keys_of_others()? == 0);
    // This is what it can do: say that a node which the policy names is there.
    let answer = neighbour.says(&session(&json!({}), &[WEB]))?;
    ensure!(answer["message"] == "admitted" && answer["labels"][0].is_u64(), "{answer}\n{}", neighbour.daemon.log());
    ensure!(neighbour.labels_of_others()?.len() == 1 && neighbour.keys_of_others()? == 1);
    // And not after somebody revoked it.
    let output = neighbour.daemon.command(&["revoke", "spiffe-id", "spiffe://example.org/node/a"])?;
    ensure!(output.status.success(), "{output:?}");
    neighbour.is_refused(&session(&json!({ "serial": "02" }), &[WEB]), "certificate_revoked")?;
    neighbour.refusal_is_told("certificate_revoked")?;
    Ok(Verdict::Ran)
}

fn lets_no_node_speak_for_others() -> Result<Verdict> {
    let neighbour = Neighbour::taken_over("")?;
    let outside = [
        BATCH,
        "spiffe://example.org/web/a",
        "spiffe://example.org/db",
        "spiffe://example.org/node/a",
        "spiffe://other.example/web",
        "spiffe://example.org/*",
        "web",
        "",
    ];
    let answer = neighbour.says(&session(&json!({}), &[&outside[..], &[WEB]].concat()))?;
    let labels = answer["labels"].as_array().with_context(|| answer.to_string())?;
    ensure!(labels.len() == outside.len() + 1, "one for each that it named: {answer}");
    for (id, label) in outside.iter().zip(labels) {
        ensure!(label.is_null(), "{id}: {answer}");
    }
    let label = labels.last().and_then(Value::as_u64).with_context(|| answer.to_string())?;
    // A node that may speak for nobody.
    let of_b = json!({ "spiffe_id": "spiffe://example.org/node/b" });
    let answer = neighbour.says(&session(&of_b, &[WEB, BATCH]))?;
    ensure!(answer["labels"] == json!([null, null]), "{answer}");
    let known = neighbour.labels_of_others()?;
    ensure!(known.iter().copied().map(u64::from).eq([label]), "{known:?}");
    neighbour.daemon.wait_for("the grant", |r| r.event == "grant_issued")?;
    let issued: Vec<_> =
        neighbour.daemon.records()?.into_iter().filter(|r| r.event == "grant_issued").map(|r| r.rule).collect();
    ensure!(issued == [Some("web-sql".to_owned())], "{issued:?}");
    Ok(Verdict::Ran)
}

fn makes_no_session_longer() -> Result<Verdict> {
    let neighbour = Neighbour::taken_over("control.node_session_seconds = 30\n")?;
    let first = neighbour.says(&session(&json!({}), &[WEB]))?;
    ensure!(first["seconds"] == 30, "{first}\n{}", neighbour.daemon.log());
    // That was the first connection. It asks again, and then with another key, too.
    std::thread::sleep(Duration::from_secs(2));
    let mut again = session(&json!({}), &[WEB]);
    again["connection"] = json!(1);
    again["key"] = serde_json::to_value([8_u8; 16])?;
    let second = neighbour.says(&again)?;
    ensure!(second["key_id"] == first["key_id"] && second["labels"] == first["labels"], "{second}, not {first}");
    ensure!(second["seconds"].as_u64().is_some_and(|seconds| seconds <= 28), "{second}");
    let keys = neighbour.sandbox.table::<NodeKeyId, NodeKey>(names::NODE_KEYS)?;
    ensure!(keys.len() == 1 && keys[0].1.secret == [0x0707_0707_0707_0707; 2], "the first one is in use");
    // Until the first one's end it is answered, and never for longer.
    let until = Instant::now() + PATIENCE;
    loop {
        let answer = neighbour.says(&again)?;
        if answer["refusal"]["reason"] == "session_over" {
            break;
        }
        let left = answer["seconds"].as_u64();
        ensure!(left.is_some_and(|seconds| seconds <= 28) && Instant::now() < until, "{answer}");
        std::thread::sleep(Duration::from_millis(500));
    }
    Ok(Verdict::Ran)
}

fn speaks_to_no_unknown_node() -> Result<Verdict> {
    let neighbour = Neighbour::taken_over("")?;
    let accepted = |node: &str, caller: &str| {
        json!({
            "message": "node_accepted", "node": node, "key": KEY, "key_id": 3, "seconds": 600,
            "labels": [[caller, 5]], "last": true,
        })
    };
    let told =
        || -> Result<usize> { Ok(neighbour.daemon.records()?.iter().filter(|r| r.event == "node_accepts").count()) };
    let voices = || Ok::<_, anyhow::Error>(neighbour.sandbox.table::<u32, Voice>(names::VOICES)?.len());
    let labels = || neighbour.sandbox.table::<LabelKey, u32>(names::LABELS);
    for node in ["c", "", "node/b", "here"] {
        neighbour.hears(&accepted(node, "spiffe://example.org/db"))?;
        ensure!(voices()? == 0 && labels()?.is_empty() && told()? == 0, "{node:?}");
    }
    // To one that the policy names, it says nothing of callers that are not of this node.
    for caller in [WEB, "spiffe://example.org/db/a", "spiffe://other.example/db", ""] {
        neighbour.hears(&accepted("b", caller))?;
        ensure!(labels()?.is_empty(), "{caller:?}");
    }
    // This is what it can do.
    neighbour.hears(&accepted("b", "spiffe://example.org/db"))?;
    ensure!(voices()? == 1 && labels()?.iter().map(|(_, label)| *label).eq([5]), "{:?}", labels()?);
    Ok(Verdict::Ran)
}
