//! Tokenizers from and to the files that Hugging Face tools read: tokenizer.json, vocab.json with merges.txt,
//! tokenizer_config.json. Not the chat template's content. Source: the files published with Qwen2.5.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::{DecoderWrapper, ModelWrapper, NormalizerWrapper, PreTokenizer};

use super::byte_alphabet::{byte_to_char, char_to_byte};
use super::tokenizer::{AddedToken, END_OF_TEXT, IM_END, IM_START, Kind, QWEN2_SPLIT, Tokenizer};
use crate::error::{Error, Result};

/// Qwen2.5's control tokens in id order, and whether each is special. Qwen2 has the first three.
pub const QWEN2_5_CONTROL: [(&str, bool); 22] = [
    (END_OF_TEXT, true),
    (IM_START, true),
    (IM_END, true),
    ("<|object_ref_start|>", true),
    ("<|object_ref_end|>", true),
    ("<|box_start|>", true),
    ("<|box_end|>", true),
    ("<|quad_start|>", true),
    ("<|quad_end|>", true),
    ("<|vision_start|>", true),
    ("<|vision_end|>", true),
    ("<|vision_pad|>", true),
    ("<|image_pad|>", true),
    ("<|video_pad|>", true),
    ("<tool_call>", false),
    ("</tool_call>", false),
    ("<|fim_prefix|>", false),
    ("<|fim_middle|>", false),
    ("<|fim_suffix|>", false),
    ("<|fim_pad|>", false),
    ("<|repo_name|>", false),
    ("<|file_sep|>", false),
];

