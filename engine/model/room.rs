//! Whether training fits where a model lies, said before it starts: what is certain to be asked for, against what is free. What
//! a step takes in all, its parts with the largest first, is `sizes.rs`' prediction.

use super::Model;
use super::sizes::{TrainingStep, training_parts};
use crate::error::{Error, Result};
use crate::kernels::available_memory::{available_bytes, fits};
use crate::kernels::element::Dtype;

const GIB: f64 = (1u64 << 30) as f64;

impl Model {
    /// Refuses training that cannot fit.
    ///
    /// - `tokens`: of a micro-batch; 0 if none is known yet, and its activations do not count then
    /// - `moments`: the type in which AdamW keeps them
    /// - `to_come`: bytes that training is certain to ask for and has not asked for yet, activations left out
    ///
    /// Errors: [`Error::Argument`] with all parts of a step, if `to_come` and, on a device, the activations of a model that trains
    /// all its weights are more than is free. An adapter's are fewer than predicted, and those of the host are not counted: what may
    /// fit after all is not refused.
    pub fn check_training_room(&self, op: &'static str, tokens: usize, moments: Dtype, to_come: u64) -> Result<()> {
        let step = self.training_step(tokens, moments);
        let parts = training_parts(self.config(), &step);
        let activations = parts.iter().find(|(part, _)| *part == "activations").map_or(0, |(_, bytes)| *bytes);
        let is_certain = self.place().device().is_some() && self.adapter().is_none();
        let needed = to_come.saturating_add(if is_certain { activations } else { 0 });
        let (has_room, free) = match self.place().device() {
            Some(device) => {
                // What a checkpoint holds there while it is written comes back, and captured steps can be captured again.
                let has_room = || needed <= device.memory_bytes_free();
                let makes_room = || {
                    self.training.lock().expect("no panic happens under this lock").clear();
                    has_room()
                };
                (has_room() || device.wait_for_marks() && has_room() || makes_room(), Some(device.memory_bytes_free()))
            }
            None => (fits(needed), available_bytes()),
        };
        if has_room {
            return Ok(());
        }
        let free = free.map_or_else(String::new, |free| format!(" ({:.2} GiB are free)", free as f64 / GIB));
        let place = match self.place().device() {
            Some(device) => format!("{} ({})", self.place(), device.name),
            None => "this machine".into(),
        };
        let named = parts.iter().map(|(part, bytes)| format!("{part} {:.2} GiB", *bytes as f64 / GIB)).collect::<Vec<_>>().join(", ");
        let total = parts.iter().map(|(_, bytes)| bytes).sum::<u64>() as f64 / GIB;
        let (arg, what) = match tokens {
            0 => ("model", "a step without activations".into()),
            tokens => ("batch", format!("a step of {tokens} tokens")),
        };
        let expected = format!("a training step that fits the memory of {place}{free}");
        let got = format!("{what} that takes {total:.2} GiB ({named}); {}", self.remedies(&step));
        Err(Error::argument(op, arg, expected, got))
    }

    fn training_step(&self, tokens: usize, moments: Dtype) -> TrainingStep {
        TrainingStep {
            dtype: self.dtype(),
            tokens,
            trainable: self.trainable() as u64,
            moments,
            recompute: self.recomputes(),
            device_bytes: self.place().device().map(|device| device.memory_bytes as u64),
        }
    }

    /// What makes a step smaller, and has not been done.
    fn remedies(&self, step: &TrainingStep) -> String {
        let mut remedies = Vec::new();
        if step.tokens > 0 {
            remedies.push("smaller micro-batches");
        }
        if step.tokens > 0 && !step.recompute {
            remedies.push("the model's option recompute = true");
        }
        if self.adapter().is_none() {
            remedies.push("an adapter (lora = { rank = 16 }) in place of all weights");
        }
        if step.dtype.size() == 4 && step.tokens > 0 {
            remedies.push("dtype = \"bf16\"");
        }
        if step.moments == Dtype::F32 {
            remedies.push("the optimizer's option moments = \"bf16\"");
        }
        remedies.push("a smaller model or another device");
        format!("what helps: {}", remedies.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::super::presets::{preset, with_fields};
    use super::*;
    use serde_json::json;

    #[test]
    fn what_cannot_fit_is_refused_with_its_parts_and_what_helps() {
        let fields: Vec<_> = [("vocab", json!(96)), ("hidden", json!(32)), ("layers", json!(2)), ("heads", json!(2))]
            .into_iter()
            .map(|(name, value)| (name.to_string(), value))
            .collect();
        let config = with_fields(&preset("tiny").unwrap(), &fields).unwrap();
        let model = Model::random(config, Dtype::F32, 1).unwrap();
        // Activations of the host are a guess, which refuses nothing.
        model.check_training_room("adamw", 1 << 50, Dtype::F32, 0).unwrap();
        let message = model.check_training_room("adamw", 0, Dtype::F32, 1 << 60).unwrap_err().to_string();
        let at = |part: &str| message.find(part).unwrap_or_else(|| panic!("{part} in {message}"));
        assert!(at("moments of AdamW") < at("gradients of weights"), "{message}");
        assert!(message.contains("without activations") && message.contains("lora") && message.contains("moments = \"bf16\""), "{message}");
    }
}
