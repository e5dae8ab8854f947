---@meta
--- Models and optimizers.

---@class engine.model
local model = {}

---@class engine.optim
local optim = {}

---@class engine.Model
---@field config table as config.json writes it, with Hugging Face's names
---@field count integer parameters
---@field dtype "f32"|"bf16" of weights and activations
---@field frozen boolean
---@field tokenizer engine.Tokenizer? of the folder it came from
local Model = {}

---@class engine.Optimizer
---@field lr number
---@field skipped integer steps not applied because a gradient was not finite
---@field steps integer steps applied
local Optimizer = {}

--- The model of a Hugging Face checkpoint's folder, in its own element type unless `dtype` says else.
---
--- Example: local model = engine.model.load("checkpoints/Qwen2.5-0.5B", { dtype = "bf16" })
---@param folder string
---@param options? { dtype?: "f32"|"bf16", frozen?: boolean, recompute?: boolean, tokenizer?: engine.Tokenizer }
---@return engine.Model model
function model.load(folder, options) end

--- A new model with random weights, from the run's seed. `preset` names a shape (default "tiny"); other fields change it.
--- Fields: vocab, hidden, layers, heads, kv_heads, intermediate, head_dim, tied, initializer_range, rms_norm_eps, rope_theta,
--- max_positions, sliding_window, sliding_from_layer, bos, eos, pad; for a mixture of experts also experts,
--- experts_per_token, moe_intermediate, shared_intermediate, norm_topk_prob, sparse_step, router_aux_loss_coef.
---
--- Example: local model = engine.model.new { preset = "tiny", vocab = 512, layers = 2 }
---@param fields { preset?: string, vocab?: integer, hidden?: integer, layers?: integer, heads?: integer, kv_heads?: integer, intermediate?: integer, experts?: integer, [string]: any }
---@param options? { dtype?: "f32"|"bf16", frozen?: boolean, recompute?: boolean, tokenizer?: engine.Tokenizer }
---@return engine.Model model
function model.new(fields, options) end

--- The names that `preset` may have.
---
--- Example: print(table.concat(engine.model.presets(), " "))
---@return string[] names
function model.presets() end

--- Continues a text: sampled, or with temperature 0 the most likely token each time. Options as in `generate`.
---
--- Example: print(model:complete("Once", { max_tokens = 100, temperature = 0.8 }))
---@param prompt string
---@param options? { max_tokens?: integer, temperature?: number, top_k?: integer, top_p?: number, min_p?: number, repetition_penalty?: number, presence_penalty?: number, frequency_penalty?: number, logit_bias?: table<integer, number>, seed?: integer, stop?: string[], stop_ids?: integer[] }
---@return string text without the prompt
function Model:complete(prompt, options) end

--- The training loss: minus the sum of the labels' log-probabilities, over `normalizer` (the batch's supervised tokens),
--- plus the load-balancing loss of a mixture of experts. Its value is computed with the backward pass.
---
--- Example: model:cross_entropy(batch):backward()
---@param batch engine.Batch
---@param options? { normalizer?: number, router_aux_loss_coef?: number } normalizer: supervised tokens of the whole update
---@return engine.Tensor loss []
function Model:cross_entropy(batch, options) end

--- The entropy of the distribution at each labelled position, in nats; 0 elsewhere.
---
--- Example: step:log { entropy = policy:entropy(batch):mean() }
---@param batch engine.Batch
---@param options? { temperature?: number }
---@return engine.Tensor entropy [tokens], f32
function Model:entropy(batch, options) end

