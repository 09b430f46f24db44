//! The operators' socket: what can be asked, and what is answered.
//!
//! One request per connection, one JSON line; the answer is one JSON line, or many for a stream. Who begins with anything but
//! an object speaks HTTP, and is handed to the control process. Only root can connect: the socket lies in a directory of
//! root's, with mode 0600, and the peer's credentials are compared too.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use nix::sys::socket::{MsgFlags, recv};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::UnixStream,
    sync::{broadcast, mpsc, oneshot},
};

use super::{
    frames::FrameVerdict,
    granting::Effect,
    status::Status,
    trust::{ListedKey, NewKey},
};
use crate::{
    dataplane::attestation::attest,
    decisions::asked,
    policy::explain::Explanation,
    proofs::api_key::text::KeyId,
    store::{revocations::Revocation, revoked::Revoked},
};

/// No request is longer.
const MAX_REQUEST: u64 = 64 << 10;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    Status,
    /// Load what lies in the policy directory now; go back to the policy before unless it is confirmed in so many seconds.
    Apply {
        #[serde(default)]
        confirm: Option<u32>,
    },
    /// Keep the policy that is on trial.
    Confirm,
    /// The last records of flows, and those to come if `follow`.
    Flows {
        follow: bool,
        last: usize,
    },
    Explain {
        from: String,
        to: String,
        at: Option<String>,
    },
    /// What becomes of frames at a guarded interface; each is base64.
    Frames {
        frames: Vec<String>,
    },
    KeyCreate(Box<NewKey>),
    KeyList,
    KeyRevoke {
        id: KeyId,
    },
    Revoke {
        what: Revoked,
        text: String,
    },
    Reinstate {
        what: Revoked,
    },
    Revocations,
    /// By which keys this node signs tokens.
    SigningKeys,
    /// Another key signs from now on.
    SigningKeyRotate,
    /// About calls of agents that wait for a person's yes.
    Approvals(asked::Question),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    Status(Box<Status>),
    Applied(Applied),
    Confirmed {
        found: bool,
    },
    Explanation(Box<Explained>),
    Frames {
        verdicts: Vec<FrameVerdict>,
    },
    KeyCreated(Box<ListedKey>),
    Keys {
        keys: Vec<ListedKey>,
    },
    KeyRevoked(Box<ListedKey>),
    Revoked(Effect),
    Reinstated {
        found: bool,
    },
    Revocations {
        revocations: Vec<Revocation>,
    },
    SigningKeys {
        issuer: String,
        keys: Vec<SigningKey>,
        /// Tokens that live.
        tokens: usize,
    },
    Approvals(asked::Answer),
    /// The request could not be met.
    Error {
        message: String,
    },
}

/// A key by which this node signs tokens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SigningKey {
    pub kid: String,
    pub signs_from: jiff::Timestamp,
    /// `signs`, `next` or `before`.
    pub state: String,
}

/// What an attempt to load a policy came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Applied {
    pub ok: bool,
    /// In force now.
    pub generation: u32,
    /// Entries written.
    pub written: usize,
    pub microseconds: u64,
    /// Why not, as it is shown to people.
    pub errors: Vec<String>,
    pub warnings: usize,
    /// When it goes back to the policy before unless it is confirmed, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goes_back: Option<String>,
}

/// An explanation, as people and as programs read it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explained {
    pub text: String,
    pub json: serde_json::Value,
}

impl Explained {
    pub fn new(explanation: &Explanation) -> Self {
        Self {
            text: explanation.to_string(),
            json: serde_json::to_value(explanation).unwrap_or(serde_json::Value::Null),
        }
    }
}

/// What an operator's connection turned out to be.
pub enum Asked {
    Call(Call),
    /// One that speaks HTTP, unread.
    Http {
        connection: OwnedFd,
        uid: u32,
        cgroup: Option<String>,
    },
}

/// A request on its way to the daemon, with where the answer goes.
pub struct Call {
    pub request: Request,
    /// User who asks, and from which cgroup, as the kernel says.
    pub uid: u32,
    pub cgroup: Option<String>,
    pub answer: oneshot::Sender<Reply>,
}

pub enum Reply {
    One(Answer),
    /// Lines at once, then, if there is one, whatever comes.
    Lines(Vec<String>, Option<broadcast::Receiver<String>>),
}

/// Serves one connection. Errors concern nobody but the caller.
pub async fn serve(mut stream: UnixStream, calls: mpsc::Sender<Asked>) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    if uid != 0 {
        return Ok(());
    }
    let cgroup = attest(stream.as_fd()).ok().map(|attested| attested.cgroup);
    match first_byte(&stream).await? {
        None => return Ok(()),
        Some(b'{') => {}
        Some(_) => {
            let connection = OwnedFd::from(stream.into_std()?);
            let _ = calls.send(Asked::Http { connection, uid, cgroup }).await;
            return Ok(());
        }
    }
    let mut line = String::new();
    let (reader, mut writer) = stream.split();
    BufReader::new(reader.take(MAX_REQUEST)).read_line(&mut line).await?;
    let request = match serde_json::from_str(&line) {
        Ok(request) => request,
        Err(error) => {
            let answer = Answer::Error { message: format!("no request that authd knows: {error}") };
            return write_line(&mut writer, &serde_json::to_string(&answer)?).await;
        }
    };
    let (answer, reply) = oneshot::channel();
    if calls.send(Asked::Call(Call { request, uid, cgroup, answer })).await.is_err() {
        return Ok(());
    }
    match reply.await {
        Ok(Reply::One(answer)) => write_line(&mut writer, &serde_json::to_string(&answer)?).await,
        Ok(Reply::Lines(lines, more)) => {
            for line in lines {
                write_line(&mut writer, &line).await?;
            }
            let Some(mut more) = more else { return Ok(()) };
            loop {
                match more.recv().await {
                    Ok(line) => write_line(&mut writer, &line).await?,
                    Err(broadcast::error::RecvError::Lagged(lines)) => {
                        let note = serde_json::json!({ "event": "skipped", "count": lines });
                        write_line(&mut writer, &note.to_string()).await?;
                    }
                    Err(broadcast::error::RecvError::Closed) => return Ok(()),
                }
            }
        }
        Err(_) => Ok(()),
    }
}

/// Looks at what comes first, and leaves it there. `None`: nothing comes.
pub async fn first_byte(stream: &UnixStream) -> io::Result<Option<u8>> {
    let mut first = [0; 1];
    let length =
        stream.async_io(Interest::READABLE, || Ok(recv(stream.as_raw_fd(), &mut first, MsgFlags::MSG_PEEK)?)).await?;
    Ok((length > 0).then_some(first[0]))
}

async fn write_line(writer: &mut (impl AsyncWriteExt + Unpin), line: &str) -> io::Result<()> {
    writer.write_all(line.as_bytes()).await?;
    writer.write_all(b"\n").await
}

/// Asks the daemon; blocking, for the command line.
pub mod client {
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixStream,
    };

    use super::{Answer, Path, Request, io};

    pub fn ask(socket: &Path, request: &Request) -> io::Result<Answer> {
        let mut line = String::new();
        open(socket, request)?.read_line(&mut line)?;
        if line.is_empty() {
            return Err(io::Error::other("the daemon closed the connection: only root may ask"));
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// A request whose answer is many lines.
    pub fn open(socket: &Path, request: &Request) -> io::Result<BufReader<UnixStream>> {
        let mut stream = UnixStream::connect(socket)?;
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        stream.write_all(line.as_bytes())?;
        Ok(BufReader::new(stream))
    }
}
