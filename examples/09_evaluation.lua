--- Lesson 9: how good is it? Loss on held-out text, perplexity, bits per byte; and what sampling settings do.
--- Run: perilune run examples/09_evaluation.lua --steps 1500
local engine = require "engine"
local eval, schedules, tales = require "std.eval", require "std.schedules", require "std.tales"

return engine.workflow {
  name = "evaluation",
  args = { steps = { 400, min = 1 }, lr = { 8e-3, min = 0 }, prompt = "One morning" },
  run = function(run, args)
    local path = run.folder .. "/tales.txt"
    assert(io.open(path, "w")):write(tales.write { count = 1000, seed = run.seed }):close()

    -- A model may learn its training text by heart. So the last tenth is kept away from training and used to measure.
    local tokenizer = engine.tokenizer.bytes()
    local text = engine.data.text(path):tokenizer(tokenizer)
    local windows = { seq_len = 128, how = "windows" }
    local train = run:data("train", text:split("train", 0.1):pack(windows):shuffle():forever())
    local held_out = text:split("validation", 0.1):pack(windows)

    local model = run:model("model", {
      vocab = tokenizer.vocab_size, hidden = 64, layers = 2, heads = 4, kv_heads = 2, intermediate = 160, initializer_range = 0.05,
    }, { tokenizer = tokenizer })
    local optim = run:optimizer("adamw", model, { betas = { 0.9, 0.99 } })
    for step in run:loop("train", { steps = args.steps }) do
      optim:set { lr = args.lr * schedules.cosine(step.index, step.steps, { warmup = 20, final = 0.05 }) }
      local loss = model:cross_entropy(train:take(4))
      loss:backward()
      step:log { loss = loss, grad_norm = optim:step() }
      if step.last or step.count % 100 == 0 then
        -- `epochs(1)` describes the data again from its beginning, so each look sees the same text.
        local mean = eval.loss(model, held_out:epochs(1))
        print(("step %d: held-out loss %.3f"):format(step.count, mean))
        step:log { validation_loss = mean }
      end
    end

    local mean, count = eval.loss(model, held_out:epochs(1))
    -- Perplexity: as unsure as among that many equally likely tokens. It depends on the tokenizer; bits per byte does not,
    -- and here a token is a byte.
    print(("%d tokens: perplexity %.2f, %.2f bits per byte"):format(count, math.exp(mean), mean / math.log(2)))

    -- Temperature 0 takes the likeliest token each time, which is safe and dull. Higher ones flatten the choice; top_p cuts
    -- off the unlikely rest, where most nonsense comes from. A sample longer than the training windows would leave the
    -- positions that the model has learnt.
    for _, options in ipairs { { temperature = 0 }, { temperature = 0.8, top_p = 0.95 }, { temperature = 1.5 } } do
      options.max_tokens, options.stop = 100, { "\n" }
      print(("temperature %g: %s%s"):format(options.temperature, args.prompt, model:complete(args.prompt, options)))
    end
  end,
}
