//! Text to token batches: tokenizers, chat template, readers, packing, cursors. Knows no model.
