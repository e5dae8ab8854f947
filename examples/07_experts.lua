--- Lesson 7: a mixture of experts, and why its router needs a push towards balance.
--- Source of the balancing loss: Switch Transformers, arXiv 2101.03961, section 2.2.
--- Run: perilune run examples/07_experts.lua --steps 400
local engine = require "engine"
local tales = require "std.tales"

--- The share of a layer's choices that each expert gets, as text, and the largest of them.
local function shares(layer, experts)
  local parts, largest = {}, 0
  for expert = 0, experts - 1 do
    local share = layer.experts:eq(expert):mean():item()
    parts[#parts + 1] = ("%2.0f%%"):format(100 * share)
    largest = math.max(largest, share)
  end
  return table.concat(parts, " "), largest
end

return engine.workflow {
  name = "experts",
  args = { experts = { 8, min = 2 }, steps = { 150, min = 1 }, balance = { 0.1, min = 0 } },
  run = function(run, args)
    local path = run.folder .. "/tales.txt"
    assert(io.open(path, "w")):write(tales.write { count = 300, seed = run.seed }):close()
    local tokenizer = engine.tokenizer.bytes()
    local windows = engine.data.text(path):tokenizer(tokenizer):pack { seq_len = 64, how = "windows" }

    -- A router sends each token to the experts it scores best, here to one; a shared expert sees all tokens. The model has
    -- the parameters of all experts, and the cost of those that a token visits.
    local shape = {
      vocab = tokenizer.vocab_size, hidden = 32, layers = 2, heads = 2, kv_heads = 1, intermediate = 64,
      experts = args.experts, experts_per_token = 1, moe_intermediate = 32, shared_intermediate = 32,
      sparse_step = 2, -- Every second layer has experts, so here one.
    }
    -- Two models from one seed. Nothing keeps the first from sending most tokens to a few experts, which then learn
    -- most and are chosen even more. The second pays for that: `router_aux_loss_coef` times the load-balancing loss.
    for _, kind in ipairs { { name = "free", coefficient = 0 }, { name = "balanced", coefficient = args.balance } } do
      local model = run:model(kind.name, shape)
      local optim = run:optimizer("adamw", model, { lr = 1e-2 })
      local train = run:data(kind.name .. " data", windows:shuffle():forever())
      for step in run:loop(kind.name, { steps = args.steps }) do
        local loss = model:cross_entropy(train:take(4), { router_aux_loss_coef = kind.coefficient })
        loss:backward()
        step:log { loss = loss, grad_norm = optim:step() }
      end

      -- `routing` says where the tokens of a batch go. The load-balancing loss is about 1, the experts per token, when the
      -- experts get equal shares, and also when the router hardly prefers one: look at both. It counts all layers
      -- together, so of several one could make up for another.
      local batch = windows:epochs(1):take(32)
      local layers, imbalance = model:routing(batch)
      local text, largest = shares(layers[1], args.experts)
      print(("%s: load-balancing loss %.3f"):format(kind.name, imbalance:item()))
      print(("  %s, the busiest expert has %.1f times its share"):format(text, largest * args.experts))
      print(("  loss of the text alone %.3f"):format(model:cross_entropy(batch, { router_aux_loss_coef = 0 }):item()))
    end
  end,
}
