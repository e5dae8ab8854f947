//! Weights that are frozen and thawed while a model trains, by parts of their names. What never trains was made so (the base of
//! an adapter, a frozen model), and is not touched here.

use super::any::Model;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::sync::MutexGuard;

/// Whether `part` is `name`, or whole words of it: `layers.1` is a part of `model.layers.1.mlp.down_proj.weight`, not of layer 10's.
fn is_part(part: &str, name: &str) -> bool {
    !part.is_empty() && format!(".{name}.").contains(&format!(".{part}."))
}

impl Model {
    fn lock_held(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.held.lock().expect("nothing panics while weights are frozen")
    }

    /// The weights that are frozen for now, each by the first of the tensors that it holds.
    pub fn held(&self) -> BTreeSet<String> {
        self.lock_held().clone()
    }

    /// Freezes the weights that are in `held`, and thaws those that are frozen and not in it.
    pub fn set_held(&self, held: &BTreeSet<String>) {
        let before = std::mem::replace(&mut *self.lock_held(), held.clone());
        // The version of a base is that of what does not train.
        self.keep_seen(|| {
            on_graph!(self, graph => {
                for (parameter, tensors) in graph.parameters().iter().zip(self.tensor_rows()) {
                    let name = &tensors[0].name;
                    if held.contains(name) != before.contains(name) {
                        parameter.set_trains(!held.contains(name));
                    }
                }
            });
            Ok(())
        })
        .expect("flags are set without an error");
    }

    /// Freezes the weights that train and that `parts` name: they get no gradient, lose the one that waits, and an optimizer leaves
    /// them and their moments as they are.
    ///
    /// - `parts`: names of tensors, or whole words of them: `layers.0`, `embed_tokens`, `mlp.down_proj`
    ///
    /// Errors: [`Error::Argument`] for a part of no tensor, for some tensors of a matrix that holds others too, and where nothing
    /// trains.
    pub fn freeze(&self, parts: &[String]) -> Result<()> {
        let mut held = self.held();
        let training = self.named_by("freeze", parts, &held)?;
        if training.is_empty() {
            let got = "only ones that do not train: a frozen model, or the base of an adapter";
            return Err(Error::argument("freeze", "names", "weights that train", got));
        }
        held.extend(training);
        self.set_held(&held);
        Ok(())
    }

    /// Undoes [`Model::freeze`] for the weights that `parts` name, or for all.
    ///
    /// Errors: as there, but that what is not frozen stays as it is.
    pub fn thaw(&self, parts: Option<&[String]>) -> Result<()> {
        let mut held = self.held();
        match parts {
            None => held.clear(),
            Some(parts) => {
                let named = self.named_by("thaw", parts, &held)?;
                held.retain(|name| !named.contains(name));
            }
        }
        self.set_held(&held);
        Ok(())
    }

    /// The parameters that `parts` name, of those that train or are in `held`, each by its first tensor.
    fn named_by(&self, op: &'static str, parts: &[String], held: &BTreeSet<String>) -> Result<Vec<String>> {
        let rows = self.tensor_rows();
        if let Some(part) = parts.iter().find(|part| !rows.iter().flatten().any(|tensor| is_part(part, &tensor.name))) {
            let expected = "names of this model's tensors, or whole words of them, such as layers.0 or embed_tokens";
            return Err(Error::argument(op, "names", expected, format!("{part:?}")));
        }
        let trains: Vec<bool> = on_graph!(self, graph => graph.parameters().iter().map(|parameter| parameter.trains()).collect());
        let mut named = Vec::new();
        for (tensors, trains) in rows.iter().zip(trains) {
            let all: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
            let (inside, outside): (Vec<&str>, Vec<&str>) = all.iter().partition(|name| parts.iter().any(|part| is_part(part, name)));
            if inside.is_empty() || !(trains || held.contains(all[0])) {
                continue;
            }
            if !outside.is_empty() {
                let expected = format!("{} together with {}, beside which it lies in one matrix", inside.join(", "), outside.join(", "));
                return Err(Error::argument(op, "names", expected, format!("{parts:?}")));
            }
            named.push(all[0].to_string());
        }
        Ok(named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::element::Dtype;
    use crate::model::Lora;
    use crate::model::presets::{preset, with_fields};
    use serde_json::json;

    fn model() -> Model {
        let fields = [("vocab", 32), ("hidden", 16), ("layers", 2), ("heads", 2), ("kv_heads", 1), ("intermediate", 24)];
        let fields: Vec<_> = fields.into_iter().map(|(name, value)| (name.to_string(), json!(value))).collect();
        Model::random(with_fields(&preset("tiny").unwrap(), &fields).unwrap(), Dtype::F32, 1).unwrap()
    }

    fn parts(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn parts_are_whole_words() {
        assert!(is_part("layers.1", "model.layers.1.mlp.down_proj.weight"));
        assert!(!is_part("layers.1", "model.layers.10.mlp.down_proj.weight"));
        assert!(!is_part("norm", "model.layers.1.input_layernorm.weight"));
        assert!(is_part("model.norm.weight", "model.norm.weight"));
        assert!(!is_part("", "model.norm.weight"));
    }

    #[test]
    fn what_is_frozen_is_thawed_and_nothing_else() {
        let model = model();
        let (all, version) = (model.trainable(), model.version());
        model.freeze(&parts(&["layers.0", "norm"])).unwrap();
        let some = model.trainable();
        assert!(some < all && model.version() != version, "{some} of {all}");
        // Twice is once, and an image remembers.
        model.freeze(&parts(&["layers.0"])).unwrap();
        let image = model.copy().unwrap();
        assert_eq!((model.trainable(), image.trainable(), image.held()), (some, some, model.held()));
        model.thaw(Some(&parts(&["norm"]))).unwrap();
        assert_eq!(model.trainable(), some + 16);
        model.copy_from(&image).unwrap();
        assert_eq!(model.trainable(), some);
        model.thaw(None).unwrap();
        assert_eq!(model.trainable(), all);
    }

    #[test]
    fn the_base_of_an_adapter_is_never_thawed() {
        let model = model();
        model.adapt(Lora { targets: parts(&["q_proj"]), modules_to_save: parts(&["model.norm"]), ..Lora::default() }, 1).unwrap();
        let all = model.trainable();
        assert!(!model.base_changed());
        model.freeze(&parts(&["layers.0", "model.norm"])).unwrap();
        assert!(model.trainable() < all / 2 && !model.base_changed());
        model.thaw(None).unwrap();
        assert!(model.trainable() == all && !model.base_changed());
        // The base of q_proj lies in a matrix with k_proj and v_proj; its adapter is its own.
        model.freeze(&parts(&["layers.1.self_attn.q_proj"])).unwrap();
        assert!(model.trainable() < all);
        let wrong = model.freeze(&parts(&["embed_tokens"])).unwrap_err().to_string();
        assert!(wrong.contains("base of an adapter"), "{wrong}");
    }

    #[test]
    fn names_that_cannot_be_meant_are_refused() {
        let model = model();
        let wrong = model.freeze(&parts(&["layers.7"])).unwrap_err().to_string();
        assert!(wrong.contains("layers.7") && wrong.contains("embed_tokens"), "{wrong}");
        let wrong = model.freeze(&parts(&["q_proj"])).unwrap_err().to_string();
        assert!(wrong.contains("layers.0.self_attn.k_proj.weight"), "{wrong}");
        model.freeze(&parts(&["q_proj", "k_proj", "v_proj"])).unwrap();
    }
}
