//! Wrong scripts, words, models, tokenizers and data, each with the message it must give: where (file and line), what was
//! expected, what came. The program ends with code 1 and a message of at most one screen; it never panics, and it never
//! goes on as if nothing were wrong. Mistakes of plain Lua are in lua_errors.rs, damaged headers in checkpoint/malformed.rs.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What a message of ours never holds: traces of Rust, of C and of the Lua library.
const NOISE: [&str; 9] =
    ["panicked", "backtrace", "[C]", "runtime error:", "stack traceback", "__mlua", "error converting", "called `", "allocation"];

/// A folder with everything that the cases name.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let text: String = (0..60).map(|n| format!("the moon is near {n}\n")).collect();
        place.write("t.txt", text.as_bytes());
        place.write("latin.txt", b"fine\nna\xefve\n");
        place.write("empty.txt", b"");
        place.write("bad.jsonl", b"{\"text\": \"a\"}\n{\"text\": }\n{\"no\": 1}\n[1]\n\xff\n");
        place.write("worse.jsonl", b"{\"text\": }\n[1]\n");
        place.write("numbers.jsonl", b"{\"text\": \"a\"}\n{\"text\": 7}\n");
        place.write("wizard.jsonl", br#"{"messages": [{"role": "user"}]}"#);
        place.write("developer.jsonl", br#"{"messages": [{"role": "developer", "content": "x"}, {"role": "assistant", "content": "y"}]}"#);
        place.write("null.jsonl", br#"{"prompt": null, "completion": "y"}"#);
        place.write("broken.lua", b"return {\n  1 +\n}");
        place.write("raises.lua", b"local x\nreturn x.y");
        place.write("folder/file.txt", b"x");
        // A template that passes over roles that it does not know, as Qwen's does.
        place.copy("tokenizer", "qwen", &["tokenizer.json", "tokenizer_config.json"]);
        let turn = b"{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' }}";
        let known = b"{% for m in messages if m.role in ['user', 'assistant'] %}";
        place.write("qwen/chat_template.jinja", &[&known[..], turn, b"{% endfor %}"].concat());
        place.copy_model("model");
        perilune::data::tokenizer::Tokenizer::bytes_with_chat().save(&place.path("model"), None).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    /// The small golden checkpoint, without a tokenizer.
    fn copy_model(&self, name: &str) {
        self.copy("dense_tied", name, &["config.json", "generation_config.json", "model.safetensors"]);
    }

    fn copy(&self, golden: &str, name: &str, files: &[&str]) {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(golden);
        for file in files {
            self.write(&format!("{name}/{file}"), &std::fs::read(from.join(file)).unwrap());
        }
    }

    fn perilune(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_perilune")).args(words).current_dir(self.0.path()).output().unwrap()
    }

    /// What is wrong with how `words` ended; nothing if they failed as they should, with all `parts` in the message.
    fn fault(&self, words: &[&str], parts: &[&str]) -> Option<String> {
        let output = self.perilune(words);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let missing: Vec<_> = parts.iter().filter(|part| !said.contains(**part)).collect();
        let noise: Vec<_> = NOISE.iter().filter(|noise| said.contains(**noise)).collect();
        // The list of all commands, for who gives none, is no message.
        let lines = if words.is_empty() { 26 } else { 20 };
        let fits = said.lines().count() <= lines && said.len() <= 1600;
        let code = output.status.code();
        let fine = code == Some(1) && !said.is_empty() && missing.is_empty() && noise.is_empty() && fits;
        (!fine).then(|| format!("ended with {code:?}, lacks {missing:?}, holds {noise:?}, in {} lines:\n{said}", said.lines().count()))
    }

    /// As [`Place::fault`] for a script.
    fn script_fault(&self, script: &str, parts: &[&str]) -> Option<String> {
        self.write("s.lua", script.as_bytes());
        self.fault(&["run", "--quiet", "s.lua"], parts).map(|fault| format!("{script}\n{fault}"))
    }
}

/// A workflow with `body` as its sixth line, and a few names to write cases with.
fn body(body: &str) -> String {
    format!(
        "local engine = require 'engine'
return engine.workflow {{ name = 'w', run = function(run)
local bytes, tensor, data, tokenizer = engine.tokenizer.bytes(), engine.tensor, engine.data, engine.tokenizer
local shape = {{ hidden = 16, layers = 1, heads = 2, kv_heads = 1, intermediate = 8, vocab = 259, max_positions = 64 }}
local function model(options) return run:model('m', shape, options) end local lines = data.text('t.txt'):tokenizer(bytes)
{body}
end }}"
    )
}

fn check_bodies(cases: &[(&str, &[&str])]) {
    let place = Place::new();
    let faults: Vec<String> =
        cases.iter().filter_map(|(text, parts)| place.script_fault(&body(text), &[parts, &["s.lua:6: "][..]].concat())).collect();
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), cases.len(), faults.join("\n"));
}

