--- Merging: an adapter into its base, or several models of one shape into one.
--- Run: perilune run scripts/merge.lua --base checkpoints/base --adapter checkpoints/adapter
---      perilune run scripts/merge.lua --base checkpoints/base --models checkpoints/a,checkpoints/b --how ties
--- Sources: model soups, arXiv 2203.05482; task arithmetic, arXiv 2212.04089; TIES, arXiv 2306.01708; DARE, arXiv 2311.03099.
local engine = require "engine"
local merging = require "std.merging"

return engine.workflow {
  name = "merge",
  args = {
    base = engine.required("string", { help = "folder of the model from which the others were trained" }),
    adapter = engine.optional("string", { help = "folder of a PEFT adapter" }),
    models = engine.optional("strings", { help = "folders of models of one shape" }),
    how = { "linear", choices = { "linear", "task_arithmetic", "ties", "dare" }, help = "of several models: see std.merging" },
    weights = engine.optional("numbers", { help = "one for each model; default 1 each, with linear shares that sum to 1" }),
    reserve = engine.optional("number", { min = 0, max = 1, help = "share of each task vector that ties (0.2) and dare (0.1) keep" }),
  },
  run = function(run, args)
    assert(args.adapter or args.models, "merge: give --adapter, or --models")
    local into = run:model("merged", args.base, { adapter = args.adapter })
    if args.models then
      local models = {}
      for index, folder in ipairs(args.models) do models[index] = engine.model.load(folder, { frozen = true }) end
      local options = { weights = args.weights, reserve = args.reserve }
      if args.how == "linear" then
        merging.linear(into, models, options)
      else
        merging[args.how](into, engine.model.load(args.base, { frozen = true }), models, options)
      end
    end
    run:save("model", into)
  end,
}
