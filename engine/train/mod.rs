//! Optimizers. Knows parameters and their gradients, no model and no loss; learning-rate schedules are pure functions of the
//! step and live in Lua, stdlib/schedules.lua.

mod device_step;
mod moments;
mod muon;
pub mod online_merge;
pub mod optimizer;
pub mod optimizer_state;
