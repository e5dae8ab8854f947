//! `Tensor<E, R>`: elements of one type in row-major order, a shape of R sizes, and its place in the graph of autograd.
//! Cheap to clone: clones share the elements, which never change once written.

use super::any::TensorElement;
use super::autograd::{self, Differentiable, Node, Sink};
use super::place::{Array, Place, downloaded};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::{DeviceBuffer, View};
use crate::kernels::element::Element;
use std::sync::{Arc, Mutex, OnceLock};

/// Computes elements that nobody has asked for yet.
type Later<E> = Box<dyn Fn() -> Result<Buffer<E>> + Send>;

/// The elements of a tensor: there already, or computed when first read. An operation whose backward pass computes its
/// value on the way (cross entropy) is deferred, so that the work is done once. Deferred elements come to the host.
pub struct Data<E: Element> {
    array: OnceLock<Array<E>>,
    later: Mutex<Option<Later<E>>>,
}

impl<E: Element> Data<E> {
    /// Elements that are there.
    pub fn ready(buffer: Buffer<E>) -> Arc<Self> {
        Self::at_place(Array::Host(buffer))
    }

    /// Elements that are there, on a device.
    pub fn on_device(buffer: DeviceBuffer<E>) -> Arc<Self> {
        Self::at_place(Array::Cuda(buffer))
    }

    /// Elements that are there, wherever that is.
    pub fn at_place(array: Array<E>) -> Arc<Self> {
        Arc::new(Self { array: OnceLock::from(array), later: Mutex::new(None) })
    }

    /// Elements that `compute` makes when somebody reads them, unless [`Data::fulfil`] came first.
    pub fn deferred(compute: impl Fn() -> Result<Buffer<E>> + Send + 'static) -> Arc<Self> {
        Arc::new(Self { array: OnceLock::new(), later: Mutex::new(Some(Box::new(compute))) })
    }

    /// Hands deferred elements in. Ignored if they were read before: both ways give the same bits.
    pub fn fulfil(&self, buffer: Buffer<E>) {
        let mut later = self.later.lock().expect("computing elements does not panic under this lock");
        let _ = self.array.set(Array::Host(buffer));
        *later = None;
    }

    /// Gives deferred elements another way to be computed, with the same bits. Ignored if they were read before.
    pub fn defer_to(&self, compute: impl Fn() -> Result<Buffer<E>> + Send + 'static) {
        let mut later = self.later.lock().expect("computing elements does not panic under this lock");
        if self.array.get().is_none() {
            *later = Some(Box::new(compute));
        }
    }

    /// Computes the elements if they were deferred.
    ///
    /// Errors: those of the computation; they come again at the next try.
    pub fn force(&self) -> Result<&Array<E>> {
        if let Some(array) = self.array.get() {
            return Ok(array);
        }
        let mut later = self.later.lock().expect("computing elements does not panic under this lock");
        if let Some(compute) = later.as_ref() {
            let buffer = compute()?;
            let _ = self.array.set(Array::Host(buffer));
            *later = None;
        }
        Ok(self.array.get().expect("elements are there, fulfilled, or were computed just now"))
    }

    /// The elements on the host.
    ///
    /// Panics if they lie on a device, or if they were deferred and cannot be computed any more; [`Data::force`] says so as an
    /// error. What scripts hand to operations has been computed by then: `host/call.rs` and `AnyTensor::typed` see to that.
    pub fn get(&self) -> &[E] {
        self.force().unwrap_or_else(|error| panic!("{error}")).host()
    }

    /// The elements on their device. Panics if they lie on the host.
    pub fn cuda(&self) -> &DeviceBuffer<E> {
        self.array.get().expect("elements on a device are never deferred").cuda()
    }

    /// The device that they lie on, if it is one.
    pub fn device(&self) -> Option<&Arc<Device>> {
        match self.array.get() {
            Some(Array::Cuda(buffer)) => Some(buffer.device()),
            _ => None,
        }
    }

