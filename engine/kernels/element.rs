//! The element types a tensor may have, and how each converts to f32, in which all arithmetic is done.

use half::bf16;
use serde::{Deserialize, Serialize};

/// Name of an element type, as scripts and files spell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F32,
    Bf16,
    I32,
    I8,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::Bf16 => 2,
            Self::I8 => 1,
        }
    }

    /// The name used in scripts: `f32`, `bf16`, `i32`, `i8`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::I32 => "i32",
            Self::I8 => "i8",
        }
    }

    /// The type of that name, if there is one.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::F32, Self::Bf16, Self::I32, Self::I8].into_iter().find(|dtype| dtype.name() == name)
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// An element of a tensor: plain old data, for which all-zero bytes are a valid value.
pub trait Element: bytemuck::Pod + Send + Sync + Default + PartialEq + std::fmt::Debug {
    const DTYPE: Dtype;
    /// Exact for every type but i32 beyond 2^24, which rounds to nearest even.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even (bf16) or truncates towards zero and saturates (integers).
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// Round to nearest even without a branch, so that loops over it become vector code. A NaN stays a NaN.
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        let quiet = (bits >> 16) as u16 | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded })
    }
}

impl Element for i32 {
    const DTYPE: Dtype = Dtype::I32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value as i32
    }
}

impl Element for i8 {
    const DTYPE: Dtype = Dtype::I8;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value as i8
    }
}

/// The two types in which models compute: f32, and bf16 with f32 sums.
pub trait Float: Element {}
impl Float for f32 {}
impl Float for bf16 {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_as_the_half_crate_does() {
        for bits in
            (0u64..=u64::from(u32::MAX)).step_by(65_521).map(|b| b as u32).chain([0x3f80_8000, 0x3f81_8000, 0x7f80_0000, 0xff80_0000, 1])
        {
            let value = f32::from_bits(bits);
            let (got, want) = (<bf16 as Element>::from_f32(value), bf16::from_f32(value));
            assert!(got.to_bits() == want.to_bits() || (value.is_nan() && got.is_nan()), "{bits:#x}: {got:?} against {want:?}");
        }
    }
}
