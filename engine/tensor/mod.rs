//! Typed tensors, autograd and the operations on them. The only folder that names dfdx.
