//! Checkpoints of a run: its state is copied in memory at a boundary, and written by a thread of its own while training goes
//! on. And the way back: the newest sound checkpoint is found, and each named resource takes its state from it.
//! The protocol of the files is `engine/checkpoint`'s; this file says what is in them.

use super::call::Failed;
use super::globals::{RandomPosition, random_position, set_random_position};
use super::loops::LoopRecord;
use super::model::ModelObject;
use super::optim::Forced;
use super::options::Options;
use super::plain::Plain;
use super::replay::{Replay, Target};
use super::resources::Resource;
use super::run::{Run, build_id, unix_seconds};
use super::{model_state, results, states};
use crate::checkpoint::catalog::{checkpoint_name, create_durably, list, next_time, remove, sweep};
use crate::checkpoint::commit::{About, Draft};
use crate::checkpoint::manifest::Manifest;
use crate::checkpoint::retention::{Candidate, Keep, removable};
use crate::data::cursor::Cursor;
use crate::data::dataset::Dataset;
use crate::error::{Error, Result};
use crate::kernels::available_memory::has_room_for_copy;
use crate::kernels::cpu::isa;
use crate::kernels::cuda_probe;
use crate::store::records::{CheckpointRecord, StepRecord};
use crate::tensor::place::{ImageTo, Marks};
use crate::train::optimizer::Settings;
use crate::train::optimizer_state::AdamWState;
use mlua::{Lua, Value};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// `state.json`: all of a checkpoint that is not in files of its own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    pub format: u32,
    /// The outermost loop at whose boundary it was taken; none if it was taken at the end of a step.
    #[serde(rename = "loop")]
    pub loop_path: Option<String>,
    /// The step that had just ended, whose record goes with it.
    pub after: Option<StepRecord>,
    pub loops: BTreeMap<String, LoopRecord>,
    pub random: RandomPosition,
    pub models: BTreeMap<String, StoredModel>,
    pub optimizers: BTreeMap<String, StoredOptimizer>,
    pub data: BTreeMap<String, StoredData>,
    pub states: BTreeMap<String, Json>,
    /// Ends of `metrics.jsonl` and `timing.jsonl`.
    pub log_offsets: (u64, u64),
    /// Keys of the steps that had ended by then, well or not.
    pub steps: BTreeSet<String>,
    /// Number of the last event that is in all this; 0 for none.
    #[serde(default)]
    pub events: u64,
    /// What the numbers depend on besides: the program, the instructions that its products use, and the GPUs that models were on.
    pub build: String,
    pub instructions: String,
    #[serde(default)]
    pub gpus: BTreeSet<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredModel {
    pub definition: String,
    /// Whether it is not in the checkpoint, since nothing trains or has changed it: it is made again from its source.
    pub frozen: bool,
    /// Whether its adapter was merged into its weights.
    #[serde(default)]
    pub merged: bool,
    /// Its weights that were frozen for now.
    #[serde(default)]
    pub held: BTreeSet<String>,
    /// The GPU that it was on.
    #[serde(default)]
    pub gpu: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredOptimizer {
    pub script: Settings,
    pub asked: Settings,
    #[serde(default)]
    pub forced: Forced,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredData {
    pub cursor: Cursor,
    /// What the last `take` asked for.
    pub rows: Option<usize>,
}

/// The layout of [`State`] that this engine writes and reads.
const FORMAT: u32 = 1;

/// The state of a run at a boundary, in memory.
pub(super) struct Snapshot {
    state: State,
    generation: u32,
    /// What data sets read, and what [`Resources::version`](super::resources::Resources::version) was.
    plans: BTreeMap<String, Dataset>,
    version: u64,
    /// Tables of state that no script has asked for yet.
    unasked: BTreeMap<String, Plain>,
    position: (String, u64),
    pub(super) metrics: Map<String, Json>,
    models: Vec<Copied>,
    optimizers: Vec<(String, AdamWState)>,
    states: BTreeMap<String, Plain>,
    /// Behind which images on devices are read. The last field, since they go first.
    marks: Option<Marks>,
}

/// A model at the boundary.
struct Copied {
    name: String,
    copy: ModelObject,
    /// The GPU that it was on.
    gpu: Option<String>,
    version: u64,
    /// Whether it need not be written.
    as_made: bool,
}

impl Snapshot {
    /// Copies everything that changes, at the boundary of a loop behind some iterations, or `after` a step.
    ///
    /// - `to`: where copies of what lies on a device go
    ///
    /// Errors: tables of state that are no plain data; those of reading data sets.
    pub(super) fn take(
        lua: &Lua,
        run: &Run,
        position: (&str, u64),
        after: Option<&StepRecord>,
        metrics: Map<String, Json>,
        to: ImageTo,
    ) -> Failed<Self> {
        let (mut models, mut optimizers) = (Vec::new(), Vec::new());
        let (mut stored_models, mut stored_optimizers, mut data) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut plans = BTreeMap::new();
        for (name, named) in run.resources.all() {
            match named.resource {
                Resource::Model(model) => {
                    let frozen = model.is_as_made();
                    let (gpu, merged) = (model.gpu(), model.model.is_merged());
                    let stored = StoredModel { definition: named.definition, frozen, merged, held: model.model.held(), gpu: gpu.clone() };
                    stored_models.insert(name.clone(), stored);
                    // A copy of what does not train shares its weights, so that it costs nothing.
                    models.push(Copied { name, gpu, copy: model.image(to)?, version: model.model.version(), as_made: frozen });
                }
                Resource::Optimizer(optimizer, _) => {
                    let held = optimizer.lock();
                    optimizers.push((name.clone(), held.adamw.state(to)?));
                    let stored = StoredOptimizer { script: held.script, asked: held.asked, forced: held.forced.clone() };
                    stored_optimizers.insert(name, stored);
                }
                Resource::Data(object) => {
                    let (cursor, rows) = object.position()?;
                    plans.insert(name.clone(), object.dataset()?);
                    data.insert(name, StoredData { cursor, rows });
                }
            }
        }
        let states = states::contents(lua, &run.states)?;
        let state = State {
            format: FORMAT,
            loop_path: after.is_none().then(|| position.0.to_string()),
            after: after.cloned(),
            loops: run.loops.lock().expect("no panic happens under this lock").clone(),
            random: random_position(lua),
            models: stored_models,
            optimizers: stored_optimizers,
            data,
            states: states.iter().map(|(name, plain)| (name.clone(), plain.json.clone())).collect(),
            log_offsets: run.log_offsets(),
            steps: run.store.ended_steps(),
            events: run.events_seen(),
            build: build_id().to_string(),
            instructions: isa::instructions().to_string(),
            gpus: models.iter().filter_map(|copied: &Copied| copied.gpu.clone()).collect(),
        };
        let (generation, version, unasked) = (run.code().number, run.resources.version(), run.states.rest());
        let position = (position.0.to_string(), position.1);
        let marks = (to == ImageTo::SpareRoom).then(Marks::now).transpose()?;
        Ok(Self { state, generation, plans, version, unasked, position, metrics, models, optimizers, states, marks })
    }

    /// Gives the script of `lua` the tables and the random numbers as they were. What it did to the resources on its way is undone.
    ///
    /// Errors: those of putting resources back.
    pub(super) fn hand_over(&self, lua: &Lua, run: &Run) -> Failed<()> {
        if run.resources.version() != self.version {
            self.put_back_resources(run)?;
        }
        run.states.set(self.states.clone());
        states::fill_asked(lua, &run.states)?;
        set_random_position(lua, &self.state.random);
        Ok(())
    }

    /// Makes the run what it was: nothing that was done since has happened.
    ///
    /// - `steps`: keys of the steps that were known then
    ///
    /// Errors: those of reading data sets, of cutting the metrics and of the store.
    pub(super) fn put_back(&self, run: &Run, steps: &HashSet<String>) -> Failed<()> {
        run.resources.retain(|name| {
            self.state.models.contains_key(name) || self.state.optimizers.contains_key(name) || self.state.data.contains_key(name)
        });
        self.put_back_resources(run)?;
        *run.loops.lock().expect("no panic happens under this lock") = self.state.loops.clone();
        run.states.set(self.unasked.clone());
        run.store.forget_steps(run.store.step_keys().difference(steps).cloned().collect())?;
        if run.log_offsets() != self.state.log_offsets {
            run.cut_logs(self.state.log_offsets)?;
        }
        Ok(())
    }

    fn put_back_resources(&self, run: &Run) -> Failed<()> {
        let all = run.resources.all();
        let live: BTreeMap<&str, &Resource> = all.iter().map(|(name, named)| (name.as_str(), &named.resource)).collect();
        for Copied { name, copy, version, .. } in &self.models {
            if let Some(Resource::Model(object)) = live.get(name.as_str())
                && object.model.version() != *version
            {
                object.model.copy_from(&copy.model)?;
            }
        }
        for (name, state) in &self.optimizers {
            if let (Some(Resource::Optimizer(optimizer, _)), Some(stored)) = (live.get(name.as_str()), self.state.optimizers.get(name)) {
                let mut held = optimizer.lock();
                held.adamw.copy_from(state)?;
                (held.script, held.asked, held.forced) = (stored.script, stored.asked, stored.forced.clone());
                held.apply()?;
            }
        }
        for (name, stored) in &self.state.data {
            if let (Some(Resource::Data(object)), Some(plan)) = (live.get(name.as_str()), self.plans.get(name)) {
                object.put_back(plan.fresh(), &stored.cursor, stored.rows)?;
            }
        }
        Ok(())
    }

    /// Models that the checkpoint holds.
    fn stored_models(&self) -> impl Iterator<Item = &Copied> {
        self.models.iter().filter(|model| !model.as_made)
    }

    /// Bytes that it takes on the disk, about.
    fn bytes(&self) -> u64 {
        let models: u64 = self.stored_models().map(|model| model_state::bytes(&model.copy)).sum();
        let optimizers: u64 = self.optimizers.iter().map(|(_, state)| state.bytes()).sum();
        let states: u64 = self.states.values().map(|plain| plain.tensor_bytes() as u64).sum();
        models + optimizers + states + (1 << 20)
    }

    /// Writes and commits it.
    fn write(&self, root: &Path) -> Result<Manifest> {
        let name = checkpoint_name(&self.position.0, self.position.1);
        let draft = Draft::begin(root, &name, self.bytes())?;
        for model in self.stored_models() {
            model_state::write(&draft, &model.name, &model.copy)?;
        }
        for (name, optimizer) in &self.optimizers {
            optimizer.save(&draft.place(&format!("optimizers/{name}"))?)?;
        }
        for (name, plain) in self.states.iter().filter(|(_, plain)| !plain.tensors.is_empty()) {
            results::write_tensors(&draft.place(&format!("states/{name}"))?, &plain.tensors)?;
        }
        let text = serde_json::to_string_pretty(&self.state).expect("plain data becomes JSON");
        draft.write_file("state.json", format!("{text}\n").as_bytes())?;
        draft.commit_replacing(About {
            loop_path: self.position.0.clone(),
            step: self.position.1,
            generation: self.generation,
            engine: build_id().into(),
            time: next_time(root, unix_seconds())?,
            metrics: self.metrics.clone(),
            facts: Json::Null,
        })
    }
}

/// The checkpoint that a resumed run goes on from.
pub struct Origin {
    pub folder: PathBuf,
    pub manifest: Manifest,
    pub state: State,
    /// Resources that have taken their state from it.
    restored: Mutex<HashSet<String>>,
    /// Versions of models when they were loaded.
    versions: Mutex<BTreeMap<String, u64>>,
}

impl Origin {
    fn open(folder: PathBuf, manifest: Manifest) -> Result<Self> {
        manifest.verify(&folder)?;
        let path = folder.join("state.json");
        let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))?;
        let state: State = serde_json::from_str(&text)
            .map_err(|error| Error::format(&path, "state", format!("the state of a run in format {FORMAT}"), error.to_string()))?;
        if state.format != FORMAT {
            return Err(Error::format(&path, "format", FORMAT.to_string(), state.format.to_string()));
        }
        Ok(Self { folder, manifest, state, restored: Mutex::default(), versions: Mutex::default() })
    }

    /// Where the script has to come to.
    pub fn target(&self) -> Target {
        match (&self.state.loop_path, &self.state.after) {
            (Some(path), _) => Target::Loop(path.clone()),
            (None, Some(step)) => Target::Step(step.key.clone()),
            (None, None) => Target::Loop(self.manifest.loop_path.clone()),
        }
    }

    /// What a resume from here can promise, in a sentence.
    pub fn exactness(&self) -> String {
        let here: Vec<String> = if self.state.gpus.is_empty() {
            Vec::new()
        } else {
            cuda_probe::probe().map_or_else(|_| Vec::new(), |driver| driver.gpus.into_iter().map(|gpu| gpu.name).collect())
        };
        let has_gpus = self.state.gpus.iter().all(|gpu| here.contains(gpu));
        if self.state.build == build_id() && self.state.instructions == isa::instructions() && has_gpus {
            return "exact: the same program on the same instructions, every number will be as if it had not been interrupted".into();
        }
        let with = |instructions: &str, gpus: &[String]| [&[instructions.to_string()], gpus].concat().join(", ");
        let gpus: Vec<String> = self.state.gpus.iter().cloned().collect();
        format!(
            "numeric: the checkpoint is from {} with {}, this is {} with {}; results agree but for rounding",
            self.state.build,
            with(&self.state.instructions, &gpus),
            build_id(),
            with(isa::instructions(), &here)
        )
    }

    /// The model `name` with the weights of the checkpoint. What training keeps beside them comes on arrival.
    ///
    /// Errors: those of loading.
    pub fn load_model(&self, lua: &Lua, op: &'static str, name: &str, source: &Value, options: &Options) -> Failed<ModelObject> {
        let object = model_state::load(lua, op, &self.folder, name, source, options)?;
        self.versions.lock().expect("no panic happens under this lock").insert(name.into(), object.model.version());
        Ok(object)
    }

    /// Gives the resource `name` the state that the checkpoint has of it, once.
    ///
    /// Errors: those of reading; [`Error::Argument`] where the data are others now.
    pub fn restore(&self, name: &str, resource: &Resource) -> Failed<()> {
        if !self.restored.lock().expect("no panic happens under this lock").insert(name.into()) {
            return Ok(());
        }
        match resource {
            Resource::Model(object) => {
                let Some(stored) = self.state.models.get(name).filter(|stored| !stored.frozen) else { return Ok(()) };
                let loaded = self.versions.lock().expect("no panic happens under this lock").get(name).copied();
                // What the code above the loop has trained is undone.
                let touched = loaded != Some(object.model.version());
                Ok(model_state::put_back(&self.folder, name, &object.model, stored, touched)?)
            }
            Resource::Optimizer(optimizer, _) => {
                let Some(stored) = self.state.optimizers.get(name) else { return Ok(()) };
                let mut held = optimizer.lock();
                held.adamw.load(&self.folder.join("optimizers").join(name))?;
                (held.script, held.asked, held.forced) = (stored.script, stored.asked, stored.forced.clone());
                Ok(held.apply()?)
            }
            Resource::Data(object) => match self.state.data.get(name) {
                Some(stored) => Ok(object.restore(&stored.cursor, stored.rows)?),
                None => Ok(()),
            },
        }
    }
}

