//! Text to token batches: tokenizers, chat template, readers, packing, cursors. Knows no model.

pub mod byte_alphabet;
pub mod random;
pub mod tokenizer;
pub mod tokenizer_files;
