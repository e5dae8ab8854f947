//! safetensors folders in and out. Turns bytes into (name, tensor); knows no Qwen.

pub mod catalog;
pub mod commit;
pub mod folder;
pub mod free_space;
mod header;
#[cfg(test)]
mod malformed;
pub mod manifest;
pub mod replacement;
pub mod retention;
pub mod safetensors;
pub mod stored_dtype;
pub mod writer;
