//! Tokens of this node's own: who may have one, for whose token; and by what each of them ends.
//!
//! Enters: exchanges whose tokens control verified, as asked for by callers that this side knows. Leaves: signed tokens, on record.
//! Never: a token that a delegation of the policy in force does not give to this caller, or one for a token that was revoked.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value};

use super::{
    Daemon,
    admin::{Answer, SigningKey},
    callers::{Owned, holder_names},
    control::Who,
    granting::{refusal, revoked_reason},
    servers::Admitted,
};
use crate::{
    audit::record::Record,
    digest::Digest,
    grants::{
        Id,
        proof::{self, Shown, certificate_names},
    },
    ipc::{Exchange, ExchangedToken, OwnIssuer, Refusal},
    issuing::{
        Issued, Tokens,
        ring::{Changes, Ring},
    },
    policy::{
        file::Kind,
        model::{self, Delegation, Model, OWN_ISSUER, TokenCheck},
        network::from_ip,
    },
    proofs::{
        claims::{Confirmation, VerifiedToken},
        exchange::{self, Allowed, Exchanged},
        issuer::{self, KeyError},
        x509::identity::VerifiedCertificate,
    },
    store::{StoreError, revoked::Revoked},
};

/// A token for a server is for the requests of a minute.
const DOWNSTREAM_TTL: SignedDuration = SignedDuration::from_secs(60);

/// Everything about this node as an issuer that lives as long as the daemon.
pub struct Issuing {
    pub url: String,
    pub ring: Ring,
    pub tokens: Tokens,
    /// Keys that control does not know yet.
    changed: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum IssuingError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("a signing key: {0}")]
    Key(#[from] KeyError),
}

/// Who wants to act, under the policy in force.
pub struct Actor {
    pub named: Vec<model::Actor>,
    pub spiffe_id: String,
    pub tenant: Option<String>,
    /// The workload or peer whose share of what there is at one time it uses.
    pub share: String,
    /// By what else it is revoked.
    pub names: Vec<Revoked>,
}

impl Daemon {
    /// Takes up what an earlier daemon kept. Without a store nothing is signed.
    pub(super) fn begin_issuing(&mut self) {
        let (Some(issuer), Ok(trust)) = (&self.config.issuer, &self.trust) else { return };
        let begin = || -> Result<Issuing, IssuingError> {
            let ring = Ring::new(trust.store().signing_keys()?, issuer.key_life)?;
            let tokens = Tokens::new(trust.store().issued_tokens()?);
            Ok(Issuing { url: issuer.url.clone(), ring, tokens, changed: true })
        };
        match begin() {
            Ok(issuing) => {
                self.issuing = Some(issuing);
                self.tend_issuing();
            }
            Err(error) => {
                tracing::error!(%error, "no token is exchanged");
                self.report(Record::about("issuing_failed", error.to_string()));
            }
        }
    }

    /// What is due: another key, the end of one, forgotten tokens.
    pub(super) fn tend_issuing(&mut self) {
        let now = Timestamp::now();
        let Some(issuing) = &mut self.issuing else { return };
        let over = issuing.tokens.expire(now);
        if let (Ok(trust), false) = (&self.trust, over.is_empty())
            && let Err(error) = trust.store().remove_issued_tokens(&over)
        {
            // They are refused by their age.
            tracing::warn!(%error, "expired tokens stay in the store");
        }
        if let Err(error) = issuing.ring.due(now).map_err(IssuingError::from).and_then(|due| self.change_keys(due)) {
            tracing::error!(%error, "the keys that sign tokens");
        }
    }

    /// Tokens end that somebody got by what is revoked by another one than this node's operators.
    pub(super) fn forget_tokens(&mut self, name: &Revoked) {
        let Some(issuing) = &mut self.issuing else { return };
        let over = issuing.tokens.forget(name);
        if let (Ok(trust), false) = (&self.trust, over.is_empty())
            && let Err(error) = trust.store().remove_issued_tokens(&over)
        {
            tracing::error!(%error, "tokens that have ended would be believed after a restart");
        }
    }

