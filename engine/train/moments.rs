//! The moments of AdamW of one parameter, or its momentum of Muon, in f32 or bf16, where the parameter lies and in the layout of its gradient.

use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::adamw::MomentsMut;
use crate::kernels::element::{Dtype, Element, Float};
use crate::tensor::parameter::Layout;
use crate::tensor::place::{Array, ImageTo, Place};
use crate::tensor::trainable::DeviceMoments;
use half::bf16;
use std::ops::Range;

/// What an out-of-memory error calls them.
const LABEL: &str = "moments of AdamW";

/// The first and the second; the second is empty where there is but one.
pub(super) enum Moments {
    F32([Array<f32>; 2]),
    Bf16([Array<bf16>; 2]),
}

/// The same for both types: `$pair` is the pair of arrays.
macro_rules! of_either {
    ($moments:expr, $pair:ident => $result:expr) => {
        match $moments {
            Moments::F32($pair) => Moments::F32($result),
            Moments::Bf16($pair) => Moments::Bf16($result),
        }
    };
}

impl Moments {
    /// `len` zeros each, or in the first alone. Panics for another type than f32 and bf16, which settings are checked for.
    ///
    /// Errors: [`crate::error::Error::Device`] if the device has no room.
    pub fn zeroed(dtype: Dtype, place: &Place, len: usize, both: bool) -> Result<Self> {
        let second = if both { len } else { 0 };
        Ok(match dtype {
            Dtype::F32 => Self::F32([Array::zeroed(place, LABEL, len)?, Array::zeroed(place, LABEL, second)?]),
            Dtype::Bf16 => Self::Bf16([Array::zeroed(place, LABEL, len)?, Array::zeroed(place, LABEL, second)?]),
            other => panic!("moments in {other}"),
        })
    }

    pub fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }

    /// Elements of the first.
    pub fn len(&self) -> usize {
        match self {
            Self::F32([m, _]) => m.len(),
            Self::Bf16([m, _]) => m.len(),
        }
    }

    /// How many there are: one or two.
    pub fn count(&self) -> usize {
        let second = match self {
            Self::F32([_, v]) => v.len(),
            Self::Bf16([_, v]) => v.len(),
        };
        if second == self.len() { 2 } else { 1 }
    }

    pub fn bytes(&self) -> u64 {
        (self.count() * self.len() * self.dtype().size()) as u64
    }

    pub fn place(&self) -> Place {
        match self {
            Self::F32([m, _]) => m.place(),
            Self::Bf16([m, _]) => m.place(),
        }
    }

    /// Errors: those of [`Array::try_clone`].
    pub fn try_clone(&self) -> Result<Self> {
        Ok(of_either!(self, pair => [pair[0].try_clone()?, pair[1].try_clone()?]))
    }

    /// Errors: those of [`Array::image`].
    pub fn image(&self, to: ImageTo) -> Result<Self> {
        Ok(of_either!(self, pair => [pair[0].image(to)?, pair[1].image(to)?]))
    }

    /// Errors: those of [`Array::moved_to`].
    pub fn moved_to(self, place: &Place) -> Result<Self> {
        Ok(of_either!(self, pair => {
            let [m, v] = pair;
            [m.moved_to(place, LABEL)?, v.moved_to(place, LABEL)?]
        }))
    }

    /// A copy in another type, rounded to nearest.
    ///
    /// Errors: those of [`Array::moved_to`].
    pub fn converted(&self, dtype: Dtype) -> Result<Self> {
        fn convert<A: Element, B: Element>(pair: &[Array<A>; 2]) -> Result<[Array<B>; 2]> {
            let convert = |from: &Array<A>| {
                let (place, from) = (from.place(), from.to_host()?);
                let mut to = Buffer::scratch(from.len());
                from.iter().zip(&mut to[..]).for_each(|(from, to)| *to = B::from_f32(from.to_f32()));
                Array::Host(to).moved_to(&place, LABEL)
            };
            Ok([convert(&pair[0])?, convert(&pair[1])?])
        }
        match (self, dtype) {
            (Self::F32(pair), Dtype::Bf16) => Ok(Self::Bf16(convert(pair)?)),
            (Self::Bf16(pair), Dtype::F32) => Ok(Self::F32(convert(pair)?)),
            _ => self.try_clone(),
        }
    }

    /// Both, to update. Panics if they lie on a device.
    pub fn host_mut(&mut self) -> MomentsMut<'_> {
        match self {
            Self::F32([Array::Host(m), Array::Host(v)]) => MomentsMut::F32(m, v),
            Self::Bf16([Array::Host(m), Array::Host(v)]) => MomentsMut::Bf16(m, v),
            _ => panic!("moments on a device of a parameter on the host"),
        }
    }

    /// Both, to update. Panics if they lie on the host.
    pub fn device_mut(&mut self) -> DeviceMoments<'_> {
        match self {
            Self::F32([Array::Cuda(m), Array::Cuda(v)]) => DeviceMoments::F32(m, v),
            Self::Bf16([Array::Cuda(m), Array::Cuda(v)]) => DeviceMoments::Bf16(m, v),
            _ => panic!("moments on the host of a parameter on a device"),
        }
    }

    /// Copies `rows` of the first (`which` 0) or the second (1) to `values`, row-major.
    ///
    /// - `layout`, `shape`: of the parameter
    ///
    /// Errors: those of the device.
    pub fn read_rows(&self, which: usize, layout: Layout, shape: (usize, usize), rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        match self {
            Self::F32(pair) => read_rows(&pair[which], layout, shape, rows, values),
            Self::Bf16(pair) => read_rows(&pair[which], layout, shape, rows, values),
        }
    }

    /// Writes `rows` of the first or the second; the way back of [`Self::read_rows`]. Panics if they lie on a device.
    pub fn write_rows(&mut self, which: usize, layout: Layout, shape: (usize, usize), rows: Range<usize>, values: &[f32]) {
        match self {
            Self::F32(pair) => write_rows(&mut pair[which], layout, shape, rows, values),
            Self::Bf16(pair) => write_rows(&mut pair[which], layout, shape, rows, values),
        }
    }
}

