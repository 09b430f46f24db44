//! Chains whose certificates were revoked: by their issuers' lists, or here.

use authd::proofs::x509::{
    chain::{ChainError, Usage},
    crl::{self, CertificateIdentity, CrlPolicy, Revoked},
};

use super::{
    chains::{BASE, WEB, base, chain, corp, judge, now, reason, with_lists},
    pki::{Make, Pki},
};

/// A base with lists of both CAs, in which `gone` is revoked.
pub fn listed() -> Pki {
    let pki = base();
    pki.leaf("gone", "int", "URI:spiffe://example.org/gone");
    pki.revoke("int", "gone");
    pki.list("int", "int.crl", "20260601000000Z", "20260701000000Z");
    pki.list("root", "root.crl", "20260601000000Z", "20260701000000Z");
    pki
}

#[test]
fn revocation_lists_are_kept() {
    let pki = listed();
    pki.openssl(&["crl", "-in", "int.crl", "-outform", "DER", "-out", "int.der"]);
    let (web, gone) = (chain(&pki, &["web.pem", "int.pem"]), chain(&pki, &["gone.pem", "int.pem"]));
    for lists in [["int.crl", "root.crl"], ["root.crl", "int.der"]] {
        let authority = with_lists(&pki, "root.pem", &lists, CrlPolicy::Required);
        assert!(judge(&authority, &web).is_ok());
        assert_eq!(reason(judge(&authority, &gone)), "certificate_revoked");
    }
    assert!(judge(&corp(&pki, "root.pem"), &gone).is_ok(), "it is the list that refuses");
}

#[test]
fn a_revoked_ca_vouches_for_nobody() {
    let pki = base();
    pki.revoke("root", "int");
    pki.list("root", "root.crl", "20260601000000Z", "20260701000000Z");
    let authority = with_lists(&pki, "root.pem", &["root.crl"], CrlPolicy::IfPresent);
    assert_eq!(reason(judge(&authority, &chain(&pki, &["web.pem", "int.pem"]))), "certificate_revoked");
}

#[test]
fn missing_lists_refuse_only_where_they_are_required() {
    let pki = listed();
    let web = chain(&pki, &["web.pem", "int.pem"]);
    for lists in [&[][..], &["root.crl"], &["int.crl"]] {
        assert!(judge(&with_lists(&pki, "root.pem", lists, CrlPolicy::IfPresent), &web).is_ok(), "{lists:?}");
        let required = with_lists(&pki, "root.pem", lists, CrlPolicy::Required);
        assert_eq!(reason(judge(&required, &web)), "crl_missing", "{lists:?}");
    }
}

#[test]
fn lists_that_are_out_of_date_refuse() {
    let pki = listed();
    let web = chain(&pki, &["web.pem", "int.pem"]);
    pki.list("int", "old.crl", "20260501000000Z", "20260601000000Z");
    for policy in [CrlPolicy::IfPresent, CrlPolicy::Required] {
        let authority = with_lists(&pki, "root.pem", &["old.crl", "root.crl"], policy);
        assert_eq!(reason(judge(&authority, &web)), "crl_expired");
        // The newer list decides, wherever it stands.
        let authority = with_lists(&pki, "root.pem", &["old.crl", "int.crl", "root.crl"], policy);
        assert!(judge(&authority, &web).is_ok());
        assert_eq!(authority.crls_due(), Some("2026-06-01T00:00:00Z".parse().unwrap()));
    }
}

#[test]
fn the_newest_list_decides() {
    let pki = base();
    pki.list("int", "before.crl", "20260601000000Z", "20260701000000Z");
    pki.leaf("gone", "int", "URI:spiffe://example.org/gone");
    pki.revoke("int", "gone");
    pki.list("int", "after.crl", "20260610000000Z", "20260701000000Z");
    for lists in [["before.crl", "after.crl"], ["after.crl", "before.crl"]] {
        let authority = with_lists(&pki, "root.pem", &lists, CrlPolicy::IfPresent);
        assert_eq!(reason(judge(&authority, &chain(&pki, &["gone.pem", "int.pem"]))), "certificate_revoked");
    }
}

#[test]
fn lists_of_others_are_not_believed() {
    let pki = base();
    // The same name, another key.
    pki.make(Make { name: "fake", subject: "/O=Example/CN=Int", key: "ec:P-384", ..Make::default() });
    pki.list("fake", "fake.crl", "20260601000000Z", "20260701000000Z");
    let web = chain(&pki, &["web.pem", "int.pem"]);
    let authority = with_lists(&pki, "root.pem", &["fake.crl"], CrlPolicy::IfPresent);
    assert_eq!(reason(judge(&authority, &web)), "bad_crl");
    // A CA that may not sign lists.
    let extensions = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign";
    pki.make(Make { name: "mute", subject: "/CN=Mute", issuer: Some("root"), extensions, ..Make::default() });
    pki.leaf("below", "mute", WEB);
    pki.list("mute", "mute.crl", "20260601000000Z", "20260701000000Z");
    let authority = with_lists(&pki, "root.pem", &["mute.crl"], CrlPolicy::IfPresent);
    assert_eq!(reason(judge(&authority, &chain(&pki, &["below.pem", "mute.pem"]))), "bad_crl");
}

