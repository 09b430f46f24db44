//! Token exchange (RFC 8693), and what others need to verify this node's tokens (RFC 7517, RFC 8414).
//!
//! Enters: a form with somebody's token, and what the caller shows that it holds. Leaves: a token of this node's own, which
//! dataplane decided about and signed. Never: a key that signs, or a caller that the request names: who acts is known by its cgroup
//! or its certificate.

use std::{borrow::Cow, sync::Arc, time::Duration};

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{OriginalUri, rejection::BytesRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    Answer,
    api::{Session, confused},
    issuers,
    problem::Problem,
    prove::{self, DPOP_NONCE},
    verifier::{Verifier, lock},
};
use crate::{
    ipc::{self, Caller, FromControl},
    policy::model::{Actor, Delegation, Model, TokenRequirement},
    proofs::{
        binding,
        claims::{Confirmation, VerifiedToken},
        dpop::{self, DpopError, Proof, ProofPolicy},
        exchange::Asked,
        x509::{
            chain::{Usage, verify_by_any},
            crl::NothingRevoked,
            identity::VerifiedCertificate,
            spiffe::SpiffeId,
        },
    },
};

const GRANT_TYPE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
const JWT: &str = "urn:ietf:params:oauth:token-type:jwt";
/// Values of `audience` and `resource` together, and words of `scope`.
const MAX_ASKED: usize = 64;
/// For whom verification is remembered, beside rules: no rule can be called so.
const CACHED_FOR: &str = "token exchange";

/// RFC 8693, 2.2.1.
#[derive(Serialize, ToSchema)]
pub struct TokenAnswer {
    access_token: String,
    issued_token_type: &'static str,
    /// `DPoP`, or `Bearer`: then only the certificate of the connection proves whose it is.
    token_type: &'static str,
    /// Seconds from now.
    expires_in: u64,
    scope: String,
}

/// RFC 6749, 5.2; with a reason, as all answers have it.
#[derive(Serialize, ToSchema)]
pub struct TokenError {
    error: &'static str,
    error_description: String,
    /// Stable name; docs/REASONS.md lists them.
    reason: String,
    #[serde(skip)]
    #[schema(ignore)]
    status: u16,
    #[serde(skip)]
    #[schema(ignore)]
    headers: HeaderMap,
}

impl TokenError {
    fn request(reason: &str, description: impl Into<String>) -> Self {
        Self {
            error: "invalid_request",
            error_description: description.into(),
            reason: reason.to_owned(),
            status: StatusCode::BAD_REQUEST.as_u16(),
            headers: HeaderMap::new(),
        }
    }

    /// What was refused elsewhere. Nothing but the client itself is a matter of authentication here: a token that is worth nothing
    /// makes the request invalid (RFC 8693, 2.2.2).
    fn of(problem: Problem) -> Self {
        let (error, status) = match problem.reason.as_str() {
            "exchange_audience" => ("invalid_target", StatusCode::BAD_REQUEST),
            "exchange_scope" => ("invalid_scope", StatusCode::BAD_REQUEST),
            "exchange_not_allowed" => ("unauthorized_client", StatusCode::BAD_REQUEST),
            "caller_unmanaged" | "exchange_unknown_actor" | "local_caller" => {
                ("invalid_client", StatusCode::UNAUTHORIZED)
            }
            "use_dpop_nonce" => ("use_dpop_nonce", StatusCode::BAD_REQUEST),
            _ if problem.status >= 500 => ("temporarily_unavailable", StatusCode::SERVICE_UNAVAILABLE),
            "exchange_unavailable" | "tokens_full" | "too_many_tokens" | "store_unusable" => {
                ("temporarily_unavailable", StatusCode::SERVICE_UNAVAILABLE)
            }
            _ => ("invalid_request", StatusCode::BAD_REQUEST),
        };
        Self {
            error,
            error_description: problem.detail,
            reason: problem.reason,
            status: status.as_u16(),
            headers: HeaderMap::new(),
        }
    }
}

impl IntoResponse for TokenError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::BAD_REQUEST);
        let headers = self.headers.clone();
        (status, headers, Json(self)).into_response()
    }
}

