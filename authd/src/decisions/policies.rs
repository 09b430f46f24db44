//! Files of action policies, as they are written.
//!
//! Enters: Cedar. Leaves: single policies, each with its name and place, and what is wrong with the text. Never: meaning; nothing
//! that a policy names is looked up here.

use std::{collections::HashMap, ops::Range, str::FromStr};

use cedar_policy::{Effect, PolicyId, PolicySet};

use crate::policy::{
    diagnostic::{Diagnostic, Place, Source},
    model::is_name,
};

/// No policy is as long as this; what is, is something else.
const MAX_POLICY_BYTES: usize = 16 << 10;
/// Brackets within brackets, and attributes of attributes.
const MAX_NESTING: usize = 64;
/// Operators of one policy: each can be within the one before. Cedar looks at how much stack is left and gives up; what one thread
/// accepts, each has to.
const MAX_OPERATORS: usize = 400;
/// What may stand before a policy with an `@`.
const ANNOTATIONS: [&str; 3] = ["id", "approval", "doc"];

/// One policy.
#[derive(Clone, Debug)]
pub struct Written {
    /// By `@id`, or else by its place.
    pub id: String,
    pub policy: cedar_policy::Policy,
    /// The whole policy.
    pub place: Place,
    /// `@approval`
    pub approval: Option<String>,
}

impl Written {
    pub fn permits(&self) -> bool {
        self.policy.effect() == Effect::Permit
    }

    /// Where one of its annotations is.
    pub fn annotation(&self, key: &str) -> Place {
        annotation(&self.place, key)
    }
}

/// The policies of all files, and what is wrong with them.
pub fn read(sources: &[Source]) -> (Vec<Written>, Vec<Diagnostic>) {
    let mut reader = Reader::default();
    for source in sources {
        reader.file(source);
    }
    (reader.policies, reader.diagnostics)
}

#[derive(Default)]
struct Reader {
    policies: Vec<Written>,
    diagnostics: Vec<Diagnostic>,
    /// Names that are taken.
    ids: HashMap<String, Place>,
}

impl Reader {
    fn file(&mut self, source: &Source) {
        let text = without_comments(&source.text);
        let at = |span: Range<usize>| Place { source: source.clone(), span };
        if let Some((span, message)) = unreasonable(&text) {
            self.error("policy_too_complex", at(span), message, "split the policy");
            return;
        }
        let set = match PolicySet::from_str(&text) {
            Ok(set) => set,
            Err(errors) => {
                self.diagnostics.extend(errors.iter().map(|error| {
                    let (span, label) = label(error);
                    let label = label.map_or(String::new(), |label| format!(": {label}"));
                    let help = help(error).unwrap_or_else(|| "correct the policy".to_owned());
                    Diagnostic::error("syntax", at(span), format!("{error}{label}"), help)
                }));
                return;
            }
        };
        // Cedar numbers policies and templates as they come; nothing else says where they are.
        let templates = set.templates().map(|template| (template.id(), template.to_cedar(), None));
        let policies = set.policies().map(|policy| (policy.id(), policy.to_cedar().unwrap_or_default(), Some(policy)));
        let mut all: Vec<_> = templates.chain(policies).collect();
        all.sort_by_key(|(id, ..)| number(id));
        let mut end = 0;
        for (_, written, policy) in all {
            let Some(start) = text.get(end..).and_then(|rest| rest.find(&*written)).map(|found| found + end) else {
                self.error("syntax", at(end..end), "a policy is not where it was read", "report it, with the file");
                return;
            };
            end = start + written.len();
            match policy {
                Some(policy) => self.policy(policy, at(start..end)),
                None => self.error(
                    "policy_template",
                    at(start..end),
                    "this is a template: nothing would ever fill its slots",
                    "write `==` or `in` with a name, or a condition, in place of `?principal` and `?resource`",
                ),
            }
        }
    }

