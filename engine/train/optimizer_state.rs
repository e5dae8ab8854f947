//! The state of AdamW as a value: copied in memory, written to a folder, put back to the bit. Files hold rows of tensors, so that
//! a run goes on wherever its model then lies.

use super::moments::{Moments, read_rows, write_rows};
use super::optimizer::{AdamW, Settings, Slot};
use crate::checkpoint::safetensors::SafetensorsFile;
use crate::checkpoint::writer::{FolderWriter, SHARD_BYTES_MAX, TensorSpec};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Dtype;
use crate::tensor::parameter::Layout;
use crate::tensor::place::{Array, ImageTo, Place};
use crate::tensor::trainable::TensorRows;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Counters, settings and moments of an optimizer.
pub struct AdamWState {
    counts: Counts,
    /// By the name of the parameter.
    kept: BTreeMap<String, Kept>,
}

/// What is kept of a parameter.
struct Kept {
    moments: Arc<Moments>,
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
/// The endings of the names of the first and the second moments.
const MOMENTS: [&str; 2] = ["m", "v"];
/// The ending of the name of updates that wait to be merged.
const WAITING: &str = "waiting";

/// f32 values that are read or written at a time.
const BLOCK_VALUES: usize = 1 << 20;

/// Ranges of about [`BLOCK_VALUES`] values.
pub(super) fn blocks(rows: usize, columns: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (BLOCK_VALUES / columns.max(1)).next_multiple_of(32);
    (0..rows).step_by(step).map(move |start| start..(start + step).min(rows))
}

impl Kept {
    /// The endings of the names of what it is made of, and the types.
    fn parts(&self) -> impl Iterator<Item = (&'static str, Dtype)> {
        let dtype = self.moments.dtype();
        MOMENTS
            .into_iter()
            .take(self.moments.count())
            .map(move |part| (part, dtype))
            .chain(self.waiting.iter().map(|_| (WAITING, Dtype::F32)))
    }

    fn write(&self, tensor: &TensorRows, writer: &mut FolderWriter) -> Result<()> {
        let TensorRows { name, rows } = tensor;
        for (part, _) in self.parts() {
            for block in blocks(rows.len(), self.shape.1) {
                let (mut values, block) = (Buffer::scratch(block.len() * self.shape.1), rows.start + block.start..rows.start + block.end);
                match MOMENTS.iter().position(|moment| *moment == part) {
                    Some(which) => self.moments.read_rows(which, self.layout, self.shape, block, &mut values)?,
                    None => read_rows(self.waiting.as_ref().expect("it is a part"), self.layout, self.shape, block, &mut values)?,
                }
                writer.write(&format!("{name}.{part}"), &values[..])?;
            }
        }
        Ok(())
    }
}

/// Reads `part` of what `file` has of the parameter of `slot`, in blocks of its rows, as f32.
///
/// Errors: those of the file.
fn read(file: &SafetensorsFile, slot: &Slot, part: &str, mut take: impl FnMut(Range<usize>, &[f32])) -> Result<()> {
    let columns = slot.parameter.columns();
    for TensorRows { name, rows } in slot.tensors.iter() {
        let name = format!("{name}.{part}");
        if file.get(&name).is_none() {
            continue;
        }
        for block in blocks(rows.len(), columns) {
            let mut values = Buffer::<f32>::scratch(block.len() * columns);
            file.read_rows(&name, block.clone(), &mut values)?;
            take(rows.start + block.start..rows.start + block.end, &values);
        }
    }
    Ok(())
}

impl AdamWState {
    /// Bytes of the moments, and of updates that wait.
    pub fn bytes(&self) -> u64 {
        let waiting = |kept: &Kept| kept.waiting.as_ref().map_or(0, |waiting| 4 * waiting.len() as u64);
        self.kept.values().map(|kept| kept.moments.bytes() + waiting(kept)).sum()
    }