--- Continues every prompt `n` times, all together: from the weights as they stand, by the kernels that train them. A prompt
--- is a text, a list of messages (written by the chat template, up to the assistant's turn), a record with `prompt` or
--- `messages` (and `tools`), or a list of token ids.
---
--- Rules act in this order: logit_bias, repetition_penalty (on all tokens so far), presence_penalty and frequency_penalty (on
--- generated ones), temperature (0: the most likely token), top_k, top_p, min_p. What a text becomes depends on its seed
--- alone, not on the others; without `seed` each call draws another, the same when the run is run again. Defaults:
--- max_tokens 128, temperature 1, the rest off; stop_ids are those of the model. `together` limits the texts that are
--- continued at a time (256).
---
--- Example: local rollouts = policy:generate(prompts:take(16), { n = 8, max_tokens = 64 })
---@param prompts any[]
---@param options? { n?: integer, max_tokens?: integer, temperature?: number, top_k?: integer, top_p?: number, min_p?: number, repetition_penalty?: number, presence_penalty?: number, frequency_penalty?: number, logit_bias?: table<integer, number>, seed?: integer, stop?: string[], stop_ids?: integer[], top_logprobs?: integer, tools?: table[], together?: integer }
---@return engine.Rollouts rollouts the texts of the first prompt, then of the second, and so on
function Model:generate(prompts, options) end

--- The gradient of the parameter of that Hugging Face name; nil if there is none.
---
--- Example: print(model:gradient("model.norm.weight"))
---@param name string
---@return engine.Tensor? gradient f32
function Model:gradient(name) end

--- The logits of every token. Not differentiable.
---
--- Example: print(model:logits(batch):argmax(-1))
---@param batch engine.Batch
---@return engine.Tensor logits [tokens, vocab], f32
function Model:logits(batch) end

--- The log-probability of each position's label; 0 where there is none. Differentiable.
---
--- Example: losses.nll(policy:logprobs(batch), batch.mask):backward()
---@param batch engine.Batch
---@param options? { temperature?: number } logits are divided by it
---@return engine.Tensor logprobs [tokens], f32, natural log
function Model:logprobs(batch, options) end

--- A copy of the parameter of that Hugging Face name.
---
--- Example: print(model:parameter("model.norm.weight").shape[1])
---@param name string
---@return engine.Tensor value f32
function Model:parameter(name) end

--- The Hugging Face names of all parameters.
---
--- Example: for _, name in ipairs(model:parameter_names()) do print(name) end
---@return string[] names
function Model:parameter_names() end

--- How a mixture of experts divides the tokens: a table for each layer that has experts, k of them for each token. The
--- load-balancing loss is over all these layers; k if the experts get equal shares, more if they do not; nil for a dense
--- model. Not differentiable: `cross_entropy` contains the loss.
---
--- Example: local share = model:routing(batch)[1].experts:eq(0):mean():item()
---@param batch engine.Batch
---@return { experts: engine.Tensor, weights: engine.Tensor, logits: engine.Tensor }[] layers experts: [tokens, k], i32, the best first; weights: [tokens, k]; logits: [tokens, experts]
---@return engine.Tensor? load_balance [], f32
function Model:routing(batch) end

--- Writes a Hugging Face checkpoint folder, with the tokenizer.
---
--- Example: model:save("checkpoints/mine", { dtype = "bf16" })
---@param folder string
---@param options? { dtype?: "f32"|"bf16" } default: the model's own
function Model:save(folder, options) end

--- AdamW over a model. In a workflow use run:optimizer. Defaults: lr 1e-3, betas 0.9 and 0.95, eps 1e-8, weight_decay 0.1
--- on matrices (decay_vectors: on vectors too), clip_norm 1 (false: none).
---
--- Example: local optim = engine.optim.adamw(model, { lr = 3e-4 })
---@param model engine.Model
---@param options? { lr?: number, betas?: number[], eps?: number, weight_decay?: number, decay_vectors?: boolean, clip_norm?: number|false }
---@return engine.Optimizer optimizer
function optim.adamw(model, options) end

--- Forgets all gradients.
---
--- Example: optim:clear()
function Optimizer:clear() end

--- The norm of the whole gradient as it stands.
---
--- Example: print(optim:gradient_norm())
---@return number norm
function Optimizer:gradient_norm() end

--- Changes settings from the next step on.
---
--- Example: optim:set { lr = args.lr * schedules.cosine(step.index, step.steps) }
---@param options { lr?: number, betas?: number[], eps?: number, weight_decay?: number, decay_vectors?: boolean, clip_norm?: number|false }
function Optimizer:set(options) end

--- Updates the parameters by the gradients that `backward` left, and clears them. A gradient that is not finite changes
--- nothing.
---
--- Example: step:log { grad_norm = optim:step() }
---@return number grad_norm before clipping
---@return boolean applied
function Optimizer:step() end
