--- Lesson 10: your own modules: `require` finds files beside the script.
--- Run: perilune run examples/10_modules.lua
local engine = require "engine"

-- Three kinds of names: `engine` is built in, `std.` is Lua that is part of the program, and everything else is a file
-- beside this script: here running_mean.lua. A dot is a folder: `require "losses.mine"` reads losses/mine.lua.
local schedules = require "std.schedules"
local running_mean = require "running_mean"

return engine.workflow {
  name = "modules",
  args = { steps = { 50, min = 1 }, keep = { 0.9, min = 0 } },
  run = function(run, args)
    -- A module runs once, however often it is required; all who ask get the same table.
    print("the same table: " .. tostring(require "running_mean" == running_mean))

    local smooth = running_mean.new(args.keep)
    local noise = engine.tensor.randn({ args.steps }):to_table()
    for step in run:loop("measure", { steps = args.steps }) do
      local value = schedules.linear(step.index, step.steps) + 0.3 * noise[step.count]
      local mean = smooth(value)
      step:log { value = value, mean = mean }
      if step.count % 10 == 0 then print(("step %d: value %+.2f, running mean %+.2f"):format(step.count, value, mean)) end
    end

    -- A good module refuses what it cannot use, and names the line that asked. `pcall` catches the error.
    local _, message = pcall(function() smooth = running_mean.new(1.5) end)
    print(message)

    -- The module's text is kept with the run, beside the script's.
    print("kept: " .. run.folder .. "/code")
  end,
}
