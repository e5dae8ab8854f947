//! What a record says: a conversation, a pair of answers to one prompt, or a prompt; and its documents with their masks.
//! Not the template (`chat_template.rs`) and not the search for turns (`chat_tokens.rs`). Field names are those of common
//! data sets: `messages`, `conversations` (from and value), `prompt` with `completion`, `chosen` and `rejected`, `tools`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::chat_template::{ChatTemplate, Rendering};
use super::chat_tokens::ChatTokens;
use super::jsonl::{Record, kind};
use super::pack::Document;
use super::tokenizer::{Specials, Tokenizer};
use crate::error::{Error, Result};

const OP: &str = "conversation";

/// What records are read as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// One document a record.
    Conversations,
    /// Two documents a record: the chosen answer and the rejected one, each behind the prompt.
    Pairs,
    /// Records stay records; those with too long a prompt are left out.
    Prompts,
}

/// Which of the assistant's turns are learned, of those behind the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learn {
    #[default]
    All,
    Last,
}

/// What to do about a document of more than the most tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Long {
    /// Keep its beginning, and count it; if nothing learned is in that, leave the record out.
    #[default]
    Cut,
    /// Leave the record out, and count it.
    Skip,
    /// Stop with an error.
    Error,
}

/// How records become documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    pub form: Form,
    pub learn: Learn,
    /// Most tokens of a document, or of a prompt.
    pub max_tokens: Option<usize>,
    pub long: Long,
}

impl Rules {
    pub fn new(form: Form) -> Self {
        Self { form, learn: Learn::All, max_tokens: None, long: Long::Cut }
    }
}

/// The documents of a record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Made {
    /// None if the record is left out because it is too long.
    pub documents: Vec<Document>,
    /// How many of them were cut.
    pub cut: u64,
}

/// A conversation, of which the first messages may be given: those the model only reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    pub messages: Vec<Value>,
    pub tools: Vec<Value>,
    /// Messages at the front that are never learned.
    pub given: usize,
}

impl Conversation {
    /// The conversation of a record with `messages`, `conversations`, or `prompt` and `completion`.
    ///
    /// Errors: [`Error::Argument`] that names the field and what is wrong with it.
    pub fn of(record: &Record) -> Result<Self> {
        if let (Some(prompt), Some(completion)) = (present(record, "prompt"), present(record, "completion")) {
            let prompt = messages("prompt", prompt, "user")?;
            return Ok(answered(prompt, messages("completion", completion, "assistant")?, tools(record)?));
        }
        let field = ["messages", "conversations"].into_iter().find(|field| present(record, field).is_some());
        let Some(field) = field else {
            return Err(missing(record, "messages", "messages, conversations, or prompt and completion"));
        };
        Ok(Self { messages: list_of_messages(field, &record[field])?, tools: tools(record)?, given: 0 })
    }

    /// The chosen and the rejected conversation of a record with `chosen` and `rejected`. Without `prompt`, both are whole
    /// conversations, and what they begin with alike is the prompt.
    ///
    /// Errors: [`Error::Argument`] that names the field and what is wrong with it.
    pub fn pair_of(record: &Record) -> Result<[Self; 2]> {
        let (Some(chosen), Some(rejected)) = (present(record, "chosen"), present(record, "rejected")) else {
            return Err(missing(record, "chosen", "chosen and rejected"));
        };
        let tools = tools(record)?;
        if let Some(prompt) = present(record, "prompt") {
            let prompt = messages("prompt", prompt, "user")?;
            let answer = |field, value| -> Result<Self> {
                let mut answer = messages(field, value, "assistant")?;
                // Some data sets repeat the prompt in front of each answer.
                if answer.len() > prompt.len() && answer[..prompt.len()] == prompt[..] {
                    answer.drain(..prompt.len());
                }
                Ok(answered(prompt.clone(), answer, tools.clone()))
            };
            return Ok([answer("chosen", chosen)?, answer("rejected", rejected)?]);
        }
        let (chosen, rejected) = (list_of_messages("chosen", chosen)?, list_of_messages("rejected", rejected)?);
        let given = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
        if given == 0 || given == chosen.len().min(rejected.len()) {
            let got = format!("the same {given} messages at the front of {} and {}", chosen.len(), rejected.len());
            return Err(Error::argument(OP, "chosen", "a conversation that begins as `rejected` does and ends otherwise", got));
        }
        Ok([chosen, rejected].map(|messages| Self { messages, tools: tools.clone(), given }))
    }

