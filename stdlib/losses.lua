--- Losses, in terms of tensors. Each returns a tensor of one element to call :backward() on, unless `reduction` says else.
---
--- Options that all of them know: `reduction` is "mean" (default), "sum" or "none"; `mask`, of the shape of the
--- element-wise loss, holds 1 where an element counts and 0 where it does not. With a mask, "mean" is
--- sum(mask * loss) / sum(mask), so padding changes nothing; a mask of zeros gives 0.

local std_options = require "std.options"
local check, check_shape, check_number = std_options.check, std_options.check_shape, std_options.check_number

---@class std.losses: std.preference_losses, std.policy_losses
local losses = {}

-- Losses over pairs of answers, and over answers that a policy sampled, stand in files of their own.
for _, part in ipairs { "std.preference_losses", "std.policy_losses" } do
  for name, loss in pairs(require(part)) do losses[name] = loss end
end

---@class std.LossOptions
---@field reduction? "mean"|"sum"|"none" default "mean"
---@field mask? engine.Tensor 1 where an element counts, else 0

--- Reduces an element-wise loss as the options say. Losses leave by a tail call, so the frame behind this one is the user's.
local function reduce(name, loss, options)
  local reduction = options.reduction or "mean"
  if reduction ~= "mean" and reduction ~= "sum" and reduction ~= "none" then
    error(("std.losses.%s: `reduction` should be mean, sum or none, got %s"):format(name, tostring(reduction)), 2)
  end
  if options.mask then
    check_shape("std.losses." .. name, "mask", options.mask, loss)
    loss = loss * options.mask
  end
  if reduction == "none" then return loss end
  if reduction == "sum" then return loss:sum() end
  if options.mask then return loss:sum() / math.max(options.mask:sum():item(), 1) end
  return loss:mean()
end

--- Mean squared error: (prediction - target)^2.
---
--- Example: losses.mse(w:matmul(x), y):backward()
---@param prediction engine.Tensor any shape, f32
---@param target engine.Tensor of the same shape
---@param options? std.LossOptions
---@return engine.Tensor loss
function losses.mse(prediction, target, options)
  options = check("std.losses.mse", options, { "reduction", "mask" })
  if type(target) ~= "number" then check_shape("std.losses.mse", "target", target, prediction) end
  return reduce("mse", (prediction - target):square(), options)
end

--- Huber's loss with threshold d (`delta`), e = prediction - target: e^2 / 2 where |e| <= d, else d (|e| - d / 2).
--- Source: Huber, Annals of Mathematical Statistics 35, 1964.
---
--- Example: losses.huber(prediction, target, { delta = 0.5 }):backward()
---@param prediction engine.Tensor any shape, f32
---@param target engine.Tensor of the same shape
---@param options? { delta?: number, reduction?: "mean"|"sum"|"none", mask?: engine.Tensor } delta: default 1
---@return engine.Tensor loss
function losses.huber(prediction, target, options)
  options = check("std.losses.huber", options, { "delta", "reduction", "mask" })
  if type(target) ~= "number" then check_shape("std.losses.huber", "target", target, prediction) end
  check_number("std.losses.huber", "delta", options.delta, 0, { above = true })
  local delta = options.delta or 1
  local size = (prediction - target):abs()
  local near = size:clamp { max = delta }
  return reduce("huber", near * (size - near * 0.5), options)
end

--- Binary cross-entropy from logits x and targets y in [0, 1]: softplus(x) - x y, which equals
--- -y log(sigmoid(x)) - (1 - y) log(1 - sigmoid(x)) and does not overflow.
---
--- Example: losses.bce(scores, is_good):backward()
---@param logits engine.Tensor any shape, f32
---@param targets engine.Tensor of the same shape, values from 0 to 1
---@param options? std.LossOptions
---@return engine.Tensor loss
function losses.bce(logits, targets, options)
  options = check("std.losses.bce", options, { "reduction", "mask" })
  if type(targets) ~= "number" then check_shape("std.losses.bce", "targets", targets, logits) end
  return reduce("bce", logits:softplus() - logits * targets, options)
end

