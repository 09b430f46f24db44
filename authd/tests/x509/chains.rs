//! Certificates that OpenSSL made, judged by us: each way to be wrong has its own reason.

use std::sync::LazyLock;

use super::{
    lists::listed,
    pki::{CA, LEAF, Make, NOW, Pki, raw_name},
};
use authd::proofs::x509::{
    bundle::{self, Authority},
    chain::{self, ChainError, Usage, verify_by_any},
    crl::{self, CrlPolicy, NothingRevoked},
    identity::VerifiedCertificate,
    leaf::{Leaf, hex},
};
use jiff::Timestamp;
use proptest::prelude::*;
use rustls::pki_types::CertificateDer;

pub const WEB: &str = "URI:spiffe://example.org/web,DNS:web.example.org";

/// Root, one CA below it, one leaf. Never changed.
pub static BASE: LazyLock<Pki> = LazyLock::new(base);

pub fn base() -> Pki {
    let pki = Pki::new();
    pki.make(Make::default());
    pki.make(Make {
        name: "int",
        subject: "/O=Example/CN=Int",
        issuer: Some("root"),
        key: "ec:P-384",
        ..Make::default()
    });
    pki.leaf("web", "int", WEB);
    pki
}

pub fn now() -> Timestamp {
    NOW.parse().unwrap()
}

/// The authority `corp` for `example.org`, with this bundle.
pub fn corp(pki: &Pki, bundle: &str) -> Authority {
    with_lists(pki, bundle, &[], CrlPolicy::IfPresent)
}

pub fn with_lists(pki: &Pki, bundle: &str, lists: &[&str], policy: CrlPolicy) -> Authority {
    let anchors = bundle::read(&pki.read(bundle)).unwrap();
    let lists = lists.iter().flat_map(|file| crl::read(&pki.read(file)).unwrap()).collect();
    Authority::new("corp", anchors, Some("example.org".parse().unwrap()), lists, policy)
}

pub fn chain(pki: &Pki, files: &[&str]) -> Vec<CertificateDer<'static>> {
    chain::read(&pki.join(files)).unwrap()
}

pub fn judge(authority: &Authority, chain: &[CertificateDer<'_>]) -> Result<VerifiedCertificate, ChainError> {
    authority.verify(chain, Usage::Client, now(), &NothingRevoked)
}

/// The reason why a chain is refused by an authority of the root.
#[track_caller]
pub fn refusal(pki: &Pki, files: &[&str]) -> &'static str {
    reason(judge(&corp(pki, "root.pem"), &chain(pki, files)))
}

#[track_caller]
pub fn reason(verdict: Result<VerifiedCertificate, ChainError>) -> &'static str {
    match verdict {
        Ok(verified) => panic!("accepted: {verified:?}"),
        Err(error) => error.reason(),
    }
}

/// A leaf of the root in a PKI of its own, with one thing about it changed.
#[track_caller]
fn odd_leaf(change: impl for<'a> FnOnce(Make<'a>) -> Make<'a>, extensions: &str) -> &'static str {
    let pki = Pki::new();
    pki.make(Make::default());
    let make = Make { name: "leaf", subject: "/CN=leaf", issuer: Some("root"), extensions, ..Make::default() };
    pki.make(change(make));
    refusal(&pki, &["leaf.pem"])
}

