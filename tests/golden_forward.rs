//! Forward passes, log-probabilities, losses and greedy tokens against the numbers of Hugging Face transformers and TRL.
//! Training runs are in golden_train.rs.

#[path = "fixtures/f32_on_amx.rs"]
mod f32_on_amx;
mod fixtures;

use fixtures::{Batch, Golden, clear_gradients, gradient, gradient_norm, targets};
use perilune::kernels::buffer::Buffer;
use perilune::kernels::element::Dtype;
use perilune::model::Model;
use perilune::tensor::AnyTensor;

/// Logits, residual streams and log-probabilities of a fixture's batch without padding.
fn check_forward(name: &str) -> (Golden, Model, Batch) {
    let golden = Golden::open(name);
    let model = golden.model(Dtype::F32);
    let rows = golden.integer_rows("input_ids");
    let batch = Batch::new(&rows);

    let logits = model.logits(&batch.packed()).unwrap();
    golden.check("logits", logits.values());
    let state = |layer| model.hidden_states(&batch.packed(), layer).unwrap().to_f32_vec();
    let hidden: Vec<f32> = (0..=model.config().layers).flat_map(state).collect();
    golden.check("hidden_states", &hidden);
    let logprobs = model.logprobs(&batch.packed(), &batch.next_tokens(), 1.0).unwrap();
    let without_last: Vec<f32> = batch.documents().flat_map(|range| logprobs.values()[range.start..range.end - 1].to_vec()).collect();
    golden.check("token_logprobs", &without_last);

    // Some rows of the logits are the rows of all logits, in the order asked for.
    let vocab = model.config().vocab;
    let some = model.logits_at(&batch.packed(), &[5, 0, 5]).unwrap();
    for (row, index) in some.values().chunks_exact(vocab).zip([5, 0, 5]) {
        assert_eq!(row, &logits.values()[index * vocab..][..vocab], "{name}: logits_at row {index}");
    }
    (golden, model, batch)
}

#[test]
fn dense_models_give_the_reference_numbers() {
    for name in ["dense_tied", "dense_untied", "dense_sharded", "dense_bf16", "dense_theta_1e7", "dense_sliding"] {
        check_forward(name);
    }
}

#[test]
fn yarn_gives_the_reference_numbers_beyond_the_trained_length() {
    let (golden, model, _) = check_forward("dense_yarn");
    let (inv_freq, scaling) = model.config().inv_freq();
    golden.check("inv_freq", &inv_freq);
    golden.check("attention_factor", &[scaling]);
}

#[test]
fn mixtures_of_experts_give_the_reference_numbers() {
    for name in ["moe_norm_false", "moe_norm_true", "moe_mixed_layers"] {
        let (golden, model, batch) = check_forward(name);
        let (layers, balance) = model.routing(&batch.packed()).unwrap();
        let logits: Vec<f32> = layers.iter().flat_map(|(logits, _, _)| logits.to_f32_vec()).collect();
        golden.check("router_logits", &logits);
        let chosen: Vec<i32> = layers.iter().flat_map(|(_, chosen, _)| chosen.iter().map(|expert| *expert as i32)).collect();
        assert_eq!(chosen, golden.integers("selected_experts"), "{name}");
        let weights: Vec<f32> = layers.iter().flat_map(|(_, _, weights)| weights.to_f32_vec()).collect();
        golden.check("routing_weights", &weights);
        golden.check("aux_loss", balance.unwrap().values());

        // Padding has no part in the balance, so the real tokens alone give the padded batch's loss.
        let real = Batch::new(&golden.real_rows("input_ids", "attention_mask_padded"));
        golden.check("aux_loss_padded", model.routing(&real.packed()).unwrap().1.unwrap().values());
    }
}

