//! From what a request shows to what is proven: one rule's proofs, each verified, each with its own refusal.
//!
//! Enters: a session and a request's headers. Leaves: verified proofs for dataplane, or the first thing that lacks. Never: a
//! grant, and never a proof that was not asked for: what a rule does not require is not looked at.

use std::sync::Arc;

use axum::http::{HeaderMap, StatusCode, Uri, header};
use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    LOCAL_HOST,
    api::Session,
    fetch::{self, FetchError},
    problem::Problem,
    verifier::{Issuer, Method, TOKEN_CACHE, Verifier, lock},
};
use crate::{
    daemon::metrics::results::{Checked, Fetched, OK},
    digest::Digest,
    grants::proof::{Binding, Shown, Token},
    ipc::{Caller, PresentedKey},
    policy::{
        file::Proof,
        model::{Rule, TokenRequirement},
    },
    proofs::{
        access::{self, AccessError},
        api_key::text,
        binding::{self, Met},
        dpop::{DpopError, ProofPolicy, Target},
        introspection::{self, IntrospectionError},
        jwk::SelectError,
        jwt::{self, Expected, TokenError, VerifiedToken},
        scheme::{self, Credentials, Scheme},
        x509::{
            bundle::Authority,
            chain::{Usage, verify_by_any},
            crl::NothingRevoked,
            identity::VerifiedCertificate,
        },
    },
};

/// What of a request matters for proofs.
pub struct Asked<'a> {
    pub method: &'a str,
    /// As the caller addressed it.
    pub uri: &'a Uri,
    pub headers: &'a HeaderMap,
}

pub struct Proven {
    pub shown: Vec<Shown>,
    /// Checked by dataplane.
    pub api_key: Option<PresentedKey>,
}

/// What was proven before the first refusal, and that one.
pub struct Failed {
    pub problem: Problem,
    pub shown: Vec<Shown>,
}

/// Verifies what a rule requires of a caller of this node, or of a peer.
pub async fn for_rule(session: &Session, name: &str, asked: &Asked<'_>) -> Result<Proven, Failed> {
    let verifier = verifier_of(session)?;
    let rule = rule_named(&verifier, name)?;
    let target = target_of(&verifier, &session.caller, asked.uri, asked.headers);
    required(&verifier, rule, &session.chain, asked, target).await
}

/// Verifies what a rule requires of a request that a proxy passed on, whose client's chain the proxy vouches for.
pub async fn for_request(
    verifier: &Verifier,
    rule: &Rule,
    chain: &[CertificateDer<'static>],
    asked: &Asked<'_>,
    target: Option<Target>,
) -> Result<Proven, Failed> {
    required(verifier, rule, chain, asked, target).await
}

pub fn verifier_of(session: &Session) -> Result<Arc<Verifier>, Problem> {
    session
        .shared
        .verifier()
        .ok_or_else(|| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "there are no settings yet"))
}

pub fn rule_named<'a>(verifier: &'a Verifier, name: &str) -> Result<&'a Rule, Problem> {
    let rule = verifier.model.rules.iter().find(|rule| rule.name == name);
    let rule =
        rule.ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, "rule_unknown", "the policy has no such rule"))?;
    if rule.is_grantable() {
        Ok(rule)
    } else {
        Err(Problem::forbidden("rule_not_grantable", "the rule asks for no proof that could be shown here"))
    }
}

