//! What attackers do to tokens, each with the reason for which it is refused; and that nothing else gets through.

use std::time::Duration;

use aws_lc_rs::hmac;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    base64url,
    jwk::KeySet,
    jws::Algorithm,
    jwt::{Expected, IssuerPolicy, VerifiedToken, verify},
    testing::{NOW, Signer, claims, now},
};

fn policy(algorithms: &[Algorithm]) -> IssuerPolicy {
    IssuerPolicy {
        name: "corp".into(),
        issuer: "https://idp.example.org".into(),
        algorithms: algorithms.to_vec(),
        max_ttl: Some(Duration::from_secs(900)),
        leeway: Default::default(),
        require_at_jwt: true,
    }
}

/// An issuer, and a rule that takes its tokens.
struct Bench {
    signer: Signer,
    keys: KeySet,
    policy: IssuerPolicy,
    scopes: Vec<String>,
}

impl Bench {
    fn new(algorithm: Algorithm) -> Self {
        let signer = Signer::new("2026-11", algorithm);
        let keys = KeySet::parse(&signer.jwks()).unwrap();
        Self { signer, keys, policy: policy(&[algorithm]), scopes: vec!["ledger:write".into()] }
    }

    fn verify(&self, token: &str) -> Result<VerifiedToken, &'static str> {
        let expected = Expected { audience: Some("ledger"), scopes: &self.scopes, subjects: &[] };
        verify(token, &self.keys, &self.policy, &expected, now()).map_err(|error| error.reason())
    }

    fn with_claim(&self, name: &str, value: Value) -> Result<VerifiedToken, &'static str> {
        self.verify(&self.signer.token(&changed(claims(), name, value)))
    }

    fn with_header(&self, name: &str, value: Value) -> Result<VerifiedToken, &'static str> {
        let header = changed(self.signer.header(), name, value);
        self.verify(&self.signer.sign(&header.to_string(), &claims().to_string()))
    }

    /// The signed part of a good token.
    fn signed(&self) -> String {
        self.signer.token(&claims()).rsplit_once('.').unwrap().0.to_owned()
    }

    fn with_signature(&self, signature: &[u8]) -> Result<VerifiedToken, &'static str> {
        self.verify(&format!("{}.{}", self.signed(), base64url::encode(signature)))
    }
}

/// `null` takes the member away.
fn changed(mut object: Value, name: &str, value: Value) -> Value {
    match value {
        Value::Null => drop(object.as_object_mut().unwrap().remove(name)),
        value => object[name] = value,
    }
    object
}

#[test]
fn a_good_token_says_who_and_what() {
    for algorithm in [Algorithm::Es256, Algorithm::Es384, Algorithm::EdDsa, Algorithm::Rs256, Algorithm::Ps256] {
        let bench = Bench::new(algorithm);
        let token = bench.verify(&bench.signer.token(&claims())).unwrap();
        assert_eq!((token.principal(), token.key_id.as_deref()), ("payments-api", Some("2026-11")), "{algorithm:?}");
        assert_eq!(token.scopes, ["ledger:read", "ledger:write"]);
    }
}

#[test]
fn the_public_key_is_no_shared_secret() {
    let bench = Bench::new(Algorithm::Rs256);
    let header = changed(bench.signer.header(), "alg", json!("HS256")).to_string();
    let signed = format!("{}.{}", base64url::encode(header), base64url::encode(claims().to_string()));
    let (der, jwk) = (bench.signer.rsa_public_der(), bench.signer.jwk().to_string().into_bytes());
    for secret in [der, bench.signer.rsa_modulus(), jwk, Vec::new()] {
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &secret), signed.as_bytes());
        assert_eq!(bench.verify(&format!("{signed}.{}", base64url::encode(tag))), Err("alg_symmetric"));
    }
}

#[test]
fn an_algorithm_of_another_kind_or_not_on_the_list_is_refused() {
    let bench = Bench::new(Algorithm::Rs256);
    for (alg, reason) in [("PS256", "alg_not_allowed"), ("ES256", "alg_not_allowed"), ("none", "alg_none")] {
        assert_eq!(bench.with_header("alg", json!(alg)), Err(reason));
    }
    // Both are on the list, the key is of one of them.
    let bench = Bench { policy: policy(&[Algorithm::Rs256, Algorithm::Es256]), ..bench };
    assert_eq!(bench.with_header("alg", json!("ES256")), Err("key_algorithm_mismatch"));
    // Of an RSA key, but signed with the other padding.
    let bench = Bench { policy: policy(&[Algorithm::Rs256, Algorithm::Ps256]), ..bench };
    assert_eq!(bench.with_header("alg", json!("PS256")), Err("signature_invalid"));
}