/// The checkpoints of a run that is alive.
pub struct Checkpoints {
    root: PathBuf,
    origin: Mutex<Option<Arc<Origin>>>,
    writer: Mutex<Option<JoinHandle<Result<()>>>>,
}

impl Checkpoints {
    /// For the run in `folder`.
    pub fn new(folder: &Path) -> Self {
        Self { root: folder.join("checkpoints"), origin: Mutex::default(), writer: Mutex::default() }
    }

    /// The checkpoint that the run goes on from.
    pub fn origin(&self) -> Option<Arc<Origin>> {
        self.origin.lock().expect("no panic happens under this lock").clone()
    }

    /// Finds the newest checkpoint whose files are what its manifest says, and goes on from it. Damaged ones are named on the
    /// screen and passed over; those that the store does not know are recorded, what it knows and is gone is marked as lost.
    ///
    /// Errors: those of listing the folder and of the store.
    pub fn find_origin(&self, run: &Run) -> Result<Option<Arc<Origin>>> {
        if !self.root.is_dir() {
            return Ok(None);
        }
        // The run's lock is held, so nobody writes here: whatever its age, it is left over, and may fill the disk.
        sweep(&self.root, Duration::ZERO)?;
        let mut found = None;
        let known = run.store.checkpoints();
        let listed = list(&self.root)?;
        for (name, manifest) in listed.iter().rev() {
            let opened = match manifest {
                Ok(manifest) if found.is_none() => {
                    Origin::open(self.root.join(name), manifest.clone()).map(|origin| found = Some(Arc::new(origin)))
                }
                Ok(_) => Ok(()),
                Err(error) => Err(Error::Script(error.to_string())),
            };
            match (opened, manifest) {
                (Err(error), _) => {
                    let what = format!("the checkpoint {name} is damaged and passed over: {error}");
                    run.screen.note(&what);
                    if let Some(record) = known.iter().find(|record| record.name == *name && record.lost.is_none()) {
                        run.store.put_checkpoint(CheckpointRecord { lost: Some(what), ..record.clone() })?;
                    }
                    // Without a manifest nothing may take its place, and the run will come to its name again.
                    if manifest.is_err() {
                        set_aside(run, name)?;
                    }
                }
                (Ok(()), Ok(manifest)) if !known.iter().any(|record| record.manifest == manifest.hash()) => record(run, manifest)?,
                _ => {}
            }
        }
        for gone in known.into_iter().filter(|record| record.lost.is_none() && !listed.iter().any(|(name, _)| *name == record.name)) {
            run.store.put_checkpoint(CheckpointRecord { lost: Some("its folder is gone".into()), ..gone })?;
        }
        *self.origin.lock().expect("no panic happens under this lock") = found.clone();
        Ok(found)
    }

