--- Losses over answers that a policy sampled: GRPO and its relatives, estimators of KL, entropy, on-policy distillation.
--- `require "std.losses"` holds them too.
---
--- A batch here is any table with, for each token, `mask` (1 where the policy sampled it), `sequence` (i32, which rollout it
--- belongs to, counted over the whole update), and `logprobs` (under the policy that sampled it; if left out, the policy of
--- this moment). `rollouts`, if it is there, is how many the update has. Below, rho_t = exp(log p - log p_old), A the advantage of
--- the token's rollout, |o_i| its sampled tokens.

local tensor = require("engine").tensor
local std_options = require "std.options"
local check, check_shape, check_number, with = std_options.check, std_options.check_shape, std_options.check_number, std_options.with

---@class std.policy_losses
local policy_losses = {}

--- Advantages within groups of answers to one prompt: (r - mean) / (std + eps), which is 0 where all rewards are equal. With
--- `std` false only the mean is taken off; with "batch" the deviation is that of all rewards.
--- Source: Shao et al., arXiv 2402.03300, section 4.1.2; std false: Liu et al., arXiv 2503.20783.
---
--- Example: local advantage = losses.group_advantage(rewards.score(rollouts, reward), 8)
---@param reward engine.Tensor [rollouts], the answers of a group side by side
---@param group integer answers of a group
---@param options? { std?: boolean|"batch", eps?: number, ddof?: integer } defaults: true, 1e-4, 1 (0: the plain deviation)
---@return engine.Tensor advantage [rollouts]
function policy_losses.group_advantage(reward, group, options)
  options = check("std.losses.group_advantage", options, { "std", "eps", "ddof" })
  local ddof, std = options.ddof or 1, options.std
  if std ~= nil and type(std) ~= "boolean" and std ~= "batch" then
    error(("std.losses.group_advantage: `std` should be true, false or \"batch\", got %s"):format(tostring(std)), 2)
  end
  check_shape("std.losses.group_advantage", "reward", reward, { type(reward) == "userdata" and reward.count or "rollouts" })
  if math.type(group) ~= "integer" or group <= ddof and std ~= false or reward.count % group ~= 0 then
    local expected = ("an integer above %d that divides %d rewards"):format(std == false and 0 or ddof, reward.count)
    error(("std.losses.group_advantage: `group` should be %s, got %s"):format(expected, tostring(group)), 2)
  end
  local groups = reward:detach():to("f32"):reshape { -1, group }
  local advantage = groups - groups:mean(1, { keepdim = true })
  if std ~= false then
    local axis = std ~= "batch" and 1 or nil
    advantage = advantage / (groups:std(axis, { keepdim = true, correction = ddof }) + (options.eps or 1e-4))
  end
  return advantage:reshape { -1 }
end

--- For each group, 1 if its rewards differ, else 0: equal rewards teach nothing, and DAPO samples such prompts again.
---
--- Example: local share = losses.group_signal(rewards.score(rollouts, reward), 8):mean()
---@param reward engine.Tensor [rollouts]
---@param group integer
---@return engine.Tensor signal [groups]
function policy_losses.group_signal(reward, group)
  if math.type(group) ~= "integer" or group < 1 or reward.count % group ~= 0 then
    local expected = ("an integer that divides %d rewards"):format(reward.count)
    error(("std.losses.group_signal: `group` should be %s, got %s"):format(expected, tostring(group)), 2)
  end
  local groups = reward:detach():to("f32"):reshape { -1, group }
  return groups:max(1):gt(groups:min(1))
end

--- What to add to the reward of long answers: 0 up to max - cache tokens, then falling in a line to -1 at max, and -1 beyond.
--- Source: DAPO, Yu et al., arXiv 2503.14476, eq. 13.
---
--- Example: local reward = reward + losses.overlong_penalty(rollouts.lengths, 512, 128)
---@param lengths integer[]|engine.Tensor [rollouts], sampled tokens
---@param max integer
---@param cache integer
---@return engine.Tensor penalty [rollouts], f32
function policy_losses.overlong_penalty(lengths, max, cache)
  if cache <= 0 or cache > max then
    error(("std.losses.overlong_penalty: `cache` should be above 0 and at most %s, got %s"):format(max, cache), 2)
  end
  if type(lengths) == "table" then lengths = tensor.new(lengths) end
  return ((max - cache - lengths:to("f32")) / cache):clamp { min = -1, max = 0 }
end

