//! Tokens of an authorization server that is not ours (npm's `oidc-provider`), of a JOSE library that is not ours either, and
//! certificates of OpenSSL's: each form of token, each binding, and each way in which it is refused.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use authd_tests::{
    daemon::Daemon,
    others::{self, AuthorizationServer},
    probe::Running,
    sandbox::Sandbox,
    trust::OpenSsl,
};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{
    Verdict,
    grants::{ONE, TWO},
    reload::wait_until,
    trial,
};

/// Only where the programs of others were fetched: emulated machines have no network.
pub fn trials() -> Vec<Trial> {
    if others::directory().is_none() {
        return Vec::new();
    }
    vec![
        trial("tokens_of_another_server_open_flows", tokens_of_another_server_open_flows),
        trial("tokens_of_another_library_are_refused_for_what_is_wrong", refused_for_what_is_wrong),
        trial("a_stolen_bound_token_is_refused_everywhere", a_stolen_bound_token_is_refused_everywhere),
        trial("a_server_that_forgets_a_token_ends_its_use", a_server_that_forgets_a_token_ends_its_use),
    ]
}

struct Scene {
    sandbox: Sandbox,
    daemon: Daemon,
    server: AuthorizationServer,
    authority: OpenSsl,
    _echo: Vec<Running>,
}

impl Scene {
    fn new() -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let server = AuthorizationServer::start()?;
        let authority = OpenSsl::new(sandbox.directory())?;
        fs::write(sandbox.policy_directory().join("ca.crt"), authority.pem()?)?;
        fs::write(sandbox.policy_directory().join("secret"), &server.secret)?;
        let (issuer, audience) = (&server.issuer, &server.audience);
        let policy = format!(
            r#"
trust_domain = "example.org"
[[workload]]
name = "one"
kind = "service"
cgroup = "/callers/one"
[[workload]]
name = "two"
kind = "service"
cgroup = "/callers/two"
[[authority]]
name = "ca"
bundle = "ca.crt"
trust_domain = "example.org"
[[issuer]]
name = "keys"
kind = "jwt"
issuer = "{issuer}"
jwks_url = "{}"
algorithms = ["ES256"]
allow_private = true
max_ttl = "1h"
access_token_type = true
[[issuer]]
name = "asked"
kind = "introspection"
issuer = "{issuer}"
introspection_url = "{}"
client_id = "authd"
client_secret_file = "secret"
allow_private = true
[[service]]
name = "by-keys"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7101"]
[[service]]
name = "by-asking"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7102"]
[[service]]
name = "bound"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7103"]
[[service]]
name = "by-certificate"
addresses = ["127.0.0.0/8"]
ports = ["tcp/7104"]
[[rule]]
name = "certificate"
from = ["one", "two"]
to = ["by-certificate"]
require = ["mtls"]
[[rule]]
name = "keys"
from = ["one", "two"]
to = ["by-keys"]
require = ["token"]
token = {{ issuer = "keys", audience = "{audience}", scopes = ["ledger:write"] }}
[[rule]]
name = "asked"
from = ["one", "two"]
to = ["by-asking"]
require = ["token"]
token = {{ issuer = "asked", audience = "{audience}", scopes = ["ledger:write"] }}
[[rule]]
name = "bound"
from = ["one", "two"]
to = ["bound"]
require = ["token"]
token = {{ issuer = "keys", audience = "{audience}", bound = true }}
"#,
            server.jwks_uri, server.introspection
        );
        sandbox.write_policy(&policy)?;
        let daemon = sandbox.start()?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        let echo = (7101..=7104).map(|port| sandbox.spawn("/servers", &["serve-tcp", &format!("127.0.0.1:{port}")]));
        let echo = echo.collect::<Result<_>>()?;
        Ok(Self { sandbox, daemon, server, authority, _echo: echo })
    }

    fn file(&self, text: &str) -> Result<String> {
        let path = self.sandbox.directory().join(format!("file-{:x}", rand::random::<u64>()));
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    }

    fn ask(&self, cgroup: &str, rule: &str, more: &[&str]) -> Result<Value> {
        let outcome = self.sandbox.authd_in(cgroup, &[&["grant", "--json", "--rule", rule], more].concat())?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))
    }

    fn granted(&self, cgroup: &str, rule: &str, more: &[&str]) -> Result<()> {
        let answer = self.ask(cgroup, rule, more)?;
        ensure!(answer["id"].is_string(), "{rule} {more:?}: {answer}\n{}", self.daemon.log());
        Ok(())
    }

    fn refused(&self, cgroup: &str, rule: &str, more: &[&str], reason: &str) -> Result<()> {
        let answer = self.ask(cgroup, rule, more)?;
        ensure!(answer["reason"] == reason, "{reason} was expected of {cgroup} {rule} {more:?}: {answer}");
        self.daemon.wait_for(reason, |r| r.event == "grant_refused" && r.reason.as_deref() == Some(reason))?;
        Ok(())
    }

    fn opens(&self, cgroup: &str, port: u16) -> Result<bool> {
        let outcome = self.sandbox.probe(cgroup, &["tcp", &format!("127.0.0.1:{port}")])?;
        ensure!(outcome.ok || outcome.is_eperm(), "{outcome:?}");
        Ok(outcome.ok)
    }

    /// A request by curl, whose proofs no code of authd's made: status, headers, body.
    fn curl(&self, cgroup: &str, rule: &str, headers: &[String], more: &[&str]) -> Result<String> {
        let socket = self.sandbox.directory().join("workload.sock").display().to_string();
        let body = json!({ "rule": rule }).to_string();
        let mut command = vec!["run", "--", "curl", "-sS", "-i", "--unix-socket", &socket, "-d", &body];
        for header in headers {
            command.extend(["-H", header]);
        }
        command.extend(more);
        if !more.iter().any(|argument| argument.starts_with("https://")) {
            command.push("http://authd.local/v1/grants");
        }
        Ok(self.sandbox.probe(cgroup, &command)?.detail)
    }

    /// A DPoP proof for a request on the Unix socket, by another library.
    fn proof(&mut self, token: &str, nonce: Option<&str>, changes: &Value) -> Result<String> {
        let mut asked = json!({
            "do": "proof", "method": "POST", "url": "http://authd.local/v1/grants", "token": token, "changes": changes,
        });
        if let Some(nonce) = nonce {
            asked["nonce"] = json!(nonce);
        }
        self.server.text(&asked, "proof")
    }

    /// Presents a DPoP-bound token, with whatever nonce the first answer asks for.
    fn present(&mut self, cgroup: &str, rule: &str, token: &str, changes: &Value) -> Result<String> {
        let authorization = format!("Authorization: DPoP {token}");
        let first = self.proof(token, None, &json!({}))?;
        let challenge = self.curl(cgroup, rule, &[authorization.clone(), format!("DPoP: {first}")], &[])?;
        ensure!(challenge.starts_with("HTTP/1.1 401") && challenge.contains("use_dpop_nonce"), "{challenge}");
        let nonce = header(&challenge, "dpop-nonce").context(challenge.clone())?;
        let proof = self.proof(token, Some(&nonce), changes)?;
        self.curl(cgroup, rule, &[authorization, format!("DPoP: {proof}")], &[])
    }
}

