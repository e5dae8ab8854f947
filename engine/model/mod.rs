//! The Qwen2.5 graph: configuration, parameter names, layers, dense and mixture of experts.
