//! The value of a parameter in the memory of a device: row-major, a bf16 master split as on the host (tensor/parameter.rs).

use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::int8::Int8Weight;
use crate::kernels::cuda::memory::DeviceBuffer;
use crate::tensor::ModelElement;
use crate::tensor::place::downloaded;
use std::sync::Arc;

/// What an out-of-memory error calls these.
pub const WEIGHTS: &str = "weights";
pub const REMAINDERS: &str = "remainders of masters";
pub const GRADIENTS: &str = "gradients of weights";

/// `rows * columns` elements, and what completes each to its f32 master; or integers in place of both.
pub struct DeviceValue<E: ModelElement> {
    pub weight: DeviceBuffer<E>,
    pub remainder: Option<DeviceBuffer<i16>>,
    /// In place of `weight`, which is empty then.
    pub int8: Option<Int8Weight>,
}

impl<E: ModelElement> DeviceValue<E> {
    /// Errors: [`crate::error::Error::Device`] if the device has no room, here and below.
    pub fn zeros(device: &Arc<Device>, len: usize) -> Result<Self> {
        Ok(Self { weight: DeviceBuffer::zeroed(device, WEIGHTS, len)?, remainder: None, int8: None })
    }

    /// As [`DeviceValue::zeros`], integers.
    pub fn zeros_int8(device: &Arc<Device>, rows: usize, columns: usize) -> Result<Self> {
        let int8 = Some(Int8Weight::zeroed(device, WEIGHTS, rows, columns)?);
        Ok(Self { int8, ..Self::zeros(device, 0)? })
    }

    pub fn try_clone(&self) -> Result<Self> {
        let remainder = self.remainder.as_ref().map(DeviceBuffer::try_clone).transpose()?;
        let int8 = self.int8.as_ref().map(Int8Weight::try_clone).transpose()?;
        Ok(Self { weight: self.weight.try_clone()?, remainder, int8 })
    }

    /// The remainders, zero if there were none.
    pub fn remainder_mut(&mut self) -> Result<&mut DeviceBuffer<i16>> {
        if self.remainder.is_none() {
            self.remainder = Some(DeviceBuffer::zeroed(self.weight.device(), REMAINDERS, self.weight.len())?);
        }
        Ok(self.remainder.as_mut().expect("it was made above"))
    }

    /// Copies elements from `start` on as f32: masters where they exist. Of integers whole rows, here and below.
    pub fn read_masters(&self, start: usize, masters: &mut [f32]) -> Result<()> {
        if let Some(int8) = &self.int8 {
            let (first, count) = (start / int8.inputs(), masters.len() / int8.inputs());
            return int8.read_rows(first..first + count, masters);
        }
        let mut narrow = Buffer::<E>::scratch(masters.len());
        self.read_weight(start, &mut narrow)?;
        match &self.remainder {
            None => masters.iter_mut().zip(narrow.iter()).for_each(|(to, from)| *to = from.to_f32()),
            Some(remainder) => {
                let mut rest = Buffer::<E>::scratch(masters.len());
                // A remainder exists beside bf16 alone, of whose size it is.
                let rest_bits: &mut [i16] = bytemuck::cast_slice_mut(&mut rest);
                remainder.download_at(start, rest_bits)?;
                E::join_master(&narrow, &rest, masters);
            }
        }
        Ok(())
    }

    /// Copies elements from `start` on.
    pub fn read_weight(&self, start: usize, values: &mut [E]) -> Result<()> {
        self.weight.download_at(start, values)
    }

    /// Copies remainders from `start` on. Panics if there are none.
    pub fn read_remainder(&self, start: usize, values: &mut [i16]) -> Result<()> {
        self.remainder.as_ref().expect("remainders were read where there are none").download_at(start, values)
    }

    /// Sets elements from `start` on; bf16 keeps the rest as remainder if `split_master` asks for one or one is there already.
    pub fn write_masters(&mut self, start: usize, values: &[f32], split_master: bool) -> Result<()> {
        if let Some(int8) = &mut self.int8 {
            let (first, count) = (start / int8.inputs(), values.len() / int8.inputs());
            return int8.write_rows(first..first + count, values);
        }
        let mut narrow = Buffer::<E>::scratch(values.len());
        if E::HAS_REMAINDER && (split_master || self.remainder.is_some()) {
            let mut rest = Buffer::<E>::scratch(values.len());
            E::split_master(values, &mut narrow, &mut rest);
            self.remainder_mut()?.upload_at(start, bytemuck::cast_slice(&rest))?;
        } else {
            narrow.iter_mut().zip(values).for_each(|(to, from)| *to = E::from_f32(*from));
        }
        self.weight.upload_at(start, &narrow)
    }

    /// Takes the bits of a copy on the same device.
    pub fn take(&mut self, from: &Self) -> Result<()> {
        self.weight.copy_from(from.weight.view())?;
        self.remainder = from.remainder.as_ref().map(DeviceBuffer::try_clone).transpose()?;
        Ok(())
    }

    /// Takes the bits of a copy on the host.
    pub fn upload(&mut self, weight: &[E], remainder: Option<&[i16]>) -> Result<()> {
        self.weight.upload(weight)?;
        self.set_remainder(remainder)
    }

    /// Takes remainders, or none.
    pub fn set_remainder(&mut self, remainder: Option<&[i16]>) -> Result<()> {
        match remainder {
            None => self.remainder = None,
            Some(remainder) => self.remainder_mut()?.upload(remainder)?,
        }
        Ok(())
    }

    /// A copy of the remainders on the host.
    pub fn remainder_to_host(&self) -> Result<Option<Vec<i16>>> {
        self.remainder.as_ref().map(DeviceBuffer::to_vec).transpose()
    }

    /// A copy of the weight on the host.
    pub fn weight_to_host(&self) -> Result<Buffer<E>> {
        downloaded(&self.weight)
    }

    /// Bytes of both.
    pub fn bytes(&self) -> usize {
        let int8 = self.int8.as_ref().map_or(0, Int8Weight::bytes);
        int8 + self.weight.len() * size_of::<E>() + self.remainder.as_ref().map_or(0, DeviceBuffer::len) * 2
    }
}