    /// Whether the last checkpoint is still being written.
    pub fn is_writing(&self) -> bool {
        self.writer.lock().expect("no panic happens under this lock").as_ref().is_some_and(|writer| !writer.is_finished())
    }

    /// Waits until the last checkpoint is written.
    ///
    /// Errors: why it could not be.
    pub fn wait(&self) -> Result<()> {
        let writer = self.writer.lock().expect("no panic happens under this lock").take();
        match writer.map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }

    /// As [`Self::wait`], if it is written already; else it goes on.
    ///
    /// Errors: as [`Self::wait`].
    pub fn check(&self) -> Result<()> {
        if self.is_writing() { Ok(()) } else { self.wait() }
    }
}

/// Moves the checkpoint `name`, which cannot be read, to the run's folder `damaged`.
fn set_aside(run: &Run, name: &str) -> Result<()> {
    let folder = run.folder.join("damaged");
    create_durably(&folder)?;
    let free = (0..).map(|count| folder.join(format!("{name}.{count}"))).find(|path| !path.exists());
    let free = free.expect("there are more numbers than folders");
    let from = run.folder.join("checkpoints").join(name);
    std::fs::rename(&from, &free).map_err(|error| Error::io(&from, "move aside", error))
}

fn record(run: &Run, manifest: &Manifest) -> Result<()> {
    let known = run.store.checkpoints();
    // A run that went on from an older checkpoint takes the same one again.
    let old = known.iter().find(|record| record.name == manifest.name);
    let number = old.map_or_else(|| known.last().map_or(0, |last| last.number + 1), |old| old.number);
    let pinned = old.is_some_and(|old| old.pinned);
    run.store.put_checkpoint(CheckpointRecord { pinned, ..super::rebuild::adopted(manifest, number) })
}