fn check_words(place: &Place, cases: &[(&[&str], &[&str])]) {
    let fault = |(words, parts): &(&[&str], &[&str])| place.fault(words, parts).map(|fault| format!("{words:?} {fault}"));
    let faults: Vec<String> = cases.iter().filter_map(fault).collect();
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), cases.len(), faults.join("\n"));
}

#[test]
fn scripts_that_are_none() {
    let place = Place::new();
    place.write("empty.lua", b" \n\n");
    place.write("binary.lua", b"\x7fELF\x02\x01\x00\xff\xfe");
    place.write("bytecode.lua", b"\x1bLua");
    place.write("latin.lua", b"print('na\xefve')");
    place.write("unreturned.lua", b"local engine = require 'engine'\nengine.workflow { name = 'w', run = print }");
    place.write("wrong.lua", b"return { name = 'w' }");
    place.write("module.lua", b"local m = require 'broken'");
    place.write("raising.lua", b"\nlocal m = require 'raises'");
    place.write("lost.lua", b"\nlocal m = require 'a.b'");
    std::fs::create_dir(place.path("folder.lua")).unwrap();
    check_words(
        &place,
        &[
            (&["run", "empty.lua"], &["empty.lua: script: expected Lua that does something, found an empty file"]),
            (&["run", "binary.lua"], &["binary.lua: script: expected UTF-8 text"]),
            (&["run", "bytecode.lua"], &["bytecode.lua: script: expected the text of a Lua script, found compiled Lua"]),
            (&["run", "latin.lua"], &["latin.lua: script: expected UTF-8 text"]),
            (&["run", "folder.lua"], &["folder.lua: cannot read"]),
            (&["run", "missing.lua"], &["missing.lua: cannot read"]),
            (&["run", "unreturned.lua"], &["unreturned.lua: engine.workflow was called", "write `return engine.workflow"]),
            (&["run", "wrong.lua"], &["wrong.lua: a script returns engine.workflow { ... } or nothing, got a table"]),
            (&["run", "module.lua"], &["broken.lua:3: unexpected symbol"]),
            (&["run", "raising.lua"], &["raises.lua:2: attempt to index a nil value", "raising.lua:2:"]),
            (&["run", "lost.lua"], &["lost.lua:2: no module \"a.b\"; looked for a/b.lua"]),
        ],
    );
}

#[test]
fn words_of_the_commands() {
    let place = Place::new();
    place.write("s.lua", body("").as_bytes());
    place.copy_model("bare");
    check_words(
        &place,
        &[
            (&[], &["Usage: perilune <COMMAND>"]),
            (&["train"], &["unrecognized subcommand 'train'"]),
            (&["run"], &["SCRIPT"]),
            (&["run", "--sed", "1", "s.lua"], &["--sed", "--seed"]),
            (&["run", "--seed", "x", "s.lua"], &["invalid value 'x' for '--seed"]),
            (&["run", "s.lua", "--seed", "-1"], &["--seed should be an integer of at least 0, got `-1`"]),
            (&["run", "s.lua", "--seed"], &["--seed needs an integer"]),
            (&["run", "s.lua", "--quiet=false"], &["--quiet takes no value, got `false`"]),
            (&["run", "s.lua", "stray"], &["s.lua: `stray` is not an argument"]),
            (&["run", "s.lua", "--steps", "3"], &["s.lua: no argument --steps"]),
            (&["run", "s.lua", "--runs", "t.txt"], &["t.txt: cannot create"]),
            (&["types", "t.txt"], &["t.txt/.luarc.json: cannot read"]),
            (&["doctor", "x"], &["unexpected argument 'x'"]),
            (&["params"], &["MODEL|PRESET"]),
            (&["params", ""], &["should be a folder with a config.json, or one of 0.5B"]),
            (&["params", "folder"], &["folder/config.json: cannot read"]),
            (&["generate", "gone", "--prompt", "x"], &["gone: model: expected a folder on this machine, found none of this name"]),
            (&["chat", "Qwen/Qwen2.5-0.5B"], &["`hf download Qwen/Qwen2.5-0.5B --local-dir Qwen/Qwen2.5-0.5B` fetches a model"]),
            (&["params", "7B", "--context", "0"], &["--context", "from 1 to"]),
            (&["params", "7B", "--context", "99999999999999999"], &["--context", "from 1 to"]),
            (&["params", "7B", "--sequences", "0"], &["--sequences", "from 1 to"]),
            (&["bench"], &["<WHAT>"]),
            (&["bench", "everything"], &["ceilings, train, ops, decode"]),
            (&["bench", "train", "--seconds", "nan"], &["--seconds", "above 0"]),
            (&["bench", "train", "--config", "9B"], &["\"9B\"", "tiny"]),
            (&["generate"], &["--prompt", "MODEL"]),
            (&["generate", "model"], &["--prompt"]),
            (&["generate", "t.txt", "--prompt", "x"], &["t.txt"]),
            (&["generate", "bare", "--prompt", "x"], &["bare/tokenizer.json: cannot read"]),
            (&["generate", "model", "--prompt", "x", "--max-tokens", "0"], &["--max-tokens", "at least 1"]),
            (&["generate", "model", "--prompt", "x", "--temperature", "nan"], &["temperature", "NaN"]),
            (&["generate", "model", "--prompt", "x", "--temperature", "-1"], &["`temperature` should be a number from 0", "got -1"]),
            (&["generate", "model", "--prompt", "x", "--top-k", "-1"], &["invalid value '-1' for '--top-k"]),
            (&["chat", "model", "--seed", "-1"], &["invalid value '-1' for '--seed"]),
            (&["generate", "model", "--prompt", "x", "--repetition-penalty", "0"], &["repetition_penalty"]),
            (&["generate", "model", "--prompt", "x", "--min-p", "7"], &["min_p"]),
            (&["generate", "model", "--prompt", &"x".repeat(600)], &["1 to 512 tokens, the model's positions, got 600"]),
        ],
    );
}

