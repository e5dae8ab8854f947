//! `AnyTensor`: a tensor whose element type and rank are known when the program runs. It is what scripts hold.

use super::autograd::{Differentiable, Gradient, Node, Sink, is_recording};
use super::place::{Array, Place};
use super::typed::{Data, Tensor, count};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::device::Device;
use crate::kernels::element::{Dtype, Element};
use half::bf16;
use std::sync::Arc;

/// Elements of any type.
#[derive(Clone)]
pub enum AnyData {
    F32(Arc<Data<f32>>),
    Bf16(Arc<Data<bf16>>),
    I32(Arc<Data<i32>>),
    I8(Arc<Data<i8>>),
}

/// The element types a tensor may have.
pub trait TensorElement: Element {
    fn wrap(data: Arc<Data<Self>>) -> AnyData;
    fn unwrap(data: &AnyData) -> Option<&Arc<Data<Self>>>;
}

macro_rules! tensor_element {
    ($type:ty, $variant:ident) => {
        impl TensorElement for $type {
            fn wrap(data: Arc<Data<Self>>) -> AnyData {
                AnyData::$variant(data)
            }
            fn unwrap(data: &AnyData) -> Option<&Arc<Data<Self>>> {
                match data {
                    AnyData::$variant(data) => Some(data),
                    _ => None,
                }
            }
        }
    };
}
tensor_element!(f32, F32);
tensor_element!(bf16, Bf16);
tensor_element!(i32, I32);
tensor_element!(i8, I8);

/// A tensor of any element type and rank. Cheap to clone.
#[derive(Clone)]
pub struct AnyTensor {
    shape: Vec<usize>,
    data: AnyData,
    node: Option<Arc<Node>>,
}

impl<E: TensorElement, const R: usize> From<Tensor<E, R>> for AnyTensor {
    fn from(tensor: Tensor<E, R>) -> Self {
        Self { shape: tensor.shape().to_vec(), node: tensor.node().cloned(), data: E::wrap(tensor.data().clone()) }
    }
}

impl AnyTensor {
    /// A constant of `shape` with `values` in row-major order.
    ///
    /// Errors: [`Error::Shape`] if their numbers differ.
    pub fn new<E: TensorElement>(shape: &[usize], values: Buffer<E>) -> Result<Self> {
        let expected = count("tensor", shape)?;
        if values.len() != expected {
            return Err(Error::Shape {
                op: "tensor",
                arg: "values",
                expected: format!("{expected} values for shape {shape:?}"),
                got: format!("{} values", values.len()),
            });
        }
        Ok(Self { shape: shape.to_vec(), data: E::wrap(Data::ready(values)), node: None })
    }

