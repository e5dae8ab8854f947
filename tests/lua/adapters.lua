--- Adapters, heads and arithmetic on weights from a script's side.
local engine, merging, harness = require "engine", require "std.merging", require "harness"
local tensor, describe, it, expect = engine.tensor, harness.describe, harness.it, harness.expect
local sizes = { preset = "tiny", vocab = 320, hidden = 32, layers = 2, heads = 2, kv_heads = 1, intermediate = 48 }
local batch = engine.data.batch { { 5, 6, 7, 8 }, { 9, 10, 11 } }

local function wider(range)
  local fields = { initializer_range = range }
  for key, value in pairs(sizes) do fields[key] = value end
  return fields
end

describe("lora", function()
  it("trains alone, and its base stays", function()
    local plain = engine.model.new(sizes)
    local model = engine.model.new(sizes, { lora = { rank = 2, targets = { "q_proj", "down_proj" } } })
    expect(plain.adapter).is(nil)
    expect({ model.adapter.rank, model.adapter.alpha, model.adapter.merged }).is { 2, 4.0, false }
    -- Two layers; A and B of q_proj [32, 32] and down_proj [32, 48].
    expect(model.trainable).is(2 * 2 * (32 + 32 + 48 + 32))
    expect(model.count).is(plain.count + model.trainable)
    local optim = engine.optim.adamw(model, { lr = 1e-2 })
    local first = model:cross_entropy(batch):item()
    for _ = 1, 10 do
      model:cross_entropy(batch):backward()
      optim:step()
    end
    expect(model:cross_entropy(batch):item() < first).is(true)
    local base = model:base()
    expect({ base.frozen, base.trainable, base.adapter }).is { true, 0 }
    expect(base:cross_entropy(batch):item()).is(plain:cross_entropy(batch):item())
    local with = model:logits(batch)
    model:merge()
    expect(model.adapter.merged).is(true)
    expect((model:logits(batch) - with):abs():max():item()).near(0, 1e-5)
    model:unmerge()
    expect((model:logits(batch) - with):abs():max():item()).is(0.0)
  end)
  it("scales rows with DoRA", function()
    local plain = engine.model.new(sizes)
    local model = engine.model.new(sizes, { lora = { rank = 2, dora = true, targets = { "q_proj" } } })
    expect(model.adapter.dora).is(true)
    expect(model.trainable).is(2 * (2 * (32 + 32) + 32))
    expect((model:logits(batch) - plain:logits(batch)):abs():max():item()).is(0.0)
    local module = "model.layers.0.self_attn.q_proj"
    local lengths = model:parameter(module .. ".lora_magnitude_vector")
    expect((model:parameter(module .. ".weight"):square():sum(-1):sqrt() - lengths):abs():max():item()).near(0, 1e-6)
    -- Twice the length is twice the row.
    model:set_parameter(module .. ".lora_magnitude_vector", lengths * 2)
    model:merge()
    local merged, weight = model:parameter(module .. ".weight"), plain:parameter(module .. ".weight")
    expect((merged - weight * 2):abs():max():item()).near(0, 1e-6)
  end)
  it("says what is wrong", function()
    expect(function() engine.model.new(sizes, { lora = { ranks = 2 } }) end).fails "`ranks`"
    expect(function() engine.model.new(sizes, { lora = { targets = { "q" } } }) end).fails "q_proj"
    expect(function() engine.model.new(sizes, { head = "scores" }) end).fails "\"score\""
    expect(function() engine.model.new(sizes, { lora = {}, adapter = "nowhere" }) end).fails "one of `lora`"
    expect(function() engine.model.new(sizes, { adapter = "nowhere" }) end).fails "adapter_config.json"
    expect(function() engine.model.new(sizes):merge() end).fails "an adapter"
    expect(function() engine.model.new(sizes):save_adapter("nowhere") end).fails "an adapter"
    expect(function() engine.model.new(sizes):scores(batch) end).fails "`head`"
  end)
end)

describe("scores", function()
  it("are one for each document, and differentiable", function()
    local model = engine.model.new(sizes, { head = "score" })
    expect(model.config.architectures).is { "Qwen2ForSequenceClassification" }
    local scores = model:scores(batch)
    expect(scores.shape).is { 2 }
    expect(model.count).is(engine.model.new(sizes).count + 32 - (model.config.tie_word_embeddings and 0 or 320 * 32))
    scores:sum():backward()
    expect(model:gradient("score.weight").shape).is { 1, 32 }
    expect(function() model:logits(batch) end).fails "scores"
  end)
end)

describe("logits", function()
  it("of labelled rows are rows of all, and differentiable", function()
    local model = engine.model.new(sizes)
    local all, some = model:logits(batch), model:logits(batch, { labelled = true })
    expect(some.shape).is { 5, 320 }
    expect((some:slice(0, 0, 3) - all:slice(0, 0, 3)):abs():max():item()).is(0.0)
    expect((some:slice(0, 3, 5) - all:slice(0, 4, 6)):abs():max():item()).is(0.0)
    some:square():mean():backward()
    expect(model:gradient("model.norm.weight").shape).is { 32 }
    expect(function() tensor.no_grad(function() return model:logits(batch) end):sum():backward() end).fails "constant"
  end)
end)