#[test]
fn models_and_optimizers_in_scripts() {
    check_bodies(&[
        ("run:model('m', 'missing')", &["missing: model: expected a folder on this machine, found none of this name"]),
        ("shape.rms_norm_eps = 0 / 0 model()", &["`rms_norm_eps`", "NaN, which JSON does not have"]),
        ("shape.initializer_range = 1 / 0 model()", &["`initializer_range`", "the number inf"]),
        ("shape.head_dim = 512 model()", &["`head_dim` should be", "to 256, got 512"]),
        ("run:model('m', 't.txt')", &["t.txt"]),
        ("run:model('m', 7)", &["Run:model: `source` should be the folder of a checkpoint", "got 7"]),
        ("model { tokenizer = 'gpt2' }", &["`tokenizer` should be a Tokenizer", "got string \"gpt2\""]),
        (
            "shape.vocab = 100 model { tokenizer = bytes }",
            &["model: `tokenizer` should be one of at most 100 tokens, the model's vocab, got one of 259"],
        ),
        ("model({ tokenizer = bytes }):generate { 5 }", &["`prompts[1]` should be a text, a list of messages", "got 5"]),
        ("model({ tokenizer = bytes }):generate({ 'x' }, { n = 0 })", &["`n` should be an integer of at least 1"]),
        ("model({ tokenizer = bytes }):generate({ 'x' }, { top_q = 1 })", &["`top_q`", "did you mean"]),
        ("model({ tokenizer = bytes }):generate({ '' })", &["`prompts[1]`", "a prompt without tokens"]),
        ("model({ tokenizer = bytes }):generate({ { 300 } })", &["an id from 0 to 258", "300"]),
        ("model():generate({ 'x' })", &["a model with a tokenizer"]),
        ("model({ tokenizer = bytes }):generate({ 'x' }, { logit_bias = { [700] = 1 } })", &["logit_bias", "ids from 0 to 258"]),
        ("model({ tokenizer = bytes }):generate({ 'x' }, { temperature = -1 })", &["`temperature` should be a number from 0"]),
        ("model({ tokenizer = bytes }):generate({ 'x' }):prompt(2)", &["a rollout from 1 to 1", "got 2"]),
        ("model { dtype = 'int8', lora = { rank = 2 } }", &["f32 or bf16 under an adapter that trains"]),
        ("model({ dtype = 'int8' }):save 'x'", &["a model of whole weights", "rounded to 8 bits"]),
        ("model { dtype = 'f16' }", &["`dtype` should be \"f32\", \"bf16\" or \"int8\", got \"f16\""]),
        ("model { dtype = 'i32' }", &["`dtype` should be \"f32\", \"bf16\" or \"int8\", got \"i32\""]),
        ("model { frozen = 1 }", &["`frozen` should be true or false, got 1"]),
        ("model { freeze = true }", &["one of adapter, device, dtype, frozen, head, lora, recompute, tokenizer, got `freeze`"]),
        (
            "run:model('m', { preset = '72B', vocab = 1 << 24 }, { dtype = 'f32' })",
            &["model: `weights` should be what fits the memory", "GiB"],
        ),
        ("run:model('m', { heads = 3 })", &["model config: `hidden` should be a multiple of heads, 3"]),
        ("run:model('m', { 3 })", &["`fields` should be names only"]),
        ("run:model('m', { rope_scaling = 3 })", &["`rope_scaling` should be an object, got 3"]),
        ("run:model('a/b', shape)", &["`name` should be a name of 1 to 100 bytes, without / # [ ], got \"a/b\""]),
        (
            "model() model { dtype = 'bf16' }",
            &["the model `m` differs from what the run recorded", "in bf16 is asked for", "give it a name that is free"],
        ),
        ("model() shape.hidden = 32 model()", &["differs from what the run recorded", "\"hidden\":16", "\"hidden\":32"]),
        ("model() run:data('m', lines)", &["`m`, which is a model of this run"]),
        ("run:data('m', lines) model()", &["`m`, which is a data set of this run"]),
        ("model():logits { 1, 2 }", &["Model:logits: `batch` should be a Batch, got a table of 2"]),
        ("model():logits(data.batch { { 259 } })", &["`tokens[0]` should be an id from 0 to 258, got 259"]),
        ("model():logprobs(data.batch { { 1, 2 } }, { temperature = 0 })", &["temperature"]),
        ("model():cross_entropy(data.batch { { 1, 2 } }, { normalizer = -1 })", &["normalizer"]),
        ("model():gradient('x')", &["\"x\""]),
        ("model():complete('x')", &["a model with a tokenizer; give one with the option `tokenizer`"]),
        ("model { tokenizer = bytes }:complete(('x'):rep(65))", &["1 to 64 tokens, the model's positions, got 65 tokens"]),
        ("model { tokenizer = bytes }:complete('x', { stop = { 3 } })", &["`stop` should be a list of strings, got an entry that is 3"]),
        ("model { tokenizer = bytes }:complete('x', { stop = 'a' })", &["`stop` should be a list of strings, got string \"a\""]),
        ("model { tokenizer = bytes }:complete('x', { max_token = 3 })", &["did you mean `max_tokens`?"]),
        ("run:optimizer('sgd', model())", &["`kind` should be \"adamw\" or \"muon\", got string \"sgd\""]),
        ("run:optimizer('adamw', shape)", &["`model` should be a Model, got a table"]),
        ("run:optimizer('adamw', model { frozen = true })", &["is the model frozen?"]),
        ("run:optimizer('adamw', model(), { lr = -1 })", &["`lr` should be a number from 0, got -1"]),
        ("run:optimizer('adamw', model(), { lr = 0 / 0 })", &["`lr` should be a number from 0, got NaN"]),
        ("run:optimizer('adamw', model(), { lr = '1e-3' })", &["`lr` should be a number, got string \"1e-3\""]),
        ("run:optimizer('adamw', model(), { betas = { 0.9 } })", &["`betas` should be two numbers, such as { 0.9, 0.95 }, got 1 numbers"]),
        (
            "run:optimizer('adamw', model(), { betas = { 0.9, 'x' } })",
            &["`betas` should be a list of numbers, got an entry that is string \"x\""],
        ),
        ("run:optimizer('adamw', model(), { betas = { 0.9, 1.0 } })", &["betas"]),
        ("run:optimizer('adamw', model(), { weight_deacy = 0 })", &["did you mean `weight_decay`?"]),
        ("run:optimizer('adamw', model(), { clip_norm = -1 })", &["clip_norm"]),
        ("run:optimizer('adamw', model(), { moments = 'int8' })", &["`moments` should be \"f32\" or \"bf16\", got \"int8\""]),
        (
            "local loss = model():cross_entropy(data.batch { { 1, 2 } }) loss:backward() loss:backward()",
            &["has not run backwards yet", "compute the loss again"],
        ),
        (
            "local m = model() local optim = run:optimizer('adamw', m, { lr = 1 }) local late = m:cross_entropy(data.batch { { 1, 2 } }) m:cross_entropy(data.batch { { 1, 2 } }):backward() optim:step() print(late:item())",
            &["weights that an optimizer or a load has changed since; run backward, or read the loss, before the update"],
        ),
        ("model():save('t.txt')", &["`", "t.txt` should be a new folder, an empty one, or an earlier checkpoint, got a file"]),
        ("model():save('folder')", &["should be a new folder, an empty one, or an earlier checkpoint"]),
        ("model():save('t.txt/x')", &["t.txt/x: cannot save to"]),
        ("model():save('/proc/nowhere/x')", &["/proc/nowhere: cannot create"]),
        ("model():save('')", &["Model:save: `folder` should be a path, got string \"\""]),
        ("model():save('x', { dtype = 'f8' })", &["`dtype` should be"]),
        ("run:save('args.json', model())", &["`name` should be a name of letters, digits, - and _, other than code", "got \"args.json\""]),
        ("run:save('../x', model())", &["`name` should be a name of letters, digits, - and _"]),
        ("run:save('x', bytes)", &["`model` should be a Model, got a Tokenizer"]),
    ]);
}

