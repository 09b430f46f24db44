//! Delegations, permits and whoever may approve, with one fault each.

use crate::bad::Bad;

/// Everything here stands behind the base.
pub const OF_AGENTS: &[Bad] = &[
    // Delegations.
    ("[[delegation]]\nname = \"d\"", "syntax", "1:1", "missing field `actors`"),
    (
        "[[delegation]]\nname = \"d\"\nactors = []\nissuer = \"corp\"\naudiences = [\"x\"]",
        "no_actor",
        "2:8",
        "nobody acts by delegation `d`",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"corp\"\naudiences = []",
        "bad_audience",
        "2:8",
        "would be for nobody",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"corp\"\naudiences = [\"\"]",
        "bad_audience",
        "5:14",
        "an audience cannot be empty",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"agemt\"]\nissuer = \"corp\"\naudiences = [\"x\"]",
        "unknown_caller",
        "3:11",
        "no workload or peer is called `agemt`",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"office\"]\nissuer = \"corp\"\naudiences = [\"x\"]",
        "nameless_actor",
        "3:11",
        "tokens have no name for peer `office`",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"corb\"\naudiences = [\"x\"]",
        "unknown_issuer",
        "4:10",
        "no issuer is called `corb`",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"corp\"\naudiences = [\"x\"]\nttl = \"61m\"",
        "long_token",
        "6:7",
        "lives for an hour at most",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"corp\"\naudiences = [\"x\"]\ndepth = 0",
        "bad_depth",
        "6:9",
        "0 is no number of actors from 1 to 8",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"corp\"\naudiences = [\"x\"]\ndepth = 9",
        "bad_depth",
        "6:9",
        "9 is no number of actors from 1 to 8",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"own\"\naudiences = [\"x\"]\nhands_on = [\"agent\"]",
        "bad_depth",
        "6:13",
        "whoever hands on makes two actors",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"agent\", \"web\"]\nissuer = \"corp\"\naudiences = [\"x\"]",
        "across_tenants",
        "3:20",
        "`web` is of another tenant than `agent`",
    ),
    (
        "[[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"corp\"\naudiences = [\"x\"]\n\
         [[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"own\"\naudiences = [\"x\"]",
        "duplicate_name",
        "7:8",
        "delegation `d` is defined twice",
    ),
    (
        "[[issuer]]\nname = \"partner\"\nkind = \"jwt\"\nissuer = \"https://partner.example\"\njwks_file = \"/p.json\"\nalgorithms = [\"ES256\"]\n\
         [[delegation]]\nname = \"c\"\nactors = [\"agent\"]\nissuer = \"corp\"\naudiences = [\"x\"]\n\
         [[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"partner\"\nsubjects = [\"alice\"]\naudiences = [\"x\"]",
        "ambiguous_subject",
        "13:8",
        "a subject of `corp` or one of `partner` with the same name",
    ),
    (
        "[[issuer]]\nname = \"partner\"\nkind = \"jwt\"\nissuer = \"https://partner.example\"\njwks_file = \"/p.json\"\nalgorithms = [\"ES256\"]\n\
         [[delegation]]\nname = \"c\"\nactors = [\"agent\"]\nissuer = \"corp\"\nsubjects = [\"alice\", \"bob\"]\naudiences = [\"x\"]\n\
         [[delegation]]\nname = \"d\"\nactors = [\"agent\"]\nissuer = \"partner\"\nsubjects = [\"alice\"]\naudiences = [\"x\"]",
        "ambiguous_subject",
        "14:8",
        "a subject of `corp` or one of `partner` with the same name",
    ),
    // Permits.
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"agent\"]\nto = [\"db\"]\npermit = { connections = 1 }",
        "unused_setting",
        "5:10",
        "`permit` has no use here",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"agent\"]\nto = [\"db\"]\nrequire = [\"approval\"]",
        "approval_of_nothing",
        "2:8",
        "asks for a person's yes, and not to what",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"agent\"]\nto = [\"db\"]\nrequire = [\"action\"]\npermit = { connections = 0 }",
        "bad_permit",
        "6:26",
        "a permit cannot be for 0 connections",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"agent\"]\nto = [\"db\"]\nrequire = [\"action\"]\npermit = { connections = 1025 }",
        "bad_permit",
        "6:26",
        "a permit cannot be for 1025 connections",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"agent\"]\nto = [\"db\"]\nrequire = [\"action\"]\npermit = { bytes = \"many\" }",
        "bad_permit",
        "6:20",
        "`many` is no number of bytes",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"office\"]\nto = [\"db\"]\nrequire = [\"action\"]",
        "permit_of_nobody",
        "3:9",
        "`office` is no workload of this node",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"agent\"]\nto = [\"db\"]\nrequire = [\"action\", \"api-key\"]",
        "bad_permit",
        "2:8",
        "",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"agent\"]\nto = [\"db\"]\nrequire = [\"action\"]\ngrant_ttl = \"61m\"",
        "long_permit",
        "6:13",
        "a permit lives for an hour at most",
    ),
    (
        "[[rule]]\nname = \"r\"\nfrom = [\"agent\"]\nto = [\"db\"]\n[[tool]]\nname = \"t\"\npermit = \"r\"",
        "permit_without_action",
        "7:10",
        "no action opens rule `r`",
    ),
    // Approvers.
    (
        "[[approvers]]\nname = \"a\"\nissuer = \"corp\"\naudience = \"x\"\nsubjects = [\"y\"]",
        "no_approver",
        "2:8",
        "nobody is among approvers `a`",
    ),
    (
        "[[approvers]]\nname = \"a\"\nusers = [\"u\"]\nissuer = \"corp\"\nsubjects = [\"y\"]",
        "no_audience",
        "4:10",
        "any token of an approver would do",
    ),
    (
        "[[approvers]]\nname = \"a\"\nusers = [\"u\"]\naudience = \"x\"",
        "unused_setting",
        "4:12",
        "`audience` has no use",
    ),
];
