--- Group relative policy optimisation: the model answers each prompt several times, and what is better than the group's mean
--- becomes likelier. Rewards are computed; edit `reward_of` for your own, also while the run goes on.
--- Run: perilune run scripts/grpo.lua --model checkpoints/sft --prompts sums.jsonl
--- Source: Shao et al., arXiv 2402.03300; Qwen2.5 technical report, section 4.3 (8 answers a prompt); DAPO, arXiv 2503.14476.
local engine = require "engine"
local losses, rewards, tensor = require "std.losses", require "std.rewards", require("engine").tensor

local function reward_of(args)
  return rewards.combine {
    { args.reward == "numeric" and rewards.numeric() or rewards.exact(), name = "correct" },
    { rewards.overlong { max = args.max_tokens, margin = math.max(args.max_tokens // 4, 1) }, weight = args.overlong, name = "overlong" },
  }
end

return engine.workflow {
  name = "grpo",
  args = {
    model = engine.required("string", { help = "folder of the SFT model" }),
    prompts = engine.required("strings", { help = "prompts with answers, .jsonl or .parquet: prompt or messages, answer" }),
    reward = { "numeric", choices = { "numeric", "exact" }, help = "how an answer is compared with the record's" },
    overlong = { 0.5, min = 0, help = "weight of the penalty for long answers" },
    loss = { "grpo", choices = { "grpo", "dapo", "dr_grpo", "gspo", "cispo" }, help = "see std.losses" },
    device = { "cpu", help = "cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one" },
    dtype = engine.optional("string", { choices = { "f32", "bf16" } }),
    steps = { 200, min = 1 }, questions = { 16, min = 1, help = "prompts of a step" }, group = { 8, min = 2, help = "answers of a prompt" },
    max_tokens = { 128, min = 1, help = "of an answer" }, temperature = { 1.0, min = 0.01 },
    lr = { 1e-6, min = 0 }, warmup = { 5, min = 0, help = "updates until lr is reached" }, weight_decay = 0.0, clip_norm = { 1.0, min = 0 },
    updates = { 1, min = 1, help = "updates on the same answers" },
    beta = { 0.0, min = 0, help = "weight of the KL to the model that it began as; that model is kept only if above 0" },
    tokens = { 8192, min = 1, help = "tokens of a micro-batch" },
    lora = { 0, min = 0, help = "rank of an adapter; 0 trains all weights" },
    targets = engine.optional("strings", { help = "modules of the adapter: q_proj,v_proj ...; default all of the layers" }),
    dora = { false, help = "the adapter learns the lengths of rows too" },
  },
  run = function(run, args)
    assert(args.lora > 0 or not (args.targets or args.dora), "grpo: --targets and --dora go with --lora RANK")
    local lora = args.lora > 0 and { rank = args.lora, targets = args.targets, dora = args.dora } or nil
    local policy = run:model("policy", args.model, { device = args.device, dtype = args.dtype, lora = lora })
    local frozen = { device = args.device, dtype = args.dtype, frozen = true }
    local reference = args.beta > 0 and (lora and policy:base() or run:model("reference", args.model, frozen))
    local optim = run:optimizer("adamw", policy, { lr = args.lr, weight_decay = args.weight_decay, clip_norm = args.clip_norm })
    local read = args.prompts[1]:match "%.parquet$" and engine.data.parquet or engine.data.jsonl
    local prompts = run:data("prompts", read(args.prompts):shuffle():forever())
    local reward, dr = reward_of(args), args.loss == "dr_grpo"

    for step in run:loop("grpo", { steps = args.steps }) do
      optim:set { lr = args.lr * math.min(1, step.count / args.warmup) }
      local records = prompts:take(args.questions)
      rewards.probe(records, reward)
      local rollouts = policy:generate(records, {
        n = args.group, max_tokens = args.max_tokens, temperature = args.temperature,
      })
      local scores, parts = rewards.score(rollouts, reward)
      local advantage = losses.group_advantage(scores, args.group, { std = not dr })
      step:log(parts)
      step:log {
        length = rollouts.total_tokens / rollouts.count, truncated = rollouts.truncated / rollouts.count,
        signal = losses.group_signal(scores, args.group):mean(),
      }
      for _ = 1, args.updates do
        local totals = {}
        for batch in rollouts:batches { tokens = args.tokens } do
          local logprobs = policy:logprobs(batch, { temperature = args.temperature })
          local loss, stats = losses[args.loss](logprobs, batch, advantage, {
            beta = args.beta, rollouts = rollouts.count, normalizer = (args.loss == "dapo" or args.loss == "cispo") and rollouts.total_tokens or nil,
            max_length = dr and args.max_tokens or nil,
            reference = reference and tensor.no_grad(function() return reference:logprobs(batch, { temperature = args.temperature }) end) or nil,
          })
          loss:backward()
          stats.loss = loss:item()
          local share = batch.supervised / rollouts.total_tokens
          for name, value in pairs(stats) do totals[name] = (totals[name] or 0) + (name == "loss" and value or value * share) end
        end
        step:log(totals)
        step:log { grad_norm = optim:step() }
      end
    end
    if lora then policy:save_adapter(run.folder .. "/adapter") end
    run:save("model", policy, { stop_tokens = { "<|im_end|>", "<|endoftext|>" } })
  end,
}
