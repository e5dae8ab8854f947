//! The operations on tensors that scripts may call: a table, one line each. What an operation computes, and its errors,
//! stand with it in `engine/tensor/`; here are only names, arguments and defaults.

use super::call::{Answer, Call, Failed, Function, as_tensor};
use super::globals::take_counters;
use super::memory::tensor_made;
use super::raise::raise;
use super::tensor::{MADE, TensorObject, axes, made, number_or_tensor, operand, tensor};
use crate::error::{Error, Result};
use crate::kernels::element::Dtype;
use crate::kernels::random::Stream;
use crate::tensor::{
    AnyTensor, Place, arithmetic, compare, construct, convert, elementwise, gather, index, matmul, order, reduce, softmax,
};
use mlua::{MetaMethod, UserDataMethods, Value};

/// x -> f(x).
macro_rules! unary {
    ($($name:ident in $module:ident),* $(,)?) => {
        &[$(Function {
            op: concat!("Tensor:", stringify!($name)),
            params: &[],
            call: |call| tensor(call, $module::$name(&call.this()?)?),
        }),*]
    };
}

/// (x, other) -> f(x, other), where the other may be a number.
macro_rules! binary {
    ($($name:ident in $module:ident),* $(,)?) => {
        &[$(Function {
            op: concat!("Tensor:", stringify!($name)),
            params: &["other"],
            call: |call| {
                let x = call.this()?;
                tensor(call, $module::$name(&x, &operand(call, 0, &x)?)?)
            },
        }),*]
    };
}

/// (x, axis?, options?) -> f(x, axes, keepdim).
macro_rules! reduction {
    ($($name:ident),* $(,)?) => {
        &[$(Function {
            op: concat!("Tensor:", stringify!($name)),
            params: &["axis?", "options?"],
            call: |call| {
                let keepdim = call.options(1, &["keepdim"])?.boolean("keepdim")?.unwrap_or(false);
                tensor(call, reduce::$name(&call.this()?, axes(call, 0)?.as_deref(), keepdim)?)
            },
        }),*]
    };
}

/// Element by element, on one tensor.
pub const UNARY: &[Function] = unary![
    abs in elementwise, ceil in elementwise, cos in elementwise, exp in elementwise, floor in elementwise,
    gelu in elementwise, gelu_tanh in elementwise, is_finite in compare, is_nan in compare, log in elementwise,
    neg in elementwise, recip in elementwise, relu in elementwise, round in elementwise, sigmoid in elementwise,
    sign in elementwise, silu in elementwise, sin in elementwise, softplus in elementwise, sqrt in elementwise,
    square in elementwise, tanh in elementwise,
];

/// On two tensors, or a tensor and a number.
pub const BINARY: &[Function] = binary![
    add in arithmetic, div in arithmetic, eq in compare, floor_div in arithmetic, ge in compare, gt in compare,
    le in compare, lt in compare, maximum in arithmetic, minimum in arithmetic, modulo in arithmetic, mul in arithmetic,
    ne in compare, pow in arithmetic, sub in arithmetic,
];

/// Over some axes, or all.
pub const REDUCTIONS: &[Function] = reduction![logsumexp, max, mean, min, sum];

