//! The low-rank parts of a parameter: given, merged into it and taken out again. What they compute is in low_rank.rs.

use super::ModelElement;
use super::embedding_part::EmbeddingPart;
use super::low_rank::LowRank;
use super::parameter::{Adapters, Parameter};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, RwLockReadGuard};

impl<E: ModelElement> Parameter<E> {
    pub(super) fn lock_adapters(&self) -> RwLockReadGuard<'_, Adapters<E>> {
        self.adapters.read().expect("nothing panics while adapters change")
    }

    /// The low-rank parts that products add to this weight; none while they are merged.
    pub fn adapters(&self) -> Arc<[LowRank<E>]> {
        let adapters = self.lock_adapters();
        if adapters.former.is_some() { Arc::new([]) } else { adapters.parts.clone() }
    }

    /// The low-rank parts, merged or not.
    pub fn all_adapters(&self) -> Arc<[LowRank<E>]> {
        self.lock_adapters().parts.clone()
    }

    /// What lookups add to rows of this weight; nothing while it is merged.
    pub fn embedding_part(&self) -> Option<EmbeddingPart<E>> {
        let adapters = self.lock_adapters();
        adapters.embedding.clone().filter(|_| adapters.former.is_none())
    }

    /// The same, merged or not.
    pub fn any_embedding_part(&self) -> Option<EmbeddingPart<E>> {
        self.lock_adapters().embedding.clone()
    }

    /// Gives the weight, an embedding, a low-rank part for lookups. Panics for one that does not fit, and while parts are merged.
    pub fn set_embedding_part(&self, part: EmbeddingPart<E>) {
        let (rank, a, b) = (part.a.rows(), part.a.columns(), (part.b.rows(), part.b.columns()));
        assert!(a == self.rows && b == (self.columns, rank), "{}: factors of an embedding's low-rank part", self.name);
        let mut adapters = self.adapters.write().expect("nothing panics while adapters change");
        assert!(adapters.former.is_none(), "{}: low-rank parts are merged", self.name);
        adapters.embedding = Some(part);
        self.version.fetch_add(1, Relaxed);
    }

    /// Takes the low-rank parts away. Panics while they are merged.
    pub fn clear_adapters(&self) {
        self.set_adapters(Vec::new());
        self.adapters.write().expect("nothing panics while adapters change").embedding = None;
    }

    /// Whether it has low-rank parts, merged or not.
    pub fn is_adapted(&self) -> bool {
        let adapters = self.lock_adapters();
        !adapters.parts.is_empty() || adapters.embedding.is_some()
    }

    /// Versions of this weight and of the parameters of its low-rank parts.
    pub(super) fn versions(&self) -> Vec<u64> {
        let parts = self.adapters();
        let of_parts = parts.iter().flat_map(LowRank::parameters).map(|parameter| parameter.version());
        std::iter::once(self.version()).chain(of_parts).collect()
    }

    /// Errors: as [`Parameter::check_version`], for this weight and the parameters of its low-rank parts.
    pub(super) fn check_versions(&self, seen: &[u64], op: &'static str) -> Result<()> {
        self.check_version(seen[0], op)?;
        let parts = self.adapters();
        parts.iter().flat_map(LowRank::parameters).zip(&seen[1..]).try_for_each(|(parameter, seen)| parameter.check_version(*seen, op))
    }

    /// Gives the weight low-rank parts in place of those it has. Panics for parts that do not fit, and while parts are merged.
    pub fn set_adapters(&self, parts: Vec<LowRank<E>>) {
        for part in &parts {
            let (stack, rows) = (part.stack, part.stack.count * part.rows.len());
            assert!(stack.count * stack.rows == self.rows, "{}: {stack:?}", self.name);
            assert!(part.rows.end <= stack.rows && part.a.columns() == self.columns, "{}: rows or inputs of a low-rank part", self.name);
            let b = (part.b.rows(), part.b.columns());
            assert_eq!(b, (rows, part.rank()), "{}: the second factor of a low-rank part", self.name);
            let lengths = part.magnitude.as_ref().map(|magnitude| (magnitude.lengths.rows(), magnitude.lengths.columns()));
            assert!(lengths.is_none_or(|lengths| lengths == (rows, 1)), "{}: lengths of rows", self.name);
        }
        let mut adapters = self.adapters.write().expect("nothing panics while adapters change");
        assert!(adapters.former.is_none(), "{}: low-rank parts are merged", self.name);
        adapters.parts = parts.into();
        self.version.fetch_add(1, Relaxed);
    }

    /// Whether this weight or a parameter of its low-rank parts trains.
    pub fn learns(&self) -> bool {
        self.trains() || self.adapters().iter().any(LowRank::trains) || self.embedding_part().is_some_and(|part| part.trains())
    }

    /// Whether the low-rank parts are merged.
    pub fn is_merged(&self) -> bool {
        self.lock_adapters().former.is_some()
    }

    /// Adds the low-rank parts to the weight, in f32, and sets them aside; the weight as it was is kept for
    /// [`Parameter::unmerge`]. Nothing happens without parts, or if they are merged. An embedding's part is merged for products
    /// too: a weight that serves both and has one must not be merged.
    ///
    /// Errors: [`crate::error::Error::Device`] if it lies on a device without room for both.
    pub fn merge(&self) -> Result<()> {
        if !self.is_adapted() || self.is_merged() {
            return Ok(());
        }
        let former = self.read().clone();
        let mut merged = former.try_clone()?;
        for rows in self.row_blocks() {
            let mut values = Buffer::scratch(rows.len() * self.columns);
            self.read_adapted_rows(rows.clone(), &mut values)?;
            self.add_embedding_part(&rows, &mut values)?;
            self.write_value(&mut merged, rows, &values, false)?;
        }
        *self.value.write().expect("nothing panics while a parameter is written") = Arc::new(merged);
        self.adapters.write().expect("nothing panics while adapters change").former = Some(former);
        self.version.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Puts back, to the bit, the weight that [`Parameter::merge`] changed, and its low-rank parts.
    pub fn unmerge(&self) {
        if let Some(former) = self.adapters.write().expect("nothing panics while adapters change").former.take() {
            *self.value.write().expect("nothing panics while a parameter is written") = former;
            self.version.fetch_add(1, Relaxed);
        }
    }

    /// As [`Parameter::read_rows`], with what lookups add, in f32.
    pub fn read_embedded_rows(&self, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        self.read_rows(rows.clone(), values)?;
        self.add_embedding_part(&rows, values)
    }

    fn add_embedding_part(&self, rows: &Range<usize>, values: &mut [f32]) -> Result<()> {
        self.embedding_part().map_or(Ok(()), |part| part.apply_to_rows(rows, values))
    }

    /// As [`Parameter::read_rows`], with the low-rank parts of products, in f32.
    pub fn read_adapted_rows(&self, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        self.read_rows(rows.clone(), values)?;
        self.adapters().iter().try_for_each(|part| part.apply_to_rows(&rows, values))
    }
}