/// The value of a header in an answer.
fn header(answer: &str, name: &str) -> Option<String> {
    let mut lines = answer.lines();
    lines.find_map(|line| {
        let (found, value) = line.split_once(": ")?;
        found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
    })
}

fn certificate(scene: &Scene, workload: &str) -> Result<(String, String, String)> {
    let name = format!("{workload}-{:x}", rand::random::<u32>());
    let directory = scene.sandbox.directory();
    scene.authority.issue_spiffe(&name, &format!("spiffe://example.org/{workload}"))?;
    let path = |end: &str| -> PathBuf { directory.join(format!("{name}.{end}")) };
    Ok((path("pem").display().to_string(), path("key").display().to_string(), fs::read_to_string(path("pem"))?))
}

fn tokens_of_another_server_open_flows() -> Result<Verdict> {
    let mut scene = Scene::new()?;
    // A JWT, whose keys are fetched; and a token that only the server can read.
    let jwt = scene.server.text(&json!({ "do": "token" }), "access_token")?;
    let opaque = scene.server.text(&json!({ "do": "token", "client": "opaque" }), "access_token")?;
    let (jwt, opaque) = (scene.file(&jwt)?, scene.file(&opaque)?);
    ensure!(!scene.opens(ONE, 7101)? && !scene.opens(ONE, 7102)?);
    scene.granted(ONE, "keys", &["--token-file", &jwt])?;
    scene.granted(ONE, "asked", &["--token-file", &opaque])?;
    ensure!(scene.opens(ONE, 7101)? && scene.opens(ONE, 7102)?);
    scene.refused(ONE, "keys", &["--token-file", &opaque], "token_malformed")?;
    // A certificate of OpenSSL's, and one of an authority that nobody named.
    let (cert, key, _) = certificate(&scene, "one")?;
    scene.granted(ONE, "certificate", &["--cert", &cert, "--key", &key])?;
    ensure!(scene.opens(ONE, 7104)? && !scene.opens(TWO, 7104)?);
    scene.refused(TWO, "certificate", &["--cert", &cert, "--key", &key], "certificate_not_allowed")?;
    let elsewhere = scene.sandbox.directory().join("elsewhere");
    fs::create_dir(&elsewhere)?;
    OpenSsl::new(&elsewhere)?.issue_spiffe("two", "spiffe://example.org/two")?;
    let path = |end: &str| elsewhere.join(format!("two.{end}")).display().to_string();
    let answer = scene.ask(TWO, "certificate", &["--cert", &path("pem"), "--key", &path("key")])?;
    // Both authorities have the same name, and other keys.
    ensure!(["unknown_issuer", "bad_signature"].contains(&answer["reason"].as_str().unwrap_or("none")), "{answer}");
    // Bound to a certificate, of both forms; curl shows the certificate.
    let (cert, key, pem) = certificate(&scene, "one")?;
    for (client, rule) in [("one-bound", "keys"), ("opaque-bound", "asked"), ("one-bound", "bound")] {
        let token =
            scene.server.text(&json!({ "do": "token", "client": client, "certificate": pem }), "access_token")?;
        let file = scene.file(&token)?;
        scene.refused(ONE, rule, &["--token-file", &file], "bound_certificate_missing")?;
        scene.granted(ONE, rule, &["--token-file", &file, "--cert", &cert, "--key", &key])?;
        let tls = ["--insecure", "--cert", &cert, "--key", &key, "https://authd.local/v1/grants"];
        let answer = scene.curl(ONE, rule, &[format!("Authorization: Bearer {token}")], &tls)?;
        ensure!(answer.contains("201"), "{answer}");
    }
    // Bound to a key by DPoP, of both forms; the proofs are another library's.
    for (client, rule) in [("one", "keys"), ("opaque", "asked"), ("one", "bound")] {
        let token = scene.server.text(&json!({ "do": "token", "client": client, "dpop": true }), "access_token")?;
        let answer = scene.present(TWO, rule, &token, &json!({}))?;
        ensure!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    }
    ensure!(scene.opens(TWO, 7101)? && scene.opens(TWO, 7102)? && scene.opens(TWO, 7103)?);
    let issued = scene.daemon.wait_for("a bound grant", |r| {
        r.event == "grant_issued" && r.proofs.iter().any(|proof| !proof.bound_to.is_empty())
    })?;
    ensure!(issued.proofs[0].issuer.as_deref() == Some(&scene.server.issuer), "{issued:?}");
    // Our own client's proofs, against their binding.
    let token = scene.server.text(&json!({ "do": "token", "dpop": true }), "access_token")?;
    let pem = scene.server.text(&json!({ "do": "proof", "method": "GET", "url": "https://x.example/" }), "key")?;
    let (token, pem) = (scene.file(&token)?, scene.file(&pem)?);
    scene.granted(ONE, "bound", &["--token-file", &token, "--dpop-key", &pem])?;
    Ok(Verdict::Ran)
}

