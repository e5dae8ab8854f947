//! `engine.tensor`: tensors as scripts hold them. This file makes them, takes them apart and differentiates; the
//! operations on them are listed in `tensor_operations.rs`. Axes and indices count from 0, as token ids do.

use super::call::{Answer, Call, Class, Failed, Field, Function, as_integer, as_tensor, describe, list_of, register};
use super::memory::tensor_made;
use super::options::Options;
use super::raise::{Failure, raise};
use super::tensor_operations as operations;
use super::tensor_text::tensor_text;
use crate::error::Error;
use crate::kernels::buffer::Buffer;
use crate::kernels::element::{Dtype, Element};
use crate::tensor::any::AnyData;
use crate::tensor::autograd::with_recording;
use crate::tensor::{AnyTensor, Place};
use half::bf16;
use mlua::{IntoLua, Lua, MetaMethod, MultiValue, UserData, UserDataFields, UserDataMethods, Value};

/// A tensor in Lua. The handle is a few bytes; `memory.rs` tells the collector about the rest.
pub struct TensorObject(pub AnyTensor);

impl Class for TensorObject {
    const NAME: &'static str = "Tensor";
    const METHODS: &'static [&'static [Function]] =
        &[METHODS, operations::UNARY, operations::BINARY, operations::REDUCTIONS, operations::OTHERS];
    const FIELDS: &'static [Field<Self>] = FIELDS;
}

/// Makers of tensors, and what concerns no single one.
pub const FUNCTIONS: &[Function] = &[
    Function {
        op: "tensor.new",
        params: &["values", "options?"],
        call: |call| {
            let (dtype, place) = made(call, &call.options(1, MADE)?)?;
            let mut shape = Vec::new();
            let mut values = Vec::new();
            read_nested(call, &call.value(0), 0, &mut shape, &mut values)?;
            tensor(call, from_numbers(call.op, &shape, &values, dtype)?.to_place(&place)?)
        },
    },
    Function {
        op: "tensor.no_grad",
        params: &["body"],
        call: |call| {
            let body = call.function(0)?;
            Ok(with_recording(false, || body.call::<MultiValue>(()))?)
        },
    },
];

const METHODS: &[Function] = &[
    Function { op: "Tensor:backward", params: &[], call: |call| this_done(call, |x| x.backward()) },
    Function { op: "Tensor:detach", params: &[], call: |call| tensor(call, call.this_deferred()?.detach()) },
    Function {
        op: "Tensor:item",
        params: &[],
        call: |call| {
            let x = call.this()?;
            if x.len() != 1 {
                let got = format!("{:?}", x.shape());
                return Err(Error::Shape { op: call.op, arg: "self", expected: "one element".into(), got }.into());
            }
            call.give(numbers(&x)?.remove(0))
        },
    },
    Function { op: "Tensor:requires_grad", params: &[], call: |call| tensor(call, call.this_deferred()?.leaf()?) },
    Function {
        op: "Tensor:to_table",
        params: &[],
        call: |call| {
            let x = call.this()?;
            let values = numbers(&x)?;
            call.give(nest(call.lua, x.shape(), &values)?)
        },
    },
    Function {
        op: "Tensor:zero_grad",
        params: &[],
        call: |call| {
            call.this_deferred()?.clear_gradient();
            call.done()
        },
    },
];

const FIELDS: &[Field<TensorObject>] = &[
    Field { name: "count", get: |_, x| Ok(Value::Integer(x.0.len() as i64)) },
    Field { name: "device", get: |lua, x| Ok(Value::String(lua.create_string(x.0.place().to_string())?)) },
    Field { name: "dtype", get: |lua, x| Ok(Value::String(lua.create_string(x.0.dtype().name())?)) },
    Field {
        name: "grad",
        get: |lua, x| match x.0.gradient()? {
            Some(gradient) => Ok(TensorObject(gradient).into_lua(lua)?),
            None => Ok(Value::Nil),
        },
    },
    Field { name: "rank", get: |_, x| Ok(Value::Integer(x.0.rank() as i64)) },
    Field { name: "shape", get: |lua, x| Ok(Value::Table(lua.create_sequence_from(x.0.shape().iter().map(|size| *size as i64))?)) },
];