    /// The prompt of a record with `prompt`, `messages` or `conversations`.
    ///
    /// Errors: [`Error::Argument`] that names the field and what is wrong with it.
    pub fn prompt_of(record: &Record) -> Result<Self> {
        let messages = match present(record, "prompt") {
            Some(prompt) => messages("prompt", prompt, "user")?,
            None => {
                let field = ["messages", "conversations"].into_iter().find(|field| present(record, field).is_some());
                let field = field.ok_or_else(|| missing(record, "prompt", "prompt, messages or conversations"))?;
                list_of_messages(field, &record[field])?
            }
        };
        Ok(Self { given: messages.len(), messages, tools: tools(record)? })
    }

    /// Its ids, and the mask of what `learn` says, behind the given messages.
    ///
    /// Errors: those of [`ChatTemplate::tokens`]; [`Error::Unsupported`] for a template that does not give each assistant's
    /// message a turn, where it matters which; [`Error::Argument`] if nothing is left to learn.
    pub fn tokens(&self, template: &ChatTemplate, tokenizer: &Tokenizer, learn: Learn, specials: Specials) -> Result<ChatTokens> {
        let rendering = Rendering { tools: self.tools.clone(), ..Rendering::default() };
        let mut chat = template.tokens(tokenizer, &self.messages, &rendering, specials)?;
        let by_assistant = |messages: &[Value]| messages.iter().filter(|message| message["role"] == "assistant").count();
        let (given, all, turns) = (by_assistant(&self.messages[..self.given]), by_assistant(&self.messages), chat.turns.len());
        if given > 0 && all != turns {
            return Err(Error::Unsupported {
                what: format!("a prompt with answers in it under a chat template that makes {turns} turns of {all} answers"),
                remedy: "leave the answers out of the prompt".into(),
            });
        }
        if turns == 0 && all > 0 {
            return Err(Error::Unsupported {
                what: "learning under a chat template whose answers do not begin with <|im_start|>assistant".into(),
                remedy: "give the tokenizer a template in ChatML, such as Qwen's".into(),
            });
        }
        if given >= turns {
            let roles: Vec<&str> = self.messages[self.given..].iter().filter_map(|message| message["role"].as_str()).collect();
            let got = if roles.is_empty() { "no message".into() } else { format!("only {}", roles.join(", ")) };
            return Err(Error::argument(OP, "messages", "a conversation in which the assistant answers", got));
        }
        match learn {
            Learn::All => chat.learn_only(given..turns),
            Learn::Last => chat.learn_only(turns - 1..turns),
        }
        Ok(chat)
    }
}

/// The documents that `rules` make of a record.
///
/// Errors: those of [`Conversation::of`], [`Conversation::pair_of`] and [`Conversation::tokens`]; [`Error::Argument`] for one
/// that is too long, if that is to be an error.
pub fn documents(record: &Record, rules: &Rules, template: &ChatTemplate, tokenizer: &Tokenizer, specials: Specials) -> Result<Made> {
    let conversations = match rules.form {
        Form::Conversations => vec![Conversation::of(record)?],
        Form::Pairs => Conversation::pair_of(record)?.to_vec(),
        Form::Prompts => return Err(Error::argument("data.take", "packing", "none: prompts are records", "one")),
    };
    let mut made = Made::default();
    for conversation in conversations {
        let mut chat = conversation.tokens(template, tokenizer, rules.learn, specials)?;
        match rules.max_tokens.filter(|most| chat.ids.len() > *most) {
            None => {}
            Some(_) if rules.long == Long::Skip => return Ok(Made::default()),
            Some(most) if rules.long == Long::Error => return Err(too_long(most, chat.ids.len())),
            Some(most) => {
                chat.ids.truncate(most);
                chat.supervised.truncate(most);
                made.cut += 1;
                if !chat.supervised.contains(&true) {
                    return Ok(Made::default());
                }
            }
        }
        made.documents.push(Document { tokens: chat.ids, supervised: Some(chat.supervised) });
    }
    Ok(made)
}

/// Whether the prompt of a record, up to where the answer begins, has at most `rules.max_tokens` tokens.
///
/// Errors: those of [`Conversation::prompt_of`] and of rendering; [`Error::Argument`] if too long is to be an error.
pub fn prompt_fits(record: &Record, rules: &Rules, template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<bool> {
    let prompt = Conversation::prompt_of(record)?;
    let rendering = Rendering { tools: prompt.tools, add_generation_prompt: true, ..Rendering::default() };
    let tokens = template.tokens(tokenizer, &prompt.messages, &rendering, Specials::Plain)?.ids.len();
    match rules.max_tokens.filter(|most| tokens > *most) {
        Some(most) if rules.long == Long::Error => Err(too_long(most, tokens)),
        over => Ok(over.is_none()),
    }
}

fn too_long(most: usize, tokens: usize) -> Error {
    Error::argument(OP, "max_tokens", format!("at least as many as the conversation has, {tokens}"), most)
}

/// A field that is there and not null.
fn present<'a>(record: &'a Record, field: &str) -> Option<&'a Value> {
    record.get(field).filter(|value| !value.is_null())
}

