//! A data set being read: records drawn from the sources, tokenised ahead on all threads, packed into rows.
//! Not the settings (`dataset.rs`) and not the stored position (`cursor.rs`).

use std::collections::VecDeque;
use std::sync::Arc;

use super::conversation::{Chat, Form, Made, documents, prompt_fits};
use super::cursor::{PackerPosition, StreamPosition};
use super::jsonl::Record;
use super::mix::Mix;
use super::pack::{BestFitPacker, ConcatPacker, Document, Packing, Row, whole_row, window};
use super::shuffle::Permutation;
use super::source::{OnError, Source, SourcePlan, Tally};
use super::tokenizer::{Specials, Tokenizer, in_parallel};
use crate::error::{Error, Result};
use crate::kernels::random::Stream;

/// Documents tokenised together, on all threads.
const FETCH_DOCUMENTS: usize = 256;
/// Or fewer, when they hold this much text.
const FETCH_BYTES: usize = 1 << 20;

/// The settings of a data set.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub sources: Vec<SourcePlan>,
    pub weights: Vec<f64>,
    pub mix_seed: u64,
    pub tokenizer: Option<Arc<Tokenizer>>,
    pub chat: Option<Chat>,
    pub specials: Specials,
    pub end_of_document: bool,
    pub packing: Option<Packing>,
}

/// The reading.
#[derive(Debug)]
pub(super) struct BatchStream {
    pub sources: Vec<Source>,
    mix: Mix,
    draws: u64,
    /// Tokenised ahead: the documents of each record, with the stream's position behind it.
    ahead: VecDeque<(Vec<Document>, StreamPosition)>,
    /// The stream's position behind the last document that the packer took.
    pub taken: StreamPosition,
    packer: Packer,
    pub batches: u64,
}

#[derive(Debug)]
pub(super) enum Packer {
    None,
    Concat {
        packer: ConcatPacker,
        /// The stream's position before the last document that the packer took.
        document_start: StreamPosition,
    },
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
    Whole,
}

pub(super) fn text_of(record: &Record, field: &str) -> String {
    record.get(field).and_then(|text| text.as_str()).unwrap_or_default().to_string()
}

impl Plan {
    fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || Error::argument("data.take", "tokenizer", "set, which batches need", "none");
        self.tokenizer.as_deref().ok_or_else(missing)
    }

    /// The documents of a record of source `which`.
    pub(super) fn documents(&self, which: usize, record: &Record) -> Result<Made> {
        let tokenizer = self.tokenizer()?;
        if let Some(Chat { template, rules }) = &self.chat {
            return documents(record, rules, template, tokenizer, self.specials);
        }
        let mut tokens = tokenizer.encode(&text_of(record, &self.sources[which].field), self.specials);
        tokens.extend(tokenizer.end_of_text().filter(|_| self.end_of_document));
        Ok(Made { documents: vec![Document::all(tokens)], cut: 0 })
    }

    /// Whether a record is given out as it is.
    fn admits(&self, record: &Record) -> Result<bool> {
        match &self.chat {
            Some(Chat { template, rules }) if rules.form == Form::Prompts => prompt_fits(record, rules, template, self.tokenizer()?),
            _ => Ok(true),
        }
    }

    fn check(&self) -> Result<()> {
        let form = self.chat.as_ref().map(|chat| chat.rules.form);
        match (form, self.packing) {
            (Some(Form::Pairs), Some(packing)) if packing != Packing::Whole => {
                let got = format!("{packing:?}");
                Err(Error::argument("data.pack", "how", "left out: a batch of pairs has two documents a pair", got))
            }
            (Some(Form::Prompts), Some(packing)) => {
                Err(Error::argument("data.pack", "how", "left out: prompts are records", format!("{packing:?}")))
            }
            (Some(_), Some(Packing::Windows { .. })) => {
                Err(Error::argument("data.pack", "how", "concat, best_fit or whole: conversations are no long text", "windows"))
            }
            (_, Some(packing)) => packing.check(),
            _ => Ok(()),
        }
    }
}

