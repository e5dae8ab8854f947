--- Losses over pairs of answers: reward models, DPO and its relatives. `require "std.losses"` holds them too.
---
--- Pairs lie as `Data:pairs` gives them: the chosen answer of pair i at 2i, the rejected one at 2i + 1, counted from 0. Below,
--- pi_w and pi_l are log-probabilities of the chosen and the rejected answer under the policy, ref_w and ref_l under the
--- reference, each summed over the answer; h_w = pi_w - ref_w, h_l = pi_l - ref_l, h = h_w - h_l; ls is log sigmoid.

local std_options = require "std.options"
local check, check_shape, check_number = std_options.check, std_options.check_shape, std_options.check_number

---@class std.preference_losses
local preference_losses = {}

--- log sigmoid(x), which does not overflow.
local function log_sigmoid(x) return -(-x):softplus() end

--- The chosen and the rejected of [2n].
local function split(name, arg, values)
  if values.rank ~= 1 or values.count % 2 ~= 0 or values.count == 0 then
    local got = table.concat(values.shape, ", ")
    error(("std.losses.%s: `%s` should be [2n], chosen and rejected in turn, got [%s]"):format(name, arg, got), 3)
  end
  local pairs_of_two = values:reshape { -1, 2 }
  return pairs_of_two:select(1, 0), pairs_of_two:select(1, 1)
end

--- Numbers to log about scores of pairs.
local function statistics(chosen, rejected)
  chosen, rejected = chosen:detach(), rejected:detach()
  return {
    chosen_reward = chosen:mean():item(),
    rejected_reward = rejected:mean():item(),
    margin = (chosen - rejected):mean():item(),
    accuracy = chosen:gt(rejected):mean():item(),
  }
end

--- Log-probabilities summed by document: what preference losses are made of.
---
--- Example: local sums = losses.sequence_sums(policy:logprobs(batch), batch)
---@param logprobs engine.Tensor [tokens]
---@param batch engine.Batch|table with `mask` and `sequence`, [tokens], and `documents` or `cu_seqlens`
---@param count? integer sums to give, where `sequence` counts beyond this batch: the rollouts of the update
---@return engine.Tensor sums [documents]
function preference_losses.sequence_sums(logprobs, batch, count)
  check_shape("std.losses.sequence_sums", "logprobs", logprobs, batch.mask)
  count = count or batch.documents or batch.cu_seqlens.count - 1
  return (logprobs * batch.mask):segment_sum(batch.sequence, count)
end

--- Tokens with a label, by document.
---
--- Example: local lengths = losses.sequence_lengths(batch)
---@param batch engine.Batch|table as for `sequence_sums`
---@param count? integer as for `sequence_sums`
---@return engine.Tensor lengths [documents], f32
function preference_losses.sequence_lengths(batch, count)
  return batch.mask:segment_sum(batch.sequence, count or batch.documents or batch.cu_seqlens.count - 1)
end

--- The rewards that a policy implies: beta (log pi - log ref) of each answer.
---
--- Example: local rewards = losses.implicit_rewards(sums, reference_sums, 0.1)
---@param policy_sums engine.Tensor [2n]
---@param reference_sums? engine.Tensor [2n], zeros if left out
---@param beta number
---@return engine.Tensor rewards [2n]
function preference_losses.implicit_rewards(policy_sums, reference_sums, beta)
  if reference_sums then check_shape("std.losses.implicit_rewards", "reference_sums", reference_sums, policy_sums) end
  return (reference_sums and policy_sums - reference_sums or policy_sums) * beta
end

