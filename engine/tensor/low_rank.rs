//! Low-rank parts of a weight: `W + scale * B A` on some of its rows, with W frozen as a rule. A parameter carries its own
//! parts (parameter.rs), and every operation that multiplies by the parameter adds them, so that no graph knows of them.
//! Both factors go through the packed products, whose sums run over their own reduction alone: a row is the same in any batch.
//! With DoRA (dora.rs) the rows are then scaled to lengths that are learnt.
//! Source: Hu et al., LoRA, arXiv 2106.09685; initialisation and scale are those of PEFT.

use super::ModelElement;
use super::autograd::is_recording;
use super::dora::{Magnitude, Scaling};
use super::parameter::Parameter;
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::{gemm, low_rank};
use crate::kernels::element::Float;
use std::ops::Range;
use std::sync::Arc;

/// How many weights a parameter holds, one after the other: itself alone, or on a device the experts of a layer. Their low-rank
/// parts lie one after the other too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stack {
    pub count: usize,
    /// Rows of each.
    pub rows: usize,
}

impl Stack {
    /// Of `count` weights in `parameter`.
    pub fn of<E: ModelElement>(parameter: &Parameter<E>, count: usize) -> Self {
        Self { count, rows: parameter.rows() / count }
    }

    /// Which weight `rows` of the parameter belong to, and which of its rows they are.
    pub fn place(&self, rows: &Range<usize>) -> (usize, Range<usize>) {
        let index = rows.start / self.rows;
        (index, rows.start - index * self.rows..rows.end - index * self.rows)
    }
}

/// A low-rank part of a weight `[out, in]`, or one of each weight of a stack.
#[derive(Clone)]
pub struct LowRank<E: ModelElement> {
    pub stack: Stack,
    /// The rows of a weight that it belongs to.
    pub rows: Range<usize>,
    /// `[rank, in]` in panels, for each weight
    pub a: Arc<Parameter<E>>,
    /// `[rows, rank]` in panels, for each weight
    pub b: Arc<Parameter<E>>,
    pub scale: f32,
    /// With DoRA: the lengths of the adapted rows.
    pub magnitude: Option<Arc<Magnitude<E>>>,
}

impl<E: ModelElement> LowRank<E> {
    pub fn rank(&self) -> usize {
        self.a.rows() / self.stack.count
    }

    /// Its parameters: both factors, and the lengths of rows if it has them.
    pub fn parameters(&self) -> impl Iterator<Item = &Arc<Parameter<E>>> {
        [&self.a, &self.b].into_iter().chain(self.magnitude.iter().map(|magnitude| &magnitude.lengths))
    }

    /// Whether one of its parameters trains.
    pub fn trains(&self) -> bool {
        self.parameters().any(|parameter| parameter.trains())
    }

    /// A part of its own with copies of its parameters.
    ///
    /// Errors: those of `copy`.
    pub(super) fn copy_with(&self, copy: &impl Fn(&Parameter<E>) -> Result<Parameter<E>>) -> Result<Self> {
        let magnitude = self.magnitude.as_ref().map(|magnitude| magnitude.copy_with(copy).map(Arc::new)).transpose()?;
        Ok(Self { a: Arc::new(copy(&self.a)?), b: Arc::new(copy(&self.b)?), magnitude, ..self.clone() })
    }

    /// Makes `values`, `rows` of the parameter, row-major, those with this part: in f32, from the masters of both factors.
    ///
    /// Errors: those of the device that they lie on.
    pub(super) fn apply_to_rows(&self, rows: &Range<usize>, values: &mut [f32]) -> Result<()> {
        self.add_product_to_rows(rows, values)?;
        let Some(magnitude) = &self.magnitude else { return Ok(()) };
        let inputs = self.a.columns();
        self.common(rows).try_for_each(|(first, common)| {
            let values = &mut values[(common.start - rows.start) * inputs..(common.end - rows.start) * inputs];
            magnitude.scale_rows(first, values, inputs)
        })
    }

