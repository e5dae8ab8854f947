//! The generic tensor operations against PyTorch: results and gradients of every case in tests/golden/tensor_ops.json,
//! which tests/golden/make_tensor_ops.py wrote.

use half::bf16;
use perilune::error::Result;
use perilune::kernels::buffer::Buffer;
use perilune::kernels::element::{Dtype, Element};
use perilune::tensor::{AnyTensor, arithmetic, compare, convert, elementwise, gather, index, matmul, order, reduce, softmax};
use serde_json::Value;

fn number(value: &Value) -> f32 {
    match value.as_str() {
        Some("nan") => f32::NAN,
        Some("inf") => f32::INFINITY,
        Some("-inf") => f32::NEG_INFINITY,
        _ => value.as_f64().unwrap() as f32,
    }
}

fn values(packed: &Value) -> Vec<f32> {
    packed["values"].as_array().unwrap().iter().map(number).collect()
}

fn shape(packed: &Value) -> Vec<usize> {
    packed["shape"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
}

fn dtype(packed: &Value) -> Dtype {
    Dtype::parse(packed["dtype"].as_str().unwrap()).unwrap()
}

fn tensor(packed: &Value) -> AnyTensor {
    fn typed<E: perilune::tensor::any::TensorElement>(shape: &[usize], values: &[f32]) -> AnyTensor {
        AnyTensor::new(shape, Buffer::copy_of(&values.iter().map(|v| E::from_f32(*v)).collect::<Vec<_>>())).unwrap()
    }
    let (shape, values) = (shape(packed), values(packed));
    match dtype(packed) {
        Dtype::F32 => typed::<f32>(&shape, &values),
        Dtype::Bf16 => typed::<bf16>(&shape, &values),
        Dtype::I32 => typed::<i32>(&shape, &values),
        Dtype::I8 => typed::<i8>(&shape, &values),
    }
}

/// Named arguments of a case.
struct Args<'a>(&'a Value);

impl Args<'_> {
    fn int(&self, name: &str) -> Option<isize> {
        self.0[name].as_i64().map(|v| v as isize)
    }
    fn float(&self, name: &str) -> Option<f32> {
        self.0[name].as_f64().map(|v| v as f32)
    }
    fn flag(&self, name: &str, default: bool) -> bool {
        self.0[name].as_bool().unwrap_or(default)
    }
    fn ints(&self, name: &str) -> Option<Vec<isize>> {
        self.0[name].as_array().map(|list| list.iter().map(|v| v.as_i64().unwrap() as isize).collect())
    }
}

fn run(op: &str, x: &[AnyTensor], args: &Args) -> Result<Vec<AnyTensor>> {
    let axis = args.int("axis").unwrap_or(0);
    let axes = args.ints("axes");
    let keepdim = args.flag("keepdim", false);
    let correction = args.int("correction").unwrap_or(1) as usize;
    let one = match op {
        "neg" => elementwise::neg(&x[0]),
        "abs" => elementwise::abs(&x[0]),
        "exp" => elementwise::exp(&x[0]),
        "log" => elementwise::log(&x[0]),
        "sqrt" => elementwise::sqrt(&x[0]),
        "square" => elementwise::square(&x[0]),
        "recip" => elementwise::recip(&x[0]),
        "tanh" => elementwise::tanh(&x[0]),
        "sigmoid" => elementwise::sigmoid(&x[0]),
        "relu" => elementwise::relu(&x[0]),
        "silu" => elementwise::silu(&x[0]),
        "gelu" => elementwise::gelu(&x[0]),
        "gelu_tanh" => elementwise::gelu_tanh(&x[0]),
        "softplus" => elementwise::softplus(&x[0]),
        "sin" => elementwise::sin(&x[0]),
        "cos" => elementwise::cos(&x[0]),
        "floor" => elementwise::floor(&x[0]),
        "ceil" => elementwise::ceil(&x[0]),
        "round" => elementwise::round(&x[0]),
        "sign" => elementwise::sign(&x[0]),
        "powf" => elementwise::powf(&x[0], args.float("exponent").unwrap()),
        "clamp" => elementwise::clamp(&x[0], args.float("min"), args.float("max")),
        "add" => arithmetic::add(&x[0], &x[1]),
        "sub" => arithmetic::sub(&x[0], &x[1]),
        "mul" => arithmetic::mul(&x[0], &x[1]),
        "div" => arithmetic::div(&x[0], &x[1]),
        "maximum" => arithmetic::maximum(&x[0], &x[1]),
        "minimum" => arithmetic::minimum(&x[0], &x[1]),
        "pow" => arithmetic::pow(&x[0], &x[1]),
        "floor_div" => arithmetic::floor_div(&x[0], &x[1]),
        "modulo" => arithmetic::modulo(&x[0], &x[1]),
        "eq" => compare::eq(&x[0], &x[1]),
        "ne" => compare::ne(&x[0], &x[1]),
        "lt" => compare::lt(&x[0], &x[1]),
        "le" => compare::le(&x[0], &x[1]),
        "gt" => compare::gt(&x[0], &x[1]),
        "ge" => compare::ge(&x[0], &x[1]),
        "where" => compare::where_(&x[0], &x[1], &x[2]),
        "sum" => reduce::sum(&x[0], axes.as_deref(), keepdim),
        "mean" => reduce::mean(&x[0], axes.as_deref(), keepdim),
        "var" => reduce::var(&x[0], axes.as_deref(), correction, keepdim),
        "std" => reduce::std(&x[0], axes.as_deref(), correction, keepdim),
        "max" => reduce::max(&x[0], axes.as_deref(), keepdim),
        "min" => reduce::min(&x[0], axes.as_deref(), keepdim),
        "logsumexp" => reduce::logsumexp(&x[0], axes.as_deref(), keepdim),
        "argmax" => order::argmax(&x[0], args.int("axis"), keepdim),
        "argmin" => order::argmin(&x[0], args.int("axis"), keepdim),
        "softmax" => softmax::softmax(&x[0], axis),
        "log_softmax" => softmax::log_softmax(&x[0], axis),
        "matmul" => matmul::matmul(&x[0], &x[1]),
        "gather" => gather::gather(&x[0], axis, &x[1]),
        "index_select" => gather::index_select(&x[0], axis, &x[1]),
        "segment_sum" => gather::segment_sum(&x[0], &x[1], args.int("count").unwrap() as usize),
        "concat" => gather::concat(x, axis),
        "stack" => gather::stack(x, axis),
        "slice" => index::slice(&x[0], axis, args.int("start").unwrap(), args.int("stop"), args.int("step").unwrap() as usize),
        "select" => index::select(&x[0], axis, args.int("index").unwrap()),
        "permute" => index::permute(&x[0], &axes.unwrap()),
        "transpose" => index::transpose(&x[0], args.int("first").unwrap(), args.int("second").unwrap()),
        "reshape" => index::reshape(&x[0], &args.ints("shape").unwrap()),
        "squeeze" => index::squeeze(&x[0], args.int("axis")),
        "unsqueeze" => index::unsqueeze(&x[0], axis),
        "flip" => index::flip(&x[0], &axes.unwrap()),
        "broadcast_to" => {
            let shape: Vec<usize> = args.ints("shape").unwrap().iter().map(|v| *v as usize).collect();
            index::broadcast_to(&x[0], &shape)
        }
        "cumsum" => order::cumsum(&x[0], axis),
        "to" => convert::to_dtype(&x[0], Dtype::parse(args.0["dtype"].as_str().unwrap()).unwrap()),
        "sort" => return order::sort(&x[0], axis, args.flag("descending", false)).map(|(a, b)| vec![a, b]),
        "topk" => return order::topk(&x[0], args.int("k").unwrap() as usize, axis, args.flag("largest", true)).map(|(a, b)| vec![a, b]),
        other => panic!("the test does not know {other}"),
    };
    one.map(|one| vec![one])
}

