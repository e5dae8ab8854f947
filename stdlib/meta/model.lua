---@meta
--- Models and optimizers.

---@class engine.model
local model = {}

---@class engine.optim
local optim = {}

---@class engine.Model
---@field adapter { rank: integer, alpha: number, rank_stabilized: boolean, dora: boolean, targets: string[], modules_to_save: string[], merged: boolean }? its adapter, if it has one
---@field config table as config.json writes it, with Hugging Face's names
---@field count integer parameters, those of an adapter included
---@field device string "cpu" or "cuda:0"; what it gives a script lies on the CPU always
---@field dtype "f32"|"bf16"|"int8" of the weights; int8 is for inference, with activations in bf16
---@field frozen boolean
---@field tokenizer engine.Tokenizer? of the folder it came from
---@field trainable integer parameters that an optimizer would change; `freeze` makes them fewer
local Model = {}

---@class engine.Optimizer
---@field lr number
---@field skipped integer steps not applied because a gradient was not finite
---@field steps integer steps applied
local Optimizer = {}

--- What LoRA adds to a model. `targets` are names of modules or ends of names (`q_proj`, `layers.0.mlp.down_proj`, `gate` for
--- routers, `embed_tokens`, `lm_head`), or "all-linear" for all projections of the layers, experts included; on a GPU a layer's experts
--- have adapters all or none. The scale is alpha / rank, with `rank_stabilized` alpha / sqrt(rank). `dora` scales each adapted row to a
--- length that is learnt, which begins as that of the weight: nearer to full fine-tuning at small ranks, slower, and it keeps the outputs
--- of adapted products. `modules_to_save`, ends of names (`norm`: all norms), train whole beside it: a base model that is to learn
--- `<|im_end|>` needs `embed_tokens` and `lm_head` there, whose row for it is untrained.
---@class engine.Lora
---@field rank? integer default 8
---@field alpha? number default twice the rank
---@field targets? string[] default { "all-linear" }
---@field rank_stabilized? boolean
---@field dora? boolean
---@field modules_to_save? string[]

---@class engine.ModelOptions
---@field adapter? string folder of a PEFT adapter, put on the model
---@field device? string where it lies and computes: "cpu" (default), "cuda" (the first GPU), "cuda:1", or "auto": a GPU if there is one
---@field dtype? "f32"|"bf16"|"int8" int8: each row of a matrix rounded to 127 steps, frozen
---@field frozen? boolean nothing trains it
---@field head? "score" one number for each document in place of logits; new, unless the folder has it
---@field lora? engine.Lora a new adapter: the weights are frozen, only it trains
---@field recompute? boolean compute layers (of a mixture, their attention) again in the backward pass, to save memory
---@field tokenizer? engine.Tokenizer

--- The model of a Hugging Face checkpoint's folder, in its own element type unless `dtype` says else.
---
--- Example: local model = engine.model.load("checkpoints/Qwen2.5-0.5B", { dtype = "bf16", lora = { rank = 16 } })
---@param folder string
---@param options? engine.ModelOptions
---@return engine.Model model
function model.load(folder, options) end

--- A new model with random weights, from the run's seed. `preset` names a shape (default "tiny"); other fields change it.
--- Fields: vocab, hidden, layers, heads, kv_heads, intermediate, head_dim, tied, initializer_range, rms_norm_eps, rope_theta,
--- max_positions, sliding_window, sliding_from_layer, bos, eos, pad; for a mixture of experts also experts,
--- experts_per_token, moe_intermediate, shared_intermediate, norm_topk_prob, sparse_step, router_aux_loss_coef.
---
--- Example: local model = engine.model.new { preset = "tiny", vocab = 512, layers = 2 }
---@param fields { preset?: string, vocab?: integer, hidden?: integer, layers?: integer, heads?: integer, kv_heads?: integer, intermediate?: integer, experts?: integer, [string]: any }
---@param options? engine.ModelOptions
---@return engine.Model model
function model.new(fields, options) end

