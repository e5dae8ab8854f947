//! Matrices as Hopper's bulk copies know them: a description of 128 bytes that is an argument of the kernel (hopper.cuh).
//! Source: CUDA driver API, tensor map objects.

use super::device::Device;
use super::memory::View;
use crate::error::Result;
use cudarc::driver::sys;
use half::bf16;

/// Elements of a line of shared memory: 128 bytes, the span of the swizzle.
const LINE: usize = 64;

/// Matrices of bf16, one after the other, of which tiles are copied.
pub(super) struct TensorMap {
    pub(super) map: sys::CUtensorMap,
    pub(super) ordinal: usize,
}

/// The sizes of a [`TensorMap`].
#[derive(Clone, Copy)]
pub(super) struct Matrices {
    pub count: usize,
    pub rows: usize,
    /// Elements of a row, which lie one after the other; rows do too.
    pub columns: usize,
}

impl Matrices {
    /// Whether bulk copies can read them: there are some, in rows of whole 16 bytes.
    pub fn are_aligned(&self, values: View<bf16>) -> bool {
        !values.is_empty() && self.columns.is_multiple_of(8) && values.address.is_multiple_of(16)
    }
}

impl TensorMap {
    /// Tiles of `tile_rows` rows and 64 columns of `values`, `[count, rows, columns]`, which must be aligned.
    pub fn new(device: &Device, op: &'static str, values: View<bf16>, matrices: Matrices, tile_rows: usize) -> Result<Self> {
        let Matrices { count, rows, columns } = matrices;
        assert!(
            values.len() == count * rows * columns && !values.is_empty(),
            "{op}: {} values for {count} of [{rows}, {columns}]",
            values.len()
        );
        assert!(matrices.are_aligned(values) && tile_rows <= 256, "{op}: a tensor map of rows of {columns}");
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let dims = [columns as u64, rows as u64, count as u64];
        let strides = [columns as u64 * 2, (rows * columns) as u64 * 2];
        let tile = [LINE as u32, tile_rows as u32, 1];
        // SAFETY: writes to `map`, and reads three sizes, two strides and three extents each from arrays of that length.
        let code = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                3,
                values.address as *mut std::ffi::c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                [1; 3].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        device.check(op, "cuTensorMapEncodeTiled", code)?;
        Ok(Self { map, ordinal: values.ordinal })
    }
}