impl UserData for TensorObject {
    fn add_fields<F: UserDataFields<Self>>(fields: &mut F) {
        super::call::name(fields);
    }

    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        register(methods);
        operations::operators(methods);
        methods.add_meta_method(MetaMethod::ToString, |lua, this, ()| match this.0.on_host() {
            Ok(x) => Ok(tensor_text(&x, &this.0.place())),
            Err(error) => Err(raise(lua, error.into())),
        });
        for order in [MetaMethod::Lt, MetaMethod::Le] {
            methods.add_meta_function(order, |lua, _: MultiValue| -> mlua::Result<bool> {
                let what = "< and > do not compare tensors; use x:lt(y), le, gt, ge for each element, or x:item() of one";
                Err(raise(lua, Failure::message(what)))
            });
        }
        methods.add_meta_function(MetaMethod::Len, |lua, x: Value| -> mlua::Result<()> {
            let what = format!("a tensor has no single length ({}); use x.shape[1], x.count or x.rank", describe(&x));
            Err(raise(lua, Failure::message(what)))
        });
    }
}

/// A tensor as the answer of a call; the collector hears of it.
pub fn tensor(call: &Call, tensor: AnyTensor) -> Answer {
    tensor_made(call.lua)?;
    call.give(TensorObject(tensor))
}

/// A tensor as a Lua value; the collector hears of it.
pub fn tensor_value(lua: &Lua, tensor: AnyTensor) -> Failed<Value> {
    tensor_made(lua)?;
    Ok(TensorObject(tensor).into_lua(lua)?)
}

fn this_done(call: &Call, body: fn(&AnyTensor) -> crate::error::Result<()>) -> Answer {
    body(&call.this_deferred()?)?;
    call.done()
}

/// The element type that an option names; f32 if none does.
pub fn dtype_of(call: &Call, name: Option<String>) -> Failed<Dtype> {
    let Some(name) = name else { return Ok(Dtype::F32) };
    let known = "\"f32\", \"bf16\", \"i32\" or \"i8\"";
    Dtype::parse(&name).ok_or_else(|| Error::argument(call.op, "dtype", known, format!("\"{name}\"")).into())
}

/// Options of functions that make tensors.
pub const MADE: &[&str] = &["device", "dtype"];

/// The element type and the place that options name; f32 and the host if they do not.
pub fn made(call: &Call, options: &Options) -> Failed<(Dtype, Place)> {
    let place = options.string("device")?.map_or(Ok(Place::Host), |name| Place::named(&name))?;
    Ok((dtype_of(call, options.string("dtype")?)?, place))
}

/// The most axes of a tensor that is written out.
const DEPTH_MAX: usize = 32;

/// Reads nested tables of numbers; the first entries give the shape, and every other entry must agree.
fn read_nested(call: &Call, value: &Value, depth: usize, shape: &mut Vec<usize>, values: &mut Vec<f64>) -> Failed<()> {
    let fail = |got: String| -> Failure {
        let expected = "numbers in nested lists of equal lengths".to_string();
        Error::argument(call.op, "values", expected, got).into()
    };
    match value {
        // A list that contains itself has no end.
        Value::Table(_) if depth > DEPTH_MAX => Err(fail(format!("lists in each other, {depth} deep"))),
        Value::Table(table) => {
            let entries = list_of(table)?.map_err(fail)?;
            let count = entries.len();
            let known = depth < shape.len();
            if !known && !values.is_empty() {
                return Err(fail(format!("a list among numbers, at depth {depth}")));
            }
            if !known {
                shape.push(count);
            } else if shape[depth] != count {
                return Err(fail(format!("a list of {count} beside one of {}, at depth {depth}", shape[depth])));
            }
            for entry in &entries {
                read_nested(call, entry, depth + 1, shape, values)?;
            }
            Ok(())
        }
        Value::Integer(_) | Value::Number(_) if depth != shape.len() => Err(fail(format!("a number among lists, at depth {depth}"))),
        Value::Integer(value) => {
            values.push(*value as f64);
            Ok(())
        }
        Value::Number(value) => {
            values.push(*value);
            Ok(())
        }
        other => Err(fail(describe(other))),
    }
}

