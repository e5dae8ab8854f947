//! A data set: files, split, shuffled, mixed, tokenised and packed into batches, with a cursor between any two batches.
//! Knows no model and no tensor. Every batch is a function of the files, the settings and the cursor, so a restored run
//! continues with the same batches, bit for bit.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use super::batch_stream::{BatchStream, Plan, text_of};
use super::chat_template::ChatTemplate;
use super::content_hash::ContentHash;
use super::cursor::{CURSOR_VERSION, Cursor, FileFingerprint, Fingerprint, SourceFingerprint};
use super::document_index::{Format, Part, Split};
use super::jsonl::Record;
use super::mix::Mix;
use super::pack::{Packing, Row, TokenBatch};
use super::source::{MESSAGES_FIELD, OnError, Source, SourcePlan};
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
        Self::of(SourcePlan::new(paths.into_iter().map(Into::into).collect(), Format::Text(Delimiter::Whole)))
    }

    /// JSON-lines files. The field `text` is read until [`Dataset::field`] or [`Dataset::chat`] says otherwise.
    pub fn jsonl(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self::of(SourcePlan::new(paths.into_iter().map(Into::into).collect(), Format::Jsonl))
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
    /// Errors: [`Error::Argument`] for no parts, or weights that are negative, not finite or all zero.
    pub fn mix(parts: Vec<(Dataset, f64)>, seed: u64) -> Result<Self> {
        let weights: Vec<f64> = parts.iter().map(|(_, weight)| *weight).collect();
        Mix::new(&weights, seed)?;
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
            if let Format::Text(old) = &mut source.format {
                *old = delimiter;
            }
        })
    }

    /// The field whose string is the document's text. An empty name takes records as they are, without a check.
    pub fn field(self, name: &str) -> Self {
        self.with_sources(|source| source.field = name.to_string())
    }

    /// Documents are conversations: the field `messages` (and `tools`, if there) goes through `template`, and only what the
    /// assistant says is learned.
    pub fn chat(self, template: Arc<ChatTemplate>) -> Self {
        self.field(MESSAGES_FIELD).with(|plan| plan.chat = Some(template))
    }

    /// Keeps one part: of a text file that is one document its first or last bytes, else documents drawn by number.
    /// `fraction` is the validation part's share.
    pub fn split(self, part: Part, fraction: f64) -> Self {
        self.with_sources(|source| source.split = Some(Split { part, fraction }))
    }

    /// Documents come in an order drawn from `seed`, another one each epoch; windows start at random places.
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
        Ok(self.running()?.sources.iter().map(|source| source.index().count()).sum())
    }

    /// Bad documents left out so far.
    pub fn skipped(&self) -> u64 {
        self.running.as_ref().map_or(0, |running| running.taken.sources.iter().map(|source| source.skipped).sum())
    }

    /// Up to `count` records as they are in the files, fewer at the end.
    ///
    /// Errors: [`Error::Io`]; [`Error::Format`] for a bad document; [`Error::Argument`] for settings that cannot be meant.
    pub fn take_rows(&mut self, count: usize) -> Result<Vec<Record>> {
        let running = self.running()?;
        running.rewind_to_taken();
        let mut rows = Vec::new();
        while rows.len() < count {
            let Some((_, _, record)) = running.record()? else { break };
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
        let mut taken: Vec<Row> = Vec::new();
        while taken.len() < rows {
            let Some(row) = running.row(plan)? else { break };
            taken.push(row);
        }
        if taken.is_empty() {
            return Ok(None);
        }
        running.batches += 1;
        Ok(Some(TokenBatch::from_rows(&taken)))
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
        self.running = None;
        self.running()?;
        let (plan, running) = (&self.plan, self.running.as_mut().expect("just made"));
        running.go_to(plan, &cursor.stream, &cursor.packer)?;
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
            format: source.plan.format,
            field: source.plan.field.clone(),
            split: source.plan.split,
            shuffle: source.plan.shuffle,
            documents: source.index().count(),
            files: source
                .index()
                .files()
                .iter()
                .map(|file| FileFingerprint {
                    name: file.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
                    bytes: file.bytes,
                    hash: file.hash.clone(),
                })
                .collect(),
        });
        Ok(Fingerprint {
            sources: sources.collect(),
            mix_seed: plan.mix_seed,
            tokenizer: plan.tokenizer.as_ref().map(|tokenizer| format!("{:016x}", tokenizer.fingerprint())),
            chat_template: plan.chat.as_ref().map(|template| ContentHash::of(template.source().as_bytes())),
            recognise_specials: plan.specials == Specials::Recognise,
            end_of_document: plan.end_of_document,
            packing: plan.packing,
        })
    }
}