#[test]
fn an_unsigned_token_is_refused() {
    let bench = Bench::new(Algorithm::Es256);
    for alg in ["none", "None", "NONE", "nOnE"] {
        let header = base64url::encode(json!({ "alg": alg, "typ": "at+jwt" }).to_string());
        let unsigned = format!("{header}.{}.", base64url::encode(claims().to_string()));
        assert_eq!(bench.verify(&unsigned), Err("alg_none"));
        assert_eq!(bench.verify(&format!("{unsigned}AA")), Err("alg_none"));
    }
    assert_eq!(bench.verify(&format!("{}.", bench.signed())), Err("signature_invalid"));
    assert_eq!(bench.verify(&bench.signed()), Err("token_malformed"));
}

/// Of an ECDSA signature (r, s) anybody can make a second one, (r, n - s): the token stays the one that was revoked.
#[test]
fn a_second_signature_makes_no_second_token() {
    const ORDER: &str = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551";
    let bench = Bench::new(Algorithm::Es256);
    let token = bench.signer.token(&claims());
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let mut signature = base64url::decode(signature).unwrap();
    let mut borrow = 0;
    for at in (0..32).rev() {
        let order = i32::from(u8::from_str_radix(&ORDER[2 * at..2 * at + 2], 16).unwrap());
        let difference = order - i32::from(signature[32 + at]) - borrow;
        borrow = i32::from(difference < 0);
        signature[32 + at] = difference.rem_euclid(256) as u8;
    }
    let other = format!("{signed}.{}", base64url::encode(signature));
    assert_ne!(token, other);
    assert_eq!(bench.verify(&other).unwrap().token_hash, bench.verify(&token).unwrap().token_hash);
}

#[test]
fn a_key_that_the_token_brings_or_names_is_not_used() {
    let bench = Bench::new(Algorithm::Es256);
    let thief = Signer::es256("2026-11");
    let with = |name: &str, value: Value| {
        let header = changed(thief.header(), name, value).to_string();
        bench.verify(&thief.sign(&header, &claims().to_string()))
    };
    assert_eq!(with("jwk", thief.jwk()), Err("header_embedded_key"));
    assert_eq!(with("x5c", json!(["MIIB"])), Err("header_embedded_key"));
    assert_eq!(with("jku", json!("https://evil.example/jwks.json")), Err("header_key_reference"));
    assert_eq!(with("x5u", json!("https://evil.example/cert.pem")), Err("header_key_reference"));
    assert_eq!(with("x5t", json!("AAAA")), Err("signature_invalid"));
    for kid in ["../../../../dev/null", "2026-11' UNION SELECT 'x", "2026-11\u{2028}", "2026-11 ", "|id", "%32026-11"] {
        assert_eq!(with("kid", json!(kid)), Err("kid_unknown"), "{kid}");
    }
    assert_eq!(with("kid", json!("2026-11\u{0}")), Err("kid_malformed"));
    assert_eq!(with("kid", json!("k".repeat(300))), Err("kid_malformed"));
    assert_eq!(with("kid", json!("2026-11")), Err("signature_invalid"));
    assert_eq!(with("kid", Value::Null), Err("signature_invalid"));
}

#[test]
fn signatures_of_other_forms_are_refused() {
    for (algorithm, length) in [(Algorithm::Es256, 64), (Algorithm::Es384, 96), (Algorithm::EdDsa, 64)] {
        let bench = Bench::new(algorithm);
        let good = bench.signer.signature(bench.signed().as_bytes());
        assert_eq!(good.len(), length);
        assert!(bench.with_signature(&good).is_ok());
        let half = length / 2;
        let zero_r = [&vec![0; half], &good[half..]].concat();
        let zero_s = [&good[..half], &vec![0; half]].concat();
        let ones = vec![0xff; length];
        let longer = [&good[..], &[0]].concat();
        let padded = [&[0], &good[..half], &[0], &good[half..]].concat();
        let der = der(&good[..half], &good[half..]);
        for wrong in [
            vec![0; length],
            zero_r,
            zero_s,
            ones,
            longer,
            padded,
            der,
            good[..length - 1].to_vec(),
            vec![0],
            Vec::new(),
        ] {
            assert_eq!(bench.with_signature(&wrong), Err("signature_invalid"), "{algorithm:?} {wrong:02x?}");
        }
    }
    let bench = Bench::new(Algorithm::Rs256);
    for wrong in [vec![0; 256], vec![1; 256], vec![0xff; 256], vec![0; 255], vec![]] {
        assert_eq!(bench.with_signature(&wrong), Err("signature_invalid"));
    }
}