--- Categorical cross-entropy of small problems: -log_softmax(logits)[label], by rows. Rows whose label is negative (-100)
--- do not count. For a language model use `model:cross_entropy(batch)`, which never stores the logits.
---
--- Example: losses.cross_entropy(features:matmul(head), labels):backward()
---@param logits engine.Tensor [rows, classes], f32
---@param labels engine.Tensor [rows], i32
---@param options? { reduction?: "mean"|"sum"|"none", label_smoothing?: number } smoothing s: (1 - s) nll + s mean(-logp)
---@return engine.Tensor loss
function losses.cross_entropy(logits, labels, options)
  options = check("std.losses.cross_entropy", options, { "reduction", "label_smoothing" })
  if logits.rank ~= 2 or labels.rank ~= 1 or labels.count ~= logits.shape[1] then
    error("std.losses.cross_entropy: `logits` should be [rows, classes] and `labels` [rows]", 2)
  end
  check_number("std.losses.cross_entropy", "label_smoothing", options.label_smoothing, 0, { most = 1 })
  local counted = labels:ge(0)
  local logp = logits:log_softmax(1)
  local chosen = labels:maximum(0):unsqueeze(1)
  local loss = -logp:gather(1, chosen):squeeze(1)
  local smoothing = options.label_smoothing or 0
  if smoothing > 0 then loss = loss * (1 - smoothing) - logp:mean(1) * smoothing end
  return reduce("cross_entropy", loss, { reduction = options.reduction, mask = counted })
end

--- Negative log-likelihood of log-probabilities that a model gave: -logprobs, over the positions that count. With
--- `normalizer` the sum is divided by it: the supervised tokens of all micro-batches of one update.
---
--- Example: losses.nll(policy:logprobs(batch), batch.mask):backward()
---@param logprobs engine.Tensor [tokens], f32
---@param mask engine.Tensor [tokens], 1 where a token counts
---@param options? { normalizer?: number }
---@return engine.Tensor loss
function losses.nll(logprobs, mask, options)
  options = check("std.losses.nll", options, { "normalizer" })
  check_shape("std.losses.nll", "mask", mask, logprobs)
  check_number("std.losses.nll", "normalizer", options.normalizer, 0, { above = true })
  local count = options.normalizer or math.max(mask:sum():item(), 1)
  return -(logprobs * mask):sum() / count
end

--- Supervised fine-tuning: -log p of the supervised tokens, their mean; with `normalizer` the sum divided by it, the
--- supervised tokens of all micro-batches of one update: a mean of means would weigh short batches more.
---
--- Example: losses.sft(policy:logprobs(batch), batch):backward()
---@param logprobs engine.Tensor [tokens], f32
---@param batch engine.Batch|table with `mask`
---@param options? { normalizer?: number }
---@return engine.Tensor loss
function losses.sft(logprobs, batch, options)
  options = check("std.losses.sft", options, { "normalizer" })
  return losses.nll(logprobs, batch.mask, options)
end

--- Kullback-Leibler divergence between two categorical distributions given as log-probabilities:
--- sum over the last axis of exp(p) (p - q).
---
--- Example: losses.kl(policy_logits:log_softmax(), reference_logits:log_softmax()):backward()
---@param p engine.Tensor [..., classes], log-probabilities
---@param q engine.Tensor of the same shape, log-probabilities
---@param options? std.LossOptions
---@return engine.Tensor loss
function losses.kl(p, q, options)
  options = check("std.losses.kl", options, { "reduction", "mask" })
  check_shape("std.losses.kl", "q", q, p)
  return reduce("kl", (p:exp() * (p - q)):sum(-1), options)
end

--- The mean entropy of softmax(logits) by rows: -sum p log p.
---
--- Example: local loss = loss - losses.entropy(logits) * 0.01
---@param logits engine.Tensor [..., classes], f32
---@param options? std.LossOptions
---@return engine.Tensor entropy
function losses.entropy(logits, options)
  options = check("std.losses.entropy", options, { "reduction", "mask" })
  local logp = logits:log_softmax(-1)
  return reduce("entropy", -(logp:exp() * logp):sum(-1), options)
