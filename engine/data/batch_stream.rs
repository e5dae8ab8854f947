//! A data set being read: records drawn from the sources, tokenised ahead on all threads, packed into rows.
//! Not the settings (`dataset.rs`) and not the stored position (`cursor.rs`).

use std::collections::VecDeque;
use std::sync::Arc;

use super::chat_template::{ChatTemplate, Rendering};
use super::cursor::{PackerPosition, StreamPosition};
use super::jsonl::Record;
use super::mix::Mix;
use super::pack::{BestFitPacker, ConcatPacker, Document, Packing, Row, window};
use super::source::{MESSAGES_FIELD, OnError, Source, SourcePlan};
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
    pub chat: Option<Arc<ChatTemplate>>,
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
    /// Tokenised ahead, each with the stream's position behind it.
    ahead: VecDeque<(Document, StreamPosition)>,
    /// The stream's position behind the last document that the packer took.
    pub taken: StreamPosition,
    packer: Packer,
    pub batches: u64,
}

#[derive(Debug)]
pub(super) enum Packer {
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

pub(super) fn text_of(record: &Record, field: &str) -> String {
    record.get(field).and_then(|text| text.as_str()).unwrap_or_default().to_string()
}

impl Plan {
    fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || Error::argument("data.take", "tokenizer", "set, which batches need", "none");
        self.tokenizer.as_deref().ok_or_else(missing)
    }

    /// The tokens of a record of source `which`.
    pub(super) fn document(&self, which: usize, record: &Record) -> Result<Document> {
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

impl BatchStream {
    pub(super) fn open(plan: &Plan) -> Result<Self> {
        if let Some(packing) = &plan.packing {
            packing.check()?;
        }
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
            Packer::None => (taken(), PackerPosition::None),
            Packer::Concat(packer) => {
                let carry = packer.carry();
                (taken(), PackerPosition::Concat { tokens: carry.tokens, supervised: carry.supervised })
            }
            Packer::BestFit { packer, .. } if packer.at_pool_start() => {
                (taken(), PackerPosition::BestFit { pools: packer.pools(), rows: 0 })
            }
            Packer::BestFit { packer, pool_start, rows } => {
                (pool_start.clone(), PackerPosition::BestFit { pools: packer.pools() - 1, rows: *rows })
            }
            Packer::Windows { rows, .. } => (taken(), PackerPosition::Windows { rows: *rows }),
        }
    }

    /// Goes to a position that a cursor stored.
    ///
    /// Errors: [`Error::Argument`] for one that does not fit the sources and the packing, which are those of the cursor.
    pub(super) fn go_to(&mut self, plan: &Plan, stream: &StreamPosition, packer: &PackerPosition) -> Result<()> {
        let damaged = |place: &str, expected: String, got: String| Err(Error::argument("data.restore", place, expected, got));
        if stream.sources.len() != self.sources.len() {
            return damaged("stream.sources", format!("{} positions", self.sources.len()), stream.sources.len().to_string());
        }
        for (source, position) in self.sources.iter().zip(&stream.sources) {
            if position.record >= source.index().count() {
                return damaged("record", format!("below {}", source.index().count()), position.record.to_string());
            }
        }
        self.seek(stream);
        match (&mut self.packer, packer) {
            (Packer::None, PackerPosition::None) => {}
            (Packer::Concat(packer), PackerPosition::Concat { tokens, supervised }) => {
                if let Some(mask) = supervised.as_ref().filter(|mask| mask.len() != tokens.len()) {
                    return damaged("packer.supervised", format!("{} flags", tokens.len()), mask.len().to_string());
                }
                let carry = Document { tokens: tokens.clone(), supervised: supervised.clone() };
                *packer = ConcatPacker::new(packer.seq_len(), carry);
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
            (Packer::Windows { rows, .. }, PackerPosition::Windows { rows: stored }) => *rows = *stored,
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

    /// The next document's tokens. Many are tokenised at once, on all threads.
    fn document(&mut self, plan: &Plan) -> Result<Option<Document>> {
        if self.ahead.is_empty() {
            plan.tokenizer()?;
            let (mut records, mut positions, mut bytes) = (Vec::new(), Vec::new(), 0);
            while records.len() < FETCH_DOCUMENTS && bytes < FETCH_BYTES {
                let Some((which, number, record)) = self.record()? else { break };
                bytes += text_of(&record, &plan.sources[which].field).len();
                records.push((which, number, record));
                positions.push(self.stream());
            }
            let documents = in_parallel(records.len(), |index| plan.document(records[index].0, &records[index].2));
            let mut refused = vec![0; self.sources.len()];
            for ((document, mut position), (which, number, _)) in documents.into_iter().zip(positions).zip(records) {
                let document = match document {
                    Ok(document) => document,
                    // A document without tokens packs to nothing; the count says that it was left out.
                    Err(_) if plan.sources[which].on_error == OnError::Skip => {
                        refused[which] += 1;
                        Document::default()
                    }
                    Err(error) => {
                        self.rewind_to_taken();
                        return Err(self.sources[which].located(number, error)?);
                    }
                };
                position.sources.iter_mut().zip(&refused).for_each(|(source, refused)| source.skipped += refused);
                self.ahead.push_back((document, position));
            }
            self.sources.iter_mut().zip(refused).for_each(|(source, refused)| source.count_skipped(refused));
        }
        Ok(self.ahead.pop_front().map(|(document, position)| {
            self.taken = position;
            document
        }))
    }

    pub(super) fn row(&mut self, plan: &Plan) -> Result<Option<Row>> {
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
            while let Some((_, record)) = reader.next()? {
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