describe("weights", function()
  local name = "model.layers.1.mlp.up_proj.weight"
  local base, first, second = engine.model.new(wider(0.02)), engine.model.new(wider(0.03)), engine.model.new(wider(0.01))
  -- Models of one seed differ by a factor alone: the second is moved to somewhere else.
  second:set_parameter(name, base:parameter(name) + tensor.randn(base:parameter(name).shape) * 0.01)
  local b, x, y = base:parameter(name), first:parameter(name), second:parameter(name)
  local into = engine.model.new(wider(0.05))
  local function distance(to) return (into:parameter(name) - to):abs():max():item() end
  it("are averaged and set", function()
    into:average(first, 1)
    expect(distance(x)).is(0.0)
    into:average(second, 0.25)
    expect(distance(x * 0.75 + y * 0.25)).near(0, 1e-8)
    into:set_parameter(name, y)
    expect(distance(y)).is(0.0)
    expect(function() into:set_parameter(name, tensor.zeros { 2 }) end).fails(name)
    expect(function() into:set_parameter("up_proj", y) end).fails "up_proj"
  end)
  it("are merged by sums", function()
    merging.linear(into, { first, second })
    expect(distance(x * 0.5 + y * 0.5)).near(0, 1e-8)
    merging.task_arithmetic(into, base, { first, second }, { weights = { 1, 0.5 } })
    expect(distance(b + (x - b) + (y - b) * 0.5)).near(0, 1e-8)
    expect(function() merging.linear(into, { first }, { weights = { 1, 2 } }) end).fails "1 numbers, got 2"
    for _, bad in ipairs { 0 / 0, math.huge, "1" } do
      expect(function() merging.linear(into, { first }, { weights = { bad } }) end).fails "`weights` should be finite numbers"
    end
    expect(function() merging.ties(into, base, { first }, { keep = 1 }) end).fails "`keep`"
    local other = engine.model.new { preset = "tiny", vocab = 64, hidden = 32, layers = 2, heads = 2, kv_heads = 1, intermediate = 48 }
    expect(function() merging.linear(into, { other }) end).fails "embed_tokens.weight of [320, 32] and of [64, 32]"
  end)
  it("are merged by sign, element by element", function()
    merging.ties(into, base, { first, second }, { reserve = 0.25 })
    local flat = function(t) return t:reshape { t.count }:to_table() end
    local bs, got, parts = flat(b), flat(into:parameter(name)), { flat(x - b), flat(y - b) }
    for _, part in ipairs(parts) do
      local order = {}
      for i, value in ipairs(part) do order[i] = math.abs(value) end
      table.sort(order, function(p, q) return p > q end)
      local least = order[#order // 4]
      for i, value in ipairs(part) do if math.abs(value) < least then part[i] = 0 end end
    end
    local worst, moved = 0, 0
    for i = 1, #bs do
      local p, q = parts[1][i], parts[2][i]
      local sum, count, total = p + q, 0, 0
      for _, value in ipairs { p, q } do
        if value * sum > 0 then count, total = count + 1, total + value end
      end
      if count > 0 then moved = moved + 1 end
      worst = math.max(worst, math.abs(got[i] - bs[i] - (count > 0 and total / count or 0)))
    end
    expect(worst).near(0, 1e-7)
    expect(moved > #bs // 5).is(true)
  end)
  it("are merged at random, right on average", function()
    merging.dare(into, base, { first }, { reserve = 0.25 })
    local ratio = (into:parameter(name) - b) / (x - b)
    local kept = ratio:gt(2):mean():item()
    -- 1536 elements: five deviations of the share are 0.055.
    expect(kept).near(0.25, 0.055)
    expect((ratio * (ratio - 4)):abs():max():item()).near(0, 1e-3)
  end)
end)

describe("online merging", function()
  local base, reference = engine.model.new(wider(0.02), { frozen = true }), engine.model.new(wider(0.03), { frozen = true })
  it("moves by nothing else when alpha is 0 and all is kept", function()
    local function trained(options)
      local policy = engine.model.new(wider(0.03))
      local optim = engine.optim.adamw(policy, options)
      for _ = 1, 3 do
        policy:cross_entropy(batch):backward()
        optim:step()
      end
      return policy:parameter("model.norm.weight"), policy:cross_entropy(batch):item()
    end
    local plain = { lr = 1e-3, weight_decay = 0 }
    local merged = { lr = 1e-3, weight_decay = 0, merge = { base = base, reference = reference, alpha = 0, reserve = 1 } }
    local a = trained(plain)
    for _, every in ipairs { 1, 2 } do
      merged.merge.every = every
      -- They differ in where eps stands, which is far below the gradients.
      expect((a - trained(merged)):abs():max():item()).near(0, 1e-5)
    end
    merged.merge.alpha, merged.merge.every = 0.5, 3
    for _, method in ipairs { "dare", "ties" } do
      merged.merge.method = method
      local c = trained(merged)
      expect((a - c):abs():max():item() > 1e-4).is(true)
    end
  end)
  it("says what is wrong", function()
    local policy = engine.model.new(sizes)
    expect(function() engine.optim.adamw(policy, { merge = { base = base } }) end).fails "merge.reference"
    expect(function() engine.optim.adamw(policy, { merge = { base = base, reference = reference, method = "sum" } }) end).fails "merge.method"
    expect(function() engine.optim.adamw(policy, { merge = { base = base, reference = reference, alpha = 2 } }) end).fails "merge.alpha"
    expect(function() engine.optim.adamw(policy, { merge = { base = base, reference = reference, every = 0 } }) end).fails "every"
    expect(function() engine.optim.adamw(policy, { merge = { base = base, reference = reference, p = 2 } }) end).fails "`p`"
    local adapted = engine.model.new(sizes, { lora = {} })
    expect(function() engine.optim.adamw(adapted, { merge = { base = base, reference = reference } }) end).fails "merge.base"
    expect(function() engine.optim.adamw(policy):set { merge = {} } end).fails "`merge`"
  end)
end)
