--- Evaluation: loss on text, multiple choice by log-likelihood, and generated answers that are checked. Every item is written
--- beside the numbers, so that what they hide can be read.
--- Run: perilune run scripts/eval.lua --model checkpoints/sft --problems sums.jsonl --n 8 --temperature 1
--- Sources: lm-evaluation-harness (acc, acc_norm); pass@k of Chen et al., arXiv 2107.03374.
local engine = require "engine"
local eval, report, rewards = require "std.eval", require "std.report", require "std.rewards"

local function records_of(paths)
  local read = paths[1]:match "%.parquet$" and engine.data.parquet or engine.data.jsonl
  local data, records = read(paths), {}
  for some in function() return data:take(1024) end do table.move(some, 1, #some, #records + 1, records) end
  return records
end

return engine.workflow {
  name = "eval",
  args = {
    model = engine.required("string", { help = "folder of a Hugging Face checkpoint" }),
    text = engine.optional("strings", { help = "text files, for the perplexity" }),
    choices = engine.optional("strings", { help = "multiple choice, .jsonl or .parquet: prompt, choices, answer from 1" }),
    problems = engine.optional("strings", { help = "prompts with answers, .jsonl or .parquet" }),
    reward = { "numeric", choices = { "numeric", "exact", "choice" }, help = "how answers to problems are checked" },
    n = { 1, min = 1, help = "answers of a problem" }, max_tokens = { 256, min = 1 },
    temperature = { 0.0, min = 0, help = "0: greedy" }, top_p = { 1.0, min = 0.01, max = 1 },
    by = engine.optional("string", { help = "a field of problems: accuracies by its values" }),
    device = { "cpu", help = "cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one" },
    seq_len = { 1024, min = 2 }, dtype = engine.optional("string", { choices = { "f32", "bf16" } }),
  },
  run = function(run, args)
    assert(args.text or args.choices or args.problems, "eval: give --text, --choices or --problems")
    local model = run:model("model", args.model, { device = args.device, dtype = args.dtype, frozen = true })
    local numbers = {}
    local function keep(name, result)
      for key, value in pairs(eval.summary(result)) do numbers[name .. "_" .. key] = value end
      engine.data.write_jsonl(("%s/%s.jsonl"):format(run.folder, name), result.items)
    end
    if args.text then
      local windows = engine.data.text(args.text):tokenizer(model.tokenizer):pack { seq_len = args.seq_len, how = "windows" }
      local loss, count = eval.loss(model, windows)
      numbers.text_loss, numbers.text_perplexity, numbers.text_tokens = loss, math.exp(loss), count
    end
    if args.choices then keep("choices", eval.choices(model, records_of(args.choices))) end
    if args.problems then
      keep("problems", eval.generate(model, records_of(args.problems), rewards[args.reward](), {
        n = args.n, max_tokens = args.max_tokens, temperature = args.temperature, top_p = args.top_p, by = args.by,
      }))
    end
    run:log(numbers)
    print(report.text { title = args.model, stages = { { name = "evaluation", metrics = numbers } } })
    print("items: " .. run.folder)
  end,
}
