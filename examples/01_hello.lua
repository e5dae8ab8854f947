--- Lesson 1: a workflow, its arguments, and the folder that each run leaves behind.
--- Run: perilune run examples/01_hello.lua --name Ada --count 5
local engine = require "engine"

-- A script returns a workflow: a name, arguments with their defaults, and a function that does the work. Nothing runs
-- while the script is read, so `perilune run examples/01_hello.lua --help` can list the arguments without doing anything.
return engine.workflow {
  name = "hello",
  args = {
    -- A default gives the type: --name takes text, and --count ten is refused because 3 is a whole number.
    name = "world",
    count = { 3, min = 1, max = 10, help = "greetings to print" },
    mood = { "calm", choices = { "calm", "loud" } },
    -- Without a default the argument is nil until somebody gives it.
    farewell = engine.optional("string", { help = "last words" }),
  },
  run = function(run, args)
    local greeting = ("Hello, %s"):format(args.name)
    if args.mood == "loud" then greeting = greeting:upper() .. "!" end

    -- The engine counts the steps of a loop. It shows progress, and writes what you log as one line of JSON a step.
    for step in run:loop("greet", { steps = args.count }) do
      print(("%d of %d: %s"):format(step.count, step.steps, greeting))
      step:log { letters = #greeting * step.count }
    end
    if args.farewell then print(args.farewell) end

    -- Each run has a folder of its own: the script as it was, the arguments, the metrics, and what you save.
    print("seed " .. run.seed .. ", folder " .. run.folder)
    for line in io.lines(run.folder .. "/metrics.jsonl") do
      print(line:match '"letters":%d+')
    end
  end,
}