    /// First on disk, then in use.
    fn change_keys(&mut self, changes: Changes) -> Result<(), IssuingError> {
        let (Some(issuing), Ok(trust)) = (&mut self.issuing, &self.trust) else { return Ok(()) };
        if changes.is_empty() {
            return Ok(());
        }
        trust.store().change_signing_keys(&changes)?;
        let of = |event, kid: &str| Record::about(event, format!("signing key {kid}"));
        let made = changes.kept.iter().map(|key| of("signing_key_made", &key.kid));
        let records: Vec<Record> =
            made.chain(changes.removed.iter().map(|kid| of("signing_key_removed", kid))).collect();
        issuing.ring.follow(changes)?;
        issuing.changed = true;
        records.into_iter().for_each(|record| self.report(record));
        Ok(())
    }

    /// Whether control has to hear of other keys.
    pub fn take_issuer_changed(&mut self) -> bool {
        self.issuing.as_mut().is_some_and(|issuing| std::mem::take(&mut issuing.changed))
    }

    /// What anybody may know of it.
    pub fn own_issuer(&self) -> Option<OwnIssuer> {
        let issuing = self.issuing.as_ref()?;
        let keys = serde_json::json!({ "keys": issuing.ring.public() }).to_string();
        Some(OwnIssuer { url: issuing.url.clone(), keys })
    }

    /// Names of the keys, for operators.
    pub fn signing_keys(&self) -> Answer {
        let Some(issuing) = &self.issuing else {
            let message = "this node issues no tokens: set [issuer] in authd.toml".to_owned();
            return Answer::Error { message };
        };
        let now = Timestamp::now();
        let signing = issuing.ring.signing(now).map(|key| key.kid().to_owned());
        let key = |(kid, signs_from): (&str, Timestamp)| {
            let state = match () {
                () if signing.as_deref() == Some(kid) => "signs",
                () if signs_from > now => "next",
                () => "before",
            };
            SigningKey { kid: kid.to_owned(), signs_from, state: state.to_owned() }
        };
        Answer::SigningKeys {
            issuer: issuing.url.clone(),
            keys: issuing.ring.list().map(key).collect(),
            tokens: issuing.tokens.len(),
        }
    }

    /// An operator wants another key now.
    pub fn rotate_signing_key(&mut self) -> Answer {
        if let Some(issuing) = &self.issuing {
            let rotated = issuing.ring.rotated(Timestamp::now()).map_err(IssuingError::from);
            if let Err(error) = rotated.and_then(|changes| self.change_keys(changes)) {
                return Answer::Error { message: error.to_string() };
            }
        }
        self.signing_keys()
    }

    /// A key of this node's own was revoked: it is published no more, and another one signs.
    pub(super) fn drop_signing_key(&mut self, what: &Revoked) {
        let (Some(issuing), Revoked::IssuerKey { issuer, kid }) = (&self.issuing, what) else { return };
        if *issuer != issuing.url {
            return;
        }
        let without = issuing.ring.without(kid, Timestamp::now()).map_err(IssuingError::from);
        if let Err(error) = without.and_then(|changes| self.change_keys(changes)) {
            tracing::error!(%error, kid, "a signing key that was revoked stays published; its tokens are refused here");
        }
    }

    /// Gives a token, or says why not. Either is on record.
    pub fn exchange(&mut self, who: &Who, wanted: &Exchange) -> Result<ExchangedToken, Refusal> {
        let shown = Shown::Token(Box::new(proof::Token::new(&wanted.subject, Vec::new())));
        let mut record = Record::event("token_exchanged");
        record.proofs = vec![shown.told()];
        let result = self.give_token(who, wanted, &mut record);
        record.verdict = Some(if result.is_ok() { "allowed" } else { "denied" }.to_owned());
        record.reason = Some(result.as_ref().err().map_or("delegation", |refusal| &refusal.reason).to_owned());
        self.metrics.exchanged(result.as_ref().err());
        self.describe(who, &mut record);
        self.report(record);
        result
    }

