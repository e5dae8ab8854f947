//! `Model:generate` and `Model:complete`: prompts and options of a script become jobs of the scheduler. The rules and the
//! scheduling are engine/infer's; what comes back is rollouts.rs's.

use super::call::{Answer, Call, Failed, as_integer, as_tensor, describe};
use super::conversations::{self, plain_json, tools};
use super::globals::take_counters;
use super::model::ModelObject;
use super::options::Options;
use super::progress::{Screen, short};
use super::replay::must_end;
use super::rollouts::{Origin, Rollouts};
use super::tokenizer::{TokenizerObject, token_ids};
use super::work::Work;
use crate::data::chat_template::Rendering;
use crate::data::tokenizer::Specials;
use crate::error::{Error, Result};
use crate::infer::generate::{generate, generate_text};
use crate::infer::sampler::Rules;
use crate::infer::scheduler::{Event, Job};
use crate::kernels::random::Stream;
use mlua::{Table, Value};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Options of one text.
const TEXT_OPTIONS: [&str; 12] = [
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_ids",
];

/// Options of `generate` beside those of one text.
const GROUP_OPTIONS: [&str; 4] = ["n", "together", "top_logprobs", "tools"];

/// Tokens of a text unless told otherwise.
const MAX_TOKENS: usize = 128;

/// `model:complete(prompt, options)`: the text that follows the prompt.
pub fn complete(call: &Call) -> Answer {
    let this = call.subject::<ModelObject>()?.clone();
    let options = call.options(1, &TEXT_OPTIONS)?;
    let tokenizer = tokenizer_of(call, &this)?;
    let prompt = tokenizer.tokenizer.encode(&call.string(0)?, Specials::Recognise);
    let job = Job { prompt: signed(&prompt), seed: seeds(call, &options, 1)?[0], ..job(call, &options, &this)? };
    let mut show = |_: &str| go_on(call);
    let text = generate_text(&this.model, &tokenizer.tokenizer, job, &mut show);
    match must_end(call.lua) {
        Some(error) => Err(error.into()),
        None => {
            let text = text?;
            count_work(call, &this, prompt.len(), &[text.tokens.len()]);
            call.give(text.text)
        }
    }
}

/// `model:generate(prompts, options)`: rollouts of every prompt.
pub fn generate_all(call: &Call) -> Answer {
    let this = call.subject::<ModelObject>()?.clone();
    let known: Vec<&str> = TEXT_OPTIONS.into_iter().chain(GROUP_OPTIONS).collect();
    let options = call.options(1, &known)?;
    let prompts = call.list(0, PROMPTS, &call.table(0)?)?;
    let members = options.count("n", 1)?.unwrap_or(1);
    let tools = tools(call, &options.value("tools")?)?;
    let pattern = Job { members, top_logprobs: options.count("top_logprobs", 0)?.unwrap_or(0), ..job(call, &options, &this)? };
    let seeds = seeds(call, &options, prompts.len())?;
    let (mut jobs, mut records) = (Vec::new(), Vec::new());
    for (index, (prompt, seed)) in prompts.iter().zip(seeds).enumerate() {
        let (ids, is_chat) = prompt_ids(call, &this, prompt, index, &tools)?;
        let mut job = Job { prompt: signed(&ids), seed, ..pattern.clone() };
        if is_chat && options.value("stop_ids")?.is_nil() {
            // A turn ends with the turn, also where a base model's files know only the end of a document.
            let turn = this.tokenizer.as_ref().and_then(|object| object.tokenizer.im_end());
            job.stop_ids.extend(turn.filter(|id| !pattern.stop_ids.contains(id)));
        }
        jobs.push(job);
        records.push(prompt.clone());
    }
    let origins: Vec<Arc<[i32]>> = jobs.iter().map(|job| job.prompt.clone().into()).collect();
    let mut shown = Shown::new(call, jobs.len() * members);
    let mut watch = |event: Option<&Event>| {
        event.into_iter().for_each(|event| shown.see(event));
        go_on(call)
    };
    let tokenizer = this.tokenizer.as_ref().map(|object| &*object.tokenizer);
    let texts = generate(&this.model, tokenizer, jobs, options.count("together", 1)?, &mut watch);
    if let Some(error) = must_end(call.lua) {
        return Err(error.into());
    }
    let texts = texts?;
    for (prompt, texts) in origins.iter().zip(&texts) {
        count_work(call, &this, prompt.len(), &texts.iter().map(|text| text.tokens.len()).collect::<Vec<_>>());
    }
    let origin = |record: &Value, prompt: &Arc<[i32]>| Origin { record: record.clone(), prompt: prompt.clone() };
    let origins = records.iter().zip(&origins).map(|(record, prompt)| origin(record, prompt));
    call.give(Rollouts::new(call.lua, origins.zip(texts).collect())?)
}

/// A long generation's own progress: a loop's says nothing until its step ends.
struct Shown {
    screen: Option<Screen>,
    texts: usize,
    ended: usize,
    tokens: usize,
    started: Instant,
    /// How long after `started` the next line is due, and the one after it.
    due: Duration,
    pause: Duration,
}

