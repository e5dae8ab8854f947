//! `Trainable`: a parameter of any element type, as optimizers see it. What a parameter is stands in parameter.rs.

use super::ModelElement;
pub use super::cuda::update::{DeviceMoments, DeviceUpdate, MuonStep};
use super::parameter::{Layout, Parameter};
use super::place::Place;
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::adamw::{AdamW, MomentsMut};
use crate::kernels::cpu::norm;
use std::ops::Range;

/// A tensor of a checkpoint: which rows of a parameter it is.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorRows {
    /// For example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    pub rows: Range<usize>,
}

/// Values that [`Trainable::are_finite`] looks at together.
const FINITE_BLOCK: usize = 1 << 16;

/// A parameter of any element type, as optimizers see it.
pub trait Trainable: Send + Sync {
    fn name(&self) -> &str;
    /// Whether it is a matrix: biases and norm weights, which are not, usually go without weight decay.
    fn is_matrix(&self) -> bool;
    /// Elements, padding of the layout not counted.
    fn count(&self) -> usize;
    /// Elements of its gradient and moments, padding counted.
    fn gradient_len(&self) -> usize;
    fn trains(&self) -> bool;
    /// Reads the gradient, if there is one; a copy of it, if it lies on a device.
    ///
    /// Errors: those of the device.
    fn read_gradient(&self, read: &mut dyn FnMut(Option<&[f32]>)) -> Result<()>;
    fn has_gradient(&self) -> bool;
    /// Whether a gradient takes no more memory: there is one, or its place is kept.
    fn has_gradient_memory(&self) -> bool;
    fn clear_gradient(&self);
    /// Bytes of the remainders that its first update makes; 0 if they are there, or it needs none.
    fn remainder_bytes_to_come(&self) -> usize;
    /// Where it lies, and its moments should.
    fn place(&self) -> &Place;
    /// Holds it for an update on its device, after which the gradient is gone; none without a gradient. Panics on the host.
    ///
    /// Errors: [`crate::error::Error::Device`] if the device has no room.
    fn lock_update(&self) -> Result<Option<Box<dyn DeviceUpdate + '_>>>;
    /// One AdamW update on the host by the gradient, which is gone afterwards. Nothing happens without a gradient.
    ///
    /// Errors: those of [`Parameter::update`].
    fn adamw(&self, moments: MomentsMut, settings: &AdamW) -> Result<()>;
    /// How the elements of the gradient lie.
    fn layout(&self) -> Layout;
    /// Inputs of a matrix; 1 for a vector.
    fn columns(&self) -> usize;
    /// Copies the f32 values, `gradient_len` of them, in the layout of the gradient; padding is zero.
    ///
    /// Errors: those of the device.
    fn read_master(&self, values: &mut [f32]) -> Result<()>;
    /// Whether the values of these rows are all finite.
    ///
    /// Errors: those of the device.
    fn are_finite(&self, rows: Range<usize>) -> Result<bool>;
    /// Multiplies `rows` by `scale`, then adds `delta` `[rows, columns]`, row-major, in f32; a bf16 weight has a master afterwards.
    ///
    /// Errors: [`crate::error::Error::Device`] if it lies on a device without room for remainders.
    fn scale_and_add(&self, rows: Range<usize>, scale: f32, delta: &[f32]) -> Result<()>;
}

impl<E: ModelElement> Trainable for Parameter<E> {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_matrix(&self) -> bool {
        self.is_matrix
    }

    fn count(&self) -> usize {
        self.rows * self.columns
    }

    fn gradient_len(&self) -> usize {
        Parameter::gradient_len(self)
    }

    fn trains(&self) -> bool {
        Parameter::trains(self)
    }

    fn are_finite(&self, rows: Range<usize>) -> Result<bool> {
        let rows_at_once = (FINITE_BLOCK / self.columns.max(1)).max(1);
        let mut values = Buffer::<f32>::scratch(rows_at_once * self.columns);
        for start in rows.clone().step_by(rows_at_once) {
            let end = (start + rows_at_once).min(rows.end);
            let values = &mut values[..(end - start) * self.columns];
            self.read_rows(start..end, values)?;
            if values.iter().any(|value| !value.is_finite()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn read_gradient(&self, read: &mut dyn FnMut(Option<&[f32]>)) -> Result<()> {
        self.with_gradient(read)
    }

    fn has_gradient(&self) -> bool {
        Parameter::has_gradient(self)
    }

    fn has_gradient_memory(&self) -> bool {
        Parameter::has_gradient(self) || self.keeps_gradient()
    }

    fn clear_gradient(&self) {
        Parameter::clear_gradient(self);
    }

    fn remainder_bytes_to_come(&self) -> usize {
        if E::HAS_REMAINDER && !self.has_remainder() { 2 * self.weight_len() } else { 0 }
    }

    fn place(&self) -> &Place {
        Parameter::place(self)
    }

    fn lock_update(&self) -> Result<Option<Box<dyn DeviceUpdate + '_>>> {
        Ok(Parameter::lock_update(self)?.map(|locked| Box::new(locked) as Box<dyn DeviceUpdate>))
    }

    fn adamw(&self, moments: MomentsMut, settings: &AdamW) -> Result<()> {
        let panel_columns = (self.layout == Layout::Panels).then_some(self.columns);
        self.update(|value, gradient| {
            if E::HAS_REMAINDER && value.remainder.is_none() {
                // The first update of a weight that came as bf16: its master is that bf16 value.
                value.remainder = Some(vec![0; value.weight.len()]);
            }
            let (weight, remainder) = (&mut value.weight, value.remainder.as_deref_mut());
            match moments {
                MomentsMut::F32(m, v) => E::adamw(weight, remainder, gradient, m, v, panel_columns, settings),
                MomentsMut::Bf16(m, v) => E::adamw(weight, remainder, gradient, m, v, panel_columns, settings),
            }
        })
    }

    fn layout(&self) -> Layout {
        self.layout
    }

    fn columns(&self) -> usize {
        self.columns
    }

    fn read_master(&self, values: &mut [f32]) -> Result<()> {
        assert_eq!(values.len(), Parameter::gradient_len(self), "{}: values in the layout of the gradient", self.name);
        values.fill(0.0);
        for rows in self.row_blocks() {
            let mut block = Buffer::<f32>::scratch(rows.len() * self.columns);
            self.read_rows(rows.clone(), &mut block)?;
            self.layout.pack_f32(values, (self.rows, self.columns), rows, &block);
        }
        Ok(())
    }

    fn scale_and_add(&self, rows: Range<usize>, scale: f32, delta: &[f32]) -> Result<()> {
        let mut values = Buffer::<f32>::scratch(rows.len() * self.columns);
        self.read_rows(rows.clone(), &mut values)?;
        norm::scale(&mut values, scale);
        norm::add(&mut values, delta);
        self.write_rows(rows, &values, E::HAS_REMAINDER)
    }
}