/// Those with arguments of their own.
pub const OTHERS: &[Function] = &[
    Function { op: "Tensor:argmax", params: &["axis?", "options?"], call: |call| extreme_index(call, order::argmax) },
    Function { op: "Tensor:argmin", params: &["axis?", "options?"], call: |call| extreme_index(call, order::argmin) },
    Function {
        op: "Tensor:broadcast_to",
        params: &["shape"],
        call: |call| tensor(call, index::broadcast_to(&call.this()?, &call.shape(0)?)?),
    },
    Function {
        op: "Tensor:clamp",
        params: &["options"],
        call: |call| {
            let options = call.options(0, &["min", "max"])?;
            let (min, max) = (options.number("min")?, options.number("max")?);
            tensor(call, elementwise::clamp(&call.this()?, min.map(|v| v as f32), max.map(|v| v as f32))?)
        },
    },
    Function { op: "Tensor:cumsum", params: &["axis"], call: |call| tensor(call, order::cumsum(&call.this()?, axis(call, 0)?)?) },
    Function {
        op: "Tensor:flip",
        params: &["axis?"],
        call: |call| {
            let x = call.this()?;
            let all = (0..x.rank() as isize).collect();
            tensor(call, index::flip(&x, &axes(call, 0)?.unwrap_or(all))?)
        },
    },
    Function {
        op: "Tensor:gather",
        params: &["axis", "index"],
        call: |call| tensor(call, gather::gather(&call.this()?, axis(call, 0)?, &call.tensor(1)?)?),
    },
    Function {
        op: "Tensor:index_select",
        params: &["axis", "index"],
        call: |call| tensor(call, gather::index_select(&call.this()?, axis(call, 0)?, &call.tensor(1)?)?),
    },
    Function {
        op: "Tensor:log_softmax",
        params: &["axis?"],
        call: |call| tensor(call, softmax::log_softmax(&call.this()?, axis_or(call, 0, -1)?)?),
    },
    Function { op: "Tensor:matmul", params: &["other"], call: |call| tensor(call, matmul::matmul(&call.this()?, &call.tensor(0)?)?) },
    Function {
        op: "Tensor:permute",
        params: &["axes"],
        call: |call| {
            let axes: Vec<isize> = call.integers(0)?.into_iter().map(|axis| axis as isize).collect();
            tensor(call, index::permute(&call.this()?, &axes)?)
        },
    },
    Function {
        op: "Tensor:reshape",
        params: &["shape"],
        call: |call| {
            let shape: Vec<isize> = call.integers(0)?.into_iter().map(|size| size as isize).collect();
            tensor(call, index::reshape(&call.this()?, &shape)?)
        },
    },
    Function {
        op: "Tensor:segment_sum",
        params: &["ids", "count"],
        call: |call| tensor(call, gather::segment_sum(&call.this()?, &call.tensor(0)?, call.count(1)?)?),
    },
    Function {
        op: "Tensor:select",
        params: &["axis", "index"],
        call: |call| tensor(call, index::select(&call.this()?, axis(call, 0)?, axis(call, 1)?)?),
    },
    Function {
        op: "Tensor:slice",
        params: &["axis", "start", "stop?", "options?"],
        call: |call| {
            let stop = if call.is_given(2) { Some(axis(call, 2)?) } else { None };
            let step = call.options(3, &["step"])?.count("step", 1)?.unwrap_or(1);
            tensor(call, index::slice(&call.this()?, axis(call, 0)?, axis(call, 1)?, stop, step)?)
        },
    },
    Function {
        op: "Tensor:softmax",
        params: &["axis?"],
        call: |call| tensor(call, softmax::softmax(&call.this()?, axis_or(call, 0, -1)?)?),
    },
    Function {
        op: "Tensor:sort",
        params: &["axis?", "options?"],
        call: |call| {
            let descending = call.options(1, &["descending"])?.boolean("descending")?.unwrap_or(false);
            pair(call, order::sort(&call.this()?, axis_or(call, 0, -1)?, descending)?)
        },
    },
    Function {
        op: "Tensor:squeeze",
        params: &["axis?"],
        call: |call| {
            let axis = if call.is_given(0) { Some(axis(call, 0)?) } else { None };
            tensor(call, index::squeeze(&call.this()?, axis)?)
        },
    },
    Function { op: "Tensor:std", params: &["axis?", "options?"], call: |call| spread(call, reduce::std) },
    Function {
        op: "Tensor:to",
        params: &["dtype_or_device"],
        call: |call| {
            let (x, name) = (call.this()?, call.string(0)?);
            match Dtype::parse(&name) {
                Some(dtype) => tensor(call, convert::to_dtype(&x, dtype)?),
                None => match Place::named(&name) {
                    Err(Error::Argument { .. }) => {
                        Err(call.wrong(0, "\"f32\", \"bf16\", \"i32\", \"i8\", \"cpu\", \"cuda\" or \"cuda:1\""))
                    }
                    place => tensor(call, x.to_place(&place?)?),
                },
            }
        },
    },
    Function {
        op: "Tensor:topk",
        params: &["k", "axis?", "options?"],
        call: |call| {
            let largest = call.options(2, &["largest"])?.boolean("largest")?.unwrap_or(true);
            pair(call, order::topk(&call.this()?, call.count(0)?, axis_or(call, 1, -1)?, largest)?)
        },
    },
    Function {
        op: "Tensor:transpose",
        params: &["first", "second"],
        call: |call| tensor(call, index::transpose(&call.this()?, axis(call, 0)?, axis(call, 1)?)?),
    },
    Function { op: "Tensor:unsqueeze", params: &["axis"], call: |call| tensor(call, index::unsqueeze(&call.this()?, axis(call, 0)?)?) },
    Function { op: "Tensor:var", params: &["axis?", "options?"], call: |call| spread(call, reduce::var) },
];