fn missing(record: &Record, field: &str, expected: &str) -> Error {
    let fields: Vec<_> = record.iter().map(|(name, value)| format!("{name}{}", if value.is_null() { " (null)" } else { "" })).collect();
    let got = if fields.is_empty() { "no field at all".into() } else { format!("only {}", fields.join(", ")) };
    Error::argument(OP, field, format!("there: a record has {expected}"), got)
}

fn answered(mut prompt: Vec<Value>, answer: Vec<Value>, tools: Vec<Value>) -> Conversation {
    let given = prompt.len();
    prompt.extend(answer);
    Conversation { messages: prompt, tools, given }
}

/// A text as one message of `role`, or a list of messages.
fn messages(field: &str, value: &Value, role: &str) -> Result<Vec<Value>> {
    match value {
        Value::String(text) => Ok(vec![json!({ "role": role, "content": text })]),
        _ => list_of_messages(field, value),
    }
}

fn list_of_messages(field: &str, value: &Value) -> Result<Vec<Value>> {
    let Value::Array(messages) = value else {
        return Err(Error::argument(OP, field, "a list of messages", kind(value)));
    };
    if messages.is_empty() {
        return Err(Error::argument(OP, field, "at least one message", "none"));
    }
    messages.iter().enumerate().map(|(index, message)| read_message(&format!("{field}[{index}]"), message)).collect()
}

/// A message with `role`, or with `from` and `value`, and a content that is text or left to its tool calls.
fn read_message(place: &str, message: &Value) -> Result<Value> {
    let wrong = |at: &str, expected: &str, got: String| Err(Error::argument(OP, format!("{place}{at}"), expected, got));
    let Value::Object(fields) = message else { return wrong("", "a message, which is an object", kind(message).into()) };
    if let (Some(from), false) = (fields.get("from"), fields.contains_key("role")) {
        return from_and_value(place, from, fields.get("value").unwrap_or(&Value::Null));
    }
    match fields.get("role") {
        Some(Value::String(_)) => {}
        other => return wrong(".role", "a string", other.map_or("nothing", kind).into()),
    }
    let calls = fields.get("tool_calls").is_some_and(|calls| calls.as_array().is_some_and(|calls| !calls.is_empty()));
    match fields.get("content") {
        Some(Value::String(_)) => Ok(message.clone()),
        None | Some(Value::Null) if calls => Ok(message.clone()),
        None | Some(Value::Null) => wrong("", "a message with a content, or with tool_calls", "neither".into()),
        Some(other) => wrong(".content", "a string", kind(other).into()),
    }
}

/// A message in the form of ShareGPT.
fn from_and_value(place: &str, from: &Value, value: &Value) -> Result<Value> {
    let Value::String(text) = value else {
        return Err(Error::argument(OP, format!("{place}.value"), "a string", kind(value)));
    };
    let role = match from.as_str() {
        Some("human" | "user") => "user",
        Some("gpt" | "assistant") => "assistant",
        Some("system") => "system",
        Some("tool" | "observation") => "tool",
        Some("function_call") => {
            let call = serde_json::from_str(text).ok().filter(Value::is_object);
            let expected = "an object in JSON with name and arguments";
            let call = call.ok_or_else(|| Error::argument(OP, format!("{place}.value"), expected, format!("{text:?}")))?;
            return Ok(json!({ "role": "assistant", "content": "", "tool_calls": [{ "type": "function", "function": call }] }));
        }
        _ => {
            let expected = "human, gpt, system, tool, observation or function_call";
            return Err(Error::argument(OP, format!("{place}.from"), expected, from));
        }
    };
    Ok(json!({ "role": role, "content": text }))
}

/// The tools of a record: a list, or its JSON.
fn tools(record: &Record) -> Result<Vec<Value>> {
    let expected = "a list of tools, or its JSON";
    match present(record, "tools") {
        None => Ok(Vec::new()),
        Some(Value::Array(tools)) => Ok(tools.clone()),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(Vec::new()),
        Some(Value::String(text)) => serde_json::from_str(text).map_err(|_| Error::argument(OP, "tools", expected, format!("{text:?}"))),
        Some(other) => Err(Error::argument(OP, "tools", expected, kind(other))),
    }
}

/// A template with the rules under which records go through it.
#[derive(Debug, Clone)]
pub(super) struct Chat {
    pub template: Arc<ChatTemplate>,
    pub rules: Rules,
}
