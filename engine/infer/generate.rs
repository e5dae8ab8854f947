//! The generation loop: the model's logits for the last token, a choice, and again, until a stop token, a stop string, the
//! wanted length or a wish to stop. Every token runs the whole text through the model again: there is no cache of earlier
//! keys yet, so the cost of a text grows with the square of its length.

use super::sampler::{Rules, choose};
use super::stop_text::StopText;
use crate::data::tokenizer::{StreamDecoder, Tokenizer};
use crate::error::{Error, Result};
use crate::kernels::random::Stream;
use crate::model::{Model, Packed};
use std::ops::ControlFlow;

/// What to generate.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// `[tokens]`, at least one
    pub prompt: &'a [i32],
    /// Most tokens to generate; fewer if the model's positions end.
    pub max_tokens: usize,
    pub rules: Rules,
    /// The choice of token n depends on the seed, on n and on the logits alone.
    pub seed: u64,
    /// Ids that end the text; the one that did is kept in the tokens.
    pub stop_ids: &'a [u32],
    /// Ids from here on are never chosen: rows of padded embeddings have no text. None: all may be.
    pub vocab: Option<usize>,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// At a stop id.
    StopToken,
    /// At a stop string, or because the receiver of tokens wanted no more.
    StopText,
    /// At `max_tokens`, or at the model's last position.
    Length,
    /// Because `cancelled` said so.
    Cancelled,
}

impl Finish {
    /// As reports spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::StopToken => "stop_token",
            Self::StopText => "stop_text",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Generates tokens, each given to `each` as it comes, which may end the text by `Break`.
///
/// - `cancelled`: asked before every token
/// - returns the tokens after the prompt, and why they end
///
/// Errors: [`Error::Argument`] for an empty prompt, one longer than the model's positions, tokens outside its vocabulary,
/// and rules that cannot be meant; those of `each`.
pub fn generate(
    model: &Model,
    request: &Request,
    cancelled: &dyn Fn() -> bool,
    each: &mut dyn FnMut(i32) -> Result<ControlFlow<()>>,
) -> Result<(Vec<i32>, Finish)> {
    let positions = model.config().max_positions;
    request.rules.check()?;
    if request.prompt.is_empty() || request.prompt.len() > positions {
        let expected = format!("1 to {positions} tokens, the model's positions");
        return Err(Error::argument("generate", "prompt", expected, format!("{} tokens", request.prompt.len())));
    }
    let vocab = request.vocab.unwrap_or(usize::MAX).min(model.config().vocab);
    let stream = Stream::new(request.seed, "generate");
    let mut tokens = request.prompt.to_vec();
    let mut position_ids: Vec<i32> = (0..tokens.len() as i32).collect();
    let generated = |tokens: Vec<i32>| tokens[request.prompt.len()..].to_vec();
    for index in 0..request.max_tokens.min(positions - request.prompt.len()) {
        if cancelled() {
            return Ok((generated(tokens), Finish::Cancelled));
        }
        let input = Packed { tokens: &tokens, position_ids: &position_ids, cu_seqlens: &[0, tokens.len() as u32] };
        let logits = model.logits_at(&input, &[tokens.len() - 1])?;
        let mut logits = logits.values().to_vec();
        logits[vocab..].fill(f32::NEG_INFINITY);
        let token = choose(&request.rules, &logits, &tokens, stream.f64(index as u64))?;
        tokens.push(token as i32);
        position_ids.push(position_ids.len() as i32);
        if request.stop_ids.contains(&token) {
            return Ok((generated(tokens), Finish::StopToken));
        }
        if each(token as i32)?.is_break() {
            return Ok((generated(tokens), Finish::StopText));
        }
    }
    Ok((generated(tokens), Finish::Length))
}

/// A generated text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Without the stop string, and without special tokens.
    pub text: String,
    /// All tokens after the prompt, those of the stop string too.
    pub tokens: Vec<i32>,
    pub finish: Finish,
}

