//! `engine.data`: data sets as scripts describe them, and the batches they give. A description is a value: each method
//! returns another one. Reading begins with the first `take`.

use super::args::json_to_lua;
use super::call::{Answer, Call, Class, Failed, Field, Function, NOT_UTF8, as_integer, as_tensor, describe};
use super::conversations::rules;
use super::globals::seed;
use super::options::Options;
use super::rollouts::Sampled;
use super::tensor::tensor_value;
use super::tokenizer::{TokenizerObject, token_ids};
use crate::data::conversation::Form;
use crate::data::cursor::Cursor;
use crate::data::dataset::Dataset;
use crate::data::document_index::Part;
use crate::data::pack::{BEST_FIT_POOL, Document, Packing, TokenBatch};
use crate::data::source::{OnError, Tally};
use crate::data::text::Delimiter;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::tensor::AnyTensor;
use mlua::{Lua, Value};
use std::sync::{Arc, Mutex, MutexGuard};

/// A data set in Lua. Cheap to clone: clones read from one position.
#[derive(Clone)]
pub struct DataObject(Arc<Mutex<Reading>>);

/// A data set with at most one batch read ahead.
struct Reading {
    dataset: Dataset,
    packed: bool,
    /// What the last `take` asked for; the look-ahead asks for the same.
    rows: Option<usize>,
    /// How often something was taken.
    taken: u64,
    ahead: Option<Ahead>,
}

/// Read but not used: the cursor is the one before it.
struct Ahead {
    rows: usize,
    taken: Option<Taken>,
    before: Cursor,
    tally: Tally,
    documents_read: f64,
}

enum Taken {
    Batch(TokenBatch),
    Records(Vec<serde_json::Map<String, serde_json::Value>>),
}

impl Reading {
    fn read(&mut self, rows: usize) -> Result<Option<Taken>> {
        if self.packed {
            return Ok(self.dataset.take_batch(rows)?.map(Taken::Batch));
        }
        let records = self.dataset.take_rows(rows)?;
        Ok((!records.is_empty()).then_some(Taken::Records(records)))
    }

    fn take(&mut self, rows: usize) -> Result<Option<Taken>> {
        self.rows = Some(rows);
        self.taken += 1;
        match self.ahead.take() {
            Some(ahead) if ahead.rows == rows => Ok(ahead.taken),
            Some(ahead) => {
                self.dataset.restore(&ahead.before)?;
                self.read(rows)
            }
            None => self.read(rows),
        }
    }
}

impl DataObject {
    pub fn new(dataset: Dataset, packed: bool) -> Self {
        Self(Arc::new(Mutex::new(Reading { dataset, packed, rows: None, taken: 0, ahead: None })))
    }

