//! A person's yes or no to a call of an agent's, over HTTP.
//!
//! Enters: an id, in whose name, perhaps a fresh token. Leaves: what dataplane, which knows who is connected, made of it. Never: a
//! decision, or anybody's word about who he is.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{Path, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, header},
};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::{
    Answer,
    api::{Session, confused, read},
    problem::Problem,
    prove,
    verifier::Verifier,
};
use crate::{
    decisions::{
        approvals::{Id, TokenFacts},
        asked,
    },
    ipc::FromControl,
    policy::model::TokenRequirement,
    proofs::{jwt, scheme},
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
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, Problem> {
    let Word { approvers, reason } = read(body, "an approval")?;
    let verifier = prove::verifier_of(&session)?;
    let token = fresh(&verifier, &headers).await?;
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

async fn ask(session: &Session, asked: asked::Question, token: Option<TokenFacts>) -> Result<Json<Value>, Problem> {
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

/// What the token of the `Authorization` header says of who shows it: one of an issuer that approvers of the policy show tokens of.
async fn fresh(verifier: &Verifier, headers: &HeaderMap) -> Result<Option<TokenFacts>, Problem> {
    let values: Vec<&[u8]> = headers.get_all(header::AUTHORIZATION).iter().map(|value| value.as_bytes()).collect();
    if values.is_empty() {
        return Ok(None);
    }
    let credentials =
        scheme::parse(&values).map_err(|error| Problem::unauthorized(error.reason(), error.to_string()))?;
    let claimed = jwt::claimed_issuer(credentials.token);
    let issuers = verifier.model.approvers.iter().filter_map(|approvers| Some(approvers.step_up.as_ref()?.issuer));
    let unknown = || Problem::unauthorized("issuer_unknown", "no approvers show tokens of this issuer");
    let is_it = |index: &usize| {
        let issuer = verifier.issuers.get(*index).map(|issuer| &issuer.policy.issuer);
        issuer.is_some_and(|issuer| claimed.as_ref().is_none_or(|claimed| claimed == issuer))
    };
    let index = issuers.into_iter().find(is_it).ok_or_else(unknown)?;
    let issuer = verifier.issuers.get(index).ok_or_else(unknown)?;
    let asked = TokenRequirement { issuer: index, audience: None, scopes: vec![], bound: false, subjects: vec![] };
    let found = prove::verify(verifier, issuer, &asked, CACHED_FOR, credentials.token, Timestamp::now()).await;
    let found = found.map_err(|problem| *problem)?;
    Ok(Some(TokenFacts {
        issuer_name: found.issuer_name.clone(),
        issuer: found.issuer.clone(),
        subject: found.subject.clone().unwrap_or_default(),
        acr: found.acr.clone(),
        auth_time: found.auth_time,
    }))
}
