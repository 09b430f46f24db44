//! A person's yes or no to a call of an agent's, over HTTP.
//!
//! Enters: an id, in whose name, perhaps a fresh token. Leaves: what dataplane, which knows who is connected, made of it. Never: a
//! decision, or anybody's word about who he is.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{OriginalUri, Path, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, Uri, header},
};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    Answer,
    api::{Session, confused, read},
    issuers,
    problem::Problem,
    prove,
    verifier::Verifier,
};
use crate::{
    decisions::{approvals::Id, asked},
    grants::proof::Token,
    ipc::{Fresh, FromControl},
    policy::model::TokenRequirement,
    proofs::scheme,
};

/// For whom verification is remembered, beside rules: no rule can be called so.
const CACHED_FOR: &str = "approving a call";

#[derive(Deserialize, ToSchema, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Word {
    /// The `[[approvers]]` in whose name. Default: the first that lets the user approve.
    approvers: Option<String>,
    /// For the record.
    reason: Option<String>,
}

/// Calls that wait for the caller's approval, and what became of those of the last day. Root sees all.
#[utoipa::path(get, path = "/v1/approvals", responses((status = 200), (status = 403, body = Problem)))]
pub async fn get_approvals(Extension(session): Extension<Arc<Session>>) -> Result<Json<Value>, Problem> {
    ask(&session, asked::Question::List, None).await
}

/// One of them: what would happen, for whom, until when, and who can approve it.
#[utoipa::path(
    get, path = "/v1/approvals/{id}", params(("id" = String, Path)),
    responses((status = 200), (status = 404, body = Problem))
)]
pub async fn get_approval(
    Extension(session): Extension<Arc<Session>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Problem> {
    ask(&session, asked::Question::Show { id: parsed(&id)? }, None).await
}

/// Let the agent make this one call, once. Approvers who have to show a fresh token show it in the `Authorization` header.
#[utoipa::path(
    post, path = "/v1/approvals/{id}/grant", params(("id" = String, Path)), request_body = Word,
    responses((status = 200), (status = 401, body = Problem), (status = 403, body = Problem), (status = 404, body = Problem))
)]
pub async fn grant(
    Extension(session): Extension<Arc<Session>>,
    Path(id): Path<String>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Problem> {
    let Word { approvers, reason } = read(body, "an approval")?;
    let verifier = prove::verifier_of(&session)?;
    let token = fresh(&session, &verifier, approvers.as_deref(), &uri, &headers).await?;
    let question = asked::Question::Grant { id: parsed(&id)?, approvers, text: reason.unwrap_or_default() };
    ask(&session, question, token).await
}

/// Refuse it.
#[utoipa::path(
    post, path = "/v1/approvals/{id}/deny", params(("id" = String, Path)), request_body = Word,
    responses((status = 200), (status = 403, body = Problem), (status = 404, body = Problem))
)]
pub async fn deny(
    Extension(session): Extension<Arc<Session>>,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Problem> {
    let Word { approvers: _, reason } = read(body, "a refusal")?;
    ask(&session, asked::Question::Deny { id: parsed(&id)?, text: reason.unwrap_or_default() }, None).await
}

async fn ask(session: &Session, asked: asked::Question, token: Option<Fresh>) -> Result<Json<Value>, Problem> {
    let (connection, token) = (session.connection, token.map(Box::new));
    match session.shared.ask(|question| FromControl::Approve { question, connection, asked, token }).await {
        Answer::Approvals(answer) => match *answer {
            asked::Answer::Refused { reason, message } => {
                let status = if reason == "approval_unknown" { StatusCode::NOT_FOUND } else { StatusCode::FORBIDDEN };
                Err(Problem::new(status, &reason, message))
            }
            answer => serde_json::to_value(answer).map(Json).map_err(|_| confused()),
        },
        Answer::Refused(refusal) => Err(Problem::of(refusal)),
        _ => Err(confused()),
    }
}

fn parsed(id: &str) -> Result<Id, Problem> {
    id.parse().map_err(|_| Problem::new(StatusCode::NOT_FOUND, "approval_unknown", "there is no such approval"))
}

/// The token of the `Authorization` header, in the hands of whoever it is bound to: one of an issuer that the approvers show tokens
/// of.
async fn fresh(
    session: &Session,
    verifier: &Verifier,
    approvers: Option<&str>,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<Option<Fresh>, Problem> {
    let values: Vec<&[u8]> = headers.get_all(header::AUTHORIZATION).iter().map(|value| value.as_bytes()).collect();
    if values.is_empty() {
        return Ok(None);
    }
    let credentials =
        scheme::parse(&values).map_err(|error| Problem::unauthorized(error.reason(), error.to_string()))?;
    let index = issuer(verifier, approvers, credentials.token)?;
    let requirement =
        TokenRequirement { issuer: index, audience: None, scopes: vec![], bound: false, subjects: vec![] };
    let asked = prove::Asked { method: "POST", uri, headers };
    let target = prove::target_of(verifier, &session.caller, uri, headers);
    let now = Timestamp::now();
    let found =
        prove::presented_token(verifier, &requirement, CACHED_FOR, &session.chain, &asked, target.as_ref(), now).await;
    match found {
        Ok((verified, bound_to)) => {
            let (acr, auth_time) = (verified.acr.clone(), verified.auth_time);
            Ok(Some(Fresh { token: Token::new(&verified, bound_to), acr, auth_time }))
        }
        Err((checked, problem)) => {
            verifier.counts.refused(checked, &problem.reason, &[]);
            Err(*problem)
        }
    }
}

/// Whose the token is: of an issuer of the approvers in whose name it is shown, if they are named; of any approvers', otherwise.
fn issuer(verifier: &Verifier, approvers: Option<&str>, token: &str) -> Result<usize, Problem> {
    let meant = verifier.model.approvers.iter().filter(|known| approvers.is_none_or(|named| known.name == named));
    let issuers: Vec<usize> = meant.filter_map(|approvers| Some(approvers.step_up.as_ref()?.issuer)).collect();
    let of_token = issuers::of_token(verifier, token, &issuers, &issuers).map_err(|error| {
        let message = "the token names no issuer, and several could be asked about it: name the `approvers`";
        Problem::bad_request(error.reason(), message)
    })?;
    let unknown = || Problem::unauthorized("issuer_unknown", "these approvers show no tokens of this issuer");
    of_token.first().copied().ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::issuers::tests::{naming, verifier};

    #[test]
    fn a_token_is_shown_to_the_issuer_of_the_approvers_in_whose_name_it_is() {
        let of = |verifier: &Verifier, approvers: Option<&str>, token: &str| {
            issuer(verifier, approvers, token).map_err(|problem| problem.reason)
        };
        let (ambiguous, unknown) = (Err("issuer_ambiguous".to_owned()), Err("issuer_unknown".to_owned()));
        let two = verifier(&[], &[("leads", "first"), ("night", "second"), ("day", "third")]);
        assert_eq!(of(&two, None, "opaque"), ambiguous);
        assert_eq!(of(&two, Some("leads"), "opaque"), Ok(0));
        assert_eq!(of(&two, Some("night"), "opaque"), Ok(1));
        assert_eq!(of(&two, Some("nobody"), "opaque"), unknown);
        assert_eq!(of(&two, None, &naming("https://second.example")), Ok(1));
        assert_eq!(of(&two, Some("leads"), &naming("https://second.example")), unknown);
        let one = verifier(&[], &[("leads", "second"), ("night", "second"), ("day", "third")]);
        assert_eq!(of(&one, None, "opaque"), Ok(1));
    }
}
