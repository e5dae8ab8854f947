//! Rotary positions and causal attention over packed documents, with autograd. The loops are in kernels/cpu/attention.rs
//! and kernels/cpu/rope.rs.
//! Sources: Su et al., arXiv 2104.09864; Dao et al., arXiv 2205.14135 (scores are never stored); GQA, arXiv 2305.13245.

use super::ModelElement;
use super::cuda::attention as cuda;
use super::place::Place;
use super::select_rows::select_rows;
use super::typed::{Data, Tensor};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::attention::{self as kernel, Attention as Settings};
use crate::kernels::cpu::attention_backward::attention_backward;
pub use crate::kernels::cpu::heads::Heads;
use crate::kernels::cpu::rope;
use std::ops::Range;
use std::sync::Arc;

/// The frequencies of rotary positions.
#[derive(Clone, Debug)]
pub struct Rope {
    /// `[head_dim / 2]`, radians a position
    pub inv_freq: Vec<f32>,
    /// Multiplies cos and sin; 1 unless YaRN.
    pub attention_scaling: f32,
}

/// Cosines and sines of every token's position: `[tokens, head_dim / 2]` each, f32, rounded to the element type in use.
pub enum RopeTables {
    Host { cos: Buffer<f32>, sin: Buffer<f32> },
    Cuda(Arc<cuda::Tables>),
}

impl RopeTables {
    /// Those on the host. Panics if they lie on a device: they are made where the model lies.
    pub(super) fn host(&self) -> (&[f32], &[f32]) {
        match self {
            Self::Host { cos, sin } => (cos, sin),
            Self::Cuda(_) => panic!("the positions of a model on a device met an activation on the host"),
        }
    }

    /// Those on a device. Panics as [`RopeTables::host`] does.
    pub(super) fn cuda(&self) -> &Arc<cuda::Tables> {
        match self {
            Self::Host { .. } => panic!("the positions of a model on the host met an activation on a device"),
            Self::Cuda(tables) => tables,
        }
    }
}

impl Rope {
    /// The tables for tokens at `positions`, for a model at `place`; computed once and read by every layer.
    ///
    /// Errors: those of the device.
    pub fn tables<E: ModelElement>(&self, positions: &[i32], place: &Place) -> Result<RopeTables> {
        if let Some(device) = place.device() {
            return Ok(RopeTables::Cuda(Arc::new(cuda::Tables::new::<E>(device, self, positions)?)));
        }
        let len = positions.len() * self.inv_freq.len();
        let (mut cos, mut sin) = (Buffer::scratch(len), Buffer::scratch(len));
        rope::rope_tables::<E>(&self.inv_freq, self.attention_scaling, positions, &mut cos, &mut sin)?;
        Ok(RopeTables::Host { cos, sin })
    }
}

/// Documents laid end to end, inside which attention stays.
pub struct Documents {
    borders: Vec<i32>,
    /// For each document, the rows of an earlier one that it begins with; on a device they are written out instead.
    prefixes: Vec<Range<u32>>,
    written_out: Option<WrittenOut>,
    plans: cuda::Plans,
}

/// Documents that share rows, each as if it had its own.
struct WrittenOut {
    /// The row that each of theirs is.
    rows: Arc<[i32]>,
    /// Where each row stands that is not a copy.
    own: Arc<[i32]>,
}

impl Documents {
    /// - `borders`: of the documents' own rows, from 0 to the number of tokens, rising
    /// - `prefixes`: for each document, the rows that stand before its own: the beginning of an earlier document that has none
    ///   itself; no entries where every document is whole
    /// - `place`: where their tokens lie
    pub fn new(borders: &[u32], prefixes: &[Range<u32>], place: &Place) -> Self {
        let plans = cuda::Plans::default();
        if place.device().is_none() || prefixes.iter().all(Range::is_empty) {
            let borders = borders.iter().map(|border| *border as i32).collect();
            return Self { borders, prefixes: prefixes.to_vec(), written_out: None, plans };
        }
        let (mut rows, mut own, mut whole) = (Vec::new(), Vec::new(), vec![0]);
        for (prefix, pair) in prefixes.iter().zip(borders.windows(2)) {
            rows.extend(prefix.clone().map(|row| row as i32));
            own.extend((0..pair[1] - pair[0]).map(|row| rows.len() as i32 + row as i32));
            rows.extend((pair[0]..pair[1]).map(|row| row as i32));
            whole.push(rows.len() as i32);
        }
        Self { borders: whole, prefixes: Vec::new(), written_out: Some(WrittenOut { rows: rows.into(), own: own.into() }), plans }
    }