    /// Writes the folder `target`: `adamw.safetensors`, by the names of tensors and row-major, and `adamw.json`. Errors: those of
    /// [`FolderWriter`].
    pub fn save(&self, target: &Path) -> Result<()> {
        let pairs = self.kept.values().flat_map(|kept| kept.tensors.iter().map(move |tensor| (tensor, kept)));
        let mut tensors: Vec<(&TensorRows, &Kept)> = pairs.collect();
        // One order, however tensors are parts of parameters here.
        tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let mut specs = Vec::new();
        let mut counts = self.counts.clone();
        for (TensorRows { name, rows }, kept) in &tensors {
            counts.updates.insert(name.clone(), kept.updates);
            let shape = vec![rows.len(), kept.shape.1];
            specs.extend(kept.parts().map(|(part, dtype)| TensorSpec {
                name: format!("{name}.{part}"),
                dtype: dtype.into(),
                shape: shape.clone(),
            }));
        }
        let mut writer = FolderWriter::create_named(target, STEM, specs, SHARD_BYTES_MAX.max(u64::MAX / 2))?;
        tensors.iter().try_for_each(|(tensor, kept)| kept.write(tensor, &mut writer))?;
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
        let mut all = BTreeMap::new();
        for Slot { parameter, tensors, moments, waiting, updates, .. } in &self.slots {
            if let Some(moments) = moments {
                let moments = match to.shares(parameter.place()) {
                    true => moments.clone(),
                    false => Arc::new(moments.image(to)?),
                };
                let (layout, tensors, columns) = (parameter.layout(), tensors.clone(), parameter.columns());
                let shape = (parameter.count() / columns.max(1), columns);
                let waiting = waiting.clone().map(Array::Host);
                let kept = Kept { moments, waiting, updates: *updates, layout, shape, tensors };
                all.insert(parameter.name().to_string(), kept);
            }
        }
        Ok(AdamWState { counts, kept: all })
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
        let moments = |slot: &Slot| &MOMENTS[..if slot.is_muons(&counts.settings) { 1 } else { 2 }];
        for slot in &self.slots {
            for TensorRows { name, rows } in slot.tensors.iter().filter(|tensor| counts.updates.contains_key(&tensor.name)) {
                let waits = file.get(&format!("{name}.{WAITING}")).is_some();
                for part in moments(slot).iter().copied().chain(waits.then_some(WAITING)) {
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
            if updates.is_none() {
                continue;
            }
            let parameter = &slot.parameter;
            let (layout, columns, len) = (parameter.layout(), parameter.columns(), parameter.gradient_len());
            let shape = (parameter.count() / columns.max(1), columns);
            let mut kept = Moments::zeroed(counts.settings.moments, &Place::Host, len, moments(slot).len() == 2)?;
            for (which, part) in moments(slot).iter().enumerate() {
                read(&file, slot, part, |rows, values| kept.write_rows(which, layout, shape, rows, values))?;
            }
            slot.moments = Some(Arc::new(kept.moved_to(slot.parameter.place())?));
            if slot.tensors.iter().any(|tensor| file.get(&format!("{}.{WAITING}", tensor.name)).is_some()) {
                let mut waiting = Array::Host(Buffer::zeroed(len));
                read(&file, slot, WAITING, |rows, values| write_rows(&mut waiting, layout, shape, rows, values))?;
                slot.waiting = Some(waiting.into_host()?);
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
            let kept = state.kept.get(slot.parameter.name());
            slot.updates = kept.map_or(0, |kept| kept.updates);
            slot.waiting = kept.and_then(|kept| kept.waiting.as_ref()).map(Array::to_host).transpose()?;
            slot.moments = match kept {
                Some(Kept { moments, .. }) => {
                    let (name, len) = (slot.parameter.name(), slot.parameter.gradient_len());
                    assert_eq!(moments.len(), len, "{name}: moments of another parameter");
                    Some(Arc::new(moments.try_clone()?.moved_to(slot.parameter.place())?))
                }
                None => None,
            };
        }
        Ok(())
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
                Arc::ptr_eq(moments, &state.kept["p"].moments) && Arc::ptr_eq(&parameter.read(), &image.read())
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

    #[test]
    fn a_momentum_comes_back_alone() {
        let settings = Settings { momentum: Some(0.9), ..Settings::default() };
        let new = || -> [Arc<Parameter<f32>>; 2] {
            let parameter = |name: &str| Arc::new(Parameter::zeros(name, 40, 5, Layout::Panels));
            [parameter("layers.0.p"), parameter("embed")]
        };
        let step = |parameters: &[Arc<Parameter<f32>>], optimizer: &mut AdamW| {
            for parameter in parameters {
                parameter.write_gradient_rows(0..40, &(0..200).map(|i| (i % 17) as f32 - 7.9).collect::<Vec<_>>()).unwrap();
            }
            optimizer.step().unwrap();
        };
        let optimizer_of = |parameters: &[Arc<Parameter<f32>>; 2]| {
            AdamW::new(
                parameters.iter().map(|parameter| parameter.clone() as Arc<dyn crate::tensor::trainable::Trainable>).collect(),
                settings,
            )
            .unwrap()
        };
        let (parameters, folder) = (new(), tempfile::tempdir().unwrap());
        let mut optimizer = optimizer_of(&parameters);
        step(&parameters, &mut optimizer);
        // Panels of 64 rows: one moment of the matrix of a layer, two of the other.
        let state = optimizer.state(ImageTo::Host).unwrap();
        assert_eq!(state.bytes(), 3 * 4 * 64 * 5);
        state.save(&folder.path().join("muon")).unwrap();
        let others = new();
        others.iter().zip(&parameters).for_each(|(other, parameter)| other.copy_from(&parameter.image(ImageTo::Host).unwrap()).unwrap());
        let mut again = optimizer_of(&others);
        again.load(&folder.path().join("muon")).unwrap();
        step(&parameters, &mut optimizer);
        step(&others, &mut again);
        assert!(parameters.iter().zip(&others).all(|(a, b)| a.read().weight[..] == b.read().weight[..]));
        let error = again.set(Settings { momentum: None, ..settings }).unwrap_err().to_string();
        assert!(error.contains("settings of muon"), "{error}");
    }

    #[test]
    fn bf16_moments_come_back_from_files_to_the_bit() {
        let (rows, columns) = (70, 5);
        let new = || Arc::new(Parameter::<half::bf16>::zeros("p", rows, columns, Layout::Panels));
        let step = |parameter: &Parameter<half::bf16>, optimizer: &mut AdamW| {
            let gradient: Vec<f32> = (0..rows * columns).map(|i| (i % 17) as f32 - 7.9).collect();
            parameter.accumulate(|sum, _| {
                sum.fill(0.0);
                Layout::Panels.pack_f32(sum, (rows, columns), 0..rows, &gradient);
            });
            optimizer.step().unwrap();
        };
        let settings = Settings { moments: Dtype::Bf16, ..Settings::default() };
        let (parameter, folder) = (new(), tempfile::tempdir().unwrap());
        let mut optimizer = AdamW::new(vec![parameter.clone()], settings).unwrap();
        (0..3).for_each(|_| step(&parameter, &mut optimizer));
        let state = optimizer.state(ImageTo::Host).unwrap();
        assert_eq!(state.bytes(), 2 * 2 * 96 * 5);
        state.save(&folder.path().join("adamw")).unwrap();
        let file = SafetensorsFile::open(&folder.path().join("adamw/adamw.safetensors")).unwrap();
        assert!(file.tensors().iter().all(|tensor| tensor.dtype == Dtype::Bf16.into() && tensor.shape == [rows, columns]));

        // Into an optimizer of other settings: those of the files hold.
        let other = new();
        other.copy_from(&parameter.image(ImageTo::Host).unwrap()).unwrap();
        let mut again = AdamW::new(vec![other.clone()], Settings::default()).unwrap();
        again.load(&folder.path().join("adamw")).unwrap();
        step(&parameter, &mut optimizer);
        step(&other, &mut again);
        assert!(parameter.read().weight[..] == other.read().weight[..] && parameter.read().remainder == other.read().remainder);
    }
}