    fn give_token(&mut self, who: &Who, wanted: &Exchange, record: &mut Record) -> Result<ExchangedToken, Refusal> {
        let now = Timestamp::now();
        let Exchange { subject, certificate, .. } = wanted;
        let actor = self.actor(who, certificate.as_deref())?;
        let subject = self.completed(subject)?;
        let mut token = proof::Token::new(&subject, Vec::new());
        self.complete(&mut token)?;
        let Some(issuing) = &self.issuing else {
            return Err(refusal("exchange_unavailable", "this node issues no tokens"));
        };
        let trust = self.trust.as_ref().map_err(|error| refusal("store_unusable", error))?;
        let mut ends_with = Shown::Token(Box::new(token)).revocable();
        ends_with.extend(actor.names.iter().map(|name| (name.clone(), Some(now))));
        ends_with.extend(certificate.iter().flat_map(|certificate| certificate_names(certificate)));
        if let Some((found, _)) = ends_with.iter().find(|(name, since)| trust.is_revoked(name, *since)) {
            return Err(refusal(revoked_reason(found), format!("{} was revoked", found.kind())));
        }
        issuing
            .tokens
            .admits(&actor.spiffe_id, &actor.share, &ends_with)
            .map_err(|error| refusal(error.reason(), error))?;
        let model = &self.active.prepared.model;
        let (delegation, exchanged) = by_delegation(model, &issuing.url, &actor, &subject, wanted, now)?;
        let signed = self.sign(&delegation, &exchanged, &actor, ends_with, record)?;
        let Exchanged { scopes, expires, confirmation, .. } = exchanged;
        Ok(ExchangedToken { text: signed, scopes, expires, dpop: confirmation.jkt.is_some() })
    }

    /// A token by which this node shows an MCP server for whom it passes on what an agent asks: never the agent's own, and never in
    /// the agent's hands.
    pub fn downstream(
        &mut self,
        who: &Who,
        server: &str,
        meant: &str,
        token: Option<proof::Token>,
    ) -> Result<ExchangedToken, Refusal> {
        let now = Timestamp::now();
        let Admitted { at, actor, token, ends_with } = self.admit_to_server(who, server, token)?;
        let Some(issuing) = &self.issuing else {
            return Err(refusal("exchange_unavailable", "this node issues no tokens"));
        };
        let server = &self.active.prepared.model.mcp_servers[at];
        let audience = server.audience.clone();
        let audience = audience.ok_or_else(|| refusal("mcp_server_unknown", "this server takes no tokens"))?;
        if audience != meant {
            return Err(refusal("mcp_server_changed", "the policy has the server for another audience now: ask again"));
        }
        issuing
            .tokens
            .admits(&actor.spiffe_id, &actor.share, &ends_with)
            .map_err(|error| refusal(error.reason(), error))?;
        let end = now.checked_add(DOWNSTREAM_TTL).unwrap_or(now);
        let expires = token.as_ref().map_or(end, |token| token.not_after.min(end));
        // The present one outermost (RFC 8693, 4.1); whoever acts for nobody is the subject itself.
        let chain = token.as_ref().map_or_else(|| vec![actor.spiffe_id.clone()], |token| token.actors.clone());
        let act = chain.iter().rev().fold(None, |inner: Option<Map<String, Value>>, who| {
            let mut act = Map::from_iter([("sub".to_owned(), Value::from(who.as_str()))]);
            if let Some(inner) = inner {
                act.insert("act".to_owned(), Value::from(inner));
            }
            Some(act)
        });
        // Who acts for somebody does no more there than that one's token lets it do.
        let mut scopes = server.scopes.clone();
        if let Some(token) = &token {
            scopes.retain(|scope| token.scopes.contains(scope));
        }
        let exchanged = Exchanged {
            subject: token.as_ref().and_then(|token| token.subject.clone()).unwrap_or_else(|| actor.spiffe_id.clone()),
            audience: vec![audience],
            scopes,
            issued_at: now,
            expires,
            confirmation: Confirmation::default(),
            act: act.unwrap_or_default(),
            may_act: None,
            tenant: actor.tenant.clone(),
            subject_issuer: token
                .as_ref()
                .and_then(|token| token.subject_issuer.clone())
                .unwrap_or_else(|| issuing.url.clone()),
        };
        let name = format!("mcp_server {}", server.name);
        let mut record = Record::event("token_exchanged");
        record.proofs = token.iter().map(|token| Shown::Token(Box::new(token.clone())).told()).collect();
        record.verdict = Some("allowed".to_owned());
        record.reason = Some("mcp_server".to_owned());
        let text = self.sign(&name, &exchanged, &actor, ends_with, &mut record)?;
        self.describe(who, &mut record);
        self.report(record);
        Ok(ExchangedToken { text, scopes: exchanged.scopes, expires, dpop: false })
    }

