//! Laws that hold bit for bit: a sequence's numbers do not depend on what else is in the batch, on the order of packing, on
//! the number of threads, or on recomputation. Sizes are odd on purpose, and large enough that products cut their
//! reduction into blocks, attention its keys, and the loss its rows.

#[path = "fixtures/f32_on_amx.rs"]
mod f32_on_amx;
mod fixtures;

use fixtures::{Batch, clear_gradients, targets};
use perilune::data::pack::TokenBatch;
use perilune::infer::generate::generate;
use perilune::infer::sampler::Rules;
use perilune::infer::scheduler::Job;
use perilune::kernels::buffer::Buffer;
use perilune::kernels::cpu::threads::set_threads;
use perilune::kernels::element::Dtype;
use perilune::model::config::Config;
use perilune::model::graph::Packed;
use perilune::model::paged::NewTokens;
use perilune::model::{Lora, Model};
use perilune::tensor::AnyTensor;
use perilune::train::optimizer::{AdamW, Settings};
use serde_json::{Value, json};
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

const VOCAB: usize = 301;

/// The number of threads is the process's, and so are the workers: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The shapes under test.
fn configs() -> Vec<(&'static str, Config)> {
    let dense = json!({
        "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": 69, "intermediate_size": 805, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 22, "rope_theta": 1e4, "max_position_embeddings": 512,
        "tie_word_embeddings": true, "initializer_range": 0.08,
    });
    let with = |changes: Value| {
        let mut config = dense.clone();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config
    };
    let sliding = with(json!({"use_sliding_window": true, "sliding_window": 37, "max_window_layers": 1, "tie_word_embeddings": false}));
    let experts = with(json!({
        "model_type": "qwen2_moe", "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 417,
        "shared_expert_intermediate_size": 131, "norm_topk_prob": true, "mlp_only_layers": [],
    }));
    let mixed = with(json!({
        "model_type": "qwen2_moe", "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 33, "decoder_sparse_step": 2,
        "head_dim": 32,
        "shared_expert_intermediate_size": 65, "norm_topk_prob": false, "tie_word_embeddings": false,
    }));
    let named = [("dense, tied", dense.clone()), ("sliding", sliding), ("experts", experts), ("mixed layers", mixed)];
    named.map(|(name, config)| (name, Config::parse(Path::new("config.json"), &config.to_string()).unwrap())).into()
}

/// The kinds of model under test that train, in both element types.
fn models() -> Vec<(String, Model)> {
    let mut models = Vec::new();
    for (name, config) in configs() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            models.push((format!("{name}, {dtype}"), Model::random(config.clone(), dtype, 11).unwrap()));
            if ["sliding", "experts"].contains(&name) {
                for dora in [false, true] {
                    let model = Model::random(config.clone(), dtype, 11).unwrap();
                    adapt(&model, dora);
                    models.push((format!("{name}, {dtype}, {}", if dora { "DoRA" } else { "adapter" }), model));
                }
            }
        }
    }
    models
}

/// Those, and with weights of 8 bits.
fn models_and_int8() -> Vec<(String, Model)> {
    let int8 = |(name, config): (_, Config)| (format!("{name}, int8"), Model::random(config, Dtype::I8, 11).unwrap());
    models().into_iter().chain(configs().into_iter().map(int8)).collect()
}

/// Puts an adapter on every projection, on the head and, without DoRA, on the embedding, with a second factor that is not zero.
fn adapt(model: &Model, dora: bool) {
    let targets: &[&str] = if dora { &["all-linear", "lm_head"] } else { &["all-linear", "lm_head", "embed_tokens"] };
    let targets = targets.iter().map(|target| target.to_string()).collect();
    model.adapt(Lora { rank: 5, alpha: 4.0, dora, targets, ..Lora::default() }, 3).unwrap();
    let is_second = |name: &str| name.ends_with("lora_B.weight") || name.ends_with("lora_embedding_A");
    for (number, (name, shape)) in model.tensors().into_iter().filter(|(name, _)| is_second(name)).enumerate() {
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| ((i * 31 + number * 7) % 19) as f32 * 0.01 - 0.09).collect();
        model.set_value(&name, &AnyTensor::new(&shape, Buffer::copy_of(&values)).unwrap()).unwrap();
    }
}