    fn policy(&mut self, policy: &cedar_policy::Policy, place: Place) {
        for (key, value) in policy.annotations() {
            if !ANNOTATIONS.contains(&key) {
                let known = ANNOTATIONS.into_iter();
                let otherwise = "use `@id`, `@approval` or `@doc`: others could be misspelt, and mean nothing here";
                let help = crate::policy::build::similar(key, known, otherwise);
                self.error("unknown_annotation", annotation(&place, key), format!("`@{key}` means nothing"), help);
            }
            if key == "id" && !is_name(value) {
                let message = format!("`{}` cannot be a policy's name", value.escape_default());
                let help = "use 1 to 64 letters, digits, `-`, `_` and `.`, beginning with a letter or digit";
                self.error("bad_name", annotation(&place, key), message, help);
            }
        }
        let id = match policy.annotation("id") {
            Some(id) => id.to_owned(),
            None => {
                let (line, column) = place.line_column();
                let id = format!("{}:{line}", place.source.name);
                if self.ids.contains_key(&id) { format!("{id}:{column}") } else { id }
            }
        };
        if let Some(first) = self.ids.get(&id) {
            let at = annotation(&place, "id");
            let diagnostic = Diagnostic::error(
                "duplicate_name",
                at,
                format!("policy `{id}` is defined twice"),
                "give one of them another name",
            );
            self.diagnostics.push(diagnostic.with_related(first, "first defined here"));
            return;
        }
        self.ids.insert(id.clone(), annotation(&place, "id"));
        self.policies.push(Written {
            policy: policy.new_id(PolicyId::new(&id)),
            approval: policy.annotation("approval").map(str::to_owned),
            place,
            id,
        });
    }

    fn error(&mut self, code: &'static str, at: Place, message: impl Into<String>, help: impl Into<String>) {
        self.diagnostics.push(Diagnostic::error(code, at, message, help));
    }
}

/// Where something that Cedar says is, and what it says of the place.
pub(super) fn label(error: &dyn miette::Diagnostic) -> (Range<usize>, Option<String>) {
    let first = error.labels().and_then(|mut labels| labels.next());
    let Some(first) = first else { return (0..0, None) };
    (first.offset()..first.offset() + first.len(), first.label().map(str::to_owned))
}

/// The remedy that Cedar has.
pub(super) fn help(error: &dyn miette::Diagnostic) -> Option<String> {
    error.help().map(|help| help.to_string())
}

/// The annotation of a policy, or the policy's first word if it has none.
fn annotation(policy: &Place, key: &str) -> Place {
    let text = policy.source.text.get(policy.span.clone()).unwrap_or_default();
    let bare = blanked(text, true);
    let start = bare.match_indices('@').find_map(|(at, _)| {
        let rest = bare.get(at + 1..)?.trim_start();
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        (rest.get(..end)? == key).then_some(at)
    });
    let start = start.unwrap_or(0);
    let length = bare.get(start..).map_or(0, |rest| rest.find([')', '(', '\n']).unwrap_or(rest.len()));
    Place { source: policy.source.clone(), span: policy.span.start + start..policy.span.start + start + length }
}

/// `policy12` is the thirteenth.
fn number(id: &PolicyId) -> usize {
    let text: &str = id.as_ref();
    text.trim_start_matches("policy").parse().unwrap_or(usize::MAX)
}

/// The same text with blanks for comments: a policy that was commented out is not to be found.
pub(super) fn without_comments(text: &str) -> String {
    blanked(text, false)
}

/// The same without what stands between quotes, if that is asked for.
fn blanked(text: &str, quoted: bool) -> String {
    let mut blank = String::with_capacity(text.len());
    let (mut in_text, mut in_comment, mut escaped) = (false, false, false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let line_end = matches!(c, '\n' | '\r');
        in_comment = in_comment && !line_end || !in_text && c == '/' && chars.peek() == Some(&'/');
        let quote = c == '"' && !escaped && !in_comment;
        if in_comment || quoted && in_text && !quote {
            blank.extend(std::iter::repeat_n(' ', c.len_utf8()));
        } else {
            blank.push(c);
        }
        escaped = in_text && c == '\\' && !escaped;
        in_text ^= quote;
    }
    blank
}

