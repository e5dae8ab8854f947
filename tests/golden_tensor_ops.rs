//! The generic tensor operations against PyTorch: results and gradients of every case in tests/golden/tensor_ops.json,
//! which tests/golden/make_tensor_ops.py wrote. On a GPU: tests/gpu/tensor_ops.rs.

#[path = "fixtures/tensor_ops.rs"]
mod tensor_ops;

use perilune::tensor::Place;

#[test]
fn results_and_gradients_are_those_of_pytorch() {
    tensor_ops::check_all(&Place::Host);
}