/// Takes a checkpoint at the boundary of the loop `path` behind `step` iterations; its files are written while the run goes on.
///
/// - `metrics`: what the loop logged last
///
/// Errors: those of the one before it; what cannot be copied.
pub fn at_boundary(lua: &Lua, run: &Arc<Run>, path: &str, step: u64, metrics: Map<String, Json>, keep: &Keep) -> Failed<()> {
    run.checkpoints.wait()?;
    if !has_room_for_copy(bytes_to_copy(run)) {
        // A copy would end the process. The run waits, and its state is written from where it lies.
        let snapshot = Snapshot::take(lua, run, (path, step), None, metrics, ImageTo::InPlace)?;
        return Ok(commit(run, &snapshot, keep)?);
    }
    let snapshot = Snapshot::take(lua, run, (path, step), None, metrics, ImageTo::SpareRoom)?;
    let (run_there, keep) = (run.clone(), keep.clone());
    let write = move || commit(&run_there, &snapshot, &keep);
    let writer = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
    let writer = writer.map_err(|error| Error::io(&run.folder, "start a thread to write to", error))?;
    *run.checkpoints.writer.lock().expect("no panic happens under this lock") = Some(writer);
    Ok(())
}

/// Bytes of the host that a copy of all that changes takes, tables left out. A bf16 weight that trains has its remainder beside it.
fn bytes_to_copy(run: &Run) -> u64 {
    let bytes = |resource: &Resource| match resource {
        Resource::Model(object) if object.gpu().is_none() => 4 * object.model.trainable() as u64,
        Resource::Optimizer(optimizer, _) => optimizer.lock().adamw.moments_bytes_on_host(),
        _ => 0,
    };
    run.resources.all().iter().map(|(_, named)| bytes(&named.resource)).sum()
}