--- The names that `preset` may have.
---
--- Example: print(table.concat(engine.model.presets(), " "))
---@return string[] names
function model.presets() end

--- Moves the weights towards those of another model of the same shape and type: `(1 - weight) * this + weight * other`, in
--- f32; of two models with adapters of one shape, the adapters alone. An exponential moving average is one call a step.
---
--- Example: average:average(policy, 0.01)
---@param other engine.Model
---@param weight number 0 leaves this model as it is, 1 copies the other
function Model:average(other, weight) end

--- The model without its adapter, frozen. Both share the weights, so that it takes no memory: the reference of a policy
--- that trains an adapter.
---
--- Example: local reference = policy:base()
---@return engine.Model base
function Model:base() end

--- Continues a text: sampled, or with temperature 0 the most likely token each time. Options as in `generate`.
---
--- Example: print(model:complete("Once", { max_tokens = 100, temperature = 0.8 }))
---@param prompt string
---@param options? { max_tokens?: integer, temperature?: number, top_k?: integer, top_p?: number, min_p?: number, repetition_penalty?: number, presence_penalty?: number, frequency_penalty?: number, logit_bias?: table<integer, number>, seed?: integer, stop?: string[], stop_ids?: integer[] }
---@return string text without the prompt
function Model:complete(prompt, options) end

--- The training loss: minus the sum of the labels' log-probabilities, over `normalizer` (the batch's supervised tokens),
--- plus the load-balancing loss of a mixture of experts, which counts for as much as the batch has of `normalizer`: so the
--- micro-batches of an update add up. Its value is computed with the backward pass.
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

--- Freezes weights for a while: they get no gradient and no update, and lose a gradient that waits; what the optimizer knows of them
--- stays. `names` are names of tensors or whole words of them. Weights that lie in one matrix freeze together: q_proj, k_proj and
--- v_proj; gate_proj and up_proj. Checkpoints hold what is frozen, so a loop says it once, or at every step.
---
--- Example: if step.index == 0 then policy:freeze { "embed_tokens", "layers.0" } elseif step.index == 100 then policy:thaw() end
---@param names string[] such as "layers.0", "mlp.down_proj", "model.norm.weight"
function Model:freeze(names) end