/// Functions of `engine.tensor` that make tensors from sizes, or one of several.
pub const FUNCTIONS: &[Function] = &[
    Function {
        op: "tensor.arange",
        params: &["start", "stop", "options?"],
        call: |call| {
            let options = call.options(2, &["device", "dtype", "step"])?;
            let (step, (dtype, place)) = (options.number("step")?.unwrap_or(1.0), made(call, &options)?);
            tensor(call, construct::arange(call.number(0)?, call.number(1)?, step, dtype)?.to_place(&place)?)
        },
    },
    Function {
        op: "tensor.concat",
        params: &["parts", "axis?"],
        call: |call| tensor(call, gather::concat(&call.tensors(0)?, axis_or(call, 1, 0)?)?),
    },
    Function {
        op: "tensor.eye",
        params: &["size", "options?"],
        call: |call| {
            let (dtype, place) = made(call, &call.options(1, MADE)?)?;
            tensor(call, construct::eye(call.count(0)?, dtype)?.to_place(&place)?)
        },
    },
    Function {
        op: "tensor.full",
        params: &["shape", "value", "options?"],
        call: |call| {
            let (dtype, place) = made(call, &call.options(2, MADE)?)?;
            tensor(call, construct::full(&call.shape(0)?, call.number(1)?, dtype)?.to_place(&place)?)
        },
    },
    Function {
        op: "tensor.linspace",
        params: &["start", "stop", "count", "options?"],
        call: |call| {
            let (dtype, place) = made(call, &call.options(3, MADE)?)?;
            tensor(call, construct::linspace(call.number(0)?, call.number(1)?, call.count(2)?, dtype)?.to_place(&place)?)
        },
    },
    Function { op: "tensor.ones", params: &["shape", "options?"], call: |call| shaped(call, construct::ones) },
    Function { op: "tensor.rand", params: &["shape", "options?"], call: |call| random(call, construct::rand) },
    Function {
        op: "tensor.randint",
        params: &["low", "high", "shape", "options?"],
        call: |call| {
            let bound = |index| i32::try_from(call.integer(index)?).map_err(|_| call.wrong(index, "an integer that fits i32"));
            let (shape, (_, place)) = (call.shape(2)?, made(call, &call.options(3, &["device"])?)?);
            let (stream, first) = take_counters(call.lua, count_of(call.op, &shape)? as u64);
            tensor(call, construct::randint(bound(0)?, bound(1)?, &shape, stream, first)?.to_place(&place)?)
        },
    },
    Function { op: "tensor.randn", params: &["shape", "options?"], call: |call| random(call, construct::randn) },
    Function {
        op: "tensor.stack",
        params: &["parts", "axis?"],
        call: |call| tensor(call, gather::stack(&call.tensors(0)?, axis_or(call, 1, 0)?)?),
    },
    Function {
        op: "tensor.where",
        params: &["mask", "a", "b"],
        call: |call| {
            // A number takes the element type of the tensor beside it.
            let like = as_tensor(&call.value(1)).or(as_tensor(&call.value(2)));
            let like = like.ok_or_else(|| call.wrong(1, "a tensor (at most one of a and b may be a number)"))?;
            tensor(call, compare::where_(&call.tensor(0)?, &operand(call, 1, &like)?, &operand(call, 2, &like)?)?)
        },
    },
    Function { op: "tensor.zeros", params: &["shape", "options?"], call: |call| shaped(call, construct::zeros) },
];

