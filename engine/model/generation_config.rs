//! `generation_config.json`: where text ends and how it is sampled when a script does not say. Samples nothing itself.
//! Source: qwen2.5.md section 3.6; trap 26: for stop ids this file wins over config.json.

use super::fields::{Fields, parse_object};
use crate::checkpoint::folder::read_text;
use crate::error::Result;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The file's values; what it leaves out is `None`, or off.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    pub bos: Option<u32>,
    /// Ids after which a text ends; any of them does.
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
    /// false: the most likely token each time, and the next four fields are without effect.
    pub do_sample: bool,
    /// 0 means the most likely token each time.
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    /// 0 switches it off.
    pub top_k: Option<usize>,
    pub min_p: Option<f64>,
    /// 1 switches it off. Acts in greedy decoding too.
    pub repetition_penalty: Option<f64>,
    pub max_new_tokens: Option<usize>,
    /// The object this was read from, so that writing keeps the keys not known here.
    pub source: Map<String, Value>,
}

impl GenerationConfig {
    /// Reads the file of a checkpoint folder; `None` if there is none. Errors: as [`Self::parse`]; `Error::Io`.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("generation_config.json");
        if !path.exists() {
            return Ok(None);
        }
        Self::parse(&path, &read_text(&path)?).map(Some)
    }

    /// Reads the text of the file; `path` is for messages. Errors: `Error::Format` with the key.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let source = parse_object(path, text)?;
        let fields = Fields { path, prefix: "", object: &source };
        let config = Self {
            bos: fields.token("bos_token_id")?,
            eos: fields.tokens("eos_token_id")?,
            pad: fields.token("pad_token_id")?,
            do_sample: fields.flag("do_sample", false)?,
            temperature: fields.optional_number("temperature", 0.0..=1e6)?,
            top_p: fields.optional_number("top_p", 0.0..=1.0)?,
            top_k: fields.optional_count("top_k", 0..=1 << 30)?,
            min_p: fields.optional_number("min_p", 0.0..=1.0)?,
            repetition_penalty: fields.optional_number("repetition_penalty", 1e-6..=1e6)?,
            max_new_tokens: fields.optional_count("max_new_tokens", 1..=1 << 30)?,
            source: Map::new(),
        };
        Ok(Self { source, ..config })
    }

    /// The file's JSON: `source` with every key known here set anew, and those that are `None` left out.
    pub fn to_json(&self) -> Value {
        let mut object = self.source.clone();
        let eos = if let [one] = self.eos[..] { json!(one) } else { json!((!self.eos.is_empty()).then_some(&self.eos)) };
        for (key, value) in [
            ("bos_token_id", json!(self.bos)),
            ("eos_token_id", eos),
            ("pad_token_id", json!(self.pad)),
            ("do_sample", if self.do_sample { json!(true) } else { Value::Null }),
            ("temperature", json!(self.temperature)),
            ("top_p", json!(self.top_p)),
            ("top_k", json!(self.top_k)),
            ("min_p", json!(self.min_p)),
            ("repetition_penalty", json!(self.repetition_penalty)),
            ("max_new_tokens", json!(self.max_new_tokens)),
        ] {
            if value.is_null() {
                object.shift_remove(key);
            } else {
                object.insert(key.to_owned(), value);
            }
        }
        Value::Object(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GenerationConfig> {
        GenerationConfig::parse(Path::new("generation_config.json"), text)
    }

    #[test]
    fn the_golden_file_reads_and_writes_back() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dense_tied");
        let config = GenerationConfig::load(&folder).unwrap().unwrap();
        assert_eq!((config.bos, &config.eos[..], config.pad, config.do_sample), (Some(1), &[2, 1][..], Some(1), true));
        assert_eq!((config.temperature, config.top_p, config.top_k, config.min_p), (Some(0.7), Some(0.8), Some(20), None));
        assert_eq!((config.repetition_penalty, config.max_new_tokens), (Some(1.05), None));
        let text = std::fs::read_to_string(folder.join("generation_config.json")).unwrap();
        assert_eq!(config.to_json(), serde_json::from_str::<Value>(&text).unwrap());
    }

    #[test]
    fn the_base_form_and_an_absent_file_read() {
        let base = parse(r#"{"eos_token_id": 151643, "do_sample": false, "max_new_tokens": 2048}"#).unwrap();
        assert_eq!((&base.eos[..], base.do_sample, base.max_new_tokens), (&[151_643][..], false, Some(2048)));
        assert_eq!(parse(&base.to_json().to_string()).unwrap().eos, base.eos);
        assert_eq!(parse("{}").unwrap(), GenerationConfig::default());
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::load(empty.path()).unwrap(), None);
    }

    #[test]
    fn values_that_cannot_be_meant_are_refused() {
        for (text, wanted) in [
            (r#"{"temperature": -0.7}"#, "temperature: expected a number from 0 to 1000000, found -0.7"),
            (r#"{"temperature": "0.7"}"#, "found \"0.7\""),
            (r#"{"top_p": 1.5}"#, "top_p"),
            (r#"{"top_k": -1}"#, "top_k"),
            (r#"{"min_p": -0.1}"#, "min_p"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
            (r#"{"max_new_tokens": 0}"#, "max_new_tokens"),
            (r#"{"do_sample": 1}"#, "do_sample"),
            (r#"{"eos_token_id": "end"}"#, "eos_token_id"),
            (r#"{"eos_token_id": [1, null]}"#, "eos_token_id"),
            ("[1]", "a JSON object"),
        ] {
            let message = parse(text).expect_err(wanted).to_string();
            assert!(message.contains("generation_config.json") && message.contains(wanted), "{message}\nlacks {wanted}");
        }
    }
}
