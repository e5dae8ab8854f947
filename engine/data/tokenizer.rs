//! Text to token ids and back: plain bytes, or a byte-level BPE as Qwen2 and Qwen2.5 publish it.
//! Not the files (`tokenizer_files.rs`), not conversations (`chat_template.rs`), not training (`bpe_trainer.rs`).
//! Source: the published tokenizer.json of Qwen2.5; ids agree with the `tokenizers` library, whose BPE and regex are used.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use serde_json::Value;
use tokenizers::{Model, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::byte_alphabet::byte_to_char;
use super::qwen2_split::{is_known, known_pieces};
use crate::error::{Error, Result};
use crate::kernels::cpu::threads;

/// The end-of-document token of Qwen2 and later.
pub const END_OF_TEXT: &str = "<|endoftext|>";
/// Begins a turn of a conversation.
pub const IM_START: &str = "<|im_start|>";
/// Ends a turn of a conversation.
pub const IM_END: &str = "<|im_end|>";

/// Qwen2's pre-tokenisation regex: contractions, words, single digits, punctuation, newlines, spaces.
pub const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Texts longer than this are cut at safe places and encoded on all threads.
const CHUNK_BYTES: usize = 64 * 1024;

/// Whether text may contain control tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Specials {
    /// Added tokens written out in the text become their single ids, as Hugging Face encodes.
    Recognise,
    /// The whole text is ordinary text: what a user typed can never become a control token.
    Plain,
}

/// A token outside the BPE vocabulary that is matched verbatim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedToken {
    pub id: u32,
    pub content: String,
    /// Left out when decoding with `skip_special`. Qwen2.5's `<tool_call>` is added but not special.
    pub special: bool,
}

/// A tokenizer. It is immutable and can be shared between threads.
#[derive(Debug)]
pub struct Tokenizer {
    pub(super) kind: Kind,
    added: Vec<AddedToken>,
    /// For each byte, the added tokens that start with it, longest first, as indices into `added`.
    added_by_first_byte: Vec<Vec<usize>>,
    /// The bytes of id `i` are `bytes[starts[i]..starts[i + 1]]`; an id that does not exist has none.
    bytes: Vec<u8>,
    starts: Vec<u32>,
    /// Whether text is divided by Qwen2's regex after NFC at most, as far as it is divided at all.
    qwen2_split: bool,
    pub(super) files: Files,
}

/// What saving writes back unchanged.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub tokenizer_json: Option<Vec<u8>>,
    pub tokenizer_config: Option<Value>,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// Ids 0 to 255 are the bytes of UTF-8.
    Bytes,
    Bpe(Box<tokenizers::Tokenizer>),
}

/// A part of a text: an added token's id, or text without any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    Added(u32),
    Text(&'a str),
}

impl Tokenizer {
    /// Ids 0 to 255 are bytes; `control` tokens follow from 256, in the order given. No file is needed.
    ///
    /// Errors: [`Error::Argument`] for an empty or repeated control token.
    pub fn bytes(control: &[&str]) -> Result<Self> {
        let mut added = Vec::new();
        for (index, content) in control.iter().enumerate() {
            if content.is_empty() || control[..index].contains(content) {
                return Err(Error::argument("tokenizer.bytes", "control", "distinct, non-empty tokens", format!("{content:?}")));
            }
            added.push(AddedToken { id: 256 + index as u32, content: content.to_string(), special: true });
        }
        let vocab = (0..=255u8).map(|byte| (u32::from(byte), vec![byte])).collect();
        Ok(Self::assemble(Kind::Bytes, vocab, added, true))
    }

    /// The bytes tokenizer with `<|endoftext|>` 256, `<|im_start|>` 257 and `<|im_end|>` 258.
    pub fn bytes_with_chat() -> Self {
        Self::bytes(&[END_OF_TEXT, IM_START, IM_END]).expect("three distinct tokens")
    }