#[test]
fn lists_that_cannot_be_read_are_refused() {
    let pki = listed();
    let reason = |bytes: &[u8]| crl::read(bytes).unwrap_err().reason();
    assert_eq!(reason(b""), "no_crl");
    assert_eq!(reason(&pki.read("root.pem")), "no_crl");
    assert_eq!(reason(b"\x30\x03\x02\x01\x01"), "malformed_crl");
    assert_eq!(reason(b"-----BEGIN X509 CRL-----\nMAMCAQE=\n-----END X509 CRL-----\n"), "malformed_crl");
    assert_eq!(reason(&vec![0x30; crl::MAX_BYTES + 1]), "crl_too_large");
    assert_eq!(reason(&pki.join(&["int.crl"; crl::MAX_LISTS + 1])), "crl_too_large");
    let config = std::fs::read_to_string(pki.path("int.cnf")).unwrap();
    let delta = config
        .replace("authorityKeyIdentifier=keyid", "authorityKeyIdentifier=keyid\n2.5.29.27=critical,ASN1:INTEGER:1");
    std::fs::write(pki.path("int.cnf"), delta).unwrap();
    pki.list("int", "delta.crl", "20260601000000Z", "20260701000000Z");
    assert_eq!(reason(&pki.read("delta.crl")), "unsupported_crl");
}

/// Revoked on this node.
struct Here(Box<dyn Fn(&CertificateIdentity<'_>) -> bool>);

impl Revoked for Here {
    fn is_revoked(&self, what: &CertificateIdentity<'_>) -> bool {
        (self.0)(what)
    }
}

#[test]
fn what_is_revoked_here_is_refused_whatever_its_issuer_says() {
    let pki = &*BASE;
    let (authority, chain) = (corp(pki, "root.pem"), chain(pki, &["web.pem", "int.pem"]));
    let verified = judge(&authority, &chain).unwrap();
    let (serial, issuer) = (verified.serial.clone(), verified.issuer.clone());
    let id = verified.spiffe_id.clone().unwrap();
    let (key, fingerprint) = (verified.key_hash, verified.fingerprint);
    let (ca, anchor) = (verified.issuers[0].clone(), verified.issuers[1].clone());
    let lists: Vec<(&str, Here)> = vec![
        ("serial", Here(Box::new(move |what| what.serial == serial && what.issuer == issuer))),
        ("SPIFFE ID", Here(Box::new(move |what| what.spiffe_id == Some(&id)))),
        ("key", Here(Box::new(move |what| what.key_hash == key))),
        ("certificate", Here(Box::new(move |what| what.fingerprint == fingerprint))),
        ("CA", Here(Box::new(move |what| what.fingerprint == ca.fingerprint))),
        ("anchor's key", Here(Box::new(move |what| what.key_hash == anchor.key_hash))),
    ];
    for (name, list) in &lists {
        let verdict = authority.verify(&chain, Usage::Client, now(), list);
        assert_eq!(verdict.clone().unwrap_err(), ChainError::RevokedHere, "{name}");
        assert_eq!(reason(verdict), "certificate_revoked", "{name}");
        assert!(verified.identities().any(|what| list.is_revoked(&what)), "{name}: known afterwards too");
    }
    let other = Here(Box::new(|what| what.serial == "01" || what.key_hash == [0; 32]));
    assert!(authority.verify(&chain, Usage::Client, now(), &other).is_ok());
}

#[test]
fn a_way_around_a_revoked_ca_is_taken() {
    let pki = base();
    pki.make(Make { name: "root2", subject: "/CN=Root2", ..Make::default() });
    pki.make(Make { name: "int2", subject: "/O=Example/CN=Int", key: "int", issuer: Some("root2"), ..Make::default() });
    std::fs::write(pki.path("both.pem"), pki.join(&["root.pem", "root2.pem"])).unwrap();
    let authority = corp(&pki, "both.pem");
    let chain = chain(&pki, &["web.pem", "int.pem", "int2.pem"]);
    let first = judge(&authority, &chain).unwrap().issuers[0].fingerprint;
    let list = Here(Box::new(move |what| what.fingerprint == first));
    let verified = authority.verify(&chain, Usage::Client, now(), &list).unwrap();
    assert_ne!(verified.issuers[0].fingerprint, first);
}
