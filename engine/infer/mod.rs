//! Generation: the choice of tokens, where text ends, cached keys and values, and the scheduler of many texts. Knows models
//! and tokenizers, no training.

pub mod generate;
pub mod kv_cache;
pub mod sampler;
pub mod scheduler;
pub mod stop_text;