/// Before the first line, and most seconds between two.
const FIRST_LINE: Duration = Duration::from_secs(10);
const PAUSE_MAX: Duration = Duration::from_secs(60);

impl Shown {
    fn new(call: &Call, texts: usize) -> Self {
        let screen = call.lua.app_data_ref::<Screen>().map(|screen| screen.clone());
        Self { screen, texts, ended: 0, tokens: 0, started: Instant::now(), due: FIRST_LINE, pause: FIRST_LINE }
    }

    fn see(&mut self, event: &Event) {
        self.tokens += usize::from(event.token.is_some());
        self.ended += usize::from(event.finished.is_some());
        if let (Some(line), Some(screen)) = (self.line(self.started.elapsed()), &self.screen) {
            screen.note(&line);
        }
    }

    /// What is to be shown after `elapsed`, if a line is due.
    fn line(&mut self, elapsed: Duration) -> Option<String> {
        if elapsed < self.due || self.ended == self.texts {
            return None;
        }
        self.pause = (self.pause * 3 / 2).min(PAUSE_MAX);
        self.due = elapsed + self.pause;
        let (count, rate) = (short(self.tokens as f64), short(self.tokens as f64 / elapsed.as_secs_f64()));
        Some(format!("  generating: {} of {} texts ended, {count} tokens, {rate} tokens/s", self.ended, self.texts))
    }
}

const PROMPTS: &str = "a list of prompts, each a text, a list of messages, a record with `prompt` or `messages`, or a list of token ids";
const PROMPT: &str = "a text, a list of messages, a record with `prompt` or `messages`, or a list of token ids";

/// In a loop the wish to stop waits for the boundary: half a generation must not reach what is recorded.
fn go_on(call: &Call) -> Result<()> {
    if must_end(call.lua).is_some() { Err(Error::Interrupted) } else { Ok(()) }
}

fn tokenizer_of<'a>(call: &Call, this: &'a ModelObject) -> Failed<&'a TokenizerObject> {
    let expected = "a model with a tokenizer; give one with the option `tokenizer` where the model is made";
    this.tokenizer.as_ref().ok_or_else(|| Error::argument(call.op, "self", expected, "a model without").into())
}

fn signed(ids: &[u32]) -> Vec<i32> {
    ids.iter().map(|id| *id as i32).collect()
}

/// What the options say of each text; prompt and seed are still missing.
fn job(call: &Call, options: &Options, this: &ModelObject) -> Failed<Job> {
    let rules = Rules {
        temperature: options.number("temperature")?.unwrap_or(1.0),
        top_k: options.count("top_k", 0)?.unwrap_or(0),
        top_p: options.number("top_p")?.unwrap_or(1.0),
        min_p: options.number("min_p")?.unwrap_or(0.0),
        repetition_penalty: options.number("repetition_penalty")?.unwrap_or(1.0),
        presence_penalty: options.number("presence_penalty")?.unwrap_or(0.0),
        frequency_penalty: options.number("frequency_penalty")?.unwrap_or(0.0),
    };
    rules.check()?;
    let stop_ids = match options.value("stop_ids")? {
        Value::Nil => this.stop_ids(),
        value => token_ids(call, 1, &value)?,
    };
    Ok(Job {
        bias: bias(call, options)?,
        stop_ids,
        stops: options.strings("stop")?.unwrap_or_default(),
        ..Job::new(vec![], options.count("max_tokens", 0)?.unwrap_or(MAX_TOKENS), rules, 0)
    })
}

/// `logit_bias`: a table of numbers by token id.
fn bias(call: &Call, options: &Options) -> Failed<Vec<(u32, f64)>> {
    let Some(table) = options.table("logit_bias")? else { return Ok(Vec::new()) };
    let mut bias = Vec::new();
    for pair in table.pairs::<Value, Value>() {
        let (id, by) = pair?;
        let by = match by {
            Value::Integer(by) => Some(by as f64),
            Value::Number(by) => Some(by),
            _ => None,
        };
        let id = as_integer(&id).and_then(|id| u32::try_from(id).ok());
        let Some(entry) = id.zip(by) else {
            return Err(Error::argument(call.op, "logit_bias", "numbers by token id, such as { [5] = -2.0 }", "another entry").into());
        };
        bias.push(entry);
    }
    bias.sort_by_key(|(id, _)| *id);
    Ok(bias)
}

/// A seed for each prompt. Without the option each generation of a run draws its own, the same when the run is run again.
fn seeds(call: &Call, options: &Options, count: usize) -> Failed<Vec<u64>> {
    let (stream, first) = match options.integer("seed")? {
        Some(seed) => (Stream::new(seed as u64, "prompts"), 0),
        None => take_counters(call.lua, count as u64),
    };
    Ok((0..count as u64).map(|index| stream.bits(first + index)).collect())
}