/// Generates text, given to `show` in pieces of whole characters as it comes. Ids without a text are never chosen.
///
/// - `stops`: strings that end the text; they are not shown
///
/// Errors: those of [`generate`], [`StopText::new`] and `show`.
pub fn generate_text(
    model: &Model,
    tokenizer: &Tokenizer,
    request: &Request,
    stops: &[String],
    cancelled: &dyn Fn() -> bool,
    show: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<Text> {
    let (mut decoder, mut stop, mut text) = (StreamDecoder::new(true), StopText::new(stops)?, String::new());
    let vocab = request.vocab.unwrap_or(usize::MAX).min(tokenizer.vocab_size());
    let request = Request { vocab: Some(vocab), ..request.clone() };
    let mut say = |piece: String| {
        text.push_str(&piece);
        if piece.is_empty() { Ok(()) } else { show(&piece) }
    };
    let (tokens, finish) = generate(model, &request, cancelled, &mut |token| {
        let id = token as u32;
        // A tokenizer may have gaps between its ids.
        let piece = if tokenizer.id_to_bytes(id).is_some() { decoder.push(tokenizer, id)? } else { String::new() };
        let (piece, ended) = stop.push(&piece);
        say(piece)?;
        Ok(if ended { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    })?;
    if finish != Finish::StopText {
        let (piece, _) = stop.push(&decoder.finish());
        say(piece)?;
        say(stop.finish())?;
    }
    Ok(Text { text, tokens, finish })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::safetensors::SafetensorsFile;
    use crate::kernels::element::Dtype;
    use crate::model::presets::{preset, with_fields};
    use serde_json::json;
    use std::path::{Path, PathBuf};

    const NEVER: &dyn Fn() -> bool = &|| false;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
    }

    fn tokens_of(model: &Model, request: &Request) -> (Vec<i32>, Finish) {
        generate(model, request, NEVER, &mut |_| Ok(ControlFlow::Continue(()))).unwrap()
    }

    fn greedy_tokens_are_the_golden_ones(name: &str, prompts: usize) {
        let folder = golden(name);
        let meta: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(folder.join("meta.json")).unwrap()).unwrap();
        let model = Model::load(&folder.join(meta["checkpoint"].as_str().unwrap()), None, false, &mut |_| {}).unwrap();
        let file = SafetensorsFile::open(&folder.join("expected.safetensors")).unwrap();
        let integers = |name: &str| file.read_integers(name).unwrap().iter().map(|id| *id as i32).collect::<Vec<_>>();
        for prompt in 0..prompts {
            let ids = integers(&format!("prompt{prompt}.input_ids"));
            let request = Request { prompt: &ids, max_tokens: 64, rules: Rules::GREEDY, seed: 0, stop_ids: &[], vocab: None };
            assert_eq!(tokens_of(&model, &request), (integers(&format!("prompt{prompt}.greedy")), Finish::Length), "{name} {prompt}");
            let rules = Rules { repetition_penalty: 1.3, ..Rules::GREEDY };
            let (penalised, _) = tokens_of(&model, &Request { rules, ..request.clone() });
            assert_eq!(penalised, integers(&format!("prompt{prompt}.greedy_rep1.3")), "{name} {prompt}");
            if prompt == 0 {
                let stop_ids: Vec<u32> = integers("stop.eos_ids").iter().map(|id| *id as u32).collect();
                let stopped = tokens_of(&model, &Request { stop_ids: &stop_ids, ..request });
                assert_eq!(stopped, (integers("stop.greedy"), Finish::StopToken), "{name}");
            }
        }
    }

    #[test]
    fn dense_greedy_tokens_are_the_golden_ones() {
        greedy_tokens_are_the_golden_ones("generate_dense", 4);
    }

    #[test]
    fn moe_greedy_tokens_are_the_golden_ones() {
        greedy_tokens_are_the_golden_ones("generate_moe", 3);
    }

    /// A model over the bytes tokenizer's 259 ids and 61 rows of padding, with large weights so that it is lively.
    fn byte_model() -> Model {
        let fields = json!({ "vocab": 320, "hidden": 32, "intermediate": 48, "layers": 1, "max_positions": 40, "initializer_range": 0.3 });
        let fields: Vec<_> = fields.as_object().unwrap().clone().into_iter().collect();
        Model::random(with_fields(&preset("tiny").unwrap(), &fields).unwrap(), Dtype::F32, 3).unwrap()
    }

    const WARM: Rules = Rules { temperature: 1.0, ..Rules::GREEDY };

    #[test]
    fn sampled_text_streams_repeats_by_seed_and_ends_at_the_last_position() {
        let (model, tokenizer) = (byte_model(), Tokenizer::bytes_with_chat());
        let request = Request { prompt: &[72, 105], max_tokens: 100, rules: WARM, seed: 1, stop_ids: &[], vocab: None };
        let run = |request: &Request| {
            let mut streamed = String::new();
            let mut show = |piece: &str| {
                streamed.push_str(piece);
                Ok(())
            };
            let text = generate_text(&model, &tokenizer, request, &[], NEVER, &mut show).unwrap();
            assert_eq!(streamed, text.text);
            text
        };
        let first = run(&request);
        assert_eq!((first.tokens.len(), first.finish), (38, Finish::Length));
        assert!(first.tokens.iter().all(|token| *token < 259), "padding rows have no text: {:?}", first.tokens);
        let ids: Vec<u32> = first.tokens.iter().map(|token| *token as u32).collect();
        assert_eq!(first.text, tokenizer.decode(&ids, true).unwrap());
        assert_eq!(first, run(&request));
        assert_ne!(first.tokens, run(&Request { seed: 2, ..request.clone() }).tokens);
        // A shorter text is the beginning of the longer one: the choice of a token depends on its index alone.
        assert_eq!(run(&Request { max_tokens: 5, ..request }).tokens, first.tokens[..5]);
    }

    #[test]
    fn stop_strings_and_wishes_end_a_text() {
        let (model, tokenizer) = (byte_model(), Tokenizer::bytes_with_chat());
        let request = Request { prompt: &[72, 105], max_tokens: 30, rules: WARM, seed: 1, stop_ids: &[], vocab: None };
        let whole = generate_text(&model, &tokenizer, &request, &[], NEVER, &mut |_| Ok(())).unwrap().text;
        let stop: String = whole.chars().filter(|c| *c != '\u{fffd}').nth(4).unwrap().into();
        let cut = generate_text(&model, &tokenizer, &request, std::slice::from_ref(&stop), NEVER, &mut |_| Ok(())).unwrap();
        assert_eq!((cut.text.as_str(), cut.finish), (whole.split(&stop).next().unwrap(), Finish::StopText));
        let asked = std::cell::Cell::new(0);
        let cancelled = || asked.replace(asked.get() + 1) == 3;
        let text = generate_text(&model, &tokenizer, &request, &[], &cancelled, &mut |_| Ok(())).unwrap();
        assert_eq!((text.tokens.len(), text.finish), (3, Finish::Cancelled));
    }

    #[test]
    fn prompts_that_cannot_be_continued_are_refused() {
        let model = byte_model();
        let long = [65; 41];
        for (prompt, wanted) in [(&[][..], "1 to 40 tokens"), (&long[..], "41 tokens"), (&[320][..], "an id from 0 to 319")] {
            let request = Request { prompt, max_tokens: 1, rules: WARM, seed: 0, stop_ids: &[], vocab: None };
            let message = generate(&model, &request, NEVER, &mut |_| Ok(ControlFlow::Continue(()))).unwrap_err().to_string();
            assert!(message.contains(wanted), "{message}");
        }
        let full = Request { prompt: &long[..40], max_tokens: 9, rules: WARM, seed: 0, stop_ids: &[], vocab: None };
        assert_eq!(tokens_of(&model, &full), (vec![], Finish::Length));
    }
}
