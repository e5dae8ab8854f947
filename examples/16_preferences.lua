--- Lesson 16: learning from pairs: which of two answers is better, by direct preference optimisation.
--- Run: perilune run examples/16_preferences.lua --beta 0.5
local engine = require "engine"
local losses = require "std.losses"

return engine.workflow {
  name = "preferences",
  args = { steps = { 30, min = 1 }, beta = { 0.1, min = 0, help = "how strongly the reference holds the policy back" } },
  run = function(run, args)
    -- Pairs of answers to one prompt. Here the polite one is the better one, whatever was asked.
    local records = {}
    for _, prompt in ipairs { "salt?", "milk?", "bread?", "rice?", "figs?", "tea?" } do
      records[#records + 1] = { prompt = prompt, chosen = "Gladly.", rejected = "No." }
    end
    local tokenizer = engine.tokenizer.bytes()
    local config = { vocab = tokenizer.vocab_size, hidden = 32, layers = 1, heads = 2, kv_heads = 1, intermediate = 64 }
    local policy = run:model("policy", config, { tokenizer = tokenizer })
    local optim = run:optimizer("adamw", policy, { lr = 3e-3 })

    -- `take(n)` gives 2n documents, chosen and rejected in turn. A loss over pairs is made of sums over answers.
    -- With more pairs, shuffle them and take some each step.
    local function sums(batch) return losses.sequence_sums(policy:logprobs(batch), batch) end
    local all = engine.data.records(records):pairs(tokenizer):take(#records)
    print(("%d documents, %d tokens of them answers"):format(all.documents, all.supervised))

    -- The reference is the policy before it learns, so its sums can be taken now and kept: it needs no second model. Where
    -- the policy still equals it, h is 0 and every pair costs log 2.
    local before = engine.tensor.no_grad(function() return sums(all) end)
    for step in run:loop("dpo", { steps = args.steps }) do
      local loss, stats = losses.dpo(sums(all), before, { beta = args.beta })
      loss:backward()
      if step.count == 1 then print(("first loss %.4f, log 2 is %.4f"):format(loss:item(), math.log(2))) end
      step:log { loss = loss, margin = stats.margin, accuracy = stats.accuracy, grad_norm = optim:step() }
    end

    local _, stats = losses.dpo(sums(all), before, { beta = args.beta })
    print(("accuracy %.2f, margin %.3f"):format(stats.accuracy, stats.margin))
    -- The same sums serve other losses: ipo, hinge, robust and more; some want means over tokens.
    local ipo = losses.dpo(sums(all), before, { kind = "ipo", lengths = losses.sequence_lengths(all) })
    print(("as ipo %.3f"):format(ipo:item()))
  end,
}