    fn lock(&self) -> MutexGuard<'_, Reading> {
        self.0.lock().expect("reading data does not panic under this lock")
    }

    /// The description alone, from the beginning.
    pub fn dataset(&self) -> Result<Dataset> {
        Ok(self.lock().dataset.fresh())
    }

    /// The same description with a reading of its own, from the beginning.
    pub fn begin_again(&self) -> Self {
        let reading = self.lock();
        Self::new(reading.dataset.fresh(), reading.packed)
    }

    /// What it reads and how, in words that are equal when it is. Epochs are not part of it: a loop sets them.
    pub fn definition(&self) -> String {
        self.lock().dataset.definition()
    }

    /// What became of the records taken so far that were not used whole.
    fn tally(&self) -> Tally {
        let reading = self.lock();
        reading.ahead.as_ref().map_or_else(|| reading.dataset.tally(), |ahead| ahead.tally)
    }

    /// A number that changes with every `take`.
    pub fn version(&self) -> u64 {
        self.lock().taken
    }

    /// The position behind what was taken, and how many rows the last `take` asked for.
    ///
    /// Errors: those of [`Dataset::cursor`].
    pub fn position(&self) -> Result<(Cursor, Option<usize>)> {
        let cursor = self.cursor()?;
        Ok((cursor, self.lock().rows))
    }

    /// Goes on from a position that [`Self::position`] gave.
    ///
    /// Errors: those of [`Dataset::restore`].
    pub fn restore(&self, cursor: &Cursor, rows: Option<usize>) -> Result<()> {
        let mut reading = self.lock();
        reading.ahead = None;
        reading.rows = rows;
        reading.dataset.restore(cursor)
    }

    /// As [`Self::restore`], with the description that it had then.
    ///
    /// Errors: those of [`Dataset::restore`].
    pub fn put_back(&self, dataset: Dataset, cursor: &Cursor, rows: Option<usize>) -> Result<()> {
        self.lock().dataset = dataset;
        self.restore(cursor, rows)
    }

    /// Whether another `take` would give something. Before the first one: whether there are documents.
    ///
    /// Errors: those of reading.
    pub fn has_more(&self) -> Result<bool> {
        let mut reading = self.lock();
        let Some(rows) = reading.rows else { return Ok(reading.dataset.documents()? > 0) };
        if reading.ahead.is_none() {
            let (before, tally) = (reading.dataset.cursor()?, reading.dataset.tally());
            let documents_read = reading.dataset.documents_read()?;
            let taken = reading.read(rows)?;
            reading.ahead = Some(Ahead { rows, taken, before, tally, documents_read });
        }
        Ok(reading.ahead.as_ref().is_some_and(|ahead| ahead.taken.is_some()))
    }

    /// Whether anything was taken yet.
    pub fn has_begun(&self) -> bool {
        self.lock().rows.is_some()
    }

    /// Reads everything `count` times, from the beginning; with `goes_on`, from where it is.
    ///
    /// Errors: [`Error::Argument`] if reading has begun and does not go on.
    pub fn set_epochs(&self, count: u64, goes_on: bool) -> Result<()> {
        let mut reading = self.lock();
        if reading.rows.is_some() && goes_on {
            let position = match reading.ahead.take() {
                Some(ahead) => ahead.before,
                None => reading.dataset.cursor()?,
            };
            reading.dataset = reading.dataset.fresh().epochs(count);
            return reading.dataset.restore(&position);
        }
        if reading.rows.is_some() {
            return Err(Error::argument("Run:loop", "over", "a data set of which nothing was taken yet", "one in use"));
        }
        reading.dataset = reading.dataset.fresh().epochs(count);
        Ok(())
    }

    /// The position behind what was taken, whatever was read ahead.
    ///
    /// Errors: those of [`Dataset::cursor`].
    pub fn cursor(&self) -> Result<Cursor> {
        let mut reading = self.lock();
        match &reading.ahead {
            Some(ahead) => Ok(ahead.before.clone()),
            None => reading.dataset.cursor(),
        }
    }

    /// Share of `epochs` that is read, 0 to 1.
    pub fn share_done(&self, epochs: u64) -> Option<f64> {
        let mut reading = self.lock();
        let whole = (epochs * reading.dataset.documents().ok()?) as f64;
        let read = match &reading.ahead {
            Some(ahead) => ahead.documents_read,
            None => reading.dataset.documents_read().ok()?,
        };
        (whole > 0.0).then(|| (read / whole).min(1.0))
    }

    fn changed(&self, packed: bool, change: impl FnOnce(Dataset) -> Dataset) -> Self {
        let reading = self.lock();
        Self::new(change(reading.dataset.fresh()), packed || reading.packed)
    }
}

/// The most rows of one `take`: a data set that is read for ever would else fill the memory.
const TAKE_MAX: usize = 1 << 20;