#[test]
fn data_and_tokenizers_in_scripts() {
    check_bodies(&[
        ("data.text('missing.txt'):take(1)", &["missing.txt: cannot"]),
        ("data.text('folder'):take(1)", &["folder: cannot read"]),
        ("data.text('empty.txt'):take(1)", &["files with at least one document, got none in empty.txt"]),
        ("data.text('latin.txt'):take(1)", &["latin.txt: line 2, column 3: expected UTF-8, found the byte 0xef"]),
        ("data.text({ 't.txt', 3 })", &["`paths` should be a path or a list of paths, got an entry that is 3"]),
        ("data.text({ 't.txt', nil, 'x' })", &["`paths`", "nil at 2"]),
        ("data.text({ path = 't.txt' })", &["`paths`", "the key string \"path\""]),
        ("data.text({}):take(1)", &["`paths` should be at least one file, got none"]),
        ("data.text('t.txt'):split('train', 0.1):split('train', 0.1)", &["Data:split: `self`", "not split yet"]),
        ("lines:pack { seq_len = 1 << 40 }", &["`seq_len` should be from 1 to 2147483647 tokens"]),
        ("lines:pack { seq_len = 8, pool = 9 }", &["`pool` should be left out"]),
        ("data.mix { { lines, 1 }, { data.text('t.txt'), 1 } }", &["data.mix: `parts`", "the same tokenizer", "tokenizer none"]),
        ("data.write_jsonl('x.jsonl', { { n = 1 / 0 } })", &["`records[1]`", "the number inf, which JSON does not have, at `n`"]),
        ("data.text('t.txt', { document = 'word' })", &["\"file\", \"line\" or \"paragraph\", got \"word\""]),
        ("data.text('a\\xff')", &["`paths` should be UTF-8 text"]),
        ("lines:split('test', 0.5)", &["`part` should be \"train\" or \"validation\""]),
        ("lines:split('train', 1.0):pack { seq_len = 8 }:take(1)", &["none in the train part of the split in t.txt"]),
        ("lines:split('train', 1.5)", &["`fraction` should be a number from 0 to 1", "got 1.5"]),
        ("lines:split('train', 0 / 0)", &["`fraction` should be a number from 0 to 1"]),
        ("lines:pack {}", &["`seq_len` should be given"]),
        ("lines:pack { seq_len = 0 }", &["`seq_len` should be an integer of at least 1, got 0"]),
        ("lines:pack { seq_len = 2.5 }", &["`seq_len` should be an integer, got 2.5"]),
        ("lines:pack { seq_len = 1 << 40 }", &["seq_len"]),
        ("lines:pack { seq_len = 8, how = 'best' }", &["\"concat\", \"best_fit\", \"windows\" or \"whole\", got \"best\""]),
        ("data.text('t.txt'):pack { seq_len = 8 }:take(1)", &["`tokenizer` should be set"]),
        ("lines:pack { seq_len = 8 }:take(0)", &["`count` should be an integer of at least 1, got 0"]),
        ("lines:pack { seq_len = 8 }:forever():take(1 << 40)", &["`count` should be at most 1048576"]),
        ("lines:pack { seq_len = 1 << 30 }:forever():take(4)", &["2^31 tokens"]),
        ("lines:epochs(0):pack { seq_len = 8 }:take(1)", &["`count` should be an integer of at least 1, got 0"]),
        ("lines:shuffle { seed = -1 }", &["`seed` should be an integer of at least 0, got -1"]),
        ("data.batch { 1, 2 }", &["`documents` should be a list of token ids, got 1"]),
        ("data.batch { { 1, nil, 3 } }", &["`documents` should be a list of token ids, got a list with nil at 2"]),
        ("data.batch { { 1 }, nil, { 3 } }", &["nil at 2"]),
        ("data.batch { tokens = { 1 } }", &["the key string \"tokens\""]),
        ("data.batch { { -1 } }", &["an entry that is -1"]),
        ("data.batch { { 1 << 31 } }", &["an entry that is 2147483648"]),
        ("data.batch { { 1.5 } }", &["an entry that is 1.5"]),
        ("data.jsonl('bad.jsonl'):take(9)", &["bad.jsonl: line 2, column 10: expected a JSON object, found text that is no JSON"]),
        ("data.jsonl('worse.jsonl', { skip_bad = true }):take(9)", &["worse.jsonl: line 2"]),
        ("data.jsonl('bad.jsonl', { skip = true })", &["one of field, skip_bad, got `skip`"]),
        ("data.jsonl('numbers.jsonl'):tokenizer(bytes):pack { seq_len = 8 }:take(2)", &["numbers.jsonl: line 2: expected a string, found"]),
        (
            "data.jsonl('numbers.jsonl', { field = 'body' }):tokenizer(bytes):pack { seq_len = 8 }:take(1)",
            &["line 1: expected a string, found no field \"body\""],
        ),
        (
            "data.jsonl('developer.jsonl'):chat(tokenizer.load('qwen')):pack { seq_len = 8 }:take(1)",
            &["developer.jsonl: line 1, messages[0].role: expected a role that the chat template writes", "\"developer\""],
        ),
        ("data.jsonl('null.jsonl'):chat(bytes):pack { seq_len = 8 }:take(1)", &["null.jsonl: line 1", "only prompt (null), completion"]),
        ("data.jsonl('wizard.jsonl'):chat(bytes):pack { seq_len = 8 }:take(1)", &["wizard.jsonl: line 1", "content"]),
        ("data.mix { { lines, 'x' } }", &["`parts` should be a list of { data set, weight }"]),
        ("data.mix { { lines, -1 } }", &["`weights[0]` should be a finite number, zero or more, got -1"]),
        ("data.mix { lines }", &["`parts` should be a list of { data set, weight }"]),
        (
            "for _ in run:loop('x', { over = lines:pack { seq_len = 8 } }) do end",
            &["Run:loop: `over`", "without a `take` it would never end"],
        ),
        ("for _ in run:loop('x', { over = 't.txt' }) do end", &["`over` should be a data set, got string \"t.txt\""]),
        ("for _ in run:loop('x', { epochs = 2 }) do end", &["`over` should be given with epochs"]),
        ("for _ in run:loop('x', { steps = -1 }) do end", &["`steps` should be an integer of at least 0, got -1"]),
        ("for _ in run:loop('x') do end", &["Run:loop: `options` should be given"]),
        ("run:loop('x', { steps = 2 })(3)", &["belongs into a `for`"]),
        ("tokenizer.load('missing')", &["missing: model: expected a folder on this machine"]),
        ("tokenizer.load('t.txt')", &["t.txt: tokenizer: expected a tokenizer.json of a byte-level BPE"]),
        ("tokenizer.load('')", &["tokenizer.load: `path` should be a path"]),
        ("tokenizer.train(data.text('t.txt'), { vocab_size = 10 })", &["`vocab_size` should be at least 259"]),
        ("tokenizer.train(data.text('latin.txt'), { vocab_size = 300 })", &["latin.txt: line 2"]),
        ("bytes:encode(3)", &["Tokenizer:encode: `text` should be a string, got 3"]),
        ("bytes:encode('\\xff')", &["Tokenizer:encode: `text` should be UTF-8 text, got bytes that are not"]),
        ("bytes:decode { 259 }", &["ids of this tokenizer, below 259, got 259"]),
        ("bytes:chat { { role = 'user' } }", &["`messages[0]` should be a table with a content"]),
        ("bytes:chat { { content = 'x' } }", &["`messages[0]` should be a table with a role"]),
        ("bytes:chat {}", &["`messages` should be a list of messages"]),
        ("bytes:save('t.txt')", &["t.txt: cannot make the folder"]),
    ]);
}

