//! What metrics say of the way from a caller to a grant, after handshakes, proofs, fetches and revocations that are known.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use authd::proofs::{base64url, jwk::PublicKey};
use authd_tests::{
    daemon::{Daemon, PATIENCE},
    netns::Netns,
    sandbox::Sandbox,
    trust::{Authority, ISSUER, Issuer},
};
use libtest_mimic::Trial;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustls::{ClientConfig, ClientConnection, pki_types::ServerName};
use serde_json::{Value, json};

use crate::{
    Verdict,
    grants::{ONE, TWO},
    reload::wait_until,
    trial,
};

pub fn trials() -> Vec<Trial> {
    vec![trial("metrics_tell_what_became_of_callers", metrics_tell_what_became_of_callers)]
}

const LISTENER: &str = "127.0.0.1:7443";
const NAME: &str = "node.example.org";
const SECRET: &str = "the-secret-that-authd-asks-with";
/// Ends of certificates and lists, as years and as Unix time.
const BUNDLE: (i32, &str) = (2050, "2524608000");
const LIST: (i32, &str) = (2040, "2208988800");
/// What certificates of tests have otherwise: the year 4096.
const LATE: &str = "67090118400";

fn policy(port: u16) -> String {
    let issuers = format!(
        r#"
[[issuer]]
name = "published"
kind = "jwt"
issuer = "{ISSUER}"
jwks_url = "http://127.0.0.1:{port}/keys"
algorithms = ["ES256"]
allow_private = true
[[issuer]]
name = "asked"
kind = "introspection"
issuer = "https://asked.example.org"
introspection_url = "http://127.0.0.1:{port}/introspect"
client_id = "authd"
client_secret_file = "secret"
allow_private = true
[[issuer]]
name = "down"
kind = "jwt"
issuer = "https://down.example.org"
jwks_url = "http://127.0.0.1:1/keys"
algorithms = ["ES256"]
allow_private = true
"#
    );
    let rule = |name: &str, port: u16, proofs: &str, more: &str| {
        format!(
            r#"
[[service]]
name = "{name}"
addresses = ["127.0.0.0/8"]
ports = ["tcp/{port}"]
[[rule]]
name = "{name}"
from = ["one", "two"]
to = ["{name}"]
require = [{proofs}]
{more}
"#
        )
    };
    let token = |issuer: &str| format!(r#"token = {{ issuer = "{issuer}", audience = "ledger" }}"#);
    [
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
[[workload]]
name = "proxy"
kind = "service"
cgroup = "/proxies"
[[service]]
name = "forwarded"
workload = "proxy"
ports = ["tcp/7107"]
[[rule]]
name = "forwarded"
from = ["any"]
to = ["forwarded"]
require = ["token"]
token = { issuer = "published", audience = "ledger" }
[[authority]]
name = "ca"
bundle = "ca.crt"
crl_files = ["ca.crl"]
trust_domain = "example.org"
"#,
        &issuers,
        &rule("token", 7101, "\"token\"", &token("published")),
        &rule("certificate", 7102, "\"mtls\"", ""),
        &rule("key", 7103, "\"api-key\"", ""),
        &rule("asked", 7104, "\"token\"", &token("asked")),
        &rule("both", 7106, "\"mtls\", \"token\"", &token("published")),
        &rule("down", 7105, "\"token\"", &token("down")),
    ]
    .concat()
}

/// An issuer's server of HTTP: its keys, and whatever it is to answer about a token.
struct Server {
    port: u16,
    answer: Arc<Mutex<(u16, String)>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(netns: &Netns, keys: String) -> Result<Self> {
        let listener = netns.within(|| Ok(TcpListener::bind("127.0.0.1:0")?))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let answer = Arc::new(Mutex::new((200, String::new())));
        let end = Arc::new(AtomicBool::new(false));
        let (about_tokens, ended) = (answer.clone(), end.clone());
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let (status, body) = about_tokens.lock().unwrap_or_else(PoisonError::into_inner).clone();
                        // Who asked and went away misses nothing.
                        let _ = serve(&stream, &keys, status, &body);
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Ok(Self { port, answer, end, thread: Some(thread) })
    }

    fn answers(&self, status: u16, body: &str) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = (status, body.to_owned());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: &TcpStream, keys: &str, status: u16, about_token: &str) -> Result<()> {
    stream.set_nonblocking(false)?;
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        ensure!(reader.read_line(&mut head)? > 0, "half a request");
    }
    let length = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    std::io::copy(&mut reader.take(length.unwrap_or(0)), &mut std::io::sink())?;
    let (status, body) = if head.starts_with("GET /keys ") { (200, keys) } else { (status, about_token) };
    let length = body.len();
    write!(stream, "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")?;
    Ok(())
}

