//! safetensors folders in and out. Turns bytes into (name, tensor); knows no Qwen.

pub mod folder;
pub mod free_space;
mod header;
#[cfg(test)]
mod malformed;
pub mod replacement;
pub mod safetensors;
pub mod stored_dtype;
pub mod writer;
