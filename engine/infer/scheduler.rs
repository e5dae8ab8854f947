//! Many texts generated together: prompts are run in pieces beside the texts that are being continued, the members of a
//! group share their prompt's cache, and a text that ends makes room for the next one at once. Every token, log-probability
//! and text is what it would be alone: nothing depends on the company.
//! Source: Yu et al., "Orca: a distributed serving system for transformer-based generative models", OSDI 2022
//! (scheduling by iteration).

use super::kv_cache::{KvCache, Table, blocks_for};
use super::sampler::{History, Rules, changes, choose, choose_likely};
use super::stop_text::StopText;
use crate::data::tokenizer::{StreamDecoder, Tokenizer};
use crate::error::{Error, Result};
use crate::kernels::cpu::threads::parallel;
use crate::kernels::random::Stream;
use crate::model::Model;
use crate::model::paged::{Change, Draw, LogitRows, NewTokens};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::OnceLock;

/// Tokens of prompts that one step takes at most, beside one token of each text.
const PREFILL_TOKENS: usize = 2048;

/// Texts that are continued at a time, unless told otherwise.
pub const TEXTS_MAX: usize = 256;

/// Share of the free memory that the cache may take.
const MEMORY_SHARE: f64 = 0.8;

/// What to generate from one prompt.
#[derive(Clone, Debug)]
pub struct Job {
    /// `[tokens]`, at least one
    pub prompt: Vec<i32>,
    /// Texts from this prompt, at least one; each draws random numbers of its own.
    pub members: usize,
    /// Most tokens of a text; fewer if the model's positions end.
    pub max_tokens: usize,
    pub rules: Rules,
    /// Added to the logits of some ids.
    pub bias: Vec<(u32, f64)>,
    /// The choice of token n of member m depends on the seed, on m, on n and on the logits alone.
    pub seed: u64,
    /// Ids that end a text; the one that did is kept in the tokens.
    pub stop_ids: Vec<u32>,
    /// Strings that end a text; they are not part of it. They need a tokenizer.
    pub stops: Vec<String>,
    /// For how many of the most likely tokens log-probabilities are reported beside the chosen one.
    pub top_logprobs: usize,
}

impl Job {
    /// One text of at most `max_tokens`, without ends but its length.
    pub fn new(prompt: Vec<i32>, max_tokens: usize, rules: Rules, seed: u64) -> Self {
        Self { prompt, members: 1, max_tokens, rules, bias: vec![], seed, stop_ids: vec![], stops: vec![], top_logprobs: 0 }
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// At a stop id.
    StopToken,
    /// At a stop string.
    StopText,
    /// At `max_tokens`, or at the model's last position.
    Length,
}

impl Finish {
    /// As reports spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::StopToken => "stop_token",
            Self::StopText => "stop_text",
            Self::Length => "length",
        }
    }
}

/// A generated text.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    /// Without the stop string, and without special tokens; empty without a tokenizer.
    pub text: String,
    /// All tokens after the prompt, those of the stop string too.
    pub tokens: Vec<i32>,
    /// `[tokens]`: the log-probability of each under the model, over the whole vocabulary, at the temperature of the
    /// choices (1 where they are greedy) and before all other rules: the bits of [`Model::logprobs`].
    pub logprobs: Vec<f32>,
    /// For each token, the most likely ones and their log-probabilities, if asked.
    pub top_logprobs: Vec<Vec<(u32, f32)>>,
    pub finish: Finish,
}

/// A token that was chosen, or the end of a text that has none.
#[derive(Debug)]
pub struct Event {
    pub job: usize,
    pub member: usize,
    /// None for a text that ended before its first token.
    pub token: Option<i32>,
    pub logprob: f32,
    /// The text that it completes, in whole characters; a possible beginning of a stop string is held back.
    pub piece: String,
    /// There if this was the last one.
    pub finished: Option<Text>,
}

/// A text that is being continued.
struct Member {
    job: usize,
    member: usize,
    stream: Stream,
    /// Cached: all tokens but the last.
    table: Table,
    /// Prompt and output.
    tokens: Vec<i32>,
    logprobs: Vec<f32>,
    top_logprobs: Vec<Vec<(u32, f32)>>,
    decoder: StreamDecoder,
    stop: StopText,
    text: String,
}

/// A prompt that is being run, or waits.
struct Prompt {
    job: usize,
    table: Table,
}