/// Exchange somebody's token for a narrower one of the caller's own (RFC 8693).
///
/// The caller is a workload of this node, known by its cgroup, or a peer, known by the certificate of its connection. The new
/// token is bound to that certificate (RFC 8705), to the key of the `DPoP` header (RFC 9449), or to both; to nothing it is not given.
#[utoipa::path(
    post, path = "/v1/token",
    request_body(
        content = String, content_type = "application/x-www-form-urlencoded",
        description = "`grant_type`, `subject_token`, `subject_token_type`; perhaps `audience`, `resource`, `scope`, \
                       `requested_token_type`, and `expires_in`, a shorter life in seconds"
    ),
    responses(
        (status = 200, body = TokenAnswer),
        (status = 400, body = TokenError, description = "RFC 6749, 5.2"),
        (status = 401, body = TokenError, description = "The caller is nobody of the policy"),
        (status = 503, body = TokenError),
    )
)]
pub async fn post_token(
    Extension(session): Extension<Arc<Session>>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    let request = prove::Asked { method: "POST", uri: &uri, headers: &headers };
    let exchange = match ready(&session, &request, body).await {
        Ok(exchange) => exchange,
        Err(error) => {
            let reason = error.reason.clone();
            let refused =
                FromControl::Refused { connection: session.connection, rule: None, reason, proofs: Vec::new() };
            session.shared.tell(refused).await;
            return error.into_response();
        }
    };
    let connection = session.connection;
    let exchange = Box::new(exchange);
    match session.shared.ask(|question| FromControl::Exchange { question, connection, exchange }).await {
        Answer::Exchanged(token) => answer(*token).into_response(),
        Answer::Refused(refusal) => TokenError::of(Problem::of(refusal)).into_response(),
        _ => confused().into_response(),
    }
}

fn answer(token: ipc::ExchangedToken) -> Json<TokenAnswer> {
    let left = token.expires.as_second() - Timestamp::now().as_second();
    Json(TokenAnswer {
        access_token: token.text,
        issued_token_type: ACCESS_TOKEN,
        token_type: if token.dpop { "DPoP" } else { "Bearer" },
        expires_in: left.try_into().unwrap_or(0),
        scope: token.scopes.join(" "),
    })
}

/// Everything that can be found out without dataplane.
async fn ready(
    session: &Session,
    request: &prove::Asked<'_>,
    body: Result<Bytes, BytesRejection>,
) -> Result<ipc::Exchange, TokenError> {
    let form = Form::read(request.headers, body)?;
    let verifier = prove::verifier_of(session).map_err(TokenError::of)?;
    if verifier.own_issuer.is_none() {
        let problem =
            Problem::forbidden("exchange_unavailable", "this node issues no tokens: its settings name no issuer");
        return Err(TokenError::of(problem));
    }
    let now = Timestamp::now();
    let proof = key_proof(session, &verifier, request, now)?;
    let certificate = certificate(session, &verifier, now)?;
    let subject = verified(&verifier, &session.caller, certificate.as_ref(), &form.subject_token, now).await?;
    if let Some(proof) = &proof {
        let admitted = lock(verifier.replays()).admit(proof, now);
        admitted.map_err(|error| of_dpop(&verifier, DpopError::from(error), now))?;
    }
    let holds = Confirmation {
        x5t_s256: session.chain.first().map(|leaf| binding::certificate_hash(leaf)),
        jkt: proof.map(|proof| proof.jkt),
    };
    Ok(ipc::Exchange { subject, asked: form.asked, holds, certificate: certificate.map(Box::new) })
}

/// What the DPoP header shows, if there is one.
fn key_proof(
    session: &Session,
    verifier: &Verifier,
    request: &prove::Asked<'_>,
    now: Timestamp,
) -> Result<Option<Proof>, TokenError> {
    let proofs: Vec<&[u8]> = request.headers.get_all("dpop").iter().map(|value| value.as_bytes()).collect();
    if proofs.is_empty() {
        return Ok(None);
    }
    let refused = |error| of_dpop(verifier, error, now);
    let target = prove::target_of(verifier, &session.caller, request.uri, request.headers);
    let target = target.ok_or_else(|| refused(DpopError::Target))?;
    let single = dpop::single(&proofs).map_err(refused)?;
    let verified = {
        let nonces = lock(verifier.nonces());
        let about =
            dpop::Request { method: request.method, target: &target, access_token: None, nonces: Some(&nonces) };
        dpop::verify(single, &about, &ProofPolicy::default(), now)
    };
    verified.map(Some).map_err(refused)
}