/// An ECDSA signature as X.509 has it: SEQUENCE of two INTEGERs.
fn der(r: &[u8], s: &[u8]) -> Vec<u8> {
    let integer = |number: &[u8]| [&[2, number.len() as u8 + 1, 0], number].concat();
    let body = [integer(r), integer(s)].concat();
    [&[0x30, body.len() as u8][..], &body].concat()
}

#[test]
fn the_order_of_the_curve_gives_no_second_signature_a_chance() {
    // (r, n - s) verifies wherever (r, s) does, so nothing may be remembered by signature: the hash of the token is of
    // its text, and revocation goes by `jti` where there is one. What is promised is only that no other payload verifies.
    let bench = Bench::new(Algorithm::Es256);
    let good = bench.signer.token(&claims());
    let other = bench.signer.token(&changed(claims(), "sub", json!("root")));
    let swapped = format!("{}.{}", other.rsplit_once('.').unwrap().0, good.rsplit_once('.').unwrap().1);
    assert_eq!(bench.verify(&swapped), Err("signature_invalid"));
}

#[test]
fn critical_and_unencoded_are_refused() {
    let bench = Bench::new(Algorithm::Es256);
    assert_eq!(bench.with_header("crit", json!(["exp"])), Err("crit_unsupported"));
    assert_eq!(bench.with_header("crit", json!(["b64"])), Err("crit_unsupported"));
    assert_eq!(bench.with_header("b64", json!(false)), Err("payload_unencoded"));
}

#[test]
fn a_token_of_another_kind_is_no_access_token() {
    let bench = Bench::new(Algorithm::Es256);
    for typ in [json!("JWT"), Value::Null, json!("dpop+jwt"), json!("logout+jwt")] {
        assert_eq!(bench.with_header("typ", typ), Err("token_type_mismatch"));
    }
    assert!(bench.with_header("typ", json!("application/at+JWT")).is_ok());
    let lax = Bench { policy: IssuerPolicy { require_at_jwt: false, ..bench.policy.clone() }, ..bench };
    for typ in [json!("JWT"), Value::Null, json!("at+jwt")] {
        assert!(lax.with_header("typ", typ).is_ok());
    }
    for typ in ["dpop+jwt", "logout+jwt", "secevent+jwt", "token-introspection+jwt"] {
        assert_eq!(lax.with_header("typ", json!(typ)), Err("token_type_mismatch"));
    }
}

