//! What a checkpoint of a run holds of a model, and how a model takes it again. Of a model with an adapter it holds the
//! adapter; of its base nothing, as long as the base is what its source has.
//! Folders: `models/NAME` (weights), `adapters/NAME` (a PEFT folder), `training/NAME` (masters and gradients that wait).

use super::call::Failed;
use super::checkpoints::StoredModel;
use super::model::ModelObject;
use super::options::Options;
use crate::checkpoint::commit::Draft;
use crate::error::{Error, Result};
use crate::model::Model;
use mlua::{Lua, Value};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn weights_folder(checkpoint: &Path, name: &str) -> PathBuf {
    checkpoint.join("models").join(name)
}

fn adapter_folder(checkpoint: &Path, name: &str) -> PathBuf {
    checkpoint.join("adapters").join(name)
}

/// Bytes that [`write`] takes on the disk, about.
pub fn bytes(object: &ModelObject) -> u64 {
    if object.model.adapter().is_some() && !object.model.base_changed() {
        return object.model.parameters().iter().filter(|parameter| parameter.trains()).map(|parameter| 8 * parameter.count() as u64).sum();
    }
    object.model.state_bytes()
}

/// Writes the model `name` into a checkpoint.
///
/// Errors: those of writing.
pub fn write(draft: &Draft, name: &str, object: &ModelObject) -> Result<()> {
    let has_adapter = object.model.adapter().is_some();
    if has_adapter {
        object.model.save_adapter(&draft.place(&format!("adapters/{name}"))?, None, object.source())?;
    }
    if !has_adapter {
        object.save(&draft.place(&format!("models/{name}"))?, None, None)?;
    } else if object.model.base_changed() {
        object.base()?.save(&draft.place(&format!("models/{name}"))?, None, None)?;
    }
    object.model.save_training_state(&draft.place(&format!("training/{name}"))?)
}

/// The model `name` with the weights of a checkpoint, its adapter not merged. What training keeps beside them comes later, with
/// [`put_back`].
///
/// - `source`, `options`: what the script makes it from
///
/// Errors: those of loading.
pub fn load(lua: &Lua, op: &'static str, checkpoint: &Path, name: &str, source: &Value, options: &Options) -> Failed<ModelObject> {
    let (weights, adapter) = (weights_folder(checkpoint, name), adapter_folder(checkpoint, name));
    let stored = weights.is_dir() || !adapter.is_dir();
    let object = if stored {
        let folder = Value::String(lua.create_string(weights.display().to_string())?);
        ModelObject::make(lua, op, &folder, options)?
    } else {
        ModelObject::make(lua, op, source, options)?
    };
    let object = object.made_from(source);
    if adapter.is_dir() {
        object.model.refill_adapter(&adapter)?;
        if stored {
            object.model.forget_source();
        }
    }
    Ok(object)
}

/// Gives a model the state that a checkpoint has of it.
///
/// - `stored`: what else the checkpoint says of it
/// - `touched`: whether anything changed it since [`load`]
///
/// Errors: those of reading; [`Error::Diverged`] if its base was changed and the checkpoint has none.
pub fn put_back(checkpoint: &Path, name: &str, model: &Model, stored: &StoredModel, touched: bool) -> Result<()> {
    let (weights, adapter) = (weights_folder(checkpoint, name), adapter_folder(checkpoint, name));
    let has_adapter = adapter.is_dir();
    model.set_held(&BTreeSet::new());
    if has_adapter {
        model.unmerge()?;
    }
    if touched && weights.is_dir() {
        let again = Model::load_at(model.place(), &weights, Some(model.dtype()), !has_adapter, &mut |_| {})?;
        match model.adapter() {
            None => model.copy_from(&again)?,
            Some(_) => {
                again.load_adapter(&adapter, true, &mut |_| {})?;
                model.copy_from(&again)?;
                model.forget_source();
            }
        }
    } else if touched && has_adapter {
        if model.base_changed() {
            return Err(Error::Diverged {
                what: format!("the base of the model `{name}`"),
                how: "code above the loop changes it, and had not when the checkpoint was taken".into(),
                remedy: "change it inside the loop, or start another run".into(),
            });
        }
        model.refill_adapter(&adapter)?;
    }
    model.load_training_state(&checkpoint.join("training").join(name))?;
    model.set_held(&stored.held);
    if stored.merged { model.merge() } else { Ok(()) }
}
