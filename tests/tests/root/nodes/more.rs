//! Rules that ask for a node's word and for proofs that the caller itself shows: one grant, of the very caller that showed them.

use anyhow::{Context, Result, ensure};
use authd_common::{
    syn::Spoken,
    tables::{FlowKey, names},
};
use authd_tests::wire::{self, Wire};
use serde_json::Value;

use super::{LONG, POLICY, Pair, V4, denials, forged::Stolen};
use crate::{Verdict, reload::wait_until};

const MORE: &str = r#"
[[peer]]
name = "batch-elsewhere"
spiffe_id = "spiffe://example.org/batch"
[[service]]
name = "listener-of-b"
addresses = ["192.0.2.2"]
ports = ["tcp/7443"]
[[rule]]
name = "ask"
from = ["web", "batch", "cron"]
to = ["listener-of-b"]
[[rule]]
name = "batch-key"
from = ["batch-elsewhere"]
to = ["sql"]
require = ["node", "api-key"]
grant_ttl = "8h"
"#;

impl Pair {
    /// What the listener of `b` answers one of `a`'s workloads.
    fn asks(&self, from: &str, command: &str, more: &[&str]) -> Result<Value> {
        let ca = self.b.sandbox.policy_directory().join("nodes.crt").display().to_string();
        let arguments = [&[command, "--json", "--url", "https://192.0.2.2:7443", "--ca", &ca], more].concat();
        let outcome = self.a.sandbox.authd_in_netns(from, &self.a.sandbox.netns, &arguments)?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", self.logs()))
    }
}

/// SYNs to the listener that were believed, and how many of them are used up.
fn believed(pair: &Pair) -> Result<(usize, usize)> {
    let all: Vec<(FlowKey, Spoken)> = pair.b.sandbox.table(names::SPOKEN)?;
    let to_listener = all.iter().filter(|(key, _)| key.ports & 0xffff == 7443);
    Ok((to_listener.clone().count(), to_listener.filter(|(_, spoken)| spoken.used != 0).count()))
}

