//! Warnings of policies in which somebody never gets what is written for him, or gets it for too little.

use authd::policy::{diagnostic::Diagnostic, lint::lint, load::texts};

use crate::{BASE, source};

/// Messages and remedies of one kind of warning.
fn found(code: &str, tables: &str, cedar: &str) -> Vec<Diagnostic> {
    let policy = texts(vec![source("p.toml", &format!("{BASE}{tables}")), source("a.cedar", cedar)]);
    let shown: Vec<String> = policy.diagnostics.iter().map(|d| d.render(false)).collect();
    let model = policy.model.unwrap_or_else(|| panic!("refused:\n{}\n{tables}", shown.concat()));
    lint(&model).into_iter().filter(|warning| warning.code == code).collect()
}

/// Exactly one warning with these words, or none.
fn assert_found(code: &str, tables: &str, cedar: &str, expected: Option<&str>) {
    let found: Vec<String> = found(code, tables, cedar).into_iter().map(|d| d.message).collect();
    match expected {
        None => assert!(found.is_empty(), "{found:?} for\n{tables}\n{cedar}"),
        Some(words) => assert!(found.len() == 1 && found[0].contains(words), "{found:?} for\n{tables}\n{cedar}"),
    }
}

fn rule(require: &str, token: &str) -> String {
    format!("[[rule]]\nname = \"r\"\nfrom = [\"agent\"]\nto = [\"db\"]\nrequire = [{require}]\n{token}\n")
}

#[test]
fn rules_for_tokens_that_no_delegation_gives_never_open() {
    let delegation =
        |name: &str, more: &str| format!("[[delegation]]\nname = \"{name}\"\nactors = [\"agent\"]\n{more}\n");
    let of_corp = |name: &str, more: &str| delegation(name, &format!("issuer = \"corp\"\n{more}"));
    let own = |more: &str| rule("\"token\"", &format!("token = {{ issuer = \"own\", {more} }}"));
    let asks = own("audience = \"db\", scopes = [\"r\", \"w\"], subjects = [\"ann\"]");
    let server =
        "[[mcp_server]]\nname = \"m\"\nurl = \"https://m.example\"\naudience = \"db\"\nscopes = [\"r\", \"w\"]\n";
    let narrows = delegation("later", "issuer = \"own\"\naudiences = [\"db\"]\nscopes = [\"r\", \"w\"]");
    let for_db = |scopes: &str| of_corp("d", &format!("audiences = [\"a\", \"db\"]\nscopes = [{scopes}]"));
    let e = of_corp("e", "audiences = [\"db\"]\nscopes = [\"w\"]");
    for (tables, expected) in [
        (String::new(), Some("no delegation gives one for the token of another issuer")),
        (narrows.clone(), Some("no delegation gives one for the token of another issuer")),
        (of_corp("d", "audiences = [\"a\"]\nscopes = [\"r\", \"w\"]"), Some("no delegation gives a token for `db`")),
        (
            narrows.clone() + &of_corp("d", "audiences = [\"a\"]\nscopes = [\"r\", \"w\"]"),
            Some("`later` only narrows those that others give"),
        ),
        (for_db("\"r\""), Some("rule `r` never opens: no delegation gives a token for `db` with scope `w`")),
        (for_db("\"r\"") + &e, Some("with all of its scopes together")),
        (for_db("\"r\", \"w\"") + "subjects = [\"bob\"]\n", Some("about one of its subjects")),
        (for_db("\"r\", \"w\"") + "subjects = [\"ann\", \"bob\"]\n", None),
        (for_db("\"r\", \"w\", \"x\""), None),
        (for_db("\"r\"") + &e.replace("\"w\"", "\"r\", \"w\""), None),
        (narrows + &for_db("\"r\", \"w\""), None),
        (server.to_owned(), None),
    ] {
        assert_found("never_opens", &(tables + &asks), "", expected);
    }
    // What a server is shown is bound to nothing; and other issuers' tokens are no delegation's.
    let bound = own("audience = \"db\", bound = true");
    assert_found("never_opens", &(server.to_owned() + &bound), "", Some("no delegation gives one"));
    let of_another = rule("\"token\"", "token = { issuer = \"corp\", audience = \"db\" }");
    assert_found("never_opens", &of_another, "", None);
    // A permit that asks for such a token besides is no other thing.
    let tool = "[[tool]]\nname = \"t\"\npermit = \"r\"\n";
    let permit = rule("\"action\", \"token\"", "token = { issuer = \"own\", audience = \"db\" }") + tool;
    let all = "permit (principal, action, resource);";
    assert_found("never_opens", &permit, all, Some("rule `r` never opens"));
    assert_found("never_opens", &(for_db("") + &permit), all, None);
}

#[test]
fn tools_whose_rule_is_for_others_or_wants_what_no_policy_asks_open_nothing() {
    let tables = |require: &str| {
        format!(
            "{}[[approvers]]\nname = \"p\"\nusers = [\"bob\"]\n[[tool]]\nname = \"t\"\npermit = \"r\"\n",
            rule(require, "")
        )
    };
    let (plain, approved) = (tables("\"action\""), tables("\"action\", \"approval\""));
    let by_web = "permit (principal == Workload::\"web\", action, resource);";
    let all = "permit (principal, action, resource);";
    let asking = "@approval(\"p\") permit (principal, action, resource);";
    for (tables, cedar, expected) in [
        (&plain, by_web.to_owned(), Some("none of the workloads that may call it is in `from` of rule `r`")),
        (&plain, all.to_owned(), None),
        // Nobody at all may call it: that is said in other words.
        (&plain, String::new(), None),
        (&approved, all.to_owned(), Some("rule `r` asks for an approval, and no policy that permits the tool does")),
        (&approved, asking.to_owned(), None),
        (&approved, format!("{all} {asking}"), None),
        (&approved, String::new(), None),
    ] {
        assert_found("never_opens", tables, &cedar, expected);
    }
}

