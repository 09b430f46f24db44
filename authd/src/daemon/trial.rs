//! A policy that goes back to the one before it unless somebody confirms it: for the case that it locks its author out.
//!
//! What is tried, and what it goes back to, is on disk before it is promised: a daemon that is killed meanwhile goes back when
//! it starts again. What went back does not come into force by itself any more; `authd apply` takes it all the same.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::{
    Daemon, DaemonError,
    admin::Applied,
    state::{State, StateError, Tried},
};
use crate::{
    audit::record::{Record, format_time},
    policy::diagnostic::Source,
};

/// If what it goes back to is refused now, that is tried again after so long.
const AGAIN: Duration = Duration::from_secs(10);

/// Files that came into force by themselves, because they changed, can still be put on trial for so long.
const RECENT: Duration = Duration::from_secs(600);

pub struct Trial {
    /// `policy.d` as it is tried, or as it was not confirmed.
    tried: Vec<Source>,
    before: Vec<Source>,
    /// When it goes back; it did already if there is no such time.
    ends: Option<(Instant, Timestamp)>,
}

impl Trial {
    /// What an earlier daemon left. Nobody confirmed it.
    pub fn left(state: &State) -> Result<Option<Self>, StateError> {
        Ok(state.tried()?.map(|Tried { tried, before }| Self { tried, before, ends: None }))
    }

    /// The policy to take instead, if this is the one that was not confirmed.
    pub fn instead_of(&self, sources: &[Source]) -> Option<Vec<Source>> {
        (self.tried == sources).then(|| self.before.clone())
    }

    pub fn describe(&self) -> String {
        match &self.ends {
            Some((_, end)) => {
                format!("on trial: goes back to the one before at {} unless confirmed", format_time(*end))
            }
            None => "the one in the directory was not confirmed; the one before it is in force".to_owned(),
        }
    }
}

impl Daemon {
    /// When the policy on trial goes back.
    pub fn trial_ends(&self) -> Option<Instant> {
        self.trial.as_ref()?.ends.map(|(instant, _)| instant)
    }

    /// Whether these files were tried, and nobody confirmed them.
    pub fn was_not_confirmed(&self, sources: &[Source]) -> bool {
        self.trial.as_ref().is_some_and(|trial| trial.ends.is_none() && trial.tried == sources)
    }

    /// The policy in force goes back after a while. One that is tried already gets more time, and goes back as far.
    pub(super) fn put_on_trial(&mut self, time: Duration, applied: &mut Applied) -> Result<(), DaemonError> {
        let pending = self.trial.take().filter(|trial| trial.ends.is_some()).map(|trial| trial.before);
        let recent = || self.before.clone().filter(|(_, since)| since.elapsed() < RECENT).map(|(before, _)| before);
        let Some(before) = pending.or_else(recent) else { return Ok(()) };
        let tried = self.active.prepared.sources.clone();
        self.state.keep_tried(&Tried { tried: tried.clone(), before: before.clone() })?;
        let end = Timestamp::now() + jiff::SignedDuration::try_from(time).unwrap_or_default();
        applied.goes_back = Some(format_time(end));
        self.trial = Some(Trial { tried, before, ends: Some((Instant::now() + time, end)) });
        let mut record =
            Record::about("policy_on_trial", format!("goes back at {} unless confirmed", format_time(end)));
        record.generation = Some(self.generation());
        self.report(record);
        Ok(())
    }

    /// Keeps the policy in force, and forgets what was not confirmed. Returns whether one was on trial.
    pub fn confirm(&mut self, uid: Option<u32>) -> Result<bool, DaemonError> {
        self.before = None;
        let Some(trial) = self.trial.take() else { return Ok(false) };
        self.state.forget_tried()?;
        if trial.ends.is_none() {
            return Ok(false);
        }
        let mut record = Record::about("policy_confirmed", "it stays");
        record.generation = Some(self.generation());
        record.uid = uid;
        self.report(record);
        Ok(true)
    }

    /// The time is over: what to go back to.
    pub(super) fn go_back(&mut self) -> Option<Vec<Source>> {
        let trial = self.trial.as_mut()?;
        trial.ends.take()?;
        let before = trial.before.clone();
        tracing::warn!("nobody confirmed the policy: it goes back to the one before");
        let mut record = Record::about("policy_rolled_back", "nobody confirmed it: back to the one before");
        record.generation = Some(self.generation());
        self.report(record);
        Some(before)
    }

    /// What it was to go back to is refused now, perhaps because a file that it names is gone.
    pub(super) fn go_back_later(&mut self) {
        let Some(trial) = &mut self.trial else { return };
        let end = Timestamp::now() + jiff::SignedDuration::try_from(AGAIN).unwrap_or_default();
        trial.ends = Some((Instant::now() + AGAIN, end));
    }

    /// Other files came into force while some were on trial: they are on trial now.
    pub(super) fn tries_others(&mut self) -> Result<(), DaemonError> {
        let Some(trial) = self.trial.as_mut().filter(|trial| trial.ends.is_some()) else { return Ok(()) };
        trial.tried = self.active.prepared.sources.clone();
        let tried = Tried { tried: trial.tried.clone(), before: trial.before.clone() };
        Ok(self.state.keep_tried(&tried)?)
    }
}
