//! Arithmetic on whole models: averages of two, single tensors set from values, and which parameters are made of which
//! tensors. Methods that merge checkpoints are composed of these in scripts.

use super::any::{AnyGraph, Model, find};
use super::graph::Graph;
use super::lora::Lora;
use super::names::{Named, once};
use crate::error::{Error, Result};
use crate::tensor::trainable::TensorRows;
use crate::tensor::{AnyTensor, ModelElement, Parameter};
use std::collections::HashMap;
use std::sync::Arc;

impl Model {
    /// `this = (1 - weight) * this + weight * other`, in f32; a bf16 model keeps the f32 masters of the result. Of models with
    /// adapters it is the adapters that are averaged.
    ///
    /// Errors: [`Error::Argument`] for a weight that is not finite, models of another shape or element type, one adapter alone
    /// or two different ones, and adapters that are merged; [`Error::Device`] for models that lie apart.
    pub fn average(&self, other: &Self, weight: f64) -> Result<()> {
        if !weight.is_finite() {
            return Err(Error::argument("average", "weight", "a finite number", weight));
        }
        if !self.place().is(other.place()) {
            let what = format!("`other` should be on {}, as self is, got a model on {}", self.place(), other.place());
            return Err(Error::Device { op: "average", what });
        }
        if self.adapter() != other.adapter() || self.is_merged() || other.is_merged() {
            let expected = "two models without adapters, or with adapters of one shape that are not merged";
            return Err(Error::argument("average", "other", expected, "others; `merge` and `save` make a plain model of an adapted one"));
        }
        let adapter = self.adapter();
        match (&self.graph, &other.graph) {
            (AnyGraph::F32(to), AnyGraph::F32(from)) => average(to, from, adapter.as_ref(), weight),
            (AnyGraph::Bf16(to), AnyGraph::Bf16(from)) => average(to, from, adapter.as_ref(), weight),
            _ => Err(Error::argument("average", "other", format!("a model in {}", self.dtype()), format!("one in {}", other.dtype()))),
        }
    }

    /// Sets the tensor called `name`; a bf16 model that trains keeps f32 masters of the values.
    ///
    /// Errors: [`Error::Argument`] for an unknown name, a weight with a merged adapter, or numbers that are not finite;
    /// [`Error::Shape`] for another shape.
    pub fn set_value(&self, name: &str, value: &AnyTensor) -> Result<()> {
        on_graph!(self, graph => {
            let named = find(graph, name)?;
            if value.shape() != named.shape {
                let expected = format!("{:?} as {name}", named.shape);
                return Err(Error::Shape { op: "set_parameter", arg: "value", expected, got: format!("{:?}", value.shape()) });
            }
            if named.parameter.is_merged() {
                return Err(Error::argument("set_parameter", "name", "a weight without a merged adapter", format!("{name}; call unmerge first")));
            }
            let value = value.on_host()?;
            if let Some(number) = value.to_f32_vec().into_iter().find(|number| !number.is_finite()) {
                return Err(Error::argument("set_parameter", "value", "finite numbers", number));
            }
            let masters = named.parameter.trains();
            named.parameter.write_rows(named.rows, &value.to_f32_vec(), masters)?;
        });
        Ok(())
    }

    /// For each parameter of [`Model::parameters`], the tensors that it is made of.
    pub fn tensor_rows(&self) -> Vec<Vec<TensorRows>> {
        on_graph!(self, graph => {
            let mut tensors = HashMap::<_, Vec<TensorRows>>::new();
            for Named { name, parameter, rows, .. } in graph.named().into_iter().chain(graph.named_adapters()) {
                tensors.entry(Arc::as_ptr(&parameter)).or_default().push(TensorRows { name, rows });
            }
            let of = |parameter: &Arc<Parameter<_>>| tensors.remove(&Arc::as_ptr(parameter)).expect("every parameter has a tensor");
            graph.parameters().iter().map(of).collect()
        })
    }
}

fn average<E: ModelElement>(to: &Arc<Graph<E>>, from: &Arc<Graph<E>>, adapter: Option<&Lora>, weight: f64) -> Result<()> {
    if Arc::ptr_eq(to, from) {
        return Ok(());
    }
    let ours = match adapter {
        None => to.weights(),
        Some(lora) => once(to.adapter_tensors(lora)?).collect(),
    };
    let theirs = from.parameters();
    let same =
        |a: &Parameter<E>, b: &Parameter<E>| (a.name(), a.rows(), a.columns(), a.layout()) == (b.name(), b.rows(), b.columns(), b.layout());
    let pairs = ours.into_iter().map(|parameter| {
        let other = theirs.iter().find(|other| same(&parameter, other));
        let lacks = || Error::argument("average", "other", format!("a model of the same shape, with {}", parameter.name()), "one without");
        other.cloned().map(|other| (parameter.clone(), other)).ok_or_else(lacks)
    });
    let pairs = pairs.collect::<Result<Vec<_>>>()?;
    pairs.iter().try_for_each(|(parameter, other)| parameter.average(other, weight))
}