/// A document of `len` tokens that no other number starts like.
fn document(number: usize, len: usize) -> Vec<i32> {
    (0..len).map(|index| ((index * (2 * number + 77) + number * number * 13 + index * index * 5) % VOCAB) as i32).collect()
}

/// Lengths around the sizes of tiles, vectors and blocks of keys, together more rows than one chunk of the loss.
fn documents() -> Vec<Vec<i32>> {
    let lengths = [1, 200, 2, 65, 7, 64, 1, 63, 13, 12, 129, 33, 3, 128, 31, 97, 191, 5, 192, 193, 150, 160, 170, 180, 199, 11, 17];
    lengths.iter().enumerate().map(|(number, len)| document(number, *len)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The bits of each document's log-probabilities in a batch of them all.
fn logprobs(model: &Model, documents: &[Vec<i32>]) -> Vec<Vec<u32>> {
    let batch = Batch::new(documents);
    let logprobs = model.logprobs(&batch.packed(), &batch.next_tokens(), 1.0).unwrap();
    batch.documents().map(|range| bits(&logprobs.values()[range])).collect()
}

/// Jobs of every kind: long and short prompts, groups and single texts, several temperatures, more than a block of output.
fn jobs() -> Vec<Job> {
    let job = |(number, len): (usize, usize)| Job {
        members: 1 + number % 3,
        rules: Rules { temperature: [1.0, 0.7, 0.0][number % 3], top_k: number % 2 * 50, ..Rules::GREEDY },
        ..Job::new(document(number, len), 5 + number * 17, Rules::GREEDY, number as u64)
    };
    [1, 200, 63, 64, 65, 7, 129].into_iter().enumerate().map(job).collect()
}

#[test]
fn generation_reports_the_log_probabilities_of_the_training_forward() {
    let _alone = alone();
    for (name, model) in models_and_int8() {
        for threads in [1, 2] {
            set_threads(threads);
            for texts_max in [256, 3] {
                let jobs = jobs();
                let texts = generate(&model, None, jobs.clone(), Some(texts_max), &mut |_| Ok(())).unwrap();
                for temperature in [1.0f32, 0.7] {
                    let (mut documents, mut sampled) = (Vec::new(), Vec::new());
                    for (job, texts) in jobs.iter().zip(&texts).filter(|(job, _)| job.rules.reported_temperature() == temperature) {
                        for text in texts {
                            assert_eq!(text.tokens.len(), job.max_tokens, "{name}");
                            documents.push([&job.prompt[..], &text.tokens].concat());
                            sampled.push((job.prompt.len() - 1, bits(&text.logprobs)));
                        }
                    }
                    let batch = Batch::new(&documents);
                    let trained = model.logprobs(&batch.packed(), &batch.next_tokens(), temperature).unwrap();
                    for ((range, (first, sampled)), number) in batch.documents().zip(sampled).zip(0..) {
                        let trained = bits(&trained.values()[range.start + first..range.end - 1]);
                        assert_eq!(sampled, trained, "{name}: text {number}, {texts_max} at a time, {threads} threads");
                    }
                }
            }
        }
    }
    set_threads(2);
}

#[test]
fn cached_logits_are_those_of_the_whole_text_over_the_whole_vocabulary() {
    let _alone = alone();
    for (name, model) in models_and_int8() {
        let text = document(5, 150);
        let batch = Batch::new(std::slice::from_ref(&text));
        let whole = model.logits(&batch.packed()).unwrap();
        let (cache, blocks) = (model.cache().unwrap(), [4, 2, 9]);
        blocks.iter().for_each(|id| cache.lock().unwrap().make(*id).unwrap());
        let mut done = 0;
        for count in [70, 1, 1, 3, 60, 15] {
            let mut input = NewTokens::default();
            input.push(&text[done..done + count], done, &blocks);
            input.rows = (0..count).collect();
            model
                .logits_paged(input, &cache, &mut |rows, logits| {
                    let wanted = &whole.values()[(done + rows.start) * VOCAB..(done + rows.end) * VOCAB];
                    assert_eq!(bits(logits.values().unwrap()), bits(wanted), "{name}: {count} tokens from {done}");
                    Ok(())
                })
                .unwrap();
            done += count;
        }
    }
}

#[test]
fn a_sequence_has_its_numbers_in_any_company() {
    let _alone = alone();
    let documents = documents();
    assert!(documents.iter().map(Vec::len).sum::<usize>() > 2100, "more rows than one chunk of the loss");
    for (name, model) in models_and_int8() {
        set_threads(2);
        let together = logprobs(&model, &documents);
        for threads in [1, 2] {
            set_threads(threads);
            for (number, document) in documents.iter().enumerate() {
                let alone = logprobs(&model, std::slice::from_ref(document));
                assert_eq!(alone[0], together[number], "{name}: document {number} alone, {threads} threads");
            }
            let mut reversed = logprobs(&model, &documents.iter().rev().cloned().collect::<Vec<_>>());
            reversed.reverse();
            assert_eq!(reversed, together, "{name}: reversed, {threads} threads");
            for pair in [1, 4, 16] {
                let some = logprobs(&model, &documents[pair..pair + 3]);
                assert_eq!(some, together[pair..pair + 3], "{name}: documents from {pair}, {threads} threads");
            }
        }
    }
}

/// Answers to one prompt, whole or with its rows computed once, have the same bits, and the same gradients but for the
/// order of their sums.
#[test]
fn a_shared_prompt_changes_no_bit_of_what_follows() {
    let _alone = alone();
    let prompts = [1, 41, 64, 65, 130];
    let (mut whole, mut shared) = (TokenBatch { cu_seqlens: vec![0], ..TokenBatch::default() }, TokenBatch::default());
    shared.cu_seqlens.push(0);
    let mut rows = Vec::new();
    for (number, len) in prompts.into_iter().enumerate() {
        let first = whole.documents();
        for answer in 0..4 {
            let tokens = [document(number, len), document(20 + 4 * number + answer, 3 + 29 * answer)].concat();
            let mut labels = tokens[1..].to_vec();
            labels.push(fixtures::IGNORE);
            labels[..len - 1].fill(fixtures::IGNORE);
            whole.push(&tokens, &labels, None);
            shared.push(&tokens, &labels, (answer > 0).then_some(first));
            let own = if answer > 0 { tokens.len() + 1 - len } else { tokens.len() };
            rows.extend(whole.tokens.len() - own..whole.tokens.len());
        }
    }
    assert_eq!(rows.len(), shared.tokens.len());
    assert!(shared.tokens.len() < whole.tokens.len() * 2 / 3);
    fn packed(batch: &TokenBatch) -> Packed<'_> {
        Packed { tokens: &batch.tokens, position_ids: &batch.position_ids, cu_seqlens: &batch.cu_seqlens, prefixes: &batch.prefixes }
    }
    for (name, model) in models() {
        let mut seen = Vec::new();
        for (batch, recompute) in [(&whole, false), (&shared, false), (&shared, true)] {
            model.set_recompute(recompute);
            clear_gradients(&model);
            let logprobs = model.logprobs(&packed(batch), &batch.labels, 0.9).unwrap();
            let sum = logprobs.values().len();
            logprobs.backward_with(Buffer::copy_of(&vec![1.0; sum])).unwrap();
            let gradients: Vec<_> = model.tensors().into_iter().map(|(tensor, _)| fixtures::gradient(&model, &tensor)).collect();
            seen.push((bits(logprobs.values()), gradients));
        }
        let alone: Vec<u32> = rows.iter().map(|row| seen[0].0[*row]).collect();
        assert!(alone == seen[1].0 && alone == seen[2].0, "{name}: log-probabilities");
        assert!(seen[1].1 == seen[2].1, "{name}: gradients, computed again");
        let tolerance = if model.dtype() == Dtype::Bf16 { 2e-2 } else { 1e-5 };
        for ((tensor, _), (got, want)) in model.tensors().iter().zip(seen[1].1.iter().zip(&seen[0].1)) {
            let largest = want.iter().fold(0.0, |largest: f64, value| largest.max(f64::from(value.abs())));
            fixtures::check(&format!("{name}: {tensor}"), got, want, tolerance * largest.max(1e-6), 0.0);
        }
    }
}

/// A prefix is the beginning of an earlier whole document; anything else is refused by name.
#[test]
fn a_prefix_that_is_no_beginning_is_refused() {
    let (_, model) = models().swap_remove(0);
    let batch = Batch::new(&[document(1, 5), document(2, 4), document(3, 3)]);
    let refused = |prefixes: [Range<u32>; 3]| {
        let batch = Batch { prefixes: prefixes.to_vec(), ..batch.clone() };
        model.logprobs(&batch.packed(), &batch.next_tokens(), 1.0).err().map(|error| error.to_string())
    };
    assert_eq!(refused([0..0, 0..0, 5..7]), None);
    for wrong in [[0..2, 0..0, 0..0], [0..0, 1..3, 0..0], [0..0, 0..6, 0..0], [0..0, 0..0, 9..11], [0..0, 5..6, 0..0], [0..0, 0..2, 5..6]] {
        assert!(refused(wrong.clone()).is_some_and(|message| message.contains("prefixes[")), "{wrong:?}");
    }
    let few = Batch { prefixes: std::iter::once(0..0).collect(), ..batch.clone() };
    assert!(model.logprobs(&few.packed(), &few.next_tokens(), 1.0).is_err_and(|error| error.to_string().contains("prefixes")));
}

/// What comes later changes nothing: a text's logits are those it had when it was shorter, whatever rows are asked for.
#[test]
fn logits_of_a_prefix_are_those_of_the_whole() {
    let _alone = alone();
    let text = document(3, 150);
    for (name, model) in models_and_int8() {
        let whole = model.logits(&Batch::new(&[&text]).packed()).unwrap();
        for len in [1, 2, 11, 12, 13, 63, 64, 65, 128, 149] {
            let batch = Batch::new(&[&text[..len]]);
            let all = model.logits(&batch.packed()).unwrap();
            assert_eq!(bits(all.values()), bits(&whole.values()[..len * VOCAB]), "{name}: {len} tokens");
            let last = model.logits_at(&batch.packed(), &[len - 1]).unwrap();
            assert_eq!(bits(last.values()), bits(&whole.values()[(len - 1) * VOCAB..len * VOCAB]), "{name}: last of {len} tokens");
        }
    }
}

/// Bits of the loss and of every gradient of a batch in which some tokens have no label.
fn training_bits(model: &Model, documents: &[Vec<i32>]) -> Vec<(String, Vec<u32>)> {
    let batch = Batch::new(documents);
    let mut labels = batch.next_tokens();
    labels.iter_mut().step_by(7).for_each(|label| *label = fixtures::IGNORE);
    clear_gradients(model);
    let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels).max(1) as f32, 0.01).unwrap();
    loss.total.backward().unwrap();
    let gradients = model.tensors().into_iter().map(|(name, _)| (name.clone(), bits(&fixtures::gradient(model, &name))));
    [("loss".to_owned(), bits(loss.total.values()))].into_iter().chain(gradients).collect()
}

