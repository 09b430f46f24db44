//! The vectors of RFC 8785, and that no two calls have one hash.

use std::collections::HashMap;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn canonical(text: &str) -> String {
    Arguments::read(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}")).text().to_owned()
}

fn refusal(text: &str) -> &'static str {
    match Arguments::read(text.as_bytes()) {
        Ok(arguments) => panic!("{text} is {}", arguments.text()),
        Err(error) => error.reason(),
    }
}

/// RFC 8785, 3.2.2 and 3.2.4, but for its first number, which has a digit more than a double keeps.
#[test]
fn the_rfcs_example_comes_out() {
    let text = r#"{
      "numbers": [333333333.3333333, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
      "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
      "literals": [null, true, false]
    }"#;
    let expected = "{\"literals\":[null,true,false],\"numbers\":[333333333.3333333,1e+30,4.5,0.002,1e-27],\
                    \"string\":\"\u{20ac}$\\u000f\\nA'B\\\"\\\\\\\\\\\"/\"}";
    assert_eq!(canonical(text), expected);
}

/// RFC 8785, 3.2.3: by UTF-16 code units, in which the smiley comes before the last Hebrew letter.
#[test]
fn members_are_sorted_by_utf_16_code_units() {
    let text = r#"{"\u20ac":"Euro Sign","\r":"Carriage Return","\ufb33":"Hebrew Letter Dalet With Dagesh","1":"One",
                   "\ud83d\ude00":"Emoji: Grinning Face","\u0080":"Control","\u00f6":"Latin Small Letter O With Diaeresis"}"#;
    let text = canonical(text);
    let places: Vec<Option<usize>> =
        ["Carriage", "One", "Control", "Latin", "Euro", "Emoji", "Hebrew"].map(|word| text.find(word)).into();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{text}");
}

/// RFC 8785, appendix B.
#[test]
fn numbers_are_written_as_ecmascript_writes_them() {
    for (bits, expected) in [
        (0x0000000000000000_u64, "0"),
        (0x0000000000000001, "5e-324"),
        (0x8000000000000001, "-5e-324"),
        (0x7fefffffffffffff, "1.7976931348623157e+308"),
        (0xffefffffffffffff, "-1.7976931348623157e+308"),
        (0x4340000000000000, "9007199254740992"),
        (0xc340000000000000, "-9007199254740992"),
        (0x4430000000000000, "295147905179352830000"),
        (0x44b52d02c7e14af5, "9.999999999999997e+22"),
        (0x44b52d02c7e14af6, "1e+23"),
        (0x44b52d02c7e14af7, "1.0000000000000001e+23"),
        (0x444b1ae4d6e2ef4e, "999999999999999700000"),
        (0x444b1ae4d6e2ef4f, "999999999999999900000"),
        (0x444b1ae4d6e2ef50, "1e+21"),
        (0x3eb0c6f7a0b5ed8c, "9.999999999999997e-7"),
        (0x3eb0c6f7a0b5ed8d, "0.000001"),
        (0x41b3de4355555553, "333333333.3333332"),
        (0x41b3de4355555554, "333333333.33333325"),
        (0x41b3de4355555555, "333333333.3333333"),
        (0x41b3de4355555556, "333333333.3333334"),
        (0x41b3de4355555557, "333333333.33333343"),
        (0xbecbf647612f3696, "-0.0000033333333333333333"),
        (0x43143ff3c1cb0959, "1424953923781206.2"),
    ] {
        let map = Map::from_iter([("n".to_owned(), json!(f64::from_bits(bits)))]);
        let arguments = Arguments::new(&map).unwrap_or_else(|error| panic!("{bits:x}: {error}"));
        assert_eq!(arguments.text(), format!("{{\"n\":{expected}}}"));
        // And read, it is that double again.
        assert_eq!(arguments.map().get("n").and_then(Value::as_f64).map(f64::to_bits), Some(bits));
    }
}