/// Takes a checkpoint at the end of a step that changed resources outside of any loop, and waits for it.
///
/// Errors: as [`at_boundary`].
pub fn after_step(lua: &Lua, run: &Arc<Run>, step: &StepRecord) -> Failed<()> {
    run.checkpoints.wait()?;
    // It is waited for, so that nothing changes meanwhile.
    let snapshot = Snapshot::take(lua, run, (&format!("step {}", step.key), 0), Some(step), Map::new(), ImageTo::InPlace)?;
    Ok(commit(run, &snapshot, &KEEP_STEPS)?)
}

/// Of the checkpoints that steps took.
const KEEP_STEPS: Keep = Keep { last: 2, every: None, best: None };

fn commit(run: &Run, snapshot: &Snapshot, keep: &Keep) -> Result<()> {
    run.sync_logs()?;
    run.store.flush()?;
    let write = || snapshot.write(&run.checkpoints.root);
    let manifest = snapshot.marks.as_ref().map_or_else(write, |marks| marks.work_behind(write))?;
    record(run, &manifest)?;
    // Only now: until the new one is safe, the old ones are.
    let listed = list(&run.checkpoints.root)?;
    let records = run.store.checkpoints();
    let candidate = |(name, manifest): (String, Result<Manifest>)| {
        let manifest = manifest.ok()?;
        let pinned = records.iter().any(|record| record.name == name && record.pinned);
        Some(Candidate { name, loop_path: manifest.loop_path, step: manifest.step, metrics: manifest.metrics, pinned })
    };
    let candidates: Vec<Candidate> = listed.into_iter().filter_map(candidate).collect();
    for name in outlived(candidates, &snapshot.position.0, keep) {
        remove(&run.checkpoints.root, &name)?;
        for gone in records.iter().filter(|record| record.name == name) {
            run.store.remove_checkpoint(gone.number)?;
        }
    }
    Ok(())
}