fn refused_for_what_is_wrong() -> Result<Verdict> {
    let mut scene = Scene::new()?;
    let now = jiff::Timestamp::now().as_second();
    for (header, claims, reason) in [
        (json!({}), json!({ "aud": "other" }), "audience_mismatch"),
        (json!({}), json!({ "aud": ["a", "b"] }), "audience_mismatch"),
        (json!({}), json!({ "iss": "https://other.example.org" }), "issuer_mismatch"),
        (json!({}), json!({ "scope": "ledger:read" }), "scope_insufficient"),
        (json!({}), json!({ "exp": now - 100, "iat": now - 200 }), "token_expired"),
        (json!({}), json!({ "nbf": now + 1000 }), "token_not_yet_valid"),
        (json!({}), json!({ "iat": now + 1000, "exp": now + 2000 }), "token_issued_in_future"),
        (json!({}), json!({ "exp": now + 100_000 }), "token_long_lived"),
        (json!({}), json!({ "exp": null }), "claim_missing"),
        (json!({}), json!({ "jti": null }), "claim_missing"),
        (json!({}), json!({ "client_id": null }), "claim_missing"),
        (json!({}), json!({ "exp": "soon" }), "claim_malformed"),
        (json!({ "typ": "JWT" }), json!({}), "token_type_mismatch"),
        (json!({ "typ": "logout+jwt" }), json!({}), "token_type_mismatch"),
        (json!({ "kid": "another" }), json!({}), "kid_unknown"),
    ] {
        let token = scene.server.text(&json!({ "do": "jwt", "header": header, "claims": claims }), "token")?;
        let file = scene.file(&token)?;
        scene.refused(ONE, "keys", &["--token-file", &file], reason)?;
    }
    let token = scene.server.text(&json!({ "do": "token" }), "access_token")?;
    let (signed, signature) = token.rsplit_once('.').context("a JWT")?;
    let first = if signature.starts_with('A') { 'B' } else { 'A' };
    let flipped = format!("{first}{}", &signature[1..]);
    for (text, reason) in [
        (format!("{signed}.{flipped}"), "signature_invalid"),
        (format!("{signed}."), "signature_invalid"),
        (format!("{signed}.{}", "A".repeat(86)), "signature_invalid"),
        (signed.to_owned(), "token_malformed"),
        (format!("{token}.a"), "token_malformed"),
        (format!("{token}="), "token_encoding"),
        ("A".repeat(15_000), "token_malformed"),
    ] {
        let file = scene.file(&text)?;
        scene.refused(ONE, "keys", &["--token-file", &file], reason)?;
    }
    // Two of one kind, and a scheme that is not for tokens.
    let bearer = format!("Authorization: Bearer {token}");
    for (headers, reason) in [
        (vec![bearer.clone(), bearer.clone()], "authorization_repeated"),
        (vec!["Authorization: Basic YTpi".to_owned()], "authorization_scheme"),
        (vec![bearer.replace("Bearer ", "Bearer")], "authorization_scheme"),
        (vec![bearer.clone(), "DPoP: a.b.c".to_owned()], ""),
    ] {
        let answer = scene.curl(ONE, "keys", &headers, &[])?;
        ensure!(answer.contains(reason), "{headers:?} {reason}: {answer}");
        ensure!(!answer.contains(&token), "no answer repeats a token: {answer}");
    }
    Ok(Verdict::Ran)
}

