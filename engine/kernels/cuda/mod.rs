//! The CUDA back-end: kernels in CUDA C++ (`*.cu`), compiled by NVRTC while the program runs, and one safe launcher for
//! each, which holds its whole signature. No toolkit is needed to build; driver and NVRTC are looked for at run time.
//! As on the CPU, each output element is summed in an order that depends on its own reduction alone, never on the number
//! of rows, and nothing is added atomically (architecture.md, "batch invariance").

pub mod adamw;
pub mod attention;
pub mod attention_backward;
pub mod attention_step;
pub mod behind;
pub mod compile;
pub mod device;
pub mod dora;
mod driver;
pub mod elements;
pub mod embedding;
pub mod generic;
pub mod graph;
pub mod int8;
mod launch;
pub mod logprobs;
pub mod memory;
pub mod muon;
pub mod norm;
pub mod paged;
pub mod pool;
pub mod product;
pub mod product_few;
pub mod program;
pub mod rms_norm;
pub mod rope;
pub mod route;
pub mod sample;
pub mod swiglu;
mod tensor_map;
