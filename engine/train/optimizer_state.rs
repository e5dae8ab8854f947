//! The state of AdamW as a value: copied in memory, written to a folder, put back to the bit. Files hold rows of tensors, so that
//! a run goes on wherever its model then lies.

use super::optimizer::{AdamW, MOMENTS, Settings, Slot};
use crate::checkpoint::safetensors::SafetensorsFile;
use crate::checkpoint::stored_dtype::StoredDtype;
use crate::checkpoint::writer::{FolderWriter, SHARD_BYTES_MAX, TensorSpec};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::tensor::parameter::Layout;
use crate::tensor::place::{Array, ImageTo};
use crate::tensor::trainable::TensorRows;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Counters, settings and moments of an optimizer.
pub struct AdamWState {
    counts: Counts,
    /// By the name of the parameter, with its updates.
    moments: BTreeMap<String, Moments>,
}

struct Moments {
    /// The first and the second.
    moments: Arc<(Array<f32>, Array<f32>)>,
    /// Updates that wait to be merged.
    waiting: Option<Array<f32>>,
    updates: u64,
    /// How they lie: that of the parameter, its shape, and what of it is which tensor.
    layout: Layout,
    shape: (usize, usize),
    tensors: Arc<[TensorRows]>,
}

/// All but the moments: `adamw.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Counts {
    settings: Settings,
    steps: u64,
    skipped: u64,
    /// Updates of each tensor that had any.
    updates: BTreeMap<String, u64>,
}

const STEM: &str = "adamw";
/// The ending of the name of updates that wait to be merged; those of moments are `m` and `v`.
const WAITING: &str = "waiting";

/// f32 values that are read or written at a time.
const BLOCK_VALUES: usize = 1 << 20;

/// Ranges of about [`BLOCK_VALUES`] values.
fn blocks(rows: usize, columns: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (BLOCK_VALUES / columns.max(1)).next_multiple_of(32);
    (0..rows).step_by(step).map(move |start| start..(start + step).min(rows))
}

impl Moments {
    /// What it is made of, by the endings of names.
    fn parts(&self) -> impl Iterator<Item = (&'static str, &Array<f32>)> {
        [("m", &self.moments.0), ("v", &self.moments.1)].into_iter().chain(self.waiting.iter().map(|waiting| (WAITING, waiting)))
    }

    fn write(&self, tensor: &TensorRows, writer: &mut FolderWriter) -> Result<()> {
        let TensorRows { name, rows } = tensor;
        for (part, kept) in self.parts() {
            for block in blocks(rows.len(), self.shape.1) {
                let (mut values, block) = (Buffer::scratch(block.len() * self.shape.1), rows.start + block.start..rows.start + block.end);
                match kept {
                    Array::Host(kept) => self.layout.unpack_f32(kept, self.shape, block, &mut values),
                    Array::Cuda(kept) => kept.download_at(block.start * self.shape.1, &mut values)?,
                }
                writer.write(&format!("{name}.{part}"), &values[..])?;
            }
        }
        Ok(())
    }
}

/// The rows of `part` of the moments of `slot` that the file has, in the layout of the parameter; others are zero.
fn read(file: &SafetensorsFile, slot: &Slot, part: &str) -> Result<Buffer<f32>> {
    let parameter = &slot.parameter;
    let (columns, mut kept) = (parameter.columns(), Buffer::zeroed(parameter.gradient_len()));
    let shape = (parameter.count() / columns.max(1), columns);
    for TensorRows { name, rows } in slot.tensors.iter() {
        let name = format!("{name}.{part}");
        if file.get(&name).is_none() {
            continue;
        }
        for block in blocks(rows.len(), columns) {
            let mut values = Buffer::<f32>::scratch(block.len() * columns);
            file.read_rows(&name, block.clone(), &mut values)?;
            parameter.layout().pack_f32(&mut kept, shape, rows.start + block.start..rows.start + block.end, &values);
        }
    }
    Ok(kept)
}