#[test]
fn gradients_do_not_depend_on_threads_or_recomputation() {
    let _alone = alone();
    let documents = documents();
    for (name, model) in models() {
        // All are too much for one block of tokens, one token is less than a tile and has no label.
        for documents in [&documents[..], &documents[..1], &documents[3..6]] {
            set_threads(2);
            model.set_recompute(false);
            let want = training_bits(&model, documents);
            assert!(want.iter().flat_map(|(_, bits)| bits).all(|bits| f32::from_bits(*bits).is_finite()), "{name}");
            for (threads, recompute) in [(1, false), (1, true), (2, true)] {
                set_threads(threads);
                model.set_recompute(recompute);
                for (got, want) in training_bits(&model, documents).iter().zip(&want) {
                    assert!(got == want, "{name}: {} with {threads} threads, recompute {recompute}", got.0);
                }
            }
        }
    }
}

/// The loss is deferred: read before the backward pass or after it, or never run backwards, it has the same bits; and so
/// has the sum of log-probabilities that it stands for.
#[test]
fn the_loss_has_the_same_bits_whenever_it_is_read() {
    let _alone = alone();
    for (name, model) in models() {
        let batch = Batch::new(&documents()[..6]);
        let labels = batch.next_tokens();
        let loss = || model.cross_entropy(&batch.packed(), &labels, 300.0, 0.01).unwrap().total;
        let (early, late) = (loss(), loss());
        let first = bits(early.values());
        early.backward().unwrap();
        late.backward().unwrap();
        assert_eq!(bits(early.values()), first, "{name}");
        assert_eq!(bits(late.values()), first, "{name}");
        let plain = model.cross_entropy(&batch.packed(), &labels, 300.0, 0.0).unwrap().total;
        let logprobs = model.logprobs(&batch.packed(), &labels, 1.0).unwrap();
        let sum: f64 = logprobs.values().iter().map(|logprob| f64::from(*logprob)).sum();
        assert_eq!(plain.values()[0], (-sum / 300.0) as f32, "{name}");
    }
}