end

--- Distillation from a teacher's logits, T and S being the two distributions at temperature t; by `divergence`:
--- "forward" KL(T || S); "reverse" KL(S || T); "jsd" b KL(T || M) + (1 - b) KL(S || M) with M = b T + (1 - b) S and b = `beta`,
--- default 0.5. Times t^2, which keeps the size of gradients. Sources: Hinton et al., arXiv 1503.02531; jsd: Agarwal et al.,
--- arXiv 2306.13649, eq. 1.
---
--- Example: losses.distill(head_logits, teacher:logits(batch), { divergence = "reverse", mask = batch.mask }):backward()
---@param student engine.Tensor [n, vocab], f32
---@param teacher engine.Tensor [n, vocab], f32, without a derivative
---@param options? { divergence?: "forward"|"reverse"|"jsd", temperature?: number, beta?: number, reduction?: "mean"|"sum"|"none", mask?: engine.Tensor } divergence: default "forward"
---@return engine.Tensor loss
function losses.distill(student, teacher, options)
  options = check("std.losses.distill", options, { "divergence", "temperature", "beta", "reduction", "mask" })
  local divergence, t, b = options.divergence or "forward", options.temperature or 1, options.beta or 0.5
  check_shape("std.losses.distill", "teacher", teacher, student)
  check_number("std.losses.distill", "temperature", options.temperature, 0, { above = true })
  local s, q = (student / t):log_softmax(-1), (teacher:detach() / t):log_softmax(-1)
  local function kl(p, other) return (p:exp() * (p - other)):sum(-1) end
  local loss
  if divergence == "forward" then
    loss = kl(q, s)
  elseif divergence == "reverse" then
    loss = kl(s, q)
  elseif divergence == "jsd" and b > 0 and b < 1 then
    -- log(b e^q + (1 - b) e^s), without leaving the logarithms.
    local m = q + math.log(b) + (s - q + math.log((1 - b) / b)):softplus()
    loss = kl(q, m) * b + kl(s, m) * (1 - b)
  else
    local got = divergence == "jsd" and ("jsd with beta %g"):format(b) or tostring(divergence)
    error(("std.losses.distill: `divergence` should be forward, reverse, or jsd with beta between 0 and 1, got %s"):format(got), 2)
  end
  return reduce("distill", loss * (t * t), options)
end

--- Runs a loss over all logits of a batch's labelled tokens backwards, some of them at a time, so that only so many logits exist
--- together. `part` gets the logits of tokens `first + 1` to `last` of those that have a label, and returns their part of the loss. Leaves
--- gradients as `backward` does.
---
--- Example: local loss = losses.by_rows(student, batch, function(logits, first, last)
---   return losses.distill(logits, teacher:head(states:slice(0, first, last)), { reduction = "sum" }) / batch.supervised
--- end)
---@param model engine.Model
---@param batch engine.Batch
---@param part fun(logits: engine.Tensor, first: integer, last: integer): engine.Tensor
---@param options? { rows?: integer } rows: tokens of a part, default 64
---@return number loss the sum of its parts
function losses.by_rows(model, batch, part, options)
  options = check("std.losses.by_rows", options, { "rows" })
  -- With Qwen's vocabulary 64 rows of logits are 39 MB. 256 took three times the memory and half as long again, most of it for fresh pages.
  local rows, loss = options.rows or 64, 0.0
  if math.type(rows) ~= "integer" or rows < 1 then
    error(("std.losses.by_rows: `rows` should be a whole number of at least 1, got %s"):format(tostring(rows)), 2)
  end
  local states = model:hidden_states(batch, { labelled = true })
  local leaf = states:detach():requires_grad()
  for first = 0, states.shape[1] - 1, rows do
    local last = math.min(first + rows, states.shape[1])
    local some = part(model:head(leaf:slice(0, first, last)), first, last)
    some:backward()
    loss = loss + some:item()
  end
  -- The leaf once more, times nothing: where no layer trains, the states alone have no derivative.
  if leaf.grad then (states * leaf.grad:detach() + leaf * 0):sum():backward() end
  return loss
end

return losses
