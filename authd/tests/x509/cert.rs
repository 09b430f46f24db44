//! `authd cert`: one line of JSON and an exit code, by the daemon's own checks.

use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
};

use super::pki::{Make, NOW, Pki};
use serde_json::{Value, json};

const POLICY: &str = r#"trust_domain = "example.org"
[[authority]]
name = "corp"
bundle = "../root.pem"
trust_domain = "example.org"
crl_files = ["../int.crl"]
[[authority]]
name = "strict"
bundle = "../other.pem"
trust_domain = "example.org"
crl_files = ["../int.crl"]
crl = "required"
"#;

fn prepared() -> Pki {
    let pki = Pki::new();
    pki.make(Make::default());
    pki.make(Make { name: "other", subject: "/CN=Other", ..Make::default() });
    pki.make(Make { name: "int", subject: "/CN=Int", issuer: Some("root"), ..Make::default() });
    for name in ["web", "gone"] {
        pki.leaf(name, "int", &format!("URI:spiffe://example.org/{name}"));
        fs::write(pki.path(&format!("{name}.chain")), pki.join(&[&format!("{name}.pem"), "int.pem"])).unwrap();
    }
    pki.leaf("strict", "other", "DNS:strict.example.org");
    pki.revoke("int", "gone");
    pki.list("int", "int.crl", "20260601000000Z", "20260701000000Z");
    fs::create_dir(pki.path("policy.d")).unwrap();
    fs::write(pki.path("policy.d/p.toml"), POLICY).unwrap();
    pki
}

