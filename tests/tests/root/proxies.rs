//! The real nginx and the real Envoy, with the configurations that authd ships, asking authd about each request.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use authd_tests::{
    daemon::Daemon,
    others,
    probe::Running,
    sandbox::Sandbox,
    trust::{Authority, Issuer},
};
use libtest_mimic::Trial;
use serde_json::json;

use crate::{Verdict, reload::wait_until, trial};

/// Only where the programs of others were fetched: emulated machines have no network.
pub fn trials() -> Vec<Trial> {
    if others::directory().is_none() {
        return Vec::new();
    }
    vec![
        trial("nginx_asks_about_each_request", || behind(Proxy::Nginx)),
        trial("envoy_asks_about_each_request", || behind(Proxy::Envoy)),
        trial("a_name_in_a_certificate_is_no_other_certificate", a_name_is_no_other_certificate),
    ]
}

const POLICY: &str = r#"
trust_domain = "example.org"
[[workload]]
name = "gateway"
kind = "gateway"
cgroup = "/gateway"
[[issuer]]
name = "corp"
kind = "jwt"
issuer = "https://idp.example.org"
jwks_file = "jwks.json"
algorithms = ["ES256"]
max_ttl = "1h"
[[authority]]
name = "ca"
bundle = "ca.crt"
trust_domain = "example.org"
[[service]]
name = "ledger"
workload = "gateway"
ports = ["tcp/8443"]
[[service]]
name = "behind"
addresses = ["127.0.0.0/8"]
ports = ["tcp/8080"]
[[rule]]
name = "callers-reach-the-gateway"
from = ["any"]
to = ["ledger"]
[[rule]]
name = "gateway-reaches-the-ledger"
from = ["gateway"]
to = ["behind"]
[[rule]]
name = "call-ledger"
from = ["any"]
to = ["ledger"]
require = ["token"]
token = { issuer = "corp", audience = "ledger" }
"#;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Proxy {
    Nginx,
    Envoy,
}

/// The shipped configuration, with the paths of this test.
fn configure(proxy: Proxy, sandbox: &Sandbox, changes: &[(&str, &str)]) -> Result<Vec<String>> {
    let directory = sandbox.directory();
    let at = |name: &str| directory.join(name).display().to_string();
    let replaced = |text: &str, pairs: &[(&str, String)]| -> Result<String> {
        let changes = changes.iter().map(|(shipped, here)| (*shipped, (*here).to_owned()));
        pairs.iter().cloned().chain(changes).try_fold(text.to_owned(), |text, (shipped, here)| {
            ensure!(text.contains(shipped), "the shipped configuration has {shipped}");
            Ok(text.replace(shipped, &here))
        })
    };
    let socket = at("workload.sock");
    match proxy {
        Proxy::Nginx => {
            let text = replaced(
                include_str!("../../../packaging/nginx.conf"),
                &[
                    ("/run/authd/workload.sock", socket),
                    ("/var/log/nginx/error.log", at("nginx.log")),
                    ("/run/nginx.pid", at("nginx.pid")),
                    ("/etc/nginx/ledger.crt", at("ledger.pem")),
                    ("/etc/nginx/ledger.key", at("ledger.key")),
                    ("worker_processes auto;", "worker_processes 1;".to_owned()),
                    (
                        "access_log off;",
                        ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                            .map(|kind| format!("{kind}_temp_path {};", at(kind)))
                            .join(" ")
                            + " access_log off;",
                    ),
                ],
            )?;
            fs::write(at("nginx.conf"), text)?;
            let globals = "daemon off; master_process off;";
            Ok([
                "exec",
                "--",
                &others::program("nginx")?,
                "-p",
                &at(""),
                "-c",
                &at("nginx.conf"),
                "-e",
                &at("nginx.log"),
                "-g",
                globals,
            ]
            .map(str::to_owned)
            .to_vec())
        }
        Proxy::Envoy => {
            let text = replaced(
                include_str!("../../../packaging/envoy.yaml"),
                &[
                    ("/run/authd/workload.sock", socket),
                    ("/etc/envoy/ledger.crt", at("ledger.pem")),
                    ("/etc/envoy/ledger.key", at("ledger.key")),
                ],
            )?;
            fs::write(at("envoy.yaml"), text)?;
            let arguments = ["--concurrency", "1", "--disable-hot-restart", "--log-path", &at("envoy.log")];
            Ok([&["exec", "--", &others::program("envoy")?, "-c", &at("envoy.yaml")], &arguments[..]]
                .concat()
                .into_iter()
                .map(str::to_owned)
                .collect())
        }
    }
}

struct Scene {
    sandbox: Sandbox,
    daemon: Daemon,
    issuer: Issuer,
    authority: Authority,
    proxy: Proxy,
    _running: Vec<Running>,
}

