--- Lesson 18: the sandbox: programs that a model wrote are run where they can do no harm.
--- Run: perilune run examples/18_sandbox.lua
local engine = require "engine"
local rewards = require "std.rewards"

-- Each program gets a process of its own, without files, network, other processes and the engine, and limits of time, memory and
-- output. Where the kernel cannot hold it so, it is refused. `status` says how it ended, `reason` why.
local programs = {
  kind = "print(('moon '):rep(3))",
  broken = "print(nothing.at.all)",
  endless = "while true do end",
  greedy = "local t = {} while true do t[#t + 1] = ('x'):rep(1 << 20) .. #t end",
  loud = "while true do print('hello') end",
  curious = "print(os, require, io.open)",
}
for name, program in pairs(programs) do
  local result = engine.sandbox.run { program = program, seconds = name == "endless" and 0.5 or 10, memory_mb = 64 }
  print(("%-8s %-8s %s"):format(name, result.status, result.reason or (result.stdout:gsub("%s+$", ""))))
end

-- Input goes to standard input. Python runs too where there is one: language = "python".
local sum = [[local total = 0
for line in io.lines() do total = total + tonumber(line) end
print(total)]]
print("sum: " .. engine.sandbox.run({ program = sum, stdin = "20\n22\n" }).stdout)

-- As a reward: the share of tests that a program passes. Tests are code below it, or input and output. The programs of all rollouts
-- run side by side, one a core.
local record = { tests = { "assert(double(2) == 4)", "assert(double(-1) == -2)", "assert(double(0.5) == 1)" } }
local texts = {
  "Here it is:\n```lua\nfunction double(x) return x + x end\n```\n",
  "```lua\nfunction double(x) return x * x end\n```",
  "function double(x) while true do end end",
}
local scores = rewards.score({ texts = texts, records = { record, record, record } }, rewards.programs { seconds = 1 })
for index, score in ipairs(scores:to_table()) do print(("program %d passes %.2f of the tests"):format(index, score)) end