#[test]
fn packed_documents_do_not_see_each_other() {
    for name in ["packed", "packed_moe"] {
        let golden = Golden::open(name);
        let model = golden.model(Dtype::F32);
        let batch = Batch {
            tokens: golden.integers("input_ids"),
            position_ids: golden.integers("position_ids"),
            cu_seqlens: golden.integers("cu_seqlens").into_iter().map(|border| border as u32).collect(),
            ..Batch::default()
        };
        golden.check("logits", model.logits(&batch.packed()).unwrap().values());
        let labels = batch.shift(&golden.integers("labels"));
        for recompute in [false, true] {
            model.set_recompute(recompute);
            clear_gradients(&model);
            let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.0).unwrap();
            loss.total.backward().unwrap();
            golden.check("loss", loss.total.values());
            for parameter in golden.names("grad.") {
                golden.check(&format!("grad.{parameter}"), &gradient(&model, &parameter));
            }
            golden.check("grad_norm", &[gradient_norm(&model) as f32]);
        }
    }
}

#[test]
fn rows_of_a_left_padded_batch_are_what_they_are_alone() {
    for name in ["padded_left", "padded_left_moe"] {
        let golden = Golden::open(name);
        let model = golden.model(Dtype::F32);
        let mask = golden.integers("attention_mask");
        let batch = Batch {
            position_ids: golden.real_rows("position_ids", "attention_mask").concat(),
            ..Batch::new(&golden.real_rows("input_ids", "attention_mask"))
        };
        let vocab = model.config().vocab;
        let padded = golden.floats("logits");
        let want: Vec<f32> =
            padded.chunks_exact(vocab).zip(&mask).filter(|(_, real)| **real == 1).flat_map(|(row, _)| row.to_vec()).collect();
        golden.check_with("logits", model.logits(&batch.packed()).unwrap().values(), &want);
        let labels = batch.shift(&golden.real_rows("labels", "attention_mask").concat());
        let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.0).unwrap();
        golden.check("loss", loss.total.values());
    }
}

#[test]
fn logprobs_and_entropy_follow_the_temperature() {
    let golden = Golden::open("logprobs");
    let model = golden.model(Dtype::F32);
    let batch = Batch::new(&golden.integer_rows("input_ids"));
    for (name, temperature) in [("temp1.0", 1.0), ("temp0.7", 0.7)] {
        let (logprobs, entropy) = model.logprobs_and_entropy(&batch.packed(), &batch.next_tokens(), temperature).unwrap();
        let without_last =
            |values: &[f32]| -> Vec<f32> { batch.documents().flat_map(|range| values[range.start..range.end - 1].to_vec()).collect() };
        golden.check(&format!("logps.{name}"), &without_last(logprobs.values()));
        golden.check(&format!("entropy.{name}"), &without_last(entropy.values()));
    }
}

#[test]
fn assistant_only_losses_are_means_over_the_supervised_tokens_of_the_batch() {
    let golden = Golden::open("sft");
    let model = golden.model(Dtype::F32);
    let batch = Batch::new(&golden.real_rows("input_ids", "attention_mask"));
    for kind in ["trl", "content"] {
        let labels = batch.shift(&golden.real_rows(&format!("labels_{kind}"), "attention_mask").concat());
        let counts: Vec<i32> = batch.documents().map(|range| targets(&labels[range]) as i32).collect();
        assert_eq!(counts, golden.integers(&format!("target_tokens_{kind}")));
        let logprobs = model.logprobs(&batch.packed(), &labels, 1.0).unwrap();
        let sums: Vec<f32> = batch.documents().map(|range| -logprobs.values()[range].iter().sum::<f32>()).collect();
        golden.check(&format!("loss_sum_per_chat_{kind}"), &sums);

        clear_gradients(&model);
        let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.0).unwrap();
        loss.total.backward().unwrap();
        golden.check(&format!("loss_{kind}"), loss.total.values());
        golden.check(&format!("grad_norm_{kind}"), &[gradient_norm(&model) as f32]);
        let parameter = "model.norm.weight";
        golden.check(&format!("grad_{kind}.{parameter}"), &gradient(&model, parameter));
    }
}

