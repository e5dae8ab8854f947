--- Models, data and optimizers from a script's side, on a model of a few thousand parameters.
local engine, losses, harness = require "engine", require "std.losses", require "harness"
local describe, it, expect = harness.describe, harness.it, harness.expect
local sizes = { preset = "tiny", vocab = 320, hidden = 32, layers = 2, heads = 2, kv_heads = 1, intermediate = 48 }
local tokenizer = engine.tokenizer.bytes()

describe("tokenizer", function()
  it("goes there and back", function()
    local ids = tokenizer:encode "Moon é"
    expect(#ids).is(7)
    expect(tokenizer:decode(ids)).is "Moon é"
    expect(tokenizer:chat({ { role = "user", content = "Hi" } }, { generation_prompt = true }):find("Hi", 1, true) ~= nil).is(true)
    expect(function() tokenizer:decode { -1 } end).fails "an entry that is -1"
  end)
end)

describe("batch", function()
  it("shifts labels inside each document", function()
    local batch = engine.data.batch { { 5, 6, 7 }, { 8, 9 } }
    expect(batch.tokens).is { 5, 6, 7, 8, 9 }
    expect(batch.labels).is { 6, 7, -100, 9, -100 }
    expect(batch.mask).is { 1, 1, 0, 1, 0 }
    expect(batch.cu_seqlens).is { 0, 3, 5 }
    expect(batch.position_ids).is { 0, 1, 2, 0, 1 }
    expect({ batch.count, batch.supervised, batch.rows }).is { 5, 3, 2 }
  end)
end)

describe("model", function()
  local model = engine.model.new(sizes, { tokenizer = tokenizer })
  local batch = engine.data.batch { tokenizer:encode "the moon", tokenizer:encode "goes round" }
  it("lies where it is told to", function()
    expect(model.device).is "cpu"
    expect(engine.model.new(sizes, { device = "cpu" }).device).is "cpu"
    expect(function() engine.model.new(sizes, { device = "gpu" }) end).fails '"cuda:1" (the second GPU), got "gpu"'
  end)
  it("gives one loss by two roads, and one gradient", function()
    local fused = model:cross_entropy(batch)
    fused:backward()
    local name = "model.layers.0.mlp.down_proj.weight"
    local first = model:gradient(name)
    engine.optim.adamw(model):clear()
    expect(model:gradient(name)).is(nil)
    local composed = losses.nll(model:logprobs(batch), batch.mask)
    expect(composed:item()).near(fused:item(), 1e-5)
    composed:backward()
    expect((model:gradient(name) - first):abs():max():item()).near(0, 1e-6)
    engine.optim.adamw(model):clear()
  end)
  it("agrees with its own logits", function()
    local logp = model:logits(batch):log_softmax(1)
    local picked = logp:gather(1, batch.labels:maximum(0):unsqueeze(1)):squeeze(1) * batch.mask
    expect((picked - model:logprobs(batch)):abs():max():item()).near(0, 1e-5)
  end)
  it("names its parameters as Hugging Face does", function()
    expect(model:parameter_names()[1]).is "model.embed_tokens.weight"
    expect(model:parameter("model.norm.weight").shape).is { 32 }
    expect(model.config.hidden_size).is(32)
    expect(model.dtype).is "f32"
  end)
  it("learns", function()
    local optim = engine.optim.adamw(model, { lr = 1e-2 })
    local first = model:cross_entropy(batch):item()
    for _ = 1, 20 do
      model:cross_entropy(batch):backward()
      local norm, applied = optim:step()
      assert(norm > 0 and applied)
    end
    assert(model:cross_entropy(batch):item() < first * 0.7)
    expect({ optim.steps, optim.skipped, optim.lr }).is { 20, 0, 1e-2 }
    optim:set { lr = 1e-3 }
    expect(optim.lr).is(1e-3)
  end)
  it("does not train when frozen", function()
    local frozen = engine.model.new(sizes, { frozen = true })
    expect(function() frozen:cross_entropy(batch):backward() end).fails "wants a gradient"
    expect(function() engine.optim.adamw(frozen) end).fails "frozen"
  end)
  it("refuses batches that it cannot read", function()
    expect(function() model:logits(engine.data.batch { { 320 } }) end).fails "320"
    expect(function() model:logits { 1, 2 } end).fails "should be a Batch, got a table of 2"
  end)
end)

describe("mixture of experts", function()
  local fields = { experts = 4, experts_per_token = 2, moe_intermediate = 24, shared_intermediate = 32, initializer_range = 0.3 }
  for key, value in pairs(sizes) do fields[key] = value end
  local model = engine.model.new(fields, { tokenizer = tokenizer })
  local batch = engine.data.batch { tokenizer:encode "the moon goes", tokenizer:encode "round" }
  local layers, balance = model:routing(batch)
  it("sends each token to the experts of its best scores", function()
    expect(#layers).is(2)
    for _, layer in ipairs(layers) do
      expect(layer.logits.shape).is { batch.count, 4 }
      local probs, experts = layer.logits:softmax(1):topk(2)
      expect(layer.experts).is(experts:to_table())
      expect(layer.weights).near(probs:to_table(), 1e-6)
    end
  end)
  it("has the published load-balancing loss", function()
    -- experts * sum over slot and expert of (share of tokens with that choice) * (mean probability), all layers together.
    local logits, chosen = {}, {}
    for index, layer in ipairs(layers) do logits[index], chosen[index] = layer.logits, layer.experts end
    local mean = engine.tensor.concat(logits):softmax(1):mean(0)
    local choices, sum = engine.tensor.concat(chosen), 0
    for expert = 0, 3 do sum = sum + choices:eq(expert):mean(0):sum():item() * mean:select(0, expert):item() end
    expect(balance:item()).near(4 * sum, 1e-5)
    local with, without = model:cross_entropy(batch, { router_aux_loss_coef = 0.5 }), model:cross_entropy(batch, { router_aux_loss_coef = 0 })
    expect(with:item() - without:item()).near(0.5 * balance:item(), 1e-5)
    for _, wrong in ipairs { 0 / 0, -1, math.huge } do
      expect(function() model:cross_entropy(batch, { router_aux_loss_coef = wrong }) end).fails "a finite number of at least 0"
    end
  end)
  it("is empty for a dense model", function()
    local dense = engine.model.new(sizes)
    local none, no_balance = dense:routing(batch)
    expect(tostring(dense)).is(("Model: %d parameters, f32, on cpu"):format(dense.count))
    expect(#none).is(0)
    expect(no_balance).is(nil)
    expect(function() model:routing { 1 } end).fails "should be a Batch"
  end)
end)

describe("eval", function()
  it("counts every supervised token once, whatever the batches", function()
    local eval = require "std.eval"
    local model = engine.model.new(sizes, { tokenizer = tokenizer })
    local held_out = engine.data.text("examples/data/rhymes.txt"):tokenizer(tokenizer):pack { seq_len = 24, how = "windows" }
    local loss, count = eval.loss(model, held_out:epochs(1), { rows = 3 })
    local again, count_again = eval.loss(model, held_out:epochs(1), { rows = 16 })
    expect(count).is(count_again)
    expect(math.abs(loss - again) < 1e-5).is(true)
    local sum, tokens, data = 0, 0, held_out:epochs(1)
    for batch in function() return data:take(1) end do
      sum = sum + model:cross_entropy(batch):item() * batch.supervised
      tokens = tokens + batch.supervised
    end
    expect(tokens).is(count)
    expect(math.abs(loss - sum / tokens) < 1e-4).is(true)
    expect(function() eval.loss(model, held_out, { row = 3 }) end).fails "option should be rows, got `row`"
    expect(function() eval.loss(model, held_out, { rows = 0 }) end).fails "at least 1, got 0"
  end)
end)
