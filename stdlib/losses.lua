--- Losses, in terms of tensors. Each returns a tensor of one element to call :backward() on, unless `reduction` says else.
---
--- Options that all of them know: `reduction` is "mean" (default), "sum" or "none"; `mask`, of the shape of the
--- element-wise loss, holds 1 where an element counts and 0 where it does not. With a mask, "mean" is
--- sum(mask * loss) / sum(mask), so padding changes nothing; a mask of zeros gives 0.

local engine = require "engine"

local losses = {}

---@class std.LossOptions
---@field reduction? "mean"|"sum"|"none" default "mean"
---@field mask? engine.Tensor 1 where an element counts, else 0

local function check_options(name, options, known)
  for key in pairs(options) do
    local found = false
    for _, name_known in ipairs(known) do found = found or name_known == key end
    if not found then
      error(("std.losses.%s: option should be one of %s, got `%s`"):format(name, table.concat(known, ", "), tostring(key)), 3)
    end
  end
end

--- Reduces an element-wise loss as the options say.
local function reduce(name, loss, options)
  local reduction = options.reduction or "mean"
  if reduction ~= "mean" and reduction ~= "sum" and reduction ~= "none" then
    error(("std.losses.%s: `reduction` should be mean, sum or none, got %s"):format(name, tostring(reduction)), 3)
  end
  if options.mask then loss = loss * options.mask end
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
  options = options or {}
  check_options("mse", options, { "reduction", "mask" })
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
  options = options or {}
  check_options("huber", options, { "delta", "reduction", "mask" })
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
  options = options or {}
  check_options("bce", options, { "reduction", "mask" })
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
  options = options or {}
  check_options("cross_entropy", options, { "reduction", "label_smoothing" })
  if logits.rank ~= 2 or labels.rank ~= 1 then
    error("std.losses.cross_entropy: `logits` should be [rows, classes] and `labels` [rows]", 2)
  end
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
  options = options or {}
  check_options("nll", options, { "normalizer" })
  local count = options.normalizer or math.max(mask:sum():item(), 1)
  return -(logprobs * mask):sum() / count
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
  options = options or {}
  check_options("kl", options, { "reduction", "mask" })
  return reduce("kl", (p:exp() * (p - q)):sum(-1), options)
end

return losses