/// Runs `authd cert` in the directory. Returns exit code, standard output and error.
fn cert(pki: &Pki, arguments: &[&str], input: &[u8]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_authd"));
    command.env_remove("AUTHD_CONFIG").current_dir(pki.path(".")).arg("cert").args(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A command that does not read its input has ended already.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[track_caller]
fn verify(pki: &Pki, arguments: &[&str]) -> (Option<i32>, Value) {
    let (code, out, err) = cert(pki, &[&["verify", "--at", NOW], arguments].concat(), b"");
    assert_eq!(out.lines().count(), 1, "{out}{err}");
    (code, serde_json::from_str(&out).unwrap())
}

#[track_caller]
fn refused(pki: &Pki, arguments: &[&str]) -> String {
    let (code, answer) = verify(pki, arguments);
    assert_eq!((code, &answer["accepted"], &answer["principal"]), (Some(1), &json!(false), &Value::Null), "{answer}");
    assert!(answer["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{answer}");
    answer["reason"].as_str().unwrap().to_owned()
}

#[test]
fn an_accepted_chain_is_named_by_the_policys_authority() {
    let pki = prepared();
    let (code, answer) = verify(&pki, &["--policy", "policy.d", "web.chain"]);
    assert_eq!((code, &answer["accepted"], &answer["reason"]), (Some(0), &json!(true), &Value::Null), "{answer}");
    let principal = &answer["principal"];
    assert_eq!(principal["authority"], "corp");
    assert_eq!(principal["spiffe_id"], "spiffe://example.org/web");
    assert_eq!(principal["subject"], "CN=web,O=Example");
    assert_eq!(principal["not_after"], "2027-01-01T00:00:00Z");
    assert_eq!(principal["fingerprint"].as_str().unwrap().len(), 64);
    let (code, ..) = cert(&pki, &["verify", "--at", NOW, "--policy", "policy.d", "-"], &pki.read("web.chain"));
    assert_eq!(code, Some(0), "from stdin");
}

#[test]
fn each_refusal_has_its_reason() {
    let pki = prepared();
    let policy = ["--policy", "policy.d"];
    let with = |more: &[&str]| refused(&pki, &[&policy, more].concat());
    assert_eq!(with(&["gone.chain"]), "certificate_revoked");
    assert_eq!(with(&["web.pem"]), "unknown_issuer");
    assert_eq!(with(&["--authority", "strict", "web.chain"]), "unknown_issuer");
    assert_eq!(with(&["--authority", "strict", "strict.pem"]), "crl_missing");
    assert_eq!(with(&["--require-crl", "web.chain"]), "crl_missing");
    assert_eq!(with(&["no-such-file"]), "unreadable_file");
    assert_eq!(with(&["web.key"]), "no_certificate");
    let bundle = ["--bundle", "root.pem", "web.chain"];
    assert_eq!(refused(&pki, &[&["--crl", "no-such-file"], &bundle[..]].concat()), "unreadable_file");
    assert_eq!(refused(&pki, &[&["--crl", "root.pem"], &bundle[..]].concat()), "no_crl");
    assert_eq!(refused(&pki, &["--bundle", "web.pem", "web.chain"]), "anchor_not_ca");
    assert_eq!(refused(&pki, &["--bundle", "other.pem", "web.chain"]), "unknown_issuer");
    let at = |time: &str| {
        let (code, out, _) = cert(&pki, &[&["verify", "--at", time], &bundle[..]].concat(), b"");
        (code, serde_json::from_str::<Value>(&out).unwrap()["reason"].clone())
    };
    assert_eq!(at("2030-01-01T00:00:00Z"), (Some(1), json!("certificate_expired")));
    assert_eq!(at("2020-01-01T00:00:00Z"), (Some(1), json!("certificate_not_yet_valid")));
}

#[test]
fn a_bundle_by_hand_speaks_for_the_leafs_trust_domain_unless_told_otherwise() {
    let pki = prepared();
    let (code, answer) = verify(&pki, &["--bundle", "root.pem", "web.chain"]);
    assert_eq!((code, &answer["principal"]["authority"]), (Some(0), &json!("bundle")), "{answer}");
    assert_eq!(
        refused(&pki, &["--bundle", "root.pem", "--trust-domain", "example.com", "web.chain"]),
        "wrong_trust_domain"
    );
    // In place of an authority's own bundle, with all else that is said of it.
    let (code, answer) =
        verify(&pki, &["--policy", "policy.d", "--authority", "corp", "--bundle", "int.pem", "web.pem"]);
    assert_eq!((code, &answer["principal"]["authority"]), (Some(0), &json!("corp")), "{answer}");
}

#[test]
fn lists_and_usage_by_hand_are_kept() {
    let pki = prepared();
    assert_eq!(verify(&pki, &["--bundle", "root.pem", "gone.chain"]).0, Some(0));
    assert_eq!(refused(&pki, &["--bundle", "root.pem", "--crl", "int.crl", "gone.chain"]), "certificate_revoked");
    pki.list("int", "old.crl", "20260501000000Z", "20260601000000Z");
    assert_eq!(refused(&pki, &["--bundle", "root.pem", "--crl", "old.crl", "web.chain"]), "crl_expired");
    let extensions = "basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth";
    pki.make(Make { name: "server", subject: "/CN=s", issuer: Some("root"), extensions, ..Make::default() });
    assert_eq!(refused(&pki, &["--bundle", "root.pem", "server.pem"]), "wrong_key_usage");
    assert_eq!(verify(&pki, &["--bundle", "root.pem", "--usage", "server", "server.pem"]).0, Some(0));
}

#[test]
fn questions_that_cannot_be_answered_have_other_exit_codes() {
    let pki = prepared();
    let ask = |arguments: &[&str]| {
        let (code, out, err) = cert(&pki, &[&["verify"], arguments].concat(), b"");
        assert!(out.is_empty() && !err.is_empty(), "{out}{err}");
        code
    };
    assert_eq!(ask(&["--at", "noon", "web.chain"]), Some(2));
    assert_eq!(ask(&["--trust-domain", "example.org", "web.chain"]), Some(2));
    assert_eq!(ask(&["--policy", "policy.d", "--authority", "nobody", "web.chain"]), Some(1));
    fs::write(pki.path("policy.d/q.toml"), "trust_domain = \"example.com\"\n").unwrap();
    assert_eq!(ask(&["--policy", "policy.d", "web.chain"]), Some(64));
    fs::remove_file(pki.path("policy.d/q.toml")).unwrap();
    fs::write(pki.path("policy.d/p.toml"), "trust_domain = \"example.com\"\n").unwrap();
    assert_eq!(ask(&["--policy", "policy.d", "web.chain"]), Some(1), "a policy without authorities");
}

#[test]
fn inspect_shows_what_each_certificate_says() {
    let pki = prepared();
    let (code, out, _) = cert(&pki, &["inspect", "web.chain"], b"");
    assert_eq!(code, Some(0));
    for expected in [
        "subject     CN=web,O=Example",
        "issuer      CN=Int",
        "uris        spiffe://example.org/web",
        "kind        a leaf",
        "kind        a CA",
        "key usage   keyCertSign, cRLSign",
        "valid to    2027-01-01T00:00:00Z",
    ] {
        assert!(out.contains(expected), "{expected:?} in\n{out}");
    }
    let (code, _, err) = cert(&pki, &["inspect", "-"], b"nothing");
    assert!(code == Some(1) && err.contains("no certificate"), "{err}");
}
