//! Trains a byte-level BPE on text, in Qwen2's make: NFC, its regex, all 256 bytes, control tokens at the end.
//! Not a tokenizer: what comes out is a [`Tokenizer`]. Source: Sennrich et al., arXiv 1508.07909; the counting and merging are
//! the `tokenizers` library's.

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{Model, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Trainer};

use super::byte_alphabet::byte_to_char;
use super::tokenizer::{AddedToken, Tokenizer, line_cut};
use super::tokenizer_files::{QWEN2_5_CONTROL, tokenizer_json};
use crate::error::{Error, Result};

const OP: &str = "tokenizer.train";

/// Texts are counted in pieces of about this size, so that a long document costs no long list of words.
const CHUNK_BYTES: usize = 256 * 1024;

/// Which control tokens follow the trained vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ControlTokens {
    /// `<|endoftext|>`, `<|im_start|>`, `<|im_end|>`.
    #[default]
    Chat,
    /// The 22 of Qwen2.5, with those for tools, vision and code.
    Qwen25,
}

/// What to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BpeTraining {
    /// Everything counted: bytes, merges and control tokens. Fewer come out when the text has no more pairs to merge.
    pub vocab_size: usize,
    pub control: ControlTokens,
    /// A pair rarer than this is not merged.
    pub min_frequency: u64,
}

impl BpeTraining {
    /// `vocab_size` in all, with the chat tokens; pairs seen once are not merged.
    pub fn new(vocab_size: usize) -> Self {
        Self { vocab_size, control: ControlTokens::Chat, min_frequency: 2 }
    }
}

