//! Calls of tools, before they are made: may this agent call this tool, with these arguments?
//!
//! Enters: a call, and by what the agent acts for somebody. Leaves: what the action policy says, with what dataplane made of it: a
//! permit, an approval that is waited for. Never: the call itself, and never arguments in another form than the one that was decided
//! about.

use std::sync::Arc;

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{OriginalUri, rejection::BytesRejection},
    http::{HeaderMap, StatusCode, Uri, header},
};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::{
    Answer,
    api::{GrantAnswer, Session, confused, whole},
    problem::Problem,
    prove,
    verifier::{Share, Verifier},
};
use crate::{
    decisions::{
        Call, Outcome, Subject,
        call::{self, Arguments, ArgumentsError},
    },
    grants::proof::{Shown, Token},
    ipc::{Act, ActOutcome, Acted, Caller, Denied, FromControl},
    policy::{
        file::Proof,
        model::{OWN_ISSUER, Rule, TokenRequirement},
    },
    proofs::{jwt, scheme},
};

/// The longest arguments, with the names around them.
pub const BODY_BYTES: usize = call::LIMITS.bytes + (1 << 10);
/// For whom verification is remembered, beside rules: no rule can be called so.
const CACHED_FOR: &str = "acting for somebody";

/// What is answered to a call.
#[derive(Serialize, ToSchema)]
pub struct ActionAnswer {
    /// `allow`, `deny` or `pending`: then the same call is asked about again, once somebody has approved it.
    pub decision: &'static str,
    /// Stable name; docs/REASONS.md lists them.
    pub reason: String,
    /// A sentence for people, and for whoever reads it in their place.
    pub message: String,
    /// Names of the action policies that decided.
    pub policies: Vec<String>,
    /// SHA-256 of the whole call: docs/ACTIONS.md.
    #[schema(value_type = Option<String>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call_sha256: Option<call::CallHash>,
    /// Which approval is waited for, or was used up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub approval: Option<String>,
    /// Until when it is waited for: RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// What the kernel lets pass for the call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub permit: Option<GrantAnswer>,
}

/// The body: `tool`, its name in the policy, and `arguments`.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it describes what is read strictly, member by member")]
struct ActionRequest {
    /// As the policy calls it.
    tool: String,
    /// What the tool gets: an object.
    #[schema(value_type = Object)]
    arguments: Option<Map<String, Value>>,
}

/// Ask whether a tool may be called, with these arguments. If it may, connections that it needs pass from then on, as far as the
/// tool's rule says.
///
/// The agent is known by its cgroup. If it acts for somebody, it shows the token that it exchanged for that one's at `/v1/token`, in
/// the `Authorization` header.
#[utoipa::path(
    post, path = "/v1/actions", request_body = ActionRequest,
    responses(
        (status = 200, body = ActionAnswer),
        (status = 400, body = Problem, content_type = "application/problem+json"),
        (status = 401, body = Problem, description = "The token is refused", content_type = "application/problem+json"),
        (status = 403, body = Problem, description = "No workload of this node", content_type = "application/problem+json"),
        (status = 503, body = Problem, content_type = "application/problem+json"),
    )
)]
pub async fn post_action(
    Extension(session): Extension<Arc<Session>>,
    OriginalUri(uri): OriginalUri,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<ActionAnswer>, Problem> {
    let body = whole(body)?;
    let mut asked = call::object(&body, call::LIMITS).map_err(malformed)?;
    let tool = match asked.remove("tool") {
        Some(Value::String(tool)) => tool,
        _ => return Err(Problem::bad_request("bad_request", "`tool` is a name")),
    };
    let arguments = match asked.remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(Problem::bad_request("bad_request", "`arguments` is an object")),
    };
    if let Some(unknown) = asked.keys().next() {
        return Err(Problem::bad_request("bad_request", format!("`{unknown}` is no member of a call")));
    }
    let arguments = Arguments::new(&arguments).map_err(malformed)?;
    let verifier = prove::verifier_of(&session)?;
    let bearer = Bearer { method: "POST", uri: &uri, headers: &headers };
    let shown = on_behalf(&session, &verifier, &bearer).await?;
    act(&session, &verifier, &tool, arguments, shown).await.map(Json)
}

fn malformed(error: ArgumentsError) -> Problem {
    Problem::bad_request(error.reason(), error.to_string())
}

/// Where a request shows for whom its sender acts.
pub struct Bearer<'a> {
    pub method: &'a str,
    pub uri: &'a Uri,
    pub headers: &'a HeaderMap,
}

