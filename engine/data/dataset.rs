//! A data set: files, split, shuffled, mixed, tokenised and packed into batches, with a cursor between any two batches.
//! Knows no model and no tensor. Every batch is a function of the files, the settings and the cursor, so a restored run
//! continues with the same batches, bit for bit.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use super::batch_stream::{BatchStream, Plan, text_of};
use super::chat_template::ChatTemplate;
use super::content_hash::ContentHash;
use super::conversation::{Chat, Form, Rules};
use super::cursor::{CURSOR_VERSION, Cursor, Fingerprint, SourceFingerprint};
use super::document_index::{Format, Part, Split};
use super::jsonl::Record;
use super::mix::Mix;
use super::pack::{Packing, Piece, Row, TokenBatch};
use super::records::{MemoryRecords, Origin};
use super::source::{OnError, Source, SourcePlan, Tally};
use super::text::Delimiter;
use super::tokenizer::{Specials, Tokenizer};
use crate::error::{Error, Result};

/// Settings, and the reading that begins at the first record or batch asked for.
#[derive(Debug)]
pub struct Dataset {
    plan: Plan,
    running: Option<BatchStream>,
}

impl Dataset {
    /// Text files. Each is one document until [`Dataset::delimiter`] says otherwise.
    pub fn text(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self::of(SourcePlan::new(paths.into_iter().map(Into::into).collect(), Origin::Files(Format::Text(Delimiter::Whole))))
    }

    /// JSON-lines files. The field `text` is read until [`Dataset::field`] or [`Dataset::chat`] says otherwise.
    pub fn jsonl(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self::of(SourcePlan::new(paths.into_iter().map(Into::into).collect(), Origin::Files(Format::Jsonl)))
    }

    /// Parquet files. The column `text` is read until [`Dataset::field`] or [`Dataset::chat`] says otherwise.
    pub fn parquet(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self::of(SourcePlan::new(paths.into_iter().map(Into::into).collect(), Origin::Parquet))
    }

    /// Records in memory.
    pub fn records(records: Vec<Record>) -> Self {
        Self::of(SourcePlan { memory: Some(Arc::new(MemoryRecords::new(records))), ..SourcePlan::new(Vec::new(), Origin::Memory) })
    }

    fn of(source: SourcePlan) -> Self {
        let plan = Plan {
            sources: vec![source],
            weights: vec![1.0],
            mix_seed: 0,
            tokenizer: None,
            chat: None,
            specials: Specials::Plain,
            end_of_document: true,
            packing: None,
        };
        Self { plan, running: None }
    }

    /// Draws each record from one of `parts` with a probability in proportion to its weight; a part that has ended is left
    /// out. Each part keeps its own field, split, order and epochs; tokenizer and packing are set on the mixture.
    ///
    /// Errors: [`Error::Argument`] for no parts, weights that are negative, not finite or all zero, or parts that become
    /// batches in different ways.
    pub fn mix(parts: Vec<(Dataset, f64)>, seed: u64) -> Result<Self> {
        let weights: Vec<f64> = parts.iter().map(|(_, weight)| *weight).collect();
        Mix::new(&weights, seed)?;
        // The mixture has one way for all; that of another part would be dropped without a word.
        if let Some(other) = parts.iter().find(|(part, _)| part.way() != parts[0].0.way()) {
            let expected = "parts with the same tokenizer, chat, pairs, prompts and packing, or without: set them on the mixture";
            return Err(Error::argument("data.mix", "parts", expected, format!("{} and {}", parts[0].0.way(), other.0.way())));
        }
        let mut whole: Option<Plan> = None;
        for (part, weight) in parts {
            let sum: f64 = part.plan.weights.iter().sum();
            let scaled = part.plan.weights.iter().map(|inner| weight * inner / sum);
            match &mut whole {
                None => whole = Some(Plan { weights: scaled.collect(), mix_seed: seed, ..part.plan }),
                Some(whole) => {
                    whole.weights.extend(scaled);
                    whole.sources.extend(part.plan.sources);
                }
            }
        }
        let plan = whole.expect("`Mix::new` refuses an empty list");
        Ok(Self { plan, running: None })
    }

