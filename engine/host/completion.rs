//! `Model:complete`: one text continued, sampled or greedy, for samples while a model trains. The rules and the loop are
//! engine/infer's; this file reads a script's options.

use super::call::{Answer, Call};
use super::globals::take_counters;
use super::model::ModelObject;
use super::replay::must_end;
use crate::data::tokenizer::Specials;
use crate::error::Error;
use crate::infer::generate::{Request, generate_text};
use crate::infer::sampler::Rules;

const OPTIONS: &[&str] = &["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop"];

/// `model:complete(prompt, options)`: the text that follows the prompt.
pub fn complete(call: &Call) -> Answer {
    let this = call.subject::<ModelObject>()?.clone();
    let prompt = call.string(0)?;
    let options = call.options(1, OPTIONS)?;
    let Some(tokenizer) = &this.tokenizer else {
        let expected = "a model with a tokenizer; give one with the option `tokenizer` where the model is made";
        return Err(Error::argument(call.op, "self", expected, "a model without").into());
    };
    let tokenizer = &*tokenizer.tokenizer;
    let rules = Rules {
        temperature: options.number("temperature")?.unwrap_or(1.0),
        top_k: options.count("top_k", 0)?.unwrap_or(0),
        top_p: options.number("top_p")?.unwrap_or(1.0),
        min_p: options.number("min_p")?.unwrap_or(0.0),
        repetition_penalty: options.number("repetition_penalty")?.unwrap_or(1.0),
    };
    let stops = options.strings("stop")?.unwrap_or_default();
    let seed = match options.integer("seed")? {
        Some(seed) => seed as u64,
        // Each completion of a run draws its own numbers, and the same ones when the run is run again.
        None => {
            let (stream, counter) = take_counters(call.lua, 1);
            stream.bits(counter)
        }
    };
    let prompt: Vec<i32> = tokenizer.encode(&prompt, Specials::Recognise).into_iter().map(|id| id as i32).collect();
    let stop_ids = this.stop_ids();
    let request = Request {
        prompt: &prompt,
        max_tokens: options.count("max_tokens", 0)?.unwrap_or(128),
        rules,
        seed,
        stop_ids: &stop_ids,
        vocab: None,
    };
    // In a loop the wish to stop waits for the boundary: half a completion must not reach what is recorded.
    let text = generate_text(&this.model, tokenizer, &request, &stops, &|| must_end(call.lua).is_some(), &mut |_| Ok(()));
    match must_end(call.lua) {
        Some(error) => Err(error.into()),
        None => call.give(text?.text),
    }
}
