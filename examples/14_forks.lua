--- Lesson 14: forks: from one checkpoint into several futures.
--- Run: perilune run examples/14_forks.lua
---
--- Then fork it where the first checkpoint was taken, with another rate for what is left, and compare:
---   perilune runs fork latest --at train=60 --arg lr=1e-2
---   perilune runs
---   perilune runs diff FIRST SECOND
local engine = require "engine"

return engine.workflow {
  name = "forks",
  args = { text = "examples/data/rhymes.txt", steps = { 120, min = 1 }, lr = 2e-3, every = { 60, min = 1 } },
  run = function(run, args)
    local tokenizer = engine.tokenizer.bytes()
    local windows = engine.data.text(args.text):tokenizer(tokenizer):pack { seq_len = 64, how = "windows" }
    local data = run:data("train", windows:shuffle():forever())
    local model = run:model("model", {
      vocab = tokenizer.vocab_size, hidden = 48, layers = 2, heads = 4, kv_heads = 2, intermediate = 96,
    }, { tokenizer = tokenizer })

    -- A fork comes here again with its own arguments. What differs from its parent takes effect at the checkpoint: up to there both
    -- are one run, with the same metrics to the bit and the same files on the disk, stored once.
    local optim = run:optimizer("adamw", model, { lr = args.lr })

    for step in run:loop("train", { steps = args.steps, checkpoint_every = args.every, keep = 3 }) do
      local loss = model:cross_entropy(data:take(4))
      loss:backward()
      step:log { loss = loss, grad_norm = optim:step(), lr = optim.lr }
    end
    print(("run %s, rate %g"):format(run.id, optim.lr))
  end,
}