/// A tensor of `values`, which must be whole numbers in range for an integer type.
fn from_numbers(op: &'static str, shape: &[usize], values: &[f64], dtype: Dtype) -> Failed<AnyTensor> {
    fn integers<E: Element>(op: &'static str, values: &[f64], low: f64, high: f64, convert: fn(f64) -> E) -> Failed<Buffer<E>> {
        if let Some(bad) = values.iter().find(|value| value.fract() != 0.0 || !(low..=high).contains(*value)) {
            let expected = format!("whole numbers from {low} to {high} for {}", E::DTYPE);
            return Err(Error::argument(op, "values", expected, format!("{bad:?}")).into());
        }
        Ok(Buffer::copy_of(&values.iter().map(|value| convert(*value)).collect::<Vec<_>>()))
    }
    let made = match dtype {
        Dtype::F32 => AnyTensor::new(shape, Buffer::copy_of(&values.iter().map(|value| *value as f32).collect::<Vec<_>>())),
        Dtype::Bf16 => {
            let values: Vec<bf16> = values.iter().map(|value| <bf16 as Element>::from_f32(*value as f32)).collect();
            AnyTensor::new(shape, Buffer::copy_of(&values))
        }
        Dtype::I32 => AnyTensor::new(shape, integers(op, values, f64::from(i32::MIN), f64::from(i32::MAX), |value| value as i32)?),
        Dtype::I8 => AnyTensor::new(shape, integers(op, values, -128.0, 127.0, |value| value as i8)?),
    };
    Ok(made?)
}

/// All elements as Lua numbers; integers stay integers. Those on a device are fetched.
fn numbers(x: &AnyTensor) -> Failed<Vec<Value>> {
    let x = x.on_host()?;
    Ok(match x.data() {
        AnyData::I32(data) => data.get().iter().map(|value| Value::Integer(i64::from(*value))).collect(),
        AnyData::I8(data) => data.get().iter().map(|value| Value::Integer(i64::from(*value))).collect(),
        _ => x.to_f32_vec().into_iter().map(|value| Value::Number(f64::from(value))).collect(),
    })
}

fn nest(lua: &Lua, shape: &[usize], values: &[Value]) -> mlua::Result<Value> {
    let Some((size, rest)) = shape.split_first() else { return Ok(values[0].clone()) };
    let inner: usize = rest.iter().product();
    let parts = (0..*size).map(|index| nest(lua, rest, &values[index * inner..(index + 1) * inner]));
    let parts = parts.collect::<mlua::Result<Vec<_>>>()?;
    Ok(Value::Table(lua.create_sequence_from(parts)?))
}

/// Argument `index` as a tensor: one, or a number that becomes a tensor of no axes with the element type of `like`, beside it.
pub fn operand(call: &Call, index: usize, like: &AnyTensor) -> Failed<AnyTensor> {
    number_or_tensor(call.op, call.param(index), &call.value(index), like)
}

/// As [`operand`], for operators, which are no calls.
pub fn number_or_tensor(op: &'static str, arg: &'static str, value: &Value, like: &AnyTensor) -> Failed<AnyTensor> {
    if let Some(tensor) = as_tensor(value) {
        return Ok(tensor.computed()?);
    }
    match value {
        Value::Integer(number) => Ok(from_numbers(op, &[], &[*number as f64], like.dtype())?.to_place(&like.place())?),
        Value::Number(number) => Ok(from_numbers(op, &[], &[*number], like.dtype())?.to_place(&like.place())?),
        other => Err(Error::argument(op, arg, "a tensor or a number", describe(other)).into()),
    }
}

/// A list of axes: one integer or a list of them; none if not given, which means all.
pub fn axes(call: &Call, index: usize) -> Failed<Option<Vec<isize>>> {
    match call.value(index) {
        Value::Nil => Ok(None),
        Value::Table(_) => Ok(Some(call.integers(index)?.into_iter().map(|axis| axis as isize).collect())),
        value => match as_integer(&value) {
            Some(axis) => Ok(Some(vec![axis as isize])),
            None => Err(call.wrong(index, "an axis or a list of axes")),
        },
    }
}