impl BatchStream {
    pub(super) fn open(plan: &Plan) -> Result<Self> {
        plan.check()?;
        for source in &plan.sources {
            if source.epochs == Some(0) {
                return Err(Error::argument("data.epochs", "count", "at least 1, or forever", 0));
            }
        }
        let mix = Mix::new(&plan.weights, plan.mix_seed)?;
        // Whoever takes records reads the fields that a script likes; only batches need the one field.
        let field = |source: &SourcePlan| if plan.packing.is_some() { source.field.clone() } else { String::new() };
        let open = |source: &SourcePlan| Source::open(SourcePlan { field: field(source), ..source.clone() });
        let sources = plan.sources.iter().map(open).collect::<Result<Vec<_>>>()?;
        let packer = match plan.packing {
            None => Packer::None,
            Some(Packing::Concat { seq_len }) => {
                Packer::Concat { packer: ConcatPacker::new(seq_len), document_start: StreamPosition::default() }
            }
            Some(Packing::BestFit { seq_len, pool }) => {
                Packer::BestFit { packer: BestFitPacker::new(seq_len, pool, 0), pool_start: StreamPosition::default(), rows: 0 }
            }
            Some(Packing::Windows { .. }) if sources.len() > 1 => {
                let got = format!("a mixture of {}", sources.len());
                return Err(Error::argument("data.pack", "windows", "one source: windows cut one long text", got));
            }
            Some(Packing::Windows { .. }) => Packer::Windows { tokens: None, rows: 0 },
            Some(Packing::Whole) => Packer::Whole,
        };
        let mut running = Self { sources, mix, draws: 0, ahead: VecDeque::new(), taken: StreamPosition::default(), packer, batches: 0 };
        running.taken = running.stream();
        Ok(running)
    }

    pub(super) fn stream(&self) -> StreamPosition {
        StreamPosition { draws: self.draws, sources: self.sources.iter().map(Source::position).collect() }
    }

    pub(super) fn seek(&mut self, position: &StreamPosition) {
        self.ahead.clear();
        self.draws = position.draws;
        self.sources.iter_mut().zip(&position.sources).for_each(|(source, position)| source.seek(*position));
        self.taken = position.clone();
    }

    /// What a cursor stores.
    pub(super) fn position(&self) -> (StreamPosition, PackerPosition) {
        let taken = || self.taken.clone();
        match &self.packer {
            Packer::None | Packer::Whole => (taken(), PackerPosition::None),
            Packer::Concat { packer, document_start } => match packer.used() {
                0 => (taken(), PackerPosition::Concat { used: 0 }),
                used => (document_start.clone(), PackerPosition::Concat { used }),
            },
            Packer::BestFit { packer, .. } if packer.at_pool_start() => {
                (taken(), PackerPosition::BestFit { pools: packer.pools(), rows: 0 })
            }
            Packer::BestFit { packer, pool_start, rows } => {
                (pool_start.clone(), PackerPosition::BestFit { pools: packer.pools() - 1, rows: *rows })
            }
            Packer::Windows { rows, .. } => (taken(), PackerPosition::Windows { rows: *rows }),
        }
    }

    /// Documents read so far, in all epochs. Of a pool that best-fit packing has read ahead those count that its rows have given
    /// out, by their share; of windows, the share of an epoch's rows. It depends on [`Self::position`] alone.
    pub(super) fn documents_read(&self, plan: &Plan) -> f64 {
        let read = |stream: &StreamPosition| -> f64 {
            let sources = self.sources.iter().zip(&stream.sources);
            sources.map(|(source, position)| (position.epoch * source.count() + position.record) as f64).sum()
        };
        match &self.packer {
            Packer::BestFit { packer, pool_start, rows } if !packer.at_pool_start() => {
                let before = read(pool_start);
                before + (read(&self.taken) - before) * *rows as f64 / (*rows + packer.ready() as u64) as f64
            }
            Packer::Windows { tokens: Some(tokens), rows } => {
                *rows as f64 / windows_in_epoch(tokens, seq_len(plan)) as f64 * self.sources[0].count() as f64
            }
            _ => read(&self.taken),
        }
    }

