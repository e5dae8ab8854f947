//! `perilune generate MODEL`: continues a prompt, or answers it as a chat. Options that are not given come from the
//! model's generation_config.json.

use crate::checkpoint::folder::require_folder;
use crate::data::chat_template::{ChatTemplate, Rendering};
use crate::data::tokenizer::{Specials, Tokenizer};
use crate::error::{Error, Result};
use crate::infer::generate::{generate as infer, generate_text};
use crate::infer::sampler::Rules;
use crate::infer::scheduler::{Job, Text};
use crate::kernels::element::Dtype;
use crate::model::Model;
use crate::model::generation_config::GenerationConfig;
use crate::tensor::Place;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Continue a prompt with a model, or answer it as a chat.
#[derive(clap::Args)]
#[command(allow_negative_numbers = true)]
pub struct GenerateArgs {
    /// Folder of a Hugging Face checkpoint.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// The text to continue; control tokens such as <|im_start|> may be written out.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Take the prompt as a user's message, in the model's chat template.
    #[arg(long)]
    chat: bool,
    /// Most tokens to generate [default: the model's own, else 256].
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Logits are divided by it; 0 takes the most likely token each time.
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Keep the K most likely tokens; 0 is off.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the most likely tokens that together reach probability P; 1 is off.
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Drop tokens less likely than P times the most likely one; 0 is off.
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,
    /// Divide positive and multiply negative logits of tokens already there; 1 is off.
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f64>,
    /// Taken from logits of tokens that were generated; 0 is off.
    #[arg(long, value_name = "R", allow_hyphen_values = true)]
    presence_penalty: Option<f64>,
    /// The same for each time that a token was generated; 0 is off.
    #[arg(long, value_name = "R", allow_hyphen_values = true)]
    frequency_penalty: Option<f64>,
    /// Start of all random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End the text before this string; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Weights in f32, bf16 or int8 [default: as they are stored].
    #[arg(long)]
    dtype: Option<String>,
    /// Where to compute: cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Print one JSON object at the end instead of the text as it comes.
    #[arg(long)]
    json: bool,
}

/// Generates and prints. Errors: those of loading the model and its tokenizer, and of [`generate_text`].
pub fn generate(args: GenerateArgs) -> Result<()> {
    let dtype = args.dtype.as_deref().map(parse_dtype).transpose()?;
    if args.max_tokens == Some(0) {
        return Err(Error::argument("generate", "--max-tokens", "at least 1", 0));
    }
    let defaults = GenerationConfig::load(&args.model)?.unwrap_or_default();
    let rules = rules(&args, &defaults);
    rules.check()?;
    require_folder(&args.model)?;
    let tokenizer = Tokenizer::from_folder(&args.model)?;
    let prompt = prompt_tokens(&args, &tokenizer)?;
    let place = Place::named(&args.device)?;
    let model = Model::load_at(&place, &args.model, dtype, false, &mut |remark| eprintln!("note: {remark}"))?;
    tokenizer.check_fits(model.config().vocab)?;
    let stop_ids = stop_ids(&args, &defaults, &model.config().eos, &tokenizer);
    let prompt_tokens = prompt.len();
    let max_tokens = args.max_tokens.or(defaults.max_new_tokens).unwrap_or(256);
    let job = Job { stop_ids, stops: args.stop.clone(), ..Job::new(prompt, max_tokens, rules, args.seed) };
    let mut out = std::io::stdout();
    if !args.json {
        generate_text(&model, &tokenizer, job, &mut |piece| show(&mut out, piece))?;
        return show(&mut out, "\n");
    }
    let start = Instant::now();
    let mut prompt_seconds = None;
    let texts = infer(&model, Some(&tokenizer), vec![job], None, &mut |event| {
        prompt_seconds = prompt_seconds.or_else(|| event.map(|_| start.elapsed().as_secs_f64()));
        Ok(())
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let text = texts.into_iter().flatten().next().ok_or(Error::Interrupted)?;
    show(&mut out, &format!("{}\n", report(&text, prompt_tokens, prompt_seconds.unwrap_or(seconds), seconds)))
}

/// Writes at once. A reader that has gone away (`| head`) is a wish to stop.
pub(super) fn show(out: &mut impl Write, text: &str) -> Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(Error::Interrupted),
        Err(error) => Err(Error::io(Path::new("standard output"), "write", error)),
    }
}

pub(super) fn parse_dtype(name: &str) -> Result<Dtype> {
    crate::model::parse_dtype(name).ok_or_else(|| Error::argument("generate", "--dtype", "f32, bf16 or int8", format!("{name:?}")))
}

fn prompt_tokens(args: &GenerateArgs, tokenizer: &Tokenizer) -> Result<Vec<i32>> {
    let ids = if args.chat {
        let template = ChatTemplate::from_folder(&args.model)?;
        let rendering = Rendering { add_generation_prompt: true, ..Rendering::default() };
        // What a user typed must not become a control token.
        template.tokens(tokenizer, &[json!({ "role": "user", "content": args.prompt })], &rendering, Specials::Plain)?.ids
    } else {
        tokenizer.encode(&args.prompt, Specials::Recognise)
    };
    if ids.is_empty() {
        return Err(Error::argument("generate", "--prompt", "a text of at least one token", "an empty one"));
    }
    Ok(ids.into_iter().map(|id| id as i32).collect())
}

