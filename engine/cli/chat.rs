//! `perilune chat MODEL`: a conversation in the terminal. Answers stream; Ctrl-C ends an answer, Ctrl-D the conversation.

use super::generate::{parse_dtype, show};
use crate::checkpoint::folder::require_folder;
use crate::data::chat_template::{ChatTemplate, Rendering};
use crate::data::tokenizer::{Specials, Tokenizer};
use crate::error::{Error, Result};
use crate::host::interrupt;
use crate::infer::generate::generate_text;
use crate::infer::sampler::Rules;
use crate::infer::scheduler::{Finish, Job};
use crate::kernels::random::Stream;
use crate::model::Model;
use crate::model::generation_config::GenerationConfig;
use crate::tensor::Place;
use serde_json::{Value, json};
use std::io::{self, BufRead, IsTerminal};
use std::path::{Path, PathBuf};

/// Talk to a model.
#[derive(clap::Args)]
#[command(allow_negative_numbers = true)]
pub struct ChatArgs {
    /// Folder of a Hugging Face checkpoint.
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// What the model is told before the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most tokens of an answer.
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    /// Logits are divided by it; 0 takes the most likely token each time [default: the model's own, else 0.7].
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Start of all random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Weights in f32, bf16 or int8 [default: as they are stored].
    #[arg(long)]
    dtype: Option<String>,
    /// Where to compute: cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one.
    #[arg(long, default_value = "cpu")]
    device: String,
}

const HELP: &str = "\
/reset         begin anew
/system TEXT   begin anew with these instructions
/undo          take back the last question and answer
/help          this list
/exit          leave (so does Ctrl-D)";