/// Texts of one model, waiting, running and done.
pub struct Scheduler<'a> {
    model: &'a Model,
    tokenizer: Option<&'a Tokenizer>,
    /// Ids from here on are never chosen: rows of padded embeddings have no text.
    vocab: usize,
    cache: KvCache,
    blocks_max: usize,
    texts_max: usize,
    jobs: BTreeMap<usize, Job>,
    next_job: usize,
    waiting: VecDeque<usize>,
    prompts: VecDeque<Prompt>,
    running: Vec<Member>,
    /// Blocks that all started jobs may come to need, by job.
    promised: BTreeMap<usize, usize>,
}

/// Whose choice a row of logits decides.
enum Row {
    Running(usize),
    Prompt(Prompt),
}

impl<'a> Scheduler<'a> {
    /// - `tokenizer`: for texts and stop strings; without it there are only tokens
    /// - `texts_max`: texts that are continued at a time
    ///
    /// Errors: those of the device that the model lies on.
    pub fn new(model: &'a Model, tokenizer: Option<&'a Tokenizer>, texts_max: usize) -> Result<Self> {
        let vocab = tokenizer.map_or(usize::MAX, Tokenizer::vocab_size).min(model.config().vocab);
        let cache = KvCache::new(model)?;
        let bytes = cache.bytes_free().map_or(u64::MAX, |free| (free as f64 * MEMORY_SHARE) as u64);
        let blocks_max = usize::try_from(bytes / cache.block_bytes().max(1) as u64).unwrap_or(usize::MAX);
        Ok(Self {
            model,
            tokenizer,
            vocab,
            cache,
            blocks_max,
            texts_max: texts_max.max(1),
            jobs: BTreeMap::new(),
            next_job: 0,
            waiting: VecDeque::new(),
            prompts: VecDeque::new(),
            running: Vec::new(),
            promised: BTreeMap::new(),
        })
    }

    /// Queues a job and returns its number, from 0 upwards.
    ///
    /// Errors: [`Error::Argument`] for an empty prompt, one longer than the model's positions, tokens outside its
    /// vocabulary, rules that cannot be meant, stop strings without a tokenizer, and texts whose cache could not fit the
    /// memory that is free.
    pub fn add(&mut self, job: Job) -> Result<usize> {
        let config = self.model.config();
        job.rules.check()?;
        if job.prompt.is_empty() || job.prompt.len() > config.max_positions {
            let expected = format!("1 to {} tokens, the model's positions", config.max_positions);
            return Err(Error::argument("generate", "prompt", expected, format!("{} tokens", job.prompt.len())));
        }
        if let Some((index, token)) = job.prompt.iter().enumerate().find(|(_, token)| **token < 0 || **token as usize >= config.vocab) {
            return Err(Error::argument("generate", format!("prompt[{index}]"), format!("an id from 0 to {}", config.vocab - 1), token));
        }
        if let Some((id, _)) = job.bias.iter().find(|(id, by)| *id as usize >= self.vocab || by.is_nan() || *by == f64::INFINITY) {
            let expected = format!("numbers by ids from 0 to {}", self.vocab - 1);
            return Err(Error::argument("generate", "logit_bias", expected, format!("id {id}")));
        }
        if job.members == 0 {
            return Err(Error::argument("generate", "n", "at least 1", 0));
        }
        StopText::new(&job.stops)?;
        if !job.stops.is_empty() && self.tokenizer.is_none() {
            return Err(Error::argument("generate", "stop", "a model with a tokenizer", "one without"));
        }
        let job = Job { max_tokens: job.max_tokens.min(config.max_positions - job.prompt.len()), ..job };
        let blocks = blocks_of(&job);
        if blocks > self.blocks_max {
            let gib = |blocks: usize| (blocks as f64) * self.cache.block_bytes() as f64 / (1u64 << 30) as f64;
            let expected = format!("texts whose cache fits the free memory, {:.1} GiB of which it may take", gib(self.blocks_max));
            let got = format!(
                "{} texts of up to {} tokens, {:.1} GiB; a smaller n or max_tokens takes less",
                job.members,
                job.prompt.len() + job.max_tokens,
                gib(blocks)
            );
            return Err(Error::argument("generate", "n, max_tokens", expected, got));
        }
        let number = self.next_job;
        self.next_job += 1;
        self.jobs.insert(number, job);
        self.waiting.push_back(number);
        Ok(number)
    }