#[test]
fn every_claim_is_checked_and_has_its_own_reason() {
    let bench = Bench::new(Algorithm::Es256);
    let (null, hash) = (Value::Null, base64url::encode([9; 32]));
    for (name, value, expected) in [
        ("iss", null.clone(), Err("claim_missing")),
        ("iss", json!("https://idp.example.org/"), Err("issuer_mismatch")),
        ("iss", json!("https://IDP.example.org"), Err("issuer_mismatch")),
        ("iss", json!(["https://idp.example.org"]), Err("claim_malformed")),
        ("sub", null.clone(), Err("claim_missing")),
        ("sub", json!(""), Err("claim_malformed")),
        ("sub", json!(7), Err("claim_malformed")),
        ("sub", json!("a\nb"), Err("claim_malformed")),
        ("sub", json!("x".repeat(1025)), Err("claim_malformed")),
        ("client_id", null.clone(), Err("claim_missing")),
        ("client_id", json!({}), Err("claim_malformed")),
        ("jti", null.clone(), Err("claim_missing")),
        ("jti", json!(1), Err("claim_malformed")),
        ("aud", null.clone(), Err("claim_missing")),
        ("aud", json!("ledger2"), Err("audience_mismatch")),
        ("aud", json!(["a", "ledger"]), Ok(())),
        ("aud", json!(["a", "b"]), Err("audience_mismatch")),
        ("aud", json!([]), Err("claim_malformed")),
        ("aud", json!(["ledger", 1]), Err("claim_malformed")),
        ("aud", json!({ "ledger": true }), Err("claim_malformed")),
        ("exp", null.clone(), Err("claim_missing")),
        ("exp", json!(NOW - 29), Ok(())),
        ("exp", json!(NOW - 30), Err("token_expired")),
        ("exp", json!(NOW - 86400), Err("token_expired")),
        ("exp", json!(NOW + 841), Err("token_long_lived")),
        ("exp", json!(NOW + 840), Ok(())),
        ("exp", json!(NOW.to_string()), Err("claim_malformed")),
        ("exp", json!(-1), Err("claim_malformed")),
        ("exp", json!(1e300), Err("claim_malformed")),
        ("exp", json!(u64::MAX), Err("claim_malformed")),
        ("exp", json!(253_402_300_800_i64), Err("claim_malformed")),
        ("exp", json!([NOW + 60]), Err("claim_malformed")),
        ("nbf", json!(NOW + 30), Ok(())),
        ("nbf", json!(NOW + 31), Err("token_not_yet_valid")),
        ("nbf", json!("now"), Err("claim_malformed")),
        ("iat", null.clone(), Err("claim_missing")),
        ("iat", json!(NOW + 30), Ok(())),
        ("iat", json!(NOW + 31), Err("token_issued_in_future")),
        ("iat", json!(0), Err("token_long_lived")),
        ("scope", null.clone(), Err("scope_insufficient")),
        ("scope", json!("ledger:read"), Err("scope_insufficient")),
        ("scope", json!("LEDGER:WRITE"), Err("scope_insufficient")),
        ("scope", json!("ledger:write2 xledger:write"), Err("scope_insufficient")),
        ("scope", json!(["ledger:write"]), Err("claim_malformed")),
        ("scope", json!("ledger:write  x"), Err("claim_malformed")),
        ("scope", json!(" ledger:write"), Err("claim_malformed")),
        ("scope", json!("ledger:write\tx"), Err("claim_malformed")),
        ("scope", json!("ledger:write \"x\""), Err("claim_malformed")),
        ("cnf", json!({}), Err("confirmation_unsupported")),
        ("cnf", json!({ "jwk": {} }), Err("confirmation_unsupported")),
        ("cnf", json!({ "jkt": hash, "kid": "x" }), Err("confirmation_unsupported")),
        ("cnf", json!("jkt"), Err("claim_malformed")),
        ("cnf", json!({ "jkt": "AAAA" }), Err("claim_malformed")),
        ("cnf", json!({ "x5t#S256": format!("{hash}=") }), Err("claim_malformed")),
        ("cnf", json!({ "x5t#S256": null }), Err("claim_malformed")),
        ("act", json!("agent"), Err("claim_malformed")),
        ("may_act", json!([]), Err("claim_malformed")),
    ] {
        let got = bench.with_claim(name, value.clone()).map(|_| ());
        assert_eq!(got, expected, "{name} = {value}");
    }
    let bound = bench.with_claim("cnf", json!({ "jkt": hash, "x5t#S256": hash })).unwrap();
    assert_eq!((bound.confirmation.jkt, bound.confirmation.x5t_s256), (Some([9; 32]), Some([9; 32])));
    let delegated = bench.with_claim("act", json!({ "sub": "agent", "act": { "sub": "human" } })).unwrap();
    assert_eq!(delegated.act.unwrap()["act"]["sub"], "human");
}

#[test]
fn the_leeway_is_never_longer_than_a_minute() {
    let bench = Bench::new(Algorithm::Es256);
    let leeway = super::claims::Leeway::new(Duration::from_secs(3600));
    let bench = Bench { policy: IssuerPolicy { leeway, ..bench.policy.clone() }, ..bench };
    assert!(bench.with_claim("exp", json!(NOW - 59)).is_ok());
    assert_eq!(bench.with_claim("exp", json!(NOW - 60)), Err("token_expired"));
}

#[test]
fn only_named_subjects_pass_where_a_rule_names_some() {
    let bench = Bench::new(Algorithm::Es256);
    let token = bench.signer.token(&claims());
    for (subjects, expected) in [
        (&["payments-api"][..], Ok(())),
        (&["other", "payments-api"], Ok(())),
        (&["payments"], Err("subject_not_allowed")),
    ] {
        let subjects: Vec<String> = subjects.iter().map(|subject| subject.to_string()).collect();
        let expectation = Expected { subjects: &subjects, ..Default::default() };
        let got = verify(&token, &bench.keys, &bench.policy, &expectation, now());
        assert_eq!(got.map(|_| ()).map_err(|error| error.reason()), expected, "{subjects:?}");
    }
}

