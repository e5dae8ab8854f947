//! A model's chat template: conversations to text, as transformers' `apply_chat_template` renders them.
//! Not the ids: `chat_tokens.rs` turns a rendering into ids and a loss mask. Source: transformers' template environment
//! (trim_blocks, lstrip_blocks, its `tojson`), and Qwen2.5-Instruct's turns for the template shipped here.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value};

use super::template_python::{method, strftime, tojson};
use super::tokenizer_files::read_json;
use crate::error::{Error, Result};

/// The template used when a model's folder has none.
pub const QWEN2_5_TEMPLATE: &str = include_str!("qwen2_5.jinja");

const OP: &str = "chat_template";

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    /// `eos_token` and its kin, which templates may name.
    tokens: Map<String, Value>,
}

/// How to render a conversation.
#[derive(Debug, Clone, Default)]
pub struct Rendering {
    /// Descriptions of tools, each a table as the model's documentation gives it.
    pub tools: Vec<Value>,
    /// Ends with the beginning of an assistant's turn, for generation.
    pub add_generation_prompt: bool,
    /// A call's `arguments` that are a string stay one, and the template quotes it again, as transformers does. By default
    /// the string is read as JSON first, which is what models were trained on.
    pub keep_string_arguments: bool,
    /// Further variables that the template may read.
    pub variables: Map<String, Value>,
    /// The time, in seconds from 1970 UTC, that `strftime_now` shows; the clock's by default.
    pub now_unix_s: Option<i64>,
}

impl Default for ChatTemplate {
    /// The template of Qwen2.5-Instruct, in our own words.
    fn default() -> Self {
        Self::new(QWEN2_5_TEMPLATE, Path::new("qwen2_5.jinja")).expect("the shipped template compiles")
    }
}

