//! What training keeps beside the weights of a model: the remainders that complete bf16 weights to their f32 masters, and
//! gradients that wait for their update. Copied in memory, and written beside a checkpoint as rows of the tensors that they
//! belong to, so that a run goes on wherever its model then lies. Weights themselves go the way of every checkpoint (`weights.rs`).

use super::graph::{Graph, Layer, Mlp, Sparse};
use super::names::Named;
use super::weights::{blocks, shift};
use crate::checkpoint::safetensors::SafetensorsFile;
use crate::checkpoint::stored_dtype::StoredDtype;
use crate::checkpoint::writer::{FolderWriter, SHARD_BYTES_MAX, TensorSpec};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::tensor::experts::{Expert, Experts};
use crate::tensor::place::ImageTo;
use crate::tensor::{ModelElement, Parameter};
use std::path::Path;
use std::sync::Arc;

/// The one file of the folder, without its ending.
const STEM: &str = "training_state";
/// Endings of names in it.
const REMAINDER: &str = "remainder";
const GRADIENT: &str = "gradient";

impl<E: ModelElement> Graph<E> {
    /// A graph of its own with the same weights, low-rank parts, masters and gradients.
    ///
    /// Errors: [`Error::Device`] if it lies on a device without room for one more.
    pub fn copy(&self) -> Result<Self> {
        self.map(Parameter::copy)
    }

    /// As [`Graph::copy`], to be written, and for [`Graph::copy_from`].
    ///
    /// Errors: those of the device.
    pub fn image(&self, to: ImageTo) -> Result<Self> {
        self.map(|parameter| parameter.image(to))
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

    /// Writes remainders and gradients into the folder `target`, by the names of tensors, row-major. Errors: those of
    /// [`FolderWriter`]; those of a device.
    pub fn save_training_state(&self, target: &Path) -> Result<()> {
        let tensors: Vec<Named<E>> = self.named().into_iter().chain(self.named_adapters()).collect();
        let mut specs = Vec::new();
        for Named { name, parameter, rows, .. } in &tensors {
            let shape = vec![rows.len(), parameter.columns()];
            if parameter.has_remainder() {
                specs.push(TensorSpec { name: format!("{name}.{REMAINDER}"), dtype: StoredDtype::I16, shape: shape.clone() });
            }
            if parameter.has_gradient() {
                specs.push(TensorSpec { name: format!("{name}.{GRADIENT}"), dtype: StoredDtype::F32, shape });
            }
        }
        let mut writer = FolderWriter::create_named(target, STEM, specs, SHARD_BYTES_MAX.max(u64::MAX / 2))?;
        for Named { name, parameter, rows, .. } in &tensors {
            let blocks = || blocks(rows.len(), parameter.columns()).map(|block| shift(&block, rows.start));
            for block in blocks().filter(|_| parameter.has_remainder()) {
                let mut remainder = vec![0; block.len() * parameter.columns()];
                parameter.remainder_rows(block, &mut remainder)?;
                remainder.iter_mut().for_each(|value| *value = value.to_le());
                writer.write_bytes(&format!("{name}.{REMAINDER}"), bytemuck::cast_slice(&remainder))?;
            }
            for block in blocks() {
                if let Some(gradient) = parameter.gradient_rows(block)? {
                    writer.write(&format!("{name}.{GRADIENT}"), &gradient[..])?;
                }
            }
        }
        writer.finish()
    }

    /// Takes what [`Graph::save_training_state`] wrote, wherever that model lay; what is not there, the model does not have
    /// afterwards.
    ///
    /// Errors: [`Error::Format`] for tensors that this model has no place for; those of reading.
    pub fn load_training_state(&self, folder: &Path) -> Result<()> {
        let file = SafetensorsFile::open(&folder.join(format!("{STEM}.safetensors")))?;
        self.parameters().iter().try_for_each(|parameter| parameter.clear_training_state())?;
        let mut taken = 0;
        for Named { name, parameter, rows, .. } in self.named().into_iter().chain(self.named_adapters()) {
            let columns = parameter.columns();
            let (remainder, gradient) = (format!("{name}.{REMAINDER}"), format!("{name}.{GRADIENT}"));
            if E::HAS_REMAINDER && file.get(&remainder).is_some() {
                file.expect_shape(&remainder, &[rows.len(), columns])?;
                for block in blocks(rows.len(), columns) {
                    let mut values = vec![0; block.len() * columns];
                    file.read_i16_rows(&remainder, block.clone(), &mut values)?;
                    parameter.write_remainder_rows(shift(&block, rows.start), &values)?;
                }
                taken += 1;
            }
            if file.get(&gradient).is_some() {
                file.expect(&gradient, &[rows.len(), columns])?;
                for block in blocks(rows.len(), columns) {
                    let mut values = Buffer::<f32>::scratch(block.len() * columns);
                    file.read_rows(&gradient, block.clone(), &mut values)?;
                    parameter.write_gradient_rows(shift(&block, rows.start), &values)?;
                }
                taken += 1;
            }
        }
        if taken == file.tensors().len() {
            return Ok(());
        }
        let expected = format!("the {taken} remainders and gradients of this model's tensors");
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
            let gradient: Vec<f32> = (0..parameter.rows() * parameter.columns()).map(|i| (i * index) as f32 * 0.1).collect();
            parameter.write_gradient_rows(0..parameter.rows(), &gradient).unwrap();
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