    /// What it reads and how, in words that are equal when it is. Knows nothing of the files' content, and leaves epochs out.
    pub fn definition(&self) -> String {
        let plan = &self.plan;
        let sources: Vec<String> = plan
            .sources
            .iter()
            .zip(&plan.weights)
            .map(|(source, weight)| {
                let mut paths: Vec<String> = source.paths.iter().map(|path| path.display().to_string()).collect();
                paths.extend(source.memory.as_ref().map(|memory| format!("records {}", memory.hash())));
                let shuffle = source.shuffle.map_or_else(|| "in order".to_string(), |seed| format!("shuffled with {seed}"));
                format!(
                    "{} of {} ({:?}, field {}, {:?}, {shuffle}, {:?})",
                    weight,
                    paths.join(" "),
                    source.origin,
                    source.field,
                    source.split,
                    source.on_error
                )
            })
            .collect();
        format!("{}; mixed with {}; {}", sources.join(" + "), plan.mix_seed, self.way())
    }

    /// How records become batches, in words that are equal when it is.
    fn way(&self) -> String {
        let plan = &self.plan;
        let tokenizer = plan.tokenizer.as_ref().map_or_else(|| "none".into(), |tokenizer| format!("{:016x}", tokenizer.fingerprint()));
        let chat = plan.chat.as_ref().map_or_else(String::new, |Chat { template, rules }| {
            format!(", chat {} by {rules:?}", ContentHash::of(template.source().as_bytes()))
        });
        format!("tokenizer {tokenizer}{chat}; packing {:?}", plan.packing)
    }

    /// The same settings, from the beginning.
    pub fn fresh(&self) -> Self {
        Self { plan: self.plan.clone(), running: None }
    }

    fn with(self, change: impl FnOnce(&mut Plan)) -> Self {
        let mut plan = self.plan;
        change(&mut plan);
        Self { plan, running: None }
    }

    fn with_sources(self, change: impl Fn(&mut SourcePlan)) -> Self {
        self.with(|plan| plan.sources.iter_mut().for_each(change))
    }

    /// What ends a document of a text file.
    pub fn delimiter(self, delimiter: Delimiter) -> Self {
        self.with_sources(|source| {
            if let Origin::Files(Format::Text(old)) = &mut source.origin {
                *old = delimiter;
            }
        })
    }

    /// The field whose string is the document's text, for batches and [`Dataset::texts`].
    pub fn field(self, name: &str) -> Self {
        self.with_sources(|source| source.field = name.to_string())
    }

    /// Records are conversations, pairs or prompts, as `rules` say, and go through `template`; only what the assistant says
    /// is learned. Pairs come in rows of two documents and need no packing.
    pub fn chat(self, template: Arc<ChatTemplate>, rules: Rules) -> Self {
        self.field("").with(|plan| {
            plan.chat = Some(Chat { template, rules });
            if rules.form == Form::Pairs {
                plan.packing = Some(Packing::Whole);
            }
        })
    }

    /// Keeps one part: of a text file that is one document its first or last bytes, else documents drawn by number.
    /// `fraction` is the validation part's share.
    pub fn split(self, part: Part, fraction: f64) -> Self {
        self.with_sources(|source| source.split = Some(Split { part, fraction }))
    }

    /// Whether it is a part, or mixed from one: a part of a part would not be one of the same data.
    pub fn is_split(&self) -> bool {
        self.plan.sources.iter().any(|source| source.split.is_some())
    }

    /// Documents and windows come in an order drawn from `seed`, another one each epoch; windows are cut elsewhere each epoch.
    pub fn shuffle(self, seed: u64) -> Self {
        self.with_sources(|source| source.shuffle = Some(seed))
    }

    /// Reads everything `count` times. The default is once.
    pub fn epochs(self, count: u64) -> Self {
        self.with_sources(|source| source.epochs = Some(count))
    }

    /// Reads everything again and again.
    pub fn forever(self) -> Self {
        self.with_sources(|source| source.epochs = None)
    }

    /// What to do about bad documents. The default is to fail.
    pub fn on_error(self, on_error: OnError) -> Self {
        self.with_sources(|source| source.on_error = on_error)
    }

    pub fn tokenizer(self, tokenizer: Arc<Tokenizer>) -> Self {
        self.with(|plan| plan.tokenizer = Some(tokenizer))
    }

    /// Whether control tokens written in the text are recognised. The default is not to.
    pub fn specials(self, specials: Specials) -> Self {
        self.with(|plan| plan.specials = specials)
    }

