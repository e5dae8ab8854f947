//! What training keeps beside the weights of a model: the remainders that complete bf16 weights to their f32 masters, and
//! gradients that wait for their update. Copied in memory, and written beside a checkpoint in the layouts that the products
//! read: only this engine reads them. Weights themselves go the way of every checkpoint (`weights.rs`).

use super::graph::{Graph, Layer, Mlp, Sparse};
use crate::checkpoint::safetensors::SafetensorsFile;
use crate::checkpoint::stored_dtype::StoredDtype;
use crate::checkpoint::writer::{FolderWriter, SHARD_BYTES_MAX, TensorSpec};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::tensor::experts::{Expert, Experts};
use crate::tensor::{ModelElement, Parameter};
use std::path::Path;
use std::sync::Arc;

/// The one file of the folder, without its ending.
const STEM: &str = "training_state";

impl<E: ModelElement> Graph<E> {
    /// A graph of its own with the same weights, low-rank parts, masters and gradients.
    ///
    /// Errors: [`Error::Device`] if it lies on a device without room for one more.
    pub fn copy(&self) -> Result<Self> {
        self.map(Parameter::copy)
    }

    /// As [`Graph::copy`], on the host: to be written, and for [`Graph::copy_from`].
    ///
    /// Errors: those of the device.
    pub fn image(&self) -> Result<Self> {
        self.map(Parameter::image)
    }

    fn map(&self, copy: impl Fn(&Parameter<E>) -> Result<Parameter<E>>) -> Result<Self> {
        let copy = |parameter: &Arc<Parameter<E>>| copy(parameter).map(Arc::new);
        let expert = |expert: &Expert<E>| Ok(Expert { gate_up: copy(&expert.gate_up)?, down: copy(&expert.down)? });
        let experts = |experts: &Experts<E>| match experts {
            Experts::Each(experts) => Ok(Experts::Each(experts.iter().map(expert).collect::<Result<_>>()?)),
            Experts::Stacked { count, weights } => Ok(Experts::Stacked { count: *count, weights: expert(weights)? }),
        };
        let layer = |layer: &Layer<E>| {
            let mlp = match &layer.mlp {
                Mlp::Dense(mlp) => Mlp::Dense(expert(mlp)?),
                Mlp::Sparse(sparse) => Mlp::Sparse(Box::new(Sparse {
                    router: copy(&sparse.router)?,
                    experts: experts(&sparse.experts)?,
                    shared: expert(&sparse.shared)?,
                    shared_gate: copy(&sparse.shared_gate)?,
                })),
            };
            Ok(Layer {
                input_norm: copy(&layer.input_norm)?,
                qkv: copy(&layer.qkv)?,
                qkv_bias: copy(&layer.qkv_bias)?,
                o: copy(&layer.o)?,
                post_norm: copy(&layer.post_norm)?,
                mlp,
                window: layer.window,
            })
        };
        let layers = self.layers.iter().map(layer).collect::<Result<_>>()?;
        let embed = copy(&self.embed)?;
        let head = if Arc::ptr_eq(&self.embed, &self.head) { embed.clone() } else { copy(&self.head)? };
        Ok(Self { embed, layers, norm: copy(&self.norm)?, head, rope: self.rope.clone(), config: self.config.clone() })
    }

    /// Takes weights, low-rank parts, masters and gradients of a copy or an image of this graph.
    ///
    /// Errors: those of the device.
    pub fn copy_from(&self, copy: &Self) -> Result<()> {
        self.weights().iter().zip(copy.weights()).try_for_each(|(to, from)| to.copy_from(&from))
    }

    /// Writes remainders and gradients into the folder `target`. Errors: those of [`FolderWriter`].
    pub fn save_training_state(&self, target: &Path) -> Result<()> {
        let parameters = self.parameters();
        let mut specs = Vec::new();
        for parameter in &parameters {
            if parameter.has_remainder() {
                let (name, shape) = (format!("{}.remainder", parameter.name()), vec![parameter.weight_len()]);
                specs.push(TensorSpec { name, dtype: StoredDtype::I16, shape });
            }
            if parameter.has_gradient() {
                let (name, shape) = (format!("{}.gradient", parameter.name()), vec![parameter.gradient_len()]);
                specs.push(TensorSpec { name, dtype: StoredDtype::F32, shape });
            }
        }
        let mut writer = FolderWriter::create_named(target, STEM, specs, SHARD_BYTES_MAX.max(u64::MAX / 2))?;
        for parameter in &parameters {
            if let Some(remainder) = parameter.remainder()? {
                writer.write_bytes(&format!("{}.remainder", parameter.name()), bytemuck::cast_slice(&remainder))?;
            }
            parameter.with_gradient(|gradient| match gradient {
                Some(gradient) => writer.write(&format!("{}.gradient", parameter.name()), gradient),
                None => Ok(()),
            })??;
        }
        writer.finish()
    }

