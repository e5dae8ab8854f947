//! Floating-point operations of a model, from its configuration alone: what a share of the machine's peak is counted
//! against. A multiplication and its addition are two. Norms, rope, softmax, gates, losses and the optimizer are left out:
//! they are bound by memory, not by arithmetic. Work done twice (recomputed layers) does not count twice.
//! Source: Kaplan et al., arXiv 2001.08361, section 2.1, with the attention counted causally and by window.

use super::config::Config;

/// The formula in words, as `--explain` prints it.
pub const FORMULA: &str = "\
FLOPs of a training step = 6 * N * tokens + 6 * H * labels + 12 * heads * head_dim * pairs
  N       weights of the matrix products one token passes: projections, feed-forward (of the experts only those it is
          sent to, and the shared one) and router; the embedding is a lookup and does not count
  H       weights of the head, which tokens without a label do not pass
  pairs   (query, key) pairs that attention scores, over all layers: length * (length + 1) / 2 a document and layer,
          fewer under a sliding window
  6, 12   forward once, backward twice (gradients of the input and of the weight, or of both factors)";

/// Weights of the matrix products that one token passes, the head included.
pub fn matmul_parameters(config: &Config) -> f64 {
    let size = |value: usize| value as f64;
    let (hidden, query, key) = (size(config.hidden), size(config.heads * config.head_dim), size(config.kv_heads * config.head_dim));
    let attention = hidden * (2.0 * query + 2.0 * key);
    let swiglu = |width: usize| 3.0 * hidden * size(width);
    let layers = (0..config.layers).map(|layer| {
        let mlp = match config.moe.as_ref().filter(|_| config.is_sparse(layer)) {
            None => swiglu(config.intermediate),
            Some(moe) => {
                let router = hidden * (size(moe.experts) + 1.0);
                router + swiglu(moe.shared_intermediate) + size(moe.experts_per_token) * swiglu(moe.moe_intermediate)
            }
        };
        attention + mlp
    });
    layers.sum::<f64>() + head_parameters(config)
}

fn head_parameters(config: &Config) -> f64 {
    (if config.score { config.hidden } else { config.vocab * config.hidden }) as f64
}

/// The head's part of [`forward_flops`] for `rows` tokens.
pub fn head_flops(config: &Config, rows: usize) -> f64 {
    2.0 * head_parameters(config) * rows as f64
}

/// Operations of the forward pass over documents of these `lengths`, `rows` tokens of which the head sees.
pub fn packed_flops(config: &Config, lengths: impl Iterator<Item = usize>, rows: usize) -> f64 {
    let body = |tokens| forward_flops(config, tokens) - head_flops(config, tokens);
    lengths.map(body).sum::<f64>() + head_flops(config, rows)
}

/// Operations of generating texts of these lengths behind a prompt that they share: it is computed once.
pub fn generation_flops(config: &Config, prompt: usize, outputs: impl Iterator<Item = usize>) -> f64 {
    let behind = |output| forward_flops(config, prompt + output) - forward_flops(config, prompt);
    packed_flops(config, std::iter::once(prompt), 0) + outputs.map(behind).sum::<f64>()
}

/// Pairs of query and key that causal attention scores in a document of `tokens`, over all layers.
pub fn attention_pairs(config: &Config, tokens: usize) -> f64 {
    let causal = |tokens: usize| tokens as f64 * (tokens as f64 + 1.0) / 2.0;
    let layer = |window: &Option<usize>| {
        // Without the triangle of pairs that lie further back than the window.
        causal(tokens) - window.map_or(0.0, |window| causal(tokens.saturating_sub(window)))
    };
    config.sliding.iter().map(layer).sum()
}

/// Operations of the forward pass over one document of `tokens`, with logits for every token.
pub fn forward_flops(config: &Config, tokens: usize) -> f64 {
    // A pair costs one product of head_dim for its score and one for its value, in every head.
    let pair = 4.0 * (config.heads * config.head_dim) as f64;
    2.0 * matmul_parameters(config) * tokens as f64 + pair * attention_pairs(config, tokens)
}

