//! Proofs of RFC 9449, and every way in which its section 4.3 has them refused.

use serde_json::json;

use super::*;
use crate::proofs::testing::{NOW, Signer, at, now};

const TOKEN: &str = "Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU";
/// The header of the RFC's proofs, with their key.
const HEADER: &str = "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6IkVDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkR\
                      ZOXpDa0RscEJoRjQyVVFVZldWQVdCRnMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JEQ\
                      SIsImNydiI6IlAtMjU2In19";
const JKT: &str = "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I";

fn target(uri: &str) -> Target {
    Target::parse(uri).unwrap()
}

fn check(proof: &str, nonces: Option<&Nonces>, now: Timestamp) -> Result<Proof, DpopError> {
    let target = target("https://api.example.org/v1/grants?x=1");
    let request = Request { method: "POST", target: &target, access_token: Some(TOKEN), nonces };
    verify(proof, &request, &ProofPolicy::default(), now)
}

fn reason(proof: &str) -> &'static str {
    check(proof, None, now()).map_or_else(|error| error.reason(), |_| "taken")
}

fn header(signer: &Signer) -> Value {
    let mut jwk = signer.jwk();
    jwk.as_object_mut().unwrap().remove("kid");
    json!({ "typ": "dpop+jwt", "alg": signer.algorithm.name(), "jwk": jwk })
}

fn claims() -> Value {
    json!({
        "jti": "-BwC3ESc6acc2lTc", "htm": "POST", "htu": "https://api.example.org/v1/grants", "iat": NOW,
        "ath": base64url::encode(sha256(TOKEN.as_bytes())),
    })
}

fn changed(mut object: Value, name: &str, value: Value) -> String {
    match value {
        Value::Null => drop(object.as_object_mut().unwrap().remove(name)),
        value => object[name] = value,
    }
    object.to_string()
}

#[test]
fn the_examples_of_rfc_9449_verify_at_their_own_time() {
    let policy = ProofPolicy::default();
    let at = |second| Timestamp::from_second(second).unwrap();
    // Figure 2: to the token endpoint, in 2019.
    let proof = format!(
        "{HEADER}.eyJqdGkiOiItQndDM0VTYzZhY2MybFRjIiwiaHRtIjoiUE9TVCIsImh0dSI6Imh0dHBzOi8vc2VydmVyLmV4YW1wbGUuY29tL3Rva2VuI\
         iwiaWF0IjoxNTYyMjYyNjE2fQ.2-GxA6T8lP4vfrg8v-FdWP0A0zdrj8igiMLvqRMUvwnQg4PtFLbdLXiOSsX0x7NVY-FNyJK70nfbV37xRZT3Lg"
    );
    let server = target("https://server.example.com/token");
    let request = Request { method: "POST", target: &server, access_token: None, nonces: None };
    let verified = verify(&proof, &request, &policy, at(1_562_262_616)).unwrap();
    assert_eq!(base64url::encode(verified.jkt), JKT);
    assert_eq!(verify(&proof, &request, &policy, now()), Err(DpopError::Old));
    // Figure 12: to a resource, with an access token.
    let proof = format!(
        "{HEADER}.eyJqdGkiOiJlMWozVl9iS2ljOC1MQUVCIiwiaHRtIjoiR0VUIiwiaHR1IjoiaHR0cHM6Ly9yZXNvdXJjZS5leGFtcGxlLm9yZy9wcm90Z\
         WN0ZWRyZXNvdXJjZSIsImlhdCI6MTU2MjI2MjYxOCwiYXRoIjoiZlVIeU8ycjJaM0RaNTNFc05yV0JiMHhXWG9hTnk1OUlpS0NBcWtzbVFFbyJ9.2o\
         W9RP35yRqzhrtNP86L-Ey71EOptxRimPPToA1plemAgR6pxHF8y6-yqyVnmcw6Fy1dqd-jfxSYoMxhAJpLjA"
    );
    let resource = target("https://resource.example.org/protectedresource");
    let request = Request { method: "GET", target: &resource, access_token: Some(TOKEN), nonces: None };
    assert_eq!(verify(&proof, &request, &policy, at(1_562_262_618)).unwrap().jkt, verified.jkt);
    let stolen = Request { access_token: Some("another"), ..request };
    assert_eq!(verify(&proof, &stolen, &policy, at(1_562_262_618)), Err(DpopError::TokenHash));
}

#[test]
fn proofs_of_every_kind_of_key_are_taken() {
    for algorithm in [Algorithm::Es256, Algorithm::Es384, Algorithm::EdDsa, Algorithm::Rs256, Algorithm::Ps256] {
        let signer = Signer::new("k", algorithm);
        let proof = signer.sign(&header(&signer).to_string(), &claims().to_string());
        let verified = check(&proof, None, now()).unwrap();
        let jwk = signer.jwk();
        assert_eq!(verified.jkt, PublicKey::parse(jwk.as_object().unwrap()).unwrap().thumbprint);
        assert_eq!(verified.not_after, at(60));
    }
}

