--- The perilune side of compare_trl.py: the same steps as TRL's trainers, timed one by one.
local engine = require "engine"
local json, losses, rewards, tensor = require "std.json", require "std.losses", require "std.rewards", require("engine").tensor

local function memory_bytes()
  for line in io.lines "/proc/self/status" do
    local kib = line:match "^VmHWM:%s*(%d+)"
    if kib then return math.tointeger(kib) * 1024 end
  end
end

return engine.workflow {
  name = "compare_trl",
  args = {
    kind = { "sft", choices = { "sft", "pack", "dpo", "grpo" } }, dtype = { "f32", choices = { "f32", "bf16" } },
    model = engine.required "string", steps = 50, seconds = 45.0, lr = 1e-4, device = "cpu", answer = 64,
  },
  run = function(run, args)
    local policy = run:model("policy", args.model, { dtype = args.dtype, device = args.device })
    local optim = run:optimizer("adamw", policy, { lr = args.lr, betas = { 0.9, 0.999 }, weight_decay = 0, clip_norm = 1.0 })
    local data = engine.data.jsonl(("%s/%s.jsonl"):format(args.model, args.kind))
    local tokenizer = policy.tokenizer
    local steps = {}

    -- Every token of a conversation is learned, as TRL's trainer has it by default.
    local function ids(record)
      local all = tokenizer:encode(tokenizer:chat(record.messages), { specials = true })
      return table.move(all, 1, math.min(#all, 256), 1, {})
    end
    local function learn(batch)
      -- transformers' trainer divides by all labels, also those of first tokens, which nothing predicts.
      local loss = policy:cross_entropy(batch, { normalizer = batch.count })
      loss:backward()
      return loss:item(), batch.count
    end
    function steps.sft()
      local documents = data:take(8)
      for index, record in ipairs(documents) do documents[index] = ids(record) end
      return learn(engine.data.batch(documents))
    end
    local left
    function steps.pack()
      -- Whole conversations end to end, as many as eight rows of 256 tokens hold: attention stays inside each.
      local documents, count = {}, 0
      while true do
        left = left or ids(data:take(1)[1])
        if count + #left > 8 * 256 then return learn(engine.data.batch(documents)) end
        documents[#documents + 1], count, left = left, count + #left, nil
      end
    end
    -- Tokens of all documents, those that they share counted for each, as TRL counts.
    local function whole(batch)
      local count, positions, borders = batch.count, batch.position_ids:to_table(), batch.cu_seqlens:to_table()
      for index = 1, batch.documents do count = count + positions[borders[index] + 1] end
      return count
    end
    local reference = args.kind == "dpo" and run:model("reference", args.model, { dtype = args.dtype, device = args.device, frozen = true })
    function steps.dpo()
      local batch = data:take(8)
      local wanted = tensor.no_grad(function() return losses.sequence_sums(reference:logprobs(batch), batch) end)
      local loss = losses.dpo(losses.sequence_sums(policy:logprobs(batch), batch), wanted, { beta = 0.1 })
      loss:backward()
      return loss:item(), batch
    end
    local function digits(text)
      local _, count = text:gsub("%d", "")
      return count + 0.01 * #text
    end
    local generated, answers, generation = 0, 0, 0.0
    function steps.grpo()
      local begin = run:now()
      local rollouts = policy:generate(data:take(16), { n = 8, max_tokens = args.answer })
      generation = generation + run:now() - begin
      local advantage = losses.group_advantage(rewards.score(rollouts, digits), 8)
      local total = 0.0
      for batch in rollouts:batches { tokens = 4096 } do
        local loss = losses.dapo(policy:logprobs(batch), batch, advantage, { clip = 0.2, normalizer = rollouts.total_tokens })
        loss:backward()
        total = total + loss:item()
      end
      generated, answers = generated + rollouts.total_tokens, answers + rollouts.count
      return total
    end

    if args.kind == "dpo" then data = data:pairs(tokenizer, { max_tokens = 256 }) end
    data = data:forever()

    local result = { times = {}, tokens = {}, loss = {} }
    local from = run:now()
    for _ in run:loop(args.kind, { steps = args.steps, checkpoint_every = false }) do
      local start = run:now()
      local loss, tokens = steps[args.kind]()
      optim:step()
      local now = run:now()
      table.insert(result.times, now - start)
      table.insert(result.loss, loss)
      table.insert(result.tokens, math.type(tokens) and tokens or tokens and whole(tokens))
      if now - from > args.seconds and #result.times > 10 then break end
    end
    result.generation_s = answers > 0 and generation / #result.times or nil
    result.mean_length = answers > 0 and generated / answers or nil
    result.peak_memory_bytes = memory_bytes()
    print("RESULT " .. json.encode(result))
  end,
}
