//! The low-rank parts of a parameter: given, merged into it and taken out again. What they compute is in low_rank.rs.

use super::ModelElement;
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

    /// Gives the weight low-rank parts in place of those it has. Panics for parts that do not fit, and while parts are merged.
    pub fn set_adapters(&self, parts: Vec<LowRank<E>>) {
        for part in &parts {
            let (rank, b) = (part.rank(), (part.b.rows(), part.b.columns()));
            assert!(part.rows.end <= self.rows && part.a.columns() == self.columns, "{}: rows or inputs of a low-rank part", self.name);
            assert_eq!(b, (part.rows.len(), rank), "{}: the second factor of a low-rank part", self.name);
        }
        let mut adapters = self.adapters.write().expect("nothing panics while adapters change");
        assert!(adapters.former.is_none(), "{}: low-rank parts are merged", self.name);
        adapters.parts = parts.into();
        self.version.fetch_add(1, Relaxed);
    }

    /// Whether this weight or a factor of its low-rank parts trains.
    pub fn learns(&self) -> bool {
        self.trains() || self.adapters().iter().any(|part| part.a.trains() || part.b.trains())
    }

    /// Whether the low-rank parts are merged.
    pub fn is_merged(&self) -> bool {
        self.lock_adapters().former.is_some()
    }

    /// Adds the low-rank parts to the weight, in f32, and sets them aside; the weight as it was is kept for
    /// [`Parameter::unmerge`]. Nothing happens without parts, or if they are merged.
    ///
    /// Errors: [`crate::error::Error::Device`] if it lies on a device without room for both.
    pub fn merge(&self) -> Result<()> {
        if self.adapters().is_empty() {
            return Ok(());
        }
        let former = self.read().clone();
        let mut merged = former.try_clone()?;
        for rows in self.row_blocks() {
            let mut values = Buffer::scratch(rows.len() * self.columns);
            self.read_adapted_rows(rows.clone(), &mut values)?;
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

    /// As [`Parameter::read_rows`], with the low-rank parts added in f32.
    pub fn read_adapted_rows(&self, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        self.read_rows(rows.clone(), values)?;
        self.adapters().iter().try_for_each(|part| part.add_to_rows(&rows, values))
    }
}