/// Copies `rows` of what is kept beside a parameter to `values`, row-major.
///
/// Errors: those of the device.
pub(super) fn read_rows<E: Float>(
    kept: &Array<E>,
    layout: Layout,
    shape: (usize, usize),
    rows: Range<usize>,
    values: &mut [f32],
) -> Result<()> {
    match kept {
        Array::Host(kept) => {
            let (elements, part, rows) = layout.span(shape, rows);
            layout.unpack_f32(&widened(&kept[elements]), part, rows, values);
        }
        Array::Cuda(kept) => {
            let mut block = Buffer::<E>::scratch(values.len());
            kept.download_at(rows.start * shape.1, &mut block)?;
            values.copy_from_slice(&widened(&block));
        }
    }
    Ok(())
}

/// The way back of [`read_rows`] on the host; other rows keep theirs.
pub(super) fn write_rows<E: Float>(kept: &mut Array<E>, layout: Layout, shape: (usize, usize), rows: Range<usize>, values: &[f32]) {
    let Array::Host(kept) = kept else { panic!("rows are written before they move to a device") };
    let (elements, part, rows) = layout.span(shape, rows);
    let mut wide = widened(&kept[elements.clone()]);
    layout.pack_f32(&mut wide, part, rows, values);
    kept[elements].iter_mut().zip(&wide[..]).for_each(|(to, from)| *to = E::from_f32(*from));
}

fn widened<E: Float>(values: &[E]) -> Buffer<f32> {
    let mut wide = Buffer::scratch(values.len());
    values.iter().zip(&mut wide[..]).for_each(|(from, to)| *to = from.to_f32());
    wide
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_out_of_any_layout_as_they_went_in() {
        let shape = (70, 5);
        for (dtype, layout) in [(Dtype::F32, Layout::Panels), (Dtype::Bf16, Layout::Panels), (Dtype::Bf16, Layout::Rows)] {
            let len = if layout == Layout::Panels { 96 * 5 } else { 70 * 5 };
            let mut moments = Moments::zeroed(dtype, &Place::Host, len, true).unwrap();
            let values: Vec<f32> = (0..350).map(|i| (i % 200) as f32).collect();
            for rows in [33..70, 0..7, 7..33] {
                moments.write_rows(1, layout, shape, rows.clone(), &values[rows.start * 5..rows.end * 5]);
            }
            let mut got = vec![0.0; 40 * 5];
            moments.read_rows(1, layout, shape, 20..60, &mut got).unwrap();
            assert_eq!(got, values[100..300]);
            moments.converted(Dtype::F32).unwrap().read_rows(1, layout, shape, 20..60, &mut got).unwrap();
            assert_eq!(got, values[100..300]);
            moments.read_rows(0, layout, shape, 20..60, &mut got).unwrap();
            assert_eq!(got, [0.0; 200]);
        }
    }
}