impl AdamWState {
    /// Bytes of the moments, and of updates that wait.
    pub fn bytes(&self) -> u64 {
        self.moments.values().flat_map(Moments::parts).map(|(_, part)| (part.len() * 4) as u64).sum()
    }

    /// Writes the folder `target`: `adamw.safetensors`, by the names of tensors and row-major, and `adamw.json`. Errors: those of
    /// [`FolderWriter`].
    pub fn save(&self, target: &Path) -> Result<()> {
        let pairs = self.moments.values().flat_map(|moments| moments.tensors.iter().map(move |tensor| (tensor, moments)));
        let mut tensors: Vec<(&TensorRows, &Moments)> = pairs.collect();
        // One order, however tensors are parts of parameters here.
        tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let mut specs = Vec::new();
        let mut counts = self.counts.clone();
        for (TensorRows { name, rows }, moments) in &tensors {
            counts.updates.insert(name.clone(), moments.updates);
            let shape = vec![rows.len(), moments.shape.1];
            specs.extend(moments.parts().map(|(part, _)| TensorSpec {
                name: format!("{name}.{part}"),
                dtype: StoredDtype::F32,
                shape: shape.clone(),
            }));
        }
        let mut writer = FolderWriter::create_named(target, STEM, specs, SHARD_BYTES_MAX.max(u64::MAX / 2))?;
        tensors.iter().try_for_each(|(tensor, moments)| moments.write(tensor, &mut writer))?;
        writer.add_json("adamw.json", &serde_json::to_value(&counts).expect("plain data becomes JSON"))?;
        writer.finish()
    }
}

impl AdamW {
    /// All that the next step depends on besides weights and gradients; copied, but for moments that stay
    /// [`ImageTo::InPlace`].
    ///
    /// Errors: those of the device.
    pub fn state(&self, to: ImageTo) -> Result<AdamWState> {
        let counts = Counts { settings: self.settings(), steps: self.steps(), skipped: self.skipped(), updates: BTreeMap::new() };
        let mut kept = BTreeMap::new();
        for Slot { parameter, tensors, moments, waiting, updates } in &self.slots {
            if let Some(moments) = moments {
                let moments = match to.shares(parameter.place()) {
                    true => moments.clone(),
                    false => Arc::new((moments.0.image(to)?, moments.1.image(to)?)),
                };
                let (layout, tensors, columns) = (parameter.layout(), tensors.clone(), parameter.columns());
                let shape = (parameter.count() / columns.max(1), columns);
                let waiting = waiting.clone().map(Array::Host);
                let moments = Moments { moments, waiting, updates: *updates, layout, shape, tensors };
                kept.insert(parameter.name().to_string(), moments);
            }
        }
        Ok(AdamWState { counts, moments: kept })
    }