/// The ids of prompt `index` of the list, and whether it is a conversation.
fn prompt_ids(call: &Call, this: &ModelObject, prompt: &Value, index: usize, tools: &[serde_json::Value]) -> Failed<(Vec<u32>, bool)> {
    let wrong = |got: String| Error::argument(call.op, format!("prompts[{}]", index + 1), PROMPT, got);
    let mut is_chat = false;
    let mut chat = |messages, tools: &[serde_json::Value]| {
        is_chat = true;
        chat_ids(call, this, messages, tools)
    };
    let ids = match prompt {
        Value::String(_) => text_ids(call, this, prompt)?,
        Value::Table(table) => match (table.raw_get::<Value>("messages")?, table.raw_get::<Value>("prompt")?) {
            (Value::Table(messages), _) | (Value::Nil, Value::Table(messages)) => {
                let own = match table.raw_get::<Value>("tools")? {
                    Value::Nil => None,
                    own => Some(conversations::tools(call, &own)?),
                };
                chat(messages, own.as_deref().unwrap_or(tools))?
            }
            (Value::Nil, text @ Value::String(_)) => text_ids(call, this, &text)?,
            (Value::Nil, Value::Nil) if matches!(table.raw_get::<Value>(1)?, Value::Table(_)) => chat(table.clone(), tools)?,
            (Value::Nil, Value::Nil) if as_integer(&table.raw_get::<Value>(1)?).is_some() => token_ids(call, 0, prompt)?,
            (Value::Nil, Value::Nil) => return Err(wrong(names_of(table).unwrap_or_else(|| describe(prompt))).into()),
            (Value::Nil, other) | (other, _) => return Err(wrong(format!("a record whose prompt is {}", describe(&other))).into()),
        },
        tensor if as_tensor(tensor).is_some() => token_ids(call, 0, tensor)?,
        other => return Err(wrong(describe(other)).into()),
    };
    if ids.is_empty() {
        return Err(wrong("a prompt without tokens".into()).into());
    }
    Ok((ids, is_chat))
}

/// What a record has in place of a prompt; none without any name.
fn names_of(table: &Table) -> Option<String> {
    let mut names: Vec<String> = table.pairs::<String, Value>().filter_map(|pair| Some(pair.ok()?.0)).collect();
    names.sort();
    names.truncate(8);
    (!names.is_empty()).then(|| format!("a record with only {}", names.join(", ")))
}

fn text_ids(call: &Call, this: &ModelObject, text: &Value) -> Failed<Vec<u32>> {
    let text = text.as_string().and_then(|text| Some(text.to_str().ok()?.to_string()));
    let text = text.ok_or_else(|| Error::argument(call.op, "prompts", super::call::NOT_UTF8.0, super::call::NOT_UTF8.1))?;
    Ok(tokenizer_of(call, this)?.tokenizer.encode(&text, Specials::Recognise))
}

/// A conversation up to the beginning of the assistant's turn. What a message says never becomes a control token.
fn chat_ids(call: &Call, this: &ModelObject, messages: Table, tools: &[serde_json::Value]) -> Failed<Vec<u32>> {
    let object = tokenizer_of(call, this)?;
    let rendering = Rendering { add_generation_prompt: true, tools: tools.to_vec(), ..Rendering::default() };
    let messages = json_list(call, messages)?;
    Ok(object.template.tokens(&object.tokenizer, &messages, &rendering, Specials::Plain)?.ids)
}

fn json_list(call: &Call, list: Table) -> Failed<Vec<serde_json::Value>> {
    let wrong = |got: String| Error::argument(call.op, "messages", "a list of tables, each with a role and a content", got);
    match plain_json(&Value::Table(list.clone())).map_err(wrong)? {
        serde_json::Value::Array(entries) => Ok(entries),
        serde_json::Value::Object(none) if none.is_empty() => Ok(Vec::new()),
        _ => Err(wrong(describe(&Value::Table(list))).into()),
    }
}

/// Counts what was computed: each text went through the model once, the prompt of a group once.
fn count_work(call: &Call, this: &ModelObject, prompt: usize, outputs: &[usize]) {
    if let Some(work) = call.lua.app_data_ref::<Arc<Work>>() {
        work.generation(&this.model, prompt, outputs);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_generations_say_how_far_they_are() {
        let (started, screen) = (Instant::now(), None);
        let mut shown = Shown { screen, texts: 8, ended: 2, tokens: 2400, started, due: FIRST_LINE, pause: FIRST_LINE };
        let mut line = |seconds| shown.line(Duration::from_secs(seconds));
        assert_eq!(line(9), None);
        assert_eq!(line(12).unwrap(), "  generating: 2 of 8 texts ended, 2.4k tokens, 200.0 tokens/s");
        assert_eq!((line(26), line(27).is_some()), (None, true));
        let lines = (28..3600).filter(|second| line(*second).is_some()).count();
        assert!((58..=61).contains(&lines), "about one a minute, got {lines} in an hour");
        shown.ended = 8;
        assert_eq!(shown.line(Duration::from_secs(9999)), None);
    }
}