    /// Takes what [`Graph::save_training_state`] wrote; what is not there, the model does not have afterwards.
    ///
    /// Errors: [`Error::Format`] for tensors that this model has no place for; those of reading.
    pub fn load_training_state(&self, folder: &Path) -> Result<()> {
        let file = SafetensorsFile::open(&folder.join(format!("{STEM}.safetensors")))?;
        let mut taken = 0;
        for parameter in self.parameters() {
            let remainder = match file.get(&format!("{}.remainder", parameter.name())) {
                Some(info) if E::HAS_REMAINDER => {
                    let name = info.name.clone();
                    if info.elements() != parameter.weight_len() {
                        let expected = format!(
                            "{} integers, as a model on {} keeps them; resume where the checkpoint was made",
                            parameter.weight_len(),
                            parameter.place()
                        );
                        return Err(Error::format(file.path(), name, expected, format!("{}", info.elements())));
                    }
                    let in_range = |value: i64| {
                        i16::try_from(value).map_err(|_| Error::format(file.path(), &name, "16-bit integers", value.to_string()))
                    };
                    taken += 1;
                    Some(file.read_integers(&name)?.into_iter().map(in_range).collect::<Result<Vec<_>>>()?)
                }
                _ => None,
            };
            let gradient = match file.get(&format!("{}.gradient", parameter.name())) {
                Some(info) => {
                    let name = info.name.clone();
                    file.expect(&name, &[parameter.gradient_len()])?;
                    taken += 1;
                    let values: Vec<f32> = file.read_floats(&name)?;
                    Some(Buffer::copy_of(&values))
                }
                None => None,
            };
            parameter.set_training_state(remainder, gradient)?;
        }
        if taken == file.tensors().len() {
            return Ok(());
        }
        let kept = "as a model at this place keeps them; resume where the checkpoint was made";
        let expected = format!("the {taken} remainders and gradients of this model's parameters, {kept}");
        Err(Error::format(file.path(), "tensors", expected, format!("{} tensors", file.tensors().len())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::Config;
    use crate::model::presets::{preset, with_fields};
    use crate::tensor::Place;
    use half::bf16;
    use serde_json::json;

    fn config(moe: bool) -> Config {
        let mut fields = vec![("vocab", json!(96)), ("hidden", json!(32)), ("layers", json!(2)), ("heads", json!(2))];
        fields.extend([("kv_heads", json!(1)), ("intermediate", json!(48))]);
        if moe {
            fields.extend([("experts", json!(4)), ("experts_per_token", json!(2)), ("moe_intermediate", json!(24))]);
            fields.push(("shared_intermediate", json!(48)));
        }
        let fields: Vec<_> = fields.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        with_fields(&preset("tiny").unwrap(), &fields).unwrap()
    }

    fn check<E: ModelElement>(moe: bool) {
        let graph = Graph::<E>::random(&Place::Host, config(moe), false, 3).unwrap();
        // Every third parameter has a gradient.
        for (index, parameter) in graph.parameters().iter().enumerate().filter(|(index, _)| index % 3 == 1) {
            parameter.accumulate(|gradient, _| gradient.iter_mut().enumerate().for_each(|(i, value)| *value = (i * index) as f32 * 0.1));
        }
        let same = |a: &Graph<E>, b: &Graph<E>| {
            for (a, b) in a.parameters().iter().zip(b.parameters()) {
                // bf16 and f32 both go into f32 without loss.
                let bits = |p: &Parameter<E>| p.read().weight.iter().map(|value| value.to_f32().to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(a), bits(&b), "{}", a.name());
                assert_eq!(a.read().remainder, b.read().remainder, "{}", a.name());
                a.with_gradient(|a| b.with_gradient(|b| assert_eq!(a, b)).unwrap()).unwrap();
            }
        };
        let folder = tempfile::tempdir().unwrap();
        let copy = graph.copy().unwrap();
        copy.save(&folder.path().join("model"), E::DTYPE, &[]).unwrap();
        copy.save_training_state(&folder.path().join("state")).unwrap();
        let files = crate::checkpoint::folder::CheckpointFolder::open(&folder.path().join("model")).unwrap();
        let loaded =
            Graph::<E>::load(&Place::Host, &files, Config { dtype: E::DTYPE, ..config(moe) }, false, true, 0, &mut |_| {}).unwrap();
        loaded.load_training_state(&folder.path().join("state")).unwrap();
        same(&graph, &loaded);
        // Changes of the original do not reach the copy, and the copy brings them back.
        let weight = graph.parameters()[0].clone();
        weight.write_rows(0..1, &vec![7.5; weight.columns()], false).unwrap();
        graph.parameters().iter().for_each(|parameter| parameter.clear_gradient());
        same(&copy, &loaded);
        graph.copy_from(&copy).unwrap();
        same(&graph, &copy);
        let error = Graph::<E>::random(&Place::Host, config(!moe), false, 3)
            .unwrap()
            .load_training_state(&folder.path().join("state"))
            .unwrap_err();
        assert!(error.to_string().contains("training_state.safetensors"), "{error}");
    }

    #[test]
    fn all_of_a_model_comes_back_to_the_bit() {
        check::<f32>(false);
        check::<f32>(true);
        check::<bf16>(false);
        check::<bf16>(true);
    }
}