/// What a line of the user means.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Reset,
    System(&'a str),
    Undo,
    Help,
    Exit,
    Unknown(&'a str),
    Empty,
    Say(&'a str),
}

fn meaning(line: &str) -> Line<'_> {
    let line = line.trim();
    let Some(command) = line.strip_prefix('/') else { return if line.is_empty() { Line::Empty } else { Line::Say(line) } };
    match command.split_once(char::is_whitespace).unwrap_or((command, "")) {
        ("reset", _) => Line::Reset,
        ("system", text) if !text.trim().is_empty() => Line::System(text.trim()),
        ("undo", _) => Line::Undo,
        ("help", _) => Line::Help,
        ("exit" | "quit", _) => Line::Exit,
        _ => Line::Unknown(line),
    }
}

/// A conversation: the messages so far, the system's first if there is one.
struct Conversation {
    messages: Vec<Value>,
}

impl Conversation {
    fn new(system: Option<&str>) -> Self {
        Self { messages: system.into_iter().map(|text| json!({ "role": "system", "content": text })).collect() }
    }

    fn add(&mut self, role: &str, content: &str) {
        self.messages.push(json!({ "role": role, "content": content }));
    }

    /// Takes back the last question and what follows it; false if there is none.
    fn undo(&mut self) -> bool {
        let last = self.messages.iter().rposition(|message| message["role"] == "user");
        self.messages.truncate(last.unwrap_or(self.messages.len()));
        last.is_some()
    }
}

/// Talks until the input ends. Errors: those of loading the model and of generation.
pub fn chat(args: ChatArgs) -> Result<()> {
    let dtype = args.dtype.as_deref().map(parse_dtype).transpose()?;
    let defaults = GenerationConfig::load(&args.model)?.unwrap_or_default();
    require_folder(&args.model)?;
    let tokenizer = Tokenizer::from_folder(&args.model)?;
    let template = ChatTemplate::from_folder(&args.model)?;
    let model = Model::load_at(&Place::named(&args.device)?, &args.model, dtype, false, &mut |remark| eprintln!("note: {remark}"))?;
    tokenizer.check_fits(model.config().vocab)?;
    let rules = rules(&args, &defaults);
    rules.check()?;
    let mut stop_ids = if defaults.eos.is_empty() { model.config().eos.clone() } else { defaults.eos.clone() };
    stop_ids.extend(tokenizer.im_end().filter(|id| !stop_ids.contains(id)));
    interrupt::listen()?;
    let is_terminal = io::stdin().is_terminal();
    let mut out = io::stdout();
    if is_terminal {
        let count = super::units::count(model.count() as f64);
        show(&mut out, &format!("{count} parameters, {}; /help lists commands\n", model.dtype_name()))?;
    }
    let (mut conversation, mut answers) = (Conversation::new(args.system.as_deref()), 0u64);
    loop {
        if is_terminal {
            show(&mut out, "\n> ")?;
        }
        let mut bytes = Vec::new();
        let read = io::stdin().lock().read_until(b'\n', &mut bytes);
        if read.map_err(|error| Error::io(Path::new("standard input"), "read", error))? == 0 {
            return Ok(());
        }
        let Ok(line) = String::from_utf8(bytes) else {
            show(&mut out, "this line is no UTF-8 text, and was not read\n")?;
            continue;
        };
        interrupt::clear();
        match meaning(&line) {
            Line::Reset => conversation = Conversation::new(args.system.as_deref()),
            Line::System(text) => conversation = Conversation::new(Some(text)),
            Line::Undo if conversation.undo() => {}
            Line::Undo => show(&mut out, "nothing to take back\n")?,
            Line::Help => show(&mut out, &format!("{HELP}\n"))?,
            Line::Exit => return Ok(()),
            Line::Unknown(command) => show(&mut out, &format!("no command {command}\n{HELP}\n"))?,
            Line::Empty => {}
            Line::Say(text) => {
                conversation.add("user", text);
                let rendering = Rendering { add_generation_prompt: true, ..Rendering::default() };
                let prompt = template.tokens(&tokenizer, &conversation.messages, &rendering, Specials::Plain)?.ids;
                let prompt: Vec<i32> = prompt.into_iter().map(|id| id as i32).collect();
                if prompt.len() >= model.config().max_positions {
                    show(&mut out, "the conversation has reached the model's last position; /reset begins anew\n")?;
                    conversation.undo();
                    continue;
                }
                let seed = Stream::new(args.seed, "chat").bits(answers);
                answers += 1;
                let job = Job { stop_ids: stop_ids.clone(), ..Job::new(prompt, args.max_tokens, rules, seed) };
                let mut said = String::new();
                let answer = generate_text(&model, &tokenizer, job, &mut |piece| {
                    if interrupt::is_pending() {
                        return Err(Error::Interrupted);
                    }
                    said.push_str(piece);
                    show(&mut out, piece)
                });
                match answer {
                    Ok(text) if text.finish == Finish::Length => show(&mut out, " [cut]\n")?,
                    Ok(_) => show(&mut out, "\n")?,
                    Err(Error::Interrupted) if interrupt::is_pending() => show(&mut out, " [stopped]\n")?,
                    Err(error) => return Err(error),
                }
                conversation.add("assistant", said.trim_end());
            }
        }
    }
}

fn rules(args: &ChatArgs, defaults: &GenerationConfig) -> Rules {
    let own = |value: Option<f64>, off: f64| value.filter(|_| defaults.do_sample).unwrap_or(off);
    Rules {
        repetition_penalty: defaults.repetition_penalty.unwrap_or(1.0),
        temperature: args.temperature.unwrap_or(own(defaults.temperature, 0.7)),
        top_k: defaults.top_k.filter(|_| defaults.do_sample).unwrap_or(0),
        top_p: own(defaults.top_p, 1.0),
        min_p: own(defaults.min_p, 0.0),
        ..Rules::GREEDY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_questions() {
        assert_eq!(meaning("  hello /reset\n"), Line::Say("hello /reset"));
        assert_eq!([meaning("/reset"), meaning("/undo\n"), meaning("/quit")], [Line::Reset, Line::Undo, Line::Exit]);
        assert_eq!(meaning("/system  Be brief. \n"), Line::System("Be brief."));
        assert_eq!([meaning("/system"), meaning("/rest")], [Line::Unknown("/system"), Line::Unknown("/rest")]);
        assert_eq!(meaning(" \n"), Line::Empty);
    }

    #[test]
    fn the_last_turn_can_be_taken_back() {
        let mut conversation = Conversation::new(Some("Be brief."));
        assert!(!conversation.undo());
        conversation.add("user", "a");
        conversation.add("assistant", "b");
        conversation.add("user", "c");
        assert!(conversation.undo());
        assert_eq!(conversation.messages.len(), 3);
        assert!(conversation.undo());
        assert_eq!(conversation.messages, [json!({ "role": "system", "content": "Be brief." })]);
    }
}
