//! Generation: the choice of tokens, where text ends, and the loop. Knows models and tokenizers, no training.

pub mod generate;
pub mod sampler;
pub mod stop_text;
