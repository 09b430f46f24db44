//! Whose a token can be, before anybody is asked about it.
//!
//! Enters: a token that nobody verified, and issuers of the policy. Leaves: those by which it is worth verifying. Never: two that
//! would have to be asked about one token: whoever is asked has it, and it may be good elsewhere.

use super::verifier::Verifier;
use crate::{policy::model::TokenCheck, proofs::jwt};

/// The token names no issuer, and several could be asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ambiguous;

impl Ambiguous {
    /// Stable name for answers and records.
    pub fn reason(self) -> &'static str {
        "issuer_ambiguous"
    }
}

/// Of some issuers, those that a token names; of a token that names none, the only one of `asked` that is asked about its tokens. If
/// none is, those that are not asked: they say what is wrong with it.
pub fn of_token(verifier: &Verifier, token: &str, all: &[usize], asked: &[usize]) -> Result<Vec<usize>, Ambiguous> {
    if let Some(claimed) = jwt::claimed_issuer(token) {
        let named = |index: &&usize| verifier.issuers.get(**index).is_some_and(|known| known.policy.issuer == claimed);
        return Ok(all.iter().filter(named).copied().collect());
    }
    // Also one whose settings are wrong: the token may be its own all the same.
    let is_asked = |index: &&usize| {
        let issuer = verifier.model.issuers.get(**index);
        issuer.is_some_and(|issuer| matches!(issuer.check, TokenCheck::Introspection { .. }))
    };
    let mut could_be = asked.iter().filter(is_asked);
    match could_be.next() {
        Some(first) if could_be.all(|other| other == first) => Ok(vec![*first]),
        Some(_) => Err(Ambiguous),
        None => Ok(all.iter().filter(|index| !is_asked(index)).copied().collect()),
    }
}

#[cfg(test)]
pub mod tests {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

    use super::*;
    use crate::ipc::Settings;

    /// Issuers 0 and 1 are asked, 2 is not. `agent` acts by tokens of those that are listed, `other` by those of 1.
    pub fn verifier(agents: &[&str], approvers: &[(&str, &str)]) -> Verifier {
        let mut policy = "trust_domain = \"example.org\"\n".to_owned();
        for name in ["agent", "other"] {
            policy += &format!("[[workload]]\nname = \"{name}\"\nkind = \"agent\"\ncgroup = \"/{name}\"\n");
        }
        for name in ["first", "second"] {
            let url = format!("https://{name}.example");
            policy += &format!(
                "[[issuer]]\nname = \"{name}\"\nkind = \"introspection\"\nissuer = \"{url}\"\n\
                 introspection_url = \"{url}/introspect\"\nclient_id = \"authd\"\nclient_secret_file = \"secret\"\n"
            );
        }
        policy += "[[issuer]]\nname = \"third\"\nkind = \"jwt\"\nissuer = \"https://third.example\"\n\
                   jwks_url = \"https://third.example/keys\"\nalgorithms = [\"ES256\"]\n";
        let acts = |who: &str, issuer: &str| {
            format!(
                "[[delegation]]\nname = \"{who}-{issuer}\"\nactors = [\"{who}\"]\nissuer = \"{issuer}\"\n\
                 subjects = [\"{issuer}\"]\naudiences = [\"x\"]\n"
            )
        };
        policy += &agents.iter().map(|issuer| acts("agent", issuer)).collect::<String>();
        policy += &acts("other", "second");
        for (name, issuer) in approvers {
            policy += &format!(
                "[[approvers]]\nname = \"{name}\"\nusers = [\"root\"]\nissuer = \"{issuer}\"\naudience = \"a\"\nsubjects = [\"s\"]\n"
            );
        }
        let settings = Settings { sources: vec![("p.toml".to_owned(), policy)], ..Settings::default() };
        let verifier = Verifier::new(settings, None, std::sync::Arc::default());
        assert!(verifier.model.issuers.len() >= 3, "it is a policy");
        verifier
    }

    /// A token that names an issuer, and nothing else.
    pub fn naming(issuer: &str) -> String {
        let part = |json: String| URL_SAFE_NO_PAD.encode(json);
        let (header, claims) = (part(r#"{"alg":"ES256"}"#.to_owned()), part(format!(r#"{{"iss":"{issuer}"}}"#)));
        format!("{header}.{claims}.{}", part("signature".to_owned()))
    }

    #[test]
    fn nobody_is_asked_about_a_token_that_may_be_anothers() {
        let verifier = verifier(&[], &[]);
        let of = |token: &str, asked: &[usize]| of_token(&verifier, token, &[0, 1, 2], asked);
        assert_eq!(of("opaque", &[0, 1, 2]), Err(Ambiguous));
        assert_eq!(of("opaque", &[0, 2, 0]), Ok(vec![0]));
        assert_eq!(of("opaque", &[1]), Ok(vec![1]));
        // Keys say of it what is wrong, and nobody else hears of it.
        assert_eq!(of("opaque", &[2]), Ok(vec![2]));
        assert_eq!(of("opaque", &[]), Ok(vec![2]));
        assert_eq!(of(&naming("https://second.example"), &[0]), Ok(vec![1]));
        assert_eq!(of(&naming("https://fourth.example"), &[0]), Ok(vec![]));
    }
}
