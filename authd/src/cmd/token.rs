//! `authd token verify` and `authd token inspect`

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, anyhow};
use jiff::Timestamp;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::{Value, json};

use super::{BAD_CONFIG, FAILED, print_diagnostics, settings};
use crate::{
    cli::TokenQuestion,
    digest::Digest,
    policy::{
        load,
        model::{Issuer, Keys, Model, TokenCheck},
    },
    proofs::{
        access::{self, AccessError, Shown},
        binding,
        claims::{Expected, VerifiedToken},
        dpop::{ProofPolicy, Target},
        jwk::{JwksError, KeySet},
        jws,
        jwt::{self, TokenError},
        scheme::{Credentials, Scheme},
    },
};

/// Why a token is refused here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
enum Refusal {
    // What can be asked.
    #[error("no issuer of the policy has the token's `iss`")]
    IssuerUnknown,
    #[error("several issuers of the policy have the token's `iss`: name one with `--issuer`")]
    IssuerAmbiguous,
    #[error("the issuer is asked about its tokens (RFC 7662), which only the daemon does")]
    IntrospectionOnly,
    #[error("the issuer's keys are not on this node: name a file with `--jwks`")]
    KeysUnavailable,
    #[error(transparent)]
    Keys(#[from] JwksError),
    // What the daemon would say.
    #[error("the line is no text")]
    NoText,
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Access(#[from] AccessError),
}

impl Refusal {
    fn reason(&self) -> &'static str {
        match self {
            Self::IssuerUnknown => "issuer_unknown",
            Self::IssuerAmbiguous => "issuer_ambiguous",
            Self::IntrospectionOnly => "introspection_only",
            Self::KeysUnavailable => "keys_unavailable",
            Self::Keys(error) => error.reason(),
            Self::NoText => "token_malformed",
            Self::Token(error) => error.reason(),
            Self::Access(error) => error.reason(),
        }
    }
}

pub fn verify(config: Option<&Path>, question: TokenQuestion) -> anyhow::Result<ExitCode> {
    let directory = match &question.policy {
        Some(directory) => directory.clone(),
        None => match settings(config) {
            Ok(config) => config.policy,
            Err(code) => return Ok(code),
        },
    };
    let policy = load::directory(&directory);
    let Some(model) = policy.model else {
        print_diagnostics(&policy.diagnostics);
        return Ok(ExitCode::from(BAD_CONFIG));
    };
    let mut verifier = Verifier::new(model, directory, question)?;
    let file = verifier.question.file.clone();
    each_line(&file, |line| {
        let checked = str::from_utf8(line).map_err(|_| Refusal::NoText).and_then(|token| verifier.check(token));
        let answer = match &checked {
            Ok(token) => accepted(token),
            Err(refusal) => json!({
                "accepted": false, "reason": refusal.reason(), "principal": null, "message": refusal.to_string(),
            }),
        };
        (answer, checked.is_ok())
    })
}

pub fn inspect(file: &Path) -> anyhow::Result<ExitCode> {
    each_line(file, |line| {
        let text = str::from_utf8(line).map_err(|_| jws::JwsError::Encoding);
        let read = text.and_then(|text| Ok((jws::inspect(text)?, jws::signing_input(text)?)));
        let answer = match &read {
            Ok(((header, claims), signed)) => json!({
                "verified": false,
                "note": "nothing was checked",
                "header": header,
                "claims": claims,
                "token_sha256": Digest::of(signed.as_bytes()),
            }),
            Err(error) => json!({
                "verified": false,
                "reason": error.reason(),
                "message": error.to_string(),
                // As an opaque token.
                "token_sha256": Digest::of(line),
            }),
        };
        (answer, read.is_ok())
    })
}

fn accepted(token: &VerifiedToken) -> Value {
    json!({
        "accepted": true,
        "reason": null,
        "principal": token.principal(),
        "issuer": token.issuer_name,
        "client_id": token.client_id,
        "audience": token.audience,
        "scopes": token.scopes,
        "key_id": token.key_id,
        "token_sha256": Digest::from_bytes(token.token_hash),
        "not_after": token.not_after.to_string(),
    })
}

/// One JSON line for each line; fails unless there is one and all of them are good.
fn each_line(file: &Path, mut answer: impl FnMut(&[u8]) -> (Value, bool)) -> anyhow::Result<ExitCode> {
    let reader: Box<dyn BufRead> = match file == Path::new("-") {
        true => Box::new(BufReader::new(io::stdin())),
        false => Box::new(BufReader::new(File::open(file).with_context(|| format!("opening {}", file.display()))?)),
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let (mut lines, mut good) = (0u64, 0u64);
    for line in reader.split(b'\n') {
        let (value, is_good) = answer(&line.with_context(|| format!("reading {}", file.display()))?);
        writeln!(out, "{value}")?;
        lines += 1;
        good += u64::from(is_good);
    }
    out.flush()?;
    if lines == 0 {
        return Err(anyhow!("{} holds no token", file.display()));
    }
    Ok(if lines == good { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// What is the same for all tokens of a run.
struct Verifier {
    model: Model,
    directory: PathBuf,
    question: TokenQuestion,
    /// Index of the issuer that was named.
    named: Option<usize>,
    certificate: Option<[u8; 32]>,
    target: Target,
    now: Timestamp,
    /// By issuer.
    keys: HashMap<usize, Result<KeySet, Refusal>>,
}

impl Verifier {
    fn new(model: Model, directory: PathBuf, question: TokenQuestion) -> anyhow::Result<Self> {
        let named = match &question.issuer {
            None => None,
            Some(name) => {
                let known = model.issuers.iter().position(|issuer| issuer.name == *name);
                Some(known.with_context(|| format!("the policy has no issuer `{name}`"))?)
            }
        };
        let mut keys = HashMap::new();
        if let (Some(file), Some(index)) = (&question.jwks, named) {
            let bytes = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
            let has_keys = matches!(model.issuers.get(index), Some(Issuer { check: TokenCheck::Jwt { .. }, .. }));
            let set = if has_keys { KeySet::parse(&bytes)? } else { return Err(anyhow!(Refusal::IntrospectionOnly)) };
            keys.insert(index, Ok(set));
        }
        let certificate = match &question.cert {
            None => None,
            Some(file) => {
                let certificate = CertificateDer::from_pem_file(file)
                    .with_context(|| format!("{} holds no certificate in PEM", file.display()))?;
                Some(binding::certificate_hash(&certificate))
            }
        };
        // Without a proof nothing looks at it.
        let url = question.url.as_deref().unwrap_or("https://localhost/");
        let target = Target::parse(url).with_context(|| format!("`{url}`"))?;
        let now = question.at.unwrap_or_else(Timestamp::now);
        Ok(Self { model, directory, question, named, certificate, target, now, keys })
    }

    fn check(&mut self, token: &str) -> Result<VerifiedToken, Refusal> {
        let index = match self.named {
            Some(index) => index,
            None => self.issuer_of(token)?,
        };
        let Some(issuer) = self.model.issuers.get(index) else { return Err(Refusal::IssuerUnknown) };
        let directory = &self.directory;
        let keys = self.keys.entry(index).or_insert_with(|| read_keys(issuer, directory)).as_ref().map_err(|e| *e)?;
        let question = &self.question;
        let expected =
            Expected { audience: question.audience.as_deref(), scopes: &question.scopes, subjects: &question.subjects };
        let verified = jwt::verify(token, keys, &issuer.policy(), &expected, self.now)?;
        let proof = question.dpop.as_deref().map(str::as_bytes);
        let scheme = if proof.is_some() { Scheme::Dpop } else { Scheme::Bearer };
        let shown = Shown {
            credentials: Credentials { scheme, token },
            certificate: self.certificate,
            proofs: proof.as_slice(),
            method: question.method.as_deref().unwrap_or_default(),
            target: &self.target,
            nonces: None,
        };
        access::check(&verified, &shown, question.bound, &ProofPolicy::default(), self.now)?;
        Ok(verified)
    }

    /// The issuer that the token says it is of. What is no token fails as the daemon would let it fail.
    fn issuer_of(&self, token: &str) -> Result<usize, Refusal> {
        let (_, claims) = jws::inspect(token).map_err(TokenError::from)?;
        let claimed = claims.get("iss").and_then(Value::as_str).ok_or(Refusal::IssuerUnknown)?;
        let mut fitting = self.model.issuers.iter().enumerate().filter(|(_, issuer)| issuer.issuer == claimed);
        match (fitting.next(), fitting.next()) {
            (Some((index, _)), None) => Ok(index),
            (None, _) => Err(Refusal::IssuerUnknown),
            (Some(_), Some(_)) => Err(Refusal::IssuerAmbiguous),
        }
    }
}

fn read_keys(issuer: &Issuer, directory: &Path) -> Result<KeySet, Refusal> {
    match &issuer.check {
        TokenCheck::Introspection { .. } => Err(Refusal::IntrospectionOnly),
        TokenCheck::Own => Err(Refusal::KeysUnavailable),
        TokenCheck::Jwt { keys: Keys::Url(_), .. } => Err(Refusal::KeysUnavailable),
        TokenCheck::Jwt { keys: Keys::File(file), .. } => {
            let bytes = fs::read(directory.join(file)).map_err(|_| Refusal::KeysUnavailable)?;
            Ok(KeySet::parse(&bytes)?)
        }
    }
}