    /// What the kernels need to know.
    fn settings(&self, heads: Heads, window: Option<usize>) -> Settings<'_> {
        Settings { heads, cu_seqlens: &self.borders, prefixes: &self.prefixes, scale: heads.scale(), window }
    }

    /// Tables for tokens at `position_ids`, as [`attention`] over these documents takes them.
    ///
    /// Errors: those of the device.
    pub fn tables<E: ModelElement>(&self, rope: &Rope, position_ids: &[i32], place: &Place) -> Result<RopeTables> {
        match &self.written_out {
            None => rope.tables::<E>(position_ids, place),
            Some(WrittenOut { rows, .. }) => {
                rope.tables::<E>(&rows.iter().map(|row| position_ids[*row as usize]).collect::<Vec<_>>(), place)
            }
        }
    }
}

/// Turns queries and keys to their positions and mixes values causally inside each document.
///
/// - `qkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`, queries, keys, values
/// - `tables`: those of [`Documents::tables`]
/// - `documents`: which of the tokens belong together
/// - `window`: keys that a query sees, itself included; all earlier ones of its document if none
/// - returns `[tokens, heads * head_dim]`
///
/// Errors: [`Error::Shape`] if `qkv` has another width.
pub fn attention<E: ModelElement>(
    qkv: &Tensor<E, 2>,
    heads: Heads,
    tables: &Arc<RopeTables>,
    documents: &Arc<Documents>,
    window: Option<usize>,
) -> Result<Tensor<E, 2>> {
    let [tokens, width] = qkv.shape();
    if width != heads.width() {
        return Err(Error::Shape {
            op: "attention",
            arg: "qkv",
            expected: format!("[tokens, {}]", heads.width()),
            got: format!("[{tokens}, {width}]"),
        });
    }
    if let Some(device) = qkv.device() {
        let attend =
            |qkv: &Tensor<E, 2>| cuda::attention(device, qkv, heads, tables.cuda(), (&documents.borders, &documents.plans), window);
        return match &documents.written_out {
            None => attend(qkv),
            Some(WrittenOut { rows, own }) => select_rows("attention", &attend(&select_rows("attention", qkv, rows)?)?, own),
        };
    }
    let mut turned = Buffer::scratch(qkv.values().len());
    let (cos, sin) = tables.host();
    rope::rope(qkv.values(), &mut turned, heads, cos, sin)?;
    let mut mixed = Buffer::<E>::scratch(tokens * heads.heads * heads.head_dim);
    let mut lse = Buffer::<f32>::scratch(tokens * heads.heads);
    kernel::attention(&documents.settings(heads, window), &turned, &mut mixed, &mut lse)?;
    let mixed = Data::ready(mixed);
    let (saved, tables, documents) = (mixed.clone(), tables.clone(), documents.clone());
    Ok(Tensor::from_operation([tokens, heads.heads * heads.head_dim], mixed, &[qkv.node()], false, move |d_mixed, sink| {
        let mut d_qkv = Buffer::<E>::scratch(tokens * width);
        attention_backward(&documents.settings(heads, window), &d_mixed, &turned, saved.get(), &lse, &mut d_qkv)?;
        let (cos, sin) = tables.host();
        rope::rope_backward(&mut d_qkv, heads, cos, sin)?;
        sink.add(0, d_qkv);
        Ok(())
    }))
}