#[test]
fn sensitive_services_behind_what_can_be_copied_are_warned_of() {
    let high =
        "[[service]]\nname = \"vault\"\naddresses = [\"10.1.0.1\"]\nports = [\"tcp/8200\"]\nsensitivity = \"high\"\n";
    let token = |more: &str| format!("token = {{ issuer = \"corp\", audience = \"vault\"{more} }}");
    for (require, token, expected) in [
        ("\"api-key\"", String::new(), Some("asks only for an API key, which is anybody's who copies it")),
        ("\"token\"", token(""), Some("asks only for a token that is anybody's who copies it")),
        ("\"cgroup\", \"token\"", token(""), Some("asks only for a token")),
        ("\"token\"", token(", bound = true"), None),
        ("\"mtls\", \"token\"", token(""), None),
        ("\"mtls\", \"api-key\"", String::new(), None),
    ] {
        let text = format!("{high}{}", rule(require, &token).replace("\"db\"", "\"vault\""));
        assert_found("weak_proof", &text, "", expected);
        assert_found("weak_proof", &text.replace("\"high\"", "\"medium\""), "", None);
    }
}

const APPROVERS: &str =
    "[[approvers]]\nname = \"p\"\nusers = [\"bob\"]\nissuer = \"corp\"\naudience = \"yes\"\nsubjects = [\"ann\"]\n";

#[test]
fn audiences_of_approvers_are_for_nothing_else() {
    let by_token = |issuer: &str, audience: &str| {
        rule("\"token\"", &format!("token = {{ issuer = \"{issuer}\", audience = \"{audience}\" }}"))
    };
    let delegation = |audience: &str| {
        format!(
            "[[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"corp\"\naudiences = [\"a\", \"{audience}\"]\n"
        )
    };
    let server = |audience: &str| {
        format!("[[mcp_server]]\nname = \"m\"\nurl = \"https://m.example\"\naudience = \"{audience}\"\n")
    };
    for (tables, expected) in [
        (by_token("corp", "yes"), Some("for `yes`, as are those that rule `r` takes")),
        (delegation("yes"), Some("as are those of delegation `d`")),
        (server("yes"), Some("as are those for MCP server `m`")),
        (by_token("corp", "db") + &delegation("db") + &server("db"), None),
        // Approvers show tokens of another issuer.
        (by_token("own", "yes"), None),
    ] {
        assert_found("shared_audience", &format!("{APPROVERS}{tables}"), "", expected);
    }
}

#[test]
fn nobody_is_the_only_one_to_approve_what_is_done_for_himself() {
    let with = |subjects: &str, more: &str| {
        format!(
            "{APPROVERS}{more}[[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"corp\"\naudiences = [\"a\"]\n{subjects}\n\
             [[tool]]\nname = \"t\"\n"
        )
    };
    let asking = "@approval(\"p\") permit (principal, action, resource);";
    let code = "approvers_only_subject";
    let only = "subjects = [\"ann\"]";
    assert_found(code, &with(only, ""), asking, Some("by delegation `d`: `ann` is all of them, and whom it is for"));
    assert_found(code, &with(only, "may_be_subject = true\n"), asking, None);
    assert_found(code, &with("subjects = [\"ann\", \"eve\"]", ""), asking, None);
    assert_found(code, &with("", ""), asking, None);
    assert_found(code, &with(only, "").replace("[\"ann\"]\n[[del", "[\"ann\", \"eve\"]\n[[del"), asking, None);
    // Nobody asks them.
    assert_found(code, &with(only, ""), "permit (principal, action, resource);", None);
}

#[test]
fn issuers_that_action_policies_compare_are_called_by_their_names() {
    let with = |condition: &str| {
        let cedar =
            format!("@id(\"x\") permit (principal, action, resource) when {{ context has subject && {condition} }};");
        found("unknown_issuer_name", "[[tool]]\nname = \"t\"\n", &cedar)
    };
    let one = |condition: &str| {
        let found = with(condition);
        assert_eq!(found.len(), 1, "{found:?} for {condition}");
        (found[0].message.clone(), found[0].help.clone())
    };
    let (message, help) = one("context.subject.issuer == \"https://idp.example.org\"");
    assert_eq!(message, "policy `x` compares an issuer with `https://idp.example.org`, and none is called that");
    assert_eq!(help, "policies call it by its name: `corp`");
    assert_eq!(one("\"corb\" == context.subject.issuer").1, "did you mean `corp`?");
    assert_eq!(
        one("(context.depth > 1 || context.subject.issuer == \"else\")").1,
        "write the `name` of an `[[issuer]]`"
    );
    let twice = "(context.subject.issuer == \"else\" || context.subject.issuer == \"else\")";
    assert!(one(twice).0.contains("`else`"));
    for sound in [
        "context.subject.issuer == \"corp\"",
        "context.subject.issuer == \"own\"",
        "context.subject.id == \"corb\"",
        "context.subject.issuer == context.subject.id",
    ] {
        assert!(with(sound).is_empty(), "{sound}");
    }
}
