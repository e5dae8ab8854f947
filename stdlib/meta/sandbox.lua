---@meta
--- Programs that a model wrote, run where they can do no harm: in a process of their own, without files, network, other processes
--- and the engine, within limits of time, memory and output.

---@class engine.sandbox
local sandbox = {}

---@class engine.SandboxResult
---@field status "ok"|"error"|"timeout"|"memory"|"killed"|"refused" killed: by a signal, or because it wrote too much; refused: not run
---@field reason string? in words, unless ok
---@field stdout string
---@field stderr string
---@field exit integer? its exit code, if it came to one
---@field seconds number by the clock, from when the program began
---@field missing string[] walls that this system has not, with why; it ran all the same, for `allow_weaker`

--- Runs a program and waits for its end.
---
--- A Lua program has Lua's own strings, tables, mathematics, coroutines and utf8, `print`, `io.read`, `io.lines` and `io.write`. A
--- Python program is run by the system's python3 with its standard library. Both do the same in each run, clocks aside: random
--- numbers of Lua and the order of sets and tables have a fixed seed. Neither can start a process or a thread.
---
--- Limits: `seconds` by the clock (2), `memory_mb` (256), `output_kb` of each of its two streams (64), and `files_mb` in a folder of
--- its own which goes with it (0: nothing is written). Where the kernel cannot hold a program (it takes Linux 5.13 with Landlock and
--- seccomp), it is refused, unless `allow_weaker` is true.
---
--- Example: local result = engine.sandbox.run { program = "print(6 * 7)", language = "lua", seconds = 1 }
---@param options { program: string, language?: "lua"|"python", stdin?: string, seconds?: number, memory_mb?: integer, output_kb?: integer, files_mb?: integer, allow_weaker?: boolean }
---@return engine.SandboxResult result
function sandbox.run(options) end

--- Runs many programs, `jobs` at a time (as many as there are cores); results in the order of the list.
---
--- Example: local results = engine.sandbox.run_all({ { program = "print(1)" }, { program = "print(2)" } }, { jobs = 2 })
---@param list { program: string, language?: "lua"|"python", stdin?: string, seconds?: number, memory_mb?: integer, output_kb?: integer, files_mb?: integer, allow_weaker?: boolean }[]
---@param options? { jobs?: integer }
---@return engine.SandboxResult[] results
function sandbox.run_all(list, options) end
