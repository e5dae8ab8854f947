//! Optimizers and learning-rate schedules. Knows parameters and their gradients, no model and no loss.

pub mod optimizer;
pub mod schedule;