    /// Whether `<|endoftext|>` follows each document (the default) where the tokenizer has it. Conversations never get it.
    pub fn end_of_document(self, on: bool) -> Self {
        self.with(|plan| plan.end_of_document = on)
    }

    pub fn pack(self, packing: Packing) -> Self {
        self.with(|plan| plan.packing = Some(packing))
    }

    /// Documents in one epoch, bad ones included.
    ///
    /// Errors: as [`Dataset::take_rows`].
    pub fn documents(&mut self) -> Result<u64> {
        Ok(self.running()?.sources.iter().map(|source| source.count()).sum())
    }

    /// Documents read so far, in all epochs, bad ones included. A fraction where rows do not end with documents.
    ///
    /// Errors: as [`Dataset::take_rows`].
    pub fn documents_read(&mut self) -> Result<f64> {
        self.running()?;
        Ok(self.running.as_ref().expect("just made").documents_read(&self.plan))
    }

    /// What became of the records that were taken so far and not used whole.
    pub fn tally(&self) -> Tally {
        let mut sum = Tally::default();
        let taken = self.running.iter().flat_map(|running| &running.taken.sources);
        taken.for_each(|source| sum += source.tally);
        sum
    }

    /// Up to `count` records as they are in the files, fewer at the end. A text document is a record with the field `text`.
    ///
    /// Errors: [`Error::Io`]; [`Error::Format`] for a bad document; [`Error::Argument`] for settings that cannot be meant.
    pub fn take_rows(&mut self, count: usize) -> Result<Vec<Record>> {
        self.running()?;
        let (plan, running) = (&self.plan, self.running.as_mut().expect("just made"));
        running.rewind_to_taken();
        let mut rows = Vec::new();
        while rows.len() < count {
            let Some(record) = running.admitted_record(plan)? else { break };
            rows.push(record);
        }
        running.taken = running.stream();
        Ok(rows)
    }

    /// All documents once, in the order of the files, as texts: what a tokenizer is trained on.
    ///
    /// Errors: as [`Dataset::take_rows`], when opening and with each text.
    pub fn texts(&self) -> Result<impl Iterator<Item = Result<String>> + Send + use<>> {
        let open = |plan: &SourcePlan| Source::open(SourcePlan { shuffle: None, epochs: Some(1), ..plan.clone() });
        let mut sources = self.plan.sources.iter().map(open).collect::<Result<VecDeque<_>>>()?;
        Ok(std::iter::from_fn(move || {
            loop {
                let source = sources.front_mut()?;
                match source.next() {
                    Ok(Some((_, record))) => return Some(Ok(text_of(&record, &source.plan.field))),
                    Ok(None) => drop(sources.pop_front()),
                    Err(error) => return Some(Err(error)),
                }
            }
        }))
    }

    /// The next `rows` packed rows, fewer at the end; `None` after it.
    ///
    /// Errors: as [`Dataset::take_rows`]; [`Error::Argument`] without a tokenizer or a packing, and for zero rows.
    pub fn take_batch(&mut self, rows: usize) -> Result<Option<TokenBatch>> {
        if rows == 0 {
            return Err(Error::argument("data.take", "rows", "at least 1", 0));
        }
        self.running()?;
        let (plan, running) = (&self.plan, self.running.as_mut().expect("just made"));
        if plan.packing.is_none() {
            return Err(Error::argument("data.take", "packing", "set by pack, which batches need", "none"));
        }
        let seq_len = plan.packing.and_then(|packing| packing.seq_len()).unwrap_or(1);
        if rows.saturating_mul(seq_len) > i32::MAX as usize {
            let got = format!("{rows} of {seq_len} tokens");
            return Err(Error::argument("data.take", "rows", "few enough for 2^31 tokens in a batch", got));
        }
        let mut taken: Vec<Row> = Vec::new();
        while taken.len() < rows {
            let Some(row) = running.row(plan)? else { break };
            taken.push(row);
        }
        if taken.is_empty() {
            return Ok(None);
        }
        let tokens: usize = taken.iter().flatten().map(Piece::len).sum();
        if tokens > i32::MAX as usize {
            return Err(Error::argument(
                "data.take",
                "rows",
                "few enough for 2^31 tokens in a batch",
                format!("{rows} of {tokens} tokens"),
            ));
        }
        running.batches += 1;
        let pairs = plan.chat.as_ref().is_some_and(|chat| chat.rules.form == Form::Pairs);
        Ok(Some(if pairs { TokenBatch::from_pairs(&taken) } else { TokenBatch::from_rows(&taken) }))
    }

