//! A data set: files, split, shuffled, mixed, tokenised and packed into batches, with a cursor between any two batches.
//! Knows no model and no tensor. Every batch is a function of the files, the settings and the cursor, so a restored run
//! continues with the same batches, bit for bit.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;

use super::chat_template::{ChatTemplate, Rendering};
use super::content_hash::ContentHash;
use super::cursor::{CURSOR_VERSION, Cursor, FileFingerprint, Fingerprint, PackerPosition, SourceFingerprint, StreamPosition};
use super::document_index::{Format, Part, Split};
use super::jsonl::Record;
use super::mix::Mix;
use super::pack::{BestFitPacker, ConcatPacker, Document, Packing, Row, TokenBatch, window};
use super::source::{MESSAGES_FIELD, OnError, Source, SourcePlan};
use super::text::Delimiter;
use super::tokenizer::{Specials, Tokenizer, in_parallel};
use crate::error::{Error, Result};
use crate::kernels::random::Stream;

/// Documents tokenised together, on all threads.
const FETCH_DOCUMENTS: usize = 256;
/// Or fewer, when they hold this much text.
const FETCH_BYTES: usize = 1 << 20;

/// Settings, and the reading that begins at the first record or batch asked for.
#[derive(Debug)]
pub struct Dataset {
    plan: Plan,
    running: Option<Running>,
}

#[derive(Debug, Clone)]
struct Plan {
    sources: Vec<SourcePlan>,
    weights: Vec<f64>,
    mix_seed: u64,
    tokenizer: Option<Arc<Tokenizer>>,
    chat: Option<Arc<ChatTemplate>>,
    specials: Specials,
    end_of_document: bool,
    packing: Option<Packing>,
}

#[derive(Debug)]
struct Running {
    sources: Vec<Source>,
    mix: Mix,
    draws: u64,
    /// Tokenised ahead, each with the stream's position behind it.
    ahead: VecDeque<(Document, StreamPosition)>,
    /// The stream's position behind the last document that the packer took.
    taken: StreamPosition,
    packer: Packer,
    batches: u64,
}

