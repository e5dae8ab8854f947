--- Models, data and optimizers from a script's side, on a model of a few thousand parameters.
local engine, losses, harness = require "engine", require "std.losses", require "harness"
local describe, it, expect = harness.describe, harness.it, harness.expect
local sizes = { preset = "tiny", vocab = 320, hidden = 32, layers = 2, heads = 2, kv_heads = 1, intermediate = 48 }
local tokenizer = engine.tokenizer.bytes()

--- The gradient of a loss in one parameter, and of nothing before it.
local function gradient_of(model, name, loss)
  loss:backward()
  local found = model:gradient(name)
  engine.optim.adamw(model):clear()
  return found
end

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
  it("hands out what its head reads, with a derivative", function()
    local name, head = "model.layers.0.mlp.down_proj.weight", model:parameter(model.config.tie_word_embeddings and "model.embed_tokens.weight" or "lm_head.weight")
    local states = model:hidden_states(batch)
    expect(states.shape).is { batch.count, 32 }
    local logits = states:matmul(head:transpose(0, 1))
    expect((logits - model:logits(batch)):abs():max():item()).near(0, 1e-5)
    local function gradient(loss) return gradient_of(model, name, loss) end
    local by_states, by_logits = gradient(logits:square():mean()), gradient(model:logits(batch):square():mean())
    expect((by_states - by_logits):abs():max():item()).near(0, 1e-6)
    local embedded = model:hidden_states(batch, { layer = 0 })
    expect(embedded).near(model:parameter("model.embed_tokens.weight"):index_select(0, batch.tokens):to_table(), 0)
    expect(function() model:hidden_states(batch, { layer = 3 }) end).fails "from 0 (the embeddings) to 2, got 3"
    expect(model:hidden_states(batch, { layer = 1 }).shape).is { batch.count, 32 }
  end)
  it("runs losses over all logits backwards some rows at a time", function()
    local names = { "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight" }
    local function part(logits) return logits:softmax(-1):square():sum() / batch.supervised end
    local function gradients()
      local found = {}
      for index, name in ipairs(names) do found[index] = model:gradient(name) or false end
      engine.optim.adamw(model):clear()
      return found
    end
    local whole = part(model:logits(batch, { labelled = true }))
    whole:backward()
    local wanted, shown = gradients(), {}
    for rows = 1, batch.supervised + 1, 3 do
      local loss = losses.by_rows(model, batch, function(logits, first, last)
        expect(logits.shape).is { last - first, 320 }
        shown[#shown + 1] = last
        return part(logits)
      end, { rows = rows })
      expect(loss).near(whole:item(), 1e-6)
      for index, gradient in ipairs(gradients()) do expect((gradient - wanted[index]):abs():max():item()).near(0, 1e-6) end
    end
    expect({ shown[1], shown[batch.supervised], shown[#shown] }).is { 1, batch.supervised, batch.supervised }
    -- A head alone has its derivative, too.
    model:freeze { "layers", "model.norm", "embed_tokens" }
    if model.config.tie_word_embeddings then model:thaw { "embed_tokens" } end
    losses.by_rows(model, batch, part)
    model:thaw()
    expect(gradients()[1]).is(false)
    expect(function() losses.by_rows(model, batch, part, { rows = 0 }) end).fails "`rows` should be a whole number of at least 1, got 0"
    expect(function() model:head(engine.tensor.zeros { 2, 31 }) end).fails "[rows, 32]"
  end)
  it("freezes and thaws by parts of names", function()
    local fresh = engine.model.new(sizes, { tokenizer = tokenizer })
    local optim, all = engine.optim.adamw(fresh, { lr = 1e-2, clip_norm = false }), fresh.trainable
    local frozen, free = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"
    local function moved(name, body)
      local before = fresh:parameter(name)
      body()
      return (fresh:parameter(name) - before):abs():max():item() > 0
    end
    local function update() fresh:cross_entropy(batch):backward() return optim:step() end
    -- A gradient that waits is lost: it would be counted in the norm.
    fresh:cross_entropy(batch):backward()
    fresh:freeze { "layers.0", "embed_tokens" }
    expect(fresh:gradient(frozen)).is(nil)
    optim:clear()
    expect(fresh.trainable < all).is(true)
    expect(moved(frozen, update)).is(false)
    expect(moved(free, update)).is(true)
    fresh:thaw { "layers.0" }
    expect(moved(frozen, update)).is(true)
    expect(moved("model.embed_tokens.weight", update)).is(false)
    fresh:thaw()
    expect(fresh.trainable).is(all)
    expect(function() fresh:freeze {} end).fails "a list of names"
    expect(function() fresh:thaw { "layer.0" } end).fails '"layer.0"'
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

describe("optimizer", function()
  local batch = engine.data.batch { tokenizer:encode "the moon", tokenizer:encode "goes round" }
  it("is Muon for the matrices of layers and AdamW for the rest", function()
    local made, twin = engine.model.new(sizes), engine.model.new(sizes)
    -- Of more tokens than a matrix has rows, so that its gradient has directions in plenty.
    local batch = engine.data.batch { tokenizer:encode("The moon goes round the earth; the earth, round the sun; who asks them to? We do, each night, and by day we sleep like cats: 0 1 2 3 4 5 6 7 8 9.") }
    local muon, adamw = engine.optim.muon(made, { lr = 0.01, weight_decay = 0.5 }), engine.optim.adamw(twin, { lr = 0.01, weight_decay = 0.5 })
    local names = { "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight" }
    local before = {}
    for index, name in ipairs(names) do before[index] = made:parameter(name) end
    made:cross_entropy(batch):backward()
    twin:cross_entropy(batch):backward()
    expect(muon:step()).is(adamw:step())
    for index, name in ipairs(names) do
      local now = made:parameter(name)
      if index > 2 then
        expect((now - twin:parameter(name)):abs():max():item()).is(0.0)
      else
        -- The step without the decay is orthogonal but for a fifth: its rows or columns have one length.
        local rows, columns = table.unpack(now.shape)
        local step = (before[index] * (1 - 0.01 * 0.5) - now) / (0.01 * 0.2 * math.sqrt(math.max(rows, columns)))
        local short = math.min(rows, columns)
        local length = step:square():sum():item() / short
        expect(length > 0.4 and length < 1.3).is(true)
      end
    end
    local first = made:cross_entropy(batch):item()
    for _ = 1, 10 do
      made:cross_entropy(batch):backward()
      muon:step()
    end
    expect(made:cross_entropy(batch):item() < 0.8 * first).is(true)
    muon:set { momentum = 0.5, lr = 1e-3 }
    expect(muon.lr).is(1e-3)
    expect(function() muon:set { momentum = 1 } end).fails "muon: `momentum` should be a number from 0 to below 1, got 1"
    expect(function() adamw:set { momentum = 0.5 } end).fails "`momentum`"
    expect(function() engine.optim.muon(made, { merge = {} }) end).fails "`merge`"
  end)
  it("says which weight no update can mend", function()
    local made = engine.model.new(sizes, { tokenizer = tokenizer })
    local name = "model.norm.weight"
    expect(function() made:set_parameter(name, made:parameter(name) * (0 / 0)) end).fails "`value` should be finite numbers"
    local folder = os.tmpname()
    os.remove(folder)
    made:save(folder)
    -- The last number of the file becomes NaN.
    local file <close> = assert(io.open(folder .. "/model.safetensors", "r+b"))
    file:seek("end", -4)
    file:write(string.pack("<f", 0 / 0))
    file:close()
    local broken = engine.model.load(folder)
    local optim = engine.optim.adamw(broken)
    broken:cross_entropy(batch):backward()
    expect(function() optim:step() end).fails "NaN or infinity in it"
    for _, name in ipairs { "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja" } do
      os.remove(folder .. "/" .. name)
    end
    os.remove(folder)
  end)
end)

describe("rollouts", function()
  it("know how many texts of each prompt stand side by side", function()
    local model = engine.model.new(sizes, { tokenizer = tokenizer })
    local rollouts = model:generate({ "the", "the" }, { n = 2, max_tokens = 3 })
    expect({ rollouts.count, rollouts.group }).is { 4, 2 }
    expect(rollouts:select({ 1, 3 }).group).is(1)
    expect(rollouts:select({ 3, 4 }).group).is(2)
    expect(rollouts:select({ 1, 3, 4 }).group).is(nil)
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
  it("balances once an update, however many micro-batches", function()
    local parts = { engine.data.batch { tokenizer:encode "the moon goes" }, engine.data.batch { tokenizer:encode "round" } }
    local total, wanted = 0, 0
    for _, part in ipairs(parts) do
      local function loss(coefficient)
        return model:cross_entropy(part, { normalizer = batch.supervised, router_aux_loss_coef = coefficient }):item()
      end
      total = total + loss(0.5) - loss(0)
      local _, own = model:routing(part)
      wanted = wanted + 0.5 * own:item() * part.supervised / batch.supervised
    end
    expect(total).near(wanted, 1e-5)
  end)
  it("lets scripts write losses over its routers", function()
    local name = "model.layers.1.mlp.gate.weight"
    local function gradient(loss) return gradient_of(model, name, loss) end
    -- The published loss by tensors of the script, from where the engine has it.
    local routers, published = model:routing(batch)
    local logits, chosen = {}, {}
    for index, layer in ipairs(routers) do logits[index], chosen[index] = layer.logits, layer.experts end
    local choices, means = engine.tensor.concat(chosen), engine.tensor.concat(logits):softmax(1):mean(0)
    local own = 0
    for expert = 0, 3 do own = means:select(0, expert) * (4 * choices:eq(expert):mean(0):sum():item()) + own end
    expect(own:item()).near(published:item(), 1e-5)
    local _, again = model:routing(batch) -- A graph runs backwards once.
    local wanted = gradient(again)
    expect(wanted:abs():max():item() > 1e-5).is(true)
    expect((gradient(own) - wanted):abs():max():item()).near(0, 1e-6)
    -- A router's z-loss, which the engine does not know: its slope along its gradient is the squared length of that.
    local function z()
      local sum = 0
      for _, layer in ipairs((model:routing(batch))) do sum = layer.logits:logsumexp(-1):square():mean() + sum end
      return sum
    end
    local slope, start, step = gradient(z()), model:parameter(name), 1e-3
    local function at(size)
      model:set_parameter(name, start + slope * size)
      return engine.tensor.no_grad(z):item()
    end
    local rise, length = (at(step) - at(-step)) / (2 * step), slope:square():sum():item()
    model:set_parameter(name, start)
    expect(rise / length).near(1, 5e-3)
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
