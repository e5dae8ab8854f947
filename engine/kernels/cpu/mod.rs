//! The CPU back-end: every loop, in AVX-512, AVX2 and portable form, chosen when the program runs.
//! Each output element is summed in an order that depends on its own reduction alone, never on the number of rows,
//! on threads or on the call's neighbours (architecture.md, "batch invariance").

pub mod gemm;
pub mod isa;
pub mod pack;
pub mod panels;
mod product;
pub mod threads;
pub mod tile;
mod tile_bf16;
mod tile_f32;