/// RFC 9449, 5 and 8.
fn of_dpop(verifier: &Verifier, error: DpopError, now: Timestamp) -> TokenError {
    let wants_nonce = error.oauth_error() == "use_dpop_nonce";
    let mut answer = TokenError {
        error: if wants_nonce { "use_dpop_nonce" } else { "invalid_dpop_proof" },
        ..TokenError::request(error.reason(), error.to_string())
    };
    if wants_nonce && let Ok(nonce) = HeaderValue::from_str(&lock(verifier.nonces()).issue(now)) {
        answer.headers.insert(DPOP_NONCE, nonce);
    }
    answer
}

/// A caller elsewhere is whom its certificate names; one of this node need not show any.
fn certificate(
    session: &Session,
    verifier: &Verifier,
    now: Timestamp,
) -> Result<Option<VerifiedCertificate>, TokenError> {
    if session.chain.is_empty() || !matches!(session.caller, Caller::Remote { .. }) {
        return Ok(None);
    }
    let authorities = verifier.authorities.iter().flatten();
    match verify_by_any(authorities, &session.chain, Usage::Client, now, &NothingRevoked) {
        Ok(found) => Ok(Some(found)),
        Err(error) => Err(TokenError {
            error: "invalid_client",
            status: StatusCode::UNAUTHORIZED.as_u16(),
            ..TokenError::request(error.reason(), error.to_string())
        }),
    }
}

/// The token, by whichever issuer says that it is its own, of those whose tokens are exchanged here at all.
async fn verified(
    verifier: &Verifier,
    caller: &Caller,
    certificate: Option<&VerifiedCertificate>,
    token: &str,
    now: Timestamp,
) -> Result<VerifiedToken, TokenError> {
    let all = &verifier.model.delegations;
    let of = |delegations: &mut dyn Iterator<Item = &Delegation>| {
        let mut issuers: Vec<usize> = delegations.map(|delegation| delegation.issuer).collect();
        issuers.sort_unstable();
        issuers.dedup();
        issuers
    };
    let about_caller = |delegation: &&Delegation| may_be_about(&verifier.model, delegation, caller, certificate);
    let issuers = issuers::of_token(verifier, token, &of(&mut all.iter()), &of(&mut all.iter().filter(about_caller)));
    let issuers = issuers.map_err(|error| {
        let message = "the token names no issuer, and the caller's delegations are of several that could be asked about it: \
                       show a JWT with `iss`, or let the policy have one such issuer for this caller";
        TokenError::request(error.reason(), message)
    })?;
    let mut refused = None;
    for index in issuers {
        let Some(issuer) = verifier.issuers.get(index) else { continue };
        let asked = TokenRequirement { issuer: index, audience: None, scopes: vec![], bound: false, subjects: vec![] };
        match prove::verify(verifier, issuer, &asked, CACHED_FOR, token, now).await {
            Ok(found) => return Ok((*found).clone()),
            Err(problem) => drop(refused.get_or_insert(problem)),
        }
    }
    Err(match refused {
        Some(problem) => TokenError::of(*problem),
        None => TokenError::request("issuer_unknown", "the policy exchanges no tokens of this issuer"),
    })
}

/// Whether a delegation may let the caller act. Which one does, dataplane finds: it knows who is connected.
fn may_be_about(
    model: &Model,
    delegation: &Delegation,
    caller: &Caller,
    certificate: Option<&VerifiedCertificate>,
) -> bool {
    delegation.actors.iter().any(|actor| match (*actor, caller) {
        (Actor::Workload(index), Caller::Local { workload: Some(workload), .. }) => {
            model.workloads.get(index).is_some_and(|known| known.name == workload.name)
        }
        (Actor::Peer(index), Caller::Remote { vouched, .. }) => {
            let shown = certificate.and_then(|certificate| certificate.spiffe_id.as_ref()).map(SpiffeId::as_str);
            let named = shown.or(vouched.as_ref().map(|vouched| vouched.spiffe_id.as_str()));
            let peer = model.peers.get(index).and_then(|peer| peer.spiffe_id.as_ref()).map(SpiffeId::as_str);
            peer.is_some() && peer == named
        }
        _ => false,
    })
}

/// The request's parameters.
#[derive(Debug)]
struct Form {
    subject_token: String,
    asked: Asked,
}

impl Form {
    fn read(headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<Self, TokenError> {
        let body = body.map_err(|rejection| TokenError::request("bad_request", rejection.body_text()))?;
        let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
            return Err(TokenError::request("bad_request", "send a form: application/x-www-form-urlencoded"));
        }
        Self::parse(&body)
    }

