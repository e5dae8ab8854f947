//! A model with an adapter: low-rank parts on a frozen base. Attached, loaded, saved, merged into the weights and taken out
//! again; and the base alone, which shares its weights.

use super::any::{AnyGraph, Model};
use super::captured_training::Graphs;
use super::lora::Lora;
use crate::error::{Error, Result};
use crate::kernels::element::Dtype;
use crate::tensor::place::ImageTo;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

/// The adapter of a model.
#[derive(Clone)]
pub(super) struct Adapter {
    lora: Lora,
    /// Of the frozen weights, when they were last as their source has them; none if they are not.
    seen: Option<u64>,
}

impl Model {
    fn lock_adapter(&self) -> MutexGuard<'_, Option<Adapter>> {
        self.adapter.lock().expect("nothing panics while adapters change")
    }

    /// Gives the model low-rank parts, A random and B zero, and freezes all else but what `lora` saves whole; a head that
    /// scores is always among that.
    ///
    /// Errors: [`Error::Argument`] for modules that the model does not have, and if it has an adapter.
    pub fn adapt(&self, lora: Lora, seed: u64) -> Result<()> {
        self.check_plain()?;
        let mut lora = lora;
        if self.config().score && !lora.modules_to_save.iter().any(|module| module == "score") {
            lora.modules_to_save.push("score".into());
        }
        on_graph!(self, graph => {
            graph.attach(&lora)?;
            graph.begin_adapters(seed)?;
        });
        self.remember(lora);
        Ok(())
    }

    /// Gives the model the adapter of a PEFT folder.
    ///
    /// - `trains`: whether it will be trained; otherwise it has no gradients
    /// - `remark`: hears of what was passed over
    ///
    /// Errors: [`Error::Format`] for files that do not fit this model, [`Error::Unsupported`] for other kinds of adapters;
    /// [`Error::Argument`] if it has an adapter.
    pub fn load_adapter(&self, folder: &Path, trains: bool, remark: &mut dyn FnMut(String)) -> Result<()> {
        self.check_plain()?;
        let lora = on_graph!(self, graph => graph.load_adapter(folder, trains, remark))?;
        if !trains {
            self.set_trains(false);
        }
        self.remember(lora);
        Ok(())
    }

    /// Takes the weights of a PEFT folder that [`Model::save_adapter`] wrote from a model like this one.
    ///
    /// Errors: [`Error::Format`] if it is another adapter; [`Error::Argument`] without an adapter.
    pub fn refill_adapter(&self, folder: &Path) -> Result<()> {
        let lora = self.lora("load_adapter")?;
        on_graph!(self, graph => graph.fill_adapter(folder, &lora, true))
    }

    /// Writes the adapter alone as a PEFT folder, whole or not at all.
    ///
    /// - `dtype`: of the stored weights; the model's own if none
    /// - `base`: what the folder says it belongs to
    ///
    /// Errors: [`Error::Argument`] without an adapter or for a type that checkpoints do not hold; those of writing.
    pub fn save_adapter(&self, folder: &Path, dtype: Option<Dtype>, base: Option<&str>) -> Result<()> {
        let lora = self.lora("save_adapter")?;
        match dtype.unwrap_or(self.dtype()) {
            dtype @ (Dtype::F32 | Dtype::Bf16) => on_graph!(self, graph => graph.save_adapter(folder, &lora, dtype, base)),
            other => Err(Error::argument("save_adapter", "dtype", "f32 or bf16", other)),
        }
    }

    /// What the adapter is, if there is one.
    pub fn adapter(&self) -> Option<Lora> {
        self.lock_adapter().as_ref().map(|adapter| adapter.lora.clone())
    }

    /// Adds the low-rank parts to the weights, in f32, and sets them aside until [`Model::unmerge`]. The weights as they were
    /// stay in memory. Nothing happens if it is merged.
    ///
    /// Errors: [`Error::Argument`] without an adapter, and for one on the embedding or the head where both are one matrix, which
    /// [`Model::save`] writes as two.
    pub fn merge(&self) -> Result<()> {
        self.lora("merge")?;
        if on_graph!(self, graph => graph.is_torn()) {
            let expected = "an adapter of the layers, or a model whose head is not its embedding";
            let got = "one on embed_tokens or lm_head, which are one matrix here; save the model, which writes two, and load that";
            return Err(Error::argument("merge", "self", expected, got));
        }
        self.keep_seen(|| on_graph!(self, graph => graph.weights().iter().try_for_each(|weight| weight.merge())))
    }

    /// Puts back, to the bit, what [`Model::merge`] changed. Nothing happens if it is not merged.
    ///
    /// Errors: [`Error::Argument`] without an adapter.
    pub fn unmerge(&self) -> Result<()> {
        self.lora("unmerge")?;
        self.keep_seen(|| {
            on_graph!(self, graph => graph.weights().iter().for_each(|weight| weight.unmerge()));
            Ok(())
        })
    }

    /// Whether the low-rank parts are in the weights.
    pub fn is_merged(&self) -> bool {
        on_graph!(self, graph => graph.weights().iter().any(|weight| weight.is_merged()))
    }

    /// The model without its adapter, frozen. It shares the weights with this one, so it takes no memory; an update of a
    /// module that is saved whole does not reach it.
    ///
    /// Errors: [`Error::Device`] if it lies on a device without room for copies of what trains.
    pub fn base(&self) -> Result<Self> {
        let base = self.copy()?;
        on_graph!(base, graph => {
            for weight in graph.weights() {
                weight.unmerge();
                weight.clear_adapters();
                weight.set_trains(false);
            }
        });
        *base.lock_adapter() = None;
        base.held.lock().expect("nothing panics while weights are frozen").clear();
        Ok(base)
    }

    /// Whether frozen weights differ from what the model was loaded from, merging apart.
    pub fn base_changed(&self) -> bool {
        self.lock_adapter().as_ref().is_some_and(|adapter| adapter.seen != Some(self.base_version()))
    }

    /// From now on the base counts as one that its source does not have.
    pub fn forget_source(&self) {
        if let Some(adapter) = self.lock_adapter().as_mut() {
            adapter.seen = None;
        }
    }

    /// Number of parameters that train.
    pub fn trainable(&self) -> usize {
        self.parameters().iter().filter(|parameter| parameter.trains()).map(|parameter| parameter.count()).sum()
    }

    /// As [`Model::adapter`]. Errors: [`Error::Argument`] if there is none.
    fn lora(&self, op: &'static str) -> Result<Lora> {
        self.adapter().ok_or_else(|| Error::argument(op, "self", "a model with an adapter (option `lora` or `adapter`)", "one without"))
    }

    fn check_plain(&self) -> Result<()> {
        match self.adapter() {
            None => Ok(()),
            Some(_) => Err(Error::argument("adapter", "self", "a model without an adapter", "one that has one; merge and save it first")),
        }
    }

    fn remember(&self, lora: Lora) {
        *self.lock_adapter() = Some(Adapter { lora, seen: Some(self.base_version()) });
    }

    /// Runs `change`, after which the base counts as it did before.
    ///
    /// Errors: those of `change`.
    pub(super) fn keep_seen(&self, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let changed = self.base_changed();
        change()?;
        let seen = (!changed).then(|| self.base_version());
        if let Some(adapter) = self.lock_adapter().as_mut() {
            adapter.seen = seen;
        }
        Ok(())
    }

    /// A number that changes with every change of a frozen weight.
    fn base_version(&self) -> u64 {
        on_graph!(self, graph => {
            let weights = graph.weights();
            weights.iter().filter(|weight| !weight.trains()).map(|weight| weight.version()).fold(0, u64::wrapping_add)
        })
    }

    /// A model of its own with the same weights, masters, gradients and adapter, at the same place. Weights that do not train
    /// are shared until one of the two changes them.
    ///
    /// Errors: [`Error::Device`] if it lies on a device without room for one more.
    pub fn copy(&self) -> Result<Self> {
        match &self.graph {
            AnyGraph::F32(graph) => Ok(self.like(AnyGraph::F32(Arc::new(graph.copy()?)))),
            AnyGraph::Bf16(graph) => Ok(self.like(AnyGraph::Bf16(Arc::new(graph.copy()?)))),
        }
    }

    /// As [`Model::copy`], what a checkpoint is written from while this one trains on. It can be read, saved, and taken back by
    /// [`Model::copy_from`].
    ///
    /// Errors: those of the device.
    pub fn image(&self, to: ImageTo) -> Result<Self> {
        match &self.graph {
            AnyGraph::F32(graph) => Ok(self.like(AnyGraph::F32(Arc::new(graph.image(to)?)))),
            AnyGraph::Bf16(graph) => Ok(self.like(AnyGraph::Bf16(Arc::new(graph.image(to)?)))),
        }
    }

    fn like(&self, graph: AnyGraph) -> Self {
        let recompute = AtomicBool::new(self.recompute.load(Relaxed));
        let copy = Self { graph, recompute, adapter: Mutex::new(None), training: Graphs::default(), held: Mutex::new(self.held()) };
        copy.take_adapter(self);
        copy
    }

    /// Takes weights, masters, gradients, merging and what is frozen for now of a copy or an image of this model, to the bit.
    ///
    /// Errors: those of the device.
    pub fn copy_from(&self, copy: &Self) -> Result<()> {
        // How a parameter is copied depends on whether it trains.
        self.set_held(&copy.held());
        match (&self.graph, &copy.graph) {
            (AnyGraph::F32(to), AnyGraph::F32(from)) => to.copy_from(from)?,
            (AnyGraph::Bf16(to), AnyGraph::Bf16(from)) => to.copy_from(from)?,
            _ => panic!("a copy has the type of its model"),
        }
        self.take_adapter(copy);
        Ok(())
    }

    fn take_adapter(&self, from: &Self) {
        let changed = from.base_changed();
        let seen = (!changed).then(|| self.base_version());
        *self.lock_adapter() = from.adapter().map(|lora| Adapter { lora, seen });
    }
}