impl ChatTemplate {
    /// Compiles `source`; `path` is only named in errors.
    ///
    /// Errors: [`Error::Format`] with the line for a template that does not compile.
    pub fn new(source: &str, path: &Path) -> Result<Self> {
        // minijinja asks for a feature name of its next version; serde values work in this one without it.
        #[allow(deprecated)]
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.add_filter("tojson", |value: minijinja::Value, options| tojson(&value, options));
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |state: &minijinja::State, format: String| {
            let given = state.lookup("now_unix_s").and_then(|value| value.as_i64());
            let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs() as i64);
            strftime(&format, given.unwrap_or_else(clock))
        });
        environment.set_unknown_method_callback(method);
        environment.add_template_owned("chat", without_generation_marks(source)).map_err(|error| {
            let place = error.line().map_or_else(|| "template".to_string(), |line| format!("line {line}"));
            Error::format(path, place, "a Jinja chat template", error.to_string())
        })?;
        Ok(Self { source: source.to_string(), environment, tokens: Map::new() })
    }

    /// The template of a model folder: chat_template.jinja, else tokenizer_config.json's `chat_template`, else the shipped one.
    ///
    /// Errors: [`Error::Io`] and [`Error::Format`] for a damaged file; no file at all is not an error.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let (jinja_path, config_path) = (folder.join("chat_template.jinja"), folder.join("tokenizer_config.json"));
        let config = if config_path.exists() { read_json(&config_path)? } else { Value::Null };
        let mut template = if jinja_path.exists() {
            let source = std::fs::read_to_string(&jinja_path).map_err(|source| Error::io(&jinja_path, "read the chat template", source))?;
            Self::new(&source, &jinja_path)?
        } else {
            match &config["chat_template"] {
                Value::Null => Self::default(),
                Value::String(source) => Self::new(source, &config_path)?,
                // Some models ship several, by name; "default" is the one for conversations.
                Value::Array(named) => {
                    let default = named.iter().find(|entry| entry["name"] == "default").and_then(|entry| entry["template"].as_str());
                    let found = || Error::format(&config_path, "chat_template", "one named \"default\"", format!("{} others", named.len()));
                    Self::new(default.ok_or_else(found)?, &config_path)?
                }
                other => return Err(Error::format(&config_path, "chat_template", "a template's text", other.to_string())),
            }
        };
        for key in ["bos_token", "eos_token", "pad_token", "unk_token"] {
            let text = config[key].as_str().or_else(|| config[key]["content"].as_str());
            if let Some(text) = text {
                template.tokens.insert(key.to_string(), text.into());
            }
        }
        Ok(template)
    }

    /// The template's text, for saving beside a model.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation.
    ///
    /// - `messages`: tables with a `role` and what the template reads, mostly `content` and `tool_calls`
    ///
    /// Errors: [`Error::Argument`] for no messages, a message without a role, call arguments that are not JSON, and whatever
    /// the template itself refuses.
    pub fn render(&self, messages: &[Value], rendering: &Rendering) -> Result<String> {
        let messages = self.checked(messages, rendering)?;
        self.render_checked(&messages, rendering)
    }

    /// `messages`, found sound, with each call's arguments read from their JSON.
    pub(super) fn checked(&self, messages: &[Value], rendering: &Rendering) -> Result<Vec<Value>> {
        if messages.is_empty() {
            return Err(Error::argument(OP, "messages", "at least one message", "none"));
        }
        let mut messages = messages.to_vec();
        for (index, message) in messages.iter_mut().enumerate() {
            if !message.get("role").is_some_and(Value::is_string) {
                return Err(Error::argument(OP, format!("messages[{index}]"), "a table with a role", &message));
            }
            let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
            for call in calls.into_iter().flatten().filter(|_| !rendering.keep_string_arguments) {
                let call = if call.get("function").is_some() { &mut call["function"] } else { call };
                if let Some(Value::String(text)) = call.get("arguments") {
                    let wrong = |error: serde_json::Error| {
                        let arg = format!("messages[{index}].tool_calls arguments");
                        Error::argument(OP, arg, "JSON", format!("{text:?} ({error})"))
                    };
                    call["arguments"] = serde_json::from_str(text).map_err(wrong)?;
                }
            }
        }
        Ok(messages)
    }

    pub(super) fn render_checked(&self, messages: &[Value], rendering: &Rendering) -> Result<String> {
        let mut context = self.tokens.clone();
        context.extend(rendering.variables.clone());
        context.insert("messages".into(), messages.into());
        // Templates ask `if tools`: transformers gives none, not an empty list.
        context.insert("tools".into(), if rendering.tools.is_empty() { Value::Null } else { rendering.tools.clone().into() });
        context.insert("add_generation_prompt".into(), rendering.add_generation_prompt.into());
        context.insert("now_unix_s".into(), rendering.now_unix_s.into());
        let template = self.environment.get_template("chat").expect("`new` added it");
        template.render(minijinja::Value::from_serialize(&context)).map_err(|error| {
            // What a template stumbles over in its own words is mostly this.
            let is_bare = |message: &Value| ["content", "tool_calls"].iter().all(|key| message.get(key).is_none_or(Value::is_null));
            if let Some(index) = messages.iter().position(is_bare) {
                let expected = "a table with a content, or with tool_calls";
                return Error::argument(OP, format!("messages[{index}]"), expected, &messages[index]);
            }
            let line = error.line().map_or_else(String::new, |line| format!(" (template line {line})"));
            let message = error.detail().map_or_else(|| error.to_string(), str::to_string);
            Error::argument(OP, "messages", "a conversation that the template accepts", message + &line)
        })
    }
}

