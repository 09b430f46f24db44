//! Forward-auth: a proxy asks whether a request that it received meets a rule.
//!
//! Enters: a subrequest of Envoy's ext_authz (HTTP) or nginx's `auth_request`, from a proxy that is itself known. Leaves: 200
//! with headers that say who the caller is; 401 or 403 with the reason; 503 if nobody can say. Never: an answer that nginx
//! would take for an error of the server (404, 429), and never belief in a header about the client's certificate from
//! somebody who does not offer the service that the rule is about.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{OriginalUri, Path},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, header::HeaderName},
    response::{IntoResponse, Response},
};
use rustls::pki_types::CertificateDer;

use super::{
    Answer,
    api::Session,
    client_certificate,
    problem::Problem,
    prove::{self, Asked},
};
use crate::{
    grants::proof::Shown,
    ipc::{Caller, FromControl, Wanted},
    policy::model::{Model, Object, Rule},
    proofs::dpop::Target,
};

/// The original request's scheme, of either proxy.
const FORWARDED_PROTO: &str = "x-forwarded-proto";
const LONGEST: usize = 256;
/// What an answer says of the caller.
const IDENTITY: [&str; 8] = [
    "x-authd-rule",
    "x-authd-proofs",
    "x-authd-subject",
    "x-authd-client-id",
    "x-authd-scopes",
    "x-authd-spiffe-id",
    "x-authd-certificate-subject",
    "x-authd-api-key",
];

/// Which proxy asks: each is believed in the headers that it sets itself, and in no others, which may be its client's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Proxy {
    Envoy,
    Nginx,
}

impl Proxy {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Envoy => "/v1/forward-auth/envoy/",
            Self::Nginx => "/v1/forward-auth/nginx/",
        }
    }

    /// The client's certificates, as this proxy says them.
    fn chain(self, headers: &HeaderMap) -> Result<Vec<CertificateDer<'static>>, Problem> {
        match self {
            Self::Envoy => text(headers, "x-forwarded-client-cert")?.map(client_certificate::of_envoy),
            Self::Nginx => text(headers, "x-ssl-client-cert")?.map(client_certificate::of_nginx),
        }
        .unwrap_or_else(|| Ok(Vec::new()))
    }
}

/// The request that a proxy asks about.
struct Original<'a> {
    method: &'a str,
    path: &'a str,
    host: Option<&'a str>,
}

impl<'a> Original<'a> {
    fn of(proxy: Proxy, rule: &str, uri: &'a Uri, method: &'a Method, headers: &'a HeaderMap) -> Result<Self, Problem> {
        match proxy {
            Proxy::Envoy => {
                let path = uri.path_and_query().map_or("", |path| path.as_str());
                let after = path.strip_prefix(proxy.prefix()).and_then(|path| path.strip_prefix(rule));
                let path = after.filter(|path| path.starts_with('/')).unwrap_or("/");
                // HTTP/2 has it in the request, HTTP/1.1 in a header.
                let host = uri.authority().map(|authority| authority.as_str());
                Ok(Self { method: method.as_str(), path, host: host.or(text(headers, header::HOST.as_str())?) })
            }
            Proxy::Nginx => {
                let needed = |name: &str| {
                    let missing = || Problem::forbidden("forwarded_header_missing", format!("{name} is not set"));
                    text(headers, name)?.ok_or_else(missing)
                };
                Ok(Self {
                    method: needed("x-original-method")?,
                    path: needed("x-original-uri")?,
                    host: text(headers, "x-forwarded-host")?,
                })
            }
        }
    }
}