#[test]
fn claims_that_parsers_could_read_differently_are_refused() {
    let bench = Bench::new(Algorithm::Es256);
    let header = bench.signer.header().to_string();
    let good = claims().to_string();
    for (claims, reason) in [
        (good.replacen('{', "{\"sub\":\"root\",", 1), "json_duplicate_member"),
        (good.replacen('{', "{\"s\\u0075b\":\"root\",", 1), "json_duplicate_member"),
        (good.replacen('{', "{\"x\":{\"a\":1,\"a\":2},", 1), "json_duplicate_member"),
        (good.replacen('{', &format!("{{\"x\":{}1{},", "[".repeat(99), "]".repeat(99)), 1), "json_depth"),
        (good.replacen('{', &format!("{{\"x\":[1{}],", ",1".repeat(600)), 1), "json_members"),
        (good.replacen('{', "{\"x\":1e999,", 1), "json_syntax"),
        (good.replacen('{', "{\"x\":NaN,", 1), "json_syntax"),
        (format!("{good}{good}"), "json_syntax"),
        (format!("[{good}]"), "json_not_object"),
        (String::new(), "json_syntax"),
    ] {
        assert_eq!(bench.verify(&bench.signer.sign(&header, &claims)), Err(reason), "{claims}");
    }
    let huge = bench.signer.sign(&header, &good.replacen('{', &format!("{{\"x\":\"{}\",", "x".repeat(16384)), 1));
    assert_eq!(bench.verify(&huge), Err("token_oversize"));
}

#[test]
fn other_spellings_of_a_good_token_are_refused() {
    let bench = Bench::new(Algorithm::Es256);
    let token = bench.signer.token(&claims());
    for spelling in [format!("{token}="), format!("{token}\n"), format!(" {token}"), token.replacen('.', "=.", 1)] {
        assert_eq!(bench.verify(&spelling), Err("token_encoding"), "{spelling:?}");
    }
    // 64 bytes are 86 characters, the last of which has four bits that mean nothing.
    let (start, last) = token.split_at(token.len() - 1);
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let others: Vec<char> = alphabet.chars().filter(|c| !last.contains(*c)).collect();
    let reasons = others.iter().map(|c| bench.verify(&format!("{start}{c}")).unwrap_err());
    assert_eq!(reasons.filter(|reason| *reason == "token_encoding").count(), 60);
}

#[test]
fn nothing_that_is_shown_has_the_token_in_it() {
    let bench = Bench::new(Algorithm::Es256);
    let token = bench.signer.token(&claims());
    let shown = format!("{:?} {:?}", bench.verify(&token).unwrap(), bench.keys);
    for part in token.split('.') {
        assert!(!shown.contains(part));
    }
}

proptest! {
    #[test]
    fn no_text_makes_it_panic_or_passes(token in "\\PC{0,80}|[A-Za-z0-9_=-]{0,60}(\\.[A-Za-z0-9_=-]{0,60}){0,4}") {
        let bench = Bench::new(Algorithm::Es256);
        prop_assert!(bench.verify(&token).is_err());
    }

    #[test]
    fn a_token_with_one_character_changed_is_refused(at in any::<prop::sample::Index>(), to in any::<char>()) {
        let bench = Bench::new(Algorithm::EdDsa);
        let token = bench.signer.token(&claims());
        let mut characters: Vec<char> = token.chars().collect();
        let slot = at.index(characters.len());
        prop_assume!(characters[slot] != to);
        characters[slot] = to;
        let changed: String = characters.into_iter().collect();
        prop_assert!(bench.verify(&changed).is_err());
    }

    #[test]
    fn signed_claims_of_any_shape_never_panic(name in "iss|sub|aud|exp|nbf|iat|scope|cnf|act", value in shape()) {
        let bench = Bench::new(Algorithm::EdDsa);
        let _ = bench.with_claim(&name, value);
    }
}

#[test]
fn every_changed_byte_of_a_good_token_is_noticed() {
    let bench = Bench::new(Algorithm::Es256);
    let token = bench.signer.token(&claims());
    for index in 0..token.len() {
        for to in ["A", "_", ".", "=", "0"] {
            let mut changed = token.clone();
            changed.replace_range(index..=index, to);
            assert!(changed == token || bench.verify(&changed).is_err(), "{index} {to}");
        }
    }
}

fn shape() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("jkt|x5t#S256|sub|\\PC{0,3}", inner, 0..3)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}
