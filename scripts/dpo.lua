--- Direct preference optimisation: the better answer of each pair becomes likelier than the worse, measured from a reference.
--- Run: perilune run scripts/dpo.lua --model checkpoints/sft --data pairs.jsonl
--- Source: Rafailov et al., arXiv 2305.18290; Qwen2.5 technical report, section 4.2 (one epoch, Online Merging Optimizer).
local engine = require "engine"
local losses, schedules, tensor = require "std.losses", require "std.schedules", require("engine").tensor

return engine.workflow {
  name = "dpo",
  args = {
    model = engine.required("string", { help = "folder of the SFT model" }),
    data = engine.required("strings", { help = "pairs, .jsonl or .parquet: prompt, chosen, rejected" }),
    kind = {
      "sigmoid", choices = { "sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "bco_pair", "sppo_hard", "nca_pair" },
      help = "the loss of a pair: see std.losses",
    },
    beta = { 0.1, min = 0, help = "how strongly the policy is held to the reference" },
    label_smoothing = { 0.0, min = 0, max = 0.49, help = "share of pairs that may be the wrong way round" },
    nll = { 0.0, min = 0, help = "weight of the likelihood of the better answer, added" },
    reference_free = { false, help = "no reference: log-probabilities of the policy alone" },
    base = engine.optional("string", { help = "folder of the model before SFT: merges each update online (arXiv 2405.17931)" }),
    device = { "cpu", help = "cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one" },
    dtype = engine.optional("string", { choices = { "f32", "bf16" } }),
    max_tokens = { 1024, min = 2, help = "longer answers are cut" }, pairs = { 8, min = 1, help = "pairs of a micro-batch" },
    accumulate = { 1, min = 1, help = "micro-batches of an update" },
    epochs = { 1, min = 1 },
    lr = { 7e-7, min = 0 }, warmup = { 20, min = 0, help = "updates until lr is reached" },
    final = { 0.1, min = 0, help = "share of lr at the end" }, weight_decay = 0.0, clip_norm = { 1.0, min = 0 },
    lora = { 0, min = 0, help = "rank of an adapter; 0 trains all weights" },
    targets = engine.optional("strings", { help = "modules of the adapter: q_proj,v_proj ...; default all of the layers" }),
    dora = { false, help = "the adapter learns the lengths of rows too" },
  },
  run = function(run, args)
    assert(args.lora > 0 or not (args.targets or args.dora), "dpo: --targets and --dora go with --lora RANK")
    local lora = args.lora > 0 and { rank = args.lora, targets = args.targets, dora = args.dora } or nil
    local policy = run:model("policy", args.model, { device = args.device, dtype = args.dtype, lora = lora })
    -- The base of an adapter is the reference, at no cost; else it is a second, frozen model.
    local frozen = { device = args.device, dtype = args.dtype, frozen = true }
    local reference = lora and policy:base() or run:model("reference", args.model, frozen)
    local merge = args.base and { base = run:model("base", args.base, frozen), reference = reference }
    local read = args.data[1]:match "%.parquet$" and engine.data.parquet or engine.data.jsonl
    local data = run:data("pairs", read(args.data):pairs(policy.tokenizer, { max_tokens = args.max_tokens }):shuffle())
    local optim = run:optimizer("adamw", policy, {
      lr = args.lr, weight_decay = args.weight_decay, clip_norm = args.clip_norm, merge = merge,
    })

    for step in run:loop("dpo", { over = data, epochs = args.epochs }) do
      optim:set { lr = args.lr * math.min(1, step.count / args.warmup) * schedules.cosine(step.progress, 1, { final = args.final }) }
      local batches, pairs_taken = {}, 0
      for index = 1, args.accumulate do
        batches[index] = data:take(args.pairs)
        pairs_taken = pairs_taken + (batches[index] and batches[index].documents / 2 or 0)
      end
      local total, numbers = 0.0, {}
      for _, batch in ipairs(batches) do
        local reference_sums = not args.reference_free
          and tensor.no_grad(function() return losses.sequence_sums(reference:logprobs(batch), batch) end) or nil
        local loss, stats = losses.dpo(losses.sequence_sums(policy:logprobs(batch), batch), reference_sums, {
          kind = args.kind, beta = args.beta, label_smoothing = args.label_smoothing, nll = args.nll,
          lengths = losses.sequence_lengths(batch), normalizer = pairs_taken,
        })
        loss:backward()
        total = total + loss:item()
        for name, value in pairs(stats) do numbers[name] = (numbers[name] or 0) + value * batch.documents / 2 / pairs_taken end
      end
      step:log { loss = total, grad_norm = optim:step() }
      step:log(numbers)
    end
    if lora then policy:save_adapter(run.folder .. "/adapter") end
    run:save("model", policy, { stop_tokens = { "<|im_end|>", "<|endoftext|>" } })
  end,
}