    /// The position behind the last batch or record.
    ///
    /// Errors: as [`Dataset::take_rows`]: the files are indexed if they were not.
    pub fn cursor(&mut self) -> Result<Cursor> {
        let fingerprint = self.fingerprint()?;
        let running = self.running()?;
        let (stream, packer) = running.position();
        Ok(Cursor { version: CURSOR_VERSION, fingerprint, batches: running.batches, stream, packer })
    }

    /// Goes on from `cursor`: the batches that follow are those that would have followed when it was stored.
    ///
    /// Errors: [`Error::Argument`] that names what differs when files, settings or tokenizer are not those of the cursor, and
    /// for a damaged cursor.
    pub fn restore(&mut self, cursor: &Cursor) -> Result<()> {
        cursor.check(&self.fingerprint()?)?;
        let (plan, running) = (&self.plan, self.running.as_mut().expect("the fingerprint needed it"));
        if let Err(error) = running.go_to(plan, &cursor.stream, &cursor.packer) {
            self.running = None; // Half a position is none.
            return Err(error);
        }
        running.batches = cursor.batches;
        Ok(())
    }

    fn running(&mut self) -> Result<&mut BatchStream> {
        if self.running.is_none() {
            self.running = Some(BatchStream::open(&self.plan)?);
        }
        Ok(self.running.as_mut().expect("just made"))
    }