    /// Signs a token, and remembers it.
    fn sign(
        &mut self,
        delegation: &str,
        exchanged: &Exchanged,
        actor: &Actor,
        ends_with: Vec<(Revoked, Option<Timestamp>)>,
        record: &mut Record,
    ) -> Result<String, Refusal> {
        let (Some(issuing), Ok(trust)) = (&mut self.issuing, &self.trust) else {
            return Err(refusal("exchange_unavailable", "this node issues no tokens"));
        };
        let key = issuing.ring.signing(exchanged.issued_at);
        let key = key.ok_or_else(|| refusal("exchange_unavailable", "there is no key that signs now"))?;
        let failed = |error: KeyError| refusal("unavailable", error);
        let jti = Id::random().map_err(|error| refusal("unavailable", error))?.to_string();
        let kid = key.kid().to_owned();
        let signed = key.sign(&issuer::claims(&issuing.url, &jti, exchanged)).map_err(failed)?;
        let issued = Issued {
            jti,
            kid,
            hash: Digest::from_bytes(signed.hash),
            delegation: delegation.to_owned(),
            actor: actor.spiffe_id.clone(),
            share: actor.share.clone(),
            token: exchanged.clone(),
            ends_with,
        };
        if let Err(error) = trust.store().put_issued_token(&issued) {
            return Err(refusal("store_unusable", error));
        }
        record.delegation = Some(delegation.to_owned());
        record.until = Some(exchanged.expires.to_string());
        let actors = exchange::actors(Some(&exchanged.act)).unwrap_or_default();
        record.issued = Some(proof::Told {
            proof: "token".to_owned(),
            issuer: Some(issuing.url.clone()),
            subject: Some(exchanged.subject.clone()),
            jti_sha256: Some(Digest::of(issued.jti.as_bytes())),
            token_sha256: Some(issued.hash),
            key_id: Some(key.kid().to_owned()),
            actors: actors.into_iter().map(str::to_owned).collect(),
            bound_to: proof::Binding::of(&exchanged.confirmation),
            audience: exchanged.audience.clone(),
            scopes: exchanged.scopes.clone(),
            ..proof::Told::default()
        });
        issuing.tokens.enter(issued);
        Ok(signed.text)
    }

    /// Who asks, as far as tokens can name it.
    pub(super) fn actor(&self, who: &Who, certificate: Option<&VerifiedCertificate>) -> Result<Actor, Refusal> {
        let model = &self.active.prepared.model;
        let known = self.known(who)?;
        match known.claimant {
            Owned::Workload { index, spiffe_id } => Ok(Actor {
                named: vec![model::Actor::Workload(index)],
                spiffe_id,
                share: format!("workload {}", model.workloads[index].name),
                tenant: model.workloads[index].tenant.clone(),
                names: holder_names(&known.holder, &[], model),
            }),
            Owned::Address(address) => {
                let vouched = self.vouched_for(who).map(|caller| caller.spiffe_id.clone());
                let shown = certificate.and_then(|certificate| certificate.spiffe_id.clone());
                let spiffe_id = shown
                    .or(vouched)
                    .ok_or_else(|| refusal("exchange_unknown_actor", "nothing shows which SPIFFE ID the caller has"))?;
                let is_there = |peer: &model::Peer| {
                    let near = peer.networks.is_empty()
                        || peer.networks.iter().any(|network| network.contains(&from_ip(address)));
                    let named = match certificate {
                        Some(certificate) => peer.is_named_by(certificate),
                        None => peer.dns.is_none() && peer.subject.is_none(),
                    };
                    near && named && peer.spiffe_id.as_ref() == Some(&spiffe_id)
                };
                let peers: Vec<usize> =
                    model.peers.iter().enumerate().filter(|(_, peer)| is_there(peer)).map(|(index, _)| index).collect();
                let mut names: Vec<Revoked> =
                    peers.iter().map(|index| Revoked::Peer(model.peers[*index].name.clone())).collect();
                names.push(Revoked::SpiffeId(spiffe_id.as_str().to_owned()));
                let agents = peers.iter().filter(|index| model.peers[**index].kind == Kind::Agent);
                names.extend(agents.map(|index| Revoked::Agent(model.peers[*index].name.clone())));
                let share = peers.first().map(|index| model.peers[*index].name.as_str()).unwrap_or_default();
                Ok(Actor {
                    share: format!("peer {share}"),
                    tenant: peers.first().and_then(|index| model.peers[*index].tenant.clone()),
                    named: peers.into_iter().map(model::Actor::Peer).collect(),
                    spiffe_id: spiffe_id.as_str().to_owned(),
                    names,
                })
            }
        }
    }

