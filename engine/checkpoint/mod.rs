//! safetensors folders in and out. Turns bytes into (name, tensor); knows no Qwen.

mod header;
#[cfg(test)]
mod malformed;
pub mod safetensors;
pub mod stored_dtype;