/// Ask whether a request meets a rule: Envoy's ext_authz over HTTP, with this path (without the last part) as its prefix.
///
/// Method, path and `Host` are the original request's. `Authorization`, `DPoP`, `X-API-Key`, `X-Forwarded-Proto` and
/// `X-Forwarded-Client-Cert` have to be among the allowed headers. The proxy has to be a workload of this node that offers
/// one of the rule's services.
#[utoipa::path(
    get, path = "/v1/forward-auth/envoy/{rule}/{path}",
    params(("rule" = String, Path), ("path" = String, Path, description = "Of the original request, and its query")),
    responses(
        (status = 200, description = "Allowed. X-Authd-Rule, X-Authd-Subject, X-Authd-Client-Id, X-Authd-Spiffe-Id, \
         X-Authd-Scopes and X-Authd-Proofs say who and why"),
        (status = 401, body = Problem, content_type = "application/problem+json"),
        (status = 403, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn envoy(
    session: Extension<Arc<Session>>,
    parameters: Path<Vec<(String, String)>>,
    uri: OriginalUri,
    method: Method,
    headers: HeaderMap,
) -> Response {
    answer(Proxy::Envoy, session, parameters, uri, method, headers).await
}

/// Ask whether a request meets a rule: nginx's `auth_request`.
///
/// The original request is in `X-Original-Method` and `X-Original-URI`, its host and scheme in `X-Forwarded-Host` and
/// `X-Forwarded-Proto`, its client's certificate in `X-SSL-Client-Cert` (`$ssl_client_escaped_cert`). All of them have to be
/// set by nginx: what it does not set, its clients can.
#[utoipa::path(
    get, path = "/v1/forward-auth/nginx/{rule}", params(("rule" = String, Path)),
    responses(
        (status = 200, description = "Allowed, with the same headers as for Envoy"),
        (status = 401, body = Problem, content_type = "application/problem+json"),
        (status = 403, body = Problem, content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn nginx(
    session: Extension<Arc<Session>>,
    parameters: Path<Vec<(String, String)>>,
    uri: OriginalUri,
    method: Method,
    headers: HeaderMap,
) -> Response {
    answer(Proxy::Nginx, session, parameters, uri, method, headers).await
}

async fn answer(
    proxy: Proxy,
    Extension(session): Extension<Arc<Session>>,
    Path(parameters): Path<Vec<(String, String)>>,
    OriginalUri(uri): OriginalUri,
    method: Method,
    headers: HeaderMap,
) -> Response {
    let name = parameters.into_iter().find(|(name, _)| name == "rule").map(|(_, rule)| rule).unwrap_or_default();
    match decide(proxy, &session, &name, &uri, &method, &headers).await {
        Ok(response) => response,
        Err(problem) => for_proxies(problem).into_response(),
    }
}

async fn decide(
    proxy: Proxy,
    session: &Session,
    name: &str,
    uri: &Uri,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Response, Problem> {
    let verifier = prove::verifier_of(session)?;
    let rule = prove::rule_named(&verifier, name)?;
    if !is_offered_by(rule, &verifier.model, &session.caller) {
        let detail = "only a workload of this node that offers a service of the rule may ask";
        return Err(Problem::forbidden("proxy_not_allowed", detail));
    }
    let original = Original::of(proxy, name, uri, method, headers)?;
    let scheme = text(headers, FORWARDED_PROTO)?.unwrap_or("https");
    let target = original.host.and_then(|host| Target::parse(&format!("{scheme}://{host}{}", original.path)).ok());
    let chain = proxy.chain(headers)?;
    let asked = Asked { method: original.method, uri, headers };
    let connection = session.connection;
    let path = original.path.split('?').next().unwrap_or_default();
    let told = format!("{} {}", shortened(original.method), shortened(path));
    let proven = match prove::for_request(&verifier, rule, &chain, &asked, target).await {
        Ok(proven) => proven,
        Err(failed) => {
            let reason = Some(failed.problem.reason.clone());
            let rule = name.to_owned();
            let refused = FromControl::Forwarded { connection, rule, reason, proofs: failed.shown, request: told };
            session.shared.tell(refused).await;
            return Err(failed.problem);
        }
    };
    let shown = proven.shown.clone();
    let wanted = Wanted { rule: name.to_owned(), proofs: proven.shown, api_key: proven.api_key, seconds: None };
    let asked = |question| FromControl::Forward { question, connection, wanted, request: told };
    match session.shared.ask(asked).await {
        Answer::Returned => Ok((StatusCode::OK, identity(name, &shown)).into_response()),
        Answer::Refused(refusal) => Err(Problem::of(refusal)),
        _ => Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "internal", "an answer to another question")),
    }
}

/// Whether the caller offers one of the rule's services: whoever guards a port decides what passes it.
fn is_offered_by(rule: &Rule, model: &Model, caller: &Caller) -> bool {
    let Caller::Local { workload: Some(workload), .. } = caller else { return false };
    rule.to.iter().any(|object| {
        let Object::Service(index) = object else { return false };
        let offers = model.services.get(*index).and_then(|service| service.workload);
        offers.and_then(|index| model.workloads.get(index)).is_some_and(|offers| offers.name == workload.name)
    })
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Problem> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    // Two of one kind: one of them is not the proxy's.
    match (value.to_str(), values.next()) {
        (Ok(value), None) => Ok(Some(value)),
        _ => Err(Problem::forbidden("forwarded_header_ambiguous", format!("{name} is not one readable value"))),
    }
}

/// Who the caller is, for the service behind the proxy. All of these headers, if only with nothing in them, so that the
/// proxy replaces whatever its client says in them.
fn identity(rule: &str, shown: &[Shown]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for name in IDENTITY {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(""));
    }
    let mut put = |name: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    put("x-authd-rule", rule);
    let kinds: Vec<&str> = shown.iter().map(|shown| shown.kind().name()).collect();
    put("x-authd-proofs", &kinds.join(" "));
    for proof in shown {
        match proof {
            Shown::Token(token) => {
                put("x-authd-subject", token.subject.as_deref().unwrap_or_default());
                put("x-authd-client-id", token.client_id.as_deref().unwrap_or_default());
                put("x-authd-scopes", &token.scopes.join(" "));
            }
            Shown::Mtls(certificate) => {
                put("x-authd-spiffe-id", certificate.spiffe_id.as_ref().map_or("", |id| id.as_str()));
                put("x-authd-certificate-subject", &certificate.subject);
            }
            Shown::ApiKey(key) => put("x-authd-api-key", &key.id.to_string()),
            // Connections have it, and no requests; calls of tools are not asked about here.
            Shown::Node(_) | Shown::Action(_) | Shown::Approval(_) => {}
        }
    }
    headers
}

/// What a proxy can make sense of: allow, deny, or an error of this server.
fn for_proxies(problem: Problem) -> Problem {
    match problem.status {
        401 | 403 => problem,
        400..=499 => Problem { status: 403, ..problem },
        _ => Problem { status: 503, ..problem },
    }
}

fn shortened(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_proxy_is_believed_in_its_own_headers_only() {
        let mut headers = HeaderMap::new();
        let put = |headers: &mut HeaderMap, name: &'static str, value: &str| {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
        };
        // A client of nginx writes what Envoy would, and the other way round.
        let pem = "-----BEGIN%20CERTIFICATE-----%0AMAA=%0A-----END%20CERTIFICATE-----%0A";
        let hash = crate::digest::Digest::of(&[0x30, 0]);
        put(&mut headers, "x-forwarded-client-cert", &format!("Hash={hash};Cert=\"{pem}\""));
        assert!(Proxy::Nginx.chain(&headers).unwrap().is_empty());
        assert_eq!(Proxy::Envoy.chain(&headers).unwrap().len(), 1);
        headers.clear();
        put(&mut headers, "x-ssl-client-cert", pem);
        assert!(Proxy::Envoy.chain(&headers).unwrap().is_empty());
        assert_eq!(Proxy::Nginx.chain(&headers).unwrap().len(), 1);
        put(&mut headers, "x-original-uri", "/admin");
        put(&mut headers, "x-original-method", "DELETE");
        put(&mut headers, "x-forwarded-host", "other.example.org");
        put(&mut headers, "host", "api.example.org");
        let uri: Uri = "/v1/forward-auth/envoy/rule/a/b?c=d".parse().unwrap();
        let original = Original::of(Proxy::Envoy, "rule", &uri, &Method::GET, &headers).unwrap();
        assert_eq!((original.method, original.path, original.host), ("GET", "/a/b?c=d", Some("api.example.org")));
        let original = Original::of(Proxy::Nginx, "rule", &uri, &Method::GET, &headers).unwrap();
        assert_eq!((original.method, original.path, original.host), ("DELETE", "/admin", Some("other.example.org")));
        headers.remove("x-original-uri");
        let reason = Original::of(Proxy::Nginx, "rule", &uri, &Method::GET, &headers).err().map(|p| p.reason);
        assert_eq!(reason.as_deref(), Some("forwarded_header_missing"));
    }

    #[test]
    fn nginx_never_gets_a_status_that_it_takes_for_an_error_of_the_request() {
        for (status, told) in [(400, 403), (401, 401), (403, 403), (404, 403), (429, 403), (500, 503), (503, 503)] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(for_proxies(Problem::new(status, "x", "")).status, told);
        }
    }
}