/// The command line's rules over the file's. A rule that only sampling has switches sampling on.
fn rules(args: &GenerateArgs, defaults: &GenerationConfig) -> Rules {
    // The file's sampling values are without effect where it does not sample.
    let sampled = |value: Option<f64>, off: f64| value.filter(|_| defaults.do_sample).unwrap_or(off);
    let asks = args.top_k.is_some() || args.top_p.is_some() || args.min_p.is_some();
    let temperature = if defaults.do_sample { defaults.temperature.unwrap_or(1.0) } else { f64::from(u8::from(asks)) };
    Rules {
        repetition_penalty: args.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
        temperature: args.temperature.unwrap_or(temperature),
        top_k: args.top_k.or(defaults.top_k.filter(|_| defaults.do_sample)).unwrap_or(0),
        top_p: args.top_p.unwrap_or(sampled(defaults.top_p, 1.0)),
        min_p: args.min_p.unwrap_or(sampled(defaults.min_p, 0.0)),
        presence_penalty: args.presence_penalty.unwrap_or(0.0),
        frequency_penalty: args.frequency_penalty.unwrap_or(0.0),
    }
}

/// generation_config.json has the first word, then config.json, then the tokenizer; a chat's turn ends by its own token.
fn stop_ids(args: &GenerateArgs, defaults: &GenerationConfig, config: &[u32], tokenizer: &Tokenizer) -> Vec<u32> {
    let mut ids = match (&defaults.eos[..], config) {
        ([], []) => tokenizer.eos().into_iter().collect(),
        ([], config) => config.to_vec(),
        (file, _) => file.to_vec(),
    };
    ids.extend(tokenizer.im_end().filter(|id| args.chat && !ids.contains(id)));
    ids
}

/// - `prompt_seconds`: until the first token
/// - `seconds`: until the last
fn report(text: &Text, prompt_tokens: usize, prompt_seconds: f64, seconds: f64) -> Value {
    // The first token comes with the prompt: the rate is that of the others.
    let rate = (text.tokens.len() > 1).then(|| (text.tokens.len() - 1) as f64 / (seconds - prompt_seconds).max(1e-9));
    json!({
        "text": text.text,
        "tokens": text.tokens,
        "finish": text.finish.name(),
        "prompt_tokens": prompt_tokens,
        "generated_tokens": text.tokens.len(),
        "prompt_seconds": prompt_seconds,
        "seconds": seconds,
        "tokens_per_s": rate,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        args: GenerateArgs,
    }

    fn args(words: &str) -> GenerateArgs {
        Words::parse_from(format!("generate model --prompt x {words}").split_whitespace()).args
    }

    fn file(text: &str) -> GenerationConfig {
        GenerationConfig::parse(Path::new("generation_config.json"), text).unwrap()
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let samples = file(r#"{"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}"#);
        let got = rules(&args(""), &samples);
        assert_eq!(got, Rules { repetition_penalty: 1.05, temperature: 0.7, top_k: 20, top_p: 0.8, ..Rules::GREEDY });
        let got = rules(&args("--temperature 0 --top-k 3 --repetition-penalty 1"), &samples);
        assert_eq!(got, Rules { repetition_penalty: 1.0, temperature: 0.0, top_k: 3, top_p: 0.8, ..Rules::GREEDY });
    }

    #[test]
    fn a_file_that_does_not_sample_is_greedy_until_sampling_is_asked_for() {
        let greedy = file(r#"{"do_sample": false, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}"#);
        assert_eq!(rules(&args(""), &greedy), Rules { repetition_penalty: 1.1, ..Rules::GREEDY });
        assert_eq!(rules(&args("--top-k 5"), &file("{}")), Rules { temperature: 1.0, top_k: 5, ..Rules::GREEDY });
        assert_eq!(rules(&args("--temperature 0.5"), &file("{}")), Rules { temperature: 0.5, ..Rules::GREEDY });
    }

    #[test]
    fn stop_ids_come_from_the_first_that_names_any() {
        let tokenizer = Tokenizer::bytes_with_chat();
        assert_eq!(stop_ids(&args(""), &file(r#"{"eos_token_id": [2, 1]}"#), &[7], &tokenizer), [2, 1]);
        assert_eq!(stop_ids(&args(""), &file("{}"), &[7], &tokenizer), [7]);
        assert_eq!(stop_ids(&args(""), &file("{}"), &[], &tokenizer), [256]);
        assert_eq!(stop_ids(&args("--chat"), &file("{}"), &[7], &tokenizer), [7, 258]);
        assert_eq!(stop_ids(&args("--chat"), &file("{}"), &[258], &tokenizer), [258]);
    }
}