    /// Goes to a position that a cursor stored.
    ///
    /// Errors: [`Error::Argument`] for one that does not fit the sources and the packing, which are those of the cursor; those
    /// of reading.
    pub(super) fn go_to(&mut self, plan: &Plan, stream: &StreamPosition, packer: &PackerPosition) -> Result<()> {
        let damaged = |place: &str, expected: String, got: String| Err(Error::argument("data.restore", place, expected, got));
        if stream.sources.len() != self.sources.len() {
            return damaged("stream.sources", format!("{} positions", self.sources.len()), stream.sources.len().to_string());
        }
        for (source, position) in self.sources.iter().zip(&stream.sources) {
            if position.record >= source.count() {
                return damaged("record", format!("below {}", source.count()), position.record.to_string());
            }
        }
        self.seek(stream);
        match (&mut self.packer, packer) {
            (Packer::None | Packer::Whole, PackerPosition::None) => {}
            (Packer::Concat { packer, .. }, PackerPosition::Concat { used }) => {
                let seq_len = packer.seq_len;
                let document = if *used > 0 { self.document(plan)?.unwrap_or_default() } else { Document::default() };
                if *used > 0 && *used >= document.tokens.len() {
                    return damaged("packer.used", format!("below {}", document.tokens.len()), used.to_string());
                }
                self.packer = Packer::Concat { packer: ConcatPacker::within(seq_len, document, *used), document_start: stream.clone() };
            }
            (Packer::BestFit { packer, .. }, PackerPosition::BestFit { pools, rows }) => {
                *packer = packer.fresh(*pools);
                for row in 0..*rows {
                    // The pool is packed again; a row of the next one would mean that it had fewer rows.
                    let same_pool = row == 0 || matches!(&self.packer, Packer::BestFit { packer, .. } if !packer.at_pool_start());
                    if !same_pool || self.row(plan)?.is_none() {
                        return damaged("packer.rows", format!("at most {row}"), rows.to_string());
                    }
                }
            }
            (Packer::Windows { tokens, rows }, PackerPosition::Windows { rows: stored }) => {
                if *stored > 0 && tokens.is_none() {
                    *tokens = Some(tokens_of_windows(plan, &self.sources[0].plan)?);
                }
                *rows = *stored;
            }
            (_, stored) => return damaged("packer", format!("a position of {:?}", plan.packing), format!("{stored:?}")),
        }
        Ok(())
    }

    /// Forgets what was fetched ahead.
    pub(super) fn rewind_to_taken(&mut self) {
        if self.taken != self.stream() {
            self.seek(&self.taken.clone());
        }
    }

    /// The next record of the mixture, its source, and its number there.
    pub(super) fn record(&mut self) -> Result<Option<(usize, u64, Record)>> {
        loop {
            let alive: Vec<bool> = self.sources.iter().map(Source::is_alive).collect();
            let Some(which) = self.mix.source(self.draws, &alive) else { return Ok(None) };
            self.draws += 1;
            // A source whose last documents are all bad ends without a record; another draw follows.
            if let Some((number, record)) = self.sources[which].next()? {
                return Ok(Some((which, number, record)));
            }
        }
    }

    /// As [`Self::record`], without those that the settings leave out.
    ///
    /// Errors: as [`Self::record`], and about a record that is not what the settings say, if such are not skipped.
    pub(super) fn admitted_record(&mut self, plan: &Plan) -> Result<Option<Record>> {
        loop {
            let Some((which, number, record)) = self.record()? else { return Ok(None) };
            let tally = match plan.admits(&record) {
                Ok(true) => {
                    self.sources[which].gave(true)?;
                    return Ok(Some(record));
                }
                Ok(false) => Tally { long: 1, ..Tally::default() },
                Err(_) if plan.sources[which].on_error == OnError::Skip => Tally { skipped: 1, ..Tally::default() },
                Err(error) => {
                    self.rewind_to_taken();
                    return Err(self.sources[which].located(number, error)?);
                }
            };
            self.sources[which].count_in(tally);
            self.sources[which].gave(false)?;
        }
    }

    /// The documents of the next record; none in it if it is left out. Many are tokenised at once, on all threads.
    fn documents(&mut self, plan: &Plan) -> Result<Option<Vec<Document>>> {
        if self.ahead.is_empty() {
            self.fetch(plan)?;
        }
        Ok(self.ahead.pop_front().map(|(documents, position)| {
            self.taken = position;
            documents
        }))
    }

    fn fetch(&mut self, plan: &Plan) -> Result<()> {
        plan.tokenizer()?;
        let (mut records, mut positions, mut bytes) = (Vec::new(), Vec::new(), 0);
        while records.len() < FETCH_DOCUMENTS && bytes < FETCH_BYTES {
            let Some((which, number, record)) = self.record()? else { break };
            bytes += text_of(&record, &plan.sources[which].field).len();
            records.push((which, number, record));
            positions.push(self.stream());
        }
        let made = in_parallel(records.len(), |index| plan.documents(records[index].0, &records[index].2));
        let mut tallies = vec![Tally::default(); self.sources.len()];
        for ((made, mut position), (which, number, _)) in made.into_iter().zip(positions).zip(records) {
            let documents = match made {
                Ok(Made { documents, cut }) => {
                    tallies[which] += Tally { cut, long: u64::from(documents.is_empty()), ..Tally::default() };
                    documents
                }
                Err(_) if plan.sources[which].on_error == OnError::Skip => {
                    tallies[which] += Tally { skipped: 1, ..Tally::default() };
                    Vec::new()
                }
                Err(error) => {
                    self.rewind_to_taken();
                    return Err(self.sources[which].located(number, error)?);
                }
            };
            if let Err(error) = self.sources[which].gave(!documents.is_empty()) {
                self.rewind_to_taken();
                return Err(error);
            }
            position.sources.iter_mut().zip(&tallies).for_each(|(source, tally)| source.tally += *tally);
            self.ahead.push_back((documents, position));
        }
        self.sources.iter_mut().zip(tallies).for_each(|(source, tally)| source.count_in(tally));
        Ok(())
    }