/// The second part of the stolen token: one that is bound, and everything that a thief can try with it.
fn a_stolen_bound_token_is_refused_everywhere() -> Result<Verdict> {
    let mut scene = Scene::new()?;
    let (cert, key, pem) = certificate(&scene, "one")?;
    let asked = json!({ "do": "token", "client": "one-bound", "certificate": pem });
    let by_certificate = scene.server.text(&asked, "access_token")?;
    let file = scene.file(&by_certificate)?;
    scene.granted(ONE, "bound", &["--token-file", &file, "--cert", &cert, "--key", &key])?;
    // Another workload, without the key, and with a certificate of its own.
    scene.refused(TWO, "bound", &["--token-file", &file], "bound_certificate_missing")?;
    let (own_cert, own_key, _) = certificate(&scene, "two")?;
    let own = ["--token-file", &file, "--cert", &own_cert, "--key", &own_key];
    scene.refused(TWO, "bound", &own, "bound_certificate_mismatch")?;
    // From another host, which is another network namespace.
    let elsewhere = scene.sandbox.another_netns("elsewhere")?;
    let there = [&["grant", "--json", "--rule", "bound"], &own[..]].concat();
    let outcome = scene.sandbox.authd_in_netns(TWO, &elsewhere, &there)?;
    ensure!(outcome.detail.contains("bound_certificate_mismatch"), "{outcome:?}");

    let by_key = scene.server.text(&json!({ "do": "token", "dpop": true }), "access_token")?;
    let dpop = format!("Authorization: DPoP {by_key}");
    for (headers, reason) in [
        (vec![format!("Authorization: Bearer {by_key}")], "dpop_bound_as_bearer"),
        (vec![dpop.clone()], "dpop_missing"),
        (vec![dpop.clone(), "DPoP: a.b.c".to_owned(), "DPoP: a.b.c".to_owned()], "dpop_repeated"),
        (vec![dpop.clone(), "DPoP: nonsense".to_owned()], "token_malformed"),
    ] {
        let answer = scene.curl(TWO, "bound", &headers, &[])?;
        ensure!(answer.contains(&format!("\"{reason}\"")), "{reason}: {answer}");
    }
    let now = jiff::Timestamp::now().as_second();
    for (changes, reason) in [
        (json!({ "htm": "GET" }), "dpop_method_mismatch"),
        (json!({ "htu": "https://other.example.org/v1/grants" }), "dpop_uri_mismatch"),
        (json!({ "iat": now - 1000 }), "dpop_too_old"),
        (json!({ "iat": now + 1000 }), "dpop_in_future"),
        (json!({ "ath": "A".repeat(43) }), "dpop_token_mismatch"),
        (json!({ "ath": null }), "dpop_claim_malformed"),
        (json!({ "nonce": "invented" }), "dpop_nonce_unknown"),
    ] {
        let answer = scene.present(TWO, "bound", &by_key, &changes)?;
        ensure!(answer.contains(&format!("\"{reason}\"")), "{reason}: {answer}");
    }
    // A proof that was used before: by whoever, for the same request.
    let first = scene.proof(&by_key, None, &json!({}))?;
    let challenge = scene.curl(ONE, "bound", &[dpop.clone(), format!("DPoP: {first}")], &[])?;
    let nonce = header(&challenge, "dpop-nonce").context(challenge)?;
    let proof = scene.proof(&by_key, Some(&nonce), &json!({}))?;
    let headers = [dpop.clone(), format!("DPoP: {proof}")];
    let answer = scene.curl(ONE, "bound", &headers, &[])?;
    ensure!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    for thief in [TWO, ONE] {
        let answer = scene.curl(thief, "bound", &headers, &[])?;
        ensure!(answer.contains("\"dpop_replayed\""), "{answer}");
    }
    // And after its revocation, with everything right.
    let stolen = scene.file(&by_key)?;
    let inspected = scene.daemon.command(&["token", "inspect", &stolen])?;
    let inspected: Value = serde_json::from_slice(&inspected.stdout)?;
    let hash = inspected["token_sha256"].as_str().with_context(|| inspected.to_string())?;
    let revoked = scene.daemon.command(&["revoke", "--json", "token-hash", hash])?;
    ensure!(String::from_utf8(revoked.stdout)?.contains("\"grants\":1"));
    let answer = scene.present(ONE, "bound", &by_key, &json!({}))?;
    ensure!(answer.contains("\"token_revoked\""), "{answer}");
    Ok(Verdict::Ran)
}