    /// Whether the elements are there without work.
    pub fn is_ready(&self) -> bool {
        self.array.get().is_some()
    }
}

/// A tensor of rank R; see the file's head.
pub struct Tensor<E: Element, const R: usize> {
    shape: [usize; R],
    data: Arc<Data<E>>,
    node: Option<Arc<Node>>,
}

impl<E: Element, const R: usize> Clone for Tensor<E, R> {
    fn clone(&self) -> Self {
        Self { shape: self.shape, data: self.data.clone(), node: self.node.clone() }
    }
}

/// Number of elements of a shape.
///
/// Errors: [`Error::Shape`] if the product does not fit a usize.
pub fn count(op: &'static str, shape: &[usize]) -> Result<usize> {
    shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size)).ok_or_else(|| Error::Shape {
        op,
        arg: "shape",
        expected: "a number of elements that fits memory".into(),
        got: format!("{shape:?}"),
    })
}

impl<E: TensorElement, const R: usize> Tensor<E, R> {
    /// A constant of `shape` with `values` in row-major order.
    ///
    /// Errors: [`Error::Shape`] if their numbers differ.
    pub fn new(shape: [usize; R], values: Buffer<E>) -> Result<Self> {
        let expected = count("tensor", &shape)?;
        if values.len() != expected {
            return Err(Error::Shape {
                op: "tensor",
                arg: "values",
                expected: format!("{expected} values for shape {shape:?}"),
                got: format!("{} values", values.len()),
            });
        }
        Ok(Self { shape, data: Data::ready(values), node: None })
    }

    /// As [`Tensor::new`], from a slice.
    pub fn from_slice(shape: [usize; R], values: &[E]) -> Result<Self> {
        Self::new(shape, Buffer::copy_of(values))
    }

    /// The parts, put together again: for conversions between typed and untyped.
    pub(super) fn from_parts(shape: [usize; R], data: Arc<Data<E>>, node: Option<Arc<Node>>) -> Self {
        Self { shape, data, node }
    }

    pub fn shape(&self) -> [usize; R] {
        self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements in row-major order. Panics as [`Data::get`] does: those on a device are copied with [`Tensor::to_host`].
    pub fn values(&self) -> &[E] {
        self.data.get()
    }

    /// The device that it lies on; none for the host.
    pub fn device(&self) -> Option<&Arc<Device>> {
        self.data.device()
    }

    /// The elements on their device. Panics if they lie on the host.
    pub fn cuda(&self) -> View<'_, E> {
        self.data.cuda().view()
    }

    /// Where it lies.
    pub fn place(&self) -> Place {
        self.device().map_or(Place::Host, |device| Place::Cuda(device.clone()))
    }

    /// The shared elements.
    pub fn data(&self) -> &Arc<Data<E>> {
        &self.data
    }

    /// Its place in the graph; none for a constant.
    pub fn node(&self) -> Option<&Arc<Node>> {
        self.node.as_ref()
    }

    /// The same elements as a constant.
    pub fn detach(&self) -> Self {
        Self { node: None, ..self.clone() }
    }
}

impl<E: Differentiable, const R: usize> Tensor<E, R> {
    /// The same elements as a leaf of the graph: `backward` leaves a gradient there.
    pub fn leaf(&self) -> Self {
        Self { node: Some(Node::leaf()), ..self.clone() }
    }

    /// The same on the host, still in the graph: its gradient goes back to the device. Waits for the device.
    ///
    /// Errors: those of the device.
    pub fn to_host(&self) -> Result<Self> {
        let Some(device) = self.device().cloned() else { return Ok(self.clone()) };
        let host = Data::ready(downloaded(self.data.cuda())?);
        Ok(Self::from_operation(self.shape, host, &[self.node()], false, move |gradient, sink| {
            sink.add_on_device(0, DeviceBuffer::copy_of(&device, "gradients of activations", &gradient)?)
        }))
    }