--- Bradley and Terry's loss of a reward model: -ls(r_w - r_l - margin), and `center` (r_w + r_l)^2, which keeps rewards
--- around 0. Its mean over pairs, or its sum divided by `normalizer`, the pairs of all micro-batches of an update.
--- Source: Ouyang et al., arXiv 2203.02155, eq. 1; centring: Eisenstein et al., arXiv 2312.09244.
---
--- Example: local loss, stats = losses.bradley_terry(rewards, { center = 0.01 })
---@param rewards engine.Tensor [2n]
---@param options? { margin?: engine.Tensor|number, center?: number, normalizer?: number } margin: [n]
---@return engine.Tensor loss
---@return { accuracy: number, margin: number, chosen_reward: number, rejected_reward: number } statistics
function preference_losses.bradley_terry(rewards, options)
  options = check("std.losses.bradley_terry", options, { "margin", "center", "normalizer" })
  local chosen, rejected = split("bradley_terry", "rewards", rewards)
  if options.margin and type(options.margin) ~= "number" then
    check_shape("std.losses.bradley_terry", "margin", options.margin, chosen)
  end
  check_number("std.losses.bradley_terry", "center", options.center, 0)
  check_number("std.losses.bradley_terry", "normalizer", options.normalizer, 0, { above = true })
  local loss = -log_sigmoid(chosen - rejected - (options.margin or 0))
  if options.center then loss = loss + (chosen + rejected):square() * options.center end
  return loss:sum() / (options.normalizer or chosen.count), statistics(chosen, rejected)
end

--- The loss of one query with several good and several bad answers: the mean of -ls(r_good - r_bad) over all of their pairs.
--- Source: Qwen2.5-Math, arXiv 2409.12122, section 3.2.
---
--- Example: losses.bradley_terry_list(rewards:slice(0, 0, 2), rewards:slice(0, 2)):backward()
---@param good engine.Tensor [k]
---@param bad engine.Tensor [m]
---@return engine.Tensor loss
function preference_losses.bradley_terry_list(good, bad)
  for name, given in pairs { good = good, bad = bad } do
    if given.rank ~= 1 or given.count == 0 then
      local got = table.concat(given.shape, ", ")
      error(("std.losses.bradley_terry_list: `%s` should be [n] with at least one reward, got [%s]"):format(name, got), 2)
    end
  end
  return -log_sigmoid(good:unsqueeze(1) - bad:unsqueeze(0)):mean()
end

--- Each takes h_w, h_l, beta and the label smoothing, and gives the loss of each pair.
local kinds = {}

--- -(1 - e) ls(beta h) - e ls(-beta h): DPO, and with label smoothing e conservative DPO.
--- Source: arXiv 2305.18290, eq. 7; https://ericmitchell.ai/cdpo.pdf
kinds.sigmoid = function(h_w, h_l, beta, smoothing)
  local logits = (h_w - h_l) * beta
  if smoothing == 0 then return -log_sigmoid(logits) end
  return -log_sigmoid(logits) * (1 - smoothing) - log_sigmoid(-logits) * smoothing
end

--- [-(1 - e) ls(beta h) + e ls(-beta h)] / (1 - 2e): unbiased where a share e of labels is flipped.
--- Source: Chowdhury et al., arXiv 2403.00409.
kinds.robust = function(h_w, h_l, beta, smoothing)
  local logits = (h_w - h_l) * beta
  return (-log_sigmoid(logits) * (1 - smoothing) + log_sigmoid(-logits) * smoothing) / (1 - 2 * smoothing)
end

--- max(0, 1 - beta h). Source: SLiC, arXiv 2305.10425.
kinds.hinge = function(h_w, h_l, beta) return (1 - (h_w - h_l) * beta):relu() end

--- (h - 1 / (2 beta))^2, of means over tokens. Source: Azar et al., arXiv 2310.12036, eq. 17.
kinds.ipo = function(h_w, h_l, beta) return (h_w - h_l - 1 / (2 * beta)):square() end

--- -ls(beta h), of means over tokens.
kinds.sigmoid_norm = function(h_w, h_l, beta) return kinds.sigmoid(h_w, h_l, beta, 0) end

--- -ls(beta h_w) - ls(-beta h_l): each answer is judged alone. Source: BCO without its shift, arXiv 2404.04656.
kinds.bco_pair = function(h_w, h_l, beta) return -log_sigmoid(h_w * beta) - log_sigmoid(-h_l * beta) end