    pub(super) fn assemble(kind: Kind, mut vocab: Vec<(u32, Vec<u8>)>, mut added: Vec<AddedToken>, qwen2_split: bool) -> Self {
        added.sort_by_key(|token| token.id);
        vocab.extend(added.iter().map(|token| (token.id, token.content.clone().into_bytes())));
        // An added token may reuse an id of the vocabulary; the added content, which sorts last here, is the one that counts.
        vocab.sort_by_key(|(id, _)| *id);
        let count = vocab.last().map_or(0, |(id, _)| *id as usize + 1);
        let (mut bytes, mut starts) = (Vec::new(), Vec::with_capacity(count + 1));
        for (index, (id, content)) in vocab.iter().enumerate() {
            if vocab.get(index + 1).is_some_and(|(next, _)| next == id) {
                continue;
            }
            starts.resize(*id as usize + 1, bytes.len() as u32);
            bytes.extend_from_slice(content);
        }
        starts.push(bytes.len() as u32);
        let mut added_by_first_byte = vec![Vec::new(); 256];
        for (index, token) in added.iter().enumerate() {
            added_by_first_byte[usize::from(token.content.as_bytes()[0])].push(index);
        }
        for candidates in &mut added_by_first_byte {
            candidates.sort_by_key(|index: &usize| std::cmp::Reverse(added[*index].content.len()));
        }
        Self { kind, added, added_by_first_byte, bytes, starts, qwen2_split, files: Files::default() }
    }

    /// The largest id plus one, added tokens included. A model's embedding may have more rows; their ids have no text.
    pub fn vocab_size(&self) -> usize {
        self.starts.len() - 1
    }

    /// Errors: [`Error::Argument`] if this tokenizer has ids that a model of `vocab` tokens does not know.
    pub fn check_fits(&self, vocab: usize) -> Result<()> {
        if self.vocab_size() <= vocab {
            return Ok(());
        }
        let expected = format!("one of at most {vocab} tokens, the model's vocab");
        Err(Error::argument("model", "tokenizer", expected, format!("one of {} tokens", self.vocab_size())))
    }

    /// Whether ids are plain bytes.
    pub fn is_bytes(&self) -> bool {
        matches!(self.kind, Kind::Bytes)
    }

    /// The tokens outside the BPE vocabulary, by rising id.
    pub fn added_tokens(&self) -> &[AddedToken] {
        &self.added
    }

    /// The id of the added token written `content`.
    pub fn added_id(&self, content: &str) -> Option<u32> {
        self.added.iter().find(|token| token.content == content).map(|token| token.id)
    }

    /// The id of `<|endoftext|>`, which follows each document in pretraining.
    pub fn end_of_text(&self) -> Option<u32> {
        self.added_id(END_OF_TEXT)
    }

    /// The id of `<|im_start|>`.
    pub fn im_start(&self) -> Option<u32> {
        self.added_id(IM_START)
    }

    /// The id of `<|im_end|>`.
    pub fn im_end(&self) -> Option<u32> {
        self.added_id(IM_END)
    }

    /// The token that ends generation: tokenizer_config's `eos_token`, else `<|endoftext|>`. A model's
    /// generation_config.json, where there is one, has the last word.
    pub fn eos(&self) -> Option<u32> {
        self.configured("eos_token").or_else(|| self.end_of_text())
    }

    /// The token for padding: tokenizer_config's `pad_token`, else `<|endoftext|>`.
    pub fn pad(&self) -> Option<u32> {
        self.configured("pad_token").or_else(|| self.end_of_text())
    }

    fn configured(&self, key: &str) -> Option<u32> {
        let value = self.files.tokenizer_config.as_ref()?.get(key)?;
        // Older files hold a table with the token's flags in place of its text.
        self.added_id(value.as_str().or_else(|| value.get("content")?.as_str())?)
    }

    /// The bytes of `id`, or `None` where no token has that id.
    pub fn id_to_bytes(&self, id: u32) -> Option<&[u8]> {
        let (start, end) = (*self.starts.get(id as usize)?, *self.starts.get(id as usize + 1)?);
        (start < end).then(|| &self.bytes[start as usize..end as usize])
    }