    /// The next document; one without tokens, which packs to nothing, for a record that is left out.
    fn document(&mut self, plan: &Plan) -> Result<Option<Document>> {
        Ok(self.documents(plan)?.map(|mut documents| documents.pop().unwrap_or_default()))
    }

    pub(super) fn row(&mut self, plan: &Plan) -> Result<Option<Row>> {
        // The packer is lent out for the call, since it asks this same stream for documents.
        let mut packer = std::mem::replace(&mut self.packer, Packer::None);
        let row = match &mut packer {
            Packer::None => Ok(None),
            Packer::Concat { packer, document_start } => packer.row(|| {
                *document_start = self.taken.clone();
                self.document(plan)
            }),
            Packer::BestFit { packer, pool_start, rows } => {
                if packer.at_pool_start() {
                    (*pool_start, *rows) = (self.taken.clone(), 0);
                }
                *rows += 1;
                packer.row(|| self.document(plan))
            }
            Packer::Windows { tokens, rows } => self.window(plan, tokens, rows),
            Packer::Whole => self.whole(plan),
        };
        self.packer = packer;
        row
    }

    /// The documents of the next record that gives any, as one row.
    fn whole(&mut self, plan: &Plan) -> Result<Option<Row>> {
        loop {
            let Some(documents) = self.documents(plan)? else { return Ok(None) };
            let row = whole_row(&documents);
            if !row.is_empty() {
                return Ok(Some(row));
            }
        }
    }

    fn window(&mut self, plan: &Plan, tokens: &mut Option<Vec<u32>>, rows: &mut u64) -> Result<Option<Row>> {
        let seq_len = seq_len(plan);
        let source = &self.sources[0].plan;
        let (shuffle, epochs) = (source.shuffle, source.epochs);
        if tokens.is_none() {
            *tokens = Some(tokens_of_windows(plan, source)?);
        }
        let tokens = tokens.as_deref().expect("just read");
        let targets = tokens.len() - 1;
        let rows_in_epoch = windows_in_epoch(tokens, seq_len);
        if epochs.is_some_and(|epochs| *rows / rows_in_epoch >= epochs) {
            return Ok(None);
        }
        let start = match shuffle {
            // Each epoch cuts the text elsewhere and takes its windows in another order: no token comes again before all have come,
            // but for those around the text's ends. A text shorter than a window has a single place.
            Some(seed) => {
                let (epoch, row) = (*rows / rows_in_epoch, *rows % rows_in_epoch);
                let first = Stream::new(seed, "windows").below(epoch, seq_len as u64) as usize;
                let start = first + Permutation::new(rows_in_epoch, seed, epoch).at(row) as usize * seq_len;
                // One that would begin behind the end has the text's first tokens, which the cut left out.
                if start >= targets { 0 } else { start.min(targets - seq_len.min(targets)) }
            }
            None => (*rows % rows_in_epoch) as usize * seq_len,
        };
        *rows += 1;
        Ok(Some(window(tokens, start, seq_len)))
    }
}

/// Tokens of a row.
fn seq_len(plan: &Plan) -> usize {
    plan.packing.and_then(|packing| packing.seq_len()).unwrap_or(1)
}

/// The one long text that windows are cut from.
///
/// Errors: those of reading; [`Error::Argument`] for a text without anything to predict.
fn tokens_of_windows(plan: &Plan, source: &SourcePlan) -> Result<Vec<u32>> {
    let mut reader = Source::open(SourcePlan { shuffle: None, epochs: Some(1), ..source.clone() })?;
    let one_text = reader.count() == 1;
    let mut all = Vec::new();
    while let Some((_, record)) = reader.next()? {
        let mut document = plan.documents(0, &record)?.documents.pop().unwrap_or_default();
        // A single text has no neighbour to be told apart from.
        if one_text && plan.end_of_document && plan.tokenizer()?.end_of_text().is_some() {
            document.tokens.pop();
        }
        all.append(&mut document.tokens);
    }
    if all.len() < 2 {
        return Err(Error::argument("data.pack", "windows", "a text of at least 2 tokens", format!("{} tokens", all.len())));
    }
    Ok(all)
}

/// Windows that together have every token but the first as a label once.
fn windows_in_epoch(tokens: &[u32], seq_len: usize) -> u64 {
    (tokens.len() - 1).div_ceil(seq_len) as u64
}