#[test]
fn every_fault_of_a_header_has_its_own_reason() {
    let (signer, other) = (Signer::es256("k"), Signer::es256("k"));
    let mut private = header(&signer);
    private["jwk"]["d"] = json!("AA");
    for (name, value, expected) in [
        ("typ", json!("JWT"), "dpop_type"),
        ("typ", Value::Null, "dpop_type"),
        ("alg", json!("none"), "alg_none"),
        ("alg", json!("HS256"), "alg_symmetric"),
        ("alg", json!("ES384"), "dpop_signature_invalid"),
        ("jwk", Value::Null, "header_key_missing"),
        ("jwk", json!("key"), "header_malformed"),
        ("jwk", private["jwk"].clone(), "jwk_private"),
        ("jwk", json!({ "kty": "oct", "k": "AA" }), "jwk_symmetric"),
        ("jwk", other.jwk(), "dpop_signature_invalid"),
        ("crit", json!(["nonce"]), "crit_unsupported"),
        ("jku", json!("https://evil.example"), "header_key_reference"),
        ("x5c", json!(["AA"]), "header_embedded_key"),
    ] {
        let header = changed(header(&signer), name, value);
        assert_eq!(reason(&signer.sign(&header, &claims().to_string())), expected, "{header}");
    }
    assert_eq!(reason(""), "token_malformed");
}

#[test]
fn every_fault_of_claims_has_its_own_reason() {
    let signer = Signer::es256("k");
    for (name, value, expected) in [
        ("jti", Value::Null, "dpop_claim_malformed"),
        ("jti", json!(""), "dpop_claim_malformed"),
        ("jti", json!("x".repeat(257)), "dpop_claim_malformed"),
        ("jti", json!(1), "dpop_claim_malformed"),
        ("htm", Value::Null, "dpop_claim_malformed"),
        ("htm", json!("GET"), "dpop_method_mismatch"),
        ("htm", json!("post"), "dpop_method_mismatch"),
        ("htu", Value::Null, "dpop_claim_malformed"),
        ("htu", json!("/v1/grants"), "dpop_claim_malformed"),
        ("htu", json!("https://api.example.org/v1/revocations"), "dpop_uri_mismatch"),
        ("htu", json!("https://api.example.org.evil.example/v1/grants"), "dpop_uri_mismatch"),
        ("htu", json!("HTTPS://API.EXAMPLE.ORG:443/v1/grants#x"), "taken"),
        ("iat", Value::Null, "dpop_claim_malformed"),
        ("iat", json!("1795000000"), "dpop_claim_malformed"),
        ("iat", json!(1e300), "dpop_claim_malformed"),
        ("iat", json!(NOW - 60), "dpop_too_old"),
        ("iat", json!(NOW - 59), "taken"),
        ("iat", json!(NOW + 5), "taken"),
        ("iat", json!(NOW + 6), "dpop_in_future"),
        ("ath", Value::Null, "dpop_claim_malformed"),
        ("ath", json!("AA"), "dpop_claim_malformed"),
        ("ath", json!(base64url::encode([0; 32])), "dpop_token_mismatch"),
    ] {
        let claims = changed(claims(), name, value);
        assert_eq!(reason(&signer.sign(&header(&signer).to_string(), &claims)), expected, "{claims}");
    }
    let twice = claims().to_string().replacen('{', "{\"htm\":\"POST\",", 1);
    assert_eq!(reason(&signer.sign(&header(&signer).to_string(), &twice)), "json_duplicate_member");
}

#[test]
fn a_nonce_is_asked_for_where_the_server_wants_one() {
    let signer = Signer::es256("k");
    let nonces = Nonces::new(&[3; 32], Duration::from_secs(100));
    let with = |nonce: Value| {
        let proof = signer.sign(&header(&signer).to_string(), &changed(claims(), "nonce", nonce));
        check(&proof, Some(&nonces), now()).map_err(|error| (error.reason(), error.oauth_error()))
    };
    assert!(with(json!(nonces.issue(now()))).is_ok());
    assert_eq!(with(Value::Null), Err(("dpop_nonce_missing", "use_dpop_nonce")));
    assert_eq!(with(json!("AAAA")), Err(("dpop_nonce_unknown", "use_dpop_nonce")));
    assert_eq!(with(json!(nonces.issue(at(-200)))), Err(("dpop_nonce_old", "use_dpop_nonce")));
    assert_eq!(with(json!(7)), Err(("dpop_claim_malformed", "invalid_dpop_proof")));
}

#[test]
fn exactly_one_header_is_taken() {
    assert_eq!(single(&[b"a"]), Ok("a"));
    assert_eq!(single(&[]), Err(DpopError::Missing));
    assert_eq!(single(&[b"a", b"a"]), Err(DpopError::Repeated));
    assert_eq!(single(&[b"\xff"]).unwrap_err().reason(), "token_encoding");
}
