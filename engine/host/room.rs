//! Whether a model's training fits, asked when an optimizer is made for it and before a forward pass larger than any before.
//! What is counted is `engine/model/room.rs`'s matter.

use super::optim::Held;
use crate::error::Result;
use crate::kernels::element::Dtype;
use crate::model::Model;
use crate::tensor::autograd::is_recording;
use mlua::Lua;
use std::sync::{Arc, Mutex, Weak};

/// The optimizer of a model, if it has one, and the most tokens of a forward pass that had room.
#[derive(Clone, Default)]
pub struct Room(Arc<Mutex<(Weak<Mutex<Held>>, usize)>>);

/// The type of the moments of an optimizer, and what [`crate::train::optimizer::AdamW::bytes_to_come`] says.
fn needs(held: &Mutex<Held>) -> (Dtype, (u64, u64)) {
    let adamw = &held.lock().expect("an update does not panic under this lock").adamw;
    (adamw.settings().moments, adamw.bytes_to_come())
}

impl Room {
    /// The optimizer `held` is made for the model: what its steps will keep is asked for before they begin.
    ///
    /// Errors: those of [`Model::check_training_room`].
    pub(super) fn enter(&self, op: &'static str, model: &Model, held: &Arc<Mutex<Held>>) -> Result<()> {
        let (moments, (kept, gradients)) = needs(held);
        model.check_training_room(op, 0, moments, kept + gradients)?;
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
        let (moments, (to_come, _)) = trainer.map_or((Dtype::F32, (0, 0)), |held| needs(&held));
        if model.check_training_room(op, tokens, moments, to_come).is_err() {
            // Tensors that no script holds any more may be in the way.
            let _ = lua.gc_collect();
            model.check_training_room(op, tokens, moments, to_come)?;
        }
        seen.1 = tokens;
        Ok(())
    }
}
