//! Rules that allowed actions open: what a permit lets pass, and whom such a rule can be about.

use toml::Spanned;

use super::{Builder, place};
use crate::{
    grants::permits::Limits,
    policy::{
        diagnostic::{Place, Source},
        file::{self, Proof},
        model::{Model, Subject},
    },
};

/// Connections that one permit lets begin at most.
const MAX_CONNECTIONS: u32 = 1024;
/// Units of bytes, the longest name first.
const UNITS: [(&str, u64); 7] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("B", 1),
];

impl Builder {
    /// `None` if the rule asks for no action, or after an error.
    pub(super) fn permit(
        &mut self,
        source: &Source,
        terms: Option<Spanned<file::PermitTerms>>,
        action: Option<Place>,
        proofs: &[Proof],
        rule: &Place,
    ) -> Option<Limits> {
        if action.is_none() {
            if let Some(terms) = terms {
                let message = "`permit` has no use here: no action opens the rule";
                let help = "add `\"action\"` to `require`, or remove `permit`";
                self.error("unused_setting", &place(source, terms.span()), message, help);
            }
            if proofs.contains(&Proof::Approval) {
                let message = "the rule asks for a person's yes, and not to what";
                self.error("approval_of_nothing", rule, message, "add `\"action\"` to `require`: calls are approved");
            }
            return None;
        }
        let (connections, bytes) = match terms.map(Spanned::into_inner) {
            None => (None, None),
            Some(file::PermitTerms { connections, bytes }) => (connections, bytes),
        };
        let connections = match connections {
            None => 1,
            Some(number) if (1..=MAX_CONNECTIONS).contains(number.as_ref()) => number.into_inner(),
            Some(number) => {
                let message = format!("a permit cannot be for {} connections", number.as_ref());
                let help = format!("choose a number from 1 to {MAX_CONNECTIONS}");
                self.error("bad_permit", &place(source, number.span()), message, help);
                return None;
            }
        };
        let bytes = match bytes {
            None => None,
            Some(text) => match parse(text.as_ref()) {
                Some(bytes) => Some(bytes),
                None => {
                    let message = format!("`{}` is no number of bytes", text.as_ref());
                    self.error("bad_permit", &place(source, text.span()), message, "write `64KiB` or `10MiB`");
                    return None;
                }
            },
        };
        Some(Limits { connections, bytes })
    }

    /// Who acts is known by its cgroup, and holds the permit there.
    pub(super) fn permittable(&mut self, rule: &Place, proofs: &[Proof], subjects: &[(Subject, Place)], model: &Model) {
        for (subject, at) in subjects {
            if !matches!(subject, Subject::Workload(_)) {
                let message =
                    format!("`{}` is no workload of this node, and holds no permits", model.subject_name(*subject));
                self.error("permit_of_nobody", at, message, "name workloads in `from`");
            }
        }
        if proofs.contains(&Proof::Node) || proofs.contains(&Proof::ApiKey) {
            let message = "whoever asks to act shows neither a node's word nor an API key";
            self.error("bad_permit", rule, message, "require `action`, and perhaps `approval`, `token` and `mtls`");
        }
    }
}

/// A whole number of a unit; at least one byte.
fn parse(text: &str) -> Option<u64> {
    let (digits, unit) = UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?.trim_end(), *unit)))?;
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: u64 = plain.then(|| digits.parse().ok()).flatten()?;
    number.checked_mul(unit).filter(|bytes| (1..u64::MAX / 2).contains(bytes))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn bytes_have_a_unit() {
        for (text, bytes) in
            [("1B", 1), ("64KiB", 65_536), ("10 MiB", 10 << 20), ("2GB", 2_000_000_000), ("3kB", 3_000)]
        {
            assert_eq!(parse(text), Some(bytes), "{text}");
        }
        for text in
            ["", "64", "B", "0B", "-1B", "1.5KiB", "1 K", "1KB", "99999999999999999999B", "18446744073709551615GiB"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
