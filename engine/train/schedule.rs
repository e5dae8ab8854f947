//! Learning-rate schedules: a multiplier of the peak rate at a step. Pure functions, so that a resumed run needs no state.
//! Sources: SGDR, arXiv 1608.03983 (cosine); MiniCPM, arXiv 2404.06395 (warm-up, stable, decay).

use crate::error::{Error, Result};
use std::f64::consts::PI;

/// The shape after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Constant,
    Linear,
    Cosine,
    /// Constant, then linear over the last `decay` share of the steps.
    WarmupStableDecay,
}

impl Shape {
    /// The name used in scripts.
    pub const ALL: [(&'static str, Self); 4] = [
        ("constant", Self::Constant),
        ("linear", Self::Linear),
        ("cosine", Self::Cosine),
        ("warmup_stable_decay", Self::WarmupStableDecay),
    ];

    /// The shape of that name, if there is one.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(known, _)| *known == name).map(|(_, shape)| shape)
    }
}

/// A schedule over `steps` steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub shape: Shape,
    pub steps: u64,
    /// Steps of linear rise from 0; step 0 of a warm-up has rate 0.
    pub warmup_steps: u64,
    /// Share of the peak at which linear, cosine and decay end.
    pub final_fraction: f64,
    /// Share of the steps that the decay of `WarmupStableDecay` takes.
    pub decay_fraction: f64,
}

impl Schedule {
    /// Errors: [`Error::Argument`] for shares outside 0 to 1, or a warm-up longer than the whole.
    pub fn check(&self) -> Result<()> {
        for (arg, share) in [("final_fraction", self.final_fraction), ("decay_fraction", self.decay_fraction)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::argument("schedule", arg, "a number from 0 to 1", share));
            }
        }
        if self.warmup_steps > self.steps {
            return Err(Error::argument("schedule", "warmup_steps", format!("at most steps ({})", self.steps), self.warmup_steps));
        }
        Ok(())
    }

    /// The multiplier of the peak rate at `step`, counted from 0; the last value from `steps` on.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let fall = |progress: f64| 1.0 - (1.0 - self.final_fraction) * progress;
        let rest = (self.steps - self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / rest).min(1.0);
        match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => fall(progress),
            Shape::Cosine => fall(0.5 - 0.5 * (PI * progress).cos()),
            Shape::WarmupStableDecay => {
                let decay = (self.decay_fraction * self.steps as f64).max(1.0);
                let start = self.steps as f64 - decay;
                fall(((step as f64 - start) / decay).clamp(0.0, 1.0))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape) -> Schedule {
        Schedule { shape, steps: 100, warmup_steps: 10, final_fraction: 0.1, decay_fraction: 0.2 }
    }

    #[test]
    fn shapes_pass_through_their_known_points() {
        for (_, shape) in Shape::ALL {
            assert_eq!((schedule(shape).at(0), schedule(shape).at(5), schedule(shape).at(10)), (0.0, 0.5, 1.0), "{shape:?}");
        }
        assert_eq!(schedule(Shape::Constant).at(99), 1.0);
        assert!((schedule(Shape::Linear).at(55) - 0.55).abs() < 1e-12);
        assert!((schedule(Shape::Cosine).at(55) - 0.55).abs() < 1e-12);
        assert!((schedule(Shape::Cosine).at(100) - 0.1).abs() < 1e-12 && (schedule(Shape::Cosine).at(500) - 0.1).abs() < 1e-12);
        let wsd = schedule(Shape::WarmupStableDecay);
        assert_eq!((wsd.at(79), wsd.at(80)), (1.0, 1.0));
        assert!((wsd.at(90) - 0.55).abs() < 1e-12 && (wsd.at(100) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn shares_and_warmups_that_cannot_be_meant_are_refused() {
        assert!(Schedule { final_fraction: 1.5, ..schedule(Shape::Linear) }.check().is_err());
        assert!(Schedule { warmup_steps: 101, ..schedule(Shape::Linear) }.check().is_err());
        assert!(schedule(Shape::Linear).check().is_ok());
    }
}