    /// The parts, put together: for operations that work on any element type.
    pub(super) fn from_parts(shape: Vec<usize>, data: AnyData, node: Option<Arc<Node>>) -> Self {
        Self { shape, data, node }
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn dtype(&self) -> Dtype {
        match self.data {
            AnyData::F32(_) => Dtype::F32,
            AnyData::Bf16(_) => Dtype::Bf16,
            AnyData::I32(_) => Dtype::I32,
            AnyData::I8(_) => Dtype::I8,
        }
    }

    /// The device that it lies on; none for the host.
    pub fn device(&self) -> Option<&Arc<Device>> {
        match &self.data {
            AnyData::F32(data) => data.device(),
            AnyData::Bf16(data) => data.device(),
            AnyData::I32(data) => data.device(),
            AnyData::I8(data) => data.device(),
        }
    }

    /// Where it lies.
    pub fn place(&self) -> Place {
        self.device().map_or(Place::Host, |device| Place::Cuda(device.clone()))
    }

    /// The same elements at `place`, still in the graph: its gradient goes the way back. Deferred ones are computed. Waits for a
    /// device that they leave.
    ///
    /// Errors: those of the devices, and of computing them.
    pub fn to_place(&self, place: &Place) -> Result<Self> {
        fn moved<E: TensorElement>(data: &Data<E>, place: &Place) -> Result<AnyData> {
            Ok(E::wrap(Data::at_place(data.force()?.try_clone()?.moved_to(place, "tensors of scripts")?)))
        }
        fn back<E: Differentiable>(gradient: Array<E>, from: &Place, sink: &mut Sink) -> Result<()> {
            sink.add_array(0, gradient.moved_to(from, "gradients of tensors of scripts")?)
        }
        self.force()?;
        let from = self.place();
        if from.is(place) {
            return Ok(self.clone());
        }
        let data = match &self.data {
            AnyData::F32(data) => moved(data, place)?,
            AnyData::Bf16(data) => moved(data, place)?,
            AnyData::I32(data) => moved(data, place)?,
            AnyData::I8(data) => moved(data, place)?,
        };
        let parent = self.node.as_ref().filter(|_| is_recording());
        let node = parent.map(|parent| {
            Node::new(&[Some(parent)], move |gradient, sink| match gradient {
                Gradient::F32(gradient) => back(gradient, &from, sink),
                Gradient::Bf16(gradient) => back(gradient, &from, sink),
            })
        });
        Ok(Self { shape: self.shape.clone(), data, node })
    }

    /// As [`AnyTensor::to_place`], to the host.
    ///
    /// Errors: those of the device.
    pub fn on_host(&self) -> Result<Self> {
        self.to_place(&Place::Host)
    }

    pub fn data(&self) -> &AnyData {
        &self.data
    }

    pub fn node(&self) -> Option<&Arc<Node>> {
        self.node.as_ref()
    }

    /// The same elements as a constant.
    pub fn detach(&self) -> Self {
        Self { node: None, ..self.clone() }
    }

    /// Computes the elements if they were deferred.
    ///
    /// Errors: those of the computation.
    pub fn force(&self) -> Result<()> {
        match &self.data {
            AnyData::F32(data) => data.force().map(drop),
            AnyData::Bf16(data) => data.force().map(drop),
            AnyData::I32(data) => data.force().map(drop),
            AnyData::I8(data) => data.force().map(drop),
        }
    }

    /// The same tensor, its elements computed.
    ///
    /// Errors: those of the computation.
    pub fn computed(self) -> Result<Self> {
        self.force()?;
        Ok(self)
    }

    /// All elements as f32, in row-major order. Panics as [`Data::get`] does: [`AnyTensor::on_host`] comes first.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        fn convert<E: Element>(data: &Data<E>) -> Vec<f32> {
            data.get().iter().map(|value| value.to_f32()).collect()
        }
        match &self.data {
            AnyData::F32(data) => data.get().to_vec(),
            AnyData::Bf16(data) => convert(data),
            AnyData::I32(data) => convert(data),
            AnyData::I8(data) => convert(data),
        }
    }

    /// As a tensor of element type E and rank R, for argument `arg` of operation `op`.
    ///
    /// Errors: [`Error::Dtype`] or [`Error::Shape`] if it is of another type or rank.
    pub fn typed<E: TensorElement, const R: usize>(&self, op: &'static str, arg: &'static str) -> Result<Tensor<E, R>> {
        let Some(data) = E::unwrap(&self.data) else {
            return Err(Error::Dtype { op, arg, expected: E::DTYPE.name().into(), got: self.dtype().name().into() });
        };
        data.force()?;
        let Ok(shape) = <[usize; R]>::try_from(self.shape.as_slice()) else {
            return Err(Error::Shape { op, arg, expected: format!("of rank {R}"), got: format!("rank {} {:?}", self.rank(), self.shape) });
        };
        Ok(Tensor::from_parts(shape, data.clone(), self.node.clone()))
    }

    /// The same elements seen with another shape of as many elements; still in the graph, since a gradient's elements
    /// keep their order.
    pub fn with_shape(&self, shape: Vec<usize>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), self.len());
        Self { shape, data: self.data.clone(), node: self.node.clone() }
    }

    /// The same elements as a leaf of the graph.
    ///
    /// Errors: [`Error::Dtype`] for integers, which have no gradient.
    pub fn leaf(&self) -> Result<Self> {
        match self.dtype() {
            Dtype::F32 | Dtype::Bf16 => Ok(Self { node: Some(Node::leaf()), ..self.clone() }),
            other => Err(Error::Dtype { op: "requires_grad", arg: "self", expected: "f32".into(), got: other.name().into() }),
        }
    }

    /// A copy of the gradient that `backward` left at this leaf, if any.
    ///
    /// Errors: [`Error::Device`] if it lies on a device without room for one more.
    pub fn gradient(&self) -> Result<Option<Self>> {
        let Some(node) = &self.node else { return Ok(None) };
        let data = node.leaf_gradient()?.map(|gradient| match gradient {
            Gradient::F32(gradient) => f32::wrap(Data::at_place(gradient)),
            Gradient::Bf16(gradient) => bf16::wrap(Data::at_place(gradient)),
        });
        Ok(data.map(|data| Self { shape: self.shape.clone(), data, node: None }))
    }

    /// Forgets the gradient of this leaf.
    pub fn clear_gradient(&self) {
        if let Some(node) = &self.node {
            node.take_leaf_gradient();
        }
    }

    /// As [`Tensor::backward`].
    pub fn backward(&self) -> Result<()> {
        fn run<E: Differentiable>(tensor: &AnyTensor, data: &Arc<Data<E>>) -> Result<()> {
            if tensor.len() != 1 {
                return Err(Error::Shape {
                    op: "backward",
                    arg: "self",
                    expected: "one element (a loss)".into(),
                    got: format!("{:?}", tensor.shape),
                });
            }
            Tensor::<E, 0>::from_parts([], data.clone(), tensor.node.clone()).backward()
        }
        match &self.data {
            AnyData::F32(data) => run(self, data),
            AnyData::Bf16(data) => run(self, data),
            _ => Err(Error::Dtype { op: "backward", arg: "self", expected: "f32".into(), got: self.dtype().name().into() }),
        }
    }
}

impl std::fmt::Debug for AnyTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor<{}>{:?}", self.dtype(), self.shape)
    }
}