/// Operations of the forward and backward pass over one document of `tokens`, every token with a label.
pub fn train_flops(config: &Config, tokens: usize) -> f64 {
    3.0 * forward_flops(config, tokens)
}

#[cfg(test)]
mod tests {
    use super::super::presets::{preset, with_fields};
    use super::super::sizes::{parameters, tensors};
    use super::*;
    use serde_json::json;

    #[test]
    fn a_dense_model_counts_its_matrices_once() {
        // By hand for `tiny`: a layer has q and o of 256 x 256, k and v of 128 x 256, three of 704 x 256; head 4096 x 256.
        let config = preset("tiny").unwrap();
        let layer = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 704 * 256;
        assert_eq!(matmul_parameters(&config), f64::from(4 * layer + 4096 * 256));
        // And for every size: all matrices but an untied embedding.
        for name in ["0.5B", "7B", "small", "q05x4"] {
            let config = preset(name).unwrap();
            let matrices = tensors(&config).into_iter().filter(|(name, shape)| shape.len() == 2 && !name.contains("embed_tokens"));
            let sum: usize = matrices.map(|(_, shape)| shape.iter().product::<usize>()).sum();
            let tied_head = if config.tied { config.vocab * config.hidden } else { 0 };
            assert_eq!(matmul_parameters(&config), (sum + tied_head) as f64, "{name}");
        }
    }

    #[test]
    fn experts_count_as_far_as_a_token_meets_them() {
        let config = preset("Qwen2-57B-A14B").unwrap();
        // What sizes.rs calls activated holds norms and biases too.
        let (hidden, qkv) = (3584, (28 + 2 * 4) * 128);
        let vectors = 28 * (2 * hidden + qkv) + hidden;
        let want = parameters(&config).activated as f64 - f64::from(vectors) + f64::from(151_936 * hidden);
        assert_eq!(matmul_parameters(&config), want);
    }

    #[test]
    fn pairs_are_those_that_a_loop_counts() {
        let fields = json!({ "sliding_window": 5, "sliding_from_layer": 3 });
        let fields: Vec<_> = fields.as_object().unwrap().clone().into_iter().collect();
        let config = with_fields(&preset("tiny").unwrap(), &fields).unwrap();
        for tokens in [0, 1, 4, 5, 6, 33] {
            let count = |window: usize| (0..tokens).map(|query: usize| (query + 1).min(window)).sum::<usize>();
            assert_eq!(attention_pairs(&config, tokens), (3 * count(usize::MAX) + count(5)) as f64, "{tokens} tokens");
        }
    }

    #[test]
    fn the_head_counts_for_the_rows_that_it_sees() {
        let config = preset("tiny").unwrap();
        let (pair, head, layers) = (4.0 * 256.0 * 4.0, 2.0 * 4096.0 * 256.0, 2.0 * (matmul_parameters(&config) - 4096.0 * 256.0));
        // Documents of 2 and 1 tokens have 3 and 1 pairs in each of 4 layers.
        assert_eq!(packed_flops(&config, [2, 1].into_iter(), 2), 3.0 * layers + 4.0 * pair + 2.0 * head);
        assert_eq!(packed_flops(&config, [7].into_iter(), 7), forward_flops(&config, 7));
        // A prompt of 3 tokens and two texts of 1: each has one row of logits, and a pair with itself and with every token of the prompt.
        assert_eq!(generation_flops(&config, 3, [1, 1].into_iter()), 5.0 * layers + (6.0 + 2.0 * 4.0) * pair + 2.0 * head);
    }

    #[test]
    fn a_step_costs_three_forward_passes() {
        let config = preset("tiny").unwrap();
        // One token alone: 2 N and, in each of 4 layers, one pair of 4 * 256.
        assert_eq!(forward_flops(&config, 1), 2.0 * matmul_parameters(&config) + 4.0 * 4.0 * 256.0);
        assert_eq!(train_flops(&config, 512), 3.0 * forward_flops(&config, 512));
        assert_eq!(train_flops(&config, 0), 0.0);
    }
}