    /// Which of `rows` are its own, those of each weight by itself, and the first row of `b` among them.
    fn common(&self, rows: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<E> {
        let (rows, own, stack) = (rows.clone(), self.rows.clone(), self.stack);
        let touched = rows.start / stack.rows..rows.end.div_ceil(stack.rows);
        touched.filter_map(move |index| {
            let first = index * stack.rows + own.start;
            let common = rows.start.max(first)..rows.end.min(first + own.len());
            (!common.is_empty()).then(|| (index * own.len() + common.start - first, common))
        })
    }

    /// Adds the product of its factors to `values`, as [`LowRank::apply_to_rows`] does.
    pub(super) fn add_product_to_rows(&self, rows: &Range<usize>, values: &mut [f32]) -> Result<()> {
        let (rank, inputs) = (self.rank(), self.a.columns());
        self.common(rows).try_for_each(|(first, common)| {
            let index = first / self.rows.len();
            let (mut a, mut b) = (Buffer::<f32>::scratch(rank * inputs), Buffer::<f32>::scratch(common.len() * rank));
            self.a.read_rows(index * rank..(index + 1) * rank, &mut a)?;
            self.b.read_rows(first..first + common.len(), &mut b)?;
            let values = &mut values[(common.start - rows.start) * inputs..(common.end - rows.start) * inputs];
            low_rank::add_product(values, &a, &b, rank, self.scale);
            Ok(())
        })
    }
}

/// The low-rank parts of one product, with what their backward pass needs.
pub(super) struct Applied<E: ModelElement> {
    parts: Arc<[LowRank<E>]>,
    width: usize,
    /// `A x` of each part, `[tokens, rank]`.
    inner: Vec<Buffer<E>>,
    scaling: Option<Scaling<E>>,
    versions: Vec<u64>,
}

impl<E: ModelElement> Applied<E> {
    /// `y = x W'ᵀ (+ bias) (+ residual)` with the low-rank parts of `weight`.
    ///
    /// - `y`: `[tokens, out]`; `bias`: `[out]`; `residual`: `[tokens, out]`
    /// - `x`: `[tokens, in]`; with `choice`, token `i` uses row `choice[i]`
    pub fn product<O: Float>(
        weight: &Parameter<E>,
        y: &mut [O],
        x: &[E],
        choice: Option<&[u32]>,
        bias: Option<&[E]>,
        residual: Option<&[O]>,
    ) -> Self {
        let (parts, width) = (weight.adapters(), weight.rows());
        let mut scaling = Scaling::of(weight, &parts);
        let inner = match &mut scaling {
            None => {
                weight.multiply(&mut *y, x, choice, bias, residual);
                add_parts(&parts, width, y, x, choice)
            }
            Some(scaling) => {
                let mut sums = Buffer::<f32>::scratch(y.len());
                weight.multiply(&mut sums[..], x, choice, None, None);
                let inner = add_parts(&parts, width, &mut sums, x, choice);
                scaling.forward(&sums, bias, residual, y, is_recording());
                inner
            }
        };
        let versions = parts.iter().flat_map(LowRank::parameters).map(|parameter| parameter.version()).collect();
        Self { parts, width, inner, scaling, versions }
    }

    /// Whether a parameter of a part trains.
    pub fn trains(&self) -> bool {
        self.parts.iter().any(LowRank::trains)
    }

    /// Errors: as [`Parameter::check_version`], for every parameter.
    pub fn check_versions(&self, op: &'static str) -> Result<()> {
        let parameters = self.parts.iter().flat_map(LowRank::parameters);
        parameters.zip(&self.versions).try_for_each(|(parameter, seen)| parameter.check_version(*seen, op))
    }