#[test]
fn empty_documents_and_empty_batches_are_fine() {
    let _alone = alone();
    for (name, model) in models() {
        let full = logprobs(&model, &[document(1, 20), document(2, 9)]);
        let holes = logprobs(&model, &[vec![], document(1, 20), vec![], vec![], document(2, 9), vec![]]);
        assert_eq!([&holes[1], &holes[4]], [&full[0], &full[1]], "{name}");
        for recompute in [false, true] {
            model.set_recompute(recompute);
            assert_eq!(model.logits(&Batch::new::<Vec<i32>>(&[]).packed()).unwrap().shape(), [0, VOCAB], "{name}");
            let training = training_bits(&model, &[]);
            assert!(training.iter().flat_map(|(_, bits)| bits).all(|bits| f32::from_bits(*bits) == 0.0), "{name}: nothing, so zeros");
        }
    }
}

#[test]
fn three_updates_give_the_same_weights_on_any_number_of_threads() {
    let _alone = alone();
    type Bits = Vec<(String, Vec<u32>)>;
    let run = |threads: usize| -> Vec<(String, Bits)> {
        set_threads(threads);
        let updated = models().into_iter().map(|(name, model)| {
            let mut optimizer = AdamW::new(model.parameters(), Settings { lr: 0.01, ..Settings::default() }).unwrap();
            for step in 0..3 {
                let batch = Batch::new(&documents()[step * 3..step * 3 + 5]);
                let labels = batch.next_tokens();
                model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.01).unwrap().total.backward().unwrap();
                // Padding of the packed layouts has no part in the norm.
                let norm = fixtures::gradient_norm(&model);
                let step = optimizer.step().unwrap();
                assert!(step.applied && (step.grad_norm / norm - 1.0).abs() < 1e-6, "{name}: {step:?}, by name {norm}");
            }
            let values = model.tensors().into_iter().map(|(name, _)| (name.clone(), bits(&model.value(&name).unwrap().to_f32_vec())));
            (name, values.collect())
        });
        updated.collect()
    };
    for ((name, one), (_, two)) in run(1).iter().zip(&run(2)) {
        for ((parameter, one), (_, two)) in one.iter().zip(two) {
            assert!(one == two, "{name}: {parameter}");
        }
    }
}

#[test]
fn f32_on_amx_does_too() {
    let _alone = alone();
    f32_on_amx::once_more(&[
        "generation_reports_the_log_probabilities_of_the_training_forward",
        "a_sequence_has_its_numbers_in_any_company",
        "gradients_do_not_depend_on_threads_or_recomputation",
    ]);
}
