--- From nothing to an aligned model, on two cores in minutes: pretraining, SFT, DPO and GRPO on tasks that the script makes
--- (sums in digits and in words, sorting, a calculator), an evaluation on held-out problems after every stage, and a report.
--- Run: perilune run scripts/quickstart.lua
--- Source: the recipe of the Qwen2.5 technical report, arXiv 2412.15115, sections 3 and 4, at a ten-thousandth of its size.
local engine = require "engine"
local eval, losses, report, rewards = require "std.eval", require "std.losses", require "std.report", require "std.rewards"
local schedules, tasks, tensor = require "std.schedules", require "std.tasks", engine.tensor

return engine.workflow {
  name = "quickstart",
  args = {
    hidden = 128, layers = 4, heads = 4, kv_heads = 2, intermediate = 384, vocab = { 512, min = 300 },
    device = { "cpu", help = "cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one" },
    dtype = { "bf16", choices = { "f32", "bf16" } },
    documents = { 12000, min = 100, help = "of the text for pretraining" }, chats = { 20000, min = 100 },
    digits = { 2, min = 1, max = 4, help = "of the numbers in sums: how hard it is" },
    pretrain = { 800, min = 1, help = "steps" }, sft = { 2000, min = 1 }, dpo = { 40, min = 1 }, grpo = { 200, min = 1 },
    questions = { 24, min = 1, help = "prompts of a GRPO step" }, group = { 8, min = 2, help = "answers of each" },
    max_tokens = { 80, min = 8, help = "of an answer" }, held_out = { 200, min = 10, help = "problems of each evaluation" },
  },
  run = function(run, args)
    local seed, digits = run.seed, args.digits
    local function path(name) return run.folder .. "/" .. name end
    run:step("make the tasks", { args.documents, args.chats, digits }, function()
      local file <close> = assert(io.open(path "pretrain.txt", "w"))
      file:write(tasks.text { count = args.documents, seed = seed, digits = digits, tales = 0.3 })
      tasks.write(path "sft.jsonl", tasks.conversations { count = args.chats, seed = seed + 1, digits = digits, steps = 0.35 })
      tasks.write(path "prompts.jsonl", tasks.problems { count = 4000, seed = seed + 2, digits = digits })
    end)
    local held_out = tasks.problems { count = args.held_out, seed = seed + 3, digits = digits, split = "test" }
    local text = engine.data.text(path "pretrain.txt")
    local tokenizer = engine.tokenizer.train(engine.data.text { path "pretrain.txt", path "sft.jsonl" }, { vocab_size = args.vocab })

    local policy = run:model("policy", {
      vocab = tokenizer.vocab_size, hidden = args.hidden, layers = args.layers, heads = args.heads, kv_heads = args.kv_heads,
      intermediate = args.intermediate, initializer_range = 0.05, max_positions = 1024,
    }, { device = args.device, dtype = args.dtype, tokenizer = tokenizer })
    local optim = run:optimizer("adamw", policy, { betas = { 0.9, 0.98 }, weight_decay = 0.1, clip_norm = 1.0 })
    print(("%.2fM parameters, %s"):format(policy.count / 1e6, policy.dtype))

    local curves = run:state("curves", { pretrain = {}, sft = {}, dpo = {}, reward = {}, length = {}, kl = {} })
    local stages, samples = {}, {}
    --- Sampled answers to the held-out problems: the same measure after every stage. Recorded, so that a resume keeps it.
    local function evaluate(stage)
      local seconds_from = run:now()
      local numbers = run:step("evaluate " .. stage, {}, function()
        local result = eval.generate(policy, held_out, tasks.reward(), {
          n = 2, temperature = 1, seed = seed, max_tokens = args.max_tokens, by = "kind",
        })
        local shown = {}
        for index = 1, 4 do
          local item = result.items[index]
          shown[index] = { stage = stage, prompt = item.record.prompt, text = item.texts[1], answer = item.record.answer, score = item.scores[1] }
        end
        return { summary = eval.summary(result), shown = shown }
      end)
      stages[#stages + 1] = { name = stage, metrics = numbers.summary, seconds = run:now() - seconds_from }
      table.move(numbers.shown, 1, #numbers.shown, #samples + 1, samples)
      print(("%s: %.1f%% of held-out problems right"):format(stage, 100 * numbers.summary.accuracy))
    end
    local function rate(step, peak, warmup, final)
      optim:set { lr = peak * schedules.cosine(step.index, step.steps, { warmup = warmup, final = final }) }
    end

    -- 1. Pretraining: the next token of plain text.
    local windows = run:data("text", text:tokenizer(tokenizer):pack { seq_len = 256, how = "windows" }:shuffle():forever())
    for step in run:loop("pretrain", { steps = args.pretrain }) do
      rate(step, 3e-3, 50, 0.1)
      local loss = policy:cross_entropy(windows:take(8))
      loss:backward()
      step:log { loss = loss, grad_norm = optim:step() }
      if step.count % 10 == 0 then table.insert(curves.pretrain, { step.count, loss:item() }) end
    end
    evaluate "pretrained"

    -- 2. SFT: what the assistant says in conversations, by the chat template.
    local chats = run:data("chats", engine.data.jsonl(path "sft.jsonl"):chat(tokenizer):pack { seq_len = 256, how = "best_fit" }:shuffle():forever())
    for step in run:loop("sft", { steps = args.sft }) do
      rate(step, 3e-3, 50, 0.05)
      local loss = policy:cross_entropy(chats:take(8))
      loss:backward()
      step:log { loss = loss, grad_norm = optim:step() }
      if step.count % 10 == 0 then table.insert(curves.sft, { step.count, loss:item() }) end
    end
    local sft = run:save("sft", policy)
    evaluate "SFT"
    local reference = run:model("reference", sft, { device = args.device, dtype = args.dtype, frozen = true })

    -- 3. DPO: of several answers to a prompt, a right one and a wrong one.
    local pairs_found = run:step("sample pairs", { group = args.group }, function()
      local problems, pairs_made = tasks.problems { count = 400, seed = seed + 4, digits = digits }, {}
      local rollouts = policy:generate(problems, { n = args.group, max_tokens = args.max_tokens, seed = seed })
      local scores = rewards.score(rollouts, tasks.reward()):to_table()
      for first = 1, rollouts.count, args.group do
        local right, wrong
        for index = first, first + args.group - 1 do
          if scores[index] >= 1 then right = right or index else wrong = wrong or index end
        end
        if right and wrong then
          local record = rollouts.records[first]
          pairs_made[#pairs_made + 1] = { prompt = record.messages, chosen = rollouts.texts[right], rejected = rollouts.texts[wrong] }
        end
      end
      return tasks.write(path "pairs.jsonl", pairs_made)
    end)
    if pairs_found == 0 then
      print "no prompt has a right and a wrong answer: nothing to prefer"
    else
      local pairs_read = run:data("pairs", engine.data.jsonl(path "pairs.jsonl"):pairs(tokenizer):shuffle():forever())
      for step in run:loop("dpo", { steps = args.dpo }) do
        rate(step, 1e-4, 5, 0.1)
        local batch = pairs_read:take(16)
        local reference_sums = tensor.no_grad(function() return losses.sequence_sums(reference:logprobs(batch), batch) end)
        local loss, stats = losses.dpo(losses.sequence_sums(policy:logprobs(batch), batch), reference_sums, {
          beta = 0.1, nll = 0.2, lengths = losses.sequence_lengths(batch),
        })
        loss:backward()
        step:log { loss = loss, accuracy = stats.accuracy, margin = stats.margin, grad_norm = optim:step() }
        table.insert(curves.dpo, { step.count, loss:item() })
      end
    end
    evaluate "DPO"

    -- 4. GRPO: answers that are better than the group's mean become likelier. Nothing but the answer is checked.
    local prompts = run:data("prompts", engine.data.jsonl(path "prompts.jsonl"):shuffle():forever())
    for step in run:loop("grpo", { steps = args.grpo }) do
      rate(step, 4e-4, 5, 0.3)
      local rollouts = policy:generate(prompts:take(args.questions), { n = args.group, max_tokens = args.max_tokens })
      local scores = rewards.score(rollouts, tasks.reward())
      local advantage, kl = losses.group_advantage(scores, args.group), 0.0
      for batch in rollouts:batches { tokens = 8192 } do
        local loss, stats = losses.dapo(policy:logprobs(batch), batch, advantage, {
          normalizer = rollouts.total_tokens, reference = tensor.no_grad(function() return reference:logprobs(batch) end),
        })
        loss:backward()
        kl = kl + stats.kl * batch.supervised / rollouts.total_tokens
      end
      local reward, length = scores:mean():item(), rollouts.total_tokens / rollouts.count
      step:log { reward = reward, kl = kl, length = length, grad_norm = optim:step() }
      table.insert(curves.reward, { step.count, reward })
      table.insert(curves.kl, { step.count, kl })
      table.insert(curves.length, { step.count, length })
    end
    evaluate "GRPO"

    local model = run:save("model", policy)
    local function curve(title, name) return { title = title, x = "step", series = { { name = name, points = curves[name] } } } end
    local page = {
      title = "Quickstart", stages = stages, samples = samples, columns = { "accuracy", "accuracy_sum", "accuracy_words", "accuracy_sort", "accuracy_tool", "length", "truncated" },
      note = ("A model of %.2fM parameters, trained from nothing. Accuracies are of two answers to each of %d held-out problems, sampled at temperature 1."):format(policy.count / 1e6, args.held_out),
      curves = {
        curve("Pretraining: loss", "pretrain"), curve("SFT: loss", "sft"), curve("DPO: loss", "dpo"),
        curve("GRPO: reward of the training prompts", "reward"), curve("GRPO: KL to the SFT model, nats a token", "kl"), curve("GRPO: tokens of an answer", "length"),
      },
    }
    print(report.text(page))
    print("report: " .. report.write(path "report.html", page))
    print("talk to it: perilune chat " .. model)
  end,
}