    /// With DoRA: adds the gradients of the lengths of rows, and gives that of what they scale, which everything but the bias and
    /// the residual then takes in place of `dy` `[tokens, out]`.
    pub fn unscaled(&self, dy: &[E]) -> Option<Buffer<E>> {
        self.scaling.as_ref().map(|scaling| scaling.backward(dy))
    }

    /// Adds the gradients of the factors that train, and gives those of `A x`, from which that of x follows.
    ///
    /// - `dy`: `[tokens, out]`, as [`Applied::unscaled`] gives it; `x` and `choice` as in [`Applied::product`]; x may be empty if
    ///   no factor trains
    pub fn factor_gradients(&self, dy: &[E], x: &[E], choice: Option<&[u32]>) -> Vec<Buffer<E>> {
        let tokens = dy.len() / self.width;
        let backward = |(part, inner): (&LowRank<E>, &Buffer<E>)| {
            let (rank, outputs) = (part.rank(), part.rows.len());
            let mut d_delta = Buffer::<E>::scratch(tokens * outputs);
            low_rank::take_columns(dy, self.width, part.rows.clone(), part.scale, &mut d_delta);
            part.b.accumulate(|gradient, add| gemm::weight_gradient(gradient, &d_delta, inner, None, outputs, rank, add));
            let mut d_inner = Buffer::<E>::scratch(tokens * rank);
            gemm::input_gradient(&mut d_inner[..], &d_delta, part.b.product_weight(&part.b.read()), false);
            part.a.accumulate(|gradient, add| gemm::weight_gradient(gradient, &d_inner, x, choice, rank, part.a.columns(), add));
            d_inner
        };
        self.parts.iter().zip(&self.inner).map(backward).collect()
    }

    /// Adds to `dx` `[tokens, in]` what flows back through the factors, given [`Applied::factor_gradients`].
    pub fn add_input_gradient(&self, d_inner: &[Buffer<E>], dx: &mut [E]) {
        for (part, d_inner) in self.parts.iter().zip(d_inner) {
            gemm::input_gradient(dx, d_inner, part.a.product_weight(&part.a.read()), true);
        }
    }
}

/// Adds the low-rank parts to the product `y` `[tokens, width]`; gives `A x` of each, `[tokens, rank]`.
fn add_parts<E: ModelElement, O: Float>(
    parts: &[LowRank<E>],
    width: usize,
    y: &mut [O],
    x: &[E],
    choice: Option<&[u32]>,
) -> Vec<Buffer<E>> {
    let tokens = y.len() / width;
    let add = |part: &LowRank<E>| {
        let mut inner = Buffer::<E>::scratch(tokens * part.rank());
        part.a.multiply(&mut inner[..], x, choice, None, None);
        let mut delta = Buffer::<f32>::scratch(tokens * part.rows.len());
        part.b.multiply(&mut delta, &inner, None, None, None);
        low_rank::add_columns(y, width, part.rows.clone(), &delta, part.scale);
        inner
    };
    parts.iter().map(add).collect()
}

#[cfg(test)]
mod tests {
    use super::super::parameter::Layout;
    use super::super::typed::Tensor;
    use super::*;
    use crate::tensor::linear::{linear, norm_linear, swiglu_linear};
    use half::bf16;

    fn filled<E: ModelElement>(name: &str, rows: usize, columns: usize, seed: usize) -> Arc<Parameter<E>> {
        let parameter = Parameter::zeros(name, rows, columns, if columns == 1 { Layout::Rows } else { Layout::Panels });
        let values: Vec<f32> = (0..rows * columns).map(|i| ((i * 37 + seed * 11) % 23) as f32 / 16.0 - 0.6).collect();
        parameter.write_rows(0..rows, &values, false).unwrap();
        Arc::new(parameter)
    }