    /// What this node remembers of a token of its own. `None`: it is another issuer's. One that nobody remembers was never issued,
    /// or is lost.
    fn remembered(&self, issuer: &str, jti: Option<&String>, hash: Digest) -> Result<Option<&Issued>, Refusal> {
        let Some(issuing) = self.issuing.as_ref().filter(|issuing| issuing.url == issuer) else { return Ok(None) };
        let known = jti.and_then(|jti| issuing.tokens.get(jti)).filter(|issued| issued.hash == hash);
        known.map(Some).ok_or_else(|| refusal("token_unknown", "this node remembers no such token: exchange one again"))
    }

    /// Whether policies call this issuer so: what they say of a name holds of no other issuer's tokens.
    fn is_called(&self, name: &str, iss: &str) -> Result<(), Refusal> {
        let own = self.issuing.as_ref().map(|issuing| issuing.url.as_str());
        let named = self.active.prepared.model.issuers.iter().find(|issuer| issuer.name == name);
        let called = named.is_some_and(|issuer| match issuer.check {
            TokenCheck::Own => own == Some(iss),
            TokenCheck::Jwt { .. } | TokenCheck::Introspection { .. } => issuer.issuer == iss && own != Some(iss),
        });
        if called { Ok(()) } else { Err(refusal("token_wrong_issuer", format!("`{name}` is another issuer"))) }
    }

    /// What a token says and by what it ends. Of one of this node's own, control is believed nothing but that it was shown.
    pub(super) fn complete(&self, token: &mut proof::Token) -> Result<(), Refusal> {
        token.ends_with.clear();
        token.subject_issuer = None;
        self.is_called(&token.issuer, &token.iss)?;
        let Some(known) = self.remembered(&token.iss, token.jti.as_ref(), token.hash)? else { return Ok(()) };
        let Exchanged { subject, audience, scopes, issued_at, expires, act, confirmation, subject_issuer, .. } =
            known.token.clone();
        token.subject = Some(subject);
        token.audience = audience;
        token.scopes = scopes;
        token.issued_at = Some(issued_at);
        token.not_after = expires;
        token.actors = exchange::actors(Some(&act)).unwrap_or_default().into_iter().map(str::to_owned).collect();
        token.client_id = token.actors.first().cloned();
        token.bound_to = proof::Binding::of(&confirmation);
        token.key_id = Some(known.kid.clone());
        token.subject_issuer = Some(subject_issuer);
        token.ends_with.clone_from(&known.ends_with);
        Ok(())
    }

