//! Rotary positions and causal attention on a GPU; see tensor/attention.rs.

use super::{activation, gradient, scratch};
use crate::error::Result;
use crate::kernels::cuda::attention::{Plan, attention as kernel};
use crate::kernels::cuda::attention_backward::{Saved, attention_backward};
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::{DeviceBuffer, View};
use crate::kernels::cuda::rope;
use crate::tensor::attention::{Heads, Rope};
use crate::tensor::{Data, ModelElement, Tensor};
use std::sync::{Arc, Mutex};

/// Cosines and sines of every token's position: `[tokens, head_dim / 2]` each, rounded to the element type in use.
pub struct Tables {
    pub cos: DeviceBuffer<f32>,
    pub sin: DeviceBuffer<f32>,
}

impl Tables {
    /// For tokens at `positions`.
    pub fn new<E: ModelElement>(device: &Arc<Device>, settings: &Rope, positions: &[i32]) -> Result<Self> {
        let inv_freq = DeviceBuffer::copy_of(device, "positions", &settings.inv_freq)?;
        let positions = DeviceBuffer::copy_of(device, "positions", positions)?;
        Self::of::<E>(device, inv_freq.view(), settings.attention_scaling, positions.view())
    }

    /// As [`Tables::new`], of frequencies and positions that lie on the device.
    pub fn of<E: ModelElement>(device: &Arc<Device>, inv_freq: View<f32>, scaling: f32, positions: View<i32>) -> Result<Self> {
        let len = positions.len() * inv_freq.len();
        let (mut cos, mut sin) = (activation::<f32>(device, len)?, activation::<f32>(device, len)?);
        rope::rope_tables::<E>(device, inv_freq, scaling, positions, cos.view_mut(), sin.view_mut())?;
        Ok(Self { cos, sin })
    }
}

/// The grids of a batch's documents, one for each window that its layers have: worked out once for all layers and both
/// directions.
#[derive(Default)]
pub struct Plans(Mutex<Vec<(Option<usize>, Arc<Plan>)>>);

impl Plans {
    fn get(&self, device: &Arc<Device>, heads: Heads, borders: &[i32], scale: f32, window: Option<usize>) -> Result<Arc<Plan>> {
        let mut plans = self.0.lock().expect("plans are made without panics");
        if let Some((_, plan)) = plans.iter().find(|(known, _)| *known == window) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(Plan::packed(device, heads, borders, scale, window)?);
        plans.push((window, plan.clone()));
        Ok(plan)
    }
}

/// As [`crate::tensor::attention::attention`]; `tables` gives the positions.
pub fn attention<E: ModelElement>(
    device: &Arc<Device>,
    qkv: &Tensor<E, 2>,
    heads: Heads,
    tables: &Arc<Tables>,
    (borders, plans): (&[i32], &Plans),
    window: Option<usize>,
) -> Result<Tensor<E, 2>> {
    attend(device, qkv, heads, tables, plans.get(device, heads, borders, heads.scale(), window)?)
}

/// As [`attention`], of the documents and the window of a plan.
pub(super) fn attend<E: ModelElement>(
    device: &Arc<Device>,
    qkv: &Tensor<E, 2>,
    heads: Heads,
    tables: &Arc<Tables>,
    plan: Arc<Plan>,
) -> Result<Tensor<E, 2>> {
    let [tokens, width] = qkv.shape();
    let mixed_width = heads.heads * heads.head_dim;
    let mut turned = activation::<E>(device, tokens * width)?;
    turned.copy_from(qkv.cuda())?;
    rope::rope(device, turned.view_mut(), heads, tables.cos.view(), tables.sin.view())?;
    let mut mixed = activation::<E>(device, tokens * mixed_width)?;
    let mut lse = activation::<f32>(device, tokens * heads.heads)?;
    kernel(device, &plan, turned.view(), mixed.view_mut(), lse.view_mut())?;
    let mixed = Data::on_device(mixed);
    let (device, tables, saved) = (device.clone(), tables.clone(), mixed.clone());
    Ok(Tensor::from_operation_anywhere([tokens, mixed_width], mixed, &[qkv.node()], false, move |d_mixed, sink| {
        let d_mixed = d_mixed.into_cuda();
        let mut deltas = scratch::<f32>(&device, tokens * heads.heads)?;
        let mut d_qkv = gradient::<E>(&device, tokens * width)?;
        let forward = Saved { qkv: turned.view(), o: saved.cuda().view(), lse: lse.view() };
        attention_backward(&device, &plan, d_mixed.view(), forward, deltas.view_mut(), d_qkv.view_mut())?;
        rope::rope_backward(&device, d_qkv.view_mut(), heads, tables.cos.view(), tables.sin.view())?;
        sink.add_on_device(0, d_qkv)
    }))
}