    /// A frozen weight `[out, in]` with parts on its first rows and on its last.
    fn adapted<E: ModelElement>(out: usize, input: usize, split: usize, dora: bool) -> Arc<Parameter<E>> {
        let weight = filled::<E>("w", out, input, 1);
        weight.set_trains(false);
        let part = |rows: Range<usize>, rank: usize, seed: usize| LowRank {
            stack: Stack::of(&weight, 1),
            a: filled("a", rank, input, seed),
            b: filled("b", rows.len(), rank, seed + 1),
            magnitude: dora.then(|| Arc::new(Magnitude::new(filled("m", rows.len(), 1, seed + 2)))),
            rows,
            scale: 0.5,
        };
        weight.set_adapters(vec![part(0..split, 3, 2), part(split..out, 2, 4)]);
        weight
    }

    fn input<E: ModelElement>(tokens: usize, columns: usize) -> Tensor<E, 2> {
        let values: Vec<E> = (0..tokens * columns).map(|i| E::from_f32(((i * 29) % 31) as f32 / 16.0 - 0.9)).collect();
        Tensor::from_slice([tokens, columns], &values).unwrap()
    }

    /// The sum of the squares of `run`'s result and, by finite differences, the gradient of every factor and of x; with DoRA, whose
    /// factors change lengths that are constants to derivatives, that of every length and of x.
    fn check_gradients(weight: &Arc<Parameter<f32>>, x: &Tensor<f32, 2>, run: impl Fn(&Tensor<f32, 2>) -> Tensor<f32, 2>) {
        // One weight serves several products, and gradients add up.
        weight.adapters().iter().flat_map(LowRank::parameters).for_each(|parameter| parameter.clear_gradient());
        let leaf = x.leaf();
        let y = run(&leaf);
        let mut upstream = Buffer::copy_of(y.values());
        upstream.iter_mut().for_each(|value| *value *= 2.0);
        y.backward_with(upstream).unwrap();
        assert!(weight.gradient_rows(0..weight.rows()).unwrap().is_none(), "the weight itself is frozen");
        let loss = |x: &Tensor<f32, 2>| run(x).values().iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        let near = |what: &str, got: f32, up: f64, down: f64| {
            let want = (up - down) / (2.0 * f64::from(STEP));
            // The loss is about 1000 and rounded to 1e-7 of itself; the step divides that.
            assert!((f64::from(got) - want).abs() < 0.05 + 2e-3 * want.abs(), "{what}: got {got}, want {want}");
        };
        const STEP: f32 = 0.01;
        for part in weight.adapters().iter() {
            for factor in part.parameters().skip(if part.magnitude.is_some() { 2 } else { 0 }) {
                let gradient = factor.gradient_rows(0..factor.rows()).unwrap().unwrap();
                let mut values = vec![0.0; factor.count()];
                factor.read_rows(0..factor.rows(), &mut values).unwrap();
                for i in 0..values.len() {
                    let at = |step: f32| {
                        let mut moved = values.clone();
                        moved[i] += step;
                        factor.write_rows(0..factor.rows(), &moved, false).unwrap();
                        loss(x)
                    };
                    near(factor.name(), gradient[i], at(STEP), at(-STEP));
                }
                factor.write_rows(0..factor.rows(), &values, false).unwrap();
            }
        }
        let gradient = leaf.gradient().unwrap().unwrap();
        for i in 0..x.len() {
            let at = |step: f32| {
                let mut moved = x.values().to_vec();
                moved[i] += step;
                loss(&Tensor::from_slice(x.shape(), &moved).unwrap())
            };
            near("x", gradient.values()[i], at(STEP), at(-STEP));
        }
    }

    #[test]
    fn every_product_differentiates_its_low_rank_parts() {
        for dora in [false, true] {
            let (weight, x, bias) = (adapted::<f32>(7, 6, 4, dora), input(5, 6), filled("bias", 7, 1, 3));
            check_gradients(&weight, &x, |x| linear(x, &weight, Some(&bias), Some(&input(5, 7))).unwrap());
            let norm = filled("norm", 6, 1, 9);
            norm.set_trains(false);
            check_gradients(&weight, &x, |x| norm_linear(x, &norm, 1e-6, &weight, Some(&bias)).unwrap());
            let weight = adapted::<f32>(7, 3, 4, dora);
            check_gradients(&weight, &x, |x| swiglu_linear(x, &weight, Some(&input(5, 7))).unwrap());
        }
    }

