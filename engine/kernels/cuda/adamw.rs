//! Launcher of adamw.cu: AdamW over all parameters of one type in one launch, with the bits of the CPU. The clipping factor
//! and whether the gradients are finite are read on the device, so that a step never waits for them.

use super::device::Device;
use super::launch::Launch;
use super::memory::{DeviceBuffer, View, ViewMut};
use super::norm::{Norm, PIECE, Table};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::cpu::adamw::{AdamW, Moment};
use crate::kernels::element::{Dtype, Float};
use std::marker::PhantomData;
use std::sync::Arc;

/// A parameter and what is kept beside it; all have one length and one order.
pub struct Parameter<'a, E: Float, M: Moment> {
    pub weight: ViewMut<'a, E>,
    /// The low halves of the masters of a bf16 weight (`kernels/cpu/adamw.rs`); none for f32.
    pub rest: Option<ViewMut<'a, i16>>,
    pub gradient: View<'a, f32>,
    pub m: ViewMut<'a, M>,
    pub v: ViewMut<'a, M>,
    /// Whether the weight decays.
    pub decays: bool,
}

/// A parameter as the kernel knows it, its element type forgotten.
pub struct Line<'a> {
    words: [u64; 8],
    length: usize,
    dtype: Dtype,
    borrow: PhantomData<&'a mut [f32]>,
}

impl<'a, E: Float, M: Moment> Parameter<'a, E, M> {
    /// Panics if the parts are not of one length and on `device`.
    pub fn line(self, device: &Device) -> Line<'a> {
        let Self { weight, rest, gradient, m, v, decays } = self;
        let length = weight.len();
        assert!(gradient.len() == length, "adamw: {length} weights, {} gradients", gradient.len());
        assert!(m.len() == length && v.len() == length, "adamw: {length} weights, {} and {} moments", m.len(), v.len());
        let split = E::DTYPE == Dtype::Bf16;
        assert!(rest.as_ref().map(|rest| rest.len()) == split.then_some(length), "adamw: the remainders do not fit {length} weights");
        for ordinal in [weight.ordinal, gradient.ordinal, m.ordinal, v.ordinal] {
            assert!(ordinal == device.ordinal, "adamw: a buffer of cuda:{ordinal} on cuda:{}", device.ordinal);
        }
        let rest = rest.as_ref().map_or(0, |rest| rest.address);
        let bf16_moments = u64::from(M::DTYPE == Dtype::Bf16);
        let words = [weight.address, rest, gradient.address, m.address, v.address, length as u64, u64::from(decays), bf16_moments];
        Line { words, length, dtype: E::DTYPE, borrow: PhantomData }
    }
}

/// Updates all parameters, which have one element type. With `norm`, gradients are multiplied by its factor (and not by `settings.gradient_scale`), and
/// nothing at all is changed if its sum is not finite.
pub fn adamw(device: &Arc<Device>, table: &mut Table, parameters: &[Line], settings: &AdamW, norm: Option<&Norm>) -> Result<()> {
    let Some(first) = parameters.first() else { return Ok(()) };
    assert!(parameters.iter().all(|line| line.dtype == first.dtype), "adamw: parameters of two element types in one launch");
    let words: Vec<u64> = parameters.iter().flat_map(|line| line.words).collect();
    let lengths: Vec<usize> = parameters.iter().map(|line| line.length).collect();
    table.set(device, &words, &lengths)?;
    let (lines, pieces, count) = table.get();
    if count == 0 {
        return Ok(());
    }
    let f = settings.factors();
    let launch = Launch::new(device, "adamw", Variant::new(Program::Adamw, first.dtype), "adamw")?.read(lines).read(pieces).int(PIECE);
    // Lives until the kernel is queued; what is freed after that comes back in the stream's order.
    let mut scale = None;
    let launch = match norm {
        Some(norm) => {
            let (total, factor) = norm.on_device();
            launch.read(total).read(factor)
        }
        None => {
            let scale = scale.insert(DeviceBuffer::copy_of(device, "adamw", &[f.gradient_scale])?);
            launch.read_or_null::<f64>(None).read(scale.view())
        }
    };
    let launch = launch.float(f.decay).float(f.beta1).float(f.beta2).float(f.rest1).float(f.rest2);
    let launch = launch.float(f.step_size).float(f.root_correction2).float(f.eps).signed(f.salt as i32 as isize);
    // SAFETY: the arguments are adamw's. Each line of the table holds the addresses and the length of buffers that
    // `parameters` borrows, the written ones alone; each piece lies in one of them and is one block's.
    unsafe { launch.run((count, 1, 1), 256, 0) }
}
