//! What the control process says, and what it is answered.
//!
//! Enters: its messages. Leaves: answers. Never: an answer about a connection that dataplane does not know.

use super::{
    Daemon,
    control::{Control, Who},
    forgetting::{Forgetting, Waiting},
    nodes,
};
use crate::{
    audit::record::Record,
    ipc::{Connection, FromControl, Question, Refusal, ToControl},
};

pub(super) fn said(daemon: &mut Daemon, control: &mut Control, forgetting: &mut Forgetting, message: FromControl) {
    match message {
        FromControl::Ready { generation } => {
            control.became_ready();
            daemon.control_is_ready(generation);
            tell_identities(daemon, control);
        }
        FromControl::Grant { question, connection, wanted } => {
            let result = who(control, connection).and_then(|who| daemon.grant(&who, wanted));
            answer(control, question, result, |grant| ToControl::Granted { question, grant });
        }
        FromControl::Return { question, connection, grant } => {
            let result = who(control, connection).and_then(|who| daemon.give_back(&who, &grant));
            answer(control, question, result, |()| ToControl::Returned { question });
        }
        FromControl::Held { question, connection } => {
            let result = who(control, connection).and_then(|who| daemon.held(&who));
            answer(control, question, result, |grants| ToControl::Holds { question, grants });
        }
        FromControl::Refused { connection, rule, reason, proofs } => {
            if let Ok(who) = who(control, connection) {
                daemon.refused(&who, rule, &reason, &proofs);
            }
        }
        FromControl::Forward { question, connection, wanted, request } => {
            let result = who(control, connection).and_then(|who| daemon.forward(&who, wanted, request));
            answer(control, question, result, |()| ToControl::Returned { question });
        }
        FromControl::Forwarded { connection, rule, reason, proofs, request } => {
            if let Ok(who) = who(control, connection) {
                daemon.forwarded(&who, rule, reason, &proofs, request);
            }
        }
        FromControl::Downstream { question, connection, server, audience, token } => {
            let token = token.map(|token| *token);
            let result = who(control, connection).and_then(|who| daemon.downstream(&who, &server, &audience, token));
            answer(control, question, result, |token| ToControl::Exchanged { question, token: Box::new(token) });
        }
        FromControl::Admit { question, connection, server, token } => {
            let token = token.map(|token| *token);
            let result = who(control, connection).and_then(|who| daemon.admit_to_server(&who, &server, token));
            answer(control, question, result, |_| ToControl::Returned { question });
        }
        FromControl::Launch { question, connection, server } => {
            let result = who(control, connection).and_then(|who| daemon.launch(&who, question, &server));
            if let Err(refusal) = result {
                control.tell(&ToControl::NotGranted { question, refusal }, &[]);
            }
        }
        FromControl::Called { connection, server, tool, outcome, microseconds } => {
            if let Ok(who) = who(control, connection) {
                daemon.called(&who, &server, tool, outcome, microseconds);
            }
        }
        FromControl::Act { question, connection, act } => {
            let result = who(control, connection).and_then(|who| daemon.act(&who, *act));
            for message in daemon.take_messages() {
                control.tell_message(&message);
            }
            answer(control, question, result, |acted| ToControl::Acted { question, acted: Box::new(acted) });
        }
        FromControl::Approve { question, connection, asked, token } => {
            let token = token.map(|token| *token);
            match who(control, connection).and_then(|who| daemon.approve(&who, asked, token)) {
                Ok(answer) => control.tell_approvals(question, &answer),
                Err(refusal) => control.tell(&ToControl::NotGranted { question, refusal }, &[]),
            }
        }
        FromControl::Exchange { question, connection, exchange } => {
            let result = who(control, connection).and_then(|who| daemon.exchange(&who, &exchange));
            answer(control, question, result, |token| ToControl::Exchanged { question, token: Box::new(token) });
        }
        FromControl::Revoke { question, connection, what, text } => {
            let refusal = match who(control, connection) {
                Ok(Who::Admin { uid, .. }) => match daemon.revoke(what, uid, &text) {
                    Ok(effect) => {
                        return forgetting.then(control, Waiting::Caller(ToControl::Revoked { question, effect }));
                    }
                    Err(message) => Refusal { reason: "store_unusable".to_owned(), message },
                },
                Ok(_) => Refusal {
                    reason: "not_an_operator".to_owned(),
                    message: "only operators revoke, on their own socket".to_owned(),
                },
                Err(refusal) => refusal,
            };
            control.tell(&ToControl::NotGranted { question, refusal }, &[]);
        }
        FromControl::Forgotten { question } => forgetting.forgotten(control, question),
        FromControl::NodeSession { question, connection, certificate, key, speaks_for } => {
            let result = who(control, connection)
                .and_then(|who| daemon.admit_node(&who, connection, *certificate, &key, &speaks_for));
            answer(control, question, result, |nodes::Admitted { key_id, seconds, labels }| ToControl::Admitted {
                question,
                key_id,
                seconds,
                labels,
            });
        }
        FromControl::NodeAccepted { node, key, key_id, seconds, labels, last } => {
            daemon.node_accepted(&node, &key, key_id, seconds, &labels, last);
        }
        FromControl::Listed { authority, certificate } => daemon.listed(&authority, certificate),
        FromControl::Counted { counts } => daemon.counted(counts),
        FromControl::Ends { ends } => daemon.ends(ends),
        FromControl::Closed { connection } => {
            daemon.forget_session(connection);
            control.forget(connection);
        }
    }
}

impl Daemon {
    /// Live grants go on; new ones wait for the next process.
    pub fn control_ended(&mut self, how: &str) {
        self.nodes.control_ended();
        self.servers.control_ended();
        self.control_ready = false;
        tracing::error!(how, "the control process ended; it is started again");
        self.report(Record::about("control_ended", how));
    }
}

/// Control hears for whom this node speaks whenever that changed.
pub(super) fn tell_identities(daemon: &mut Daemon, control: &mut Control) {
    if control.is_ready()
        && let Some(identities) = daemon.identities()
    {
        control.tell_identities(&identities);
    }
}

fn who(control: &Control, connection: Connection) -> Result<Who, Refusal> {
    let gone = || Refusal { reason: "caller_gone".to_owned(), message: "there is no such connection".to_owned() };
    control.who(connection).cloned().ok_or_else(gone)
}

/// What was asked for, or why not.
fn answer<T>(
    control: &mut Control,
    question: Question,
    result: Result<T, Refusal>,
    message: impl FnOnce(T) -> ToControl,
) {
    let message = match result {
        Ok(value) => message(value),
        Err(refusal) => ToControl::NotGranted { question, refusal },
    };
    control.tell(&message, &[]);
}