impl Scene {
    fn new(proxy: Proxy, policy: &str) -> Result<Self> {
        Self::changed(proxy, policy, &[])
    }

    /// With some of the shipped configuration replaced.
    fn changed(proxy: Proxy, policy: &str, changes: &[(&str, &str)]) -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let issuer = Issuer::new("k1")?;
        let authority = Authority::new("tests")?;
        fs::write(sandbox.policy_directory().join("jwks.json"), issuer.jwks()?)?;
        fs::write(sandbox.policy_directory().join("ca.crt"), authority.pem())?;
        let names = vec![rcgen::SanType::DnsName("ledger.example.org".try_into()?)];
        authority.issue(sandbox.directory(), "ledger", names)?;
        sandbox.write_policy(policy)?;
        let daemon = sandbox.start()?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        let behind = sandbox.spawn("/servers", &["serve-http", "127.0.0.1:8080"])?;
        let arguments = configure(proxy, &sandbox, changes)?;
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let gateway = sandbox.spawn_quietly_in("/gateway", &sandbox.netns, &arguments)?;
        let scene = Self { sandbox, daemon, issuer, authority, proxy, _running: vec![behind, gateway] };
        wait_until("the proxy", || Ok(!scene.curl(&[], &[])?.starts_with("curl:"))).with_context(|| scene.log())?;
        Ok(scene)
    }

    fn log(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.sandbox.directory().join(name)).unwrap_or_default();
        format!("{:?}\n{}\n{}\n{}", self.proxy, read("nginx.log"), read("envoy.log"), self.daemon.log())
    }

    fn curl(&self, headers: &[&str], more: &[&str]) -> Result<String> {
        let mut command = vec![
            "run",
            "--",
            "curl",
            "-sS",
            "-i",
            "--insecure",
            "--http1.1",
            "--resolve",
            "ledger.example.org:8443:127.0.0.1",
        ];
        for header in headers {
            command.extend(["-H", header]);
        }
        command.extend(more);
        command.push("https://ledger.example.org:8443/accounts/7?since=2026");
        Ok(self.sandbox.probe("/elsewhere", &command)?.detail)
    }

    fn expect(&self, answer: &str, status: &str) -> Result<()> {
        ensure!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{status}: {answer}\n{}", self.log());
        Ok(())
    }
}

fn behind(proxy: Proxy) -> Result<Verdict> {
    let scene = Scene::new(proxy, POLICY)?;
    let answer = scene.curl(&[], &[])?;
    scene.expect(&answer, "401")?;
    ensure!(answer.to_lowercase().contains("www-authenticate: bearer"), "{answer}");
    let token = scene.issuer.token(&json!({}))?;
    let bearer = format!("Authorization: Bearer {token}");
    // What only authd may say, and what only a proxy may say, is said by the client here.
    let lies = [
        "X-Authd-Subject: root",
        "X-Authd-Spiffe-Id: spiffe://example.org/root",
        "X-Authd-Api-Key: x",
        "X-Authd-Scopes: everything",
        "X-Original-URI: /other",
        "X-Original-Method: DELETE",
    ];
    let answer = scene.curl(&[&[&*bearer][..], &lies].concat(), &[])?;
    scene.expect(&answer, "200")?;
    let behind = answer.to_lowercase();
    ensure!(behind.contains("x-authd-subject: one") && behind.contains("x-authd-proofs: token"), "{answer}");
    ensure!(
        !behind.contains("root") && !behind.contains("everything"),
        "the client's own words came through: {answer}"
    );
    ensure!(!behind.contains(&token.to_lowercase()), "the token goes no further: {answer}");
    let decided = scene
        .daemon
        .wait_for("the decision", |r| r.event == "request_decided" && r.verdict.as_deref() == Some("allowed"))?;
    ensure!(decided.message.as_deref() == Some("GET /accounts/7"), "{decided:?}");
    ensure!(decided.workload.as_deref() == Some("gateway"), "{decided:?}");
    for (claims, reason) in
        [(json!({ "aud": "other" }), "audience_mismatch"), (json!({ "exp": 1_000 }), "token_expired")]
    {
        let token = scene.issuer.token(&claims)?;
        scene.expect(&scene.curl(&[&format!("Authorization: Bearer {token}")], &[])?, "401")?;
        scene.daemon.wait_for(reason, |r| r.event == "request_decided" && r.reason.as_deref() == Some(reason))?;
    }

    // A token that is bound to a certificate, which the proxy has to vouch for.
    let directory = scene.sandbox.directory();
    let fingerprint = scene.authority.issue_spiffe(directory, "client", "spiffe://example.org/client")?;
    scene.authority.issue_spiffe(directory, "thief", "spiffe://example.org/thief")?;
    let path = |name: &str| directory.join(name).display().to_string();
    let bound = json!({ "cnf": { "x5t#S256": authd::proofs::base64url::encode(fingerprint) } });
    let bound = format!("Authorization: Bearer {}", scene.issuer.token(&bound)?);
    let pem = fs::read_to_string(path("client.pem"))?.replace('\n', "%0A").replace(' ', "%20").replace('+', "%2B");
    scene.expect(&scene.curl(&[&bound], &["--cert", &path("client.pem"), "--key", &path("client.key")])?, "200")?;
    scene.expect(&scene.curl(&[&bound], &["--cert", &path("thief.pem"), "--key", &path("thief.key")])?, "401")?;
    scene.expect(&scene.curl(&[&bound], &[])?, "401")?;
    // The thief has no key, and writes the headers that the proxies would.
    for lie in [format!("X-Forwarded-Client-Cert: Cert=\"{pem}\""), format!("X-SSL-Client-Cert: {pem}")] {
        scene.expect(&scene.curl(&[&bound, &lie], &[])?, "401")?;
        let thief = ["--cert", &path("thief.pem"), "--key", &path("thief.key")];
        scene.expect(&scene.curl(&[&bound, &lie], &thief)?, "401")?;
    }
    // Revoked: with the next request.
    scene.expect(&scene.curl(&[&bearer], &[])?, "200")?;
    scene.daemon.command(&["revoke", "issuer", "https://idp.example.org"])?;
    let answer = scene.curl(&[&bearer], &[])?;
    scene.expect(&answer, "403")?;
    // Nobody to ask: nothing passes.
    scene.daemon.signal(nix::sys::signal::Signal::SIGSTOP)?;
    let answer = scene.curl(&[&bearer], &["--max-time", "30"]);
    scene.daemon.signal(nix::sys::signal::Signal::SIGCONT)?;
    let answer = answer?;
    ensure!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    // A proxy that offers no service of the rule is told nothing.
    let socket = scene.sandbox.directory().join("workload.sock");
    let answer = asked_by_another(&scene, &socket, proxy)?;
    ensure!(answer.starts_with("HTTP/1.1 403") && answer.contains("proxy_not_allowed"), "{answer}");
    Ok(Verdict::Ran)
}

