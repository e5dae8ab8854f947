--- Lesson 8: saving a model as a Hugging Face folder, loading it, and training on.
--- Run: perilune run examples/08_checkpoints.lua
local engine = require "engine"

--- Trains for some steps; gives the last loss.
local function train(run, name, model, data, steps)
  local optim = run:optimizer("adamw", model, { lr = 5e-3 })
  local loss
  for step in run:loop(name, { steps = steps }) do
    local step_loss = model:cross_entropy(data:take(4))
    step_loss:backward()
    loss = step_loss:item()
    step:log { loss = loss, grad_norm = optim:step() }
  end
  return loss
end

return engine.workflow {
  name = "checkpoints",
  args = { text = "examples/data/rhymes.txt", steps = { 60, min = 1, help = "steps before saving, and after" } },
  run = function(run, args)
    local tokenizer = engine.tokenizer.train(engine.data.text(args.text), { vocab_size = 400 })
    local windows = engine.data.text(args.text):tokenizer(tokenizer):pack { seq_len = 32, how = "windows" }
    local data = run:data("train", windows:shuffle():forever())
    local sizes = { vocab = tokenizer.vocab_size, hidden = 48, layers = 2, heads = 4, kv_heads = 2, intermediate = 96 }
    local model = run:model("model", sizes, { tokenizer = tokenizer })
    local first = train(run, "first part", model, data, args.steps)

    -- A folder that transformers, vLLM and others read as well: config.json, model.safetensors, the tokenizer. It lies in
    -- the run's folder; `model:save(folder)` writes anywhere.
    local folder = run:save("model", model)
    for _, name in ipairs { "config.json", "model.safetensors", "tokenizer.json" } do
      local file <close> = assert(io.open(folder .. "/" .. name, "rb"))
      print(("%-18s %6d bytes"):format(name, file:seek "end"))
    end

    -- Loaded, it is the same model: same tokenizer, same numbers.
    local loaded = run:model("loaded", folder)
    local batch = engine.data.batch { loaded.tokenizer:encode "The moon will have to wait." }
    local difference = (model:logits(batch) - loaded:logits(batch)):abs():max():item()
    print(("largest difference of logits: %g"):format(difference))

    -- Training goes on from there. The optimizer is new, its averages start at zero: for a long run, warm up again.
    local second = train(run, "second part", loaded, data, args.steps)
    print(("loss %.2f when saved, %.2f after training on"):format(first, second))

    -- bf16 keeps 8 bits of each number in place of 24: half the size, and good enough to use or to train on.
    local half = run:save("half", loaded, { dtype = "bf16" })
    local rounded = engine.model.load(half, { dtype = "f32", frozen = true })
    local rest = (rounded:logits(batch) - loaded:logits(batch)):abs():max():item()
    print(("after rounding weights to bf16 logits differ by at most %.3f"):format(rest))
  end,
}