    /// Whether nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.prompts.is_empty() && self.running.is_empty()
    }

    /// Runs every text on by a token, and some prompts by a piece.
    ///
    /// Errors: those of the model and of [`choose`]; the scheduler is of no use afterwards.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let mut events = self.admit();
        let (mut input, mut rows) = (NewTokens::default(), Vec::new());
        for (index, member) in self.running.iter_mut().enumerate() {
            let position = member.table.cached();
            self.cache.extend(&mut member.table, 1)?;
            input.rows.push(input.tokens.len());
            input.push(&member.tokens[position..], position, member.table.blocks());
            rows.push(Row::Running(index));
        }
        self.add_prompts(&mut input, &mut rows)?;
        if input.tokens.is_empty() {
            return Ok(events);
        }
        let (model, memory, vocab) = (self.model, self.cache.memory().clone(), self.model.config().vocab);
        let mut rows = rows.into_iter();
        model.logits_paged(input, &memory, &mut |range: Range<usize>, logits: &LogitRows| {
            let mut picks = Vec::new();
            for (place, row) in rows.by_ref().take(range.len()).enumerate() {
                match row {
                    Row::Running(index) => picks.push((index, place)),
                    Row::Prompt(prompt) => picks.extend(self.begin(prompt)?.map(|index| (index, place))),
                }
            }
            self.choose_all(&picks, logits, vocab, &mut events)
        })?;
        // The last first, so that indices stay right.
        let mut ended: Vec<(usize, usize, Finish)> = Vec::new();
        for (at, event) in events.iter_mut().enumerate().filter(|(_, event)| event.finished.is_none()) {
            let index = self.running.iter().position(|member| (member.job, member.member) == (event.job, event.member));
            let index = index.expect("an event's text is running");
            if let Some(finish) = self.look_for_end(index, event)? {
                ended.push((index, at, finish));
            }
        }
        ended.sort_unstable_by_key(|(index, ..)| std::cmp::Reverse(*index));
        for (index, at, finish) in ended {
            let member = self.running.remove(index);
            events[at].finished = Some(self.end(member, finish));
        }
        Ok(events)
    }

    /// Starts jobs while there is room for all that they may come to need.
    fn admit(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(number) = self.waiting.front().copied() {
            let job = &self.jobs[&number];
            let busy = self.running.len() + self.prompts.iter().map(|prompt| self.jobs[&prompt.job].members).sum::<usize>();
            let promised: usize = self.promised.values().sum();
            let blocks = blocks_of(job);
            if busy > 0 && (busy + job.members > self.texts_max || promised + blocks > self.blocks_max) {
                break;
            }
            self.waiting.pop_front();
            if job.max_tokens == 0 {
                let text = Text { text: String::new(), tokens: vec![], logprobs: vec![], top_logprobs: vec![], finish: Finish::Length };
                let members = 0..job.members;
                events.extend(members.map(|member| Event { finished: Some(text.clone()), ..Event::new(number, member) }));
                self.jobs.remove(&number);
                continue;
            }
            self.promised.insert(number, blocks);
            self.prompts.push_back(Prompt { job: number, table: Table::default() });
        }
        events
    }

    /// Adds pieces of prompts, up to [`PREFILL_TOKENS`].
    ///
    /// Errors: those of [`KvCache::extend`].
    fn add_prompts(&mut self, input: &mut NewTokens, rows: &mut Vec<Row>) -> Result<()> {
        let mut budget = PREFILL_TOKENS;
        while budget > 0
            && let Some(mut prompt) = self.prompts.pop_front()
        {
            let tokens = &self.jobs[&prompt.job].prompt;
            let position = prompt.table.cached();
            let count = (tokens.len() - position).min(budget);
            budget -= count;
            self.cache.extend(&mut prompt.table, count)?;
            input.push(&tokens[position..position + count], position, prompt.table.blocks());
            if position + count < tokens.len() {
                self.prompts.push_front(prompt);
            } else {
                input.rows.push(input.tokens.len() - 1);
                rows.push(Row::Prompt(prompt));
            }
        }
        Ok(())
    }

    /// Makes the members of a job whose prompt has run; their indices among the running.
    ///
    /// Errors: those of [`KvCache::fork`].
    fn begin(&mut self, prompt: Prompt) -> Result<Range<usize>> {
        let job = &self.jobs[&prompt.job];
        let mut tables = (1..job.members).map(|_| self.cache.fork(&prompt.table)).collect::<Result<Vec<Table>>>()?;
        tables.push(prompt.table);
        let first = self.running.len();
        self.running.extend(tables.into_iter().enumerate().map(|(member, table)| Member {
            job: prompt.job,
            member,
            stream: Stream::new(job.seed, &format!("generate {member}")),
            table,
            tokens: job.prompt.clone(),
            logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            decoder: StreamDecoder::new(true),
            stop: StopText::new(&job.stops).expect("stop strings were checked when the job came"),
            text: String::new(),
        }));
        Ok(first..self.running.len())
    }

    /// Chooses the next token of some running texts, each from its row of logits.
    ///
    /// - `picks`: indices of the texts, and their rows
    fn choose_all(&mut self, picks: &[(usize, usize)], logits: &LogitRows, vocab: usize, events: &mut Vec<Event>) -> Result<()> {
        let temperatures: Vec<f32> = picks.iter().map(|(index, _)| self.job_of(*index).rules.reported_temperature()).collect();
        let (labels, logprobs) = match self.choose_on_device(picks, logits, &temperatures)? {
            Some(drawn) => drawn,
            None => self.choose_on_host(picks, logits, vocab, &temperatures)?,
        };
        for (pick, (index, _)) in picks.iter().enumerate() {
            let member = &mut self.running[*index];
            member.tokens.push(labels[pick]);
            member.logprobs.push(logprobs[pick]);
            events.push(Event { token: Some(labels[pick]), logprob: logprobs[pick], ..Event::new(member.job, member.member) });
        }
        Ok(())
    }

    fn job_of(&self, index: usize) -> &Job {
        &self.jobs[&self.running[index].job]
    }

    /// The random number of a running text's next token.
    fn uniform(&self, index: usize) -> f64 {
        let member = &self.running[index];
        member.stream.f64((member.tokens.len() - self.job_of(index).prompt.len()) as u64)
    }

    /// Tokens and their log-probabilities, where the logits lie on a device and no text wants what only the host does; the tokens
    /// are those of [`Scheduler::choose_on_host`].
    fn choose_on_device(&self, picks: &[(usize, usize)], logits: &LogitRows, temperatures: &[f32]) -> Result<Option<(Vec<i32>, Vec<f32>)>> {
        if !logits.are_on_device() || picks.iter().any(|(index, _)| self.job_of(*index).top_logprobs > 0) {
            return Ok(None);
        }
        let (filtered, plain): (Vec<usize>, Vec<usize>) = (0..picks.len()).partition(|pick| self.job_of(picks[*pick].0).rules.filters());
        let (mut tokens, mut logprobs) = (vec![0; picks.len()], vec![0.0; picks.len()]);
        if !plain.is_empty() {
            let (draws, changes) = self.draws(picks, &plain);
            let reported: Vec<f32> = plain.iter().map(|pick| temperatures[*pick]).collect();
            let (drawn, said) = logits.draw(self.vocab, &draws, &changes, &reported)?;
            plain.iter().zip(drawn).zip(said).for_each(|((pick, token), said)| (tokens[*pick], logprobs[*pick]) = (token, said));
        }
        if !filtered.is_empty() {
            let (draws, changes) = self.draws(picks, &filtered);
            for (pick, likely) in filtered.iter().zip(logits.likely(self.vocab, &draws, &changes)?) {
                let index = picks[*pick].0;
                let chosen = likely.and_then(|likely| choose_likely(&self.job_of(index).rules, likely, self.uniform(index)));
                tokens[*pick] = chosen.map_or(-1, |id| id as i32);
            }
        }
        // Where the device found no choice the host finds one, or says why there is none.
        if tokens.iter().any(|token| *token < 0) {
            return Ok(None);
        }
        if !filtered.is_empty() {
            let of = |pick: &usize| (picks[*pick].1, tokens[*pick], temperatures[*pick]);
            let (rows, (labels, reported)): (Vec<_>, (Vec<_>, Vec<_>)) =
                filtered.iter().map(of).map(|(row, token, at)| (row, (token, at))).unzip();
            let (said, _) = logits.logprobs(&rows, &labels, &reported)?;
            filtered.iter().zip(said).for_each(|(pick, said)| logprobs[*pick] = said);
        }
        Ok(Some((tokens, logprobs)))
    }

    /// The draws of `some` of the picks, and what their rules do to the logits, by the index of the draw.
    fn draws(&self, picks: &[(usize, usize)], some: &[usize]) -> (Vec<Draw>, Vec<Change>) {
        let draw = |pick: &usize| {
            let (index, row) = picks[*pick];
            Draw { uniform: self.uniform(index), temperature: self.job_of(index).rules.drawn_temperature(), row: row as i32 }
        };
        let lists: Vec<OnceLock<Vec<Change>>> = some.iter().map(|_| OnceLock::new()).collect();
        parallel(some.len(), |at| {
            let (member, job) = (&self.running[picks[some[at]].0], self.job_of(picks[some[at]].0));
            let history = History { tokens: &member.tokens, prompt: job.prompt.len() };
            let _ = lists[at].set(changes(&job.rules, &job.bias, self.vocab, history));
        });
        let lists = lists.into_iter().map(|list| list.into_inner().expect("every list was made")).enumerate();
        let changes = lists.flat_map(|(row, list)| list.into_iter().map(move |change| change.in_row(row))).collect();
        (some.iter().map(draw).collect(), changes)
    }

    /// Tokens by all rules, and their log-probabilities; the most likely ones are noted for texts that want them.
    fn choose_on_host(
        &mut self,
        picks: &[(usize, usize)],
        logits: &LogitRows,
        vocab: usize,
        temperatures: &[f32],
    ) -> Result<(Vec<i32>, Vec<f32>)> {
        let values = logits.values()?;
        let row = |place: usize| &values[place * vocab..][..vocab];
        let chosen: Vec<OnceLock<Result<u32>>> = picks.iter().map(|_| OnceLock::new()).collect();
        parallel(picks.len(), |pick| {
            let (index, place) = picks[pick];
            let (member, job) = (&self.running[index], self.job_of(index));
            let history = History { tokens: &member.tokens, prompt: job.prompt.len() };
            let _ = chosen[pick].set(choose(&job.rules, &job.bias, &row(place)[..self.vocab], history, self.uniform(index)));
        });
        let chosen = chosen.into_iter().map(|slot| slot.into_inner().expect("every pick was made"));
        let labels = chosen.map(|id| id.map(|id| id as i32)).collect::<Result<Vec<i32>>>()?;
        let rows: Vec<usize> = picks.iter().map(|(_, place)| *place).collect();
        let (logprobs, lse) = logits.logprobs(&rows, &labels, temperatures)?;
        for (pick, (index, place)) in picks.iter().enumerate() {
            let wanted = self.job_of(*index).top_logprobs;
            if wanted > 0 {
                self.running[*index].top_logprobs.push(most_likely(row(*place), wanted, temperatures[pick].recip(), lse[pick]));
            }
        }
        Ok((labels, logprobs))
    }

    /// Decodes a running text's new token, and says whether the text ends with it.
    fn look_for_end(&mut self, index: usize, event: &mut Event) -> Result<Option<Finish>> {
        let member = &mut self.running[index];
        let job = &self.jobs[&member.job];
        let id = event.token.expect("a running text has a new token") as u32;
        if job.stop_ids.contains(&id) {
            event.piece = member.flush();
            return Ok(Some(Finish::StopToken));
        }
        // A tokenizer may have gaps between its ids.
        if let Some(tokenizer) = self.tokenizer.filter(|tokenizer| tokenizer.id_to_bytes(id).is_some()) {
            let (piece, ended) = member.stop.push(&member.decoder.push(tokenizer, id)?);
            member.text.push_str(&piece);
            event.piece = piece;
            if ended {
                return Ok(Some(Finish::StopText));
            }
        }
        let is_full = member.tokens.len() - job.prompt.len() >= job.max_tokens;
        if is_full {
            event.piece.push_str(&member.flush());
        }
        Ok(is_full.then_some(Finish::Length))
    }

    /// Takes a text out of the cache; a job whose last text it was is done.
    fn end(&mut self, member: Member, finish: Finish) -> Text {
        self.cache.release(member.table);
        let prompt = self.jobs[&member.job].prompt.len();
        if !self.running.iter().any(|other| other.job == member.job) {
            self.promised.remove(&member.job);
            self.jobs.remove(&member.job);
        }
        let tokens = member.tokens[prompt..].to_vec();
        Text { text: member.text, tokens, logprobs: member.logprobs, top_logprobs: member.top_logprobs, finish }
    }
}

impl Event {
    fn new(job: usize, member: usize) -> Self {
        Self { job, member, token: None, logprob: 0.0, piece: String::new(), finished: None }
    }
}

impl Member {
    /// What was held back, since nothing more comes.
    fn flush(&mut self) -> String {
        let (mut piece, ended) = self.stop.push(&self.decoder.finish());
        if !ended {
            piece.push_str(&self.stop.finish());
        }
        self.text.push_str(&piece);
        piece
    }
}

/// Blocks that a job may come to need: its members share what is whole of the prompt.
fn blocks_of(job: &Job) -> usize {
    let shared = job.prompt.len() / crate::model::paged::BLOCK_POSITIONS;
    shared + job.members * (blocks_for(job.prompt.len() + job.max_tokens) - shared)
}

/// The most likely tokens, the best first, with their log-probabilities.
fn most_likely(logits: &[f32], count: usize, factor: f32, lse: f32) -> Vec<(u32, f32)> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let best = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let count = count.min(ids.len());
    if count < ids.len() {
        ids.select_nth_unstable_by(count, best);
        ids.truncate(count);
    }
    ids.sort_unstable_by(best);
    ids.into_iter().map(|id| (id, logits[id as usize] * factor - lse)).collect()
}
