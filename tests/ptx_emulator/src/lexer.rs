//! PTX text → tokens, each with the line it stands on.

use crate::refusal::{Complaint, Refusal};

/// One token of PTX.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Token {
    /// A name, a directive or an opcode with its suffixes: `%r1`, `.reg`, `ld.global.v4.u32`.
    Word(String),
    Integer(u64),
    /// Bits of an f32 written as `0f3F800000`.
    Float32(u32),
    /// Bits of an f64, written as `0d...` or in decimal.
    Float64(u64),
    Text(String),
    Mark(char),
}

/// A token and its line, counted from 1.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    pub(crate) token: Token,
    pub(crate) line: u32,
}

fn begins_word(c: u8) -> bool {
    c.is_ascii_alphabetic() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

fn continues_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

/// Splits a module into tokens; comments and white space vanish.
pub(crate) fn tokens(text: &str) -> Result<Vec<Placed>, Refusal> {
    let bytes = text.as_bytes();
    let mut found = Vec::with_capacity(bytes.len() / 4);
    let mut line = 1;
    let mut at = 0;
    while at < bytes.len() {
        let c = bytes[at];
        let rest = &bytes[at..];
        if c == b'\n' {
            line += 1;
            at += 1;
        } else if c.is_ascii_whitespace() || c == 0 {
            at += 1;
        } else if rest.starts_with(b"//") {
            at += rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
        } else if rest.starts_with(b"/*") {
            let length = rest.windows(2).position(|pair| pair == b"*/").map_or(rest.len(), |end| end + 2);
            line += String::from_utf8_lossy(&rest[..length]).matches('\n').count() as u32;
            at += length;
        } else if c == b'"' {
            let length = rest[1..].iter().position(|&b| b == b'"').unwrap_or(rest.len() - 1);
            let content = String::from_utf8_lossy(&rest[1..=length]).into_owned();
            found.push(Placed { token: Token::Text(content), line });
            at += (length + 2).min(rest.len());
        } else if c.is_ascii_digit() {
            let mut length = rest.iter().position(|b| !b.is_ascii_alphanumeric()).unwrap_or(rest.len());
            // Decimal floating point: digits, a dot, digits.
            if rest.get(length) == Some(&b'.') && rest.get(length + 1).is_some_and(u8::is_ascii_digit) {
                let tail = &rest[length + 1..];
                length += 1 + tail.iter().position(|b| !b.is_ascii_alphanumeric()).unwrap_or(tail.len());
            }
            let word = String::from_utf8_lossy(&rest[..length]).into_owned();
            let token = number(&word).ok_or_else(|| {
                Refusal::new(Complaint::Syntax, format!("line {line}: `{word}` is no number of PTX"))
            })?;
            found.push(Placed { token, line });
            at += length;
        } else if begins_word(c) {
            let mut length = 1;
            loop {
                let tail = &rest[length..];
                if tail.first().copied().is_some_and(continues_word) {
                    length += 1;
                } else if tail.starts_with(b"::") {
                    length += 2;
                } else {
                    break;
                }
            }
            let word = String::from_utf8_lossy(&rest[..length]).into_owned();
            found.push(Placed { token: Token::Word(word), line });
            at += length;
        } else {
            found.push(Placed { token: Token::Mark(c as char), line });
            at += 1;
        }
    }
    Ok(found)
}

fn number(word: &str) -> Option<Token> {
    let lower = word.to_ascii_lowercase();
    if let Some(digits) = lower.strip_prefix("0f") {
        return u32::from_str_radix(digits, 16).ok().map(Token::Float32);
    }
    if let Some(digits) = lower.strip_prefix("0d") {
        return u64::from_str_radix(digits, 16).ok().map(Token::Float64);
    }
    if lower.contains('.') {
        return lower.parse::<f64>().ok().map(|value| Token::Float64(value.to_bits()));
    }
    let plain = lower.strip_suffix('u').unwrap_or(&lower);
    let value = if let Some(digits) = plain.strip_prefix("0x") {
        u64::from_str_radix(digits, 16)
    } else if let Some(digits) = plain.strip_prefix("0b") {
        u64::from_str_radix(digits, 2)
    } else if plain.len() > 1 && plain.starts_with('0') {
        u64::from_str_radix(&plain[1..], 8)
    } else {
        plain.parse()
    };
    value.ok().map(Token::Integer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_numbers_and_marks_are_told_apart() {
        let found = tokens("ld.global.L2::128B.v2.u32 {%r1, %r2}, [%rd1+0x10]; // end\n$L:").unwrap();
        let words: Vec<_> = found.iter().map(|placed| placed.token.clone()).collect();
        assert_eq!(words[0], Token::Word("ld.global.L2::128B.v2.u32".into()));
        assert!(words.contains(&Token::Integer(16)));
        assert_eq!(words[words.len() - 2], Token::Word("$L".into()));
        assert_eq!(found.last().unwrap().line, 2);
    }

    #[test]
    fn floats_keep_their_bits() {
        assert_eq!(number("0f3F800000"), Some(Token::Float32(0x3f80_0000)));
        assert_eq!(number("0d3FF0000000000000"), Some(Token::Float64(1f64.to_bits())));
        assert_eq!(number("017"), Some(Token::Integer(15)));
        assert_eq!(number("0XFFFFFFFF"), Some(Token::Integer(0xffff_ffff)));
        assert_eq!(number("12abc"), None);
    }
}
