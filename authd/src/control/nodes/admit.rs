//! Another node's authd asks to speak for callers.
//!
//! Enters: a request on a connection whose other end showed a certificate. Leaves: the certificate, the connection's key and
//! the callers, for dataplane, and its answer. Never: an opinion about for whom a node may speak; dataplane has that one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use axum::{
    Extension, Json,
    body::Bytes,
    extract::rejection::BytesRejection,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use jiff::{SignedDuration, Timestamp};

use super::{NodeSessionAnswer, NodeSessionRequest, certificate_of};
use crate::{
    control::{
        Answer,
        api::{Session, confused, read},
        listed,
        problem::Problem,
        prove::{self, Failed},
    },
    daemon::metrics::results::Checked,
    grants::proof::Shown,
    ipc::{Caller, FromControl, NodeKey},
    policy::model::Node,
    proofs::x509::{
        chain::{Usage, verify_by_any},
        crl::NothingRevoked,
        identity::VerifiedCertificate,
        spiffe::SpiffeId,
    },
};

/// Callers of one request. The same connection may ask about others with the next one.
const MAX_CALLERS: usize = 128;

/// Speak for callers, as a node of the policy: each gets a number, which the key of this connection authenticates.
///
/// Over TLS 1.3, with the certificate that the policy names. The key is the connection's exporter (RFC 8446, 7.5) of 16 bytes
/// with the label `EXPORTER-authd-node-syn` and an empty context; it outlives the connection.
#[utoipa::path(
    post, path = "/v1/node-sessions", request_body = NodeSessionRequest,
    responses(
        (status = 201, body = NodeSessionAnswer),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 401, body = Problem, description = "No certificate, or nobody vouches for it",
         content_type = "application/problem+json"),
        (status = 403, body = Problem, description = "No node of the policy, or not over TLS 1.3",
         content_type = "application/problem+json"),
        (status = 503, body = Problem, description = "No room, or not ready", content_type = "application/problem+json"),
    )
)]
pub async fn post_node_session(
    Extension(session): Extension<Arc<Session>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Problem> {
    let NodeSessionRequest { speaks_for, instance } = read(body, "a node's session")?;
    check(&speaks_for)?;
    let settings = session.shared.verifier();
    let (node, certificate, key) = match node_behind(&session, Timestamp::now()) {
        Ok(known) => known,
        Err(Failed { problem, shown }) => {
            let (connection, reason) = (session.connection, problem.reason.clone());
            session.shared.counts.node_session(&reason);
            session.shared.tell(FromControl::Refused { connection, rule: None, reason, proofs: shown }).await;
            return Err(problem);
        }
    };
    let name = listed::Name::of_certificate(&certificate);
    let connection = session.connection;
    let callers = speaks_for.iter().map(|id| id.as_str().to_owned()).collect();
    let ask = |question| FromControl::NodeSession { question, connection, certificate, key, speaks_for: callers };
    match session.shared.ask(ask).await {
        Answer::Admitted { key_id, seconds, labels } if labels.len() == speaks_for.len() => {
            let until = Timestamp::now() + SignedDuration::from_secs(seconds.into());
            listed::granted(&session.shared, settings, name, &session.chain, until).await;
            if let Some(instance) = instance {
                session.shared.nodes.met(&node, instance);
            }
            let labels: BTreeMap<SpiffeId, Option<u32>> = speaks_for.into_iter().zip(labels).collect();
            Ok((StatusCode::CREATED, Json(NodeSessionAnswer { key_id, seconds, labels })).into_response())
        }
        Answer::Refused(refusal) => Err(Problem::of(refusal)),
        _ => Err(confused()),
    }
}

fn check(callers: &[SpiffeId]) -> Result<(), Problem> {
    let bad = |detail: String| Err(Problem::bad_request("bad_request", detail));
    if callers.is_empty() || callers.len() > MAX_CALLERS {
        return bad(format!("a request is about 1 to {MAX_CALLERS} callers"));
    }
    if callers.iter().collect::<BTreeSet<_>>().len() < callers.len() {
        return bad("a caller is named twice".to_owned());
    }
    Ok(())
}

/// The certificate of the node at the other end, and the key that both ends have.
fn node_behind(session: &Session, now: Timestamp) -> Result<(String, Box<VerifiedCertificate>, NodeKey), Failed> {
    if !matches!(session.caller, Caller::Remote { .. }) {
        return Err(unknown("a process of this node is no other node").into());
    }
    let verifier = prove::verifier_of(session)?;
    let refused = |problem: Problem| {
        verifier.counts.refused(Checked::Mtls, &problem.reason, &[]);
        Failed::from(problem)
    };
    if session.chain.is_empty() {
        let detail = "a node shows its certificate, and the connection has none";
        return Err(refused(Problem::unauthorized("certificate_missing", detail)));
    }
    let Some(key) = session.exported.clone() else {
        return Err(Problem::forbidden("tls13_required", "sessions between nodes take TLS 1.3").into());
    };
    // Whose it is, the certificate says alike to every authority.
    let authorities = verifier.authorities.iter().flatten();
    let by_any = verify_by_any(authorities, &session.chain, Usage::Client, now, &NothingRevoked)
        .map_err(|error| refused(Problem::unauthorized(error.reason(), error.to_string())))?;
    let is_named = |node: &&Node| by_any.has_spiffe_id(&node.spiffe_id);
    let Some(node) = verifier.model.nodes.iter().find(is_named) else {
        let problem = unknown("the policy has no node with this SPIFFE ID");
        return Err(Failed { problem, shown: vec![Shown::Mtls(Box::new(by_any))] });
    };
    match certificate_of(node, &verifier, &session.chain, Usage::Client, now) {
        Ok(certificate) => Ok((node.name.clone(), Box::new(certificate), key)),
        Err(error) => Err(refused(Problem::unauthorized(error.reason(), error.to_string()))),
    }
}

fn unknown(detail: &str) -> Problem {
    Problem::forbidden("node_unknown", detail)
}