--- Estimates of KL(pi || ref), token by token, from samples of pi; d = log ref - log pi. "k1": -d. "k2": d^2 / 2. "k3":
--- exp(d) - d - 1, which is never negative, and as k1 has the right mean. Source: Schulman, joschu.net/blog/kl-approx.html.
---
--- Example: local kl = losses.kl_estimate(policy:logprobs(batch), reference:logprobs(batch))
---@param logprobs engine.Tensor [tokens]
---@param reference engine.Tensor [tokens], without a derivative
---@param kind? "k1"|"k2"|"k3" default "k3"
---@return engine.Tensor kl [tokens]
function policy_losses.kl_estimate(logprobs, reference, kind)
  check_shape("std.losses.kl_estimate", "reference", reference, logprobs)
  local d = reference - logprobs
  if kind == "k1" then return -d end
  if kind == "k2" then return d:square() * 0.5 end
  if kind == nil or kind == "k3" then return d:exp() - d - 1 end
  error(("std.losses.kl_estimate: `kind` should be k1, k2 or k3, got %s"):format(tostring(kind)), 2)
end

--- A bonus for entropy H, to be added to a loss: -coefficient sum(H) / N over the positions that count.
---
--- Example: local loss = loss + losses.entropy_bonus(policy:entropy(batch), batch.mask, { coefficient = 0.01 })
---@param entropy engine.Tensor [tokens]
---@param mask engine.Tensor [tokens]
---@param options? { coefficient?: number, normalizer?: number } defaults: 0.01, the tokens of the mask
---@return engine.Tensor loss
function policy_losses.entropy_bonus(entropy, mask, options)
  options = check("std.losses.entropy_bonus", options, { "coefficient", "normalizer" })
  check_shape("std.losses.entropy_bonus", "mask", mask, entropy)
  check_number("std.losses.entropy_bonus", "normalizer", options.normalizer, 0, { above = true })
  local count = options.normalizer or math.max(mask:sum():item(), 1)
  return (entropy * mask):sum() * (-(options.coefficient or 0.01) / count)
end

--- Weights w_t that make sum(w l) of a token-wise loss what `normalize` says.
local function weights(name, batch, lengths, options)
  local mask, normalize = batch.mask, options.normalize or "sequence"
  for key, form in pairs { normalizer = "token", max_length = "length" } do
    if options[key] and normalize ~= form then
      local got = tostring(normalize)
      error(("std.losses.%s: `%s` goes with normalize = \"%s\", got %s"):format(name, key, form, got), 3)
    end
  end
  local rollouts = options.rollouts or lengths.count
  if normalize == "sequence" then
    return mask / lengths:index_select(0, batch.sequence) / rollouts
  elseif normalize == "token" then
    return mask / (options.normalizer or math.max(mask:sum():item(), 1))
  elseif normalize == "length" and options.max_length then
    return mask / (rollouts * options.max_length)
  end
  local expected = "sequence, token, or length with max_length"
  error(("std.losses.%s: `normalize` should be %s, got %s"):format(name, expected, tostring(normalize)), 3)
end