#[test]
fn tensors_in_scripts() {
    check_bodies(&[
        ("local t = {} t[1] = t tensor.new(t)", &["tensor.new: `values` should be numbers in nested lists", "deep"]),
        ("tensor.new { x = 1 }", &["the key string \"x\""]),
        ("if tensor.ones { 2 } < tensor.ones { 2 } then end", &["< and > do not compare tensors; use x:lt(y)"]),
        ("tensor.new { 1, nil, 3 }", &["a list with nil at 2"]),
        ("tensor.new { { 1, 2 }, { 3 } }", &["a list of 1 beside one of 2"]),
        ("tensor.new { 1, '2' }", &["got string \"2\""]),
        ("tensor.new({ 1.5 }, { dtype = 'i32' })", &["whole numbers from -2147483648"]),
        ("tensor.zeros { 1 << 31, 1 << 20 }", &["zeros: `shape` should be a number of elements that fits memory"]),
        ("tensor.arange(0, 1e18)", &["fits memory"]),
        ("tensor.ones { 2 }:backward()", &["backward: `self` should be one element (a loss), got [2]"]),
        ("tensor.ones({}):backward()", &["backward"]),
        ("local x = tensor.ones({}):requires_grad() local y = x * x y:backward() y:backward()", &["compute the loss again"]),
        ("tensor.ones { 2, 3 }:matmul(tensor.ones { 2, 3 })", &["matmul", "[2, 3]"]),
        ("tensor.ones { 2 }:index_select(0, tensor.new({ 2 }, { dtype = 'i32' }))", &["index_select", "2"]),
        ("return tensor.ones { 2 } + 'x'", &["+: `b` should be a tensor or a number, got string \"x\""]),
        ("tensor.no_grad(3)", &["tensor.no_grad: `body` should be a function, got 3"]),
        ("local function f() return tensor.no_grad(f) end f()", &["stack overflow"]),
        ("local function f() return 1 + f() end f()", &["stack overflow", "called from:"]),
    ]);
}