--- (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2. Source: SPPO, arXiv 2405.00675.
kinds.sppo_hard = function(h_w, h_l, beta) return (h_w - 1 / (2 * beta)):square() + (h_l + 1 / (2 * beta)):square() end

--- -ls(beta h_w) - ls(-beta h_w) / 2 - ls(-beta h_l) / 2. Source: NCA, arXiv 2402.05369.
kinds.nca_pair = function(h_w, h_l, beta)
  return -log_sigmoid(h_w * beta) - log_sigmoid(-h_w * beta) * 0.5 - log_sigmoid(-h_l * beta) * 0.5
end

local by_length = { ipo = true, sigmoid_norm = true }
local smoothed = { sigmoid = true, robust = true }

--- Direct preference optimisation and its relatives (`kind`, default "sigmoid"; the equations stand above each in this file):
--- sigmoid, robust, hinge, ipo, sigmoid_norm, bco_pair, sppo_hard, nca_pair. Its mean over pairs; the sum divided by
--- `normalizer`; or, with reduction "none", the loss of each pair.
---
--- `ipo` and `sigmoid_norm` take means over the tokens of an answer, so they need `lengths`. `nll` adds that many times the
--- mean of -log p over the tokens of chosen answers, which needs `lengths` too. Without a reference (nil, or
--- `reference_free`) ref_w = ref_l = 0. Source: Rafailov et al., arXiv 2305.18290, eq. 7.
---
--- Example: local loss, stats = losses.dpo(sums, reference_sums, { beta = 0.1 })
---@param policy_sums engine.Tensor [2n], as `sequence_sums` gives them
---@param reference_sums? engine.Tensor [2n], without a derivative
---@param options? { kind?: string, beta?: number, label_smoothing?: number, lengths?: engine.Tensor, reference_free?: boolean, nll?: number, normalizer?: number, reduction?: "mean"|"none" } beta: default 0.1
---@return engine.Tensor loss
---@return { accuracy: number, margin: number, chosen_reward: number, rejected_reward: number } statistics of implicit rewards
function preference_losses.dpo(policy_sums, reference_sums, options)
  local known = { "kind", "beta", "label_smoothing", "lengths", "reference_free", "nll", "normalizer", "reduction" }
  options = check("std.losses.dpo", options, known)
  local kind, beta, smoothing = options.kind or "sigmoid", options.beta or 0.1, options.label_smoothing or 0
  if not kinds[kind] then
    local expected = "sigmoid, robust, hinge, ipo, sigmoid_norm, bco_pair, sppo_hard or nca_pair"
    error(("std.losses.dpo: `kind` should be %s, got %s"):format(expected, tostring(kind)), 2)
  end
  check_number("std.losses.dpo", "beta", beta, 0, { above = true })
  check_number("std.losses.dpo", "nll", options.nll, 0)
  check_number("std.losses.dpo", "normalizer", options.normalizer, 0, { above = true })
  if options.reduction ~= nil and options.reduction ~= "mean" and options.reduction ~= "none" then
    error(("std.losses.dpo: `reduction` should be mean or none, got %s"):format(tostring(options.reduction)), 2)
  end
  if smoothing ~= 0 and not smoothed[kind] or smoothing < 0 or smoothing >= 0.5 then
    local expected = "from 0 to below 0.5, and 0 unless kind is sigmoid or robust"
    error(("std.losses.dpo: `label_smoothing` should be %s, got %g with %s"):format(expected, smoothing, kind), 2)
  end
  if (by_length[kind] or options.nll) and not options.lengths then
    local asks = by_length[kind] and kind or "nll"
    error(("std.losses.dpo: `lengths` should be given for %s: losses.sequence_lengths(batch)"):format(asks), 2)
  end
  if options.reference_free then reference_sums = nil end
  for name, other in pairs { reference_sums = reference_sums, lengths = options.lengths } do
    check_shape("std.losses.dpo", name, other, policy_sums)
  end
  local h = reference_sums and policy_sums - reference_sums or policy_sums
  -- An answer of which nothing is learned has a mean of 0.
  local judged = by_length[kind] and h / options.lengths:maximum(1) or h
  local h_w, h_l = split("dpo", "policy_sums", judged)
  local loss = kinds[kind](h_w, h_l, beta, smoothing)
  if options.reduction ~= "none" then loss = loss:sum() / (options.normalizer or h_w.count) end
  if options.nll then
    local chosen, tokens = split("dpo", "policy_sums", policy_sums), split("dpo", "lengths", options.lengths)
    loss = loss - chosen:sum() / tokens:sum() * options.nll
  end
  return loss, statistics(split("dpo", "policy_sums", h * beta))
end

return preference_losses