#[test]
fn spellings_of_one_call_are_one_text() {
    for (texts, expected) in [
        (
            &[r#"{"b":1,"a":2}"#, "{ \"a\" : 2.0,\n \"b\" : 1e0 }", r#"{"\u0061":20e-1,"b":100E-2}"#][..],
            r#"{"a":2,"b":1}"#,
        ),
        (&[r#"{"a":1e3}"#, r#"{"a":1000}"#, r#"{"a":1000.000}"#], r#"{"a":1000}"#),
        (&[r#"{"a":0}"#, r#"{"a":0.00}"#, r#"{"a":0e5}"#], r#"{"a":0}"#),
        (&[r#"{"a":"\u002f\/\u00e9"}"#, "{\"a\":\"//é\"}"], "{\"a\":\"//é\"}"),
        (&["{}", " {\t} \n"], "{}"),
    ] {
        for text in texts {
            assert_eq!(canonical(text), expected, "{text}");
        }
    }
    // What a policy sees is what the text says, whichever spelling came.
    assert_eq!(Arguments::read(br#"{"a":2.0}"#).unwrap().map(), Arguments::read(br#"{"a":2}"#).unwrap().map());
}

#[test]
fn a_number_that_would_become_another_one_is_refused() {
    for number in [
        "9007199254740993",
        "-9007199254740993",
        "9223372036854775807",
        "18446744073709551615",
        "18446744073709551616",
        "123456789012345678901234567890",
        "0.1000000000000000055511151231257827",
        "333333333.33333329",
        "1.00000000000000000001",
        "1e-400",
        "-0",
        "-0.0",
        "-0e1",
        "1e-99999999999999999999",
    ] {
        for text in [format!("{{\"a\":{number}}}"), format!("{{\"a\":[\"\\\\\\\"\",{{\"b\":{number} }}]}}")] {
            assert_eq!(refusal(&text), "json_number_inexact", "{text}");
        }
        // Within a string, they are text.
        let text = format!("{{\"a\\\"{number}\":\"\\\\{number}\"}}");
        assert_eq!(canonical(&text), text);
    }
    assert_eq!(refusal(r#"{"a":1e400}"#), "json_syntax");
    // The same from a map that somebody else read.
    for value in [json!(u64::MAX), json!(i64::MIN), json!(-0.0), json!([{ "b": 9_007_199_254_740_993_u64 }])] {
        let map = Map::from_iter([("a".to_owned(), value)]);
        assert_eq!(Arguments::new(&map).unwrap_err().reason(), "json_number_inexact", "{map:?}");
    }
}

#[test]
fn exact_numbers_are_kept_however_large() {
    for number in
        ["9007199254740992", "9007199254740994", "1e+21", "0.1", "-12.5", "1e+308", "5e-324", "100000000000000000000"]
    {
        let text = format!("{{\"a\":{number}}}");
        assert_eq!(canonical(&text), text);
    }
}

#[test]
fn what_others_could_read_differently_is_refused() {
    assert_eq!(refusal(r#"{"a":1,"a":2}"#), "json_duplicate_member");
    assert_eq!(refusal(r#"{"a":1,"\u0061":1}"#), "json_duplicate_member");
    assert_eq!(refusal("[1]"), "json_not_object");
    assert_eq!(refusal(r#"{"a":"\ud800"}"#), "json_syntax");
    assert_eq!(refusal(&format!("{{\"a\":\"{}\"}}", "x".repeat(LIMITS.bytes))), "json_oversize");
    let deep = |depth: u32| format!("{{\"a\":{}{}}}", "[".repeat(depth as usize), "]".repeat(depth as usize));
    assert!(Arguments::read(deep(LIMITS.depth - 1).as_bytes()).is_ok());
    assert_eq!(refusal(&deep(LIMITS.depth)), "json_depth");
    let value = (0..1000).fold(Value::Null, |inner, _| Value::Array(vec![inner]));
    let map = Map::from_iter([("a".to_owned(), value)]);
    assert_eq!(Arguments::new(&map).unwrap_err().reason(), "json_depth");
    // Numbers that grow in their canonical spelling cannot grow beyond the limit.
    let grows = format!("{{\"a\":[{}1]}}", "1e20,".repeat(4000));
    assert_eq!(refusal(&grows), "json_oversize");
}

#[test]
fn what_is_kept_has_to_be_canonical() {
    let read = serde_json::from_value::<Arguments>;
    assert_eq!(read(json!("{\"a\":1}")).unwrap().text(), "{\"a\":1}");
    for text in ["{\"a\": 1}", "{\"a\":1.0}", "{\"b\":1,\"a\":1}", "", "[]"] {
        assert!(read(json!(text)).is_err(), "{text}");
    }
}

fn call() -> Call {
    Call {
        tool: "refund".to_owned(),
        arguments: Arguments::read(br#"{"amount":"12.50","order":"o1"}"#).unwrap(),
        agent: Agent {
            workload: "support".to_owned(),
            cgroup: "/agents/support-1".to_owned(),
            instance: 7,
            spiffe_id: "spiffe://example.org/support/support-1".to_owned(),
        },
        delegation: Some(Delegation {
            issuer: "https://idp.example.org".to_owned(),
            subject: "alice".to_owned(),
            actors: vec![
                Actor { issuer: None, subject: "a".to_owned() },
                Actor { issuer: None, subject: "b".to_owned() },
            ],
        }),
        policy: Digest::of(b"policy"),
    }
}

/// Whoever changes the encoding changes the number in it too: approvals that were given are of the calls that people saw.
#[test]
fn the_hash_of_a_call_is_this_one() {
    let mut encoded = Vec::from(*b"authd call 1\0");
    let text = |encoded: &mut Vec<u8>, text: &str| {
        encoded.extend([0, 0, 0, 0, 0, 0, 0, text.len() as u8]);
        encoded.extend(text.bytes());
    };
    text(&mut encoded, "refund");
    text(&mut encoded, r#"{"amount":"12.50","order":"o1"}"#);
    text(&mut encoded, "support");
    text(&mut encoded, "/agents/support-1");
    text(&mut encoded, "spiffe://example.org/support/support-1");
    encoded.extend([0, 0, 0, 0, 0, 0, 0, 7]);
    encoded.extend(Digest::of(b"policy").as_bytes());
    encoded.push(1);
    text(&mut encoded, "https://idp.example.org");
    text(&mut encoded, "alice");
    encoded.extend([0, 0, 0, 0, 0, 0, 0, 2]);
    for actor in ["a", "b"] {
        encoded.push(0);
        text(&mut encoded, "");
        text(&mut encoded, actor);
    }
    assert_eq!(call().hash(), CallHash(Digest::of(&encoded)));
}

#[test]
fn every_part_of_a_call_is_in_its_hash() {
    let changes: [fn(&mut Call); 15] = [
        |_| {},
        |c| c.tool.push('x'),
        |c| c.arguments = Arguments::read(br#"{"amount":"12.51","order":"o1"}"#).unwrap(),
        |c| c.arguments = Arguments::read(br#"{"amount":12.5,"order":"o1"}"#).unwrap(),
        |c| c.agent.workload.push('x'),
        |c| c.agent.cgroup.push('x'),
        |c| c.agent.instance += 1,
        |c| c.agent.spiffe_id.push('x'),
        |c| c.delegation = None,
        |c| c.delegation.as_mut().unwrap().issuer.push('x'),
        |c| c.delegation.as_mut().unwrap().subject.push('x'),
        |c| c.delegation.as_mut().unwrap().actors.reverse(),
        |c| c.delegation.as_mut().unwrap().actors.truncate(1),
        |c| c.delegation.as_mut().unwrap().actors[0].issuer = Some(String::new()),
        |c| c.policy = Digest::of(b"another"),
    ];
    let mut seen = HashMap::new();
    for (number, change) in changes.into_iter().enumerate() {
        let mut call = call();
        change(&mut call);
        assert_eq!(seen.insert(call.hash(), number), None, "{call:?}");
    }
    // What is cut elsewhere is another call.
    let mut moved = call();
    moved.tool.push('{');
    moved.agent.workload.remove(0);
    assert!(!seen.contains_key(&moved.hash()));
}

fn text() -> impl Strategy<Value = String> {
    // Few texts, so that equal ones come up, and what lengths could be mistaken for.
    proptest::sample::select(vec!["", "a", "b", "ab", "a\0", "\0\0\0\0\0\0\0\u{1}a", "{}"]).prop_map(str::to_owned)
}

fn small_call() -> impl Strategy<Value = Call> {
    let actor = (proptest::option::of(text()), text()).prop_map(|(issuer, subject)| Actor { issuer, subject });
    let delegation = (text(), text(), proptest::collection::vec(actor, 0..3));
    let delegation = delegation.prop_map(|(issuer, subject, actors)| Delegation { issuer, subject, actors });
    let arguments = proptest::sample::select(vec!["{}", "{\"a\":1}", "{\"a\":[1]}", "{\"a\":\"1\"}"]);
    (text(), arguments, text(), text(), 0..2_u64, text(), proptest::option::of(delegation), 0..2_u8).prop_map(
        |(tool, arguments, workload, cgroup, instance, spiffe_id, delegation, policy)| Call {
            tool,
            arguments: Arguments::read(arguments.as_bytes()).unwrap(),
            agent: Agent { workload, cgroup, instance, spiffe_id },
            delegation,
            policy: Digest::of(&[policy]),
        },
    )
}

fn number() -> impl Strategy<Value = String> {
    prop_oneof![
        "-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?",
        any::<f64>().prop_filter("finite", |double| double.is_finite()).prop_map(|double| format!("{double:e}")),
        any::<i64>().prop_map(|integer| integer.to_string()),
        (9_007_199_254_740_980_u64..9_007_199_254_741_010).prop_map(|integer| integer.to_string()),
    ]
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-1_000_000_000_000_000_i64..1_000_000_000_000_000).prop_map(Value::from),
        any::<f64>()
            .prop_filter("finite", |f| f.is_finite() && f.to_bits() != (-0.0_f64).to_bits())
            .prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::vec((any::<String>(), inner), 0..5)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// As a tool would compare: by the number, and not by whether it was written with a dot.
fn is_same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => decimal(&one.to_string()) == decimal(&other.to_string()),
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| is_same(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(name, value)| other.get(name).is_some_and(|other| is_same(value, other)))
        }
        (one, other) => one == other,
    }
}

proptest! {
    #[test]
    fn calls_that_differ_have_different_hashes(one in small_call(), other in small_call()) {
        prop_assert_eq!(one == other, one.hash() == other.hash());
        prop_assert_eq!(one == other, one.encoded() == other.encoded());
    }

    /// Numbers that are taken are equal exactly if their texts are of one decimal number.
    #[test]
    fn numbers_that_differ_have_different_texts(one in number(), other in number()) {
        let read = |number: &str| Arguments::read(format!("{{\"a\":{number}}}").as_bytes()).ok();
        if let (Some(a), Some(b)) = (read(&one), read(&other)) {
            prop_assert_eq!(decimal(&one) == decimal(&other), a.text() == b.text(), "{} {}", one, other);
            prop_assert_eq!(a.map() == b.map(), a.text() == b.text(), "{} {}", one, other);
        }
    }

    #[test]
    fn canonical_text_means_what_was_written(value in json()) {
        let map = Map::from_iter([("a".to_owned(), value)]);
        let text = serde_json::to_string(&map).unwrap();
        let arguments = Arguments::read(text.as_bytes()).unwrap();
        let again: Value = serde_json::from_str(arguments.text()).unwrap();
        prop_assert!(is_same(&Value::Object(map), &again), "{} {}", text, arguments.text());
        prop_assert_eq!(Arguments::read(arguments.text().as_bytes()).unwrap(), arguments);
    }

    #[test]
    fn values_that_differ_have_different_texts(one in json(), other in json()) {
        let text = |value: &Value| Arguments::new(&Map::from_iter([("a".to_owned(), value.clone())])).unwrap().text().to_owned();
        prop_assert_eq!(is_same(&one, &other), text(&one) == text(&other));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Arguments::read(&bytes);
        let _ = numbers(&bytes).count();
    }
}
