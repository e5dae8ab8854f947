//! Perilune: Lua workflows that train and run Qwen2.5 models. One module a floor, lowest first; a file uses only
//! floors above it in this list (tests/tidy.rs holds that). See architecture.md for the map.
#![deny(unsafe_code)]

pub mod error;

pub mod failpoint;

#[allow(unsafe_code)]
pub mod kernels;

pub mod tensor;

pub mod checkpoint;
pub mod data;
pub mod store;

pub mod model;

pub mod infer;
pub mod train;

pub mod serve;

pub mod host;

pub mod cli;
