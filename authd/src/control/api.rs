//! The HTTP interface: what can be asked, and its description.
//!
//! Enters: requests whose connection is known. Leaves: answers, and problems with a stable reason. Never: a decision; proofs
//! are verified in [`super::prove`], and grants are given by dataplane.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, OriginalUri, Path, Request, rejection::BytesRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::{any, delete, get, post},
};
use hyper::body::Body as _;
use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::time::timeout;
use utoipa::{OpenApi, ToSchema};

use super::{
    Answer, Shared, actions, approvals, forward, listed, mcp, nodes, problem::Problem, prove, token, verifier::Share,
};
use crate::{
    daemon::granting::Effect,
    grants::Id,
    ipc::{Caller, Connection, FromControl, Granted, NodeKey, VouchedCaller, Wanted},
    store::revoked::Revoked,
};

/// The body of a request.
const BODY_BYTES: usize = 16 << 10;
/// From a request's headers to its answer.
const REQUEST: Duration = Duration::from_secs(15);

/// Who asks, as long as a connection lasts.
pub struct Session {
    pub shared: Arc<Shared>,
    pub connection: Connection,
    pub caller: Caller,
    /// The certificates that the caller showed, its own first; it has that one's key.
    pub chain: Vec<CertificateDer<'static>>,
    /// What both ends of the connection have in common: of callers elsewhere, over TLS 1.3.
    pub exported: Option<NodeKey>,
    /// Dataplane knows the connection for as long as this.
    _open: Arc<Open>,
}

/// Dataplane hears that a connection is over when nobody acts as whoever had it: streams that it became go on without it.
pub struct Open {
    shared: Arc<Shared>,
    connection: Connection,
}

impl Open {
    pub fn new(shared: Arc<Shared>, connection: Connection) -> Arc<Self> {
        Arc::new(Self { shared, connection })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let (shared, connection) = (self.shared.clone(), self.connection);
        tokio::spawn(async move { shared.tell(FromControl::Closed { connection }).await });
    }
}

