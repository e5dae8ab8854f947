--- Merging: an adapter into its base, or several models of one shape into one.
--- Run: perilune run scripts/merge.lua --base checkpoints/base --adapter checkpoints/adapter
---      perilune run scripts/merge.lua --base checkpoints/base --models checkpoints/a checkpoints/b --how ties
--- Sources: task arithmetic, arXiv 2212.04089; TIES, arXiv 2306.01708; DARE, arXiv 2311.03099.
local engine = require "engine"
local tensor = engine.tensor

--- The task vector with the elements that a method keeps.
local function thinned(task, how, keep)
  if how == "linear" or keep >= 1 then return task end
  if how == "dare" then return task * tensor.rand(task.shape):lt(keep) / keep end
  local size = task:abs():reshape { -1 }
  local least = size:sort(0, { descending = true }):slice(0, math.max(1, size.count * keep // 1 | 0) - 1):item(0)
  return task * task:abs():ge(least)
end

--- The sum of task vectors; with TIES only of elements that have the sign which most of their weight has.
local function joined(tasks, weights, how)
  local sum = tasks[1] * weights[1]
  for index = 2, #tasks do sum = sum + tasks[index] * weights[index] end
  if how ~= "ties" then return sum end
  local sign = sum:sign()
  local kept, count = sum * 0, sum * 0
  for index, task in ipairs(tasks) do
    local agrees = (task:sign() * sign):gt(0)
    kept, count = kept + task * agrees * weights[index], count + agrees * weights[index]
  end
  local total = 0
  for _, weight in ipairs(weights) do total = total + weight end
  return kept / count:maximum(1e-12) * total
end

return engine.workflow {
  name = "merge",
  args = {
    base = engine.required("string", { help = "folder of the model from which the others were trained" }),
    adapter = engine.optional("string", { help = "folder of a PEFT adapter" }),
    models = engine.optional("strings", { help = "folders of models of one shape" }),
    weights = engine.optional("numbers", { help = "one for each model; default: equal shares" }),
    how = { "linear", choices = { "linear", "ties", "dare" } },
    keep = { 0.2, min = 0, max = 1, help = "share of each task vector that ties and dare keep" },
  },
  run = function(run, args)
    assert(args.adapter or args.models, "merge: give --adapter, or --models")
    local model = run:model("merged", args.base, { adapter = args.adapter })
    if args.models then
      local weights, others = args.weights or {}, {}
      assert(#weights == 0 or #weights == #args.models, "merge: --weights should be as many as --models")
      for index, folder in ipairs(args.models) do
        others[index] = engine.model.load(folder, { frozen = true })
        weights[index] = weights[index] or 1 / #args.models
      end
      for _, name in ipairs(model:parameter_names()) do
        local base, tasks = model:parameter(name), {}
        for index, other in ipairs(others) do tasks[index] = thinned(other:parameter(name) - base, args.how, args.keep) end
        model:set_parameter(name, base + joined(tasks, weights, args.how))
      end
    end
    run:save("model", model)
  end,
}