/// f32: a few roundings of functions that two libraries approximate; bf16: one rounding (2^-8) that may fall
/// the other way.
fn tolerance(dtype: Dtype) -> (f32, f32) {
    match dtype {
        Dtype::Bf16 => (8e-3, 1e-6),
        Dtype::F32 => (4e-6, 2e-6),
        Dtype::I32 | Dtype::I8 => (0.0, 0.0),
    }
}

fn compare_values(got: &AnyTensor, want: &Value) -> std::result::Result<(), String> {
    if got.dtype() != dtype(want) || got.shape() != shape(want) {
        return Err(format!("{got:?} against {} {:?}", want["dtype"], shape(want)));
    }
    let (relative, absolute) = tolerance(got.dtype());
    for (index, (got, want)) in got.to_f32_vec().iter().zip(&values(want)).enumerate() {
        let same = got == want || (got.is_nan() && want.is_nan());
        let close = (got - want).abs() <= absolute + relative * want.abs();
        if !same && !close {
            return Err(format!("element {index}: {got} against {want}"));
        }
    }
    Ok(())
}

/// Runs backwards with the gradient of the result given.
fn backward(y: &AnyTensor, weight: &Value) -> Result<()> {
    let (flat, weight) = (y.with_shape(vec![y.len()]), values(weight));
    match y.dtype() {
        Dtype::Bf16 => {
            let weight: Vec<bf16> = weight.iter().map(|v| <bf16 as Element>::from_f32(*v)).collect();
            flat.typed::<bf16, 1>("backward", "y")?.backward_with(Buffer::copy_of(&weight))
        }
        _ => flat.typed::<f32, 1>("backward", "y")?.backward_with(Buffer::copy_of(&weight)),
    }
}

fn check(case: &Value) -> std::result::Result<(), String> {
    let has_gradients = case.get("weight").is_some();
    let inputs = case["inputs"].as_array().unwrap().iter().enumerate().map(|(index, packed)| {
        let x = tensor(packed);
        if has_gradients && !case["grads"][index].is_null() { x.leaf().unwrap() } else { x }
    });
    let inputs: Vec<AnyTensor> = inputs.collect();
    let got = run(case["op"].as_str().unwrap(), &inputs, &Args(&case["args"])).map_err(|error| error.to_string())?;
    for (index, want) in case["outputs"].as_array().unwrap().iter().enumerate() {
        compare_values(&got[index], want).map_err(|what| format!("result {index}: {what}"))?;
    }
    if has_gradients {
        backward(&got[0], &case["weight"]).map_err(|error| error.to_string())?;
        for (index, want) in case["grads"].as_array().unwrap().iter().enumerate().filter(|(_, want)| !want.is_null()) {
            let gradient = inputs[index].gradient().ok_or(format!("input {index} got no gradient"))?;
            compare_values(&gradient, want).map_err(|what| format!("gradient {index}: {what}"))?;
        }
    }
    Ok(())
}

#[test]
fn results_and_gradients_are_those_of_pytorch() {
    let golden: Value = serde_json::from_str(include_str!("golden/tensor_ops.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 200, "only {} cases", cases.len());
    let wrong: Vec<String> = cases
        .iter()
        .enumerate()
        .filter_map(|(number, case)| {
            let what = check(case).err()?;
            Some(format!("case {number}, {} {} {}: {what}", case["op"], case["args"], case["note"]))
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {} cases differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}
