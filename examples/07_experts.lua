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
  args = { experts = { 8, min = 2 }, steps = { 150, min = 1 }, balance = { 0.05, min = 0 } },
  run = function(run, args)
    local path = run.folder .. "/tales.txt"
    local file <close> = assert(io.open(path, "w"))
    file:write(tales.write { count = 300, seed = run.seed })
    file:flush()
    local tokenizer = engine.tokenizer.bytes()
    local windows = engine.data.text(path):tokenizer(tokenizer):pack { seq_len = 64, how = "windows" }

    -- In each layer a router sends each token to the experts it scores best, here one of eight; a shared expert sees all
    -- tokens. The model has the parameters of all experts, and the cost of those that a token visits.
    local shape = {
      vocab = tokenizer.vocab_size, hidden = 32, layers = 2, heads = 2, kv_heads = 1, intermediate = 64,
      experts = args.experts, experts_per_token = 1, moe_intermediate = 32, shared_intermediate = 32,
    }
    -- Two models from one seed. Nothing keeps the first from sending most tokens to a few experts, which then learn
    -- most and are chosen even more. The second pays for that: `router_aux_loss_coef` times the load-balancing loss.
    for _, kind in ipairs { { name = "free", coefficient = 0 }, { name = "balanced", coefficient = args.balance } } do
      local model = run:model(kind.name, shape)
      local optim = run:optimizer("adamw", model, { lr = 1e-2 })
      local train = run:data(kind.name .. " data", windows:shuffle():forever())
      local loss
      for step in run:loop(kind.name, { steps = args.steps }) do
        local total = model:cross_entropy(train:take(4), { router_aux_loss_coef = kind.coefficient })
        total:backward()
        loss = total:item()
        step:log { loss = loss, grad_norm = optim:step() }
      end

      -- `routing` says where the tokens of a batch go. The load-balancing loss is 1, the experts per token, at best.
      local layers, imbalance = model:routing(windows:epochs(1):take(16))
      print(("%s: load-balancing loss %.3f, training loss %.3f"):format(kind.name, imbalance:item(), loss))
      for index, layer in ipairs(layers) do
        local text, largest = shares(layer, args.experts)
        print(("  layer %d: %s, busiest expert %.1f times its share"):format(index - 1, text, largest * args.experts))
      end
    end
  end,
}