    /// The same of one that is exchanged.
    fn completed(&self, token: &VerifiedToken) -> Result<VerifiedToken, Refusal> {
        self.is_called(&token.issuer_name, &token.issuer)?;
        let known = self.remembered(&token.issuer, token.jti.as_ref(), Digest::from_bytes(token.token_hash))?;
        let Some(known) = known else { return Ok(token.clone()) };
        let Exchanged {
            subject,
            audience,
            scopes,
            issued_at,
            expires,
            confirmation,
            act,
            may_act,
            tenant,
            subject_issuer,
        } = known.token.clone();
        Ok(VerifiedToken {
            issuer_name: OWN_ISSUER.to_owned(),
            subject: Some(subject),
            audience,
            scopes,
            issued_at: Some(issued_at),
            expires: Some(expires),
            not_after: expires,
            confirmation,
            act: Some(act),
            may_act,
            tenant,
            subject_issuer: Some(subject_issuer),
            key_id: Some(known.kid.clone()),
            ..token.clone()
        })
    }

    /// Whoever acts for somebody shows a token of this node's own: who has another one exchanges it.
    pub(super) fn only_own(&self, proofs: &[Shown]) -> Result<(), Refusal> {
        let is_own = |iss: &String| self.issuing.as_ref().is_some_and(|issuing| issuing.url == *iss);
        let is_foreign = |shown: &Shown| matches!(shown, Shown::Token(token) if !is_own(&token.iss));
        if proofs.iter().any(is_foreign) {
            return Err(refusal("token_wrong_issuer", "agents act by tokens of this node: exchange that one first"));
        }
        Ok(())
    }

    /// The same of all proofs of a caller; of a workload of this node, a token has to be its own.
    pub(super) fn complete_all(&self, proofs: &mut [Shown], own: Option<&str>) -> Result<(), Refusal> {
        for proof in proofs {
            let Shown::Token(token) = proof else { continue };
            self.complete(token)?;
            let is_own = |issuing: &Issuing| issuing.url == token.iss;
            if let Some(own) = own
                && self.issuing.as_ref().is_some_and(is_own)
                && token.actors.first().is_none_or(|actor| actor != own)
            {
                return Err(refusal("token_of_another_actor", "another one acts by this token"));
            }
        }
        Ok(())
    }
}

/// The first delegation that gives a token; if none does, why the first one that is about the caller and the token does not.
fn by_delegation(
    model: &Model,
    own: &str,
    actor: &Actor,
    subject: &VerifiedToken,
    wanted: &Exchange,
    now: Timestamp,
) -> Result<(String, Exchanged), Refusal> {
    let Exchange { asked, holds, .. } = wanted;
    let issuer = model.issuers.iter().position(|issuer| issuer.name == subject.issuer_name);
    let is_about = |delegation: &&Delegation| {
        let named = |subject: &String| delegation.subjects.contains(subject);
        Some(delegation.issuer) == issuer
            && delegation.actors.iter().any(|named| actor.named.contains(named))
            && (delegation.subjects.is_empty() || subject.subject.as_ref().is_some_and(named))
    };
    let asks = exchange::Actor { issuer: own, subject: &actor.spiffe_id, tenant: actor.tenant.as_deref(), holds };
    let mut refused = None;
    for delegation in model.delegations.iter().filter(is_about) {
        match exchange::exchange(subject, &asks, asked, &allowed(delegation, model), now) {
            Ok(exchanged) => return Ok((delegation.name.clone(), exchanged)),
            Err(error) => drop(refused.get_or_insert(error)),
        }
    }
    Err(match refused {
        Some(error) => refusal(error.reason(), error),
        None => refusal("exchange_not_allowed", "no delegation lets the caller act for this subject"),
    })
}

fn allowed(delegation: &Delegation, model: &Model) -> Allowed {
    let spiffe_id = |actor: &model::Actor| match *actor {
        model::Actor::Workload(index) => {
            Some(format!("spiffe://{}{}", model.trust_domain, model.workloads[index].spiffe_path))
        }
        model::Actor::Peer(index) => model.peers[index].spiffe_id.as_ref().map(|id| id.as_str().to_owned()),
    };
    Allowed {
        audience: delegation.audiences.clone(),
        scopes: delegation.scopes.clone(),
        lifetime: delegation.ttl,
        depth: delegation.depth,
        of_actors: delegation.hands_on.iter().filter_map(spiffe_id).collect(),
        across_tenants: delegation.across_tenants,
    }
}