--- The part that all forms share; `objective` gives the loss of each token from rho, A and the limits of rho. `own` is the
--- option that only this form has. Callers leave by a tail call, so the frame behind this one is the user's.
local function surrogate(name, own, logprobs, batch, advantage, options, objective)
  local called, clip = "std.losses." .. name, options.clip or 0.2
  check(called, options, { "clip", "beta", "reference", "kl", "level", "normalize", "rollouts", "normalizer", "max_length", own })
  local low, high = table.unpack(type(clip) == "table" and clip or { clip, clip })
  if not (type(low) == "number" and type(high) == "number" and low >= 0 and high >= 0) then
    error(("%s: `clip` should be a number of at least 0, or two: { low, high }, got %s"):format(called, tostring(clip)), 2)
  end
  check_number(called, "beta", options.beta, 0)
  for _, key in ipairs { "rollouts", "normalizer", "max_length", own } do check_number(called, key, options[key], 0, { above = true }) end
  local beta, sequence, mask = options.beta or 0, batch.sequence, batch.mask
  check_shape(called, "logprobs", logprobs, mask)
  -- A number a token would be read as one a rollout: nothing else tells them apart.
  check_shape(called, "advantage", advantage, { batch.rollouts or advantage.count })
  if options.reference then check_shape(called, "reference", options.reference, mask) end
  if options.kl ~= nil and options.kl ~= "k1" and options.kl ~= "k2" and options.kl ~= "k3" then
    error(("%s: `kl` should be k1, k2 or k3, got %s"):format(called, tostring(options.kl)), 2)
  end
  if beta ~= 0 and not options.reference then
    error(("%s: `reference` should be given where beta is not 0: reference:logprobs(batch)"):format(called), 2)
  end
  local lengths = mask:segment_sum(sequence, advantage.count):maximum(1)
  local log_ratio = (logprobs - (batch.logprobs or logprobs):detach()) * mask
  if options.level == "sequence" then
    log_ratio = (log_ratio:segment_sum(sequence, advantage.count) / lengths):index_select(0, sequence)
  elseif options.level ~= nil and options.level ~= "token" then
    error(("%s: `level` should be token or sequence, got %s"):format(called, tostring(options.level)), 2)
  end
  local ratio, per_token = log_ratio:exp(), advantage:detach():index_select(0, sequence)
  local loss = objective(ratio, per_token, 1 - low, 1 + high)
  local kl = options.reference and policy_losses.kl_estimate(logprobs * mask, options.reference * mask, options.kl)
  if beta ~= 0 then loss = loss + kl * beta end

  -- Shares are of tokens; where a rollout has one ratio, of rollouts.
  local share = mask / math.max(mask:sum():item(), 1)
  if options.level == "sequence" then
    share = mask / lengths:index_select(0, sequence)
    share = share / math.max(share:sum():item(), 1)
  end
  local rho = ratio:detach()
  local function mean(values) return (values * share):sum():item() end
  return (loss * weights(name, batch, lengths, options)):sum(), {
    kl = kl and mean(kl:detach()) or nil,
    ratio = mean(rho),
    clip_low = mean(rho:lt(1 - low) * per_token:lt(0)),
    clip_high = mean(rho:gt(1 + high) * per_token:gt(0)),
  }
end

--- Group relative policy optimisation: the sum over tokens of w_t l_t, where
--- l_t = -min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) + beta kl_t.
---
--- - `normalize`: "sequence": w_t = 1 / (rollouts |o_i|); "token": 1 / `normalizer`, by default the sampled tokens of this
---   batch (BNPO), for DAPO those of the whole update; "length": 1 / (rollouts `max_length`), Dr. GRPO. Rollouts are as many as
---   `advantage` has, or `rollouts`. So micro-batches add up to the update if each says the totals.
--- - `level` "sequence": one rho a rollout, the geometric mean of its tokens' (GSPO)
--- - `clip`: a number, or { low, high }; `delta`: an upper limit of rho where A is negative too
--- - `beta`, `reference` ([tokens], log p of a reference), `kl` ("k1", "k2", "k3"): the penalty
---
--- The gradient takes the current policy in the penalty and in rho. Source: Shao et al., arXiv 2402.03300, eq. 3.
---
--- Example: local loss, stats = losses.grpo(policy:logprobs(batch), batch, advantage, { clip = { 0.2, 0.28 } })
---@param logprobs engine.Tensor [tokens]
---@param batch table with mask, sequence, and logprobs, [tokens]
---@param advantage engine.Tensor [rollouts]
---@param options? { clip?: number|number[], beta?: number, reference?: engine.Tensor, kl?: string, level?: "token"|"sequence", normalize?: "sequence"|"token"|"length", rollouts?: number, normalizer?: number, max_length?: integer, delta?: number }
---@return engine.Tensor loss
---@return { kl: number?, ratio: number, clip_low: number, clip_high: number } statistics shares clipped, means over tokens
function policy_losses.grpo(logprobs, batch, advantage, options)
  options = options or {}
  return surrogate("grpo", "delta", logprobs, batch, advantage, options, function(ratio, a, low, high)
    local clipped = ratio:clamp { min = low, max = high } * a
    if options.delta then ratio = ratio:clamp { max = options.delta } end
    return -(ratio * a):minimum(clipped)
  end)
end

--- DAPO: GRPO over tokens with more room upwards: clip { 0.2, 0.28 }, normalize "token". Give `normalizer`, the sampled
--- tokens of the update, if there are micro-batches. Source: Yu et al., arXiv 2503.14476, eq. 8.
---
--- Example: losses.dapo(policy:logprobs(batch), batch, advantage, { normalizer = rollouts.tokens }):backward()
---@param logprobs engine.Tensor [tokens]
---@param batch table
---@param advantage engine.Tensor [rollouts]
---@param options? table as of `grpo`
---@return engine.Tensor loss
---@return table statistics
function policy_losses.dapo(logprobs, batch, advantage, options)
  return policy_losses.grpo(logprobs, batch, advantage, with({ clip = { 0.2, 0.28 }, normalize = "token" }, options))
