//! Distinguished names as text.
//!
//! Enters: a name as x509-parser has it. Leaves: its one RFC 4514 string. Never: two names in one string; whatever could
//! be taken for a separator or for another value is escaped.

use std::fmt::Write;

use x509_parser::{
    asn1_rs::{Any, Tag, ToDer},
    x509::{AttributeTypeAndValue, RelativeDistinguishedName, X509Name},
};

/// Short names: those of RFC 4514, 3, and two more as OpenSSL writes them.
const SHORT: [(&str, &str); 11] = [
    ("2.5.4.3", "CN"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "C"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.9", "street"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("1.2.840.113549.1.9.1", "emailAddress"),
];

/// RFC 4514, 2: the last part of the name stands first. `None` if a value has no encoding of its own to be written down.
pub fn rfc4514(name: &X509Name<'_>) -> Option<String> {
    let part = |rdn: &RelativeDistinguishedName<'_>| {
        let mut attributes: Vec<String> = rdn.iter().map(attribute).collect::<Option<_>>()?;
        // In which order is free (RFC 4514, 2.2). OpenSSL turns these around as well.
        attributes.reverse();
        Some(attributes.join("+"))
    };
    let mut parts: Vec<String> = name.iter_rdn().map(part).collect::<Option<_>>()?;
    parts.reverse();
    Some(parts.join(","))
}

fn attribute(attribute: &AttributeTypeAndValue<'_>) -> Option<String> {
    let oid = attribute.attr_type().to_id_string();
    let short = SHORT.iter().find(|(known, _)| *known == oid).map(|(_, short)| *short);
    match (short, text(attribute.attr_value())) {
        (Some(short), Some(value)) => Some(format!("{short}={}", escaped(value))),
        (short, _) => Some(format!("{}={}", short.unwrap_or(&oid), encoding(attribute.attr_value())?)),
    }
}

/// The strings whose bytes are UTF-8. Teletex, BMP and universal strings have several readings, and get none.
fn text<'a>(value: &'a Any<'_>) -> Option<&'a str> {
    match value.tag() {
        Tag::Utf8String | Tag::PrintableString | Tag::Ia5String | Tag::NumericString | Tag::VisibleString => {
            std::str::from_utf8(value.data).ok()
        }
        _ => None,
    }
}

/// RFC 4514, 2.4.
fn escaped(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let last = value.chars().count().saturating_sub(1);
    for (index, character) in value.chars().enumerate() {
        let edge = (index == 0 && " #".contains(character)) || (index == last && character == ' ');
        if edge || "\"+,;<>\\".contains(character) {
            out.push('\\');
            out.push(character);
        } else if character.is_control() {
            // NUL must be escaped; the others may be, and logs and terminals are better off.
            let mut bytes = [0; 4];
            character.encode_utf8(&mut bytes).bytes().for_each(|byte| push_hex(&mut out, "\\", byte));
        } else {
            out.push(character);
        }
    }
    out
}

/// RFC 4514, 2.4: `#` and the encoding of the value, tag and length included.
fn encoding(value: &Any<'_>) -> Option<String> {
    let mut out = "#".to_owned();
    value.to_der_vec().ok()?.into_iter().for_each(|byte| push_hex(&mut out, "", byte));
    Some(out)
}

fn push_hex(out: &mut String, prefix: &str, byte: u8) {
    // Writing to a string does not fail.
    let _ = write!(out, "{prefix}{byte:02X}");
}

#[cfg(test)]
mod tests {
    use x509_parser::asn1_rs::FromDer;

    use super::*;

    #[test]
    fn separators_and_edges_are_escaped() {
        for (value, expected) in [
            ("plain", "plain"),
            ("a,b+c", "a\\,b\\+c"),
            ("\"<>;\\", "\\\"\\<\\>\\;\\\\"),
            (" a ", "\\ a\\ "),
            (" ", "\\ "),
            ("#1", "\\#1"),
            ("a#1 b", "a#1 b"),
            ("a=b", "a=b"),
            ("a\0b\n", "a\\00b\\0A"),
            ("M\u{fc}ller", "M\u{fc}ller"),
            ("\u{85}", "\\C2\\85"),
        ] {
            assert_eq!(escaped(value), expected, "{value:?}");
        }
    }

    #[test]
    fn values_without_one_reading_are_written_as_their_bytes() {
        let (_, bmp) = Any::from_der(&[0x1e, 0x04, 0x00, 0x41, 0x00, 0x42]).unwrap();
        assert_eq!(text(&bmp), None);
        assert_eq!(encoding(&bmp).unwrap(), "#1E0400410042");
    }
}