    /// The result of an operation on the host. `backward` is kept only while recording, and only if a parent or a parameter
    /// (`parameters`) wants a gradient. It receives the gradient of this result and gives parents theirs through the
    /// [`Sink`], by position in `parents`. It must hold elements (`Arc<Data>`), never tensors with nodes.
    pub fn from_operation(
        shape: [usize; R],
        data: Arc<Data<E>>,
        parents: &[Option<&Arc<Node>>],
        parameters: bool,
        backward: impl FnOnce(Buffer<E>, &mut Sink) -> Result<()> + Send + 'static,
    ) -> Self {
        Self::from_operation_anywhere(shape, data, parents, parameters, |gradient, sink| backward(gradient.into_host()?, sink))
    }

    /// As [`Tensor::from_operation`], of an operation on a device.
    pub fn from_operation_on_device(
        shape: [usize; R],
        y: DeviceBuffer<E>,
        parents: &[Option<&Arc<Node>>],
        parameters: bool,
        backward: impl FnOnce(DeviceBuffer<E>, &mut Sink) -> Result<()> + Send + 'static,
    ) -> Self {
        let backward = |gradient: Array<E>, sink: &mut Sink| backward(gradient.into_cuda(), sink);
        Self::from_operation_anywhere(shape, Data::on_device(y), parents, parameters, backward)
    }

    /// As [`Tensor::from_operation`], of an operation that does not look where elements lie.
    pub fn from_operation_anywhere(
        shape: [usize; R],
        data: Arc<Data<E>>,
        parents: &[Option<&Arc<Node>>],
        parameters: bool,
        backward: impl FnOnce(Array<E>, &mut Sink) -> Result<()> + Send + 'static,
    ) -> Self {
        let wanted = autograd::is_recording() && (parameters || parents.iter().any(Option::is_some));
        let node = wanted.then(|| Node::new(parents, |gradient, sink| backward(E::unwrap_gradient(gradient), sink)));
        Self { shape, data, node }
    }

    /// Runs the graph behind this one-element tensor backwards with gradient 1.
    ///
    /// Errors: [`Error::Shape`] if it has not exactly one element; [`Error::Argument`] if it does not depend on
    /// anything that wants a gradient, or if its graph has run backwards before.
    pub fn backward(&self) -> Result<()> {
        if self.len() != 1 {
            return Err(Error::Shape {
                op: "backward",
                arg: "self",
                expected: "one element (a loss)".into(),
                got: format!("{:?}", self.shape),
            });
        }
        let mut one = Buffer::scratch(1);
        one[0] = E::from_f32(1.0);
        self.backward_with(one)
    }

    /// As [`Tensor::backward`] for any shape, with the gradient of the result given.
    pub fn backward_with(&self, gradient: Buffer<E>) -> Result<()> {
        self.backward_from(Array::Host(gradient))
    }

    /// As [`Tensor::backward_with`], with a gradient from anywhere.
    pub fn backward_from(&self, gradient: Array<E>) -> Result<()> {
        assert_eq!(gradient.len(), self.len());
        let Some(node) = &self.node else {
            return Err(Error::argument(
                "backward",
                "self",
                "a tensor computed from something that wants a gradient",
                "a constant; was it computed under no_grad, or only from data?",
            ));
        };
        let gradient = gradient.moved_to(&self.place(), "gradients of activations")?;
        autograd::run_backward(node, E::wrap_gradient(gradient))
    }

    /// A copy of the gradient that `backward` left at this leaf, if any.
    ///
    /// Errors: [`Error::Device`] if it lies on a device without room for one more.
    pub fn gradient(&self) -> Result<Option<Self>> {
        let Some(node) = &self.node else { return Ok(None) };
        let gradient = node.leaf_gradient()?.map(E::unwrap_gradient);
        Ok(gradient.map(|gradient| Self { shape: self.shape, data: Data::at_place(gradient), node: None }))
    }
}

impl<E: Element, const R: usize> std::fmt::Debug for Tensor<E, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor<{}>{:?}", E::DTYPE, self.shape)
    }
}
