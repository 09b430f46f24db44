//! Every parser that sees bytes from outside, under libFuzzer. One program; `AUTHD_FUZZ_TARGET` says which parser.
//! `cargo xtask fuzz` builds it with coverage, and runs it over the corpus in `tests/corpus`.
#![no_main]

use std::{str, sync::OnceLock, time::Duration};

use authd::{
    audit::record::Record,
    config::Config,
    control::{
        client_certificate::{of_envoy, of_nginx},
        mcp::{
            message::{FromAgent, FromServer},
            sse::Reader,
        },
    },
    daemon::admin::Request as AdminRequest,
    dataplane::{
        object,
        sockets::message::{Acknowledgements, Listing, Protocol},
    },
    digest::Digest,
    ipc::{FromControl, Settings, ToControl},
    policy::{diagnostic::Source, load::texts},
    proofs::{
        api_key, base64url,
        claims::{Claims, Expected},
        dpop::{self, ProofPolicy, Target},
        introspection, json,
        jwk::KeySet,
        jws::{self, Algorithm, KeyInHeader},
        jwt::{self, IssuerPolicy},
        scheme,
        x509::{bundle, chain, crl, leaf},
    },
    store::revoked::Revoked,
};
use authd_common::parse::parse;
use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;

type Parser = fn(&[u8]);

const TARGETS: [(&str, Parser); 25] = [
    ("packet", |bytes| seen(parse(std::hint::black_box(bytes)))),
    ("event", |bytes| seen(object::event(bytes))),
    ("tag", |bytes| seen(object::tag(bytes))),
    ("policy", |bytes| on_text(bytes, |text| seen(texts(vec![source(text)])))),
    ("actions", |bytes| on_text(bytes, actions)),
    ("settings", |bytes| on_text(bytes, |text| seen(Config::parse(&source(text))))),
    ("base64url", |bytes| seen(base64url::decode(bytes))),
    ("json", |bytes| seen(json::object(bytes, json::CLAIMS))),
    ("claims", |bytes| seen(json::object(bytes, json::CLAIMS).ok().map(Claims::parse))),
    ("jws", |bytes| on_text(bytes, |text| seen(jws::parse(text, &[Algorithm::Es256], KeyInHeader::Refused)))),
    ("jwt", token),
    ("jwks", |bytes| seen(KeySet::parse(bytes))),
    ("introspection", |bytes| {
        seen(introspection::verify("a", bytes, policy(), &expected(), Duration::from_secs(60), now()));
    }),
    ("scheme", |bytes| seen(scheme::parse(&bytes.split(|byte| *byte == b'\n').collect::<Vec<_>>()))),
    ("dpop", proof),
    ("api_key", |bytes| on_text(bytes, |text| seen(api_key::text::parse(text).map(|parts| parts.digest())))),
    ("revoked", |bytes| {
        on_text(bytes, |text| {
            seen(text.split_once(' ').map(|(kind, value)| Revoked::parse(kind, value)));
        })
    }),
    ("bundle", |bytes| seen(bundle::read(bytes))),
    ("crl", |bytes| seen(crl::read(bytes))),
    ("chain", |bytes| {
        for der in chain::read(bytes).unwrap_or_default() {
            seen(leaf::Certificate::read(&der));
        }
        seen(leaf::Certificate::read(&bytes.to_vec().into()));
    }),
    ("forwarded", forwarded),
    ("netlink", |bytes| {
        seen(Acknowledgements::new(1, 8).take(bytes));
        seen(Listing::new(1, Protocol::Tcp).take(bytes));
    }),
    ("messages", |bytes| {
        seen(serde_json::from_slice::<FromControl>(bytes));
        seen(serde_json::from_slice::<ToControl>(bytes));
        seen(serde_json::from_slice::<Settings>(bytes));
        seen(serde_json::from_slice::<AdminRequest>(bytes));
    }),
    ("mcp", mcp),
    ("record", |bytes| seen(serde_json::from_slice::<Record>(bytes))),
];

fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<Parser> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var("AUTHD_FUZZ_TARGET").unwrap_or_default();
        let names = TARGETS.map(|(name, _)| name);
        let found = TARGETS.iter().find(|(known, _)| *known == name);
        found.unwrap_or_else(|| panic!("AUTHD_FUZZ_TARGET is one of {}", names.join(" "))).1
    })(bytes);
});

/// So that the compiler does not leave out what nobody needs.
fn seen<T>(value: T) {
    std::hint::black_box(value);
}