fn same(make: Make<'_>) -> Make<'_> {
    make
}

#[test]
fn a_good_chain_says_who_it_is_as_openssl_says_it() {
    let pki = &*BASE;
    let verified = judge(&corp(pki, "root.pem"), &chain(pki, &["web.pem", "int.pem"])).unwrap();
    assert_eq!(verified.authority, "corp");
    assert_eq!(verified.spiffe_id.as_ref().unwrap().as_str(), "spiffe://example.org/web");
    assert_eq!(verified.dns_names, ["web.example.org"]);
    let shown = |arguments: &[&str]| {
        let text = pki.openssl(&[&["x509", "-noout", "-in", "web.pem"], arguments].concat());
        text.trim().split_once('=').unwrap().1.to_owned()
    };
    assert_eq!(verified.serial, shown(&["-serial"]).to_ascii_lowercase());
    let fingerprint = shown(&["-fingerprint", "-sha256"]).replace(':', "").to_ascii_lowercase();
    assert_eq!(hex(&verified.fingerprint), fingerprint);
    assert_eq!(verified.subject, shown(&["-subject", "-nameopt", "RFC2253,-esc_msb,utf8"]));
    assert_eq!(verified.issuer, "CN=Int,O=Example");
    pki.openssl(&["pkey", "-in", "web.key", "-pubout", "-outform", "DER", "-out", "web.spki"]);
    let digest = pki.openssl(&["dgst", "-sha256", "-r", "web.spki"]);
    assert_eq!(hex(&verified.key_hash), digest.split(' ').next().unwrap());
    assert_eq!(verified.not_after, "2027-01-01T00:00:00Z".parse().unwrap());
    let issuers: Vec<&str> = verified.issuers.iter().map(|issuer| issuer.issuer.as_str()).collect();
    assert_eq!(issuers, ["CN=Root,O=Example", "CN=Root,O=Example"], "the CA and the anchor, by their issuers");
}

#[test]
fn subjects_are_written_as_openssl_writes_them() {
    let pki = Pki::new();
    pki.make(Make::default());
    for (index, subject) in [
        "/C=DE/ST=Hessen/L=Frankfurt/O=A, B + C/OU=x=y/CN=\"q\" <a;b>",
        "/DC=org/DC=example/UID=u1/CN= edges ",
        "/CN=#hash/serialNumber=12/emailAddress=a@example.org",
        "/O=back\\\\slash/CN=M\u{fc}ller",
        "/O=multi/CN=a+OU=b",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("leaf{index}");
        pki.make(Make { name: &name, subject, issuer: Some("root"), extensions: LEAF, ..Make::default() });
        let file = format!("{name}.pem");
        let shown = pki.openssl(&["x509", "-noout", "-in", &file, "-subject", "-nameopt", "RFC2253,-esc_msb,utf8"]);
        let expected = shown.trim_end_matches('\n').strip_prefix("subject=").unwrap();
        let verified = judge(&corp(&pki, "root.pem"), &chain(&pki, &[&file])).unwrap();
        assert_eq!(verified.subject, expected);
    }
}

#[test]
fn order_does_not_matter_and_what_is_not_needed_is_passed_over() {
    let pki = base();
    pki.make(Make { name: "other", subject: "/CN=Other", ..Make::default() });
    let authority = corp(&pki, "root.pem");
    for files in [&["web.pem", "root.pem", "int.pem"][..], &["web.pem", "other.pem", "int.pem", "int.pem", "root.pem"]]
    {
        assert!(judge(&authority, &chain(&pki, files)).is_ok(), "{files:?}");
    }
}

#[test]
fn every_accepted_kind_of_key_signs_and_is_certified() {
    let pki = Pki::new();
    for (index, key) in ["rsa:2048", "ec:P-256", "ec:P-384", "ec:P-521", "ed25519"].into_iter().enumerate() {
        let (root, leaf) = (format!("root{index}"), format!("leaf{index}"));
        pki.make(Make { name: &root, key, ..Make::default() });
        let extensions = format!("{LEAF}\nsubjectAltName={WEB}");
        pki.make(Make {
            name: &leaf,
            subject: "/",
            issuer: Some(&root),
            key,
            extensions: &extensions,
            ..Make::default()
        });
        let verdict = judge(&corp(&pki, &format!("{root}.pem")), &chain(&pki, &[&format!("{leaf}.pem")]));
        assert!(verdict.is_ok(), "{key}: {verdict:?}");
    }
}

#[test]
fn weak_keys_and_signatures_are_refused() {
    assert_eq!(odd_leaf(|make| Make { key: "rsa:1024", ..make }, LEAF), "weak_key");
    assert_eq!(odd_leaf(|make| Make { digest: "sha1", ..make }, LEAF), "weak_key");
    let pki = Pki::new();
    pki.make(Make { key: "rsa:2048", ..Make::default() });
    pki.make(Make { name: "int", subject: "/CN=Int", issuer: Some("root"), key: "rsa:1024", ..Make::default() });
    pki.leaf("web", "int", WEB);
    pki.make(Make {
        name: "sha1",
        subject: "/CN=sha1",
        issuer: Some("root"),
        extensions: LEAF,
        digest: "sha1",
        ..Make::default()
    });
    assert_eq!(refusal(&pki, &["web.pem", "int.pem"]), "weak_key");
    assert_eq!(refusal(&pki, &["sha1.pem"]), "weak_key");
}

#[test]
fn keys_of_other_kinds_are_refused() {
    assert_eq!(odd_leaf(|make| Make { key: "ec:secp256k1", ..make }, LEAF), "unsupported_key");
    assert_eq!(odd_leaf(|make| Make { key: "ec:P-224", ..make }, LEAF), "unsupported_key");
}

#[test]
fn a_signature_of_a_kind_that_is_not_accepted_is_refused() {
    assert_eq!(odd_leaf(|make| Make { digest: "sha3-256", ..make }, LEAF), "unsupported_algorithm");
}

#[test]
fn times_are_kept_to_the_second() {
    let pki = &*BASE;
    let (authority, chain) = (corp(pki, "root.pem"), chain(pki, &["web.pem", "int.pem"]));
    let at = |time: &str| authority.verify(&chain, Usage::Client, time.parse().unwrap(), &NothingRevoked);
    assert!(at("2026-01-01T00:00:00Z").is_ok() && at("2027-01-01T00:00:00.9Z").is_ok());
    assert_eq!(at("2025-12-31T23:59:59Z").unwrap_err().reason(), "certificate_not_yet_valid");
    assert_eq!(at("2027-01-01T00:00:01Z").unwrap_err().reason(), "certificate_expired");
    assert_eq!(at("1960-01-01T00:00:00Z").unwrap_err().reason(), "certificate_not_yet_valid");
    assert_eq!(at("9999-12-30T00:00:00Z").unwrap_err().reason(), "certificate_expired");
}

#[test]
fn a_chain_is_valid_until_its_first_certificate_ends() {
    let pki = Pki::new();
    pki.make(Make::default());
    pki.make(Make { name: "int", subject: "/CN=Int", issuer: Some("root"), to: "20260801000000Z", ..Make::default() });
    pki.leaf("web", "int", WEB);
    let (authority, chain) = (corp(&pki, "root.pem"), chain(&pki, &["web.pem", "int.pem"]));
    let verified = judge(&authority, &chain).unwrap();
    assert_eq!(verified.valid_until, "2026-08-01T00:00:00Z".parse().unwrap());
    assert_eq!(verified.not_after, "2027-01-01T00:00:00Z".parse().unwrap());
    let later = authority.verify(&chain, Usage::Client, "2026-09-01T00:00:00Z".parse().unwrap(), &NothingRevoked);
    assert_eq!(reason(later), "certificate_expired");
}

#[test]
fn an_anchor_counts_only_while_it_is_valid() {
    for (from, to, expected) in [
        ("20200101000000Z", "20260601000000Z", "anchor_expired"),
        ("20260701000000Z", "20280101000000Z", "anchor_not_yet_valid"),
    ] {
        let pki = Pki::new();
        pki.make(Make { from, to, ..Make::default() });
        pki.leaf("web", "root", WEB);
        assert_eq!(refusal(&pki, &["web.pem"]), expected);
        // The CA renewed its certificate: the same name and key.
        pki.make(Make { name: "renewed", key: "root", ..Make::default() });
        std::fs::write(pki.path("both.pem"), pki.join(&["root.pem", "renewed.pem"])).unwrap();
        assert!(judge(&corp(&pki, "both.pem"), &chain(&pki, &["web.pem"])).is_ok());
    }
}

#[test]
fn strangers_are_refused() {
    let pki = base();
    assert_eq!(refusal(&pki, &["web.pem"]), "unknown_issuer", "without the CA between");
    pki.make(Make { name: "evil", ..Make::default() });
    pki.leaf("forged", "evil", WEB);
    assert_eq!(refusal(&pki, &["forged.pem"]), "bad_signature", "the name of the root, the key of another");
    pki.make(Make { name: "edwards", key: "ed25519", ..Make::default() });
    pki.leaf("forged2", "edwards", WEB);
    assert_eq!(refusal(&pki, &["forged2.pem"]), "bad_signature", "the name of the root, a key of another kind");
    pki.make(Make { name: "other", subject: "/CN=Other", ..Make::default() });
    pki.leaf("stranger", "other", WEB);
    assert_eq!(refusal(&pki, &["stranger.pem", "other.pem"]), "unknown_issuer", "a root that is only shown");
}

#[test]
fn a_certificate_that_signs_itself_has_no_issuer() {
    let pki = Pki::new();
    pki.make(Make::default());
    let extensions = format!("{LEAF}\nsubjectAltName={WEB}");
    pki.make(Make { name: "own", subject: "/CN=own", extensions: &extensions, ..Make::default() });
    assert_eq!(refusal(&pki, &["own.pem"]), "unknown_issuer");
    let refused = bundle::read(&pki.read("own.pem")).unwrap_err();
    assert_eq!(refused.reason(), "anchor_not_ca", "and cannot be pinned");
}

#[test]
fn a_ca_is_no_leaf() {
    let pki = &*BASE;
    assert_eq!(refusal(pki, &["int.pem"]), "ca_as_leaf");
    assert_eq!(refusal(pki, &["root.pem"]), "ca_as_leaf");
}

#[test]
fn only_cas_vouch() {
    let pki = base();
    pki.leaf("below", "web", WEB);
    assert_eq!(refusal(&pki, &["below.pem", "web.pem", "int.pem"]), "issuer_not_ca", "a leaf signed it");
    let extensions = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,cRLSign";
    pki.make(Make { name: "mute", subject: "/CN=Mute", issuer: Some("root"), extensions, ..Make::default() });
    pki.leaf("spoken", "mute", WEB);
    assert_eq!(refusal(&pki, &["spoken.pem", "mute.pem"]), "issuer_not_ca", "a CA without keyCertSign signed it");
}

#[test]
fn path_lengths_are_kept() {
    let short = format!("{},pathlen:0\nkeyUsage=critical,keyCertSign", "basicConstraints=critical,CA:TRUE");
    let pki = Pki::new();
    pki.make(Make::default());
    pki.make(Make { name: "a", subject: "/CN=A", issuer: Some("root"), extensions: &short, ..Make::default() });
    pki.make(Make { name: "b", subject: "/CN=B", issuer: Some("a"), ..Make::default() });
    pki.leaf("near", "a", WEB);
    pki.leaf("far", "b", WEB);
    assert!(judge(&corp(&pki, "root.pem"), &chain(&pki, &["near.pem", "a.pem"])).is_ok());
    assert_eq!(refusal(&pki, &["far.pem", "b.pem", "a.pem"]), "path_too_long");
    // The same of an anchor, of which webpki does not ask it.
    assert_eq!(reason(judge(&corp(&pki, "a.pem"), &chain(&pki, &["far.pem", "b.pem"]))), "path_too_long");
    assert!(judge(&corp(&pki, "a.pem"), &chain(&pki, &["near.pem"])).is_ok());
}

#[test]
fn name_constraints_are_kept() {
    for (constraints, good, bad) in [
        ("permitted;DNS:example.org", "DNS:a.example.org", "DNS:a.example.com"),
        ("excluded;DNS:bad.example.org", "DNS:good.example.org", "DNS:a.bad.example.org"),
        // URIs' constraints are not computed: whoever has one vouches for no URI.
        ("permitted;URI:example.org", "DNS:a.example.org", "URI:spiffe://example.org/web"),
        ("excluded;URI:example.com", "DNS:a.example.org", "URI:spiffe://example.org/web"),
        ("permitted;IP:10.0.0.0/255.0.0.0", "IP:10.1.2.3", "IP:192.0.2.1"),
    ] {
        let pki = Pki::new();
        let extensions = format!("{CA}\nnameConstraints=critical,{constraints}");
        pki.make(Make::default());
        pki.make(Make {
            name: "int",
            subject: "/CN=Int",
            issuer: Some("root"),
            extensions: &extensions,
            ..Make::default()
        });
        pki.leaf("good", "int", good);
        pki.leaf("bad", "int", bad);
        let verdict = judge(&corp(&pki, "root.pem"), &chain(&pki, &["good.pem", "int.pem"]));
        assert!(verdict.is_ok(), "{constraints} {good}: {verdict:?}");
        assert_eq!(refusal(&pki, &["bad.pem", "int.pem"]), "name_constraint", "{constraints} {bad}");
        // As the anchor's own.
        assert_eq!(reason(judge(&corp(&pki, "int.pem"), &chain(&pki, &["bad.pem"]))), "name_constraint");
    }
}

#[test]
fn certificates_serve_their_purpose_only() {
    let leaf = |usage: &str| format!("basicConstraints=critical,CA:FALSE\n{usage}");
    let pki = Pki::new();
    pki.make(Make::default());
    for (name, purpose) in [("client", "clientAuth"), ("server", "serverAuth"), ("mail", "emailProtection")] {
        let extensions = leaf(&format!("extendedKeyUsage={purpose}"));
        pki.make(Make { name, subject: "/CN=x", issuer: Some("root"), extensions: &extensions, ..Make::default() });
    }
    let authority = corp(&pki, "root.pem");
    let verdict = |file: &str, usage| authority.verify(&chain(&pki, &[file]), usage, now(), &NothingRevoked);
    assert!(verdict("client.pem", Usage::Client).is_ok() && verdict("server.pem", Usage::Server).is_ok());
    for (file, usage) in [("server.pem", Usage::Client), ("client.pem", Usage::Server), ("mail.pem", Usage::Client)] {
        assert_eq!(reason(verdict(file, usage)), "wrong_key_usage", "{file}");
    }
    assert_eq!(odd_leaf(same, &leaf("keyUsage=critical,keyEncipherment")), "wrong_key_usage");
    // A CA that is for servers vouches for no client.
    let extensions = format!("{CA}\nextendedKeyUsage=serverAuth");
    pki.make(Make {
        name: "web-ca",
        subject: "/CN=Web",
        issuer: Some("root"),
        extensions: &extensions,
        ..Make::default()
    });
    pki.leaf("below", "web-ca", WEB);
    assert_eq!(refusal(&pki, &["below.pem", "web-ca.pem"]), "wrong_key_usage");
}

#[test]
fn unknown_critical_extensions_are_refused() {
    assert_eq!(odd_leaf(same, &format!("{LEAF}\n1.2.3.4=critical,ASN1:NULL")), "unsupported_extension");
}

#[test]
fn the_rules_of_spiffe_are_kept() {
    for (names, expected) in [
        ("URI:spiffe://example.org/a,URI:spiffe://example.org/b", "many_uris"),
        ("URI:https://example.org/,URI:spiffe://example.org/b", "many_uris"),
        ("URI:spiffe://example.com/web", "wrong_trust_domain"),
        ("URI:spiffe://sub.example.org/web", "wrong_trust_domain"),
        ("URI:spiffe://example.org", "bad_spiffe_id"),
        ("URI:spiffe://example.org/", "bad_spiffe_id"),
        ("URI:SPIFFE://example.org/web", "bad_spiffe_id"),
        ("URI:spiffe://example.org:443/web", "bad_spiffe_id"),
        ("URI:spiffe://Example.org/web", "bad_spiffe_id"),
        ("URI:spiffe://example.org/../web", "bad_spiffe_id"),
        ("URI:spiffe://example.org/web?x", "bad_spiffe_id"),
    ] {
        assert_eq!(odd_leaf(same, &format!("{LEAF}\nsubjectAltName={names}")), expected, "{names}");
    }
    for usage in ["digitalSignature,keyCertSign", "digitalSignature,cRLSign"] {
        let extensions = format!("basicConstraints=CA:FALSE\nkeyUsage={usage}\nsubjectAltName={WEB}");
        assert_eq!(odd_leaf(same, &extensions), "wrong_key_usage", "{usage}");
    }
    let pki = &*BASE;
    let anchors = bundle::read(&pki.read("root.pem")).unwrap();
    let mute = Authority::new("mute", anchors, None, Vec::new(), CrlPolicy::IfPresent);
    assert_eq!(reason(judge(&mute, &chain(pki, &["web.pem", "int.pem"]))), "wrong_trust_domain");
}

#[test]
fn other_uris_name_nobody_and_do_no_harm() {
    let pki = Pki::new();
    pki.make(Make::default());
    pki.leaf(
        "web",
        "root",
        "URI:https://example.org/a,URI:urn:b,DNS:*.example.org,DNS:Web.Example.ORG,IP:10.0.0.1,email:a@b",
    );
    let verified = judge(&corp(&pki, "root.pem"), &chain(&pki, &["web.pem"])).unwrap();
    assert_eq!((verified.spiffe_id, verified.dns_names), (None, vec!["web.example.org".to_owned()]));
}

#[test]
fn names_with_two_readings_are_refused() {
    for (tag, name) in [
        (2, &b"web.example.org\0.evil.example"[..]),
        (2, b"web.example.org\0"),
        (2, "b\u{e4}r.example.org".as_bytes()),
        (2, b"b\xe4r.example.org"),
        (2, b"a b"),
        (2, b""),
        (6, b"spiffe://example.org/web\0/x"),
        (6, b"spiffe://example.org/\xff"),
        (6, b"spiffe://example.org/web\n"),
    ] {
        let extensions = format!("{LEAF}\nsubjectAltName={}", raw_name(tag, name));
        assert_eq!(odd_leaf(same, &extensions), "malformed_name", "{:?}", String::from_utf8_lossy(name));
    }
}

#[test]
fn a_subject_can_forge_no_other_subject() {
    let pki = Pki::new();
    pki.make(Make::default());
    let subject = "/O=Example/CN=x,O=Other";
    pki.make(Make { name: "sly", subject, issuer: Some("root"), extensions: LEAF, ..Make::default() });
    let verified = judge(&corp(&pki, "root.pem"), &chain(&pki, &["sly.pem"])).unwrap();
    assert!(verified.has_subject("CN=x\\,O=Other,O=Example") && !verified.has_subject("CN=x,O=Other,O=Example"));
}

#[test]
fn limits_come_before_everything() {
    let pki = &*BASE;
    assert_eq!(chain::read(&pki.join(&["int.pem"; 9])).unwrap_err().reason(), "chain_too_long");
    let many = vec![chain(pki, &["int.pem"]).remove(0); 9];
    assert_eq!(reason(judge(&corp(pki, "root.pem"), &many)), "chain_too_long");
    assert!(judge(&corp(pki, "root.pem"), &chain(pki, &[&["web.pem"][..], &["int.pem"; 7]].concat())).is_ok());
    let large = vec![CertificateDer::from(vec![0x30; 60_000]), CertificateDer::from(vec![0x30; 6_000])];
    assert_eq!(reason(judge(&corp(pki, "root.pem"), &large)), "chain_too_large");
    assert_eq!(reason(judge(&corp(pki, "root.pem"), &[])), "no_certificate");
    assert_eq!(chain::read(b"").unwrap_err().reason(), "no_certificate");
    assert_eq!(chain::read(&vec![b'a'; 300_000]).unwrap_err().reason(), "chain_too_large");
    let garbage = chain::read(b"-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n");
    assert_eq!(garbage.unwrap_err().reason(), "malformed_certificate");
    assert_eq!(reason(judge(&corp(pki, "root.pem"), &[CertificateDer::from(vec![0x30, 0])])), "malformed_certificate");
    let mut longer = chain(pki, &["web.pem", "int.pem"]);
    longer[0] = CertificateDer::from([longer[0].as_ref(), b"\0"].concat());
    assert_eq!(reason(judge(&corp(pki, "root.pem"), &longer)), "malformed_certificate", "something follows it");
}

#[test]
fn cas_that_vouch_for_each_other_vouch_for_nobody() {
    let pki = Pki::new();
    for name in ["a", "b"] {
        pki.make(Make { name, subject: &format!("/CN={name}"), ..Make::default() });
    }
    for (name, key, issuer) in [("a-by-b", "a", "b"), ("b-by-a", "b", "a")] {
        pki.make(Make { name, subject: &format!("/CN={key}"), key, issuer: Some(issuer), ..Make::default() });
    }
    pki.make(Make::default());
    pki.leaf("web", "a", WEB);
    let files = ["web.pem", "a-by-b.pem", "b-by-a.pem", "a-by-b.pem", "b-by-a.pem", "a.pem", "b.pem"];
    assert_eq!(refusal(&pki, &files), "unknown_issuer");
    assert!(judge(&corp(&pki, "b.pem"), &chain(&pki, &files)).is_ok(), "unless one of them is believed");
}

#[test]
fn whoever_is_asked_first_the_best_answer_is_given() {
    let pki = base();
    pki.make(Make { name: "other", subject: "/CN=Other", ..Make::default() });
    pki.leaf("late", "root", WEB);
    let authorities = [corp(&pki, "other.pem"), corp(&pki, "root.pem")];
    let ask = |files: &[&str], at: &str| {
        verify_by_any(&authorities, &chain(&pki, files), Usage::Client, at.parse().unwrap(), &NothingRevoked)
    };
    assert!(ask(&["late.pem"], NOW).is_ok());
    pki.leaf("foreign", "root", "URI:spiffe://example.com/x");
    assert_eq!(reason(ask(&["foreign.pem"], NOW)), "wrong_trust_domain");
    let nobody: [&Authority; 0] = [];
    let verdict = verify_by_any(nobody, &chain(&pki, &["late.pem"]), Usage::Client, now(), &NothingRevoked);
    assert_eq!(reason(verdict), "unknown_issuer");
}

#[test]
fn bundles_hold_cas_and_nothing_secret() {
    let pki = base();
    let read = |bytes: &[u8]| bundle::read(bytes).map(|anchors| anchors.len()).map_err(|error| error.reason());
    assert_eq!(read(&pki.join(&["root.pem", "int.pem", "root.pem"])), Ok(2), "duplicates are fine");
    assert_eq!(read(&pki.join(&["root.pem", "web.pem"])), Err("anchor_not_ca"));
    assert_eq!(read(&pki.join(&["root.pem", "root.key"])), Err("private_key_in_bundle"));
    assert_eq!(read(b""), Err("no_anchor"));
    assert_eq!(read(&pki.read("web.csr")), Err("no_anchor"));
    assert_eq!(read(b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"), Err("malformed_bundle"));
    assert_eq!(read(b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"), Err("malformed_certificate"));
    assert_eq!(read(&vec![b' '; bundle::MAX_BYTES + 1]), Err("bundle_too_large"));
    pki.make(Make { name: "weak", key: "rsa:1024", ..Make::default() });
    assert_eq!(read(&pki.read("weak.pem")), Err("weak_key"));
    // Version 1 has no extensions, and so nothing that says what it is for.
    pki.openssl(&["x509", "-req", "-in", "root.csr", "-signkey", "root.key", "-days", "1", "-out", "v1.pem"]);
    assert_eq!(read(&pki.read("v1.pem")), Err("anchor_not_ca"));
}

#[test]
fn a_flipped_bit_anywhere_is_refused() {
    let pki = &*BASE;
    let (authority, chain) = (corp(pki, "root.pem"), chain(pki, &["web.pem", "int.pem"]));
    assert!(judge(&authority, &chain).is_ok());
    for which in 0..chain.len() {
        for at in 0..chain[which].len() {
            let mut mutated = chain.clone();
            let mut der = mutated[which].to_vec();
            der[at] ^= 1 << (at % 8);
            mutated[which] = CertificateDer::from(der);
            let verdict = judge(&authority, &mutated);
            assert!(verdict.is_err(), "bit {} of byte {at} of certificate {which}: {verdict:?}", at % 8);
        }
    }
}

/// Peers and rules of a policy, each with the certificates that it should mean: of `web`, of `printer`.
#[test]
fn policies_mean_the_certificates_that_they_name() {
    use authd::policy::{diagnostic::Source, load};
    let pki = base();
    let extensions = format!("{LEAF}\nsubjectAltName=DNS:*.example.org,DNS:a.b.example.org");
    let subject = "/O=Acme, Inc/CN=printer";
    pki.make(Make { name: "printer", subject, issuer: Some("root"), extensions: &extensions, ..Make::default() });
    let authority = corp(&pki, "root.pem");
    let of = |files: &[&str]| judge(&authority, &chain(&pki, files)).unwrap();
    let (web, printer) = (of(&["web.pem", "int.pem"]), of(&["printer.pem"]));
    let cases = [
        (r#"spiffe_id = "spiffe://example.org/web""#, true, false),
        (r#"spiffe_id = "spiffe://example.org/webb""#, false, false),
        (r#"dns = "WEB.example.org""#, true, false),
        (r#"dns = "*.example.org""#, true, false),
        (r#"dns = "*.b.example.org""#, false, true),
        (r#"dns = "b.example.org""#, false, false),
        (r#"subject = "CN=printer,O=Acme\\, Inc""#, false, true),
        (r#"subject = "CN=printer""#, false, false),
        // Every key has to fit.
        (
            "spiffe_id = \"spiffe://example.org/web\"\ndns = \"web.example.org\"\nsubject = \"CN=web,O=Example\"",
            true,
            false,
        ),
        ("spiffe_id = \"spiffe://example.org/web\"\ndns = \"other.example.org\"", false, false),
        ("subject = \"CN=web,O=Example\"\ndns = \"*.b.example.org\"", false, false),
    ];
    let model = |text: String| {
        let text = format!(
            "trust_domain = \"example.org\"\n[[authority]]\nname = \"other\"\nbundle = \"o\"\ntrust_domain = \"example.org\"\n\
             [[authority]]\nname = \"corp\"\nbundle = \"c\"\ntrust_domain = \"example.org\"\n\
             [[workload]]\nname = \"w\"\nkind = \"service\"\ncgroup = \"/w\"\n{text}"
        );
        let policy = load::texts(vec![Source { name: "p".into(), text: text.as_str().into() }]);
        let shown: Vec<String> = policy.diagnostics.iter().map(|d| d.render(false)).collect();
        policy.model.unwrap_or_else(|| panic!("{}", shown.join("\n")))
    };
    let rule = |mtls: &str| {
        format!("[[rule]]\nname = \"r\"\nfrom = [\"w\"]\nto = [\"any\"]\nrequire = [\"mtls\"]\nmtls = {{ {mtls} }}\n")
    };
    for (keys, means_web, means_printer) in cases {
        let model = model(format!("[[peer]]\nname = \"p\"\n{keys}\n{}", rule(&keys.replace('\n', ", "))));
        let (peer, mtls) = (&model.peers[0], model.rules[0].mtls.as_ref().unwrap());
        for (certificate, meant) in [(&web, means_web), (&printer, means_printer)] {
            assert_eq!(peer.is_named_by(certificate), meant, "peer {keys} {}", certificate.subject);
            assert_eq!(mtls.is_met_by(certificate, &model.authorities), meant, "rule {keys} {}", certificate.subject);
        }
    }
    for (mtls, met) in [
        (r#"authority = "corp""#, true),
        (r#"authority = "other""#, false),
        (r#"authority = "other", spiffe_id = "spiffe://example.org/web""#, false),
        (r#"spiffe_id = ["spiffe://example.org/a", "spiffe://example.org/web"]"#, true),
        (r#"dns = ["a.example.org", "b.example.org"]"#, false),
    ] {
        let model = model(rule(mtls));
        assert_eq!(model.rules[0].mtls.as_ref().unwrap().is_met_by(&web, &model.authorities), met, "{mtls}");
    }
    let plain = model("[[peer]]\nname = \"p\"\nnetworks = [\"10.0.0.1\"]\n".to_owned());
    assert!(!plain.peers[0].is_named_by(&web), "a peer of whose certificate nothing is said");
}

/// Reads and judges whatever this is, as each of the things that come from outside.
fn exercise(der: &[u8]) {
    let pki = &*BASE;
    let certificate = CertificateDer::from(der.to_vec());
    if let Ok(leaf) = Leaf::read(&certificate) {
        let _ = leaf.spiffe_id();
        let _ = leaf.certificate.key();
    }
    static CORP: LazyLock<Authority> = LazyLock::new(|| corp(&BASE, "root.pem"));
    let shown = [certificate, chain(pki, &["int.pem"]).remove(0)];
    assert!(judge(&CORP, &shown).is_err());
    let _ = crl::read(der);
    let _ = bundle::read(der);
    let _ = chain::read(der);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        exercise(&bytes);
        exercise(&[&[0x30, 0x82, 0x01, 0x00], &bytes[..]].concat());
    }

    #[test]
    fn mutated_certificates_and_lists_never_panic(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6),
        list in any::<bool>(),
    ) {
        static DER: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
            let pki = listed();
            pki.openssl(&["crl", "-in", "int.crl", "-outform", "DER", "-out", "int.der"]);
            [chain(&BASE, &["web.pem"]).remove(0).to_vec(), pki.read("int.der")]
        });
        let mut der = DER[usize::from(list)].clone();
        let original = der.clone();
        for (at, value, kind) in edits {
            let at = at.index(der.len());
            match kind {
                0 => der[at] = value,
                1 => der.insert(at, value),
                2 if der.len() > 1 => drop(der.remove(at)),
                _ => der.truncate(at.max(1)),
            }
        }
        if der != original {
            exercise(&der);
        }
    }
}
