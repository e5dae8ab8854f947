//! The state of AdamW as a value: copied in memory, written to a folder, put back to the bit.

use super::optimizer::{AdamW, MOMENTS, Settings, Slot};
use crate::checkpoint::safetensors::SafetensorsFile;
use crate::checkpoint::stored_dtype::StoredDtype;
use crate::checkpoint::writer::{FolderWriter, SHARD_BYTES_MAX, TensorSpec};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::tensor::place::Array;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Counters, settings and moments of an optimizer.
pub struct AdamWState {
    counts: Counts,
    /// By the name of the parameter.
    moments: BTreeMap<String, (Buffer<f32>, Buffer<f32>)>,
}

/// All but the moments: `adamw.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Counts {
    settings: Settings,
    steps: u64,
    skipped: u64,
    /// Updates of each parameter that had any.
    updates: BTreeMap<String, u64>,
}

const STEM: &str = "adamw";

impl AdamWState {
    /// Bytes of the moments.
    pub fn bytes(&self) -> u64 {
        self.moments.values().map(|(m, v)| ((m.len() + v.len()) * 4) as u64).sum()
    }

    /// Writes the folder `target`: `adamw.safetensors` and `adamw.json`. Errors: those of [`FolderWriter`].
    pub fn save(&self, target: &Path) -> Result<()> {
        let spec = |name: &str, part: &str, values: &Buffer<f32>| TensorSpec {
            name: format!("{name}.{part}"),
            dtype: StoredDtype::F32,
            shape: vec![values.len()],
        };
        let specs = self.moments.iter().flat_map(|(name, (m, v))| [spec(name, "m", m), spec(name, "v", v)]).collect();
        let mut writer = FolderWriter::create_named(target, STEM, specs, SHARD_BYTES_MAX.max(u64::MAX / 2))?;
        for (name, (m, v)) in &self.moments {
            writer.write(&format!("{name}.m"), &m[..])?;
            writer.write(&format!("{name}.v"), &v[..])?;
        }
        writer.add_json("adamw.json", &serde_json::to_value(&self.counts).expect("plain data becomes JSON"))?;
        writer.finish()
    }

    /// Reads what [`Self::save`] wrote. Errors: [`Error::Format`] names file and tensor; [`Error::Io`].
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("adamw.json");
        let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))?;
        let counts: Counts = serde_json::from_str(&text)
            .map_err(|error| Error::format(&path, "optimizer", "counters and settings of AdamW", error.to_string()))?;
        let file = SafetensorsFile::open(&folder.join("adamw.safetensors"))?;
        let read = |name: String| -> Result<Buffer<f32>> {
            let info = file.find(&name)?;
            let shape = info.shape.clone();
            file.expect(&name, &shape)?;
            let values: Vec<f32> = file.read_floats(&name)?;
            Ok(Buffer::copy_of(&values))
        };
        let moments = counts.updates.keys().map(|name| Ok((name.clone(), (read(format!("{name}.m"))?, read(format!("{name}.v"))?))));
        let moments = moments.collect::<Result<BTreeMap<_, _>>>()?;
        if file.tensors().len() != 2 * moments.len() {
            let expected = format!("{} moments, as adamw.json lists", 2 * moments.len());
            return Err(Error::format(file.path(), "tensors", expected, format!("{}", file.tensors().len())));
        }
        Ok(Self { counts, moments })
    }
}

impl AdamW {
    /// A copy of all that the next step depends on besides weights and gradients.
    /// On the host, wherever the parameters lie.
    ///
    /// Errors: those of the device.
    pub fn state(&self) -> Result<AdamWState> {
        let slots = || self.slots.iter().filter_map(|slot| Some((slot.parameter.name().to_string(), slot, slot.moments.as_ref()?)));
        let counts = Counts {
            settings: self.settings(),
            steps: self.steps(),
            skipped: self.skipped(),
            updates: slots().map(|(name, slot, _)| (name, slot.updates)).collect(),
        };
        let moments = slots().map(|(name, _, (m, v))| Ok((name, (m.to_host()?, v.to_host()?)))).collect::<Result<_>>()?;
        Ok(AdamWState { counts, moments })
    }

    /// Goes on from `state`.
    ///
    /// Errors: [`Error::Argument`] if it is that of other parameters; nothing changes then.
    pub fn restore(&mut self, state: AdamWState) -> Result<()> {
        self.check(&state)?;
        let AdamWState { counts, mut moments } = state;
        self.go_on(&counts, |name| moments.remove(name))
    }

    /// As [`Self::restore`], from a state that stays.
    ///
    /// Errors: as there.
    pub fn copy_from(&mut self, state: &AdamWState) -> Result<()> {
        self.check(state)?;
        self.go_on(&state.counts, |name| state.moments.get(name).cloned())
    }

    fn check(&self, state: &AdamWState) -> Result<()> {
        let lengths: BTreeMap<&str, usize> = self.slots.iter().map(|slot| (slot.parameter.name(), slot.parameter.gradient_len())).collect();
        for (name, (m, v)) in &state.moments {
            let expected = lengths.get(name.as_str()).copied();
            if expected != Some(m.len()) || expected != Some(v.len()) {
                let at_place = "as a model at this place keeps them; resume where the checkpoint was made";
                let expected = expected.map_or("a parameter of the model".to_string(), |len| format!("{len} values"));
                let expected = format!("{expected}, {at_place}");
                return Err(Error::argument("adamw", format!("moments of {name}"), expected, format!("{} values", m.len())));
            }
        }
        Ok(())
    }

    fn go_on(&mut self, counts: &Counts, mut moments_of: impl FnMut(&str) -> Option<(Buffer<f32>, Buffer<f32>)>) -> Result<()> {
        self.set(counts.settings)?;
        self.set_counts(counts.steps, counts.skipped);
        for slot in &mut self.slots {
            let Slot { parameter, moments: slot_moments, updates } = slot;
            let at_place = |moment| Array::Host(moment).moved_to(parameter.place(), MOMENTS);
            *slot_moments = match moments_of(parameter.name()) {
                Some((m, v)) => Some((at_place(m)?, at_place(v)?)),
                None => None,
            };
            *updates = counts.updates.get(parameter.name()).copied().unwrap_or(0);
        }
        Ok(())
    }
}
