--- Pretrains a Qwen2.5 model, dense or mixture of experts, from random weights on text.
--- Run: perilune run scripts/pretrain.lua --text book.txt --tokenizer bpe:4096
--- Source: Qwen2.5 technical report, arXiv 2412.15115, section 3; Muon, arXiv 2502.16982; AdamW, arXiv 1711.05101.
local engine = require "engine"
local eval, schedules, tales = require "std.eval", require "std.schedules", require "std.tales"

return engine.workflow {
  name = "pretrain",
  args = {
    text = engine.optional("strings", { help = "text files; without any, tales that the script writes" }),
    tokenizer = { "bytes", help = "bytes, bpe:SIZE (trained on the text), or the folder of a tokenizer" },
    preset = engine.optional("string", { help = "a published shape, as 0.5B, in place of the sizes below" }),
    hidden = 128, layers = 4, heads = 2, kv_heads = 1, intermediate = 344,
    experts = { 0, min = 0, help = "experts in each layer; 0 makes a dense model" },
    experts_per_token = { 2, min = 1 },
    device = { "cpu", help = "cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one" },
    dtype = engine.optional("string", { choices = { "f32", "bf16" }, help = "of weights and activations (master weights are f32): f32 for the device cpu, else bf16" }),
    recompute = { false, help = "compute layers again in the backward pass: less memory, more time" },
    seq_len = { 256, min = 2, help = "tokens of a training window" },
    rows = { 6, min = 1, help = "windows of a micro-batch" },
    accumulate = { 1, min = 1, help = "micro-batches of an update" },
    steps = { 1400, min = 1 },
    optimizer = { "muon", choices = { "muon", "adamw" }, help = "adamw wants twice the steps, half the lr" },
    lr = { 6e-3, min = 0 }, warmup = { 50, min = 0 }, final = { 0.02, min = 0, help = "share of lr at the end" },
    beta2 = 0.99, weight_decay = 0.2, clip_norm = { 1.0, min = 0, help = "longest gradient; 0 for no limit" },
    validation = { 0.1, min = 0, max = 0.5, help = "share of each file, its end, that is held out" },
    evaluate_every = { 1000, min = 1, help = "steps between looks at the held-out text" },
    prompt = { "\n", help = "what the sample at the end begins with" },
    sample = { 200, min = 0, help = "tokens of the sample; 0 for none" },
  },
  run = function(run, args)
    local files = args.text
    if not files then
      files = { run.folder .. "/tales.txt" }
      local file <close> = assert(io.open(files[1], "w"))
      file:write(tales.write { count = 6000, seed = run.seed })
    end
    local text = engine.data.text(files)

    local size = args.tokenizer:match "^bpe:(%d+)$"
    local tokenizer = size and engine.tokenizer.train(text:split("train", args.validation), { vocab_size = assert(math.tointeger(size)) })
      or args.tokenizer == "bytes" and engine.tokenizer.bytes()
      or engine.tokenizer.load(args.tokenizer)
    if args.sample > 0 and #tokenizer:encode(args.prompt) == 0 then error("--prompt should be a text of at least one token, got none", 0) end
    local windows = { seq_len = args.seq_len, how = "windows" }
    local train = run:data("train", text:split("train", args.validation):tokenizer(tokenizer):pack(windows):shuffle():forever())
    local held_out = text:split("validation", args.validation):tokenizer(tokenizer):pack(windows)
    -- A text too short to hold some of it out should fail here, not when it is first evaluated.
    if args.validation > 0 then held_out:take(1) end

    local shape = { preset = args.preset, vocab = tokenizer.vocab_size }
    if not args.preset then
      shape.hidden, shape.layers, shape.intermediate = args.hidden, args.layers, args.intermediate
      shape.heads, shape.kv_heads, shape.initializer_range = args.heads, args.kv_heads, 0.05
    end
    if args.experts > 0 then
      shape.experts, shape.experts_per_token = args.experts, args.experts_per_token
      shape.moe_intermediate, shape.shared_intermediate = args.intermediate // args.experts_per_token, args.intermediate
    end
    local dtype = args.dtype or (args.device == "cpu" and "f32" or "bf16")
    local model = run:model("model", shape, { device = args.device, dtype = dtype, recompute = args.recompute, tokenizer = tokenizer })
    local optim = run:optimizer(args.optimizer, model, {
      lr = args.lr, betas = { 0.9, args.beta2 }, weight_decay = args.weight_decay,
      clip_norm = args.clip_norm > 0 and args.clip_norm,
    })
    print(("%s: %.2fM parameters, %s"):format(args.experts > 0 and "mixture of experts" or "dense", model.count / 1e6, model.dtype))

    for step in run:loop("pretrain", { steps = args.steps }) do
      optim:set { lr = args.lr * schedules.cosine(step.index, args.steps, { warmup = args.warmup, final = args.final }) }
      local batches, supervised = {}, 0
      for index = 1, args.accumulate do
        batches[index] = train:take(args.rows)
        supervised = supervised + batches[index].supervised
      end
      local loss = 0.0
      for _, batch in ipairs(batches) do
        local part = model:cross_entropy(batch, { normalizer = supervised })
        part:backward()
        loss = loss + part:item()
      end
      step:log { loss = loss, lr = optim.lr, grad_norm = optim:step() }
      if args.validation > 0 and (step.last or step.count % args.evaluate_every == 0) then
        step:log { validation_loss = (eval.loss(model, held_out:epochs(1))) }
      end
    end

    run:save("model", model)
    if args.sample > 0 then
      print(model:complete(args.prompt, { max_tokens = args.sample, temperature = 0.8 }))
    end
  end,
}
