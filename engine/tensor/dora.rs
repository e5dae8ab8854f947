//! DoRA: the sum of a weight and its low-rank part, each row scaled to a length that is learnt:
//! `W' = m (W + scale * B A) / |W + scale * B A|`, with a length for each output. As in the paper (section 4.3) and in PEFT, the
//! lengths that are divided by are constants to derivatives. They are kept until a weight or a factor changes: generation reads
//! them, and asks for no pass over the weights.
//! Source: Liu et al., arXiv 2402.09353, equations 5 and 11; PEFT 0.18, `DoraLinearLayer`.

use super::ModelElement;
use super::cuda::dora as cuda;
use super::low_rank::LowRank;
use super::parameter::Parameter;
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::norm;
use crate::kernels::cpu::threads::{parallel, threads};
use crate::kernels::element::Float;
use std::sync::{Arc, Mutex};

/// Values of a block while lengths of rows are computed, and below which a thread of its own costs more than it saves.
const BLOCK_VALUES: usize = 1 << 16;

/// The lengths that the rows of an adapted weight have.
pub struct Magnitude<E: ModelElement> {
    /// `[rows]`; read with what completes bf16 to f32, since a rounded length would scale all of its row.
    pub lengths: Arc<Parameter<E>>,
    known: Mutex<Option<Known>>,
    /// The same of a weight on a device.
    pub(super) on_device: Mutex<Option<cuda::Known>>,
}

/// Lengths that were computed.
struct Known {
    /// Of the weight and of both factors.
    versions: [u64; 3],
    norms: Arc<[f32]>,
}

impl<E: ModelElement> Magnitude<E> {
    pub fn new(lengths: Arc<Parameter<E>>) -> Self {
        Self { lengths, known: Mutex::new(None), on_device: Mutex::new(None) }
    }

    /// One of its own with a copy of its parameter. Errors: those of `copy`.
    pub(super) fn copy_with(&self, copy: &impl Fn(&Parameter<E>) -> Result<Parameter<E>>) -> Result<Self> {
        Ok(Self::new(Arc::new(copy(&self.lengths)?)))
    }

    /// Sets the lengths to those that the rows have, as training begins. Errors: those of reading and writing.
    pub fn begin(&self, weight: &Parameter<E>, part: &LowRank<E>) -> Result<()> {
        let norms = self.norms(weight, part)?;
        self.lengths.write_rows(0..norms.len(), &norms, E::HAS_REMAINDER)
    }

    /// The length of each row of `weight` with `part`, whose magnitude this is, before it is scaled. Computed on the host.
    ///
    /// Errors: those of the device that they lie on.
    pub(super) fn norms(&self, weight: &Parameter<E>, part: &LowRank<E>) -> Result<Arc<[f32]>> {
        let versions = [weight.version(), part.a.version(), part.b.version()];
        let mut known = self.known.lock().expect("nothing panics while lengths are computed");
        if let Some(known) = known.as_ref().filter(|known| known.versions == versions) {
            return Ok(known.norms.clone());
        }
        let inputs = weight.columns();
        let mut norms = vec![0.0; part.stack.count * part.rows.len()];
        let size = (BLOCK_VALUES / inputs.max(1)).next_multiple_of(32);
        // Rows of the parameter, and their lengths.
        let mut blocks = Vec::new();
        for (index, norms) in norms.chunks_exact_mut(part.rows.len()).enumerate() {
            let first = index * part.stack.rows + part.rows.start;
            let pieces = norms.chunks_mut(size).enumerate();
            blocks.extend(pieces.map(|(block, norms)| (first + block * size, Mutex::new((norms, Ok(()))))));
        }
        parallel(blocks.len(), |block| {
            let (first, block) = &blocks[block];
            let mut guard = block.lock().expect("each block has one task");
            let (norms, outcome): &mut (&mut [f32], Result<()>) = &mut guard;
            let rows = *first..*first + norms.len();
            let mut values = Buffer::<f32>::scratch(rows.len() * inputs);
            *outcome = weight.read_rows(rows.clone(), &mut values).and_then(|()| part.add_product_to_rows(&rows, &mut values));
            row_norms(&values, inputs, norms);
        });
        blocks.into_iter().try_for_each(|(_, block)| block.into_inner().expect("each block had one task").1)?;
        let norms: Arc<[f32]> = norms.into();
        *known = Some(Known { versions, norms: norms.clone() });
        Ok(norms)
    }

    /// Scales `values`, rows of the weight with their low-rank part, from row `first` of the part on.
    ///
    /// Errors: those of the device.
    pub(super) fn scale_rows(&self, first: usize, values: &mut [f32], inputs: usize) -> Result<()> {
        let count = values.len() / inputs;
        let (mut norms, mut lengths) = (vec![0.0; count], vec![0.0; count]);
        row_norms(values, inputs, &mut norms);
        self.lengths.read_rows(first..first + count, &mut lengths)?;
        for ((row, norm), length) in values.chunks_exact_mut(inputs).zip(norms).zip(lengths) {
            norm::scale(row, gain(length, norm));
        }
        Ok(())
    }
}

fn row_norms(values: &[f32], inputs: usize, norms: &mut [f32]) {
    for (row, length) in values.chunks_exact(inputs).zip(norms) {
        *length = norm::sum_of_squares(&[row]).sqrt() as f32;
    }
}