/// Functions of `engine.data`.
pub const FUNCTIONS: &[Function] = &[
    Function {
        op: "data.batch",
        params: &["documents"],
        call: |call| {
            let table = call.table(0)?;
            let mut documents = Vec::new();
            for value in call.list(0, "a list of documents, each a list of token ids", &table)? {
                documents.push(document(call, &value)?);
            }
            call.give(BatchObject(Arc::new(TokenBatch::from_documents(&documents)), None))
        },
    },
    Function {
        op: "data.jsonl",
        params: &["paths", "options?"],
        call: |call| {
            let dataset = Dataset::jsonl(paths(call)?);
            reading_options(call, dataset)
        },
    },
    Function {
        op: "data.mix",
        params: &["parts", "options?"],
        call: |call| {
            let mix_seed = seed_option(call, 1)?;
            let expected = "a list of { data set, weight }";
            let (mut parts, mut packed) = (Vec::new(), false);
            for entry in call.list(0, expected, &call.table(0)?)? {
                let Value::Table(entry) = entry else { return Err(call.wrong(0, expected)) };
                let Value::UserData(object) = entry.raw_get::<Value>(1)? else { return Err(call.wrong(0, expected)) };
                let weight = match entry.raw_get::<Value>(2)? {
                    Value::Integer(weight) => weight as f64,
                    Value::Number(weight) => weight,
                    _ => return Err(call.wrong(0, expected)),
                };
                let part = object.borrow::<DataObject>().map_err(|_| call.wrong(0, expected))?;
                packed |= part.lock().packed;
                parts.push((part.dataset()?, weight));
            }
            call.give(DataObject::new(Dataset::mix(parts, mix_seed)?, packed))
        },
    },
    Function {
        op: "data.parquet",
        params: &["paths", "options?"],
        call: |call| {
            let dataset = Dataset::parquet(paths(call)?);
            reading_options(call, dataset)
        },
    },
    Function {
        op: "data.text",
        params: &["paths", "options?"],
        call: |call| {
            let options = call.options(1, &["document"])?;
            let delimiter = match options.string("document")?.as_deref() {
                None | Some("file") => Delimiter::Whole,
                Some("line") => Delimiter::Line,
                Some("paragraph") => Delimiter::BlankLine,
                Some(other) => {
                    let expected = "\"file\", \"line\" or \"paragraph\"";
                    return Err(Error::argument(call.op, "document", expected, format!("\"{other}\"")).into());
                }
            };
            call.give(DataObject::new(Dataset::text(paths(call)?).delimiter(delimiter), false))
        },
    },
];

/// `dataset` with the options that all readers of records know.
pub fn reading_options(call: &Call, mut dataset: Dataset) -> Answer {
    let options = call.options(1, &["field", "skip_bad"])?;
    if let Some(field) = options.string("field")? {
        dataset = dataset.field(&field);
    }
    if options.boolean("skip_bad")?.unwrap_or(false) {
        dataset = dataset.on_error(OnError::Skip);
    }
    call.give(DataObject::new(dataset, false))
}

/// A document in an argument: its token ids, or a table of `tokens` and `mask`, 1 or true for those that are learned.
fn document(call: &Call, value: &Value) -> Failed<Document> {
    let Value::Table(table) = value else { return Ok(Document::all(token_ids(call, 0, value)?)) };
    if !table.contains_key("tokens")? {
        return Ok(Document::all(token_ids(call, 0, value)?));
    }
    let options = Options::read(call.op, Some(table.clone()), &["tokens", "mask"])?;
    let tokens = token_ids(call, 0, &options.value("tokens")?)?;
    let mask = options.value("mask")?;
    let wrong = |got: String| Error::argument(call.op, "mask", format!("{} of 0 and 1, or true and false", tokens.len()), got);
    let flags = match (as_tensor(&mask), &mask) {
        (_, Value::Nil) => return Ok(Document::all(tokens)),
        (Some(tensor), _) => tensor.on_host()?.to_f32_vec().into_iter().map(|flag| Value::Number(f64::from(flag))).collect(),
        (None, Value::Table(list)) => call.list(0, "documents with a list as mask", list)?,
        (None, other) => return Err(wrong(describe(other)).into()),
    };
    let flag = |value: &Value| match (value, as_integer(value)) {
        (Value::Boolean(on), _) => Ok(*on),
        (_, Some(on @ (0 | 1))) => Ok(on == 1),
        _ => Err(wrong(format!("an entry that is {}", describe(value))).into()),
    };
    let supervised = flags.iter().map(flag).collect::<Failed<Vec<bool>>>()?;
    if supervised.len() != tokens.len() {
        return Err(wrong(supervised.len().to_string()).into());
    }
    Ok(Document { tokens, supervised: Some(supervised) })
}

/// One path or a list of them.
fn paths(call: &Call) -> Failed<Vec<String>> {
    match call.value(0) {
        Value::String(_) => Ok(vec![call.string(0)?]),
        Value::Table(list) => {
            let expected = "a path or a list of paths";
            let path = |value: &Value| match value {
                Value::String(path) => {
                    Ok(path.to_str().map_err(|_| Error::argument(call.op, "paths", NOT_UTF8.0, NOT_UTF8.1))?.to_string())
                }
                other => Err(Error::argument(call.op, "paths", expected, format!("an entry that is {}", describe(other))).into()),
            };
            call.list(0, expected, &list)?.iter().map(path).collect()
        }
        _ => Err(call.wrong(0, "a path or a list of paths")),
    }
}

