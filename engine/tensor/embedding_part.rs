//! The low-rank part of an embedding: token `v` is row `v` of the weight plus `scale * B A[:, v]`. As in PEFT it belongs to
//! lookups alone: where the weight is the head as well, the head does not see it. On a GPU it is cuda/embedding.rs.
//! Source: PEFT 0.18, `lora.Embedding`.

use super::ModelElement;
use super::parameter::Parameter;
use crate::error::Result;
use crate::kernels::buffer::{Buffer, clear};
use crate::kernels::cpu::{gemm, low_rank};
use std::ops::Range;
use std::sync::Arc;

/// A low-rank part of an embedding `[vocab, hidden]`.
#[derive(Clone)]
pub struct EmbeddingPart<E: ModelElement> {
    /// `[rank, vocab]` in rows
    pub a: Arc<Parameter<E>>,
    /// `[hidden, rank]` in panels
    pub b: Arc<Parameter<E>>,
    pub scale: f32,
}

impl<E: ModelElement> EmbeddingPart<E> {
    /// Its parameters: both factors.
    pub fn parameters(&self) -> impl Iterator<Item = &Arc<Parameter<E>>> {
        [&self.a, &self.b].into_iter()
    }

    /// Whether a factor trains.
    pub fn trains(&self) -> bool {
        self.parameters().any(|parameter| parameter.trains())
    }

    /// A part of its own with copies of its parameters.
    ///
    /// Errors: those of `copy`.
    pub(super) fn copy_with(&self, copy: &impl Fn(&Parameter<E>) -> Result<Parameter<E>>) -> Result<Self> {
        Ok(Self { a: Arc::new(copy(&self.a)?), b: Arc::new(copy(&self.b)?), scale: self.scale })
    }

    /// Adds its share to `values`, `rows` of the weight, row-major, in f32 from the masters of both factors.
    ///
    /// Errors: those of the device that they lie on.
    pub(super) fn apply_to_rows(&self, rows: &Range<usize>, values: &mut [f32]) -> Result<()> {
        let (rank, vocab, hidden) = (self.a.rows(), self.a.columns(), self.b.rows());
        let (mut a, mut b) = (Buffer::<f32>::scratch(rank * vocab), Buffer::<f32>::scratch(hidden * rank));
        self.a.read_rows(0..rank, &mut a)?;
        self.b.read_rows(0..hidden, &mut b)?;
        let of_tokens: Vec<f32> =
            rows.clone().flat_map(|token| (0..rank).map(move |r| (r, token))).map(|(r, v)| a[r * vocab + v]).collect();
        let of_hidden: Vec<f32> = (0..rank).flat_map(|r| (0..hidden).map(move |h| (h, r))).map(|(h, r)| b[h * rank + r]).collect();
        low_rank::add_product(values, &of_hidden, &of_tokens, rank, self.scale);
        Ok(())
    }
}

/// The low-rank part of one lookup, with what its backward pass needs.
pub(super) struct LookedUp<E: ModelElement> {
    part: EmbeddingPart<E>,
    tokens: Arc<[i32]>,
    /// `A[:, token]` of each token, `[tokens, rank]`.
    inner: Buffer<E>,
    versions: [u64; 2],
}

impl<E: ModelElement> LookedUp<E> {
    /// Adds `part` to `x` `[tokens, hidden]`, the rows of the weight that `tokens` name; each is inside the vocabulary.
    pub fn forward(part: EmbeddingPart<E>, tokens: Arc<[i32]>, x: &mut [E]) -> Self {
        let (rank, vocab, hidden) = (part.a.rows(), part.a.columns(), part.b.rows());
        let mut inner = Buffer::<E>::scratch(tokens.len() * rank);
        {
            let value = part.a.read();
            for (row, token) in inner.chunks_exact_mut(rank).zip(tokens.iter()) {
                row.iter_mut().enumerate().for_each(|(r, to)| *to = value.weight[r * vocab + *token as usize]);
            }
        }
        let mut delta = Buffer::<f32>::scratch(x.len());
        part.b.multiply(&mut delta, &inner, None, None, None);
        low_rank::add_columns(x, hidden, 0..hidden, &delta, part.scale);
        let versions = [part.a.version(), part.b.version()];
        Self { part, tokens, inner, versions }
    }

    /// Adds the gradients of the factors that train; tokens in order, so that one that occurs often always sums the same way.
    ///
    /// - `dx`: `[tokens, hidden]`
    ///
    /// Errors: as [`Parameter::check_version`], for both factors.
    pub fn backward(&self, dx: &[E]) -> Result<()> {
        let part = &self.part;
        part.parameters().zip(self.versions).try_for_each(|(factor, seen)| factor.check_version(seen, "embedding"))?;
        let (rank, vocab, hidden) = (part.a.rows(), part.a.columns(), part.b.rows());
        let mut d_delta = Buffer::<E>::scratch(dx.len());
        low_rank::take_columns(dx, hidden, 0..hidden, part.scale, &mut d_delta);
        part.b.accumulate(|gradient, add| gemm::weight_gradient(gradient, &d_delta, &self.inner, None, hidden, rank, add));
        part.a.accumulate(|gradient, add| {
            let mut d_inner = Buffer::<E>::scratch(self.inner.len());
            gemm::input_gradient(&mut d_inner[..], &d_delta, part.b.product_weight(&part.b.read()), false);
            if !add {
                clear(gradient);
            }
            for (row, token) in d_inner.chunks_exact(rank).zip(self.tokens.iter()) {
                row.iter().enumerate().for_each(|(r, d)| gradient[r * vocab + *token as usize] += d.to_f32());
            }
        });
        Ok(())
    }
}