/// Lua's operators; a number may stand on either side.
pub fn operators<M: UserDataMethods<TensorObject>>(methods: &mut M) {
    /// With a number as exponent the derivative by it is not computed, and its own sign may be negative.
    fn power(a: &AnyTensor, b: &AnyTensor) -> Result<AnyTensor> {
        if b.rank() == 0 && b.node().is_none() && b.device().is_none() {
            return elementwise::powf(a, b.to_f32_vec()[0]);
        }
        arithmetic::pow(a, b)
    }
    let table: [(MetaMethod, &'static str, Operation); 7] = [
        (MetaMethod::Add, "+", arithmetic::add),
        (MetaMethod::Sub, "-", arithmetic::sub),
        (MetaMethod::Mul, "*", arithmetic::mul),
        (MetaMethod::Div, "/", arithmetic::div),
        (MetaMethod::Mod, "%", arithmetic::modulo),
        (MetaMethod::IDiv, "//", arithmetic::floor_div),
        (MetaMethod::Pow, "^", power),
    ];
    for (name, op, operation) in table {
        methods.add_meta_function(name, move |lua, (a, b): (Value, Value)| {
            let run = || -> Failed<TensorObject> {
                let like = as_tensor(&a).or_else(|| as_tensor(&b)).expect("Lua calls a tensor's operator with a tensor");
                let result = operation(&number_or_tensor(op, "a", &a, &like)?, &number_or_tensor(op, "b", &b, &like)?)?;
                tensor_made(lua)?;
                Ok(TensorObject(result))
            };
            run().map_err(|failure| raise(lua, failure))
        });
    }
    methods.add_meta_function(MetaMethod::Unm, |lua, (x, _): (Value, Value)| {
        let x = as_tensor(&x).expect("Lua calls a tensor's operator with a tensor");
        x.computed().and_then(|x| elementwise::neg(&x)).map(TensorObject).map_err(|error| raise(lua, error.into()))
    });
}

type Operation = fn(&AnyTensor, &AnyTensor) -> Result<AnyTensor>;

fn count_of(op: &'static str, shape: &[usize]) -> Result<usize> {
    shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size)).ok_or_else(|| Error::Shape {
        op,
        arg: "shape",
        expected: "a number of elements that fits memory".into(),
        got: format!("{shape:?}"),
    })
}

fn axis(call: &Call, index: usize) -> Failed<isize> {
    Ok(call.integer(index)? as isize)
}

fn axis_or(call: &Call, index: usize, default: isize) -> Failed<isize> {
    if call.is_given(index) { axis(call, index) } else { Ok(default) }
}

fn pair(call: &Call, (values, indices): (AnyTensor, AnyTensor)) -> Answer {
    tensor_made(call.lua)?;
    call.give((TensorObject(values), TensorObject(indices)))
}

fn extreme_index(call: &Call, f: fn(&AnyTensor, Option<isize>, bool) -> Result<AnyTensor>) -> Answer {
    let keepdim = call.options(1, &["keepdim"])?.boolean("keepdim")?.unwrap_or(false);
    let axis = if call.is_given(0) { Some(axis(call, 0)?) } else { None };
    tensor(call, f(&call.this()?, axis, keepdim)?)
}

/// A variance or deviation: of a tensor, over axes, with a correction, keeping the axes or not.
type Spread = fn(&AnyTensor, Option<&[isize]>, usize, bool) -> Result<AnyTensor>;

fn spread(call: &Call, f: Spread) -> Answer {
    let options = call.options(1, &["keepdim", "correction"])?;
    let (keepdim, correction) = (options.boolean("keepdim")?.unwrap_or(false), options.count("correction", 0)?.unwrap_or(1));
    tensor(call, f(&call.this()?, axes(call, 0)?.as_deref(), correction, keepdim)?)
}

fn shaped(call: &Call, f: fn(&[usize], Dtype) -> Result<AnyTensor>) -> Answer {
    let (dtype, place) = made(call, &call.options(1, MADE)?)?;
    tensor(call, f(&call.shape(0)?, dtype)?.to_place(&place)?)
}

fn random(call: &Call, f: fn(&[usize], Dtype, Stream, u64) -> Result<AnyTensor>) -> Answer {
    let (dtype, place) = made(call, &call.options(1, MADE)?)?;
    let shape = call.shape(0)?;
    let (stream, first) = take_counters(call.lua, count_of(call.op, &shape)? as u64);
    tensor(call, f(&shape, dtype, stream, first)?.to_place(&place)?)
}