/// The seed of the options at `index`, else the run's.
fn seed_option(call: &Call, index: usize) -> Failed<u64> {
    let given = call.options(index, &["seed"])?.count("seed", 0)?;
    Ok(given.map_or_else(|| seed(call.lua), |seed| seed as u64))
}

fn at_least_one(call: &Call, index: usize) -> Failed<usize> {
    let count = as_integer(&call.value(index)).and_then(|count| usize::try_from(count).ok()).filter(|count| *count > 0);
    count.ok_or_else(|| call.wrong(index, "an integer of at least 1"))
}

fn change(call: &Call, packed: bool, change: impl FnOnce(Dataset) -> Dataset) -> Answer {
    let changed = call.subject::<DataObject>()?.changed(packed, change);
    call.give(changed)
}

/// Records as conversations, pairs or prompts.
fn chat(call: &Call, form: Form) -> Answer {
    let TokenizerObject { tokenizer, template } = call.object::<TokenizerObject>(0)?.clone();
    let rules = rules(call, 1, form)?;
    change(call, form == Form::Pairs, |data| data.chat(template, rules).tokenizer(tokenizer))
}

impl Class for DataObject {
    const NAME: &'static str = "Data";
    const METHODS: &'static [&'static [Function]] = &[&[
        Function { op: "Data:chat", params: &["tokenizer", "options?"], call: |call| chat(call, Form::Conversations) },
        Function {
            op: "Data:counts",
            params: &[],
            call: |call| {
                let tally = call.subject::<DataObject>()?.tally();
                let table = call.lua.create_table()?;
                for (name, count) in [("bad", tally.skipped), ("cut", tally.cut), ("long", tally.long)] {
                    table.raw_set(name, count)?;
                }
                call.give(table)
            },
        },
        Function {
            op: "Data:documents",
            params: &[],
            call: |call| {
                let count = call.subject::<DataObject>()?.lock().dataset.documents()?;
                call.give(count)
            },
        },
        Function {
            op: "Data:epochs",
            params: &["count"],
            call: |call| {
                let count = at_least_one(call, 0)? as u64;
                change(call, false, |data| data.epochs(count))
            },
        },
        Function { op: "Data:forever", params: &[], call: |call| change(call, false, Dataset::forever) },
        Function {
            op: "Data:pack",
            params: &["options"],
            call: |call| {
                let options = call.options(0, &["seq_len", "how", "pool"])?;
                let how = options.string("how")?;
                let seq_len = match options.count("seq_len", 1)? {
                    Some(length) if how.as_deref() == Some("whole") => {
                        let expected = "left out: documents are not cut (max_tokens of chat limits them)";
                        return Err(Error::argument(call.op, "seq_len", expected, length).into());
                    }
                    None if how.as_deref() != Some("whole") => {
                        return Err(Error::argument(call.op, "seq_len", "given: tokens of a row", "nil").into());
                    }
                    length => length.unwrap_or(0),
                };
                let pool = match options.count("pool", 1)? {
                    Some(pool) if how.as_deref() != Some("best_fit") => {
                        return Err(Error::argument(call.op, "pool", "left out: only \"best_fit\" has a pool", pool).into());
                    }
                    pool => pool.unwrap_or(BEST_FIT_POOL),
                };
                let packing = match how.as_deref() {
                    None | Some("concat") => Packing::Concat { seq_len },
                    Some("best_fit") => Packing::BestFit { seq_len, pool },
                    Some("windows") => Packing::Windows { seq_len },
                    Some("whole") => Packing::Whole,
                    Some(other) => {
                        let expected = "\"concat\", \"best_fit\", \"windows\" or \"whole\"";
                        return Err(Error::argument(call.op, "how", expected, format!("\"{other}\"")).into());
                    }
                };
                packing.check()?;
                change(call, true, |data| data.pack(packing))
            },
        },
        Function { op: "Data:pairs", params: &["tokenizer", "options?"], call: |call| chat(call, Form::Pairs) },
        Function { op: "Data:prompts", params: &["tokenizer", "options?"], call: |call| chat(call, Form::Prompts) },
        Function {
            op: "Data:shuffle",
            params: &["options?"],
            call: |call| {
                let seed = seed_option(call, 0)?;
                change(call, false, |data| data.shuffle(seed))
            },
        },
        Function {
            op: "Data:split",
            params: &["part", "fraction"],
            call: |call| {
                let part = match call.string(0)?.as_str() {
                    "train" => Part::Train,
                    "validation" => Part::Validation,
                    _ => return Err(call.wrong(0, "\"train\" or \"validation\"")),
                };
                let fraction = call.number(1)?;
                if !(0.0..=1.0).contains(&fraction) {
                    return Err(call.wrong(1, "a number from 0 to 1: the validation part's share"));
                }
                if call.subject::<DataObject>()?.lock().dataset.is_split() {
                    let expected = "whole: make each part from the data set that is not split yet";
                    return Err(Error::argument(call.op, "self", expected, "one part of a split").into());
                }
                change(call, false, |data| data.split(part, fraction))
            },
        },
        Function {
            op: "Data:take",
            params: &["count"],
            call: |call| {
                let count = at_least_one(call, 0)?;
                if count > TAKE_MAX {
                    return Err(call.wrong(0, format!("at most {TAKE_MAX}; take the rest in further calls")));
                }
                let taken = call.subject::<DataObject>()?.lock().take(count)?;
                match taken {
                    None => call.give(Value::Nil),
                    Some(Taken::Batch(batch)) => call.give(BatchObject(Arc::new(batch), None)),
                    Some(Taken::Records(records)) => {
                        let rows = records.into_iter().map(|record| json_to_lua(call.lua, &serde_json::Value::Object(record)));
                        call.give(call.lua.create_sequence_from(rows.collect::<mlua::Result<Vec<_>>>()?)?)
                    }
                }
            },
        },
        Function {
            op: "Data:tokenizer",
            params: &["tokenizer"],
            call: |call| {
                let tokenizer = call.object::<TokenizerObject>(0)?.tokenizer.clone();
                change(call, false, |data| data.tokenizer(tokenizer))
            },
        },
    ]];
    const FIELDS: &'static [Field<Self>] = &[];
}

