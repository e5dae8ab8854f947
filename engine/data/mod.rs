//! Text to token batches: tokenizers, chat template, readers, packing, cursors. Knows no model.

pub mod bpe_trainer;
pub mod byte_alphabet;
pub mod chat_template;
pub mod chat_tokens;
pub mod mix;
pub mod pack;
pub mod random;
pub mod shuffle;
pub mod template_python;
pub mod tokenizer;
pub mod tokenizer_files;
