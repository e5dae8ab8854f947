//! The CPU back-end: every loop, in AVX-512, AVX2 and portable form, chosen when the program runs.
//! Each output element is summed in an order that depends on its own reduction alone, never on the number of rows,
//! on threads or on the call's neighbours (architecture.md, "batch invariance").

pub mod attention;
pub mod attention_backward;
pub mod attention_operands;
pub mod attention_rows;
pub mod attention_tile;
pub mod exp;
pub mod heads;
pub mod isa;
pub mod rope;
pub mod threads;
