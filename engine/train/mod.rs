//! Optimizers, schedules, clipping, accumulation.