/// Messages of both sides, and a stream of events. What an agent's message is taken for, it is after it was written anew.
fn mcp(bytes: &[u8]) {
    const MOST: usize = 1 << 16;
    if let Ok(FromAgent::Request(request)) = FromAgent::parse(bytes, MOST) {
        match FromAgent::parse(&request.to_bytes(), 8 * MOST) {
            Ok(FromAgent::Request(again)) => assert_eq!((again.id, again.method), (request.id, request.method)),
            other => panic!("{request:?} became {other:?}"),
        }
    }
    if let Ok(message) = FromServer::parse(bytes) {
        assert!(!message.text().contains('\n'));
        assert_eq!(FromServer::parse(message.text().as_bytes()).as_ref(), Ok(&message));
    }
    let mut reader = Reader::new(256);
    for piece in bytes.chunks(7) {
        if reader.feed(piece).is_err() {
            return;
        }
    }
    seen(std::iter::from_fn(|| reader.take()).count());
}

fn on_text(bytes: &[u8], parser: impl FnOnce(&str)) {
    if let Ok(text) = str::from_utf8(bytes) {
        parser(text);
    }
}

fn source(text: &str) -> Source {
    Source { name: "fuzz.toml".into(), text: text.into() }
}

/// Action policies beside the tools that the corpus is about.
fn actions(text: &str) {
    let tables = concat!(
        include_str!("../../../packaging/policy.d/example.toml"),
        include_str!("../../../packaging/policy.d/agents.toml.example")
    );
    seen(texts(vec![source(tables), Source { name: "fuzz.cedar".into(), text: text.into() }]));
}

/// Always the same moment: what is found is found again.
fn now() -> Timestamp {
    Timestamp::from_second(1_795_000_000).unwrap_or_default()
}

fn policy() -> &'static IssuerPolicy {
    static POLICY: OnceLock<IssuerPolicy> = OnceLock::new();
    POLICY.get_or_init(|| IssuerPolicy {
        name: "corp".into(),
        issuer: "https://i".into(),
        algorithms: vec![Algorithm::Es256, Algorithm::Rs256],
        max_ttl: Some(Duration::from_secs(900)),
        leeway: Default::default(),
        require_at_jwt: false,
    })
}

fn expected() -> Expected<'static> {
    Expected { audience: Some("a"), scopes: &[], subjects: &[] }
}

/// As it is; and, so that the encoding is no obstacle, as lines that become the parts of a token.
fn token(bytes: &[u8]) {
    static KEYS: OnceLock<KeySet> = OnceLock::new();
    let keys = KEYS.get_or_init(|| {
        let key = br#"{"keys":[{"kty":"EC","crv":"P-256","kid":"k","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}"#;
        KeySet::parse(key).expect("this is the key of RFC 7515, A.3")
    });
    on_text(bytes, |text| seen(jwt::verify(text, keys, policy(), &expected(), now())));
    let parts: Vec<String> = bytes.splitn(3, |byte| *byte == b'\n').map(base64url::encode).collect();
    seen(jwt::verify(&parts.join("."), keys, policy(), &expected(), now()));
}

fn proof(bytes: &[u8]) {
    let Ok(target) = Target::parse("https://a.example/b") else { return };
    let request = dpop::Request { method: "POST", target: &target, access_token: Some("a"), nonces: None };
    let parts: Vec<String> = bytes.splitn(3, |byte| *byte == b'\n').map(base64url::encode).collect();
    seen(dpop::verify(&parts.join("."), &request, &ProofPolicy::default(), now()));
    on_text(bytes, |text| {
        seen(dpop::verify(text, &request, &ProofPolicy::default(), now()));
        seen(Target::parse(text));
    });
}

/// As it is; and as lines that become the names of a client's certificate in the header that Envoy makes of it. Whatever they
/// are, it is that client's header.
fn forwarded(bytes: &[u8]) {
    const DER: &[u8] = &[0x30, 0];
    const PEM: &str = "-----BEGIN%20CERTIFICATE-----%0AMAA=%0A-----END%20CERTIFICATE-----%0A";
    on_text(bytes, |text| {
        seen(of_envoy(text).is_ok());
        seen(of_nginx(text).is_ok());
        let mut names = text.split('\n');
        let mut name = || names.next().unwrap_or_default();
        let subject = name().replace('\\', "\\\\").replace('"', "\\\"");
        let hash = Digest::of(DER);
        let header = format!("Hash={hash};Cert=\"{PEM}\";Subject=\"{subject}\";URI={};DNS={}", name(), name());
        if let Ok(found) = of_envoy(&header) {
            assert!(found.first().is_some_and(|leaf| leaf.as_ref() == DER), "{header}: {found:?}");
        }
    });
}