impl Session {
    pub fn new(
        open: Arc<Open>,
        caller: Caller,
        chain: Vec<CertificateDer<'static>>,
        exported: Option<NodeKey>,
    ) -> Self {
        Self { shared: open.shared.clone(), connection: open.connection, caller, chain, exported, _open: open }
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct GrantRequest {
    /// Name of the rule whose proofs are shown.
    rule: String,
    /// How long the grant should live; at most as long as the rule says.
    seconds: Option<u32>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RevocationRequest {
    /// As for `authd revoke`: `token`, `cert`, `spiffe-id` and so on.
    kind: String,
    /// Two values with a space between them for `token` (issuer, id) and `serial` (hash of the issuer, number).
    value: String,
    /// For the record.
    reason: Option<String>,
}

#[derive(Serialize, ToSchema)]
pub struct GrantAnswer {
    id: String,
    rule: String,
    /// RFC 3339.
    until: String,
    /// Seconds from now.
    expires_in: u64,
}

impl From<Granted> for GrantAnswer {
    fn from(grant: Granted) -> Self {
        let left = grant.until.as_second() - Timestamp::now().as_second();
        Self {
            id: grant.id.to_string(),
            rule: grant.rule,
            until: grant.until.to_string(),
            expires_in: left.try_into().unwrap_or(0),
        }
    }
}

#[derive(Serialize, ToSchema)]
struct WhoAmI {
    /// `workload`, `unmanaged`, `peer` or `admin`.
    caller: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cgroup: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    /// Another node that runs authd, which vouches that the caller is `spiffe_id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    /// What the client's certificate is worth here, if it showed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    certificate: Option<prove::CertificateView>,
    grants: Vec<GrantAnswer>,
}

#[derive(OpenApi)]
#[openapi(
    info(title = "authd", description = "Shows proofs to authd, which lets the kernel carry the result."),
    paths(
        post_grant,
        delete_grant,
        get_grants,
        post_revocation,
        actions::post_action,
        approvals::get_approvals,
        approvals::get_approval,
        approvals::grant,
        approvals::deny,
        token::post_token,
        token::jwks,
        token::metadata,
        nodes::admit::post_node_session,
        who_am_i,
        health,
        ready,
        forward::envoy,
        forward::nginx
    ),
    components(schemas(Problem))
)]
struct Description;

/// The description that is served, for those who want it without a daemon.
pub fn description() -> String {
    Description::openapi().to_pretty_json().unwrap_or_default()
}

pub fn router() -> Router {
    Router::new()
        .route("/v1/grants", post(post_grant).get(get_grants))
        .route("/v1/grants/{id}", delete(delete_grant))
        .route("/v1/revocations", post(post_revocation))
        .route("/v1/actions", post(actions::post_action).layer(DefaultBodyLimit::max(actions::BODY_BYTES)))
        .route("/v1/approvals", get(approvals::get_approvals))
        .route("/v1/approvals/{id}", get(approvals::get_approval))
        .route("/v1/approvals/{id}/grant", post(approvals::grant))
        .route("/v1/approvals/{id}/deny", post(approvals::deny))
        .route("/v1/token", post(token::post_token))
        .route("/v1/jwks", get(token::jwks))
        .route("/.well-known/oauth-authorization-server", get(token::metadata))
        .route("/v1/node-sessions", post(nodes::admit::post_node_session))
        .route("/v1/whoami", get(who_am_i))
        .route("/v1/health", get(health))
        .route("/v1/ready", get(ready))
        .route("/v1/openapi.json", get(openapi))
        .route("/v1/forward-auth/envoy/{rule}", any(forward::envoy))
        .route("/v1/forward-auth/envoy/{rule}/{*path}", any(forward::envoy))
        .route("/v1/forward-auth/nginx/{rule}", any(forward::nginx))
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path has other methods")
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .layer(from_fn(in_time))
}

/// With the MCP gateway, whose requests are larger, last longer, and are let in by `access`.
pub fn with_mcp(router: Router, access: Arc<dyn mcp::http::Access>) -> Router {
    router.merge(mcp::http::router(access))
}

/// The gateway alone, for agents that come over TCP. Their browsers may be led here under another name (DNS rebinding).
pub fn on_loopback(access: Arc<dyn mcp::http::Access>) -> Router {
    let nothing = || async { Problem::new(StatusCode::NOT_FOUND, "not_found", "only MCP is spoken here") };
    mcp::http::router(access).fallback(nothing).layer(from_fn(is_meant))
}

async fn is_meant(request: Request, next: Next) -> Response {
    let named = request.uri().authority().map(|authority| authority.as_str());
    let named = named.or_else(|| request.headers().get(header::HOST)?.to_str().ok());
    if named.is_some_and(is_loopback) {
        return next.run(request).await;
    }
    let message = "the request names another host than this one's loopback";
    Problem::new(StatusCode::MISDIRECTED_REQUEST, "mcp_host", message).into_response()
}

fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|octet| octet.is_ascii_digit()) => host,
        _ => authority,
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Every request has its time, and every caller its share.
async fn in_time(Extension(session): Extension<Arc<Session>>, request: Request, next: Next) -> Response {
    let Some(verifier) = session.shared.verifier() else {
        return Problem::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "there are no settings yet")
            .into_response();
    };
    let share = match request.uri().path().starts_with("/v1/forward-auth/") {
        true => Share::Proxy,
        false => Share::Caller,
    };
    if !verifier.admit(&session.caller, share, Timestamp::now()) {
        return Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", "ask less often")
            .with(header::RETRY_AFTER, "1")
            .into_response();
    }
    // What is announced as too long is not waited for.
    let most = if request.uri().path() == "/v1/actions" { actions::BODY_BYTES } else { BODY_BYTES };
    if request.body().size_hint().lower() > most as u64 {
        return too_long().with(header::CONNECTION, "close").into_response();
    }
    let mut response = match timeout(REQUEST, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(StatusCode::SERVICE_UNAVAILABLE, "request_timeout", "the request took too long")
            .into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn too_long() -> Problem {
    let detail = format!("the body is longer than {BODY_BYTES} bytes, or for an action, than {}", actions::BODY_BYTES);
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "request_oversize", detail)
}

