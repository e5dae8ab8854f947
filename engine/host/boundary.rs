//! The end of an iteration of an outermost loop: the only place of a run where something other than training happens. In this order:
//! what users ask for, a checkpoint, the wish to stop, another generation of the script. What these are, other files say.

use super::call::Failed;
use super::control::{self, Asked, Wish};
use super::generations::{self, Boundary, Outcome};
use super::interrupt;
use super::loops::{Loop, State};
use super::modules::Source;
use super::progress::Progress;
use super::{code, reload};
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::store::records::Status;
use mlua::Lua;
use serde_json::{Value as Json, json};
use std::time::Duration;

impl Loop {
    /// Does all that is due between two iterations.
    ///
    /// Errors: [`Error::Interrupted`] if the run is to stop; [`Error::Superseded`] if another generation leads now; those of the last
    /// checkpoint.
    pub(super) fn boundary(&self, lua: &Lua, state: &mut State) -> Failed<()> {
        failpoint("loop.boundary").map_err(|error| Error::io(&self.run.folder, "go on with", error))?;
        let (done, since) = state.saved;
        let is_new = state.next > done;
        let by_count = self.plan.every.is_some_and(|every| state.next.is_multiple_of(every));
        let by_time = self.plan.interval.is_some_and(|interval| since.elapsed() >= interval);
        self.run.checkpoints.check()?;
        // The end of the loop takes its own.
        let at_end = self.steps == Some(state.next);
        self.run.set_events_seen(control::apply_recorded(&self.run, &self.path, state.next, self.run.events_seen())?);
        let reload = self.take_wishes(lua, state)?;
        let is_new = is_new && state.next > state.saved.0;
        if is_new && !at_end && (by_count || by_time) {
            self.checkpoint(lua, state)?;
        }
        if !interrupt::is_pending() {
            return self.change_generation(lua, state, reload);
        }
        if self.plan.is_on() && state.next > state.saved.0 {
            self.checkpoint(lua, state)?;
        }
        self.close(state, true);
        self.run.checkpoints.wait()?;
        let lost = if self.plan.is_on() { "" } else { ", which keeps no checkpoints and would begin anew" };
        self.run.screen.note(&format!("stopping after step {} of {}{lost}", state.next, self.path));
        Err(Error::Interrupted.into())
    }

    /// Does what users have asked for, and waits while they want it to. What comes last, a reload, is left to the caller.
    fn take_wishes(&self, lua: &Lua, state: &mut State) -> Failed<Option<Asked>> {
        let (mut paused, mut reload) = (false, None::<Asked>);
        loop {
            while let Some(asked) = self.run.control.take() {
                let place = json!({ "loop": self.path, "step": state.next });
                match &asked.wish {
                    Wish::Pause => {
                        self.run.set_status(Status::Paused, None)?;
                        if !paused {
                            self.run.screen.note(&format!("paused after step {} of {}", state.next, self.path));
                        }
                        paused = true;
                        asked.answer(Ok(place));
                    }
                    Wish::Continue => {
                        self.run.set_status(Status::Running, None)?;
                        paused = false;
                        asked.answer(Ok(place));
                    }
                    Wish::Checkpoint => {
                        if state.next > state.saved.0 {
                            self.checkpoint(lua, state)?;
                        }
                        let written = self.run.checkpoints.wait();
                        let last = self.run.store.checkpoints().last().map_or(Json::Null, |last| Json::from(last.name.as_str()));
                        // Whoever asked hears of a failure, and so does the run: the next checkpoint would fail alike.
                        asked.answer(match &written {
                            Ok(()) => Ok(last),
                            Err(error) => Err(Error::Script(error.to_string())),
                        });
                        written?;
                    }
                    Wish::Set(settings) => {
                        let outcome = control::set(&self.run, &self.path, state.next, settings);
                        if let Ok(done) = &outcome {
                            self.run.set_events_seen(self.run.store.next_event_number() - 1);
                            self.run.screen.note(&format!("set from step {} of {} on: {}", state.next, self.path, done["set"]));
                        }
                        asked.answer(outcome);
                    }
                    Wish::Reload => {
                        if let Some(earlier) = reload.replace(asked) {
                            earlier.answer(Err(Error::Script("another reload was asked for at the same step".into())));
                        }
                    }
                }
            }
            if !paused || interrupt::is_pending() {
                return Ok(reload);
            }
            self.run.control.wait(Duration::from_millis(100));
        }
    }

    /// Lets another generation of the script try to take over, if one is due here. Errors: [`Error::Superseded`] if it did.
    fn change_generation(&self, lua: &Lua, state: &mut State, reload: Option<Asked>) -> Failed<()> {
        if !self.run.is_conducted() {
            return Ok(());
        }
        let recorded = self.run.recorded_generation(&self.path, state.next);
        let known = recorded.as_ref().map(|record| record.number);
        let files = match (&recorded, &reload) {
            (None, None) => return Ok(()),
            (Some(record), _) => code::load(&self.run.folder, record.number),
            (None, Some(_)) => reload::files_now(&self.run.code().sources),
        };
        let same = |files: &Vec<Source>| known.is_none() && code::same(files, &self.run.code().sources);
        let (files, reload) = match (files, reload) {
            (Ok(files), Some(asked)) if same(&files) => {
                asked.answer(Ok(json!({ "unchanged": true })));
                return Ok(());
            }
            (Ok(files), reload) => (files, reload),
            (Err(error), Some(asked)) => {
                self.run.screen.note(&format!("the reload is refused: {error}"));
                asked.answer(Err(error));
                return Ok(());
            }
            (Err(error), None) => return Err(error.into()),
        };
        state.progress = None;
        let boundary = Boundary { loop_path: self.path.clone(), step: state.next, saved: state.saved, metrics: state.metrics.clone() };
        let outcome = generations::attempt(lua, &self.run, boundary, files, known)?;
        match outcome {
            Outcome::Taken { number, pause } => {
                self.replay.supersede();
                let step = state.next;
                self.close(state, false);
                if let Some(asked) = reload {
                    asked.answer(Ok(json!({ "generation": number, "loop": self.path, "step": step, "ms": pause.as_secs_f64() * 1e3 })));
                }
                Err(Error::Superseded.into())
            }
            Outcome::Refused(reason) if known.is_some() => Err(Error::Diverged {
                what: format!("generation {} of the script", known.unwrap_or_default()),
                how: format!("it took over here before and does not now: {reason}"),
                remedy: "see to what it needs, then resume".into(),
            }
            .into()),
            Outcome::Refused(reason) => {
                state.progress = Some(Progress::start(&self.run.screen, &self.path, self.steps));
                self.run.screen.note(&format!("the edit is refused, the run goes on as it was: {reason}"));
                if let Some(asked) = reload {
                    asked.answer(Err(reason));
                }
                Ok(())
            }
        }
    }
}
