--- Rejection sampling: the model answers each prompt several times; the answers that pass are kept as conversations for SFT,
--- and the best with the worst of each prompt as pairs for DPO. A reward model ranks where an answer cannot be checked.
--- Run: perilune run scripts/rejection.lua --model checkpoints/sft --prompts sums.jsonl
--- Source: Qwen2.5 technical report, arXiv 2412.15115, sections 4.1 and 4.2 (passes are chosen, fails rejected).
local engine = require "engine"
local rewards, tensor = require "std.rewards", require("engine").tensor

--- The messages that a record asks with; a text is a user's.
local function asked(record)
  local prompt = record.messages or record.prompt
  return type(prompt) == "table" and prompt or { { role = "user", content = prompt } }
end

--- The scores of a reward model, one for each rollout.
local function judged(judge, rollouts)
  local conversations = {}
  for index, text in ipairs(rollouts.texts) do
    local prompt = asked(rollouts.records[index])
    local messages = table.move(prompt, 1, #prompt, 1, {})
    messages[#messages + 1] = { role = "assistant", content = text }
    conversations[index] = messages
  end
  return tensor.no_grad(function() return judge:scores(engine.data.chat_batch(judge.tokenizer, conversations)):to_table() end)
end

return engine.workflow {
  name = "rejection",
  args = {
    model = engine.required("string", { help = "folder of the model that answers" }),
    prompts = engine.required("strings", { help = "prompts, .jsonl or .parquet: prompt or messages, and answer unless a judge is given" }),
    judge = engine.optional("string", { help = "folder of a reward model" }),
    reward = { "numeric", choices = { "numeric", "exact" }, help = "how answers are compared with the record's, without a judge" },
    n = { 8, min = 2, help = "answers of a prompt" }, questions = { 32, min = 1, help = "prompts of a step" },
    max_tokens = { 256, min = 1, help = "of an answer" }, temperature = { 0.8, min = 0.01 }, top_p = { 0.95, min = 0.01, max = 1 },
    keep = { 1, min = 1, help = "answers of a prompt that are kept at most" },
    device = { "cpu", help = "cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one" },
    dtype = engine.optional("string", { choices = { "f32", "bf16" } }),
  },
  run = function(run, args)
    local model = run:model("model", args.model, { device = args.device, dtype = args.dtype, frozen = true })
    local judge = args.judge and run:model("judge", args.judge, { device = args.device, dtype = args.dtype, frozen = true, head = "score" })
    local read = args.prompts[1]:match "%.parquet$" and engine.data.parquet or engine.data.jsonl
    local prompts = run:data("prompts", read(args.prompts))
    local kept = run:state("kept", { chats = {}, pairs = {} })
    local check = args.reward == "numeric" and rewards.numeric() or rewards.exact()

    for step in run:loop("sample", { over = prompts }) do
      local records = prompts:take(args.questions)
      if not judge then rewards.probe(records, check) end
      local rollouts = model:generate(records, {
        n = args.n, max_tokens = args.max_tokens, temperature = args.temperature, top_p = args.top_p,
      })
      local scores = judge and judged(judge, rollouts) or rewards.score(rollouts, check):to_table()
      local sum, passed = 0.0, 0
      for first = 1, rollouts.count, args.n do
        local order, messages = {}, asked(rollouts.records[first])
        for index = first, first + args.n - 1 do order[#order + 1], sum = index, sum + scores[index] end
        table.sort(order, function(a, b) return scores[a] > scores[b] or scores[a] == scores[b] and a < b end)
        for place = 1, math.min(args.keep, args.n) do
          local index = order[place]
          if judge or scores[index] >= 1 then
            kept.chats[#kept.chats + 1] = { prompt = messages, completion = rollouts.texts[index], score = scores[index] }
            passed = passed + 1
          end
        end
        local best, worst = order[1], order[#order]
        if scores[best] > scores[worst] then
          kept.pairs[#kept.pairs + 1] = { prompt = messages, chosen = rollouts.texts[best], rejected = rollouts.texts[worst] }
        end
      end
      step:log { score = sum / rollouts.count, kept = passed, pairs = #kept.pairs, length = rollouts.total_tokens / rollouts.count }
    end
    engine.data.write_jsonl(run.folder .. "/chats.jsonl", kept.chats)
    engine.data.write_jsonl(run.folder .. "/pairs.jsonl", kept.pairs)
    print(("%d conversations in %s/chats.jsonl, %d pairs in pairs.jsonl"):format(#kept.chats, run.folder, #kept.pairs))
  end,
}