/// The whole body.
pub fn whole(body: Result<Bytes, BytesRejection>) -> Result<Bytes, Problem> {
    body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => too_long(),
        _ => Problem::bad_request("bad_request", rejection.body_text()),
    })
}

/// The same as JSON.
pub fn read<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>, what: &str) -> Result<T, Problem> {
    let body = whole(body)?;
    let bad = |error| Problem::bad_request("bad_request", format!("the body is no request for {what}: {error}"));
    serde_json::from_slice(&body).map_err(bad)
}

/// Show proofs for a rule, and get a grant: connections that the rule allows pass until it ends.
///
/// Proofs are the client certificate of the connection, the `Authorization` header (Bearer or DPoP, with a `DPoP` header) and
/// the `X-API-Key` header, as the rule asks for them. Whose grant it is, is not asked: a workload of this node gets it for
/// itself, a peer for the address that it calls from, or, where the rule asks for a node's word, for who that says it is.
#[utoipa::path(
    post, path = "/v1/grants", request_body = GrantRequest,
    responses(
        (status = 201, body = GrantAnswer),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 401, body = Problem, description = "A proof lacks or is refused; the challenge says which",
         content_type = "application/problem+json"),
        (status = 403, body = Problem, description = "Known, and not allowed", content_type = "application/problem+json"),
        (status = 404, body = Problem, description = "No such rule", content_type = "application/problem+json"),
        (status = 503, body = Problem, description = "No room, or not ready", content_type = "application/problem+json"),
    )
)]
async fn post_grant(
    Extension(session): Extension<Arc<Session>>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let asked: GrantRequest = read(body, "a grant")?;
    let settings = session.shared.verifier();
    let request = prove::Asked { method: "POST", uri: &uri, headers: &headers };
    let proven = match prove::for_rule(&session, &asked.rule, &request).await {
        Ok(proven) => proven,
        Err(failed) => {
            let problem = failed.problem;
            let refused = FromControl::Refused {
                connection: session.connection,
                rule: Some(asked.rule),
                reason: problem.reason.clone(),
                proofs: failed.shown,
            };
            session.shared.tell(refused).await;
            return Err(problem);
        }
    };
    let certificate = listed::Name::of(&proven.shown);
    let wanted = Wanted { rule: asked.rule, proofs: proven.shown, api_key: proven.api_key, seconds: asked.seconds };
    let connection = session.connection;
    match session.shared.ask(|question| FromControl::Grant { question, connection, wanted }).await {
        Answer::Granted(grant) => {
            if let Some(name) = certificate {
                listed::granted(&session.shared, settings, name, &session.chain, grant.until).await;
            }
            Ok((StatusCode::CREATED, Json(GrantAnswer::from(grant))).into_response())
        }
        Answer::Refused(refusal) => Err(Problem::of(refusal)),
        _ => Err(confused()),
    }
}

