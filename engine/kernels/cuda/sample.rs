//! Launchers of sample.cu: the next token of rows of logits, as `infer/sampler.rs` chooses it where no rule filters them: the most
//! likely one, or a draw by weight; changes of single logits before that; and, where a rule filters, the tokens that it may keep. All
//! have the host's bits, so it does not matter where a choice was made.

use super::device::Device;
use super::launch::Launch;
use super::memory::{DeviceBuffer, View, ViewMut};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::cpu::likelihood::BLOCK;
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// How one token is chosen; `Draw` of sample.cu.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Draw {
    /// The random number, in [0, 1).
    pub uniform: f64,
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// The row of logits; several may choose from one.
    pub row: i32,
}

/// What rules do to the logit of one token, in this order; `Change` of sample.cu. Each step rounds to f32.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Change {
    bias: f64,
    repetition: f64,
    presence: f64,
    frequency: f64,
    pub id: i32,
    row: i32,
    kinds: i32,
    unused: i32,
}

impl Change {
    /// Of token `id`, without effect.
    pub fn of(id: i32) -> Self {
        Self { id, ..Self::zeroed() }
    }

    /// The same in that row.
    pub fn in_row(self, row: usize) -> Self {
        Self { row: row as i32, ..self }
    }

    /// Adds `bias`.
    pub fn add(&mut self, bias: f64) {
        (self.bias, self.kinds) = (self.bias + bias, self.kinds | 1);
    }

    /// Divides by `penalty` where positive, multiplies where not.
    pub fn divide(&mut self, penalty: f64) {
        (self.repetition, self.kinds) = (penalty, self.kinds | 2);
    }

    /// Takes both away.
    pub fn take(&mut self, presence: f64, frequency: f64) {
        (self.presence, self.frequency, self.kinds) = (presence, frequency, self.kinds | 4);
    }

    /// The logit afterwards: the bits of `change` of sample.cu.
    pub fn applied(&self, logit: f32) -> f32 {
        let mut logit = logit;
        if self.kinds & 1 != 0 {
            logit = (f64::from(logit) + self.bias) as f32;
        }
        if self.kinds & 2 != 0 {
            let wide = f64::from(logit);
            logit = if wide > 0.0 { wide / self.repetition } else { wide * self.repetition } as f32;
        }
        if self.kinds & 4 != 0 {
            logit = (f64::from(logit) - self.presence - self.frequency) as f32;
        }
        logit
    }
}

/// Changes logits in place.
///
/// - `logits`: `[rows, stride]`
/// - `changes`: of rows and ids that there are, no two of one logit
pub fn change(device: &Arc<Device>, mut logits: ViewMut<f32>, stride: usize, changes: &[Change]) -> Result<()> {
    let op = "sample";
    let fits = |change: &Change| (0..stride as i32).contains(&change.id) && (change.row as usize) < logits.len() / stride;
    assert!(changes.iter().all(fits), "sample: {changes:?} of rows of {stride}");
    if changes.is_empty() {
        return Ok(());
    }
    let changes = DeviceBuffer::copy_of(device, op, changes)?;
    let launch = Launch::new(device, op, Variant::of::<f32>(Program::Sample), "change")?;
    let launch = launch.write(&mut logits).int(stride).read(changes.view()).int(changes.len());
    // SAFETY: the arguments are change's. A thread changes one logit, whose row and id were looked at above, and no other thread does.
    unsafe { launch.run((changes.len().div_ceil(128), 1, 1), 128, 0) }
}

/// Bins of sample.cu: the last holds all weights below the least power of two.
const BINS: usize = 32;
/// Most likely tokens of a draw, as in sample.cu.
const LIKELY: usize = 2048;
/// Words of the result of a draw.
const WORDS: usize = 4 + 2 * LIKELY;

/// The most likely tokens behind a row of logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Likely {
    /// Weights, relative to the most likely token's, and ids, by rising id.
    pub tokens: Vec<(f32, u32)>,
    /// The sum of all weights.
    pub total: f64,
    /// Every token that is not there weighs less than this; 0 if only those without weight are not there.
    pub floor: f32,
}

/// The most likely tokens of each draw, whose temperature is above 0: as many as fit, by powers of two of their weights. None for
/// a draw that has too many alike, and where a logit is NaN or infinite, or all are minus infinity. Waits for the device.
///
/// - arguments as in [`sample`]
pub fn likely(device: &Arc<Device>, logits: View<f32>, sizes: (usize, usize), draws: &[Draw]) -> Result<Vec<Option<Likely>>> {
    assert!(draws.iter().all(|draw| draw.temperature > 0.0), "sample: filters of a greedy choice");
    let Some(surveyed) = Surveyed::of(device, logits, sizes, draws)? else { return Ok(Vec::new()) };
    let ((stride, vocab), op, count, blocks) = (sizes, "sample", draws.len(), surveyed.blocks);
    let mut bins = DeviceBuffer::<i32>::scratch(device, op, count * blocks * BINS)?;
    let mut starts = DeviceBuffer::<i32>::scratch(device, op, count * blocks)?;
    let mut found = DeviceBuffer::<i32>::scratch(device, op, count * WORDS)?;
    let new = |name| Launch::new(device, op, Variant::of::<f32>(Program::Sample), name);
    let launch = new("sort_in")?.read(logits).int(stride).int(vocab).read(surveyed.draws.view()).read(surveyed.maxima.view());
    let launch = launch.write(&mut bins.view_mut());
    // SAFETY: the arguments are sort_in's. A block reads its part of a row that there is and writes its own bins.
    unsafe { launch.run((blocks, count, 1), 32, 0)? };
    let launch = new("pick_bin")?.read(surveyed.maxima.view()).read(surveyed.sums.view()).read(bins.view()).int(blocks);
    let launch = launch.write(&mut starts.view_mut()).write(&mut found.view_mut());
    // SAFETY: the arguments are pick_bin's. A block stays with its draw's bins, starts and result.
    unsafe { launch.run((count, 1, 1), 32, 0)? };
    let launch = new("gather")?.read(logits).int(stride).int(vocab).read(surveyed.draws.view()).read(surveyed.maxima.view());
    let launch = launch.read(starts.view()).write(&mut found.view_mut());
    // SAFETY: the arguments are gather's. A block writes as many tokens as it has in the picked bins from its start on: in all at most
    // `LIKELY`.
    unsafe { launch.run((blocks, count, 1), 32, 0)? };
    Ok(found.to_vec()?.chunks_exact(WORDS).map(Likely::read).collect())
}

