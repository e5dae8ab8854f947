//! The CPU back-end: every loop, in AVX-512, AVX2 and portable form, chosen when the program runs.
//! Each output element is summed in an order that depends on its own reduction alone, never on the number of rows,
//! on threads or on the call's neighbours (architecture.md, "batch invariance").

pub mod adamw;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
mod attention_amx;
pub mod attention_backward;
mod attention_blocks;
pub mod attention_operands;
pub mod attention_paged;
pub mod attention_rows;
pub mod attention_tile;
pub mod combine;
pub mod cross_entropy;
pub mod embedding;
mod epilogue;
pub mod exp;
pub mod gemm;
pub mod heads;
pub mod int8;
pub mod isa;
pub mod lanes;
pub mod likelihood;
pub mod load_balance;
pub mod low_rank;
pub mod muon;
pub mod norm;
pub mod online_merge;
pub mod pack;
#[cfg(target_arch = "x86_64")]
mod pack_256;
pub mod panels;
mod product;
pub mod rms_norm;
pub mod rope;
pub mod route;
#[cfg(test)]
mod samples;
#[cfg(target_arch = "x86_64")]
mod split_f32;
#[cfg(target_arch = "x86_64")]
mod split_few_rows;
#[cfg(target_arch = "x86_64")]
mod split_product;
pub mod swiglu;
pub mod threads;
pub mod tile;
mod tile_bf16;
mod tile_f32;
mod tile_int8;
