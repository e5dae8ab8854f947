--- Distillation: a student learns a teacher's distribution, over given conversations or over what the student itself says.
--- Run: perilune run scripts/distill.lua --teacher checkpoints/big --student checkpoints/small --data chats.jsonl
--- Sources: Hinton et al., arXiv 1503.02531; Agarwal et al., arXiv 2306.13649 (on the student's own samples).
local engine = require "engine"
local losses, schedules, tensor = require "std.losses", require "std.schedules", require("engine").tensor

return engine.workflow {
  name = "distill",
  args = {
    teacher = engine.required("string", { help = "folder of the model to learn from" }),
    student = engine.required("string", { help = "folder of the model that learns; one tokenizer for both" }),
    data = engine.required("strings", { help = "conversations, or with --how samples prompts, .jsonl or .parquet" }),
    how = { "data", choices = { "data", "samples" }, help = "samples: the student answers, the teacher rates each token" },
    divergence = { "forward", choices = { "forward", "reverse", "jsd" }, help = "with --how data" },
    temperature = { 1.0, min = 0.01, help = "logits of both are divided by it" },
    device = { "cpu", help = "cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one" },
    dtype = engine.optional("string", { choices = { "f32", "bf16" } }),
    seq_len = { 1024, min = 2 }, rows = { 4, min = 1, help = "rows, or prompts, of an update" },
    max_tokens = { 128, min = 1, help = "of a sample" },
    steps = { 500, min = 1 },
    lr = { 1e-5, min = 0 }, warmup = { 20, min = 0, help = "updates until lr is reached" },
    final = { 0.1, min = 0, help = "share of lr at the end" }, weight_decay = 0.0, clip_norm = { 1.0, min = 0 },
    lora = { 0, min = 0, help = "rank of an adapter; 0 trains all weights" },
    targets = engine.optional("strings", { help = "modules of the adapter: q_proj,v_proj ...; default all of the layers" }),
    dora = { false, help = "the adapter learns the lengths of rows too" },
  },
  run = function(run, args)
    assert(args.lora > 0 or not (args.targets or args.dora), "distill: --targets and --dora go with --lora RANK")
    local lora = args.lora > 0 and { rank = args.lora, targets = args.targets, dora = args.dora } or nil
    local student = run:model("student", args.student, { device = args.device, dtype = args.dtype, lora = lora })
    local teacher = run:model("teacher", args.teacher, { device = args.device, dtype = args.dtype, frozen = true })
    local one = student.tokenizer and teacher.tokenizer and student.tokenizer.vocab_size == teacher.tokenizer.vocab_size
    assert(one, "distill: student and teacher should have one tokenizer, in the folder of each")
    -- Models of one tokenizer may have vocabularies that are padded differently.
    local vocab = math.min(student.config.vocab_size, teacher.config.vocab_size)
    local function common(logits) return logits.shape[2] > vocab and logits:slice(1, 0, vocab) or logits end
    local optim = run:optimizer("adamw", student, { lr = args.lr, weight_decay = args.weight_decay, clip_norm = args.clip_norm })
    local read = args.data[1]:match "%.parquet$" and engine.data.parquet or engine.data.jsonl
    local given = args.how == "data"
    local data = read(args.data)
    if given then data = data:chat(student.tokenizer, { max_tokens = args.seq_len }):pack { seq_len = args.seq_len, how = "best_fit" } end
    data = run:data("data", data:shuffle():forever())

    for step in run:loop("distill", { steps = args.steps }) do
      optim:set { lr = args.lr * schedules.cosine(step.index, args.steps, { warmup = args.warmup, final = args.final }) }
      if given then
        local batch = data:take(args.rows)
        local wanted = tensor.no_grad(function() return teacher:hidden_states(batch, { labelled = true }) end)
        local loss = losses.by_rows(student, batch, function(logits, first, last)
          local right = tensor.no_grad(function() return common(teacher:head(wanted:slice(0, first, last))) end)
          local options = { divergence = args.divergence, temperature = args.temperature, reduction = "sum" }
          return losses.distill(common(logits), right, options) / batch.supervised
        end)
        step:log { loss = loss, grad_norm = optim:step() }
      else
        local rollouts = student:generate(data:take(args.rows), { max_tokens = args.max_tokens, temperature = args.temperature })
        local kl = 0.0
        for batch in rollouts:batches() do
          local options = { temperature = args.temperature }
          local rated = tensor.no_grad(function() return teacher:logprobs(batch, options) end)
          local loss, stats = losses.distill_samples(student:logprobs(batch, options), batch, rated, { normalizer = rollouts.total_tokens })
          loss:backward()
          kl = kl + stats.kl * batch.supervised / rollouts.total_tokens
        end
        step:log { kl = kl, length = rollouts.total_tokens / rollouts.count, grad_norm = optim:step() }
      end
    end
    if lora then student:save_adapter(run.folder .. "/adapter") end
    run:save("model", student, { stop_tokens = { "<|im_end|>", "<|endoftext|>" } })
  end,
}