super::call::user_data!(DataObject);

/// Tokens of several documents laid end to end, with what each position should predict; of rollouts, how they were sampled.
#[derive(Clone)]
pub struct BatchObject(pub Arc<TokenBatch>, pub Option<Arc<Sampled>>);

impl Class for BatchObject {
    const NAME: &'static str = "Batch";
    const METHODS: &'static [&'static [Function]] = &[];
    const FIELDS: &'static [Field<Self>] = &[
        Field { name: "count", get: |_, batch| Ok(Value::Integer(batch.0.tokens.len() as i64)) },
        Field {
            name: "cu_seqlens",
            get: |lua, batch| integers(lua, &batch.0.cu_seqlens.iter().map(|border| *border as i32).collect::<Vec<_>>()),
        },
        Field { name: "documents", get: |_, batch| Ok(Value::Integer(batch.0.documents() as i64)) },
        Field { name: "labels", get: |lua, batch| integers(lua, &batch.0.labels) },
        Field {
            name: "logprobs",
            get: |lua, batch| match &batch.1 {
                Some(sampled) => tensor_value(lua, AnyTensor::new(&[sampled.logprobs.len()], Buffer::copy_of(&sampled.logprobs))?),
                None => Ok(Value::Nil),
            },
        },
        Field {
            name: "mask",
            get: |lua, batch| {
                let mask: Vec<f32> = batch.0.labels.iter().map(|label| if *label >= 0 { 1.0 } else { 0.0 }).collect();
                tensor_value(lua, AnyTensor::new(&[mask.len()], Buffer::copy_of(&mask))?)
            },
        },
        Field { name: "position_ids", get: |lua, batch| integers(lua, &batch.0.position_ids) },
        Field {
            name: "rollouts",
            get: |_, batch| Ok(batch.1.as_ref().map_or(Value::Nil, |sampled| Value::Integer(sampled.rollouts as i64))),
        },
        Field { name: "rows", get: |_, batch| Ok(Value::Integer(batch.0.rows() as i64)) },
        Field {
            name: "sequence",
            get: |lua, batch| match &batch.1 {
                Some(sampled) => integers(lua, &sampled.sequence),
                None => integers(lua, &batch.0.sequence()),
            },
        },
        Field { name: "supervised", get: |_, batch| Ok(Value::Integer(batch.0.supervised() as i64)) },
        Field { name: "tokens", get: |lua, batch| integers(lua, &batch.0.tokens) },
    ];
}

super::call::user_data!(BatchObject);

fn integers(lua: &Lua, values: &[i32]) -> Failed<Value> {
    tensor_value(lua, AnyTensor::new(&[values.len()], Buffer::copy_of(values))?)
}
