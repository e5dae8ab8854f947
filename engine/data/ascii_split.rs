//! Qwen2's pre-tokenisation by hand, for text that is ASCII: about ten times as fast as the regex engine.
//! Not for other text: what is a letter is simple here only. Source: the regex itself, [`super::tokenizer::QWEN2_SPLIT`],
//! against which the tests hold it.

/// The pieces of `text`, which must be ASCII; joined they are the text.
pub fn ascii_pieces(text: &str) -> impl Iterator<Item = &str> {
    assert!(text.is_ascii(), "letters beyond ASCII need the regex");
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = &text.as_bytes()[at..];
        let first = *rest.first()?;
        let start = at;
        at += piece_length(first, rest);
        Some(&text[start..at])
    })
}

/// Unicode's White_Space within ASCII; Rust's `is_ascii_whitespace` lacks the vertical tab.
fn is_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ')
}

fn is_newline(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n')
}

fn is_mark(byte: u8) -> bool {
    !is_space(byte) && !byte.is_ascii_alphanumeric()
}

/// How many bytes from `from` on satisfy `test`.
fn run(rest: &[u8], from: usize, test: fn(u8) -> bool) -> usize {
    rest[from..].iter().take_while(|byte| test(**byte)).count()
}

/// The length of the piece at the start of `rest`: the alternatives of the regex in their order.
fn piece_length(first: u8, rest: &[u8]) -> usize {
    let is_letter = |byte: &u8| byte.is_ascii_alphabetic();
    if first == b'\'' {
        let lower = |index: usize| rest.get(index).map_or(0, u8::to_ascii_lowercase);
        match (lower(1), lower(2)) {
            (b's' | b't' | b'm' | b'd', _) => return 2,
            (b'r' | b'v', b'e') | (b'l', b'l') => return 3,
            _ => {}
        }
    }
    let lead = usize::from(!first.is_ascii_alphanumeric() && !is_newline(first));
    if rest.get(lead).is_some_and(is_letter) {
        return lead + run(rest, lead, |byte| byte.is_ascii_alphabetic());
    }
    if first.is_ascii_digit() {
        return 1;
    }
    let space = usize::from(first == b' ');
    let marks = run(rest, space, is_mark);
    if marks > 0 {
        return space + marks + run(rest, space + marks, is_newline);
    }
    let spaces = run(rest, 0, is_space);
    match rest[..spaces].iter().rposition(|byte| is_newline(*byte)) {
        Some(last) => last + 1,
        // The look-ahead: a run before a visible character leaves its last space to that character's piece.
        None if spaces < rest.len() && spaces > 1 => spaces - 1,
        None => spaces,
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use crate::kernels::random::Stream;
    use super::super::tokenizer::QWEN2_SPLIT;
    use super::*;

    #[test]
    fn pieces_are_those_of_the_regex() {
        let split = serde_json::json!({ "type": "Split", "pattern": { "Regex": QWEN2_SPLIT }, "behavior": "Isolated", "invert": false });
        let regex: tokenizers::pre_tokenizers::split::Split = serde_json::from_value(split).unwrap();
        let check = |text: &str| {
            let mut pieces = PreTokenizedString::from(text);
            regex.pre_tokenize(&mut pieces).unwrap();
            let expected: Vec<_> = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let expected: Vec<&str> = expected.iter().map(|(piece, _, _)| *piece).collect();
            assert_eq!(ascii_pieces(text).collect::<Vec<_>>(), expected, "{text:?}");
        };
        let random = Stream::new(11, "ascii");
        // Few kinds of bytes, so that every pair and triple of kinds meets; then all of ASCII.
        let kinds = b"  \n\r\t\x0B\x0C'sStTlLreEvVmdabz019.,!_-\x00\x1C\x7F";
        for case in 0..20_000u64 {
            let length = random.below(case * 100, 24);
            let byte = |index: u64| match case % 4 {
                0 => random.below(case * 100 + index + 1, 128) as u8,
                _ => kinds[random.below(case * 100 + index + 1, kinds.len() as u64) as usize],
            };
            let bytes: Vec<u8> = (0..length).map(byte).collect();
            check(std::str::from_utf8(&bytes).unwrap());
        }
        check("I'LL say: \"don't\"  (it's 10 o'clock)\r\n\r\n\tfn main() {}\n   ");
    }
}
