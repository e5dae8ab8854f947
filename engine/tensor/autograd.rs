//! Reverse-mode differentiation: a graph of nodes, each with its parents and the backward closure that its operation
//! wrote. This file only orders them; what an operation saves and how it differentiates stands in that operation's file.

use super::any::TensorElement;
use super::place::Array;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::{DeviceBuffer, ViewMut};
use crate::kernels::element::Float;
use half::bf16;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// A gradient in the type of the tensor it belongs to, at its place.
#[derive(Debug)]
pub enum Gradient {
    F32(Array<f32>),
    Bf16(Array<bf16>),
}

impl Gradient {
    fn try_clone(&self) -> Result<Self> {
        match self {
            Self::F32(gradient) => Ok(Self::F32(gradient.try_clone()?)),
            Self::Bf16(gradient) => Ok(Self::Bf16(gradient.try_clone()?)),
        }
    }
}

/// The element types that have gradients.
pub trait Differentiable: TensorElement + Float {
    fn wrap_gradient(gradient: Array<Self>) -> Gradient;
    /// Panics if the gradient is of another type: operations hand each parent a gradient of the parent's own type.
    fn unwrap_gradient(gradient: Gradient) -> Array<Self>;
}

impl Differentiable for f32 {
    fn wrap_gradient(gradient: Array<f32>) -> Gradient {
        Gradient::F32(gradient)
    }
    fn unwrap_gradient(gradient: Gradient) -> Array<f32> {
        match gradient {
            Gradient::F32(gradient) => gradient,
            Gradient::Bf16(_) => panic!("a bf16 gradient reached an f32 tensor"),
        }
    }
}

impl Differentiable for bf16 {
    fn wrap_gradient(gradient: Array<bf16>) -> Gradient {
        Gradient::Bf16(gradient)
    }
    fn unwrap_gradient(gradient: Gradient) -> Array<bf16> {
        match gradient {
            Gradient::Bf16(gradient) => gradient,
            Gradient::F32(_) => panic!("an f32 gradient reached a bf16 tensor"),
        }
    }
}

type Backward = Box<dyn FnOnce(Gradient, &mut Sink) -> Result<()> + Send>;

enum Kind {
    /// Somebody reads the gradient here.
    Leaf(Mutex<Option<Gradient>>),
    /// An operation; the closure is gone once it has run.
    Operation(Mutex<Option<Backward>>),
}

/// One tensor's place in the graph.
pub struct Node {
    /// Counts up as nodes are made, so a parent's number is below its child's.
    id: u64,
    parents: Vec<Option<Arc<Node>>>,
    kind: Kind,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static RECORDING: Cell<bool> = const { Cell::new(true) };
}

/// Whether operations on this thread are recorded for a backward pass.
pub fn is_recording() -> bool {
    RECORDING.get()
}

/// Runs `body` with recording on or off, and restores what was before, also after a panic.
pub fn with_recording<T>(recording: bool, body: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            RECORDING.set(self.0);
        }
    }
    let _restore = Restore(RECORDING.replace(recording));
    body()
}

impl Node {
    /// A node at which gradients end and stay.
    pub fn leaf() -> Arc<Self> {
        Arc::new(Self { id: NEXT_ID.fetch_add(1, Relaxed), parents: Vec::new(), kind: Kind::Leaf(Mutex::new(None)) })
    }

    /// Whether gradients end here, in contrast to the nodes of operations.
    pub fn is_leaf(&self) -> bool {
        matches!(self.kind, Kind::Leaf(_))
    }

    pub(super) fn new(
        parents: &[Option<&Arc<Node>>],
        backward: impl FnOnce(Gradient, &mut Sink) -> Result<()> + Send + 'static,
    ) -> Arc<Self> {
        let parents = parents.iter().map(|parent| parent.cloned()).collect();
        Arc::new(Self { id: NEXT_ID.fetch_add(1, Relaxed), parents, kind: Kind::Operation(Mutex::new(Some(Box::new(backward)))) })
    }

    /// A copy of the gradient that has arrived at this leaf.
    ///
    /// Errors: [`Error::Device`] if it lies on a device without room for one more.
    pub(super) fn leaf_gradient(&self) -> Result<Option<Gradient>> {
        match &self.kind {
            Kind::Leaf(gradient) => {
                let gradient = gradient.lock().expect("gradients are added without panics");
                gradient.as_ref().map(Gradient::try_clone).transpose()
            }
            Kind::Operation(_) => Ok(None),
        }
    }

    /// Takes the gradient away from this leaf.
    pub(super) fn take_leaf_gradient(&self) -> Option<Gradient> {
        match &self.kind {
            Kind::Leaf(gradient) => gradient.lock().expect("gradients are added without panics").take(),
            Kind::Operation(_) => None,
        }
    }
}

impl Drop for Node {
    /// Lets long chains go one by one: the recursive drop of a loop's graph would overflow the stack.
    fn drop(&mut self) {
        let mut chain: Vec<Arc<Node>> = self.parents.drain(..).flatten().collect();
        while let Some(node) = chain.pop() {
            if let Ok(mut node) = Arc::try_unwrap(node) {
                chain.extend(node.parents.drain(..).flatten());
            }
        }
    }
}

/// Where an operation's backward closure puts the gradients of its parents.
pub struct Sink<'a> {
    parents: &'a [Option<Arc<Node>>],
    slots: &'a mut HashMap<u64, Gradient>,
    waiting: &'a mut BTreeMap<u64, Arc<Node>>,
}