    /// The text of one token alone; an incomplete character shows as U+FFFD. `None` where no token has that id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        Some(String::from_utf8_lossy(self.id_to_bytes(id)?).into_owned())
    }

    /// Whether `id` is a special token, one that `skip_special` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.added.binary_search_by_key(&id, |token| token.id).is_ok_and(|index| self.added[index].special)
    }

    /// A number that differs between tokenizers with different ids; a stored cursor remembers it.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = 0xCBF2_9CE4_8422_2325u64;
        let mut feed = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
        self.bytes.iter().copied().for_each(&mut feed);
        self.starts.iter().flat_map(|start| start.to_le_bytes()).for_each(&mut feed);
        feed(u8::from(self.is_bytes()));
        hash
    }

    /// The longest added token that begins at byte `at` of `text`.
    pub(super) fn added_at(&self, text: &[u8], at: usize) -> Option<&AddedToken> {
        let candidates = &self.added_by_first_byte[usize::from(text[at])];
        candidates.iter().map(|index| &self.added[*index]).find(|token| text[at..].starts_with(token.content.as_bytes()))
    }

    /// Cuts `text` at the added tokens in it: leftmost first, of those the longest.
    pub fn split_added<'a>(&self, text: &'a str) -> Vec<Piece<'a>> {
        let (mut pieces, mut start, mut at) = (Vec::new(), 0, 0);
        let bytes = text.as_bytes();
        while at < bytes.len() {
            let Some(token) = self.added_at(bytes, at) else {
                at += 1;
                continue;
            };
            if start < at {
                pieces.push(Piece::Text(&text[start..at]));
            }
            pieces.push(Piece::Added(token.id));
            at += token.content.len();
            start = at;
        }
        if start < text.len() {
            pieces.push(Piece::Text(&text[start..]));
        }
        pieces
    }

    /// The ids of `text`. Long texts are encoded on all threads; the ids do not depend on that.
    pub fn encode(&self, text: &str, specials: Specials) -> Vec<u32> {
        let mut parts = Vec::new();
        let pieces = match specials {
            Specials::Plain => vec![Piece::Text(text)],
            Specials::Recognise => self.split_added(text),
        };
        for piece in pieces {
            match piece {
                Piece::Added(_) => parts.push(piece),
                Piece::Text(text) => parts.extend(self.chunks(text).map(Piece::Text)),
            }
        }
        if let [Piece::Text(text)] = parts[..] {
            return self.encode_chunk(text);
        }
        // Threads pay for long texts only: a conversation of many short pieces stays on its own thread.
        if text.len() < CHUNK_BYTES {
            return parts.iter().flat_map(|part| self.encode_part(*part)).collect();
        }
        in_parallel(parts.len(), |index| self.encode_part(parts[index])).concat()
    }

    /// The ids of each text, encoded on all threads.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], specials: Specials) -> Vec<Vec<u32>> {
        in_parallel(texts.len(), |index| self.encode(texts[index].as_ref(), specials))
    }

    fn encode_part(&self, part: Piece) -> Vec<u32> {
        match part {
            Piece::Added(id) => vec![id],
            Piece::Text(text) => self.encode_chunk(text),
        }
    }

    /// Cuts a long text after newlines that a visible character follows. Qwen2's regex always has a piece boundary there: every
    /// alternative that takes a newline takes the rest of its whitespace too, and no alternative starts before it and ends
    /// behind. NFC composes nothing across a newline either. So the ids of the chunks are the ids of the whole.
    fn chunks<'a>(&self, text: &'a str) -> impl Iterator<Item = &'a str> {
        let mut rest = text;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let cut = if rest.len() <= CHUNK_BYTES || !self.qwen2_split { None } else { line_cut(rest, CHUNK_BYTES) };
            let (chunk, tail) = rest.split_at(cut.unwrap_or(rest.len()));
            rest = tail;
            Some(chunk)
        })
    }

    /// Lines of common characters go the fast way, others through the regex; lines are independent, see `chunks`.
    fn encode_chunk(&self, text: &str) -> Vec<u32> {
        let Kind::Bpe(bpe) = &self.kind else {
            return text.bytes().map(u32::from).collect();
        };
        let (mut ids, mut rest) = (Vec::with_capacity(text.len() / 3), text);
        if !self.qwen2_split {
            encode_any(bpe, text, &mut ids);
            return ids;
        }
        while !rest.is_empty() {
            let known = rest.find(|c| !is_known(c)).unwrap_or(rest.len());
            // The line of the first other character begins here; its text goes to the regex, up to the next line.
            let line = if known == rest.len() { known } else { (1..=known).rev().find(|at| is_line_start(rest, *at)).unwrap_or(0) };
            encode_known(bpe, &rest[..line], &mut ids);
            let end = if line == rest.len() { line } else { line_cut(rest, known + 1).unwrap_or(rest.len()) };
            encode_any(bpe, &rest[line..end], &mut ids);
            rest = &rest[end..];
        }
        ids
    }

    /// The text of `ids`: their bytes joined, what is not UTF-8 shown as U+FFFD. `skip_special` leaves special tokens out.
    ///
    /// Errors: [`Error::Argument`] for an id that no token has, such as a padding row of an embedding.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for id in ids {
            let token = self.token_bytes(*id)?;
            if !(skip_special && self.is_special(*id)) {
                bytes.extend_from_slice(token);
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn token_bytes(&self, id: u32) -> Result<&[u8]> {
        self.id_to_bytes(id)
            .ok_or_else(|| Error::argument("tokenizer.decode", "ids", format!("ids of this tokenizer, below {}", self.vocab_size()), id))
    }
}