struct Scene {
    sandbox: Sandbox,
    daemon: Daemon,
    issuer: Issuer,
    authority: Authority,
    server: Server,
    _echo: authd_tests::probe::Running,
}

impl Scene {
    fn new() -> Result<Self> {
        let sandbox = Sandbox::new()?;
        let issuer = Issuer::new("k1")?;
        let server = Server::start(&sandbox.netns, issuer.jwks()?)?;
        let authority = Authority::new("tests")?;
        let file = |name: &str| sandbox.policy_directory().join(name);
        let bundle = [authority.pem(), Authority::until("ends earlier", BUNDLE.0)?.pem()].concat();
        fs::write(file("ca.crt"), bundle)?;
        fs::write(file("ca.crl"), authority.list_until(&[], LIST.0)?)?;
        fs::write(file("secret"), SECRET)?;
        authority.issue(sandbox.directory(), "listener", vec![rcgen::SanType::DnsName(NAME.try_into()?)])?;
        let file = |name: &str| sandbox.directory().join(name);
        sandbox.add_settings(&format!(
            "control.listen = {LISTENER:?}\ncontrol.certificate = {:?}\ncontrol.key = {:?}\n",
            file("listener.pem"),
            file("listener.key"),
        ))?;
        sandbox.write_policy(&policy(server.port))?;
        let daemon = Daemon::start_inside(&sandbox)?;
        wait_until("the control process", || Ok(daemon.status()?.control_ready)).with_context(|| daemon.log())?;
        let echo = sandbox.spawn("/servers", &["serve-tcp", "127.0.0.1:7101"])?;
        Ok(Self { sandbox, daemon, issuer, authority, server, _echo: echo })
    }

    fn file(&self, text: &str) -> Result<String> {
        let path = self.sandbox.directory().join(format!("file-{:x}", rand::random::<u64>()));
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    }

    /// Shows proofs, and compares what comes of it: a reason, or nothing if there is to be a grant.
    fn shows(&self, cgroup: &str, rule: &str, proofs: &[&str], reason: &str) -> Result<Value> {
        let outcome = self.sandbox.authd_in(cgroup, &[&["grant", "--json", "--rule", rule], proofs].concat())?;
        let answer: Value = serde_json::from_str(outcome.detail.trim())
            .with_context(|| format!("{outcome:?}\n{}", self.daemon.log()))?;
        let found = answer["reason"].as_str().unwrap_or_default();
        ensure!(found == reason, "{reason} was expected of {rule} {proofs:?}: {answer}\n{}", self.daemon.log());
        Ok(answer)
    }

    fn shows_token(&self, rule: &str, token: &str, reason: &str) -> Result<Value> {
        let file = self.file(token)?;
        self.shows(ONE, rule, &["--token-file", &file], reason)
    }

    fn shows_certificate(&self, rule: &str, authority: &Authority, name: &str, reason: &str) -> Result<()> {
        authority.issue_spiffe(self.sandbox.directory(), name, &format!("spiffe://example.org/{name}"))?;
        let path = |end: &str| self.sandbox.directory().join(format!("{name}.{end}")).display().to_string();
        self.shows(ONE, rule, &["--cert", &path("pem"), "--key", &path("key")], reason).map(drop)
    }