/// Summed log-probabilities of completions, and the gradient of the DPO loss, whose derivative in a log-probability is
/// known by hand: `-beta / pairs * sigmoid(-beta * margin)` for chosen tokens, and its negative for rejected ones.
#[test]
fn preference_pairs_give_the_reference_logprobs_and_gradients() {
    let golden = Golden::open("dpo");
    let policy = golden.model(Dtype::F32);
    let reference = fixtures::load(&golden.folder().join(golden.meta["params"]["reference_checkpoint"].as_str().unwrap()), Dtype::F32);
    let batch = Batch::new(&golden.real_rows("e2e.input_ids", "e2e.attention_mask"));
    let completion = golden.real_rows("e2e.completion_mask", "e2e.attention_mask").concat();
    let masked: Vec<i32> =
        batch.tokens.iter().zip(&completion).map(|(token, completion)| if *completion == 1 { *token } else { fixtures::IGNORE }).collect();
    let labels = batch.shift(&masked);
    let logprobs = policy.logprobs(&batch.packed(), &labels, 1.0).unwrap();
    let sums = |values: &[f32]| -> Vec<f32> { batch.documents().map(|range| values[range].iter().sum()).collect() };
    let (ours, theirs) = (sums(logprobs.values()), sums(reference.logprobs(&batch.packed(), &labels, 1.0).unwrap().values()));
    golden.check("e2e.policy_logps", &ours);
    golden.check("e2e.ref_logps", &theirs);

    let (beta, pairs) = (0.1, ours.len() / 2);
    let slope: Vec<f32> = (0..pairs)
        .map(|pair| {
            let margin = (ours[pair] - theirs[pair]) - (ours[pair + pairs] - theirs[pair + pairs]);
            -beta / pairs as f32 / (1.0 + (beta * margin).exp())
        })
        .collect();
    let mut upstream = perilune::kernels::buffer::Buffer::<f32>::zeroed(batch.tokens.len());
    for (index, range) in batch.documents().enumerate() {
        upstream[range].fill(if index < pairs { slope[index] } else { -slope[index - pairs] });
    }
    logprobs.backward_with(upstream).unwrap();
    for parameter in golden.names("e2e.grad.") {
        golden.check(&format!("e2e.grad.{parameter}"), &gradient(&policy, &parameter));
    }
    golden.check("e2e.grad_norm", &[gradient_norm(&policy) as f32]);
}

/// The most likely token, the lowest of equals.
fn argmax(logits: &[f32]) -> i32 {
    (0..logits.len()).fold(0, |best, index| if logits[index] > logits[best] { index } else { best }) as i32
}

#[test]
fn greedy_tokens_are_those_of_the_reference() {
    for name in ["generate_dense", "generate_moe"] {
        let golden = Golden::open(name);
        let model = golden.model(Dtype::F32);
        for prompt in (0..).map(|index| format!("prompt{index}")).take_while(|prompt| golden.has(&format!("{prompt}.input_ids"))) {
            for (suffix, penalty) in [("greedy", 1.0), ("greedy_rep1.3", 1.3f32)] {
                let want = golden.integers(&format!("{prompt}.{suffix}"));
                let mut tokens = golden.integers(&format!("{prompt}.input_ids"));
                let start = tokens.len();
                let mut first_last = Vec::new();
                for step in 0..want.len() {
                    let batch = Batch::new(&[&tokens]);
                    let mut logits = model.logits_at(&batch.packed(), &[tokens.len() - 1]).unwrap().values().to_vec();
                    if step == 0 || step + 1 == want.len() {
                        first_last.extend_from_slice(&logits);
                    }
                    let seen: std::collections::BTreeSet<i32> = tokens.iter().copied().filter(|_| penalty != 1.0).collect();
                    for token in seen {
                        let logit = &mut logits[token as usize];
                        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                    }
                    tokens.push(argmax(&logits));
                }
                assert_eq!(&tokens[start..], want, "{name} {prompt} {suffix}");
                if penalty == 1.0 {
                    golden.check(&format!("{prompt}.first_last_logits"), &first_last);
                }
            }
        }
    }
}

