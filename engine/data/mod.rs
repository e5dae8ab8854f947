//! Text to token batches: tokenizers, chat template, readers, packing, cursors. Knows no model.

pub mod batch_stream;
pub mod bpe_trainer;
pub mod byte_alphabet;
pub mod chat_template;
pub mod chat_tokens;
pub mod content_hash;
pub mod conversation;
pub mod cursor;
pub mod dataset;
pub mod document_index;
pub mod jsonl;
pub mod mix;
pub mod pack;
pub mod parquet;
pub mod qwen2_split;
pub mod records;
pub mod shuffle;
pub mod source;
pub mod template_python;
pub mod text;
pub mod tokenizer;
pub mod tokenizer_files;