async fn required(
    verifier: &Verifier,
    rule: &Rule,
    chain: &[CertificateDer<'static>],
    asked: &Asked<'_>,
    target: Option<Target>,
) -> Result<Proven, Failed> {
    let now = Timestamp::now();
    let mut shown = Vec::new();
    let mut api_key = None;
    for proof in &rule.require {
        let result = match proof {
            Proof::Mtls => certificate(verifier, rule, chain, now)
                .map(|found| Some(Shown::Mtls(Box::new(found))))
                .map_err(|problem| (Checked::Mtls, problem)),
            Proof::Token => token(verifier, rule, chain, asked, target.as_ref(), now).await.map(Some),
            Proof::ApiKey => match presented_key(asked.headers) {
                Ok(key) => {
                    api_key = Some(key);
                    Ok(None)
                }
                Err(problem) => Err((Checked::ApiKey, problem)),
            },
            Proof::Cgroup | Proof::Node | Proof::Action | Proof::Approval => Ok(None),
        };
        match result {
            Ok(proven) => shown.extend(proven),
            Err((refused, problem)) => {
                verifier.counts.refused(refused, &problem.reason, &shown);
                return Err(Failed { problem: *problem, shown });
            }
        }
    }
    Ok(Proven { shown, api_key })
}

impl From<Problem> for Failed {
    fn from(problem: Problem) -> Self {
        Self { problem, shown: Vec::new() }
    }
}

type Refused = Box<Problem>;

pub fn certificate(
    verifier: &Verifier,
    rule: &Rule,
    chain: &[CertificateDer<'static>],
    now: Timestamp,
) -> Result<VerifiedCertificate, Refused> {
    if chain.is_empty() {
        return Err(Box::new(Problem::unauthorized(
            "certificate_missing",
            "the rule requires a client certificate, and the connection has none",
        )));
    }
    let only = rule.mtls.as_ref().and_then(|mtls| mtls.authority);
    let authorities: Vec<&Authority> = verifier
        .authorities
        .iter()
        .enumerate()
        .filter(|(index, _)| only.is_none_or(|only| only == *index))
        .filter_map(|(_, authority)| authority.as_ref())
        .collect();
    // Which certificates were revoked on this node, dataplane knows.
    verify_by_any(authorities, chain, Usage::Client, now, &NothingRevoked)
        .map_err(|error| Box::new(Problem::unauthorized(error.reason(), error.to_string())))
}

fn presented_key(headers: &HeaderMap) -> Result<PresentedKey, Refused> {
    let mut values = headers.get_all("x-api-key").iter();
    let missing = || Problem::unauthorized("api_key_missing", "the rule requires an API key, in X-API-Key");
    let value = values.next().ok_or_else(missing)?;
    let malformed = || Problem::unauthorized("api_key_malformed", "this is no API key: it is cut short or mistyped");
    let text = value.to_str().ok().filter(|_| values.next().is_none()).ok_or_else(malformed)?;
    let parts = text::parse(text).ok_or_else(malformed)?;
    Ok(PresentedKey { id: parts.id, hash: parts.digest() })
}

async fn token(
    verifier: &Verifier,
    rule: &Rule,
    chain: &[CertificateDer<'static>],
    asked: &Asked<'_>,
    target: Option<&Target>,
    now: Timestamp,
) -> Result<Shown, (Checked, Refused)> {
    let refused = |problem: Refused| (Checked::Token, problem);
    let misconfigured =
        || refused(Problem::forbidden("rule_not_grantable", "the rule does not say which token").into());
    let requirement = rule.token.as_ref().ok_or_else(misconfigured)?;
    presented(verifier, requirement, &rule.name, chain, asked, target, now).await
}

/// The token of the `Authorization` header, in the right hands.
pub async fn presented(
    verifier: &Verifier,
    requirement: &TokenRequirement,
    rule: &str,
    chain: &[CertificateDer<'static>],
    asked: &Asked<'_>,
    target: Option<&Target>,
    now: Timestamp,
) -> Result<Shown, (Checked, Refused)> {
    let (verified, bound_to) = presented_token(verifier, requirement, rule, chain, asked, target, now).await?;
    Ok(Shown::Token(Box::new(Token::new(&verified, bound_to))))
}

/// The same, with all that it says, and what it is bound to.
pub async fn presented_token(
    verifier: &Verifier,
    requirement: &TokenRequirement,
    rule: &str,
    chain: &[CertificateDer<'static>],
    asked: &Asked<'_>,
    target: Option<&Target>,
    now: Timestamp,
) -> Result<(Arc<VerifiedToken>, Vec<Binding>), (Checked, Refused)> {
    let refused = |problem: Refused| (Checked::Token, problem);
    let misconfigured =
        || refused(Problem::forbidden("rule_not_grantable", "the rule does not say which token").into());
    let issuer = verifier.issuers.get(requirement.issuer).ok_or_else(misconfigured)?;
    let values: Vec<&[u8]> = asked.headers.get_all(header::AUTHORIZATION).iter().map(|v| v.as_bytes()).collect();
    let challenge = |problem: Problem| refused(Box::new(problem.with(header::WWW_AUTHENTICATE, &bearer(None))));
    let credentials =
        scheme::parse(&values).map_err(|error| challenge(Problem::unauthorized(error.reason(), error.to_string())))?;
    let verified = verify(verifier, issuer, requirement, rule, credentials.token, now).await.map_err(refused)?;
    let met = in_right_hands(verifier, &verified, credentials, chain, asked, target, requirement.bound, now).map_err(
        |error| {
            let oauth = error.oauth_error();
            let problem = Problem::unauthorized(error.reason(), error.to_string());
            match error {
                AccessError::Binding(_) => {
                    refused(Box::new(problem.with(header::WWW_AUTHENTICATE, &bearer(Some(oauth)))))
                }
                AccessError::Dpop(_) => {
                    let problem = problem.with(header::WWW_AUTHENTICATE, &dpop_challenge(oauth));
                    // RFC 9449, 8: the next proof has to carry it.
                    let nonce = lock(verifier.nonces()).issue(now);
                    let problem = if oauth == "use_dpop_nonce" { problem.with(DPOP_NONCE, &nonce) } else { problem };
                    (Checked::Dpop, Box::new(problem))
                }
            }
        },
    )?;
    let bound = [(met.certificate, Binding::Certificate), (met.dpop, Binding::Dpop)];
    let bound_to = bound.into_iter().filter(|(met, _)| *met).map(|(_, binding)| binding).collect();
    Ok((verified, bound_to))
}

/// The token itself, whoever presents it. Remembered for a short time, for this rule.
pub async fn verify(
    verifier: &Verifier,
    issuer: &Issuer,
    requirement: &TokenRequirement,
    rule: &str,
    token: &str,
    now: Timestamp,
) -> Result<Arc<VerifiedToken>, Refused> {
    let key = Digest::of(format!("{}\n{}\n{rule}\n{token}", issuer.policy.name, issuer.policy.issuer).as_bytes());
    if let Some(found) = verifier.remembered(&key, now) {
        verifier.counts.cached_token();
        return Ok(found);
    }
    let expected = Expected {
        audience: requirement.audience.as_deref(),
        scopes: &requirement.scopes,
        subjects: &requirement.subjects,
    };
    let verified = match &issuer.method {
        Method::Keys(keys) => jwt::verify(token, keys, &issuer.policy, &expected, now).map_err(of_token)?,
        Method::Published(published) => {
            published.first(now).await;
            let mut result = with_published(published, token, issuer, &expected, now);
            if matches!(&result, Err(TokenFailure::Token(TokenError::Key(SelectError::UnknownKid)))) {
                published.after_unknown_kid().await;
                result = with_published(published, token, issuer, &expected, now);
            }
            result.map_err(|failure| match failure {
                TokenFailure::Token(error) => of_token(error),
                TokenFailure::Keys(error) => {
                    Box::new(Problem::new(StatusCode::SERVICE_UNAVAILABLE, error.reason(), error.to_string()))
                }
            })?
        }
        Method::Introspection { url, client } => {
            ask_issuer(verifier, issuer, url, client, token, &expected, now).await?
        }
        Method::Unusable(_) => {
            let message = "the issuer's settings are wrong; the log says how";
            return Err(Box::new(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "issuer_misconfigured", message)));
        }
    };
    let until = introspection::reuse_until(&verified, TOKEN_CACHE, now);
    let verified = Arc::new(verified);
    verifier.remember(key, verified.clone(), until, now);
    Ok(verified)
}

enum TokenFailure {
    Token(TokenError),
    Keys(crate::proofs::jwks_cache::KeysError),
}

fn with_published(
    published: &fetch::Published,
    token: &str,
    issuer: &Issuer,
    expected: &Expected<'_>,
    now: Timestamp,
) -> Result<VerifiedToken, TokenFailure> {
    let keys = published.keys(now).map_err(TokenFailure::Keys)?;
    jwt::verify(token, &keys, &issuer.policy, expected, now).map_err(TokenFailure::Token)
}

async fn ask_issuer(
    verifier: &Verifier,
    issuer: &Issuer,
    url: &str,
    auth: &introspection::ClientAuth,
    token: &str,
    expected: &Expected<'_>,
    now: Timestamp,
) -> Result<VerifiedToken, Refused> {
    let refused = |error: IntrospectionError| {
        let problem = Problem::unauthorized(error.reason(), error.to_string());
        Box::new(problem.with(header::WWW_AUTHENTICATE, &bearer(Some(error.oauth_error()))))
    };
    let failed =
        |error: FetchError| Box::new(Problem::new(StatusCode::SERVICE_UNAVAILABLE, error.reason(), error.to_string()));
    let request = introspection::request(token, auth).map_err(refused)?;
    let client = issuer.client.as_ref().ok_or_else(|| failed(FetchError::Url(url.to_owned())))?;
    let answer = fetch::introspect(client, url, issuer.allow_private, request).await;
    let verified = answer.map(|answer| {
        introspection::verify(token, &answer, &issuer.policy, expected, TOKEN_CACHE, now).map_err(refused)
    });
    verifier.counts.fetch(
        &issuer.policy.name,
        Fetched::Introspection,
        match &verified {
            // Whatever it says of the token is an answer, if it can be read.
            Ok(Err(problem)) if problem.reason == "introspection_malformed" => &problem.reason,
            Ok(_) => OK,
            Err(error) => error.reason(),
        },
    );
    verified.map_err(failed)?
}

/// Whether who presents the token has the keys that it is bound to; a DPoP proof is good for this request only.
#[expect(clippy::too_many_arguments, reason = "each is one thing that the request consists of")]
fn in_right_hands(
    verifier: &Verifier,
    token: &VerifiedToken,
    credentials: Credentials<'_>,
    chain: &[CertificateDer<'static>],
    asked: &Asked<'_>,
    target: Option<&Target>,
    bound: bool,
    now: Timestamp,
) -> Result<Met, AccessError> {
    let proofs: Vec<&[u8]> = asked.headers.get_all("dpop").iter().map(|v| v.as_bytes()).collect();
    let nowhere;
    let target = match (target, credentials.scheme) {
        (Some(target), _) => target,
        // A host that is not this listener's: the proof was made for somebody else.
        (None, Scheme::Dpop) => return Err(DpopError::Target.into()),
        (None, Scheme::Bearer) => {
            nowhere = Target::parse("https://invalid/").map_err(|_| DpopError::Target)?;
            &nowhere
        }
    };
    let access = {
        let nonces = lock(verifier.nonces());
        let shown = access::Shown {
            credentials,
            certificate: chain.first().map(|leaf| binding::certificate_hash(leaf)),
            proofs: &proofs,
            method: asked.method,
            target,
            nonces: Some(&nonces),
        };
        access::check(token, &shown, bound, &ProofPolicy::default(), now)?
    };
    if let Some(proof) = &access.proof {
        lock(verifier.replays()).admit(proof, now).map_err(DpopError::from)?;
    }
    Ok(access.met)
}

pub const DPOP_NONCE: header::HeaderName = header::HeaderName::from_static("dpop-nonce");

fn of_token(error: TokenError) -> Refused {
    let problem = Problem::unauthorized(error.reason(), error.to_string());
    Box::new(problem.with(header::WWW_AUTHENTICATE, &bearer(Some(error.oauth_error()))))
}

/// RFC 6750, 3.
fn bearer(error: Option<&str>) -> String {
    error.map_or_else(|| "Bearer realm=\"authd\"".to_owned(), |e| format!("Bearer realm=\"authd\", error=\"{e}\""))
}

pub const DPOP_ALGORITHMS: [&str; 5] = ["ES256", "ES384", "EdDSA", "PS256", "RS256"];

/// RFC 9449, 7.1.
fn dpop_challenge(error: &str) -> String {
    format!("DPoP error=\"{error}\", algs=\"{}\"", DPOP_ALGORITHMS.join(" "))
}

/// What a proof of this request has to name: this listener, by a name of its certificate, or the Unix socket.
pub fn target_of(verifier: &Verifier, caller: &Caller, uri: &Uri, headers: &HeaderMap) -> Option<Target> {
    let path = uri.path();
    match caller {
        Caller::Local { tcp: true, .. } => {
            let host = headers.get(header::HOST).and_then(|host| host.to_str().ok())?;
            Target::parse(&format!("http://{host}{path}")).ok()
        }
        Caller::Local { .. } | Caller::Admin { .. } => Target::parse(&format!("http://{LOCAL_HOST}{path}")).ok(),
        Caller::Remote { .. } => {
            // HTTP/2 has it in the request, HTTP/1.1 in a header.
            let host = uri
                .authority()
                .map(|authority| authority.as_str().to_owned())
                .or_else(|| headers.get(header::HOST).and_then(|host| host.to_str().ok()).map(str::to_owned))?;
            let authority: axum::http::uri::Authority = host.parse().ok()?;
            let name = authority.host().trim_start_matches('[').trim_end_matches(']');
            verifier.is_called(name).then(|| Target::parse(&format!("https://{host}{path}")).ok()).flatten()
        }
    }
}

/// What a certificate is worth, for those who ask.
#[derive(Serialize, ToSchema)]
pub struct CertificateView {
    /// Whether an authority of the policy vouches for it now.
    accepted: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    authority: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    not_after: Option<String>,
}

pub fn view_of(session: &Session) -> Option<CertificateView> {
    if session.chain.is_empty() {
        return None;
    }
    let verifier = session.shared.verifier()?;
    let authorities = verifier.authorities.iter().flatten();
    Some(match verify_by_any(authorities, &session.chain, Usage::Client, Timestamp::now(), &NothingRevoked) {
        Ok(found) => CertificateView {
            accepted: true,
            reason: None,
            authority: Some(found.authority),
            spiffe_id: found.spiffe_id.map(|id| id.as_str().to_owned()),
            subject: Some(found.subject),
            not_after: Some(found.not_after.to_string()),
        },
        Err(error) => CertificateView {
            accepted: false,
            reason: Some(error.reason().to_owned()),
            authority: None,
            spiffe_id: None,
            subject: None,
            not_after: None,
        },
    })
}