fn a_server_that_forgets_a_token_ends_its_use() -> Result<Verdict> {
    let mut scene = Scene::new()?;
    let token = scene.server.text(&json!({ "do": "token", "client": "opaque" }), "access_token")?;
    scene.server.ask(&json!({ "do": "revoke", "token": token, "client": "opaque" }))?;
    let file = scene.file(&token)?;
    scene.refused(ONE, "asked", &["--token-file", &file], "token_inactive")?;
    let invented = scene.file("an-invented-token")?;
    scene.refused(ONE, "asked", &["--token-file", &invented], "token_inactive")?;
    // And a server that is gone believes nothing.
    let token = scene.server.text(&json!({ "do": "token", "client": "opaque" }), "access_token")?;
    let jwt = scene.server.text(&json!({ "do": "token" }), "access_token")?;
    let (file, jwt) = (scene.file(&token)?, scene.file(&jwt)?);
    scene.granted(ONE, "keys", &["--token-file", &jwt])?;
    let Scene { sandbox, daemon, server, authority, _echo } = scene;
    drop(server);
    let ask = |rule: &str, file: &str| -> Result<Value> {
        let outcome = sandbox.authd_in(TWO, &["grant", "--json", "--rule", rule, "--token-file", file])?;
        serde_json::from_str(outcome.detail.trim()).with_context(|| format!("{outcome:?}\n{}", daemon.log()))
    };
    ensure!(ask("asked", &file)?["reason"] == "issuer_unreachable");
    // Keys that were fetched before go on to serve.
    ensure!(ask("keys", &jwt)?["id"].is_string());
    drop(authority);
    Ok(Verdict::Ran)
}
