--- Lesson 13: editing a script while it trains.
--- Run: perilune run examples/13_reloading.lua --watch
---
--- Open this file in an editor while it runs, and change what is marked. Each save is tried at the end of the step: if the script
--- comes to its loop and does a step without an error, it leads from there; if not, you are told the line, and nothing is lost.
--- `perilune runs show latest` lists the generations and what each changed.
local engine = require "engine"

return engine.workflow {
  name = "reloading",
  args = { steps = { 20000, min = 1 } },
  run = function(run, args)
    -- Points on a noisy line; a model of the run would be handed over in the same way, with its optimizer.
    local x = engine.tensor.randn { 256 }
    local y = x * 3 - 1 + engine.tensor.randn { 256 } * 0.1

    -- What must live on through an edit is in a table of the run, its tensors too.
    local fit = run:state("fit", { slope = engine.tensor.zeros { 1 }, offset = engine.tensor.zeros { 1 }, updates = 0 })

    for step in run:loop("fit", { steps = args.steps }) do
      local rate = 0.0005 -- Change this: it takes effect at the next step.
      local slope, offset = fit.slope:requires_grad(), fit.offset:requires_grad()
      local error = x * slope + offset - y
      local loss = (error * error):mean() -- Or this, to error:abs():mean().
      loss:backward()
      fit.slope, fit.offset = fit.slope:detach() - slope.grad * rate, fit.offset:detach() - offset.grad * rate
      fit.updates = fit.updates + 1
      -- Or add `slope = fit.slope` here. A new name in run:state's table, a new print, another number of steps: all can be edited.
      step:log { loss = loss }
    end

    -- What cannot: another model or data set under a known name, or new work above the loop. For these, stop the run and go on with
    -- `perilune resume latest --code new`, which says first what will be done again.
    print(("%d updates: slope %.2f, offset %.2f"):format(fit.updates, fit.slope:item(), fit.offset:item()))
  end,
}