impl Tokenizer {
    /// Loads the tokenizer of a model folder: tokenizer.json, or vocab.json with merges.txt, and tokenizer_config.json.
    ///
    /// Errors: [`Error::Io`] when neither form is there or readable, [`Error::Format`] for a damaged file,
    /// [`Error::Unsupported`] for a tokenizer that is not byte-level BPE.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let config_path = folder.join("tokenizer_config.json");
        let config = if config_path.exists() { Some(read_json(&config_path)?) } else { None };
        let json_path = folder.join("tokenizer.json");
        let mut tokenizer = if !json_path.exists() && folder.join("vocab.json").exists() {
            Self::from_vocab_and_merges(&folder.join("vocab.json"), &folder.join("merges.txt"), config.as_ref())?
        } else {
            Self::from_file(&json_path)?
        };
        tokenizer.files.tokenizer_config = config;
        Ok(tokenizer)
    }

    /// Loads a tokenizer.json. Errors: as [`Tokenizer::from_folder`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::io(path, "read the tokenizer", source))?;
        Self::from_json(&bytes, path)
    }

    /// Loads the content of a tokenizer.json; `path` is only named in errors, which are as for [`Tokenizer::from_folder`].
    pub fn from_json(bytes: &[u8], path: &Path) -> Result<Self> {
        let bad = |place: &str, found: String| Error::format(path, place, "a tokenizer.json of a byte-level BPE", found);
        let mut bpe = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| bad("tokenizer", format!("something else ({error})")))?;
        bpe.with_truncation(None).map_err(|error| bad("truncation", error.to_string()))?;
        bpe.with_padding(None);
        let unsupported = |what: &str| Error::Unsupported {
            what: format!("{}: {what}", path.display()),
            remedy: "use a byte-level BPE tokenizer such as Qwen2's, or train one".into(),
        };
        let ModelWrapper::BPE(model) = bpe.get_model() else {
            return Err(unsupported("a tokenizer model other than BPE"));
        };
        if !matches!(bpe.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(unsupported("a decoder other than ByteLevel"));
        }
        if model.dropout.is_some_and(|dropout| dropout > 0.0) {
            return Err(unsupported("BPE dropout, which makes ids random,"));
        }
        let mut added = Vec::new();
        for (id, token) in bpe.get_added_tokens_decoder() {
            if token.lstrip || token.rstrip || token.single_word || token.content.is_empty() {
                return Err(unsupported(&format!("the added token {:?} with strip or single_word flags", token.content)));
            }
            added.push(AddedToken { id, content: token.content.clone(), special: token.special });
        }
        let mut vocab = Vec::new();
        for (token, id) in model.get_vocab() {
            match token.chars().map(char_to_byte).collect::<Option<Vec<u8>>>() {
                Some(token_bytes) => vocab.push((id, token_bytes)),
                // A control token that is listed in the vocabulary too is written out verbatim there.
                None if added.iter().any(|other| other.id == id) => {}
                None => return Err(bad("vocab", format!("the token {token:?}, which is not made of byte characters"))),
            }
        }
        let mut seen = [false; 256];
        vocab.iter().filter(|(_, token)| token.len() == 1).for_each(|(_, token)| seen[usize::from(token[0])] = true);
        if let Some(byte) = seen.iter().position(|seen| !seen) {
            return Err(bad("vocab", format!("no token for the single byte {byte:#04x}")));
        }
        let highest = vocab.iter().map(|(id, _)| *id).chain(added.iter().map(|token| token.id)).max().unwrap_or(0);
        if highest as usize > 8 * (vocab.len() + added.len()) {
            return Err(bad("vocab", format!("id {highest} among {} tokens", vocab.len() + added.len())));
        }
        if let Some(splitter) = bpe.get_pre_tokenizer() {
            splitter.pre_tokenize(&mut "a b\n".into()).map_err(|error| bad("pre_tokenizer", error.to_string()))?;
        }
        let is_bytes = vocab.len() == 256 && vocab.iter().all(|(id, token)| token[..] == [*id as u8]) && bpe.get_normalizer().is_none();
        let qwen2_split = is_bytes || is_qwen2_split(&bpe);
        let kind = if is_bytes { Kind::Bytes } else { Kind::Bpe(Box::new(bpe)) };
        let mut tokenizer = Self::assemble(kind, vocab, added, qwen2_split);
        tokenizer.files.tokenizer_json = Some(bytes.to_vec());
        Ok(tokenizer)
    }

    /// Loads GPT-2 style files, with Qwen2's normaliser and regex. Added tokens come from `config`'s `added_tokens_decoder`,
    /// else Qwen2's first three follow the vocabulary.
    ///
    /// Errors: [`Error::Io`] and [`Error::Format`] as for tokenizer.json.
    pub fn from_vocab_and_merges(vocab_path: &Path, merges_path: &Path, config: Option<&Value>) -> Result<Self> {
        let vocab = read_json(vocab_path)?;
        let Some(entries) = vocab.as_object() else {
            return Err(Error::format(vocab_path, "top", "a table from token to id", "something else"));
        };
        let text = std::fs::read_to_string(merges_path).map_err(|source| Error::io(merges_path, "read the merges", source))?;
        let mut merges = Vec::new();
        for (index, line) in text.lines().enumerate() {
            if line.is_empty() || (index == 0 && line.starts_with("#version:")) {
                continue;
            }
            let Some((left, right)) = line.split_once(' ').filter(|(_, right)| !right.contains(' ')) else {
                let place = format!("line {}", index + 1);
                return Err(Error::format(merges_path, place, "two tokens with a space between", format!("{line:?}")));
            };
            merges.push(json!([left, right]));
        }
        let mut added = Vec::new();
        match config.and_then(|config| config.get("added_tokens_decoder")).and_then(Value::as_object) {
            Some(tokens) => {
                for (id, token) in tokens {
                    let content = token.get("content").and_then(Value::as_str);
                    let (Ok(id), Some(content)) = (id.parse(), content) else {
                        return Err(Error::format(vocab_path, "added_tokens_decoder", "ids with a content", format!("{id}: {token}")));
                    };
                    let special = token.get("special").and_then(Value::as_bool).unwrap_or(true);
                    added.push(AddedToken { id, content: content.to_string(), special });
                }
            }
            None => {
                let first = entries.values().filter_map(Value::as_u64).max().map_or(0, |id| id as u32 + 1);
                let control = QWEN2_5_CONTROL[..3].iter().filter(|(content, _)| !entries.contains_key(*content));
                added.extend((first..).zip(control).map(|(id, (content, special))| AddedToken {
                    id,
                    content: content.to_string(),
                    special: *special,
                }));
            }
        }
        let model = json!({ "type": "BPE", "vocab": vocab, "merges": merges });
        Self::from_json(tokenizer_json(model, &added, true).as_bytes(), vocab_path)
    }

    /// tokenizer.json and tokenizer_config.json by name, and with `chat_template` (its source) also chat_template.jinja and
    /// the config's `chat_template`. A loaded tokenizer.json comes back byte for byte; a loaded config keeps its other keys.
    /// transformers' AutoTokenizer opens a folder with these files.
    pub fn files(&self, chat_template: Option<&str>) -> Vec<(String, Vec<u8>)> {
        let mut files = Vec::new();
        let tokenizer_json = match &self.files.tokenizer_json {
            Some(bytes) => bytes.clone(),
            None => self.bytes_json().into_bytes(),
        };
        let mut config = self.files.tokenizer_config.clone().unwrap_or_else(|| self.new_config());
        if let (Some(template), Some(config)) = (chat_template, config.as_object_mut()) {
            config.insert("chat_template".into(), template.into());
            files.push(("chat_template.jinja".into(), template.as_bytes().to_vec()));
        }
        files.push(("tokenizer.json".into(), tokenizer_json));
        let text = serde_json::to_string_pretty(&config).expect("a JSON value can be written");
        files.push(("tokenizer_config.json".into(), (text + "\n").into_bytes()));
        files
    }

    /// Writes [`Tokenizer::files`] into `folder`.
    ///
    /// Errors: [`Error::Io`].
    pub fn save(&self, folder: &Path, chat_template: Option<&str>) -> Result<()> {
        self.files(chat_template).iter().try_for_each(|(name, bytes)| write(&folder.join(name), bytes))
    }

    /// A byte-level BPE without merges whose ids are our bytes: no normaliser and no regex, since neither may change a byte.
    fn bytes_json(&self) -> String {
        assert!(self.is_bytes(), "a BPE tokenizer always has its tokenizer.json");
        let vocab: Map<String, Value> = (0..=255u8).map(|byte| (byte_to_char(byte).to_string(), byte.into())).collect();
        tokenizer_json(json!({ "type": "BPE", "vocab": vocab, "merges": [] }), self.added_tokens(), false)
    }

    fn new_config(&self) -> Value {
        let decoder: Map<String, Value> = self.added_tokens().iter().map(|token| (token.id.to_string(), added_flags(token))).collect();
        let others = self.added_tokens().iter().filter(|token| token.special && token.content != END_OF_TEXT);
        let end = self.end_of_text().map(|_| END_OF_TEXT);
        json!({
            "add_bos_token": false,
            "add_prefix_space": false,
            "added_tokens_decoder": decoder,
            "additional_special_tokens": others.map(|token| token.content.as_str()).collect::<Vec<_>>(),
            "bos_token": null,
            "clean_up_tokenization_spaces": false,
            "eos_token": self.im_end().map(|_| IM_END).or(end),
            "errors": "replace",
            "model_max_length": 131_072,
            "pad_token": end,
            "split_special_tokens": false,
            // Qwen2's class brings its own normaliser and regex, which bytes must not have.
            "tokenizer_class": if self.is_bytes() { "PreTrainedTokenizerFast" } else { "Qwen2Tokenizer" },
            "unk_token": null,
        })
    }
}