/// Envoy writes names of certificates into its header as they are. One that looks like more of the header is no more of it.
fn a_name_is_no_other_certificate() -> Result<Verdict> {
    let details = "{ cert: true, subject: true, uri: true, dns: true }";
    let scene = Scene::changed(Proxy::Envoy, POLICY, &[("{ cert: true, chain: true }", details)])?;
    let directory = scene.sandbox.directory();
    let fingerprint = scene.authority.issue_spiffe(directory, "client", "spiffe://example.org/client")?;
    let path = |name: &str| directory.join(name).display().to_string();
    let escaped = |name: &str| -> Result<String> {
        let pem = fs::read_to_string(path(&format!("{name}.pem")))?;
        Ok(pem.replace('\n', "%0A").replace(' ', "%20").replace('+', "%2B"))
    };
    let bound = json!({ "cnf": { "x5t#S256": authd::proofs::base64url::encode(fingerprint) } });
    let bound = format!("Authorization: Bearer {}", scene.issuer.token(&bound)?);
    let shown = |name: &str| -> Result<String> {
        scene.curl(&[&bound], &["--cert", &path(&format!("{name}.pem")), "--key", &path(&format!("{name}.key"))])
    };
    scene.expect(&shown("client")?, "200")?;
    // What everybody may know of the client: its certificate.
    let known = escaped("client")?;
    let hash: String = fingerprint.iter().map(|byte| format!("{byte:02x}")).collect();
    for (number, uri) in [
        format!("spiffe://example.org/thief;Chain=\"{known}\""),
        format!("spiffe://example.org/thief;Cert=\"{known}\""),
        format!("spiffe://example.org/thief;Hash={hash};Chain=\"{known}\""),
        format!("spiffe://example.org/thief,By=x;Hash={hash};Cert=\"{known}\""),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("thief-{number}");
        // Of the thief's own making: whether anybody vouches for it is not Envoy's to say.
        Authority::new("thief")?.issue_spiffe(directory, &name, &uri)?;
        let answer = shown(&name)?;
        ensure!(answer.starts_with("HTTP/1.1 40"), "{uri}: {answer}\n{}", scene.log());
    }
    Ok(Verdict::Ran)
}

fn asked_by_another(scene: &Scene, socket: &Path, proxy: Proxy) -> Result<String> {
    let name = format!("{proxy:?}").to_lowercase();
    let url = format!("http://authd.local/v1/forward-auth/{name}/call-ledger");
    let socket = socket.to_str().context("a path")?;
    let command = ["run", "--", "curl", "-sS", "-i", "--unix-socket", socket, &url];
    Ok(scene.sandbox.probe("/another", &command)?.detail)
}