impl Sink<'_> {
    /// Whether parent `index` takes a gradient at all; if not, computing one is wasted.
    pub fn wants(&self, index: usize) -> bool {
        self.parents[index].is_some()
    }

    /// Adds `gradient` to that of parent `index`; moves it there when it is the first.
    pub fn add<E: Differentiable>(&mut self, index: usize, gradient: Buffer<E>) {
        self.add_array(index, Array::Host(gradient)).expect("the host adds without errors");
    }

    /// As [`Sink::add`], of a parent wherever it lies.
    ///
    /// Errors: those of the device.
    pub fn add_array<E: Differentiable>(&mut self, index: usize, gradient: Array<E>) -> Result<()> {
        let Some(parent) = &self.parents[index] else { return Ok(()) };
        self.waiting.entry(parent.id).or_insert_with(|| parent.clone());
        let sum = match self.slots.remove(&parent.id) {
            None => gradient,
            Some(sum) => {
                let mut sum = E::unwrap_gradient(sum);
                sum.add(&gradient)?;
                sum
            }
        };
        self.slots.insert(parent.id, E::wrap_gradient(sum));
        Ok(())
    }

    /// As [`Sink::add`], of a parent on a device.
    ///
    /// Errors: those of the device.
    pub fn add_on_device<E: Differentiable>(&mut self, index: usize, gradient: DeviceBuffer<E>) -> Result<()> {
        self.add_array(index, Array::Cuda(gradient))
    }

    /// Lets `write` put the gradient of parent `index` (of `len` elements) in place: with `true` it must add to what is
    /// there, with `false` overwrite all of it.
    pub fn accumulate<E: Differentiable>(&mut self, index: usize, len: usize, write: impl FnOnce(&mut [E], bool)) {
        let Some((sum, add)) = self.take_slot::<E>(index) else { return };
        let mut sum = match sum {
            Some(sum) => sum.into_host().expect("a parent on the host has its gradient there"),
            None => Buffer::scratch(len),
        };
        assert_eq!(sum.len(), len);
        write(&mut sum, add);
        self.put_slot(index, Array::Host(sum));
    }

    /// As [`Sink::accumulate`], of a parent on `device`.
    ///
    /// Errors: those of `write`; [`crate::error::Error::Device`] if the device has no room.
    pub fn accumulate_on_device<E: Differentiable>(
        &mut self,
        index: usize,
        device: &Arc<Device>,
        len: usize,
        write: impl FnOnce(ViewMut<E>, bool) -> Result<()>,
    ) -> Result<()> {
        let Some((sum, add)) = self.take_slot::<E>(index) else { return Ok(()) };
        let mut sum = match sum {
            Some(sum) => sum.into_cuda(),
            None => DeviceBuffer::scratch(device, "gradients of activations", len)?,
        };
        assert_eq!(sum.len(), len);
        write(sum.view_mut(), add)?;
        self.put_slot(index, Array::Cuda(sum));
        Ok(())
    }

    /// What parent `index`, which will have a gradient, has already, and whether it has any; none if it takes none.
    fn take_slot<E: Differentiable>(&mut self, index: usize) -> Option<(Option<Array<E>>, bool)> {
        let parent = self.parents[index].as_ref()?;
        self.waiting.entry(parent.id).or_insert_with(|| parent.clone());
        let sum = self.slots.remove(&parent.id).map(E::unwrap_gradient);
        let add = sum.is_some();
        Some((sum, add))
    }

    fn put_slot<E: Differentiable>(&mut self, index: usize, gradient: Array<E>) {
        let parent = self.parents[index].as_ref().expect("the slot was taken from this parent");
        self.slots.insert(parent.id, E::wrap_gradient(gradient));
    }
}

fn add_gradient(sum: &mut Gradient, gradient: &Gradient) -> Result<()> {
    match (sum, gradient) {
        (Gradient::F32(sum), Gradient::F32(gradient)) => sum.add(gradient),
        (Gradient::Bf16(sum), Gradient::Bf16(gradient)) => sum.add(gradient),
        _ => panic!("two gradients of one tensor have different types"),
    }
}

/// Walks the graph from `root` against the order of its making and leaves gradients at leaves and parameters. Closures
/// are consumed as the walk goes, which frees what they saved.
pub(super) fn run_backward(root: &Arc<Node>, gradient: Gradient) -> Result<()> {
    let mut slots = HashMap::from([(root.id, gradient)]);
    let mut waiting = BTreeMap::from([(root.id, root.clone())]);
    while let Some((id, node)) = waiting.pop_last() {
        let gradient = slots.remove(&id).expect("a node waits only with a gradient");
        match &node.kind {
            Kind::Leaf(slot) => {
                let mut slot = slot.lock().expect("gradients are added without panics");
                match slot.as_mut() {
                    Some(sum) => add_gradient(sum, &gradient)?,
                    None => *slot = Some(gradient),
                }
            }
            Kind::Operation(backward) => {
                let backward = backward.lock().expect("closures are only taken under this lock").take();
                let Some(backward) = backward else {
                    return Err(Error::argument(
                        "backward",
                        "self",
                        "a graph that has not run backwards yet",
                        "one whose saved values are gone; compute the loss again",
                    ));
                };
                backward(gradient, &mut Sink { parents: &node.parents, slots: &mut slots, waiting: &mut waiting })?;
            }
        }
    }
    Ok(())
}
