//! Whether a model's training fits, asked when an optimizer is made for it and before a forward pass larger than any before.
//! What is counted is `engine/model/room.rs`'s matter.

use super::optim::Held;
use crate::error::Result;
use crate::model::Model;
use crate::tensor::autograd::is_recording;
use mlua::Lua;
use std::sync::{Arc, Mutex, Weak};

/// The optimizer of a model, if it has one, and the most tokens of a forward pass that had room.
#[derive(Clone, Default)]
pub struct Room(Arc<Mutex<(Weak<Mutex<Held>>, usize)>>);

impl Room {
    /// The optimizer `held` is made for the model: what its steps will keep is asked for before they begin.
    ///
    /// Errors: those of [`Model::check_training_room`].
    pub(super) fn enter(&self, op: &'static str, model: &Model, held: &Arc<Mutex<Held>>) -> Result<()> {
        let (kept, gradients) = held.lock().expect("an update does not panic under this lock").adamw.bytes_to_come();
        model.check_training_room(op, 0, kept + gradients)?;
        self.0.lock().expect("no panic happens under this lock").0 = Arc::downgrade(held);
        Ok(())
    }

    /// A forward pass of `tokens` on a device will be recorded. Nothing is asked if one of as many had room.
    ///
    /// Errors: those of [`Model::check_training_room`].
    pub fn check(&self, lua: &Lua, op: &'static str, model: &Model, tokens: usize) -> Result<()> {
        let mut seen = self.0.lock().expect("no panic happens under this lock");
        if model.place().device().is_none() || !is_recording() || tokens <= seen.1 {
            return Ok(());
        }
        let trainer = seen.0.upgrade();
        let to_come = trainer.map_or(0, |held| held.lock().expect("an update does not panic under this lock").adamw.bytes_to_come().0);
        if model.check_training_room(op, tokens, to_come).is_err() {
            // Tensors that no script holds any more may be in the way.
            let _ = lua.gc_collect();
            model.check_training_room(op, tokens, to_come)?;
        }
        seen.1 = tokens;
        Ok(())
    }
}