#[derive(Debug)]
enum Packer {
    None,
    Concat(ConcatPacker),
    BestFit {
        packer: BestFitPacker,
        pool_start: StreamPosition,
        rows: u64,
    },
    /// The tokens are read at the first batch.
    Windows {
        tokens: Option<Vec<u32>>,
        rows: u64,
    },
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
            let Some((_, record)) = running.record()? else { break };
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
                    Ok(Some(record)) => return Some(Ok(text_of(&record, &source.plan.field))),
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
        let mut stream = running.taken.clone();
        let packer = match &running.packer {
            Packer::None => PackerPosition::None,
            Packer::Concat(packer) => {
                let carry = packer.carry();
                PackerPosition::Concat { tokens: carry.tokens, supervised: carry.supervised }
            }
            Packer::BestFit { packer, .. } if packer.at_pool_start() => PackerPosition::BestFit { pools: packer.pools(), rows: 0 },
            Packer::BestFit { packer, pool_start, rows } => {
                stream = pool_start.clone();
                PackerPosition::BestFit { pools: packer.pools() - 1, rows: *rows }
            }
            Packer::Windows { rows, .. } => PackerPosition::Windows { rows: *rows },
        };
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
        let damaged = |place: &str, expected: String, got: String| Err(Error::argument("data.restore", place, expected, got));
        let (sources, stored) = (running.sources.len(), &cursor.stream.sources);
        if stored.len() != sources {
            return damaged("stream.sources", format!("{sources} positions"), stored.len().to_string());
        }
        for (source, position) in running.sources.iter().zip(stored) {
            if position.record > source.index().count() {
                return damaged("record", format!("at most {}", source.index().count()), position.record.to_string());
            }
        }
        running.seek(&cursor.stream);
        match (&mut running.packer, &cursor.packer) {
            (Packer::None, PackerPosition::None) => {}
            (Packer::Concat(packer), PackerPosition::Concat { tokens, supervised }) => {
                if let Some(mask) = supervised.as_ref().filter(|mask| mask.len() != tokens.len()) {
                    return damaged("packer.supervised", format!("{} flags", tokens.len()), mask.len().to_string());
                }
                let carry = Document { tokens: tokens.clone(), supervised: supervised.clone() };
                *packer = ConcatPacker::new(plan.packing.map_or(1, |packing| packing.seq_len()), carry);
            }
            (Packer::BestFit { packer, .. }, PackerPosition::BestFit { pools, rows }) => {
                if let Some(Packing::BestFit { seq_len, pool }) = plan.packing {
                    *packer = BestFitPacker::new(seq_len, pool, *pools);
                }
                for row in 0..*rows {
                    if running.row(plan)?.is_none() {
                        return damaged("packer.rows", format!("at most {row}"), rows.to_string());
                    }
                }
            }
            (Packer::Windows { rows, .. }, PackerPosition::Windows { rows: stored }) => *rows = *stored,
            (_, stored) => return damaged("packer", format!("a position of {:?}", plan.packing), format!("{stored:?}")),
        }
        running.batches = cursor.batches;
        Ok(())
    }

    fn running(&mut self) -> Result<&mut Running> {
        if self.running.is_none() {
            self.running = Some(Running::open(&self.plan)?);
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

fn text_of(record: &Record, field: &str) -> String {
    record.get(field).and_then(|text| text.as_str()).unwrap_or_default().to_string()
}

impl Plan {
    fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || Error::argument("data.take", "tokenizer", "set, which batches need", "none");
        self.tokenizer.as_deref().ok_or_else(missing)
    }

    /// The tokens of a record of source `which`.
    fn document(&self, which: usize, record: &Record) -> Result<Document> {
        let tokenizer = self.tokenizer()?;
        if let Some(template) = &self.chat {
            let array = |field: &str| record.get(field).and_then(|value| value.as_array()).cloned().unwrap_or_default();
            let rendering = Rendering { tools: array("tools"), ..Rendering::default() };
            let chat = template.tokens(tokenizer, &array(MESSAGES_FIELD), &rendering, self.specials)?;
            return Ok(Document { tokens: chat.ids, supervised: Some(chat.supervised) });
        }
        let mut tokens = tokenizer.encode(&text_of(record, &self.sources[which].field), self.specials);
        tokens.extend(tokenizer.end_of_text().filter(|_| self.end_of_document));
        Ok(Document::all(tokens))
    }
}

impl Running {
    fn open(plan: &Plan) -> Result<Self> {
        if let Some(packing) = &plan.packing {
            packing.check()?;
        }
        for source in &plan.sources {
            if source.epochs == Some(0) {
                return Err(Error::argument("data.epochs", "count", "at least 1, or forever", 0));
            }
        }
        let mix = Mix::new(&plan.weights, plan.mix_seed)?;
        let sources = plan.sources.iter().map(|source| Source::open(source.clone())).collect::<Result<Vec<_>>>()?;
        let packer = match plan.packing {
            None => Packer::None,
            Some(Packing::Concat { seq_len }) => Packer::Concat(ConcatPacker::new(seq_len, Document::default())),
            Some(Packing::BestFit { seq_len, pool }) => {
                Packer::BestFit { packer: BestFitPacker::new(seq_len, pool, 0), pool_start: StreamPosition::default(), rows: 0 }
            }
            Some(Packing::Windows { .. }) if sources.len() > 1 => {
                let got = format!("a mixture of {}", sources.len());
                return Err(Error::argument("data.pack", "windows", "one source: windows cut one long text", got));
            }
            Some(Packing::Windows { .. }) => Packer::Windows { tokens: None, rows: 0 },
        };
        let mut running = Self { sources, mix, draws: 0, ahead: VecDeque::new(), taken: StreamPosition::default(), packer, batches: 0 };
        running.taken = running.stream();
        Ok(running)
    }

    fn stream(&self) -> StreamPosition {
        StreamPosition { draws: self.draws, sources: self.sources.iter().map(Source::position).collect() }
    }

    fn seek(&mut self, position: &StreamPosition) {
        self.ahead.clear();
        self.draws = position.draws;
        self.sources.iter_mut().zip(&position.sources).for_each(|(source, position)| source.seek(*position));
        self.taken = position.clone();
    }

    /// Forgets what was fetched ahead.
    fn rewind_to_taken(&mut self) {
        if !self.ahead.is_empty() {
            self.seek(&self.taken.clone());
        }
    }

    /// The next record of the mixture, and its source.
    fn record(&mut self) -> Result<Option<(usize, Record)>> {
        loop {
            let alive: Vec<bool> = self.sources.iter().map(Source::is_alive).collect();
            let Some(which) = self.mix.source(self.draws, &alive) else { return Ok(None) };
            self.draws += 1;
            // A source whose last documents are all bad ends without a record; another draw follows.
            if let Some(record) = self.sources[which].next()? {
                return Ok(Some((which, record)));
            }
        }
    }

    /// The next document's tokens. Many are tokenised at once, on all threads.
    fn document(&mut self, plan: &Plan) -> Result<Option<Document>> {
        if self.ahead.is_empty() {
            plan.tokenizer()?;
            let (mut records, mut positions, mut bytes) = (Vec::new(), Vec::new(), 0);
            while records.len() < FETCH_DOCUMENTS && bytes < FETCH_BYTES {
                let Some((which, record)) = self.record()? else { break };
                bytes += text_of(&record, &plan.sources[which].field).len();
                records.push((which, record));
                positions.push(self.stream());
            }
            let documents = in_parallel(records.len(), |index| plan.document(records[index].0, &records[index].1));
            for (document, position) in documents.into_iter().zip(positions) {
                self.ahead.push_back((document?, position));
            }
        }
        Ok(self.ahead.pop_front().map(|(document, position)| {
            self.taken = position;
            document
        }))
    }

    fn row(&mut self, plan: &Plan) -> Result<Option<Row>> {
        // The packer is lent out for the call, since it asks this same stream for documents.
        let mut packer = std::mem::replace(&mut self.packer, Packer::None);
        let row = match &mut packer {
            Packer::None => Ok(None),
            Packer::Concat(packer) => packer.row(|| self.document(plan)),
            Packer::BestFit { packer, pool_start, rows } => {
                if packer.at_pool_start() {
                    (*pool_start, *rows) = (self.taken.clone(), 0);
                }
                *rows += 1;
                packer.row(|| self.document(plan))
            }
            Packer::Windows { tokens, rows } => self.window(plan, tokens, rows),
        };
        self.packer = packer;
        row
    }

    fn window(&mut self, plan: &Plan, tokens: &mut Option<Vec<u32>>, rows: &mut u64) -> Result<Option<Row>> {
        let seq_len = plan.packing.map_or(1, |packing| packing.seq_len());
        let source = &self.sources[0].plan;
        let (shuffle, epochs) = (source.shuffle, source.epochs);
        if tokens.is_none() {
            let mut reader = Source::open(SourcePlan { shuffle: None, epochs: Some(1), ..source.clone() })?;
            let one_text = reader.index().count() == 1;
            let mut all = Vec::new();
            while let Some(record) = reader.next()? {
                let mut document = plan.document(0, &record)?;
                // A single text has no neighbour to be told apart from.
                if one_text && plan.chat.is_none() && plan.end_of_document && plan.tokenizer()?.end_of_text().is_some() {
                    document.tokens.pop();
                }
                all.append(&mut document.tokens);
            }
            if all.len() < 2 {
                let got = format!("{} tokens", all.len());
                return Err(Error::argument("data.pack", "windows", "a text of at least 2 tokens", got));
            }
            *tokens = Some(all);
        }
        let tokens = tokens.as_deref().expect("just read");
        let targets = tokens.len() - 1;
        let rows_in_epoch = targets.div_ceil(seq_len) as u64;
        if epochs.is_some_and(|epochs| *rows / rows_in_epoch >= epochs) {
            return Ok(None);
        }
        let start = match shuffle {
            // As many places as there are whole windows; a text shorter than one has a single place.
            Some(seed) => Stream::new(seed, "windows").below(*rows, (targets - seq_len.min(targets) + 1) as u64) as usize,
            None => (*rows % rows_in_epoch) as usize * seq_len,
        };
        *rows += 1;
        Ok(Some(window(tokens, start, seq_len)))
    }
}