/// Give a grant back. Connections that rest on it are cut.
#[utoipa::path(
    delete, path = "/v1/grants/{id}", params(("id" = String, Path, description = "32 hexadecimal digits")),
    responses((status = 204), (status = 404, body = Problem, content_type = "application/problem+json"))
)]
async fn delete_grant(
    Extension(session): Extension<Arc<Session>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Problem> {
    let unknown = || Problem::new(StatusCode::NOT_FOUND, "grant_unknown", "the caller holds no such grant");
    let grant: Id = id.parse().map_err(|_| unknown())?;
    let connection = session.connection;
    match session.shared.ask(|question| FromControl::Return { question, connection, grant }).await {
        Answer::Returned => Ok(StatusCode::NO_CONTENT),
        Answer::Refused(refusal) => Err(Problem::of(refusal)),
        _ => Err(confused()),
    }
}

/// Revoke something, on the operators' socket: at once, to the packet. Answered when it is in force and on disk.
#[utoipa::path(
    post, path = "/v1/revocations", request_body = RevocationRequest,
    responses(
        (status = 201, body = Effect),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 403, body = Problem, description = "Not an operator", content_type = "application/problem+json"),
    )
)]
async fn post_revocation(
    Extension(session): Extension<Arc<Session>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    if !matches!(session.caller, Caller::Admin { .. }) {
        return Err(Problem::forbidden("not_an_operator", "only operators revoke, on their own socket"));
    }
    let RevocationRequest { kind, value, reason } = read(body, "a revocation")?;
    let what =
        Revoked::parse(&kind, &value).map_err(|error| Problem::bad_request(error.reason(), error.to_string()))?;
    let text = reason.unwrap_or_default();
    let connection = session.connection;
    match session.shared.ask(|question| FromControl::Revoke { question, connection, what, text }).await {
        Answer::Revoked(effect) => Ok((StatusCode::CREATED, Json(effect)).into_response()),
        Answer::Refused(refusal) => Err(Problem::of(refusal)),
        _ => Err(confused()),
    }
}

/// The caller's grants.
#[utoipa::path(get, path = "/v1/grants", responses((status = 200, body = [GrantAnswer])))]
async fn get_grants(Extension(session): Extension<Arc<Session>>) -> Result<Json<Vec<GrantAnswer>>, Problem> {
    Ok(Json(held(&session).await?))
}

/// Who authd takes the caller for.
#[utoipa::path(get, path = "/v1/whoami", responses((status = 200, body = WhoAmI)))]
async fn who_am_i(Extension(session): Extension<Arc<Session>>) -> Result<Json<WhoAmI>, Problem> {
    let grants = held(&session).await?;
    let mut answer = WhoAmI {
        caller: "unmanaged",
        workload: None,
        spiffe_id: None,
        cgroup: None,
        address: None,
        node: None,
        certificate: prove::view_of(&session),
        grants,
    };
    match &session.caller {
        Caller::Local { workload: Some(workload), .. } => {
            answer.caller = "workload";
            answer.workload = Some(workload.name.clone());
            answer.spiffe_id = Some(workload.spiffe_id.clone());
            answer.cgroup = Some(workload.cgroup.clone());
        }
        Caller::Local { workload: None, .. } => {}
        Caller::Admin { .. } => answer.caller = "admin",
        Caller::Remote { address, vouched } => {
            answer.caller = "peer";
            answer.address = Some(address.ip().to_string());
            if let Some(VouchedCaller { node, spiffe_id }) = vouched {
                answer.node = Some(node.clone());
                answer.spiffe_id = Some(spiffe_id.clone());
            }
        }
    }
    Ok(Json(answer))
}

/// Whether the process answers.
#[utoipa::path(get, path = "/v1/health", responses((status = 200)))]
async fn health() -> StatusCode {
    StatusCode::OK
}

/// Whether grants can be given: the enforcing process answers too.
#[utoipa::path(
    get, path = "/v1/ready",
    responses((status = 200), (status = 503, body = Problem, content_type = "application/problem+json"))
)]
async fn ready(Extension(session): Extension<Arc<Session>>) -> Result<StatusCode, Problem> {
    held(&session).await.map(|_| StatusCode::OK)
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], description()).into_response()
}

async fn held(session: &Session) -> Result<Vec<GrantAnswer>, Problem> {
    let connection = session.connection;
    match session.shared.ask(|question| FromControl::Held { question, connection }).await {
        Answer::Holds(grants) => Ok(grants.into_iter().map(GrantAnswer::from).collect()),
        Answer::Refused(refusal) => Err(Problem::of(refusal)),
        _ => Err(confused()),
    }
}

pub fn confused() -> Problem {
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "an answer to another question")
}