end

--- Dr. GRPO: every token weighs the same whatever its answer's length: normalize "length", so `max_length` is needed; take
--- advantages with `std` false. Source: Liu et al., arXiv 2503.20783, section 3.
---
--- Example: losses.dr_grpo(policy:logprobs(batch), batch, advantage, { max_length = 128 }):backward()
---@param logprobs engine.Tensor [tokens]
---@param batch table
---@param advantage engine.Tensor [rollouts], of `group_advantage` with std = false
---@param options? table as of `grpo`
---@return engine.Tensor loss
---@return table statistics
function policy_losses.dr_grpo(logprobs, batch, advantage, options)
  return policy_losses.grpo(logprobs, batch, advantage, with({ normalize = "length" }, options))
end

--- GSPO: one ratio a rollout, clipped at { 3e-4, 4e-4 }. Source: Zheng et al., arXiv 2507.18071, eq. 5.
---
--- Example: losses.gspo(policy:logprobs(batch), batch, advantage):backward()
---@param logprobs engine.Tensor [tokens]
---@param batch table
---@param advantage engine.Tensor [rollouts]
---@param options? table as of `grpo`
---@return engine.Tensor loss
---@return table statistics
function policy_losses.gspo(logprobs, batch, advantage, options)
  return policy_losses.grpo(logprobs, batch, advantage, with({ clip = { 3e-4, 4e-4 }, level = "sequence" }, options))
end

--- CISPO: no token is dropped; its weight is cut instead: l_t = -stopgrad(min(rho_t, cap)) A log p_t, over tokens as in DAPO.
--- `cap` is a ratio, by default 5. Source: MiniMax-M1, arXiv 2506.13585, eq. 4.
---
--- Example: losses.cispo(policy:logprobs(batch), batch, advantage, { cap = 2 }):backward()
---@param logprobs engine.Tensor [tokens]
---@param batch table
---@param advantage engine.Tensor [rollouts]
---@param options? table as of `grpo`, and `cap` in place of `clip`
---@return engine.Tensor loss
---@return table statistics clip_high is the share of tokens whose ratio is cut
function policy_losses.cispo(logprobs, batch, advantage, options)
  options = with({ normalize = "token", cap = 5 }, options)
  if options.clip then error("std.losses.cispo: `clip` should be left out: `cap` is what weights are cut at", 2) end
  check_number("std.losses.cispo", "cap", options.cap, 0, { above = true })
  local settings = with(options, { clip = { 1, options.cap - 1 } })
  return surrogate("cispo", "cap", logprobs, batch, advantage, settings, function(ratio, a)
    return -(ratio:detach():clamp { max = options.cap } * a * logprobs)
  end)
end

--- Distillation on the student's own samples: A_t = log p_teacher - log p of each sampled token, without a derivative, and
--- l_t = -rho_t A_t, whose gradient is that of KL(student || teacher) at each position. The mean over tokens, or the sum
--- divided by `normalizer`. Source: Agarwal et al., arXiv 2306.13649; in this form: Lu and Thinking Machines Lab, 2025.
---
--- Example: local loss, stats = losses.distill_samples(student:logprobs(batch), batch, teacher:logprobs(batch))
---@param logprobs engine.Tensor [tokens], of the student
---@param batch table with mask, and logprobs of the student that sampled
---@param teacher engine.Tensor [tokens], of the same tokens
---@param options? { normalizer?: number }
---@return engine.Tensor loss
---@return { kl: number } statistics the mean of log p - log p_teacher
function policy_losses.distill_samples(logprobs, batch, teacher, options)
  options = check("std.losses.distill_samples", options, { "normalizer" })
  check_shape("std.losses.distill_samples", "teacher", teacher, logprobs)
  check_shape("std.losses.distill_samples", "logprobs", logprobs, batch.mask)
  check_number("std.losses.distill_samples", "normalizer", options.normalizer, 0, { above = true })
  local mask, now = batch.mask, logprobs:detach()
  local count = math.max(mask:sum():item(), 1)
  local advantage = (teacher:detach() - now) * mask
  local ratio = ((logprobs - (batch.logprobs or now):detach()) * mask):exp()
  return -(ratio * advantage):sum() / (options.normalizer or count), { kl = -(advantage:sum():item()) / count }
end

return policy_losses
