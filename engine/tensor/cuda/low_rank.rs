//! The low-rank parts of a product on a GPU; see tensor/low_rank.rs. Of a mixture's experts, which are one matrix here, so are
//! their parts: the same grouped products multiply by both.

use super::dora::Scaling;
use super::{activation, gradient, multiply, operand, scratch};
use crate::error::Result;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::elements;
use crate::kernels::cuda::memory::{DeviceBuffer, View, ViewMut};
use crate::kernels::cuda::product::{self, Groups, Residual};
use crate::kernels::element::Float;
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
    scaling: Option<Scaling<E>>,
    versions: Vec<u64>,
}

impl<E: ModelElement> Applied<E> {
    /// `y = x W'ᵀ (+ bias) (+ residual)` with the low-rank parts of `weight`.
    ///
    /// - `y`: `[tokens, out]`; `x`: `[tokens, in]`; `bias`: `[out]`; `residual`: `[tokens, out]`
    /// - `groups`: of rows, which use one of the weights each that lie one after the other
    pub fn product<O: Float>(
        device: &Arc<Device>,
        weight: &Parameter<E>,
        mut y: ViewMut<O>,
        x: View<E>,
        bias: Option<View<E>>,
        residual: Option<View<O>>,
        groups: Option<Groups>,
    ) -> Result<Self> {
        let parts = weight.adapters();
        let mut scaling = Scaling::of(device, weight, &parts)?;
        let value = weight.read();
        let inner = match &mut scaling {
            None => {
                multiply(device, (weight, &value), y.reborrow(), x, bias, residual, groups)?;
                add_parts(device, &parts, y, x, groups)?
            }
            Some(scaling) => {
                let mut sums = scratch::<f32>(device, y.len())?;
                multiply(device, (weight, &value), sums.view_mut(), x, None, None, groups)?;
                let inner = add_parts(device, &parts, sums.view_mut(), x, groups)?;
                scaling.forward(device, sums, bias, residual, y, groups)?;
                inner
            }
        };
        let versions = parts.iter().flat_map(LowRank::parameters).map(|parameter| parameter.version()).collect();
        let width = weight.rows() / groups.map_or(1, |groups| groups.count());
        Ok(Self { parts, width, inner, scaling, versions })
    }

    /// Whether a parameter of a part trains.
    pub fn trains(&self) -> bool {
        self.parts.iter().any(LowRank::trains)
    }

    /// Errors: as [`Parameter::check_version`], for every parameter.
    pub fn check_versions(&self, op: &'static str) -> Result<()> {
        let parameters = self.parts.iter().flat_map(LowRank::parameters);
        parameters.zip(&self.versions).try_for_each(|(parameter, seen)| parameter.check_version(*seen, op))
    }

    /// With DoRA: adds the gradients of the lengths of rows, and gives that of what they scale, which everything but the bias and
    /// the residual then takes in place of `dy` `[tokens, out]`.
    ///
    /// - `weight`, `groups`: as in [`Applied::product`], here and below
    pub fn unscaled(
        &self,
        device: &Arc<Device>,
        weight: &Parameter<E>,
        dy: View<E>,
        groups: Option<Groups>,
    ) -> Result<Option<DeviceBuffer<E>>> {
        self.scaling.as_ref().map(|scaling| scaling.backward(device, weight, &self.parts, dy, groups)).transpose()
    }

    /// Adds the gradients of the factors that train, and gives those of `A x`, from which that of x follows.
    ///
    /// - `dy`: `[tokens, out]`, as [`Applied::unscaled`] gives it; `x`: `[tokens, in]`, needed if a factor trains
    pub fn factor_gradients(
        &self,
        device: &Arc<Device>,
        dy: View<E>,
        x: Option<View<E>>,
        groups: Option<Groups>,
    ) -> Result<Vec<DeviceBuffer<E>>> {
        let tokens = dy.len() / self.width;
        let backward = |(part, inner): (&LowRank<E>, &DeviceBuffer<E>)| {
            let (rank, outputs) = (part.rank(), part.rows.len());
            let mut d_delta = gradient::<E>(device, tokens * outputs)?;
            elements::take_columns(device, dy, self.width, part.rows.clone(), part.scale, d_delta.view_mut())?;
            part.b.accumulate_on_device(|dw, add| {
                product::weight_gradient(device, dw, d_delta.view(), inner.view(), (outputs, rank), add, groups)
            })?;
            let mut d_inner = gradient::<E>(device, tokens * rank)?;
            let b = part.b.read();
            product::input_gradient(device, d_inner.view_mut(), d_delta.view(), operand(&part.b, &b, groups), false, groups)?;
            part.a.accumulate_on_device(|dw, add| {
                let x = x.expect("a factor that trains has its input");
                product::weight_gradient(device, dw, d_inner.view(), x, (rank, part.a.columns()), add, groups)
            })?;
            Ok(d_inner)
        };
        self.parts.iter().zip(&self.inner).map(backward).collect()
    }

    /// Adds to `dx` `[tokens, in]` what flows back through the factors, given [`Applied::factor_gradients`].
    pub fn add_input_gradient(
        &self,
        device: &Arc<Device>,
        d_inner: &[DeviceBuffer<E>],
        mut dx: ViewMut<E>,
        groups: Option<Groups>,
    ) -> Result<()> {
        for (part, d_inner) in self.parts.iter().zip(d_inner) {
            let a = part.a.read();
            product::input_gradient(device, dx.reborrow(), d_inner.view(), operand(&part.a, &a, groups), true, groups)?;
        }
        Ok(())
    }
}

/// Adds the low-rank parts to the product `y` `[tokens, out]`; gives `A x` of each, `[tokens, rank]`.
fn add_parts<E: ModelElement, O: Float>(
    device: &Arc<Device>,
    parts: &[LowRank<E>],
    mut y: ViewMut<O>,
    x: View<E>,
    groups: Option<Groups>,
) -> Result<Vec<DeviceBuffer<E>>> {
    let mut add = |part: &LowRank<E>| {
        let width = part.stack.rows;
        let tokens = y.len() / width;
        let mut inner = activation::<E>(device, tokens * part.rank())?;
        let a = part.a.read();
        product::forward(device, inner.view_mut(), x, operand(&part.a, &a, groups), None, Residual::None, groups)?;
        let mut delta = scratch::<f32>(device, tokens * part.rows.len())?;
        let b = part.b.read();
        product::forward(device, delta.view_mut(), inner.view(), operand(&part.b, &b, groups), None, Residual::None, groups)?;
        elements::add_columns(device, y.reborrow(), width, part.rows.clone(), delta.view(), part.scale)?;
        Ok(inner)
    };
    parts.iter().map(&mut add).collect()
}