impl Likely {
    fn read(words: &[i32]) -> Option<Self> {
        let (bin, count) = (words[0], words[1] as usize);
        let bits = |word: i32| u64::from(word.cast_unsigned());
        let (ids, weights) = words[4..].split_at(LIKELY);
        let tokens = weights[..count].iter().zip(ids).map(|(weight, id)| (f32::from_bits(weight.cast_unsigned()), *id as u32)).collect();
        let floor = if bin as usize == BINS - 1 { 0.0 } else { 0.5f32.powi(bin) };
        (bin >= 0).then(|| Self { tokens, total: f64::from_bits(bits(words[2]) | bits(words[3]) << 32), floor })
    }
}

/// What is known of all of a draw's row.
struct Surveyed {
    draws: DeviceBuffer<Draw>,
    /// Of each block of the row: `[draws, blocks]`.
    maxima: DeviceBuffer<f32>,
    sums: DeviceBuffer<f64>,
    blocks: usize,
}

impl Surveyed {
    /// None without draws. Arguments as in [`sample`].
    fn of(device: &Arc<Device>, logits: View<f32>, (stride, vocab): (usize, usize), draws: &[Draw]) -> Result<Option<Self>> {
        let (op, count) = ("sample", draws.len());
        assert!(
            0 < vocab && vocab <= stride && logits.len().is_multiple_of(stride),
            "sample: {} logits, {vocab} of {stride}",
            logits.len()
        );
        // The kernels find first places as whole numbers in f32.
        assert!(vocab < 1 << 24, "sample: a vocabulary of {vocab}");
        let fits =
            |draw: &Draw| (0.0..1.0).contains(&draw.uniform) && draw.temperature >= 0.0 && (draw.row as usize) < logits.len() / stride;
        assert!(draws.iter().all(fits), "sample: {draws:?}");
        if count == 0 {
            return Ok(None);
        }
        let blocks = vocab.div_ceil(BLOCK);
        let draws = DeviceBuffer::copy_of(device, op, draws)?;
        let mut maxima = DeviceBuffer::<f32>::scratch(device, op, count * blocks)?;
        let mut sums = DeviceBuffer::<f64>::scratch(device, op, count * blocks)?;
        let new = |name| Launch::new(device, op, Variant::of::<f32>(Program::Sample), name);
        let launch = new("survey")?.read(logits).int(stride).int(vocab).read(draws.view()).write(&mut maxima.view_mut());
        // SAFETY: the arguments are survey's. A block reads its part of a row that there is and writes its maximum.
        unsafe { launch.run((blocks, count, 1), 256, 0)? };
        let launch = new("weigh")?.read(logits).int(stride).int(vocab).read(draws.view()).read(maxima.view());
        let launch = launch.write(&mut sums.view_mut());
        // SAFETY: the arguments are weigh's. As above, and it reads the maxima of its row.
        unsafe { launch.run((blocks, count, 1), 32, 0)? };
        Ok(Some(Self { draws, maxima, sums, blocks }))
    }
}

/// Chooses a token for each draw.
///
/// - `logits`: `[rows, stride]`, f32, of which the first `vocab` of a row may be chosen
/// - `tokens`: `[draws]`; -1 where a logit is NaN or infinite, or all are minus infinity
pub fn sample(
    device: &Arc<Device>,
    logits: View<f32>,
    (stride, vocab): (usize, usize),
    draws: &[Draw],
    mut tokens: ViewMut<i32>,
) -> Result<()> {
    let (op, count) = ("sample", draws.len());
    assert!(tokens.len() == count, "sample: {} tokens for {count} draws", tokens.len());
    let Some(Surveyed { draws, maxima, sums, blocks }) = Surveyed::of(device, logits, (stride, vocab), draws)? else { return Ok(()) };
    let launch = Launch::new(device, op, Variant::of::<f32>(Program::Sample), "choose")?.read(logits).int(stride).int(vocab);
    let launch = launch.read(draws.view()).read(maxima.view()).read(sums.view()).int(blocks).write(&mut tokens);
    // SAFETY: the arguments are choose's. A block stays in its row and writes the token of its draw; it reads no sums of a greedy
    // draw, which has none.
    unsafe { launch.run((count, 1, 1), 256, 0) }
}
