//! `[approvals]`: how people are told that a call waits for them.

use std::path::{Path, PathBuf};

use reqwest::Url;
use schemars::JsonSchema;
use serde::Deserialize;
use toml::Spanned;

use crate::policy::diagnostic::{Diagnostic, Place};

/// Who is told. Nobody, by default: `authd approve list` shows what waits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Approvals {
    /// A program and its arguments; none, if it is empty.
    pub command: Vec<String>,
    pub webhook: Option<Webhook>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Webhook {
    pub url: Url,
    /// What its messages are signed with.
    pub secret_file: PathBuf,
}

#[derive(Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ApprovalsFile {
    /// Program that is told of each call that waits for an approval, and its arguments; it reads JSON on its standard input.
    /// Default: none.
    #[schemars(with = "Vec<String>")]
    command: Vec<Spanned<String>>,
    /// URL that is told of each, by POST, such as `https://chat.example.org/hooks/authd`. Default: none.
    #[schemars(with = "Option<String>")]
    webhook: Option<Spanned<String>>,
    /// File with the secret that these messages are signed with: `whsec_` and base64, as Standard Webhooks have it.
    webhook_secret_file: Option<PathBuf>,
}

impl ApprovalsFile {
    pub(super) fn approvals(self, at: &dyn Fn(std::ops::Range<usize>) -> Place) -> Result<Approvals, Diagnostic> {
        let Self { command, webhook, webhook_secret_file } = self;
        if let Some(program) = command.first()
            && !Path::new(program.as_ref()).is_absolute()
        {
            let message = format!("`{}` is no absolute path of a program", program.as_ref());
            let help = "write the whole path: there is no environment in which it would be looked for";
            return Err(Diagnostic::error("bad_command", at(program.span()), message, help));
        }
        if let Some(argument) = command.iter().find(|argument| argument.as_ref().contains('\0')) {
            let message = "an argument of a program cannot contain NUL";
            return Err(Diagnostic::error("bad_command", at(argument.span()), message, "leave it out"));
        }
        let webhook = match (webhook, webhook_secret_file) {
            (None, None) => None,
            (None, Some(_)) => {
                let message = "there is a `webhook_secret_file`, and no `webhook` whose messages it would sign";
                return Err(Diagnostic::general("bad_webhook", message, "set `webhook` in `[approvals]` too"));
            }
            (Some(url), secret_file) => {
                let wrong =
                    |message: String, help: &str| Diagnostic::error("bad_webhook", at(url.span()), message, help);
                let unfit = || {
                    let message = format!("`{}` is no URL that is told of approvals", url.as_ref());
                    wrong(message, "write https://HOST/PATH, without a user and a fragment")
                };
                let parsed = Url::parse(url.as_ref()).map_err(|_| unfit())?;
                let plain = parsed.username().is_empty() && parsed.password().is_none() && parsed.fragment().is_none();
                if parsed.scheme() != "https" || !parsed.has_host() || !plain {
                    return Err(unfit());
                }
                let secret_file = secret_file.ok_or_else(|| {
                    let message = "whoever gets these messages could not tell them from others".to_owned();
                    wrong(message, "set `webhook_secret_file`, made with `echo whsec_$(openssl rand -base64 32)`")
                })?;
                Some(Webhook { url: parsed, secret_file })
            }
        };
        Ok(Approvals { command: command.into_iter().map(Spanned::into_inner).collect(), webhook })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, policy::diagnostic::Source};

    fn parse(text: &str) -> Result<Approvals, Diagnostic> {
        let text = format!("[approvals]\n{text}");
        Config::parse(&Source { name: "authd.toml".into(), text: text.into() }).map(|config| config.approvals)
    }

    #[test]
    fn people_are_told_in_both_ways_or_none() {
        assert_eq!(parse("").unwrap(), Approvals::default());
        let both = parse(
            "command = ['/usr/local/bin/notify', '--loud']\nwebhook = 'https://chat.example.org/h?x=1'\n\
             webhook_secret_file = '/etc/authd/hook'",
        );
        let Approvals { command, webhook } = both.unwrap();
        assert_eq!(command, ["/usr/local/bin/notify", "--loud"]);
        let Webhook { url, secret_file } = webhook.unwrap();
        assert_eq!((url.as_str(), secret_file), ("https://chat.example.org/h?x=1", "/etc/authd/hook".into()));
    }

    #[test]
    fn what_could_not_be_told_is_refused() {
        for (text, code) in [
            ("command = ['notify']", "bad_command"),
            ("command = ['./notify']", "bad_command"),
            ("command = ['']", "bad_command"),
            ("command = ['/usr/bin/notify', \"a\\u0000b\"]", "bad_command"),
            ("command = '/usr/bin/notify'", "syntax"),
            ("webhook = 'https://a.example'", "bad_webhook"),
            ("webhook_secret_file = '/x'", "bad_webhook"),
            ("webhook = 'http://a.example'\nwebhook_secret_file = '/x'", "bad_webhook"),
            ("webhook = 'https://u:p@a.example'\nwebhook_secret_file = '/x'", "bad_webhook"),
            ("webhook = 'https://u@a.example'\nwebhook_secret_file = '/x'", "bad_webhook"),
            ("webhook = 'https://a.example/#x'\nwebhook_secret_file = '/x'", "bad_webhook"),
            ("webhook = 'file:///x'\nwebhook_secret_file = '/x'", "bad_webhook"),
            ("webhook = 'a.example'\nwebhook_secret_file = '/x'", "bad_webhook"),
            ("mail = 'a@example.org'", "syntax"),
        ] {
            let diagnostic = parse(text).err().unwrap_or_else(|| panic!("{text} was taken"));
            assert_eq!(diagnostic.code, code, "{text}");
        }
    }
}