/// bf16 rounds every activation to 8 bits, so two right computations differ by about what torch's own bf16 forward differs
/// from its f32 one (the fixture's `bf16_error`). Ours keeps f32 where theirs does; twice that leaves room for another
/// order of sums and is far below what any mistake causes (the fixture's `sensitivity`: 1.5 and more).
#[test]
fn bf16_logits_are_as_near_to_f32_as_those_of_the_reference() {
    let golden = Golden::open("dense_bf16");
    let model = golden.model(Dtype::Bf16);
    assert_eq!(model.dtype(), Dtype::Bf16);
    let batch = Batch::new(&golden.integer_rows("input_ids"));
    let logits = model.logits(&batch.packed()).unwrap();
    let errors: Vec<f64> = logits.values().iter().zip(golden.floats("logits")).map(|(got, want)| f64::from(got - want).abs()).collect();
    let max = errors.iter().copied().fold(0.0, f64::max);
    let rms = (errors.iter().map(|error| error * error).sum::<f64>() / errors.len() as f64).sqrt();
    let theirs = |key: &str| golden.meta["params"]["bf16_error"][key].as_f64().unwrap();
    println!("bf16 logits: max error {max:.4} (theirs {:.4}), rms {rms:.4} (theirs {:.4})", theirs("max"), theirs("rms"));
    assert!(max <= 2.0 * theirs("max") && rms <= 1.5 * theirs("rms"), "max {max}, rms {rms}");
    golden.check("logits_bf16_compute", logits.values());
}

/// Integers of 8 bits round the weights, which is their price. What else they do, rounding activations to 16 bits of their row's
/// largest, may cost no more than computing in bf16, by the measure of the test above: against the f32 model of the same rounded
/// weights.
#[test]
fn int8_logits_are_those_of_the_rounded_weights() {
    let golden = Golden::open("dense_bf16");
    let (model, rounded) = (golden.model(Dtype::I8), golden.model(Dtype::F32));
    for (name, shape) in model.tensors() {
        let mut values = Vec::new();
        model
            .read_tensor(&name, &mut |part| {
                values.extend_from_slice(part);
                Ok(())
            })
            .unwrap();
        rounded.set_value(&name, &AnyTensor::new(&shape, Buffer::copy_of(&values)).unwrap()).unwrap();
    }
    let batch = Batch::new(&golden.integer_rows("input_ids"));
    let logits = |model: &Model| model.logits(&batch.packed()).unwrap().values().to_vec();
    let distance = |got: &[f32], want: &[f32]| {
        let errors = || got.iter().zip(want).map(|(got, want)| f64::from(got - want).abs());
        (errors().fold(0.0, f64::max), (errors().map(|error| error * error).sum::<f64>() / got.len() as f64).sqrt())
    };
    let (got, of_rounded) = (logits(&model), logits(&rounded));
    let (max, rms) = distance(&got, &of_rounded);
    let theirs = |key: &str| golden.meta["params"]["bf16_error"][key].as_f64().unwrap();
    let whole = distance(&got, &golden.floats("logits")).1;
    println!(
        "int8 logits: max error {max:.4}, rms {rms:.4} (bf16 of the reference {:.4}); with the weights' rounding {whole:.4}",
        theirs("rms")
    );
    assert!(max <= 2.0 * theirs("max") && rms <= 1.5 * theirs("rms"), "max {max}, rms {rms}");
}

#[test]
fn f32_on_amx_does_too() {
    f32_on_amx::once_more(&[
        "dense_models_give_the_reference_numbers",
        "yarn_gives_the_reference_numbers_beyond_the_trained_length",
        "mixtures_of_experts_give_the_reference_numbers",
        "logprobs_and_entropy_follow_the_temperature",
        "preference_pairs_give_the_reference_logprobs_and_gradients",
        "greedy_tokens_are_those_of_the_reference",
    ]);
}
