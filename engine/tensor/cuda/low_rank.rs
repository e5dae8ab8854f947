//! The low-rank parts of a product on a GPU; see tensor/low_rank.rs.

use super::{activation, gradient, operand, scratch};
use crate::error::Result;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::elements;
use crate::kernels::cuda::memory::{DeviceBuffer, View, ViewMut};
use crate::kernels::cuda::product::{self, Residual};
use crate::tensor::ModelElement;
use crate::tensor::low_rank::LowRank;
use crate::tensor::parameter::Parameter;
use std::sync::Arc;

/// The low-rank parts of one product, with what their backward pass needs.
pub struct Applied<E: ModelElement> {
    parts: Arc<[LowRank<E>]>,
    width: usize,
    /// `A x` of each part, `[tokens, rank]`.
    inner: Vec<DeviceBuffer<E>>,
    versions: Vec<(u64, u64)>,
}

impl<E: ModelElement> Applied<E> {
    /// Adds the low-rank parts of `weight` to `y` `[tokens, out]`, the product of `x` `[tokens, in]` with it.
    pub fn forward(device: &Arc<Device>, weight: &Parameter<E>, y: &mut DeviceBuffer<E>, x: View<E>) -> Result<Self> {
        let (parts, width) = (weight.adapters(), weight.rows());
        let tokens = y.len() / width;
        let mut inner = Vec::with_capacity(parts.len());
        for part in parts.iter() {
            assert!(part.magnitude.is_none(), "{}: lengths of rows on a device", weight.name());
            let mut middle = activation::<E>(device, tokens * part.rank())?;
            let a = part.a.read();
            product::forward(device, middle.view_mut(), x, operand(&part.a, &a), None, Residual::None, None)?;
            let mut delta = scratch::<f32>(device, tokens * part.rows.len())?;
            let b = part.b.read();
            product::forward(device, delta.view_mut(), middle.view(), operand(&part.b, &b), None, Residual::None, None)?;
            elements::add_columns(device, y.view_mut(), width, part.rows.clone(), delta.view(), part.scale)?;
            inner.push(middle);
        }
        let versions = parts.iter().map(|part| (part.a.version(), part.b.version())).collect();
        Ok(Self { parts, width, inner, versions })
    }

    /// Whether a factor trains.
    pub fn trains(&self) -> bool {
        self.parts.iter().any(|part| part.a.trains() || part.b.trains())
    }

    /// Errors: as [`Parameter::check_version`], for every factor.
    pub fn check_versions(&self, op: &'static str) -> Result<()> {
        self.parts.iter().zip(&self.versions).try_for_each(|(part, (a, b))| {
            part.a.check_version(*a, op)?;
            part.b.check_version(*b, op)
        })
    }

    /// Adds the gradients of the factors that train, and gives those of `A x`, from which that of x follows.
    ///
    /// - `dy`: `[tokens, out]`; `x`: `[tokens, in]`, needed if a factor trains
    pub fn factor_gradients(&self, device: &Arc<Device>, dy: View<E>, x: Option<View<E>>) -> Result<Vec<DeviceBuffer<E>>> {
        let tokens = dy.len() / self.width;
        let backward = |(part, inner): (&LowRank<E>, &DeviceBuffer<E>)| {
            let (rank, outputs) = (part.rank(), part.rows.len());
            let mut d_delta = gradient::<E>(device, tokens * outputs)?;
            elements::take_columns(device, dy, self.width, part.rows.clone(), part.scale, d_delta.view_mut())?;
            part.b.accumulate_on_device(|dw, add| {
                product::weight_gradient(device, dw, d_delta.view(), inner.view(), (outputs, rank), add, None)
            })?;
            let mut d_inner = gradient::<E>(device, tokens * rank)?;
            let b = part.b.read();
            product::input_gradient(device, d_inner.view_mut(), d_delta.view(), operand(&part.b, &b), false, None)?;
            part.a.accumulate_on_device(|dw, add| {
                let x = x.expect("a factor that trains has its input");
                product::weight_gradient(device, dw, d_inner.view(), x, (rank, part.a.columns()), add, None)
            })?;
            Ok(d_inner)
        };
        self.parts.iter().zip(&self.inner).map(backward).collect()
    }

    /// Adds to `dx` `[tokens, in]` what flows back through the factors, given [`Applied::factor_gradients`].
    pub fn add_input_gradient(&self, device: &Arc<Device>, d_inner: &[DeviceBuffer<E>], mut dx: ViewMut<E>) -> Result<()> {
        for (part, d_inner) in self.parts.iter().zip(d_inner) {
            let a = part.a.read();
            product::input_gradient(device, dx.reborrow(), d_inner.view(), operand(&part.a, &a), true, None)?;
        }
        Ok(())
    }
}
