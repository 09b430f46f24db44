//! Approvals, each change of which is kept before it counts.
//!
//! Enters: what the state machine takes, and the store. Leaves: what it returns, when that is on disk. Never: a yes that a restart
//! would forget, or that a crash gives back to be used again.
//!
//! If the store refuses, the narrower state holds: a yes was not given; a no, an end, a use was. The error says that a restart
//! would forget the latter.

use aws_lc_rs::rand;
use jiff::Timestamp;

use super::{
    approvals::{Approval, ApprovalError, Approvals, Approver, Asked, Entry, Group, Id, Requested, Told, Whose},
    call::{Call, CallHash},
};
use crate::{
    digest::Digest,
    store::{Store, StoreError, revoked::Revoked},
};

#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    #[error(transparent)]
    Approval(#[from] ApprovalError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("there is no randomness")]
    Randomness,
}

impl KeptError {
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Approval(error) => error.reason(),
            Self::Store(error) => error.reason(),
            Self::Randomness => "internal",
        }
    }
}

/// A call for which a policy wants a yes, before it has an id.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub call: Call,
    /// User of the process that asks.
    pub uid: u32,
    /// Names of `[[approvers]]`: one of them is enough.
    pub approvers: Vec<String>,
    /// Ids of the policies that want it.
    pub policies: Vec<String>,
}

pub struct Kept {
    approvals: Approvals,
}

impl Kept {
    pub fn load(store: &Store) -> Result<Self, StoreError> {
        Ok(Self { approvals: Approvals::load(store.approvals()?) })
    }

    /// What there is.
    pub fn approvals(&self) -> &Approvals {
        &self.approvals
    }

    /// [`Approvals::request`]. A new entry may be lost with a crash, until somebody decides it.
    pub fn request(&mut self, store: &Store, now: Timestamp, wanted: Wanted) -> Result<Requested, KeptError> {
        let Wanted { call, uid, approvers, policies } = wanted;
        let id = self.new_id()?;
        let requested = self.approvals.request(now, Asked { id, call, uid, approvers, policies })?;
        let keep = || {
            if !requested.forgotten.is_empty() {
                store.remove_approvals(&requested.forgotten)?;
            }
            match self.approvals.get(&requested.id).filter(|_| requested.changed) {
                Some(entry) => store.put_approvals_later([entry]),
                None => Ok(()),
            }
        };
        let kept = keep();
        if let Err(error) = kept {
            // Nobody was asked: whoever decides it would decide something that is not there after a restart.
            if requested.told.is_some() {
                self.approvals.forget(&requested.id);
            }
            return Err(error.into());
        }
        Ok(requested)
    }

    /// [`Approvals::grant`].
    pub fn grant(&mut self, store: &Store, now: Timestamp, id: &Id, approver: Approver) -> Result<Told, KeptError> {
        let before = self.approvals.get(id).cloned();
        let told = self.approvals.grant(now, id, approver)?;
        if let Err(error) = self.keep(store, &[told.id]) {
            if let Some(before) = before {
                // What failed may have been written all the same; a yes that nobody knows of must not come back.
                let _ = store.put_approvals_later([&before]);
                self.approvals.put(before);
            }
            return Err(error.into());
        }
        Ok(told)
    }

    /// [`Approvals::deny`].
    pub fn deny(&mut self, store: &Store, now: Timestamp, id: &Id, approver: Approver) -> Result<Told, KeptError> {
        let told = self.approvals.deny(now, id, approver)?;
        self.keep(store, &[told.id])?;
        Ok(told)
    }

    /// [`Approvals::use_up`]. The call can be made when this has returned: whatever happens then, it cannot be made twice.
    pub fn use_up(
        &mut self,
        store: &Store,
        now: Timestamp,
        hash: &CallHash,
        approvers: &[String],
    ) -> Result<Approval, KeptError> {
        let approval = self.approvals.use_up(now, hash, approvers)?;
        self.keep(store, &[approval.id])?;
        Ok(approval)
    }

    /// [`Approvals::expire`], and [`Approvals::prune`]. Time makes both happen again after a crash.
    pub fn expire(&mut self, store: &Store, now: Timestamp) -> (Vec<Told>, Result<(), StoreError>) {
        let told = self.approvals.expire(now);
        let forgotten = self.approvals.prune(now);
        let keep = || {
            if !told.is_empty() {
                store.put_approvals_later(told.iter().filter_map(|told| self.approvals.get(&told.id)))?;
            }
            if forgotten.is_empty() { Ok(()) } else { store.remove_approvals(&forgotten) }
        };
        let kept = keep();
        (told, kept)
    }

    /// [`Approvals::cancel_of`], if it is something of which calls can be.
    pub fn revoked(&mut self, store: &Store, now: Timestamp, what: &Revoked) -> (Vec<Told>, Result<(), StoreError>) {
        let told = whose(what).map(|whose| self.approvals.cancel_of(now, whose)).unwrap_or_default();
        let kept = self.keep_all(store, &told);
        (told, kept)
    }

    /// [`Approvals::policy_changed`].
    pub fn policy_changed(
        &mut self,
        store: &Store,
        now: Timestamp,
        policy: Digest,
        groups: impl IntoIterator<Item = Group>,
    ) -> (Vec<Told>, Result<(), StoreError>) {
        let told = self.approvals.policy_changed(now, policy, groups);
        let kept = self.keep_all(store, &told);
        (told, kept)
    }

    fn keep_all(&self, store: &Store, told: &[Told]) -> Result<(), StoreError> {
        let ids: Vec<Id> = told.iter().map(|told| told.id).collect();
        if ids.is_empty() { Ok(()) } else { self.keep(store, &ids) }
    }

    fn keep(&self, store: &Store, ids: &[Id]) -> Result<(), StoreError> {
        let entries: Vec<&Entry> = ids.iter().filter_map(|id| self.approvals.get(id)).collect();
        store.put_approvals(entries)
    }

    fn new_id(&self) -> Result<Id, KeptError> {
        loop {
            let mut bytes = [0; 6];
            rand::fill(&mut bytes).map_err(|_| KeptError::Randomness)?;
            if self.approvals.is_free(&Id(bytes)) {
                return Ok(Id(bytes));
            }
        }
    }
}

fn whose(what: &Revoked) -> Option<Whose<'_>> {
    match what {
        Revoked::Workload(name) | Revoked::Agent(name) => Some(Whose::Workload(name)),
        Revoked::Instance(path) => Some(Whose::Instance(path)),
        Revoked::SpiffeId(id) => Some(Whose::SpiffeId(id)),
        Revoked::Issuer(issuer) => Some(Whose::Issuer(issuer)),
        // Not by these names: a call says for whom it is, not by which token or key that was proven.
        _ => None,
    }
}

#[cfg(test)]
mod tests;