    #[test]
    fn a_row_is_the_same_alone_and_merging_comes_near_and_goes_back_to_the_bit() {
        fn check<E: ModelElement>(tolerance: f32, dora: bool) {
            let (weight, x) = (adapted::<E>(70, 45, 33, dora), input::<E>(9, 45));
            let y = linear(&x, &weight, None, None).unwrap();
            for (row, values) in x.values().chunks_exact(45).enumerate() {
                let alone = linear(&Tensor::from_slice([1, 45], values).unwrap(), &weight, None, None).unwrap();
                assert!(alone.values() == &y.values()[row * 70..(row + 1) * 70], "row {row}");
            }
            let before = weight.read().weight.to_vec();
            weight.merge().unwrap();
            assert!(weight.adapters().is_empty() && weight.is_merged());
            let merged = linear(&x, &weight, None, None).unwrap();
            for (a, b) in y.values().iter().zip(merged.values()) {
                assert!((a.to_f32() - b.to_f32()).abs() <= tolerance, "{a:?} {b:?}");
            }
            weight.unmerge();
            assert!(weight.read().weight[..] == before[..] && weight.adapters().len() == 2);
            assert!(linear(&x, &weight, None, None).unwrap().values() == y.values());
        }
        // Sums of 45 terms up to 2.3, rounded to 24 bits, or at the end and in the weight to 8.
        for dora in [false, true] {
            check::<f32>(1e-4, dora);
            check::<bf16>(1.0, dora);
        }
    }

    /// Equation 5 of the paper for every row, and its start: rows of the length that they have.
    #[test]
    fn rows_have_the_lengths_that_are_learnt() {
        fn rows_of(weight: &Parameter<f32>) -> Vec<f32> {
            let mut values = vec![0.0; weight.count()];
            weight.read_adapted_rows(0..weight.rows(), &mut values).unwrap();
            values
        }
        let (out, inputs) = (40, 6);
        let (plain, weight) = (adapted::<f32>(out, inputs, 33, false), adapted::<f32>(out, inputs, 33, true));
        let length = |row: &[f32]| row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        let mut lengths = Vec::new();
        for part in weight.adapters().iter() {
            let mut values = vec![0.0; part.rows.len()];
            part.magnitude.as_ref().unwrap().lengths.read_rows(0..part.rows.len(), &mut values).unwrap();
            lengths.extend(values);
        }
        let plain_rows = rows_of(&plain);
        let pairs = plain_rows.chunks_exact(inputs).zip(lengths);
        let want: Vec<f64> =
            pairs.flat_map(|(row, m)| row.iter().map(|value| f64::from(*value) * f64::from(m) / length(row)).collect::<Vec<_>>()).collect();
        for (got, want) in rows_of(&weight).iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{got} {want}");
        }
        weight.adapters().iter().for_each(|part| part.magnitude.as_ref().unwrap().begin(&weight, part).unwrap());
        assert!(rows_of(&weight) == plain_rows);
        // Lengths follow a factor that changes.
        let part = &weight.adapters()[0];
        part.b.write_rows(0..part.b.rows(), &vec![0.0; part.b.count()], false).unwrap();
        part.magnitude.as_ref().unwrap().begin(&weight, part).unwrap();
        let (mut bare, mut scaled) = (vec![0.0; 33 * inputs], vec![0.0; 33 * inputs]);
        weight.read_rows(0..33, &mut bare).unwrap();
        weight.read_adapted_rows(0..33, &mut scaled).unwrap();
        assert!(bare == scaled);
    }
}