    /// Goes on from what [`AdamWState::save`] wrote, wherever its parameters lay; they come one by one. A parameter of several
    /// tensors takes the largest of their numbers of updates: experts that are one matrix here may have been many there.
    ///
    /// Errors: [`Error::Format`] names file and tensor if it is the state of other parameters, and nothing changes then;
    /// [`Error::Io`].
    pub fn load(&mut self, folder: &Path) -> Result<()> {
        let path = folder.join("adamw.json");
        let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))?;
        let counts: Counts = serde_json::from_str(&text)
            .map_err(|error| Error::format(&path, "optimizer", "counters and settings of AdamW", error.to_string()))?;
        let file = SafetensorsFile::open(&folder.join("adamw.safetensors"))?;
        let (mut known, mut parts) = (0, 0);
        for slot in &self.slots {
            for TensorRows { name, rows } in slot.tensors.iter().filter(|tensor| counts.updates.contains_key(&tensor.name)) {
                let waits = file.get(&format!("{name}.{WAITING}")).is_some();
                for part in ["m", "v"].into_iter().chain(waits.then_some(WAITING)) {
                    file.expect(&format!("{name}.{part}"), &[rows.len(), slot.parameter.columns()])?;
                    parts += 1;
                }
                known += 1;
            }
        }
        if (known, parts) != (counts.updates.len(), file.tensors().len()) {
            let expected = format!("moments of {known} tensors, which the model has and adamw.json lists");
            let got = format!("{} moments, and {} tensors in adamw.json", file.tensors().len(), counts.updates.len());
            return Err(Error::format(file.path(), "tensors", expected, got));
        }
        self.set(counts.settings)?;
        self.set_counts(counts.steps, counts.skipped);
        for slot in &mut self.slots {
            let updates = slot.tensors.iter().filter_map(|tensor| counts.updates.get(&tensor.name)).max().copied();
            slot.updates = updates.unwrap_or(0);
            (slot.moments, slot.waiting) = (None, None);
            if updates.is_some() {
                let (m, v) = (read(&file, slot, "m")?, read(&file, slot, "v")?);
                slot.moments = Some(Arc::new((slot.at_place(Array::Host(m))?, slot.at_place(Array::Host(v))?)));
                let waits = slot.tensors.iter().any(|tensor| file.get(&format!("{}.{WAITING}", tensor.name)).is_some());
                slot.waiting = if waits { Some(read(&file, slot, WAITING)?) } else { None };
            }
        }
        Ok(())
    }

    /// Goes on from a state of the same parameters, which stays.
    ///
    /// Errors: those of the settings, and of the device. Panics for a state of other parameters.
    pub fn copy_from(&mut self, state: &AdamWState) -> Result<()> {
        self.set(state.counts.settings)?;
        self.set_counts(state.counts.steps, state.counts.skipped);
        for slot in &mut self.slots {
            let moments = state.moments.get(slot.parameter.name());
            slot.updates = moments.map_or(0, |moments| moments.updates);
            slot.waiting = moments.and_then(|moments| moments.waiting.as_ref()).map(Array::to_host).transpose()?;
            slot.moments = match moments {
                Some(Moments { moments, .. }) => {
                    let (m, v) = (moments.0.try_clone()?, moments.1.try_clone()?);
                    Some(Arc::new((slot.at_place(m)?, slot.at_place(v)?)))
                }
                None => None,
            };
        }
        Ok(())
    }
}

impl Slot {
    /// Moments in the layout of the parameter, where it lies.
    fn at_place(&self, moments: Array<f32>) -> Result<Array<f32>> {
        assert_eq!(moments.len(), self.parameter.gradient_len(), "{}: moments of another parameter", self.parameter.name());
        moments.moved_to(self.parameter.place(), MOMENTS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::parameter::{Layout, Parameter};

    #[test]
    fn a_state_in_place_is_no_copy_until_it_is_written() {
        let give = |parameter: &Parameter<f32>, gradient: [f32; 2]| {
            parameter.accumulate(|sum, _| sum.copy_from_slice(&gradient));
        };
        let run = |to: Option<ImageTo>| {
            let parameter = Arc::new(Parameter::<f32>::zeros("p", 2, 1, Layout::Rows));
            let mut optimizer = AdamW::new(vec![parameter.clone()], Settings::default()).unwrap();
            give(&parameter, [3.0, -4.0]);
            optimizer.step().unwrap();
            let before = parameter.read().weight.to_vec();
            let taken = to.map(|to| (optimizer.state(to).unwrap(), parameter.image(to).unwrap()));
            let shared = taken.as_ref().is_some_and(|(state, image)| {
                let moments = optimizer.slots[0].moments.as_ref().unwrap();
                Arc::ptr_eq(moments, &state.moments["p"].moments) && Arc::ptr_eq(&parameter.read(), &image.read())
            });
            give(&parameter, [0.5, 0.25]);
            optimizer.step().unwrap();
            if let Some((state, image)) = taken {
                assert_eq!(image.read().weight.to_vec(), before, "{to:?}");
                optimizer.copy_from(&state).unwrap();
                parameter.copy_from(&image).unwrap();
                give(&parameter, [0.5, 0.25]);
                optimizer.step().unwrap();
            }
            (parameter.read().weight.to_vec(), shared)
        };
        let (after, _) = run(None);
        assert_eq!(run(Some(ImageTo::InPlace)), (after.clone(), true));
        assert_eq!(run(Some(ImageTo::Host)), (after, false));
    }
}