    fn fingerprint(&mut self) -> Result<Fingerprint> {
        self.running()?;
        let (plan, running) = (&self.plan, self.running.as_ref().expect("just made"));
        let sources = running.sources.iter().zip(&plan.weights).map(|(source, weight)| SourceFingerprint {
            weight: *weight,
            format: source.plan.origin,
            field: source.plan.field.clone(),
            split: source.plan.split,
            shuffle: source.plan.shuffle,
            documents: source.count(),
            files: source.records().fingerprints(),
        });
        Ok(Fingerprint {
            sources: sources.collect(),
            mix_seed: plan.mix_seed,
            tokenizer: plan.tokenizer.as_ref().map(|tokenizer| format!("{:016x}", tokenizer.fingerprint())),
            chat_template: plan.chat.as_ref().map(|chat| ContentHash::of(chat.template.source().as_bytes())),
            chat_rules: plan.chat.as_ref().map(|chat| chat.rules),
            recognise_specials: plan.specials == Specials::Recognise,
            end_of_document: plan.end_of_document,
            packing: plan.packing,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::bpe_trainer::{BpeTraining, train_bpe};
    use super::*;

    fn bytes() -> Arc<Tokenizer> {
        Arc::new(Tokenizer::bytes_with_chat())
    }

    fn file(content: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    fn drain(mut data: Dataset, rows: usize) -> Vec<TokenBatch> {
        std::iter::from_fn(|| data.take_batch(rows).unwrap()).collect()
    }

    #[test]
    fn what_is_read_grows_with_every_batch_and_follows_from_the_cursor() {
        let lines: String = (0..60).map(|n| format!("{n:0width$}\n", width = 1 + n % 9)).collect();
        let (_folder, path) = file(&lines);
        let pooled = |pool| Packing::BestFit { seq_len: 16, pool };
        for packing in [Packing::Concat { seq_len: 16 }, pooled(1024), pooled(25), Packing::Windows { seq_len: 16 }, Packing::Whole] {
            let data = || Dataset::text([&path]).delimiter(Delimiter::Line).tokenizer(bytes()).pack(packing).shuffle(3).epochs(2);
            let (mut reading, mut before) = (data(), 0.0);
            while reading.take_batch(2).unwrap().is_some() {
                let read = reading.documents_read().unwrap();
                // Two rows hold a few documents, never a pool of them.
                assert!(before <= read && read - before < 25.0, "{packing:?}: {before}, then {read}");
                let mut restored = data();
                restored.restore(&reading.cursor().unwrap()).unwrap();
                assert_eq!(restored.documents_read().unwrap(), read, "{packing:?}");
                before = read;
            }
            assert_eq!(before, 120.0, "{packing:?}");
        }
    }

    #[test]
    fn a_text_becomes_windows_whose_labels_are_the_validation_text() {
        let text: String = (0..50).map(|n| format!("line {n} é\n")).collect();
        let (_folder, path) = file(&text);
        let part = |part| Dataset::text([&path]).split(part, 0.1).tokenizer(bytes()).pack(Packing::Windows { seq_len: 7 });
        let batches = drain(part(Part::Validation), 2);
        let tokens: Vec<u32> = batches.iter().flat_map(|batch| batch.tokens.iter().map(|token| *token as u32)).collect();
        let shown = bytes().decode(&tokens, false).unwrap();
        // All but the last byte are inputs, all but the first are targets, each once; no end token follows a single text.
        assert!(text.trim_end().ends_with(&shown) && shown.len() + 1 >= text.len() / 10);
        assert_eq!(batches.iter().map(TokenBatch::supervised).sum::<usize>(), tokens.len());
        let random = drain(part(Part::Train).shuffle(1).epochs(3), 4);
        let rows: usize = random.iter().map(TokenBatch::rows).sum();
        let train = text.len() - text.len() / 10 - 1;
        assert!(rows.abs_diff(3 * train.div_ceil(7)) <= 3, "{rows}");
        assert!(random.iter().flat_map(|batch| batch.row_starts.windows(2)).all(|row| row[1] - row[0] == 7));
    }

    #[test]
    fn shuffled_windows_have_every_token_once_an_epoch_but_near_the_ends() {
        // Each character stands for its place.
        let text: String = ('!'..='~').collect();
        let (_folder, path) = file(&text);
        let data = Dataset::text([&path]).tokenizer(bytes()).pack(Packing::Windows { seq_len: 7 }).shuffle(1).epochs(4);
        let starts: Vec<usize> = drain(data, 1).iter().map(|batch| batch.tokens[0] as usize - usize::from(b'!')).collect();
        let epochs: Vec<&[usize]> = starts.chunks(93usize.div_ceil(7)).collect();
        assert_eq!(epochs.len(), 4);
        for epoch in &epochs {
            let mut times = [0; 93];
            epoch.iter().for_each(|start| times[*start..start + 7].iter_mut().for_each(|times| *times += 1));
            let (never, again) = (times.iter().filter(|times| **times == 0).count(), times.iter().filter(|times| **times > 1).count());
            assert!(never < 7 && again < 14 && !epoch.is_sorted(), "{epoch:?}");
        }
        let sorted = |epoch: &[usize]| epoch.iter().copied().collect::<std::collections::BTreeSet<_>>();
        assert!(epochs.iter().any(|epoch| sorted(epoch) != sorted(epochs[0])), "always cut at the same places");
    }

    #[test]
    fn documents_are_separated_and_shuffled_and_both_parts_are_whole() {
        let lines: Vec<String> = (0..60).map(|n| format!("{n}")).collect();
        let (_folder, path) = file(&lines.join("\n"));
        let data = || Dataset::text([&path]).delimiter(Delimiter::Line).tokenizer(bytes()).pack(Packing::Concat { seq_len: 16 });
        let documents = |data: Dataset| -> Vec<String> {
            let tokens: Vec<u32> = drain(data, 3).iter().flat_map(|batch| batch.tokens.clone()).map(|token| token as u32).collect();
            let text = bytes().decode(&tokens, false).unwrap();
            text.split_terminator("<|endoftext|>").map(str::to_string).collect()
        };
        assert_eq!(documents(data()), lines);
        let shuffled = documents(data().shuffle(1));
        assert!(shuffled != lines && shuffled != documents(data().shuffle(2)));
        assert_eq!(shuffled, documents(data().shuffle(1)));
        let mut both = [documents(data().split(Part::Train, 0.3)), documents(data().split(Part::Validation, 0.3))].concat();
        both.sort_by_key(|text| text.parse::<u32>().unwrap());
        assert_eq!(both, lines);
    }

    #[test]
    fn a_mixture_follows_its_weights_until_each_part_ends() {
        let (_one, ones) = file(&"1\n".repeat(300));
        let (_two, twos) = file(&"2\n".repeat(900));
        let lines = |path| Dataset::text([path]).delimiter(Delimiter::Line);
        let mixed = || Dataset::mix(vec![(lines(&ones), 1.0), (lines(&twos), 3.0)], 5).unwrap();
        let rows = mixed().take_rows(10_000).unwrap();
        assert_eq!(rows.len(), 1_200);
        let ones_early = rows[..400].iter().filter(|row| row["text"] == "1").count();
        // 100 with a deviation of 8.7.
        assert!(ones_early.abs_diff(100) < 44, "{ones_early}");
        let nested = Dataset::mix(vec![(mixed(), 1.0), (lines(&ones), 0.0)], 5).unwrap().take_rows(10_000).unwrap();
        assert_eq!(nested.len(), 1_200);
        for weights in [[-1.0, 1.0], [f64::NAN, 1.0], [0.0, 0.0]] {
            assert!(Dataset::mix(vec![(lines(&ones), weights[0]), (lines(&twos), weights[1])], 0).is_err());
        }
        assert!(Dataset::mix(vec![], 0).is_err());
    }

    #[test]
    fn conversations_that_cannot_be_rendered_stop_with_their_line_or_are_counted() {
        let good = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
        let (_folder, path) =
            file(&[good, r#"{"messages": "x"}"#, r#"{"messages": [{"role": "wizard", "content": "a"}]}"#, good].join("\n"));
        let data = Dataset::jsonl([&path]).chat(Arc::new(ChatTemplate::default()), Rules::new(Form::Conversations)).tokenizer(bytes());
        let data = || data.fresh().pack(Packing::BestFit { seq_len: 1000, pool: 1 });
        let mut failing = data();
        let error = (0..4).find_map(|_| failing.take_batch(1).err()).unwrap().to_string();
        assert!(error.contains("line 2, messages: expected a list of messages, found a string"), "{error}");
        let mut skipping = data().on_error(OnError::Skip);
        let batch = skipping.take_batch(9).unwrap().unwrap();
        // "b" and the end of its turn, twice.
        assert_eq!((batch.rows(), batch.supervised()), (2, 4));
        assert!(skipping.take_batch(9).unwrap().is_none());
        assert_eq!(skipping.tally(), Tally { skipped: 2, ..Tally::default() });
        std::fs::write(&path, [good, r#"{"messages": [{"role": "wizard", "content": "a"}]}"#].join("\n")).unwrap();
        let error = data().take_batch(9).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("wizard"), "{error}");
    }

    #[test]
    fn settings_that_cannot_be_meant_are_errors() {
        let (_folder, path) = file("a\n");
        let check = |mut data: Dataset, rows, says: &str| {
            let error = data.take_batch(rows).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        let data = || Dataset::text([&path]).tokenizer(bytes()).pack(Packing::Concat { seq_len: 4 });
        check(data(), 0, "at least 1");
        check(data().pack(Packing::Concat { seq_len: 0 }), 1, "seq_len");
        check(data().epochs(0), 1, "forever");
        check(Dataset::text([&path]).tokenizer(bytes()), 1, "pack");
        check(Dataset::text([&path]).pack(Packing::Concat { seq_len: 4 }), 1, "tokenizer");
        check(data().split(Part::Validation, 2.0), 1, "fraction");
        check(data().split(Part::Validation, 0.0), 1, "got none in the validation part");
        check(Dataset::text(Vec::<PathBuf>::new()), 1, "paths");
        check(Dataset::mix(vec![(data(), 1.0), (data(), 1.0)], 0).unwrap().pack(Packing::Windows { seq_len: 4 }), 1, "one source");
        std::fs::write(&path, "").unwrap();
        check(data(), 1, "at least one document");
        std::fs::write(&path, "x").unwrap();
        check(data().pack(Packing::Windows { seq_len: 4 }), 1, "at least 2 tokens");
        check(data().field("body"), 1, "no field \"body\"");
    }

    #[test]
    fn a_tokenizer_is_trained_on_the_texts_of_a_data_set() {
        let (_folder, path) = file(&"{\"body\": \"the cat and the hat\"}\n".repeat(20));
        let data = Dataset::jsonl([&path]).field("body");
        let tokenizer = train_bpe(data.texts().unwrap(), &BpeTraining::new(280)).unwrap();
        let ids = tokenizer.encode("the cat", Specials::Plain);
        assert!(ids.len() < 7 && tokenizer.decode(&ids, false).unwrap() == "the cat");
    }
}