/// Rewrites the `{% generation %}` blocks, with which some trainers mark an assistant's text, as blocks without effect.
fn without_generation_marks(source: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start..start + length];
        let word = tag[2..].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(&rest[..start]);
        out.push_str(&match word {
            "generation" => tag.replacen("generation", "if true", 1),
            "endgeneration" => tag.replacen("endgeneration", "endif", 1),
            _ => tag.to_string(),
        });
        rest = &rest[start + length..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, messages: Value) -> Result<String> {
        let template = ChatTemplate::new(source, Path::new("t.jinja"))?;
        template.render(messages.as_array().unwrap(), &Rendering { now_unix_s: Some(0), ..Rendering::default() })
    }

    #[test]
    fn templates_find_the_python_they_use() {
        let check = |expression: &str, expected: &str| {
            let messages = json!([{ "role": "user", "content": " a,b,c ", "t": { "k": 1, "z": null } }]);
            let source = format!("{{%- set m = messages[0] %}}{{{{ {expression} }}}}");
            assert_eq!(render(&source, messages).unwrap(), expected, "{expression}");
        };
        check("m.content.strip() + '|' + m.content.lstrip() + '|' + m.content.rstrip(' c')", "a,b,c|a,b,c | a,b,");
        check("m.content.split(',')[-1]", "c ");
        check("m.content.split(',', 1)[1]", "b,c ");
        check("m.content.rsplit(',', 1)[0]", " a,b");
        check("m.content.split() | length", "1");
        check("m.content.startswith(' a') and not m.content.endswith(('b', 'c'))", "True");
        check("'hello wORLD'.title() + 'aB'.upper() + 'aB'.lower() + 'aB'.capitalize()", "Hello WorldABabAb");
        check("m.content.replace(',', ';').find('b')", "3");
        check("m.t.get('k') ~ m.t.get('none', 'd') ~ m.t.keys() | length", "1d2");
        check("m.t.items() | length", "2");
        check("m | tojson", r#"{"role": "user", "content": " a,b,c ", "t": {"k": 1, "z": null}}"#);
        check("'é' | tojson(ensure_ascii=true)", r#""\u00e9""#);
        check("strftime_now('%d %b %Y')", "01 Jan 1970");
    }

    #[test]
    fn generation_marks_and_loop_controls_are_understood() {
        let source = "{%- for m in messages -%}{% if m.role == 'x' %}{% break %}{% endif %}{%- generation -%} {{ m.content }} {%- endgeneration -%}{%- endfor -%}";
        let messages = json!([{ "role": "user", "content": "a" }, { "role": "x" }, { "role": "user", "content": "b" }]);
        assert_eq!(render(source, messages).unwrap(), "a");
    }

    #[test]
    fn refusals_say_what_was_wrong() {
        let check = |messages: Value, says: &str| {
            let error = ChatTemplate::default().render(messages.as_array().unwrap(), &Rendering::default()).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        check(json!([]), "at least one message");
        check(json!([{ "content": "x" }]), "messages[0]");
        check(json!(["hello"]), "a table with a role");
        check(json!([{ "role": "wizard", "content": "x" }]), "got wizard");
        check(json!([{ "role": "user", "content": null }]), "messages[0]` should be a table with a content");
        check(json!([{ "role": "assistant", "tool_calls": [{ "name": "f", "arguments": "{" }] }]), "messages[0].tool_calls");
        let error = render("{% if %}", json!([{ "role": "user" }])).unwrap_err().to_string();
        assert!(error.contains("t.jinja: line 1"), "{error}");
    }

    #[test]
    fn a_folder_gives_its_own_template_or_the_shipped_one() {
        let folder = tempfile::tempdir().unwrap();
        let source = || ChatTemplate::from_folder(folder.path()).map(|template| template.source().to_string());
        assert_eq!(source().unwrap(), QWEN2_5_TEMPLATE);
        let config = |value: Value| std::fs::write(folder.path().join("tokenizer_config.json"), value.to_string()).unwrap();
        config(json!({ "chat_template": [{ "name": "default", "template": "{{ eos_token }}" }], "eos_token": { "content": "E" } }));
        let template = ChatTemplate::from_folder(folder.path()).unwrap();
        assert_eq!(template.render(&[json!({ "role": "user" })], &Rendering::default()).unwrap(), "E");
        config(json!({ "chat_template": 3 }));
        assert!(source().unwrap_err().to_string().contains("chat_template"));
        std::fs::write(folder.path().join("chat_template.jinja"), "x").unwrap();
        assert_eq!(source().unwrap(), "x");
    }
}