/// Loads the checkpoint `name` in a script and gives what is wrong with the message.
fn load_fault(place: &Place, name: &str, parts: &[&str]) -> Option<String> {
    place.script_fault(&body(&format!("run:model('m', '{name}')")), &[parts, &["s.lua:6: "][..]].concat())
}

#[test]
fn damaged_configs() {
    let place = Place::new();
    let good: serde_json::Value = serde_json::from_slice(&std::fs::read(place.path("model/config.json")).unwrap()).unwrap();
    let mut faults = Vec::new();
    for (key, value, parts) in [
        ("model_type", serde_json::json!("llama"), ["config.json: model_type: expected \"qwen2\" or \"qwen2_moe\"", "\"llama\""]),
        ("model_type", serde_json::Value::Null, ["model_type", "expected \"qwen2\""]),
        ("hidden_size", serde_json::json!(0), ["hidden_size: expected a whole number from 1", "found 0"]),
        ("hidden_size", serde_json::json!("64"), ["hidden_size: expected a whole number from 1", "found \"64\""]),
        ("hidden_size", serde_json::json!(128), ["model.safetensors", "128"]),
        ("hidden_size", serde_json::json!(1_000_000_000_000u64), ["hidden_size", "1000000000000"]),
        ("num_attention_heads", serde_json::json!(5), ["hidden_size", "multiple of num_attention_heads, 5"]),
        ("num_key_value_heads", serde_json::json!(3), ["num_key_value_heads", "a divisor of num_attention_heads, 4"]),
        ("num_hidden_layers", serde_json::json!(3), ["model.layers.2", "no such name"]),
        ("num_hidden_layers", serde_json::json!(1), ["model.layers.1", "model.layers.1"]),
        ("vocab_size", serde_json::json!(100), ["model.embed_tokens.weight", "[100, 64]"]),
        ("rms_norm_eps", serde_json::json!(-1), ["rms_norm_eps", "found -1"]),
        ("rope_theta", serde_json::json!(0), ["rope_theta", "found 0"]),
        ("rope_scaling", serde_json::json!({ "rope_type": "longrope" }), ["rope", "longrope"]),
        ("torch_dtype", serde_json::json!("float8"), ["torch_dtype", "float8"]),
        ("hidden_act", serde_json::json!("gelu"), ["hidden_act", "\"silu\""]),
        ("tie_word_embeddings", serde_json::json!("yes"), ["tie_word_embeddings", "true or false"]),
        ("attention_dropout", serde_json::json!(0.1), ["dropout in attention is not supported", "set it to 0.0"]),
        (
            "quantization_config",
            serde_json::json!({ "quant_method": "gptq" }),
            ["gptq) is not supported", "use the unquantised checkpoint"],
        ),
        ("eos_token_id", serde_json::json!([-1]), ["eos_token_id", "whole numbers"]),
    ] {
        let mut config = good.clone();
        config[key] = value.clone();
        place.write("model/config.json", config.to_string().as_bytes());
        faults.extend(load_fault(&place, "model", &parts).map(|fault| format!("{key} = {value}: {fault}")));
    }
    for (text, part) in
        [("", "text that is no JSON"), ("[1]", "a JSON object, found [1]"), ("{\"a\": ", "text that is no JSON"), ("\u{feff}{}", "JSON")]
    {
        place.write("model/config.json", text.as_bytes());
        faults.extend(load_fault(&place, "model", &["model/config.json: file", part]));
    }
    place.write("model/config.json", b"\xff\xfe{}");
    faults.extend(load_fault(&place, "model", &["model/config.json: file: expected UTF-8 text"]));
    place.write("model/config.json", good.to_string().as_bytes());
    for (text, parts) in
        [("{", ["generation_config.json", "no JSON"]), ("{\"temperature\": \"hot\"}", ["generation_config.json: temperature", "\"hot\""])]
    {
        place.write("model/generation_config.json", text.as_bytes());
        faults.extend(load_fault(&place, "model", &parts));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn damaged_weights() {
    let place = Place::new();
    let mut faults = Vec::new();
    let good = std::fs::read(place.path("model/model.safetensors")).unwrap();
    let header_bytes = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(good[8..8 + header_bytes].to_vec()).unwrap();
    let with_header = |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &good[8 + header_bytes..]].concat();
    let renamed = header.replace("model.norm.weight", "model.nrom.weight");
    let reshaped = header.replacen("[64]", "[8,8]", 1);
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (Vec::new(), &["model.safetensors", "8 bytes of header length", "0 bytes"]),
        (good[..100].to_vec(), &["model.safetensors", "cut short"]),
        (good[..good.len() - 4].to_vec(), &["model.safetensors: model.norm.weight: expected data_offsets within the"]),
        ([&good[..], b"xxxx"].concat(), &["model.safetensors: end of file: expected"]),
        (vec![0xff; 64], &["model.safetensors", "not a safetensors file, or cut short"]),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), &["model.safetensors"]),
        (with_header(&renamed), &["model.nrom.weight: expected only tensors of the model that config.json describes"]),
        (with_header(&reshaped), &["[8, 8]"]),
        (with_header(&header.replace("\"F32\"", "\"I32\"")), &["F32, BF16, F16 or F64", "I32"]),
        (with_header(&header.replace("\"F32\"", "\"Q4\"")), &["Q4"]),
    ];
    for (bytes, parts) in cases {
        place.write("model/model.safetensors", &bytes);
        faults.extend(load_fault(&place, "model", parts));
    }
    std::fs::remove_file(place.path("model/model.safetensors")).unwrap();
    faults.extend(load_fault(&place, "model", &["model: weights: expected"]));
    std::fs::create_dir(place.path("model/model.safetensors")).unwrap();
    faults.extend(load_fault(&place, "model", &["model.safetensors"]));
    let shards = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"];
    let index = "model.safetensors.index.json";
    place.copy("dense_sharded", "sharded", &[&shards[..], &["config.json", index]].concat());
    let listed = std::fs::read_to_string(place.path("sharded").join(index)).unwrap();
    for (text, parts) in [
        ("{".to_string(), &["index.json: index: expected an object whose weight_map"][..]),
        ("{\"weight_map\": []}".to_string(), &["index.json: index"]),
        (listed.replace(shards[1], "../../etc/passwd"), &["index.json", "../../etc/passwd"]),
        (listed.replace(shards[1], shards[0]), &["this tensor, which the index places here"]),
        (listed.replacen("model.norm.weight", "model.extra.weight", 1), &["model.extra.weight"]),
    ] {
        place.write(&format!("sharded/{index}"), text.as_bytes());
        faults.extend(load_fault(&place, "sharded", parts));
    }
    place.write(&format!("sharded/{index}"), listed.as_bytes());
    std::fs::remove_file(place.path("sharded").join(shards[2])).unwrap();
    faults.extend(load_fault(&place, "sharded", &["expected the shard model-00003-of-00003.safetensors"]));
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn damaged_tokenizers() {
    let place = Place::new();
    place.copy("tokenizer", "tokens", &["tokenizer.json", "tokenizer_config.json"]);
    let good = std::fs::read_to_string(place.path("tokens/tokenizer.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&good).unwrap();
    let with = |path: &str, value: serde_json::Value| {
        let mut json = json.clone();
        *json.pointer_mut(path).expect(path) = value;
        json.to_string()
    };
    let mut faults = Vec::new();
    for (text, parts) in [
        (String::new(), &["tokens/tokenizer.json: tokenizer: expected a tokenizer.json of a byte-level BPE"][..]),
        (good[..good.len() / 2].to_string(), &["tokenizer.json: tokenizer: expected a tokenizer.json"]),
        ("{}".into(), &["tokenizer.json: tokenizer: expected a tokenizer.json"]),
        (with("/model/type", "Unigram".into()), &["tokenizer.json"]),
        (with("/model/vocab", serde_json::json!({})), &["tokenizer.json"]),
        (with("/model/vocab", serde_json::json!({ "a": -1 })), &["tokenizer.json"]),
        (with("/model/merges", serde_json::json!([["a", "never"]])), &["tokenizer.json"]),
        (with("/decoder", serde_json::Value::Null), &["a decoder other than ByteLevel is not supported"]),
        (with("/added_tokens", serde_json::json!([{ "id": 0 }])), &["tokenizer.json"]),
    ] {
        place.write("tokens/tokenizer.json", text.as_bytes());
        let script = body("tokenizer.load('tokens')");
        faults.extend(place.script_fault(&script, &[parts, &["s.lua:6: "][..]].concat()));
    }
    place.write("tokens/tokenizer.json", good.as_bytes());
    for text in ["{", "[]", "{\"chat_template\": \"{% if %}\"}"] {
        place.write("tokens/tokenizer_config.json", text.as_bytes());
        faults.extend(
            place.script_fault(&body("tokenizer.load('tokens'):chat { { role = 'user', content = 'x' } }"), &["tokenizer_config.json"]),
        );
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
