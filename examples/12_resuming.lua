--- Lesson 12: a training loop that survives being killed, and ends as if it had not been.
--- Run: perilune run examples/12_resuming.lua
---
--- While it trains, end it any way you like, `kill -9` too. Then: perilune resume latest
local engine = require "engine"
local schedules = require "std.schedules"

return engine.workflow {
  name = "resuming",
  args = { text = "examples/data/rhymes.txt", steps = { 300, min = 1 }, lr = 3e-3 },
  run = function(run, args)
    -- Everything with a name belongs to the run: checkpoints hold weights, moments, positions in the data, random numbers.
    local tokenizer = engine.tokenizer.bytes()
    local windows = engine.data.text(args.text):tokenizer(tokenizer):pack { seq_len = 64, how = "windows" }
    local data = run:data("train", windows:shuffle():forever())
    local model = run:model("model", {
      vocab = tokenizer.vocab_size, hidden = 48, layers = 2, heads = 4, kv_heads = 2, intermediate = 96,
    }, { tokenizer = tokenizer })
    local optim = run:optimizer("adamw", model, { lr = args.lr, clip_norm = 1.0 })

    -- A local of the script is gone with the process; a table of the run is not.
    local best = run:state("best", { loss = math.huge, step = 0 })

    -- Every 20 steps a checkpoint is copied in memory and written while training goes on. The newest two stay, and the one with
    -- the lowest loss. A resumed run begins at the newest and does the steps behind it again, to the bit.
    for step in run:loop("train", { steps = args.steps, checkpoint_every = 20, keep_best = "loss" }) do
      optim:set { lr = args.lr * schedules.cosine(step.index, step.steps, { warmup = 20 }) }
      local loss = model:cross_entropy(data:take(4))
      loss:backward()
      local value = loss:item()
      if value < best.loss then best.loss, best.step = value, step.count end
      step:log { loss = value, grad_norm = optim:step() }
    end
    print(("lowest loss %.4f at step %d of %d"):format(best.loss, best.step, args.steps))

    -- metrics.jsonl has each step once, however often the run was killed. `perilune runs show latest` draws it.
    local lines = 0
    for _ in io.lines(run.folder .. "/metrics.jsonl") do lines = lines + 1 end
    print(("%d lines of metrics"):format(lines))
    run:save("model", model)
  end,
}