/// Decodes ids one by one and gives out complete characters only, so that text can be shown while it is generated.
#[derive(Debug, Default, Clone)]
pub struct StreamDecoder {
    pending: Vec<u8>,
    skip_special: bool,
}

impl StreamDecoder {
    pub fn new(skip_special: bool) -> Self {
        Self { pending: Vec::new(), skip_special }
    }

    /// The text that `id` completes; empty while a character is unfinished. Bytes that cannot begin or continue a character
    /// come out as U+FFFD at once.
    ///
    /// Errors: as [`Tokenizer::decode`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String> {
        let token = tokenizer.token_bytes(id)?;
        if self.skip_special && tokenizer.is_special(id) {
            return Ok(String::new());
        }
        self.pending.extend_from_slice(token);
        let complete = self.pending.len() - incomplete_tail(&self.pending);
        let text = String::from_utf8_lossy(&self.pending[..complete]).into_owned();
        self.pending.drain(..complete);
        Ok(text)
    }

    /// What is left at the end: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// How many bytes at the end of `bytes` are the valid beginning of a character that more bytes may complete.
fn incomplete_tail(bytes: &[u8]) -> usize {
    (1..=bytes.len().min(3))
        .find(|length| {
            let tail = &bytes[bytes.len() - length..];
            tail[0] >= 0xC0 && std::str::from_utf8(tail).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
        })
        .unwrap_or(0)
}

/// The place at or after `least` where `text` may be cut: after a newline that a non-blank character follows.
pub(super) fn line_cut(text: &str, least: usize) -> Option<usize> {
    (least.max(1)..text.len()).find(|at| is_line_start(text, *at))
}

fn is_line_start(text: &str, at: usize) -> bool {
    text.as_bytes()[at - 1] == b'\n' && text[at..].chars().next().is_some_and(|next| !next.is_whitespace())
}

/// Appends the ids of `text`: the steps of the library's own encode, without its added tokens, offsets and masks.
fn encode_any(bpe: &tokenizers::Tokenizer, text: &str, ids: &mut Vec<u32>) {
    if text.is_empty() {
        return;
    }
    let mut pieces = PreTokenizedString::from(text);
    if let Some(normalizer) = bpe.get_normalizer() {
        pieces.normalize(|piece| normalizer.normalize(piece)).expect("NFC accepts every string");
    }
    if let Some(splitter) = bpe.get_pre_tokenizer() {
        splitter.pre_tokenize(&mut pieces).expect("loading has tried the regex; it accepts every string");
    }
    pieces.tokenize(|piece| bpe.get_model().tokenize(piece.get())).expect(COVERED);
    let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::None);
    ids.extend(splits.iter().flat_map(|(_, _, tokens)| tokens.iter().flatten().map(|token| token.id)));
}

