//! The element types that a safetensors file may hold, and how each becomes f32 or bf16 and back.
//! Not the types in which models compute: those are `kernels::element`.
//! Source: the safetensors format, whose numbers are little-endian.

use crate::kernels::element::{Dtype, Float};
use half::f16;

/// Element type of a tensor in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoredDtype {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    U64,
    I32,
    U32,
    I16,
    U16,
    I8,
    U8,
    Bool,
}

impl StoredDtype {
    /// Every type this engine reads.
    pub const ALL: [Self; 13] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::I64,
        Self::U64,
        Self::I32,
        Self::U32,
        Self::I16,
        Self::U16,
        Self::I8,
        Self::U8,
        Self::Bool,
    ];

    /// The name in a file's header.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::I64 => "I64",
            Self::U64 => "U64",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
        }
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::Bf16 | Self::I16 | Self::U16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// The type of that name in a header, if this engine reads it.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Whether it holds real numbers, as weights do.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::Bf16)
    }
}

impl From<Dtype> for StoredDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
            Dtype::I32 => Self::I32,
            Dtype::I8 => Self::I8,
        }
    }
}

impl std::fmt::Display for StoredDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Fills `out` from little-endian `bytes` of a float type; rounds to nearest even where `E` is narrower.
///
/// Panics when `dtype` is no float type or `bytes` is not `out.len()` elements long: callers have checked both.
pub(super) fn decode_floats<E: Float>(dtype: StoredDtype, bytes: &[u8], out: &mut [E]) {
    assert_eq!(bytes.len(), out.len() * dtype.size(), "decode_floats: bytes against elements of {dtype}");
    fn each<E, const SIZE: usize>(bytes: &[u8], out: &mut [E], convert: impl Fn([u8; SIZE]) -> E) {
        for (slot, raw) in out.iter_mut().zip(bytes.chunks_exact(SIZE)) {
            *slot = convert(raw.try_into().expect("chunks_exact gives SIZE bytes"));
        }
    }
    match dtype {
        // A double rounding (f64 to f32 to bf16) can differ from a direct one in the last bit. F64 checkpoints are rare
        // enough to accept that.
        StoredDtype::F64 => each(bytes, out, |raw: [u8; 8]| E::from_f32(f64::from_le_bytes(raw) as f32)),
        StoredDtype::F32 => each(bytes, out, |raw: [u8; 4]| E::from_f32(f32::from_le_bytes(raw))),
        StoredDtype::F16 => each(bytes, out, |raw: [u8; 2]| E::from_f32(f16::from_le_bytes(raw).to_f32())),
        StoredDtype::Bf16 => {
            each(bytes, out, |raw: [u8; 2]| E::from_f32(f32::from_bits(u32::from(u16::from_le_bytes(raw)) << 16)));
        }
        other => panic!("decode_floats: {other} is no float type"),
    }
}

/// Writes `values` into `out` as little-endian elements of a float type.
///
/// Panics when `dtype` is no float type or the lengths differ: callers have checked both.
pub(super) fn encode_floats<E: Float>(dtype: StoredDtype, values: &[E], out: &mut [u8]) {
    assert_eq!(out.len(), values.len() * dtype.size(), "encode_floats: bytes against elements of {dtype}");
    fn each<E: Float, const SIZE: usize>(values: &[E], out: &mut [u8], convert: impl Fn(f32) -> [u8; SIZE]) {
        for (slot, value) in out.chunks_exact_mut(SIZE).zip(values) {
            slot.copy_from_slice(&convert(value.to_f32()));
        }
    }
    match dtype {
        StoredDtype::F64 => each(values, out, |value| f64::from(value).to_le_bytes()),
        StoredDtype::F32 => each(values, out, f32::to_le_bytes),
        StoredDtype::F16 => each(values, out, |value| f16::from_f32(value).to_le_bytes()),
        StoredDtype::Bf16 => each(values, out, |value| <half::bf16 as crate::kernels::element::Element>::from_f32(value).to_le_bytes()),
        other => panic!("encode_floats: {other} is no float type"),
    }
}