/// The text of a tokenizer.json around `model`; `qwen2` adds Qwen2's NFC and regex.
pub(super) fn tokenizer_json(model: Value, added: &[AddedToken], qwen2: bool) -> String {
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false });
    let split = json!({ "type": "Split", "pattern": { "Regex": QWEN2_SPLIT }, "behavior": "Isolated", "invert": false });
    let added: Vec<Value> = added
        .iter()
        .map(|token| {
            let mut entry = Map::from_iter([("id".to_string(), json!(token.id))]);
            entry.extend(added_flags(token).as_object().cloned().unwrap_or_default());
            Value::Object(entry)
        })
        .collect();
    let mut full_model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
    });
    for key in ["vocab", "merges"] {
        full_model[key] = model[key].clone();
    }
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": if qwen2 { json!({ "type": "NFC" }) } else { Value::Null },
        "pre_tokenizer": if qwen2 { json!({ "type": "Sequence", "pretokenizers": [split, byte_level] }) } else { byte_level.clone() },
        "post_processor": byte_level, "decoder": byte_level, "model": full_model,
    });
    serde_json::to_string_pretty(&file).expect("a JSON value can be written")
}

fn added_flags(token: &AddedToken) -> Value {
    json!({
        "content": token.content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": token.special,
    })
}