    fn parse(body: &[u8]) -> Result<Self, TokenError> {
        let bad = |message: &str| TokenError::request("bad_request", message);
        let mut single: [(&str, Option<String>); 8] = [
            ("grant_type", None),
            ("subject_token", None),
            ("subject_token_type", None),
            ("requested_token_type", None),
            ("scope", None),
            ("expires_in", None),
            ("actor_token", None),
            ("actor_token_type", None),
        ];
        let mut audience = Vec::new();
        for (name, value) in form_urlencoded::parse(body) {
            match (single.iter_mut().find(|(known, _)| *known == name), &*name) {
                // RFC 6749, 3.1: a parameter without a value counts as left out.
                _ if value.is_empty() => {}
                (Some((_, slot @ None)), _) => *slot = Some(value.into_owned()),
                (Some(_), _) => return Err(bad("a parameter stands there twice")),
                (None, "audience") => audience.push(value.into_owned()),
                (None, "resource") => audience.push(resource(value)?),
                // RFC 6749, 3.2: others are ignored.
                (None, _) => {}
            }
        }
        let [grant_type, subject_token, subject_type, requested, scope, expires_in, actor, actor_type] =
            single.map(|(_, value)| value);
        match grant_type.as_deref() {
            Some(GRANT_TYPE) => {}
            Some(_) => {
                let error = bad("tokens are exchanged here, and not given in other ways");
                return Err(TokenError { error: "unsupported_grant_type", ..error });
            }
            None => return Err(bad("`grant_type` is missing")),
        }
        let known = |kind: &String| matches!(kind.as_str(), ACCESS_TOKEN | JWT);
        let subject_token = subject_token.ok_or_else(|| bad("`subject_token` is missing"))?;
        if !subject_type.as_ref().is_some_and(known) {
            return Err(bad("`subject_token_type` has to be that of an access token or a JWT"));
        }
        if !requested.iter().all(known) {
            return Err(bad("access tokens are given here, and no others"));
        }
        if actor.is_some() || actor_type.is_some() {
            return Err(bad("who acts is known by its cgroup or certificate: leave `actor_token` away"));
        }
        let lifetime = expires_in.map(|text| text.parse().map(Duration::from_secs)).transpose();
        let lifetime = lifetime.map_err(|_| bad("`expires_in` is no number of seconds"))?;
        let scopes: Option<Vec<String>> = scope.map(|text| text.split(' ').map(str::to_owned).collect());
        if audience.len() > MAX_ASKED || scopes.as_ref().is_some_and(|scopes| scopes.len() > MAX_ASKED) {
            return Err(bad("more is asked for than a token can say"));
        }
        audience.sort();
        audience.dedup();
        Ok(Self { subject_token, asked: Asked { audience, scopes, lifetime } })
    }
}

/// RFC 8707, 2: an absolute URI without a fragment.
fn resource(value: Cow<'_, str>) -> Result<String, TokenError> {
    let is_one = fluent_uri::Uri::parse(&*value).is_ok_and(|uri| !uri.has_fragment());
    let error = || TokenError::request("exchange_audience", "`resource` is no absolute URI without a fragment");
    if is_one { Ok(value.into_owned()) } else { Err(TokenError { error: "invalid_target", ..error() }) }
}

/// The keys by which this node's tokens are verified (RFC 7517, 5).
#[utoipa::path(get, path = "/v1/jwks", responses((status = 200), (status = 404, body = Problem)))]
pub async fn jwks(Extension(session): Extension<Arc<Session>>) -> Result<Response, Problem> {
    let verifier = prove::verifier_of(&session)?;
    let own = verifier.own_issuer.as_ref().ok_or_else(no_issuer)?;
    let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/jwk-set+json"))];
    Ok((kind, own.keys.clone()).into_response())
}

/// What this node is as an authorization server (RFC 8414, 3).
#[utoipa::path(
    get, path = "/.well-known/oauth-authorization-server", responses((status = 200), (status = 404, body = Problem))
)]
pub async fn metadata(Extension(session): Extension<Arc<Session>>) -> Result<Response, Problem> {
    let verifier = prove::verifier_of(&session)?;
    let own = verifier.own_issuer.as_ref().ok_or_else(no_issuer)?;
    let url = &own.url;
    Ok(Json(serde_json::json!({
        "issuer": url,
        "token_endpoint": format!("{url}/v1/token"),
        "jwks_uri": format!("{url}/v1/jwks"),
        "grant_types_supported": [GRANT_TYPE],
        "response_types_supported": [],
        "token_endpoint_auth_methods_supported": ["tls_client_auth"],
        "tls_client_certificate_bound_access_tokens": true,
        "dpop_signing_alg_values_supported": prove::DPOP_ALGORITHMS,
    }))
    .into_response())
}