pub fn shows_more_than_a_word() -> Result<Verdict> {
    let pair = Pair::new("", "")?;
    let mut web = pair.a.sandbox.spawn_in("/web", &pair.a.sandbox.netns, &["hold-tcp", V4])?;
    ensure!(web.again()?.ok);
    let policy = [POLICY, MORE].concat();
    for node in [&pair.a, &pair.b] {
        node.sandbox.write_policy(&policy)?;
        node.daemon.must_apply()?;
        ensure!(web.again()?.ok, "another rule beside the one that let it in cuts it\n{}", pair.logs());
    }
    // Its node vouches for it, which is not all that is asked for.
    pair.is_kept_out("/batch", V4)?;
    let denied = pair.is_denied_for("proof_required")?;
    ensure!(denied.rule.as_deref() == Some("batch-key"), "{denied:?}");
    ensure!(denied.peer_spiffe_id.as_deref() == Some("spiffe://example.org/batch"), "{denied:?}");

    let made = pair.b.daemon.command(&["key", "create", "--name", "k", "--rule", "batch-key"])?;
    let file = pair.a.sandbox.directory().join("api.key");
    std::fs::write(&file, String::from_utf8(made.stdout)?.trim())?;
    let key = ["--rule", "batch-key", "--api-key-file", file.to_str().context("a path")?];
    let refusals = [
        // Without the key; with it, but another one's word; with it, but nobody's.
        ("/batch", &key[..2], "api_key_missing"),
        ("/web", &key[..], "rule_not_for_caller"),
        ("/cron", &key[..], "node_identity_missing"),
        ("/elsewhere", &key[..], "node_identity_missing"),
    ];
    for (from, arguments, reason) in refusals {
        let answer = pair.asks(from, "grant", arguments)?;
        ensure!(answer["reason"] == reason, "{from}: {reason} was expected: {answer}\n{}", pair.logs());
    }
    pair.is_kept_out("/batch", V4)?;
    let granted = pair.asks("/batch", "grant", &key)?;
    let id = granted["id"].as_str().with_context(|| format!("{granted}\n{}", pair.logs()))?;
    // As long as the node's session at most, whatever the rule allows.
    ensure!(granted["expires_in"].as_u64().is_some_and(|seconds| seconds <= 600), "{granted}");
    pair.connects("/batch", V4)?;
    // It is nobody else's, though all of them have one address.
    for who in ["/cron", "/elsewhere"] {
        pair.is_kept_out(who, V4)?;
    }
    let told = pair.asks("/batch", "whoami", &[])?;
    ensure!(told["node"] == "a" && told["spiffe_id"] == "spiffe://example.org/batch", "{told}");
    ensure!(told["grants"][0]["id"] == id, "{told}");
    ensure!(pair.asks("/cron", "whoami", &[])?.get("node").is_none());
    let issued =
        pair.b.daemon.wait_for("the grant", |r| r.event == "grant_issued" && r.rule.as_deref() == Some("batch-key"))?;
    ensure!(issued.peer_node.as_deref() == Some("a"), "{issued:?}");
    ensure!(issued.peer_spiffe_id.as_deref() == Some("spiffe://example.org/batch"), "{issued:?}");
    ensure!(issued.proofs.iter().map(|proof| proof.proof.as_str()).eq(["node", "api-key"]), "{issued:?}");

    // Each of those connections was believed once: without the key, with another's word, the grant, and who asked.
    ensure!(believed(&pair)? == (4, 4), "{:?}", believed(&pair)?);

    // The grant ends to the packet.
    let mut held = pair.a.sandbox.spawn_in("/batch", &pair.a.sandbox.netns, &["hold-tcp", V4])?;
    ensure!(held.again()?.ok);
    let revoked = pair.b.daemon.command(&["revoke", "grant", id])?;
    ensure!(revoked.status.success(), "{revoked:?}");
    ensure!(!held.again()?.ok, "it goes on\n{}", pair.logs());
    pair.is_kept_out("/batch", V4)?;
    // Nor does it cut anybody that a rule names somebody else as well.
    let also = policy.replace("from = [\"web-elsewhere\"]", "from = [\"web-elsewhere\", \"batch-elsewhere\"]");
    pair.b.sandbox.write_policy(&also)?;
    pair.b.daemon.must_apply()?;
    ensure!(web.again()?.ok, "{}", pair.logs());
    pair.connects("/batch", V4)?;
    Ok(Verdict::Ran)
}

/// Both from one address to one port, one right after the other: what is remembered of the one is not said of the other.
pub fn lacking_proofs_and_a_word() -> Result<Verdict> {
    let pair = Pair::new(LONG, "interfaces = [\"far0\"]\n")?;
    pair.connects("/web", V4)?;
    pair.b.sandbox.write_policy(&[POLICY, MORE].concat())?;
    pair.b.daemon.must_apply()?;
    let stolen = Stolen::from(&pair.a)?;
    let vouched = stolen.syn(stolen.batch, 40_000, 7);
    let mut silent = vouched.clone();
    silent.option.clear();
    let to = pair.b.sandbox.netns.within(|| wire::mac("far0"))?;
    pair.a.sandbox.netns.within(|| {
        let wire = Wire::open("near0")?;
        (0..20).try_for_each(|_| [&vouched, &silent].iter().try_for_each(|syn| wire.send(&syn.frame(to))))
    })?;
    let sums = || -> Result<(u64, u64)> {
        Ok((denials(&pair.b, "proof_required")?, denials(&pair.b, "node_identity_missing")?))
    };
    wait_until("the refusals", || sums().map(|(proofs, words)| proofs + words >= 40))?;
    ensure!(sums()? == (20, 20), "{:?}\n{}", sums()?, pair.logs());
    Ok(Verdict::Ran)
}