--- Continues every prompt `n` times, all together: from the weights as they stand, by the kernels that train them. A prompt
--- is a text, a list of messages (written by the chat template, up to the assistant's turn), a record with `prompt` or
--- `messages` (and `tools`), or a list of token ids.
---
--- Rules act in this order: logit_bias, repetition_penalty (on all tokens so far), presence_penalty and frequency_penalty (on
--- generated ones), temperature (0: the most likely token), top_k, top_p, min_p. What a text becomes depends on its seed
--- alone, not on the others; without `seed` each call draws another, the same when the run is run again. Defaults:
--- max_tokens 128, temperature 1, the rest off; stop_ids are those of the model, and the end of the turn for messages. `together` limits the texts that are
--- continued at a time (256).
---
--- Example: local rollouts = policy:generate(prompts:take(16), { n = 8, max_tokens = 64 })
---@param prompts any[]
---@param options? { n?: integer, max_tokens?: integer, temperature?: number, top_k?: integer, top_p?: number, min_p?: number, repetition_penalty?: number, presence_penalty?: number, frequency_penalty?: number, logit_bias?: table<integer, number>, seed?: integer, stop?: string[], stop_ids?: integer[], top_logprobs?: integer, tools?: table[]|string, together?: integer }
---@return engine.Rollouts rollouts the texts of the first prompt, then of the second, and so on
function Model:generate(prompts, options) end

--- The gradient of the parameter of that Hugging Face name; nil if there is none.
---
--- Example: print(model:gradient("model.norm.weight"))
---@param name string
---@return engine.Tensor? gradient f32
function Model:gradient(name) end

--- The logits of hidden states, as `logits` gives them for whole batches. Differentiable in the states and the head. A loss that needs
--- all logits can take some rows after the other; see `losses.by_rows`.
---
--- Example: local logits = model:head(model:hidden_states(batch, { labelled = true }):slice(0, 0, 512))
---@param states engine.Tensor [rows, hidden], as `hidden_states` gives them behind all layers
---@return engine.Tensor logits [rows, vocab], f32
function Model:head(states) end

--- What a layer makes of each token, with `labelled` of those alone that have a label: the residual stream behind the first `layer` layers (0: the embeddings), or, by default, behind
--- all of them and the final norm, which is what the head reads. Differentiable: value heads and probes stand on it; under
--- `tensor.no_grad` it gives embeddings of texts.
---
--- Example: local values = model:hidden_states(batch):matmul(value_head):squeeze(1)
---@param batch engine.Batch
---@param options? { layer?: integer, labelled?: boolean } layer: default the number of layers
---@return engine.Tensor states [tokens, hidden] or [labelled, hidden], f32
function Model:hidden_states(batch, options) end

--- The logits of every token, or with `labelled` of those alone that have a label. Differentiable, and large: a loss over
--- labels alone goes through `logprobs` or `cross_entropy`, which store no logits, and one over logits through `losses.by_rows`.
---
--- Example: local student = policy:logits(batch, { labelled = true }):log_softmax(-1)
---@param batch engine.Batch
---@param options? { labelled?: boolean }
---@return engine.Tensor logits [tokens, vocab] or [labelled, vocab], f32
function Model:logits(batch, options) end

--- The log-probability of each position's label; 0 where there is none. Differentiable.
---
--- Example: losses.nll(policy:logprobs(batch), batch.mask):backward()
---@param batch engine.Batch
---@param options? { temperature?: number } logits are divided by it
---@return engine.Tensor logprobs [tokens], f32, natural log
function Model:logprobs(batch, options) end

--- Adds the adapter to the weights, in f32, and sets it aside until `unmerge`: the model computes as fast as one without an
--- adapter, and nothing of it trains. The weights as they were stay in memory. `save` needs no merge.
---
--- Example: policy:merge()
function Model:merge() end

--- A copy of the parameter of that Hugging Face name. Those of an adapter are called `MODULE.lora_A.weight`,
--- `MODULE.lora_B.weight` and, with DoRA, `MODULE.lora_magnitude_vector`; of the embedding `lora_embedding_A` and `lora_embedding_B`.
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
--- model. Logits, weights and the loss are differentiable, for losses of one's own beside or in place of the one that
--- `cross_entropy` contains (`router_aux_loss_coef = 0` leaves that out); to look only, take `tensor.no_grad`.
---
--- Example: local share = model:routing(batch)[1].experts:eq(0):mean():item()
---@param batch engine.Batch
---@return { experts: engine.Tensor, weights: engine.Tensor, logits: engine.Tensor }[] layers experts: [tokens, k], i32, the best first; weights: [tokens, k], f32; logits: [tokens, experts], f32
---@return engine.Tensor? load_balance [], f32
function Model:routing(batch) end

--- Writes a Hugging Face checkpoint folder, with the tokenizer. An adapter is written as part of the weights; the model stays
--- as it is. `stop_tokens` are the tokens after which texts of the saved model end, in place of this one's: a base model that
--- has learned to chat ends at `<|im_end|>` too.
---
--- Example: model:save("checkpoints/mine", { dtype = "bf16" })
---@param folder string
---@param options? { dtype?: "f32"|"bf16", stop_tokens?: string[] } dtype: default the model's own
function Model:save(folder, options) end

--- Writes the adapter alone, as a PEFT folder.
---
--- Example: policy:save_adapter("checkpoints/my-adapter")
---@param folder string
---@param options? { dtype?: "f32"|"bf16" } default: the model's own
function Model:save_adapter(folder, options) end

--- The score of each document, from its last token. Differentiable. The model has the head "score".
---
--- Example: local margin = reward:scores(chosen) - reward:scores(rejected)
---@param batch engine.Batch
---@return engine.Tensor scores [documents], f32
function Model:scores(batch) end

--- Sets the parameter of that Hugging Face name. With `parameter` and tensor operations, what merges checkpoints.
---
--- Example: model:set_parameter(name, base:parameter(name) + task:parameter(name) * 0.5)
---@param name string
---@param value engine.Tensor of the parameter's shape, finite numbers
function Model:set_parameter(name, value) end

--- Undoes `freeze`, for the weights that `names` name, or for all. What never trained, the base of an adapter, stays frozen.
---
--- Example: policy:thaw { "layers.0" }
---@param names? string[] as of `freeze`
function Model:thaw(names) end

--- Puts back, to the bit, the weights that `merge` changed, and the adapter.
---
--- Example: policy:unmerge()
function Model:unmerge() end

--- An optimizer that merges each update with what a reference model had learnt over its base (Online Merging Optimizer,
--- arXiv 2405.17931): `theta += (1 - alpha) * F(update) + alpha * F(reference - base)`. With "dare" F keeps random elements,
--- with "ties" the largest of each tensor, where signs agree. The update is Adam's with eps outside the bias correction, as
--- in the published code; weight decay comes after it. With `every` = k, k - 1 updates are plain Adam's; at the k-th they are taken
--- back and the sum of all is merged, at the price of a copy of the weights that train, in f32.
---@class engine.OnlineMerge
---@field base engine.Model before the reference was trained
---@field reference engine.Model for example the SFT model that the policy began as
---@field method? "dare"|"ties" default "dare"
---@field alpha? number default 1e-7
---@field every? integer updates that are merged together, default 1
---@field reserve? number share of the elements that stay, default 0.01
---@field rescale? boolean divide what stays by `reserve`, as the published code does with "dare" and the paper does not

--- AdamW over a model. In a workflow use run:optimizer. Defaults: lr 1e-3, betas 0.9 and 0.95, eps 1e-8, weight_decay 0.1
--- on matrices (decay_vectors: on vectors too), clip_norm 1 (false: none), moments "f32" ("bf16": half the memory, rounded
--- stochastically, so that small changes count in the mean).
---
--- Example: local optim = engine.optim.adamw(model, { lr = 3e-4 })
---@param model engine.Model
---@param options? { lr?: number, betas?: number[], eps?: number, weight_decay?: number, decay_vectors?: boolean, clip_norm?: number|false, moments?: "f32"|"bf16", merge?: engine.OnlineMerge }
---@return engine.Optimizer optimizer
function optim.adamw(model, options) end

--- Muon over the matrices of a model's layers, AdamW over the rest (vectors, embeddings, heads). An update of a matrix is the momentum
--- of its gradient made nearly orthogonal, so that it moves the matrix in all directions alike, times `0.2 sqrt(max(rows, columns))`:
--- as large as one of AdamW, so that both share `lr` and `weight_decay` (arXiv 2502.16982). It often learns as much as AdamW in half
--- the steps, at twice AdamW's best rate, and keeps one moment in place of two. Defaults: momentum 0.95, else those of optim.adamw;
--- `betas` and `eps` are for what AdamW updates.
---
--- Example: local optim = engine.optim.muon(model, { lr = 3e-3 })
---@param model engine.Model
---@param options? { lr?: number, betas?: number[], eps?: number, weight_decay?: number, decay_vectors?: boolean, clip_norm?: number|false, moments?: "f32"|"bf16", momentum?: number }
---@return engine.Optimizer optimizer
function optim.muon(model, options) end

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
---@param options { lr?: number, betas?: number[], eps?: number, weight_decay?: number, decay_vectors?: boolean, clip_norm?: number|false, moments?: "f32"|"bf16", momentum?: number } `momentum` of muon
function Optimizer:set(options) end

--- Updates the parameters by the gradients that `backward` left, and clears them. A gradient that is not finite changes
--- nothing.
---
--- Example: step:log { grad_norm = optim:step() }
---@return number grad_norm before clipping
---@return boolean applied
function Optimizer:step() end