/// The token of this node's own that a request shows, if it shows one.
pub async fn on_behalf(
    session: &Session,
    verifier: &Verifier,
    bearer: &Bearer<'_>,
) -> Result<Option<Box<Token>>, Problem> {
    if !bearer.headers.contains_key(header::AUTHORIZATION) {
        return Ok(None);
    }
    let issuer = verifier.model.issuers.iter().position(|issuer| issuer.name == OWN_ISSUER);
    let issuer = issuer.ok_or_else(|| Problem::forbidden("exchange_unavailable", "this node issues no tokens"))?;
    let values: Vec<&[u8]> = bearer.headers.get_all(header::AUTHORIZATION).iter().map(|v| v.as_bytes()).collect();
    let claimed = scheme::parse(&values).ok().and_then(|credentials| jwt::claimed_issuer(credentials.token));
    let own = verifier.issuers.get(issuer).map(|issuer| issuer.policy.issuer.as_str());
    if claimed.is_some() && claimed.as_deref() != own {
        let message = "agents act by tokens of this node: exchange that one first";
        return Err(Problem::unauthorized("token_wrong_issuer", message));
    }
    let requirement = TokenRequirement { issuer, audience: None, scopes: vec![], bound: true, subjects: vec![] };
    let asked = prove::Asked { method: bearer.method, uri: bearer.uri, headers: bearer.headers };
    let target = prove::target_of(verifier, &session.caller, bearer.uri, bearer.headers);
    let now = Timestamp::now();
    let shown =
        prove::presented(verifier, &requirement, CACHED_FOR, &session.chain, &asked, target.as_ref(), now).await;
    match shown {
        Ok(Shown::Token(token)) => Ok(Some(token)),
        Ok(_) => Err(confused()),
        Err((checked, problem)) => {
            verifier.counts.refused(checked, &problem.reason, &[]);
            let refused = FromControl::Refused {
                connection: session.connection,
                rule: None,
                reason: problem.reason.clone(),
                proofs: Vec::new(),
            };
            session.shared.tell(refused).await;
            Err(*problem)
        }
    }
}

/// Decides about a call, and lets dataplane do what follows from that.
pub async fn act(
    session: &Session,
    verifier: &Verifier,
    tool: &str,
    arguments: Arguments,
    token: Option<Box<Token>>,
) -> Result<ActionAnswer, Problem> {
    let Caller::Local { workload: Some(workload), .. } = &session.caller else {
        let message = "no workload of the policy matches the caller's cgroup, or it is not on this node";
        return Err(Problem::forbidden("caller_unmanaged", message));
    };
    if !verifier.admit(&session.caller, Share::Action, Timestamp::now()) {
        let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", "ask about actions less often");
        return Err(problem.with(header::RETRY_AFTER, "1"));
    }
    let model = &verifier.model;
    let index = model.workloads.iter().position(|known| known.name == workload.name);
    let index = index.ok_or_else(|| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", "ask again"))?;
    let subject = token.as_ref().map(|token| Subject::of(token, model)).transpose();
    let subject = subject.map_err(|error| Problem::forbidden(error.reason(), error.to_string()))?;
    let actors = token.as_ref().map_or(&[][..], |token| &token.actors);
    let call = Call {
        workload: index,
        spiffe_id: &workload.spiffe_id,
        instance: &workload.cgroup,
        tool,
        arguments: arguments.map(),
        subject: subject.as_ref(),
        actors,
        now: Timestamp::now(),
    };
    let decision = model.actions.decide(&call);
    let denied = match &decision.outcome {
        Outcome::Denied(denial) => Some(Denied {
            reason: denial.reason().to_owned(),
            message: denial.to_string(),
            policies: decision.policies.clone(),
        }),
        // Which of the two it is, dataplane finds again.
        Outcome::Allowed | Outcome::Pending(_) => None,
    };
    let mut proofs: Vec<Shown> = token.into_iter().map(Shown::Token).collect();
    if denied.is_none()
        && let Some(rule) = rule_of(verifier, tool).filter(|rule| rule.require.contains(&Proof::Mtls))
    {
        let found = prove::certificate(verifier, rule, &session.chain, Timestamp::now()).map_err(|problem| *problem)?;
        proofs.push(Shown::Mtls(Box::new(found)));
    }
    let act = Box::new(Act { tool: tool.to_owned(), arguments, denied, proofs });
    let connection = session.connection;
    match session.shared.ask(|question| FromControl::Act { question, connection, act }).await {
        Answer::Acted(acted) => Ok(answer(*acted)),
        Answer::Refused(refusal) => Err(Problem::of(refusal)),
        _ => Err(confused()),
    }
}

/// The rule by which a tool's calls open a permit.
fn rule_of<'a>(verifier: &'a Verifier, tool: &str) -> Option<&'a Rule> {
    let model = &verifier.model;
    let name = model.tools.iter().find(|known| known.name == tool)?.permit.as_ref()?;
    model.rules.iter().find(|rule| rule.name == *name)
}

fn answer(acted: Acted) -> ActionAnswer {
    let Acted { call, policies, outcome } = acted;
    let base = ActionAnswer {
        decision: "deny",
        reason: String::new(),
        message: String::new(),
        policies,
        call_sha256: Some(call),
        approval: None,
        until: None,
        permit: None,
    };
    match outcome {
        ActOutcome::Allowed { approval, permit } => ActionAnswer {
            decision: "allow",
            reason: "action_permitted".to_owned(),
            message: "the call may be made".to_owned(),
            approval: approval.map(|id| id.to_string()),
            permit: permit.map(GrantAnswer::from),
            ..base
        },
        ActOutcome::Pending { approval, until } => ActionAnswer {
            decision: "pending",
            reason: "action_needs_approval".to_owned(),
            message: format!("somebody has to approve the call: {approval}. Ask again, with the same arguments"),
            approval: Some(approval.to_string()),
            until: Some(until.to_string()),
            ..base
        },
        ActOutcome::Denied { refusal } => ActionAnswer { reason: refusal.reason, message: refusal.message, ..base },
    }
}