    /// A connection to the listener that begins like this; its end, from the other side.
    fn connects(&self, bytes: &[u8]) -> Result<()> {
        let mut stream = self.sandbox.netns.within(|| Ok(TcpStream::connect(LISTENER)?))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(bytes)?;
        match stream.read_to_end(&mut Vec::new()) {
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Whether a handshake with the listener under a name comes to a good end.
    fn handshake(&self, name: &str) -> Result<bool> {
        let mut stream = self.sandbox.netns.within(|| Ok(TcpStream::connect(LISTENER)?))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let config = ClientConfig::builder().dangerous();
        let config = config.with_custom_certificate_verifier(Arc::new(authd::client::Local)).with_no_client_auth();
        let mut client = ClientConnection::new(Arc::new(config), ServerName::try_from(name.to_owned())?)?;
        let mut tls = rustls::Stream::new(&mut client, &mut stream);
        let request = format!("GET /v1/health HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n");
        let sent = tls.write_all(request.as_bytes());
        let mut answer = String::new();
        let _ = tls.read_to_string(&mut answer);
        Ok(sent.is_ok() && answer.starts_with("HTTP/1.1 200"))
    }

    fn revoke(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.daemon.command(&[&["revoke", "--json"], arguments].concat())?;
        ensure!(output.status.success(), "{output:?}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn text(&self) -> Result<String> {
        Ok(String::from_utf8(self.daemon.command(&["status", "--prometheus"])?.stdout)?)
    }

    /// All samples whose names begin with one of some texts.
    fn samples(&self, beginnings: &[&str]) -> Result<BTreeMap<String, String>> {
        let text = self.text()?;
        let is_meant = |line: &&str| beginnings.iter().any(|beginning| line.starts_with(beginning));
        let sample = |line: &str| line.rsplit_once(' ').map(|(name, value)| (name.to_owned(), value.to_owned()));
        Ok(text.lines().filter(is_meant).filter_map(sample).collect())
    }

    /// Waits until these samples, and no others of these names, are there: control tells of what it counts once a second.
    fn wait_for(&self, what: &str, beginnings: &[&str], expected: &[(&str, &str)]) -> Result<()> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let expected: BTreeMap<String, String> = expected.iter().map(owned).collect();
        let mut found = BTreeMap::new();
        wait_until(what, || {
            found = self.samples(beginnings)?;
            Ok(found == expected)
        })
        .with_context(|| {
            let other = |one: &BTreeMap<String, String>, two: &BTreeMap<String, String>| {
                one.iter().filter(|(name, value)| two.get(*name) != Some(value)).map(|s| format!("{s:?}")).collect()
            };
            let (missing, more): (Vec<String>, Vec<String>) = (other(&expected, &found), other(&found, &expected));
            format!("missing {missing:#?}\ninstead {more:#?}\n{}", self.daemon.log())
        })
    }
}

const COUNTED: [&str; 4] =
    ["authd_tls_handshakes_total", "authd_proof_checks_total", "authd_token_cache_hits_total", "authd_fetches_total"];
const MEASURED: [&str; 4] = [
    "authd_revocation_cut_seconds_count",
    "authd_revocation_cut_seconds_sum",
    "authd_revocation_seconds_count",
    "authd_revocation_seconds_sum",
];
const ENDS: [&str; 2] = ["authd_certificate_not_after_timestamp_seconds", "authd_crl_next_update_timestamp_seconds"];
const OF_AUTHORITY: &str = "authd_certificate_not_after_timestamp_seconds{certificate=\"authority\",authority=\"ca\"}";
const OF_LISTENER: &str = "authd_certificate_not_after_timestamp_seconds{certificate=\"listener\",authority=\"\"}";
const OF_LIST: &str = "authd_crl_next_update_timestamp_seconds{authority=\"ca\"}";

fn metrics_tell_what_became_of_callers() -> Result<Verdict> {
    let scene = Scene::new()?;
    scene.wait_for("ends", &ENDS, &[(OF_AUTHORITY, BUNDLE.1), (OF_LISTENER, LATE), (OF_LIST, LIST.1)])?;
    let mut secrets = vec![SECRET.to_owned()];

    // Handshakes on the listener; those on the Unix socket are the certificates below.
    ensure!(scene.handshake(NAME)?);
    ensure!(!scene.handshake("somebody-elses-name.example.org")?);
    scene.connects(b"GET / HTTP/1.1\r\nHost: a-callers-text\r\n\r\n")?;
    scene.connects(&[22])?;

    scene.shows_certificate("certificate", &scene.authority, "one", "")?;
    scene.shows_certificate("certificate", &Authority::new("stranger")?, "one", "unknown_issuer")?;
    // Which is found by dataplane.
    scene.shows_certificate("certificate", &scene.authority, "two", "certificate_not_allowed")?;
    // One proof is good, and the other one lacks.
    scene.shows_certificate("both", &scene.authority, "one", "authorization_missing")?;
    scene.shows(ONE, "certificate", &[], "certificate_missing")?;

    let good = scene.issuer.token(&json!({ "jti": "the-id-of-a-token" }))?;
    scene.shows_token("token", &good, "")?;
    scene.shows_token("token", &good, "")?;
    let (_, signature) = good.rsplit_once('.').context("a JWT")?;
    let forged = format!("{}.{signature}", scene.issuer.token(&json!({}))?.rsplit_once('.').context("a JWT")?.0);
    scene.shows_token("token", &forged, "signature_invalid")?;
    let over = scene.issuer.token(&json!({ "iat": 1_699_999_000, "exp": 1_700_000_000 }))?;
    scene.shows_token("token", &over, "token_expired")?;
    scene.shows_token("down", &good, "keys_unavailable")?;
    // The same token in a request that a proxy asks about.
    let request = format!(
        "GET /v1/forward-auth/nginx/forwarded HTTP/1.1\r\nHost: a\r\nX-Original-Method: GET\r\nX-Original-URI: /\r\n\
         Authorization: Bearer {good}\r\nConnection: close\r\n\r\n"
    );
    let socket = scene.sandbox.directory().join("workload.sock").display().to_string();
    let forwarded = scene.sandbox.probe("/proxies", &["say", &socket, &request])?;
    ensure!(forwarded.detail.starts_with("HTTP/1.1 200"), "{forwarded:?}");
    secrets.extend([good.clone(), signature.to_owned(), forged, over, "the-id-of-a-token".to_owned()]);

    // A DPoP proof: the first one lacks a nonce, and the second one comes with a token that is remembered.
    let key = rcgen::KeyPair::generate()?;
    let (x, y) = key.public_key_raw().get(1..65).context("a point")?.split_at(32);
    let jwk = json!({ "kty": "EC", "crv": "P-256", "x": base64url::encode(x), "y": base64url::encode(y) });
    let thumbprint = PublicKey::parse(jwk.as_object().context("an object")?)?.thumbprint;
    let bound = scene.issuer.token(&json!({ "cnf": { "jkt": base64url::encode(thumbprint) } }))?;
    let (file, key) = (scene.file(&bound)?, scene.file(&key.serialize_pem())?);
    let own = scene.shows(ONE, "token", &["--token-file", &file, "--dpop-key", &key], "")?;
    secrets.push(bound);

    let now = jiff::Timestamp::now().as_second();
    let active = json!({ "active": true, "sub": "one", "aud": "ledger", "exp": now + 600 }).to_string();
    for (token, status, body, reason) in [
        ("opaque-token-1", 200, active.as_str(), ""),
        ("opaque-token-2", 200, "{\"active\":false}", "token_inactive"),
        ("opaque-token-3", 200, "<html>", "introspection_malformed"),
        ("opaque-token-4", 500, "", "issuer_bad_status"),
    ] {
        scene.server.answers(status, body);
        scene.shows_token("asked", token, reason)?;
        secrets.push(token.to_owned());
    }

    let made = scene.daemon.command(&["key", "create", "--name", "k", "--workload", "one"])?;
    let made = String::from_utf8(made.stdout)?.trim().to_owned();
    let (file, cut) = (scene.file(&made)?, scene.file(&made[..made.len() - 1])?);
    scene.shows(ONE, "key", &["--api-key-file", &file], "")?;
    scene.shows(TWO, "key", &["--api-key-file", &file], "api_key_wrong_workload")?;
    scene.shows(ONE, "key", &["--api-key-file", &cut], "api_key_malformed")?;
    secrets.push(made.rsplit('_').next().context("a key has parts")?.to_owned());
    scene.shows(ONE, "a-rule-that-a-caller-invents", &[], "rule_unknown")?;

    // A grant that is given back is no revocation, and a revocation of what nothing rests on is not measured.
    let id = own["id"].as_str().with_context(|| own.to_string())?;
    let request = format!("DELETE /v1/grants/{id} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    let returned = scene.sandbox.probe(ONE, &["say", &socket, &request])?;
    ensure!(returned.detail.contains("204"), "{returned:?}");
    ensure!(scene.revoke(&["cert", &"00".repeat(32)])?["grants"] == 0);
    let nothing: Vec<(&str, &str)> = MEASURED.iter().map(|name| (*name, "0")).collect();
    scene.wait_for("no revocation", &MEASURED, &nothing)?;
    let mut held = scene.sandbox.spawn(ONE, &["hold-tcp", "127.0.0.1:7101"])?;
    ensure!(held.again()?.ok);
    let effect = scene.revoke(&["token", ISSUER, "the-id-of-a-token"])?;
    ensure!(effect["grants"].as_u64() >= Some(1) && effect["destroyed"] == 1, "{effect}");
    ensure!(!held.again()?.ok);
    let seconds =
        |name: &str| Ok::<_, anyhow::Error>((effect[name].as_u64().context("a number")? as f64 / 1e6).to_string());
    let (cut, closed) = (seconds("cut_microseconds")?, seconds("microseconds")?);
    let measured = [(MEASURED[0], "1"), (MEASURED[1], &cut), (MEASURED[2], "1"), (MEASURED[3], &closed)];
    scene.wait_for("one revocation", &MEASURED, &measured)?;
    let buckets = scene.samples(&["authd_revocation_cut_seconds_bucket", "authd_revocation_seconds_bucket"])?;
    ensure!(buckets.len() == 2 * 17 && buckets["authd_revocation_seconds_bucket{le=\"+Inf\"}"] == "1", "{buckets:?}");
    ensure!(buckets["authd_revocation_cut_seconds_bucket{le=\"1\"}"] == "1", "{buckets:?}");
    // Which dataplane knows, and control does not.
    scene.shows_token("token", &good, "token_revoked")?;

    let mut counted = vec![
        ("authd_tls_handshakes_total{result=\"ok\"}", "5"),
        ("authd_tls_handshakes_total{result=\"wrong_server_name\"}", "1"),
        ("authd_tls_handshakes_total{result=\"handshake_failed\"}", "1"),
        ("authd_tls_handshakes_total{result=\"handshake_timeout\"}", "1"),
        ("authd_proof_checks_total{proof=\"mtls\",result=\"accepted\"}", "2"),
        ("authd_proof_checks_total{proof=\"mtls\",result=\"unknown_issuer\"}", "1"),
        ("authd_proof_checks_total{proof=\"mtls\",result=\"certificate_not_allowed\"}", "1"),
        ("authd_proof_checks_total{proof=\"mtls\",result=\"certificate_missing\"}", "1"),
        ("authd_proof_checks_total{proof=\"token\",result=\"accepted\"}", "5"),
        ("authd_proof_checks_total{proof=\"token\",result=\"authorization_missing\"}", "1"),
        ("authd_proof_checks_total{proof=\"token\",result=\"signature_invalid\"}", "1"),
        ("authd_proof_checks_total{proof=\"token\",result=\"token_expired\"}", "1"),
        ("authd_proof_checks_total{proof=\"token\",result=\"keys_unavailable\"}", "1"),
        ("authd_proof_checks_total{proof=\"token\",result=\"token_inactive\"}", "1"),
        ("authd_proof_checks_total{proof=\"token\",result=\"introspection_malformed\"}", "1"),
        ("authd_proof_checks_total{proof=\"token\",result=\"issuer_bad_status\"}", "1"),
        ("authd_proof_checks_total{proof=\"token\",result=\"token_revoked\"}", "1"),
        ("authd_proof_checks_total{proof=\"dpop\",result=\"accepted\"}", "1"),
        ("authd_proof_checks_total{proof=\"dpop\",result=\"dpop_nonce_missing\"}", "1"),
        ("authd_proof_checks_total{proof=\"api-key\",result=\"accepted\"}", "1"),
        ("authd_proof_checks_total{proof=\"api-key\",result=\"api_key_wrong_workload\"}", "1"),
        ("authd_proof_checks_total{proof=\"api-key\",result=\"api_key_malformed\"}", "1"),
        ("authd_token_cache_hits_total", "2"),
        ("authd_fetches_total{issuer=\"published\",kind=\"jwks\",result=\"ok\"}", "1"),
        ("authd_fetches_total{issuer=\"asked\",kind=\"introspection\",result=\"ok\"}", "2"),
        ("authd_fetches_total{issuer=\"asked\",kind=\"introspection\",result=\"introspection_malformed\"}", "1"),
        ("authd_fetches_total{issuer=\"asked\",kind=\"introspection\",result=\"issuer_bad_status\"}", "1"),
    ];
    // How often nobody answered depends on the time that all of this takes. The policy without that issuer has no such sample.
    let down = "authd_fetches_total{issuer=\"down\",kind=\"jwks\",result=\"issuer_unreachable\"}";
    let times = scene.samples(&[down])?;
    ensure!(times.get(down).is_some_and(|times| times.parse().is_ok_and(|times: u32| times >= 1)), "{times:?}");
    let whole = policy(scene.server.port);
    let (before, rest) = whole.split_once("[[issuer]]\nname = \"down\"").context("the issuer")?;
    let (_, rest) = rest.split_once("allow_private = true\n").context("the end of the issuer")?;
    let (rest, _) = rest.split_once("\n[[service]]\nname = \"down\"").context("its service")?;
    scene.sandbox.write_policy(&format!("{before}{rest}"))?;
    scene.daemon.must_apply()?;
    scene.wait_for("all that happened", &COUNTED, &counted)?;

    // The sums outlive the process that counts. The next one fetches keys for itself.
    let child = scene.daemon.control_pid()?;
    kill(Pid::from_raw(child), Signal::SIGKILL)?;
    scene.daemon.wait_for("its end", |r| r.event == "control_ended")?;
    wait_until("another control process", || Ok(scene.daemon.status()?.control_ready))?;
    ensure!(scene.daemon.control_pid()? != child && scene.handshake(NAME)?);
    for (name, sum) in &mut counted {
        match *name {
            "authd_tls_handshakes_total{result=\"ok\"}" => *sum = "6",
            "authd_fetches_total{issuer=\"published\",kind=\"jwks\",result=\"ok\"}" => *sum = "2",
            _ => {}
        }
    }
    scene.wait_for("the sums", &COUNTED, &counted)?;

    // Files that change, and one that cannot be read any more.
    let ca = scene.sandbox.policy_directory().join("ca.crt");
    fs::write(&ca, scene.authority.pem())?;
    scene.wait_for("a newer end", &ENDS, &[(OF_AUTHORITY, LATE), (OF_LISTENER, LATE), (OF_LIST, LIST.1)])?;
    fs::write(&ca, "nothing")?;
    scene.wait_for("no end", &ENDS, &[(OF_LISTENER, LATE)])?;

    // Nothing of what callers showed or said, wherever metrics are.
    let file = scene.sandbox.directory().join("metrics.prom");
    wait_until("the file", || Ok(fs::read_to_string(&file).is_ok_and(|text| text.contains("authd_fetches_total{"))))?;
    let json = String::from_utf8(scene.daemon.command(&["status", "--json"])?.stdout)?;
    secrets.extend(["somebody-elses-name", "a-callers-text", "a-rule-that-a-caller-invents"].map(str::to_owned));
    for text in [scene.text()?, fs::read_to_string(file)?, json] {
        for secret in &secrets {
            ensure!(!text.contains(secret.as_str()), "{secret} is in {text}");
        }
    }
    Ok(Verdict::Ran)
}