/// Appends the elements of an integer or boolean type to `out`; `None` if one does not fit an i64.
///
/// Panics when `dtype` is a float type: callers have checked it.
pub(super) fn decode_integers(dtype: StoredDtype, bytes: &[u8], out: &mut Vec<i64>) -> Option<()> {
    fn each<const SIZE: usize>(bytes: &[u8], out: &mut Vec<i64>, convert: impl Fn([u8; SIZE]) -> Option<i64>) -> Option<()> {
        for raw in bytes.chunks_exact(SIZE) {
            out.push(convert(raw.try_into().expect("chunks_exact gives SIZE bytes"))?);
        }
        Some(())
    }
    match dtype {
        StoredDtype::I64 => each(bytes, out, |raw| Some(i64::from_le_bytes(raw))),
        StoredDtype::U64 => each(bytes, out, |raw| u64::from_le_bytes(raw).try_into().ok()),
        StoredDtype::I32 => each(bytes, out, |raw| Some(i32::from_le_bytes(raw).into())),
        StoredDtype::U32 => each(bytes, out, |raw| Some(u32::from_le_bytes(raw).into())),
        StoredDtype::I16 => each(bytes, out, |raw| Some(i16::from_le_bytes(raw).into())),
        StoredDtype::U16 => each(bytes, out, |raw| Some(u16::from_le_bytes(raw).into())),
        StoredDtype::I8 => each(bytes, out, |raw| Some(i8::from_le_bytes(raw).into())),
        StoredDtype::U8 | StoredDtype::Bool => each(bytes, out, |raw: [u8; 1]| Some(raw[0].into())),
        other => panic!("decode_integers: {other} is a float type"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn names_and_sizes_agree_with_the_format() {
        for dtype in StoredDtype::ALL {
            assert_eq!(StoredDtype::parse(dtype.name()), Some(dtype));
            let bits: String = dtype.name().chars().filter(char::is_ascii_digit).collect();
            assert_eq!(dtype.size() * 8, bits.parse().unwrap_or(8), "{dtype}");
        }
        assert_eq!(StoredDtype::parse("bf16"), None);
        assert_eq!(StoredDtype::parse("F8_E4M3"), None);
    }

    #[test]
    fn floats_survive_every_type_that_can_hold_them() {
        // Powers of two and small sums of them are exact in all four types.
        let values = [0.0f32, -0.0, 1.0, -1.5, 0.25, 96.0, f32::INFINITY, f32::NEG_INFINITY];
        for dtype in StoredDtype::ALL.into_iter().filter(|dtype| dtype.is_float()) {
            let mut bytes = vec![0; values.len() * dtype.size()];
            encode_floats(dtype, &values, &mut bytes);
            let (mut wide, mut narrow) = ([7.0f32; 8], [bf16::ONE; 8]);
            decode_floats(dtype, &bytes, &mut wide);
            decode_floats(dtype, &bytes, &mut narrow);
            assert_eq!(wide.map(f32::to_bits), values.map(f32::to_bits), "{dtype}");
            assert_eq!(narrow.map(|v| v.to_f32().to_bits()), values.map(f32::to_bits), "{dtype}");
            let mut again = vec![0; bytes.len()];
            encode_floats(dtype, &narrow, &mut again);
            assert_eq!(again, bytes, "{dtype}");
        }
    }

    #[test]
    fn integers_keep_their_sign_and_their_limits() {
        let mut out = Vec::new();
        decode_integers(StoredDtype::I32, &[0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0], &mut out).unwrap();
        decode_integers(StoredDtype::I16, &[0x00, 0x80], &mut out).unwrap();
        decode_integers(StoredDtype::U16, &[0x00, 0x80], &mut out).unwrap();
        decode_integers(StoredDtype::I8, &[0x80], &mut out).unwrap();
        decode_integers(StoredDtype::Bool, &[0, 1], &mut out).unwrap();
        assert_eq!(out, [-1, 1, -32768, 32768, -128, 0, 1]);
        assert_eq!(decode_integers(StoredDtype::U64, &[0xff; 8], &mut out), None);
    }
}
