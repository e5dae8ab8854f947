--- Writes a model's logits for a text as JSON, for check_transformers.py to compare.
--- Run: perilune run tests/bench/logits.lua --model FOLDER --out logits.json
local engine = require "engine"

return engine.workflow {
  name = "logits",
  args = {
    model = engine.required("string", { help = "folder of a Hugging Face checkpoint" }),
    prompt = "The moon was full, and the river was still.\n",
    out = "logits.json",
  },
  run = function(run, args)
    local model = run:model("model", args.model, { dtype = "f32", frozen = true })
    local ids = model.tokenizer:encode(args.prompt)
    local rows = {}
    for index, row in ipairs(model:logits(engine.data.batch { ids }):to_table()) do
      local numbers = {}
      for column, value in ipairs(row) do numbers[column] = ("%.9g"):format(value) end
      rows[index] = "[" .. table.concat(numbers, ",") .. "]"
    end
    local file <close> = assert(io.open(args.out, "w"))
    file:write('{"tokens":[', table.concat(ids, ","), '],"logits":[', table.concat(rows, ","), "]}\n")
  end,
}
