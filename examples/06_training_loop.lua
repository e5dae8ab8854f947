--- Lesson 6: a training loop by hand: loss, backward, accumulation, clipping, a schedule.
--- Run: perilune run examples/06_training_loop.lua --steps 300
local engine = require "engine"
local schedules = require "std.schedules"

--- The gradient's norm after backward over `batches`, whose losses share one normalizer. Leaves no gradient behind.
local function gradient_norm(model, optim, batches)
  local supervised = 0
  for _, batch in ipairs(batches) do supervised = supervised + batch.supervised end
  for _, batch in ipairs(batches) do model:cross_entropy(batch, { normalizer = supervised }):backward() end
  local norm = optim:gradient_norm()
  optim:clear()
  return norm
end

return engine.workflow {
  name = "training_loop",
  args = { text = "examples/data/rhymes.txt", steps = { 120, min = 1 }, lr = { 8e-3, min = 0 }, accumulate = { 2, min = 1 } },
  run = function(run, args)
    local tokenizer = engine.tokenizer.bytes()
    local model = run:model("model", {
      vocab = tokenizer.vocab_size, hidden = 48, layers = 2, heads = 4, kv_heads = 2, intermediate = 128, initializer_range = 0.1,
    })
    local windows = engine.data.text(args.text):tokenizer(tokenizer):pack { seq_len = 64, how = "windows" }
    local train = run:data("train", windows:shuffle():forever())
    -- clip_norm: a gradient longer than this is shortened to it, so one odd batch cannot throw the model far.
    local optim = run:optimizer("adamw", model, { lr = args.lr, weight_decay = 0.01, clip_norm = 1.0 })

    -- `backward` adds to the gradients that are there. Four rows at once, or two and two, give the same sum, as long as
    -- both halves are divided by the tokens of all four rows: that is what `normalizer` is for.
    print(("four rows at once: %.5f"):format(gradient_norm(model, optim, { windows:take(4) })))
    local again = windows:epochs(1)
    print(("two and two rows:  %.5f"):format(gradient_norm(model, optim, { again:take(2), again:take(2) })))

    local clipped = 0
    for step in run:loop("train", { steps = args.steps }) do
      -- Warm-up: Adam's averages know little at first, so the first steps are short. Then half a cosine down to a tenth.
      optim:set { lr = args.lr * schedules.cosine(step.index, step.steps, { warmup = 10, final = 0.1 }) }

      local batches, supervised = {}, 0
      for index = 1, args.accumulate do
        batches[index] = train:take(2)
        supervised = supervised + batches[index].supervised
      end
      local loss = 0
      for _, batch in ipairs(batches) do
        local part = model:cross_entropy(batch, { normalizer = supervised })
        part:backward()
        loss = loss + part:item()
      end

      -- The update; it gives the norm before clipping, and clears the gradients.
      local norm = optim:step()
      if norm > 1.0 then clipped = clipped + 1 end
      step:log { loss = loss, lr = optim.lr, grad_norm = norm }
      if step.first or step.last or step.count % 40 == 0 then
        print(("step %3d  loss %.3f  lr %.5f  gradient %.2f"):format(step.count, loss, optim.lr, norm))
      end
    end
    print(("%d of %d gradients were clipped"):format(clipped, args.steps))
  end,
}