/// Whether text goes through NFC at most, then Qwen2's regex, then the byte alphabet, and nothing else.
fn is_qwen2_split(bpe: &tokenizers::Tokenizer) -> bool {
    let steps = serde_json::to_value(bpe.get_pre_tokenizer()).unwrap_or_default();
    let (split, bytes) = (&steps["pretokenizers"][0], &steps["pretokenizers"][1]);
    steps["pretokenizers"].as_array().is_some_and(|steps| steps.len() == 2)
        && split["pattern"]["Regex"] == QWEN2_SPLIT
        && split["behavior"] == "Isolated"
        && split["invert"] == false
        && bytes["type"] == "ByteLevel"
        && bytes["add_prefix_space"] == false
        && bytes["use_regex"] == false
        && matches!(bpe.get_normalizer(), None | Some(NormalizerWrapper::NFC(_)))
}

/// Reads a JSON file whole.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(|source| Error::io(path, "read", source))?;
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::format(path, format!("line {}, column {}", error.line(), error.column()), "JSON", error.to_string()))?;
    if value.is_object() { Ok(value) } else { Err(Error::format(path, "file", "a JSON object", "another value")) }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|source| Error::io(path, "write", source))
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::Specials;
    use super::*;

    #[test]
    fn bytes_survive_a_folder_with_the_same_ids() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = Tokenizer::bytes_with_chat();
        bytes.save(folder.path(), Some("{{ messages }}")).unwrap();
        let back = Tokenizer::from_folder(folder.path()).unwrap();
        assert!(back.is_bytes());
        assert_eq!(back.fingerprint(), bytes.fingerprint());
        assert_eq!((back.eos(), back.pad(), back.end_of_text()), (Some(258), Some(256), Some(256)));
        // The library that reads the file elsewhere gives the same ids, also for what NFC would change.
        let theirs = tokenizers::Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
        for text in ["", "a  b\r\n\t中 e\u{301} 😀", "<|im_start|>user\nhi<|im_end|>"] {
            assert_eq!(theirs.encode(text, false).unwrap().get_ids(), bytes.encode(text, Specials::Recognise), "{text:?}");
        }
        let config = read_json(&folder.path().join("tokenizer_config.json")).unwrap();
        assert_eq!(config["chat_template"], "{{ messages }}");
    }

    #[test]
    fn damaged_and_foreign_files_are_errors_that_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let check = |content: &str, says: &str| {
            let path = folder.path().join("tokenizer.json");
            std::fs::write(&path, content).unwrap();
            let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
            assert!(error.contains("tokenizer.json") && error.contains(says), "{error}");
        };
        let good = Tokenizer::bytes_with_chat().bytes_json();
        check(&good[..good.len() / 2], "EOF");
        check("", "EOF");
        check("[1]", "byte-level BPE");
        check(&good.replacen("\"ByteLevel\"", "\"Missing\"", 3), "");
        check(r#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#, "other than BPE");
        check(&good.replace("\"!\": 33,", ""), "byte 0x21");
        std::fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
        assert!(Tokenizer::from_folder(folder.path()).unwrap_err().to_string().contains("cannot read"));
        std::fs::write(folder.path().join("vocab.json"), "{\"a\": 0}").unwrap();
        assert!(Tokenizer::from_folder(folder.path()).unwrap_err().to_string().contains("merges.txt"));
        std::fs::write(folder.path().join("merges.txt"), "#version: 0.2\na\n").unwrap();
        assert!(Tokenizer::from_folder(folder.path()).unwrap_err().to_string().contains("line 2"));
    }
}
