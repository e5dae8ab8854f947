--- Lesson 11: steps: work that is done once, however often the script is run again.
--- Run: perilune run examples/11_steps.lua
local engine = require "engine"

return engine.workflow {
  name = "steps",
  args = { text = "examples/data/rhymes.txt", stop = { "stop", help = "a file that stops the lesson" } },
  run = function(run, args)
    -- A step has a name, inputs that its result depends on, and a body. The body runs to its end once; its result, plain data or
    -- tensors, is recorded before the step returns.
    local words = run:step("count words", { text = args.text }, function()
      local counts = {}
      for line in io.lines(args.text) do
        for word in line:lower():gmatch("%a+") do counts[word] = (counts[word] or 0) + 1 end
      end
      return counts
    end)
    print(("the: %d, moon: %d"):format(words.the or 0, words.moon or 0))

    -- What fails from time to time is tried again, two times more here. Errors that another attempt would repeat, a wrong argument
    -- for one, are not.
    local number = run:step("fragile", {}, function(step)
      if step.attempt < 3 then error("the line is busy") end
      return { drawn = math.random(100), attempts = step.attempt }
    end, { attempts = 3, backoff = 0.01 })
    print(("drawn %d in attempt %d"):format(number.drawn, number.attempts))

    -- After an error, a Ctrl-C or a power cut, `perilune resume latest` runs the script again from its top: recorded steps return
    -- their results at once, and the number drawn is the same. Try it: run the lesson with a file `stop` beside you, remove the file,
    -- and resume.
    if io.open(args.stop) then error("there is a file " .. args.stop .. ": remove it, then go on with: perilune resume latest") end

    -- The same name again is another step: the first is `square#0`, then `square#1` ... Steps may hold steps.
    local sum = run:step("squares", {}, function()
      local sum = 0
      for i = 1, 4 do sum = sum + run:step("square", { i }, function() return i * i end) end
      return sum
    end)
    print(("the sum of four squares: %d"):format(sum))

    -- Other inputs at a recorded step would make its result a lie, and are an error that says what differs.
    print("recorded in " .. run.folder .. "/store")
  end,
}