/// What no person writes, and what could exhaust the stack of whoever reads it.
fn unreasonable(text: &str) -> Option<(Range<usize>, String)> {
    let bare = blanked(text, true);
    let (mut depth, mut operators, mut dots, mut before) = (0_usize, 0, 0, b' ');
    // Of the policy that is looked at.
    let mut start = None;
    for (at, byte) in bare.bytes().enumerate() {
        if start.is_none() && byte.is_ascii_whitespace() {
            continue;
        }
        let from = *start.get_or_insert(at);
        let begins_word = byte.is_ascii_alphabetic() && !(before.is_ascii_alphanumeric() || before == b'_');
        let word =
            || ["if", "when", "unless"].into_iter().any(|word| bare.get(at..).is_some_and(|s| s.starts_with(word)));
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            b'+' | b'-' | b'*' | b'!' => operators += 1,
            b'&' | b'|' if before == byte => operators += 1,
            b'i' | b'w' | b'u' if begins_word && word() => operators += 1,
            b'.' => dots += 1,
            b';' => (start, operators, dots) = (None, 0, 0),
            _ => {}
        }
        if matches!(byte, b'&' | b'|' | b'<' | b'>' | b'=' | b',') {
            dots = 0;
        }
        before = byte;
        let message = match () {
            () if at - from > MAX_POLICY_BYTES => format!("a policy is longer than {MAX_POLICY_BYTES} bytes"),
            () if depth > MAX_NESTING => format!("more than {MAX_NESTING} brackets are within each other"),
            () if dots > MAX_NESTING => format!("more than {MAX_NESTING} attributes are of each other"),
            () if operators > MAX_OPERATORS => format!("a policy has more than {MAX_OPERATORS} operators"),
            () => continue,
        };
        return Some((from..at + 1, message));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        Source { name: "a.cedar".into(), text: text.into() }
    }

    #[test]
    fn policies_are_where_they_are_written() {
        let text = "// permit(principal, action, resource);\n\npermit(principal, action, resource);\n\
                    @id(\"é // no comment\") @doc(\"x\")\nforbid(principal, action, resource) // why: ü\n\
                    when { \"//\" == \"\\\"//\" }; permit(principal, action, resource);permit(principal, action, resource);";
        let (policies, diagnostics) = read(&[source(text)]);
        let found: Vec<String> = policies.iter().map(|policy| policy.id.clone()).collect();
        assert_eq!(diagnostics.len(), 1, "the name with a blank");
        assert_eq!(diagnostics[0].place.as_ref().unwrap().line_column(), (4, 1));
        assert_eq!(found, ["a.cedar:3", "é // no comment", "a.cedar:6", "a.cedar:6:62"]);
        let (line, column) = policies[1].place.line_column();
        assert_eq!((line, column), (4, 1));
        assert_eq!(&text[policies[0].place.span.clone()], "permit(principal, action, resource);");
    }

    #[test]
    fn comments_become_blanks_of_the_same_length() {
        for (text, blank) in [
            ("a // b\nc", "a     \nc"),
            ("\"// a\" // b", "\"// a\"     "),
            (r#""\"//" // "x"#, r#""\"//"      "#),
            (r#""\\" // x"#, r#""\\"     "#),
            ("// é\r\nx", "     \r\nx"),
            ("a / b", "a / b"),
        ] {
            assert_eq!(without_comments(text), blank);
            assert_eq!(without_comments(text).len(), text.len());
        }
    }

    #[test]
    fn what_nobody_writes_is_refused_before_it_is_read() {
        let when = |condition: String| format!("permit (principal, action, resource) when {{ {condition} }};");
        for (text, words) in [
            (when(format!("true{}", "&&true".repeat(500))), "operators"),
            (when(format!("1{} == 1", " + 1".repeat(500))), "operators"),
            (when("if true then true else ".repeat(500) + "true"), "operators"),
            (when("!".repeat(500) + "true"), "operators"),
            ("permit (principal, action, resource) ".to_owned() + &"when{true}".repeat(500) + ";", "operators"),
            (when(format!("principal{} == 1", " . a".repeat(100))), "attributes"),
            (when(format!("principal{}", ".a(1)".repeat(100))), "attributes"),
            (when("(".repeat(100_000)), "brackets"),
            (when("[".repeat(100_000)), "brackets"),
            (when(format!("principal.name == \"{}\"", "x".repeat(20_000))), "longer"),
        ] {
            let (policies, diagnostics) = read(&[source(&text)]);
            assert!(policies.is_empty() && diagnostics[0].code == "policy_too_complex", "{words}");
            assert!(diagnostics[0].message.contains(words), "{}", diagnostics[0].message);
        }
        // Neither between policies, nor in texts and comments.
        let comment = format!("// {}\n", "((((&&&&....".repeat(5_000));
        let quoted = when(format!("principal.name == \"{}\"", "((&&.!if ".repeat(200)));
        let many: String = (0..300).map(|_| when("context.a && !context.b".to_owned())).collect();
        let (policies, diagnostics) = read(&[source(&format!("{comment}{comment}{quoted}{many}{comment}"))]);
        assert_eq!((policies.len(), diagnostics.len()), (301, 0));
    }
}