/// What a row is multiplied by. One of zeros stays so.
fn gain(length: f32, norm: f32) -> f32 {
    if norm > 0.0 { length / norm } else { 0.0 }
}

/// A part whose outputs are scaled.
struct Scaled<E: ModelElement> {
    magnitude: Arc<Magnitude<E>>,
    /// Its first output.
    first: usize,
    /// What was divided by.
    norms: Arc<[f32]>,
}

/// The scaling of one product's outputs, with what its backward pass needs.
pub(super) struct Scaling<E: ModelElement> {
    /// `[out]`; 1 for outputs without a part.
    gains: Vec<f32>,
    parts: Vec<Scaled<E>>,
    /// `[tokens, out]`, what was scaled; none if no length trains.
    saved: Option<Buffer<E>>,
}

impl<E: ModelElement> Scaling<E> {
    /// That of `weight`; none if no part has a magnitude.
    pub fn of(weight: &Parameter<E>, parts: &[LowRank<E>]) -> Option<Self> {
        let magnitudes = parts.iter().filter_map(|part| part.magnitude.as_ref().map(|magnitude| (part, magnitude)));
        let (mut gains, mut scaled) = (vec![1.0; weight.rows()], Vec::new());
        for (part, magnitude) in magnitudes {
            let norms = magnitude.norms(weight, part).expect(ON_HOST);
            let mut lengths = vec![0.0; norms.len()];
            magnitude.lengths.read_rows(0..norms.len(), &mut lengths).expect(ON_HOST);
            let all = gains[part.rows.clone()].iter_mut().zip(lengths).zip(norms.iter());
            all.for_each(|((to, length), norm)| *to = gain(length, *norm));
            scaled.push(Scaled { magnitude: magnitude.clone(), first: part.rows.start, norms });
        }
        (!scaled.is_empty()).then_some(Self { gains, parts: scaled, saved: None })
    }

    /// `y = gains * sums (+ bias) (+ residual)`, rounded once.
    ///
    /// - `sums`: `[tokens, out]`, of weight and low-rank parts; kept, as elements, if `keeps`
    pub fn forward<O: Float>(&mut self, sums: &[f32], bias: Option<&[E]>, residual: Option<&[O]>, y: &mut [O], keeps: bool) {
        let width = self.gains.len();
        for_rows(y, width, |row, y| {
            let range = row * width..(row + 1) * width;
            let mut values: Vec<f32> = sums[range.clone()].iter().zip(&self.gains).map(|(sum, gain)| sum * gain).collect();
            if let Some(bias) = bias {
                values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias.to_f32());
            }
            if let Some(residual) = residual {
                values.iter_mut().zip(&residual[range]).for_each(|(value, residual)| *value += residual.to_f32());
            }
            y.iter_mut().zip(&values).for_each(|(y, value)| *y = O::from_f32(*value));
        });
        if keeps && self.parts.iter().any(|part| part.magnitude.lengths.trains()) {
            let mut saved = Buffer::<E>::scratch(sums.len());
            norm::convert(sums, &mut saved);
            self.saved = Some(saved);
        }
    }

    /// Adds the gradients of the lengths that train, and gives that of what was scaled.
    ///
    /// - `dy`: `[tokens, out]`
    pub fn backward(&self, dy: &[E]) -> Buffer<E> {
        let width = self.gains.len();
        let mut d_sums = Buffer::<E>::scratch(dy.len());
        for_rows(&mut d_sums, width, |row, d_sums| {
            let dy = &dy[row * width..(row + 1) * width];
            d_sums.iter_mut().zip(dy).zip(&self.gains).for_each(|((to, dy), gain)| *to = E::from_f32(dy.to_f32() * gain));
        });
        if let Some(saved) = &self.saved {
            let mut products = Buffer::<f32>::scratch(dy.len());
            for_rows(&mut products, width, |row, products| {
                let range = row * width..(row + 1) * width;
                let pairs = dy[range.clone()].iter().zip(&saved[range]);
                products.iter_mut().zip(pairs).for_each(|(to, (dy, sum))| *to = dy.to_f32() * sum.to_f32());
            });
            let mut sums = vec![0.0; width];
            norm::add_column_sums(&products, &mut sums);
            for Scaled { magnitude, first, norms } in &self.parts {
                magnitude.lengths.accumulate(|gradient, add| {
                    for ((to, sum), norm) in gradient.iter_mut().zip(&sums[*first..]).zip(norms.iter()) {
                        *to = if add { *to } else { 0.0 } + gain(*sum, *norm);
                    }
                });
            }
        }
        d_sums
    }
}

const ON_HOST: &str = "weights on the host are read without a device";

/// Runs `run` for each row of `values` `[rows, width]`, on all threads.
fn for_rows<T: Send>(values: &mut [T], width: usize, run: impl Fn(usize, &mut [T]) + Sync) {
    let rows = values.len() / width;
    let tasks = (values.len() / BLOCK_VALUES).clamp(1, 4 * threads());
    let size = rows.div_ceil(tasks).max(1);
    let parts: Vec<Mutex<&mut [T]>> = values.chunks_mut(size * width).map(Mutex::new).collect();
    parallel(parts.len(), |task| {
        let mut part = parts[task].lock().expect("each part has one task");
        part.chunks_exact_mut(width).enumerate().for_each(|(row, values)| run(task * size + row, values));
    });
}