/// Appends the ids of `text` under Qwen2's regex; its characters are known, so NFC leaves them alone. A word seen before is copied.
fn encode_known(bpe: &tokenizers::Tokenizer, text: &str, ids: &mut Vec<u32>) {
    let mut seen: HashMap<&str, Range<usize>> = HashMap::new();
    let mut word = String::new();
    for piece in known_pieces(text) {
        if let Some(range) = seen.get(piece) {
            ids.extend_from_within(range.clone());
            continue;
        }
        word.clear();
        word.extend(piece.bytes().map(byte_to_char));
        let start = ids.len();
        ids.extend(bpe.get_model().tokenize(&word).expect(COVERED).iter().map(|token| token.id));
        seen.insert(piece, start..ids.len());
    }
}

const COVERED: &str = "loading has seen all 256 byte tokens, so BPE covers every text";

/// `run(0)` to `run(count - 1)` on all threads, results in order.
pub(super) fn in_parallel<T: Send>(count: usize, run: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let results: Vec<Mutex<Option<T>>> = (0..count).map(|_| Mutex::new(None)).collect();
    threads::parallel(count, |index| {
        *results[index].lock().expect("no panic happens under this lock") = Some(run(index));
    });
    let take = |cell: Mutex<Option<T>>| cell.into_inner().ok().flatten().expect("every task ran");
    results.into_iter().map(take).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_ids_and_control_tokens_follow_only_when_recognised() {
        let tokenizer = Tokenizer::bytes_with_chat();
        assert_eq!(tokenizer.vocab_size(), 259);
        assert_eq!(tokenizer.encode("aé", Specials::Plain), [97, 0xC3, 0xA9]);
        let text = "x<|im_end|><|im_en<|endoftext|>";
        assert_eq!(tokenizer.encode(text, Specials::Plain), text.bytes().map(u32::from).collect::<Vec<_>>());
        let ids = tokenizer.encode(text, Specials::Recognise);
        assert_eq!((ids[0], ids[1], ids[ids.len() - 1], ids.len()), (120, 258, 256, 10));
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "x<|im_en");
        assert!(tokenizer.encode("", Specials::Recognise).is_empty());
        assert!(Tokenizer::bytes(&["a", "a"]).is_err() && Tokenizer::bytes(&[""]).is_err());
    }

    #[test]
    fn overlapping_added_tokens_take_the_leftmost_longest() {
        let tokenizer = Tokenizer::bytes(&["<a", "<a>", "a><"]).unwrap();
        assert_eq!(tokenizer.split_added("<a><a<"), [Piece::Added(257), Piece::Added(256), Piece::Text("<")]);
    }

    #[test]
    fn decoding_an_id_without_text_is_an_error_that_names_it() {
        let error = Tokenizer::bytes_with_chat().decode(&[97, 300], false).unwrap_err().to_string();
        assert!(error.contains("below 259") && error.contains("300"), "{error}");
    }

    #[test]
    fn streaming_gives_whole_characters_and_joins_to_the_same_text() {
        let tokenizer = Tokenizer::bytes_with_chat();
        let mut cases: Vec<Vec<u32>> = ["", "a😀b é中!", "👨‍👩‍👧"].iter().map(|text| tokenizer.encode(text, Specials::Plain)).collect();
        // Broken UTF-8: a lone continuation, a lead without its rest, an overlong form, a surrogate, a cut at the end.
        cases.extend([vec![0x80, 97], vec![0xE4, 97, 0xC0, 0x80], vec![0xED, 0xA0, 0x80, 98], vec![97, 0xF0, 0x9F, 0x98]]);
        for ids in cases {
            let mut decoder = StreamDecoder::new(false);
            let mut text = String::new();
            for id in &ids {
                text += &decoder.push(&tokenizer, *id).unwrap();
            }
            text += &decoder.finish();
            assert_eq!(text, tokenizer.decode(&ids, false).unwrap(), "{ids:?}");
        }
        let mut decoder = StreamDecoder::new(true);
        let pieces: Vec<_> = [0xE4, 0xBD, 0xA0, 258].iter().map(|id| decoder.push(&tokenizer, *id).unwrap()).collect();
        assert_eq!(pieces, ["", "", "你", ""]);
    }
}
