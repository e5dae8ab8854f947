--- Lesson 4: a language model from a table of sizes, what a batch is, and what the model says about it.
--- Run: perilune run examples/04_model.lua --layers 4
local engine = require "engine"
local losses = require "std.losses"

return engine.workflow {
  name = "model",
  args = { hidden = { 64, min = 8 }, layers = { 2, min = 1 }, text = "the moon" },
  run = function(run, args)
    -- A Qwen2.5 model with random weights. The tokenizer decides how many tokens there are; here a token is a byte.
    local tokenizer = engine.tokenizer.bytes()
    local model = run:model("model", {
      vocab = tokenizer.vocab_size, hidden = args.hidden, layers = args.layers,
      heads = 4, kv_heads = 2, intermediate = 2 * args.hidden,
    }, { tokenizer = tokenizer })
    print(("%d parameters of type %s"):format(model.count, model.dtype))
    for _, name in ipairs(model:parameter_names()) do
      -- Names are those of Hugging Face, so that other programs can read what you save.
      if not name:find "layers%.[1-9]" then print("", name, table.concat(model:parameter(name).shape, " x ")) end
    end

    -- A batch holds documents end to end, without padding. The label of a position is the token that follows it in its
    -- document; the last one has none, which is written -100.
    local batch = engine.data.batch { tokenizer:encode(args.text), tokenizer:encode "sun" }
    print("tokens   ", batch.tokens)
    print("labels   ", batch.labels)
    print("positions", batch.position_ids)
    print(("%d tokens in %d documents, %d with a label"):format(batch.count, batch.rows, batch.supervised))

    -- Logits are one score for each token of the vocabulary at each position. Softmax turns them into probabilities.
    local logits = model:logits(batch)
    print("logits", table.concat(logits.shape, " x "))
    local probabilities = logits:softmax(-1)
    print(("probabilities of a position sum to %.4f"):format(probabilities:select(0, 0):sum():item()))

    -- Log-probabilities of the labels alone: cheaper than all logits, and with a derivative.
    local logprobs = model:logprobs(batch)
    local loss = losses.nll(logprobs, batch.mask):item()
    local count = tokenizer.vocab_size
    print(("loss %.3f; guessing evenly would give log %d = %.3f"):format(loss, count, math.log(count)))
    -- The training loss is the same number, computed with less memory.
    print(("the same by cross_entropy: %.3f"):format(model:cross_entropy(batch):item()))
  end,
}
