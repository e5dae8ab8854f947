//! Lua: the virtual machine, the face of the engine in it, and the run of a workflow. The only folder that names mlua.

pub mod args;
pub mod call;
pub mod data;
mod globals;
pub mod interrupt;
pub mod loops;
pub mod lua_version;
mod memory;
pub mod model;
pub mod modules;
mod nearest;
pub mod optim;
pub mod options;
pub mod progress;
pub mod raise;
pub mod run;
pub mod tensor;
pub mod tensor_operations;
mod tensor_text;
pub mod tokenizer;
pub mod vm;
pub mod work;
pub mod workflow;
