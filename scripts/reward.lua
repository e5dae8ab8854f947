--- A reward model: one number for an answer, learned from pairs of which one is better.
--- Run: perilune run scripts/reward.lua --model checkpoints/sft --data pairs.jsonl
--- Source: Bradley-Terry as in Ouyang et al., arXiv 2203.02155, eq. 1; Qwen2.5 technical report, section 4.3.
local engine = require "engine"
local losses, schedules, tensor = require "std.losses", require "std.schedules", require("engine").tensor

return engine.workflow {
  name = "reward",
  args = {
    model = engine.required("string", { help = "folder of the model that it begins as" }),
    data = engine.required("strings", { help = "pairs, .jsonl or .parquet: prompt, chosen, rejected" }),
    device = { "cpu", help = "cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one" },
    dtype = engine.optional("string", { choices = { "f32", "bf16" } }),
    max_tokens = { 1024, min = 2, help = "longer answers are cut" },
    pairs = { 16, min = 1, help = "pairs of an update" },
    epochs = { 1, min = 1 },
    lr = { 5e-6, min = 0 }, warmup = { 20, min = 0, help = "updates until lr is reached" },
    final = { 0.1, min = 0, help = "share of lr at the end" }, weight_decay = 0.0, clip_norm = { 1.0, min = 0 },
    center = { 0.01, min = 0, help = "keeps rewards around 0" },
    lora = { 0, min = 0, help = "rank of an adapter; 0 trains all weights" },
    targets = engine.optional("strings", { help = "modules of the adapter: q_proj,v_proj ...; default all of the layers" }),
    dora = { false, help = "the adapter learns the lengths of rows too" },
    validation = { 0.05, min = 0, max = 0.5, help = "share of the pairs that is held out" },
  },
  run = function(run, args)
    assert(args.lora > 0 or not (args.targets or args.dora), "reward: --targets and --dora go with --lora RANK")
    local lora = args.lora > 0 and { rank = args.lora, targets = args.targets, dora = args.dora } or nil
    local model = run:model("reward", args.model, { device = args.device, dtype = args.dtype, head = "score", lora = lora })
    local read = args.data[1]:match "%.parquet$" and engine.data.parquet or engine.data.jsonl
    local function part(name)
      return read(args.data):split(name, args.validation):pairs(model.tokenizer, { max_tokens = args.max_tokens })
    end
    local train = run:data("train", part "train":shuffle())
    local held_out = args.validation > 0 and part "validation"
    -- Of few pairs chance may hold none out.
    if held_out and train:documents() > 0 and not pcall(held_out.documents, held_out) then held_out = nil end
    local optim = run:optimizer("adamw", model, { lr = args.lr, weight_decay = args.weight_decay, clip_norm = args.clip_norm })

    for step in run:loop("reward", { over = train, epochs = args.epochs }) do
      optim:set { lr = args.lr * math.min(1, step.count / args.warmup) * schedules.cosine(step.progress, 1, { final = args.final }) }
      local loss, stats = losses.bradley_terry(model:scores(train:take(args.pairs)), { center = args.center })
      loss:backward()
      step:log { loss = loss, accuracy = stats.accuracy, margin = stats.margin, grad_norm = optim:step() }
    end

    if held_out then
      local right, count = 0, 0
      tensor.no_grad(function()
        for batch in function() return held_out:take(args.pairs) end do
          local _, stats = losses.bradley_terry(model:scores(batch))
          right, count = right + stats.accuracy * batch.documents / 2, count + batch.documents / 2
        end
      end)
      run:log { validation_accuracy = right / math.max(count, 1) }
      print(("held-out pairs: %.1f%% of %d right"):format(100 * right / math.max(count, 1), count))
    end
    if lora then model:save_adapter(run.folder .. "/adapter") end
    run:save("model", model)
  end,
}
