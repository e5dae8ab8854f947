//! Qwen2's pre-tokenisation by hand, for text of common characters: several times as fast as the regex engine and the
//! normaliser with its offsets. Not for other text: scripts whose letters or compositions need Unicode's tables go the long
//! way. Source: the regex itself, [`super::tokenizer::QWEN2_SPLIT`], against which the tests hold it.

/// Whether `c` is one of the characters that [`known_pieces`] understands: Latin, general punctuation, Chinese and its
/// punctuation. None of them composes with another under NFC, and for each the standard library's idea of letter, number
/// and white space is the regex's. U+017F is out because it counts as an `s` in `'s`.
pub fn is_known(c: char) -> bool {
    matches!(c, '\0'..='\u{17E}' | '\u{180}'..='\u{2FF}' | '\u{2010}'..='\u{205E}' | '\u{3000}'..='\u{3003}'
        | '\u{3008}'..='\u{3011}' | '\u{4E00}'..='\u{9FA5}' | '\u{FF01}'..='\u{FF5E}')
}

/// The pieces of `text`, whose characters must all be known; joined they are the text.
pub fn known_pieces(text: &str) -> impl Iterator<Item = &str> {
    debug_assert!(text.chars().all(is_known), "characters beyond the known ones need the regex");
    let mut rest = text;
    std::iter::from_fn(move || {
        let first = rest.chars().next()?;
        let (piece, tail) = rest.split_at(piece_length(first, rest));
        rest = tail;
        Some(piece)
    })
}

fn is_letter(c: char) -> bool {
    c.is_alphabetic()
}

fn is_newline(c: char) -> bool {
    matches!(c, '\r' | '\n')
}

fn is_mark(c: char) -> bool {
    !c.is_whitespace() && !c.is_alphabetic() && !c.is_numeric()
}

/// How many bytes from `from` on are characters that satisfy `test`.
fn run(rest: &str, from: usize, test: fn(char) -> bool) -> usize {
    rest[from..].find(|c| !test(c)).unwrap_or(rest.len() - from)
}

/// The length in bytes of the piece at the start of `rest`: the alternatives of the regex in their order.
fn piece_length(first: char, rest: &str) -> usize {
    if first == '\'' {
        let lower = |index: usize| rest.as_bytes().get(index).map_or(0, u8::to_ascii_lowercase);
        match (lower(1), lower(2)) {
            (b's' | b't' | b'm' | b'd', _) => return 2,
            (b'r' | b'v', b'e') | (b'l', b'l') => return 3,
            _ => {}
        }
    }
    let lead = if is_letter(first) || first.is_numeric() || is_newline(first) { 0 } else { first.len_utf8() };
    let letters = run(rest, lead, is_letter);
    if letters > 0 {
        return lead + letters;
    }
    if first.is_numeric() {
        return first.len_utf8();
    }
    let space = usize::from(first == ' ');
    let marks = run(rest, space, is_mark);
    if marks > 0 {
        return space + marks + run(rest, space + marks, is_newline);
    }
    let spaces = run(rest, 0, char::is_whitespace);
    if let Some(last) = rest[..spaces].rfind(is_newline) {
        return last + 1;
    }
    // The look-ahead: a run before a visible character leaves its last space to that character's piece.
    let last = rest[..spaces].chars().next_back().map_or(0, char::len_utf8);
    if spaces < rest.len() && spaces > last { spaces - last } else { spaces }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::super::tokenizer::QWEN2_SPLIT;
    use super::*;
    use crate::kernels::random::Stream;

    #[test]
    fn pieces_are_those_of_the_regex() {
        let split = serde_json::json!({ "type": "Split", "pattern": { "Regex": QWEN2_SPLIT }, "behavior": "Isolated", "invert": false });
        let regex: tokenizers::pre_tokenizers::split::Split = serde_json::from_value(split).unwrap();
        let check = |text: &str| {
            let mut pieces = PreTokenizedString::from(text);
            regex.pre_tokenize(&mut pieces).unwrap();
            let expected: Vec<_> = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let expected: Vec<&str> = expected.iter().map(|(piece, _, _)| *piece).collect();
            assert_eq!(known_pieces(text).collect::<Vec<_>>(), expected, "{text:?}");
        };
        let random = Stream::new(11, "split");
        // Few kinds of characters, so that every pair and triple of kinds meets; then all that are known.
        let kinds: Vec<char> =
            "  \n\r\t\x0B\x0C'sStTlLreEvVmdabz019.,!_-\x00\x1C\x7F\u{85}\u{A0}\u{2028}\u{3000}é½²’—中，９Ａ".chars().collect();
        let known: Vec<char> = ('\0'..='\u{FFFF}').filter(|c| is_known(*c)).collect();
        for case in 0..20_000u64 {
            let length = random.below(case * 100, 24);
            let pool = if case % 4 == 0 { &known } else { &kinds };
            let draw = |index: u64| pool[random.below(case * 100 + index + 1, pool.len() as u64) as usize];
            check(&(0..length).map(draw).collect::<String>());
        }
        // Each known character between letters, digits, marks and spaces.
        for part in known.chunks(500) {
            check(&part.iter().flat_map(|c| ['a', *c, '1', *c, '.', *c, ' ', *c, *c, '\n']).collect::<String>());
        }
        check("I'LL say: \"don't\"  (it's 10 o'clock)\r\n\r\n\tfn main() {}\n   ");
    }

    #[test]
    fn the_normaliser_leaves_known_characters_alone() {
        use tokenizers::{NormalizedString, Normalizer};
        let known: String = ('\0'..='\u{FFFF}').filter(|c| is_known(*c)).collect();
        let text = format!("{known}{}", known.chars().rev().collect::<String>());
        let mut normalized = NormalizedString::from(text.as_str());
        tokenizers::normalizers::NFC.normalize(&mut normalized).unwrap();
        assert!(normalized.get() == text);
    }
}