/// The checkpoints that may go when the loop `path` has taken one. What another loop keeps is for that loop to say; all that
/// steps took count as those of one loop, since each step takes but one.
fn outlived(candidates: Vec<Candidate>, path: &str, keep: &Keep) -> Vec<String> {
    // Names of loops have no number.
    let is_step = |checkpoint: &Candidate| checkpoint.loop_path.rsplit('/').next().is_some_and(|name| name.contains('#'));
    let (mut steps, loops): (Vec<_>, Vec<_>) = candidates.into_iter().partition(is_step);
    steps.iter_mut().for_each(|step| step.loop_path = "steps".into());
    let of_loop: Vec<_> = loops.into_iter().filter(|checkpoint| checkpoint.loop_path == path).collect();
    [removable(&steps, &KEEP_STEPS), removable(&of_loop, keep)].concat()
}

/// The script has come to where the checkpoint was taken: everything takes its state from there, and new things begin.
///
/// Errors: those of reading the checkpoint.
pub fn arrive(lua: &Lua, run: &Arc<Run>, replay: &Replay) -> Failed<()> {
    let origin = run.checkpoints.origin().expect("a replay goes to a checkpoint");
    for (name, named) in run.resources.all() {
        origin.restore(&name, &named.resource)?;
    }
    for (name, optimizer, _) in run.resources.optimizers() {
        if let Some(asked) = replay.asked(&name) {
            optimizer.take_asked(asked)?;
        }
    }
    let mut contents = BTreeMap::new();
    for (name, json) in &origin.state.states {
        let folder = origin.folder.join("states").join(name);
        let tensors = if folder.is_dir() { results::read_tensors(&folder)? } else { Vec::new() };
        contents.insert(name.clone(), Plain { json: json.clone(), tensors });
    }
    run.states.set(contents);
    states::fill_asked(lua, &run.states)?;
    set_random_position(lua, &origin.state.random);
    replay.arrive();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_keep_their_own_and_steps_the_last_two() {
        let candidate = |loop_path: &str, step: u64| Candidate {
            name: format!("{loop_path}-{step}"),
            loop_path: loop_path.into(),
            step,
            metrics: Map::new(),
            pinned: false,
        };
        let mut all: Vec<_> = [10, 20, 30].map(|step| candidate("sft", step)).into();
        all.extend(["step a#0", "step b#0/b#1", "step c#0"].map(|path| candidate(path, 0)));
        all.extend([5, 10].map(|step| candidate("step d#0/dpo", step)));
        let keep = Keep { last: 1, every: Some(20), best: None };
        assert_eq!(outlived(all.clone(), "step d#0/dpo", &keep), ["step a#0-0", "step d#0/dpo-5"]);
        assert_eq!(outlived(all.clone(), "sft", &keep), ["step a#0-0", "sft-10"]);
        assert_eq!(outlived(all, "step c#0", &KEEP_STEPS), ["step a#0-0"]);
    }
}