fn no_issuer() -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "exchange_unavailable",
        "this node issues no tokens: its settings name no issuer",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::Workload;

    const BASE: &str = "grant_type=urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Atoken-exchange&subject_token=t\
                        &subject_token_type=urn:ietf:params:oauth:token-type:access_token";

    fn parse(more: &str) -> Result<Form, (&'static str, String)> {
        Form::parse(format!("{BASE}{more}").as_bytes()).map_err(|error| (error.error, error.error_description))
    }

    #[test]
    fn a_request_says_what_it_wants_once() {
        let form =
            parse("&audience=b&resource=https://a.example/x&audience=b&scope=r+w&expires_in=60&other=1").unwrap();
        let asked = Asked {
            audience: vec!["b".into(), "https://a.example/x".into()],
            scopes: Some(vec!["r".into(), "w".into()]),
            lifetime: Some(Duration::from_secs(60)),
        };
        assert_eq!((form.subject_token.as_str(), form.asked), ("t", asked));
        assert_eq!(parse("&scope=&audience=").unwrap().asked, Asked::default());
        for (more, error) in [
            ("&scope=a&scope=a", "invalid_request"),
            ("&subject_token=u", "invalid_request"),
            ("&grant_type=x", "invalid_request"),
            ("&requested_token_type=urn:ietf:params:oauth:token-type:refresh_token", "invalid_request"),
            ("&actor_token=x&actor_token_type=urn:ietf:params:oauth:token-type:jwt", "invalid_request"),
            ("&actor_token_type=urn:ietf:params:oauth:token-type:jwt", "invalid_request"),
            ("&expires_in=-1", "invalid_request"),
            ("&expires_in=1.5", "invalid_request"),
            ("&resource=x", "invalid_target"),
            // A fragment once it is decoded, and one that is not.
            ("&resource=https://a.example/%23x", "invalid_target"),
            ("&resource=https://a.example/x%2523", "ok"),
        ] {
            assert_eq!(parse(more).map_or_else(|(error, _)| error, |_| "ok"), error, "{more}");
        }
        assert_eq!(parse(&"&audience=a".repeat(65)).unwrap_err().0, "invalid_request");
    }

    #[tokio::test]
    async fn a_token_that_names_no_issuer_is_shown_to_the_only_one_that_is_asked() {
        let refused = async |agents: &[&str], caller: &str, token: &str| {
            let verifier = issuers::tests::verifier(agents, &[]);
            let workload = Workload {
                name: caller.to_owned(),
                spiffe_id: format!("spiffe://example.org/{caller}"),
                cgroup: format!("/{caller}"),
            };
            let caller = Caller::Local { workload: Some(workload), uid: 1000, tcp: false };
            let error = verified(&verifier, &caller, None, token, Timestamp::now()).await.err().unwrap();
            (error.error, error.reason)
        };
        let ambiguous = ("invalid_request", "issuer_ambiguous".to_owned());
        // Their secrets are not there: whoever would be asked is not.
        let asked = ("temporarily_unavailable", "issuer_misconfigured".to_owned());
        assert_eq!(refused(&["first", "second"], "agent", "opaque").await, ambiguous);
        assert_eq!(refused(&["first", "third"], "agent", "opaque").await, asked);
        assert_eq!(refused(&["first"], "other", "opaque").await, asked);
        let named = issuers::tests::naming("https://second.example");
        assert_eq!(refused(&["first", "second"], "agent", &named).await, asked);
    }

    #[test]
    fn what_lacks_is_said() {
        for (body, error) in [
            ("", "invalid_request"),
            ("grant_type=client_credentials", "unsupported_grant_type"),
            ("grant_type=urn:ietf:params:oauth:grant-type:token-exchange", "invalid_request"),
            ("grant_type=urn:ietf:params:oauth:grant-type:token-exchange&subject_token=t", "invalid_request"),
            (
                "grant_type=urn:ietf:params:oauth:grant-type:token-exchange&subject_token=t\
                 &subject_token_type=urn:ietf:params:oauth:token-type:id_token",
                "invalid_request",
            ),
        ] {
            assert_eq!(Form::parse(body.as_bytes()).unwrap_err().error, error, "{body}");
        }
    }
}