/// Trains on `texts`. The same texts in any order give the same tokenizer.
///
/// Errors: [`Error::Argument`] if `vocab_size` leaves no room for the bytes and the control tokens, or there is no text; the
/// first error of `texts`.
pub fn train_bpe<S: AsRef<str>>(texts: impl Iterator<Item = Result<S>> + Send, training: &BpeTraining) -> Result<Tokenizer> {
    let control = match training.control {
        ControlTokens::Chat => &QWEN2_5_CONTROL[..3],
        ControlTokens::Qwen25 => &QWEN2_5_CONTROL[..],
    };
    let least = 256 + control.len();
    if training.vocab_size < least {
        let expected = format!("at least {least}: 256 bytes and {} control tokens", control.len());
        return Err(Error::argument(OP, "vocab_size", expected, training.vocab_size));
    }
    // An empty vocabulary in the file's form brings the very normaliser and regex that the result will use.
    let alphabet: serde_json::Map<_, _> = (0..=255u8).map(|byte| (byte_to_char(byte).to_string(), byte.into())).collect();
    let empty = tokenizer_json(serde_json::json!({ "vocab": alphabet, "merges": [] }), &[], true);
    let frame = tokenizers::Tokenizer::from_bytes(empty).expect("our own tokenizer.json is sound");
    let (Some(normalizer), Some(splitter)) = (frame.get_normalizer(), frame.get_pre_tokenizer()) else {
        unreachable!("`tokenizer_json` wrote both");
    };

    let mut failure = None;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(training.vocab_size - control.len())
        .min_frequency(training.min_frequency)
        .initial_alphabet((0..=255u8).map(byte_to_char).collect())
        .show_progress(false)
        .build();
    let mut seen_bytes = 0usize;
    let chunks = texts
        .map_while(|text| text.map_err(|error| failure = Some(error)).ok())
        .inspect(|text| seen_bytes += text.as_ref().len())
        .flat_map(|text| pieces(text.as_ref()).into_iter().map(str::to_string).collect::<Vec<_>>());
    let fed = trainer.feed(chunks, |text| {
        let mut pieces = PreTokenizedString::from(text);
        pieces.normalize(|piece| normalizer.normalize(piece))?;
        splitter.pre_tokenize(&mut pieces)?;
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::None);
        Ok(splits.into_iter().map(|(word, _, _)| word.to_string()).collect())
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let failed = |error: tokenizers::Error| Error::argument(OP, "texts", "text that BPE can count", error);
    fed.map_err(failed)?;
    if seen_bytes == 0 {
        return Err(Error::argument(OP, "texts", "some text", "none"));
    }
    // No text has more merges than bytes; the trainer makes room for all that it is asked for.
    trainer.vocab_size = trainer.vocab_size.min(256usize.saturating_add(seen_bytes));
    let mut model = BPE::default();
    trainer.train(&mut model).map_err(failed)?;
    let first = model.get_vocab_size() as u32;
    let added: Vec<AddedToken> =
        (first..).zip(control).map(|(id, (content, special))| AddedToken { id, content: content.to_string(), special: *special }).collect();
    let model = serde_json::to_value(&model).expect("a BPE model can be written");
    Tokenizer::from_json(tokenizer_json(model, &added, true).as_bytes(), std::path::Path::new("trained tokenizer"))
}

/// `text` in pieces of about [`CHUNK_BYTES`], cut where Qwen2's regex has a boundary anyway.
fn pieces(text: &str) -> Vec<&str> {
    let (mut pieces, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let cut = if rest.len() <= CHUNK_BYTES { rest.len() } else { line_cut(rest, CHUNK_BYTES).unwrap_or(rest.len()) };
        let (piece, tail) = rest.split_at(cut);
        pieces.push(piece);
        rest = tail;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::Specials;
    use super::*;

    fn train(texts: &[&str], training: &BpeTraining) -> Result<Tokenizer> {
        train_bpe(texts.iter().map(|text| Ok(*text)), training)
    }

    #[test]
    fn the_most_frequent_pairs_merge_first_and_control_tokens_end_the_vocabulary() {
        let tokenizer = train(&["abab abab", "abab", "xyz 12345"], &BpeTraining::new(261)).unwrap();
        // "ab" occurs six times, then "abab" three: nothing else occurs twice but " " + "abab" does not here.
        assert_eq!(tokenizer.vocab_size(), 261);
        let ids = tokenizer.encode("abab", Specials::Plain);
        assert_eq!((ids.len(), tokenizer.id_to_token(ids[0]).unwrap()), (1, "abab".to_string()));
        assert_eq!((tokenizer.end_of_text(), tokenizer.im_start(), tokenizer.im_end()), (Some(258), Some(259), Some(260)));
        assert_eq!(tokenizer.encode("e\u{301}", Specials::Plain), tokenizer.encode("é", Specials::Plain));
        assert_eq!(tokenizer.encode("12", Specials::Plain).len(), 2);
        assert_eq!(tokenizer.decode(&tokenizer.encode("任 a\n", Specials::Plain), true).unwrap(), "任 a\n");
    }

    #[test]
    fn order_and_repetition_do_not_change_the_result_and_22_tokens_can_be_asked_for() {
        let text = "the cat sat on the mat; the dog sat on the log. ".repeat(50);
        let lines: Vec<String> = (0..200).map(|line| format!("{} {line}\n", &text[line % 40..])).collect();
        let training = BpeTraining { control: ControlTokens::Qwen25, ..BpeTraining::new(350) };
        let forward: Vec<&str> = lines.iter().map(String::as_str).collect();
        let backward: Vec<&str> = forward.iter().rev().copied().collect();
        let first = train(&forward, &training).unwrap();
        assert_eq!(first.fingerprint(), train(&backward, &training).unwrap().fingerprint());
        assert_eq!(first.added_tokens().len(), 22);
        assert_eq!(first.added_tokens()[14].content, "<tool_call>");
        assert!(!first.is_special(first.added_id("<tool_call>").unwrap()));
        let folder = tempfile::tempdir().unwrap();
        first.save(folder.path(), None).unwrap();
        let back = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!((back.fingerprint(), back.eos()), (first.fingerprint(), first.im_end()));
    }

    #[test]
    fn what_cannot_be_trained_is_an_error() {
        assert!(train(&["x"], &BpeTraining::new(258)).unwrap_err().to_string().contains("at least 259"));
        assert!(train(&[], &BpeTraining::new(300)).unwrap_err().to_string().contains("some text"));
        assert!(train(&["", ""], &BpeTraining::new(300)).is_err());
        let texts = [Ok("a"), Err(Error::Interrupted), Ok("b")];
        assert!(matches!(train_bpe(texts.into_iter(), &BpeTraining::new(300)), Err(Error::Interrupted)));
        // A text too small for the size asked for gives what it has.
        assert_eq!(train(&["ab"], &BpeTraining::new(1000)).unwrap().vocab_size(), 259);
    }
}
