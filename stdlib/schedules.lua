--- Learning-rate schedules: pure functions of the step and the number of steps that return a multiplier of the peak rate.
---
---     local lr = args.lr * schedules.cosine(step.index, step.steps, { warmup = 20, final = 0.1 })
---
--- With t = step, T = steps, W = warmup, f = final:
---   warm-up, t < W:  (t + 1) / W, the same for all; the first update already learns, and update W has the full rate.
---   after it:        u = (t - W) / (T - W), from 0 towards 1, is the share of the rest that is done.
--- `warmup` is a number of steps if it is 1 or more, else a share of all steps. A step behind the last keeps the last value.
--- Where t is a share that is done, as step.progress, `steps` is 1, and `warmup` and `decay` are shares; then t < W gives t / W.

local check_names = require("std.options").check

local schedules = {}

---@class std.ScheduleOptions
---@field warmup? number steps of linear warm-up (1 or more), or their share of all steps (below 1); default 0
---@field final? number multiplier at the end of the run; default 0

--- Whether `step` is a share that is done: a float, where the whole is 1. The only step of a run is an integer.
local function is_share(step, steps) return steps == 1 and math.type(step) == "float" end

local function check(name, step, steps, options, known)
  if type(step) ~= "number" or not (step >= 0) then
    error(("std.schedules.%s: `step` should be a number of at least 0, got %s"):format(name, tostring(step)), 3)
  end
  if math.type(steps) ~= "integer" or steps < 1 then
    error(("std.schedules.%s: `steps` should be an integer of at least 1, got %s"):format(name, tostring(steps)), 3)
  end
  check_names("std.schedules." .. name, options, known, 3)
  for key, value in pairs(options) do
    if type(value) ~= "number" or not (value >= 0) then
      error(("std.schedules.%s: `%s` should be a number of at least 0, got %s"):format(name, key, tostring(value)), 3)
    end
    if is_share(step, steps) and key ~= "final" and value >= 1 then
      error(("std.schedules.%s: `%s` should be a share below 1, as `step` is one, got %s"):format(name, key, tostring(value)), 3)
    end
  end
end

--- `portion`, a share or a number of steps, in the unit of `step`.
local function in_unit(portion, step, steps)
  if portion < 1 and not is_share(step, steps) then return math.floor(portion * steps) end
  return portion
end

--- The warm-up's multiplier, or nil and the share u of the rest that is done.
local function warm_up(step, steps, warmup)
  local count = in_unit(warmup or 0, step, steps)
  if step < count then return (is_share(step, steps) and step or step + 1) / count end
  if steps <= count then return nil, 1 end
  return nil, math.min((step - count) / (steps - count), 1)
end

--- Warm-up, then 1.
---@param step number counted from 0, as step.index; with `steps` 1 a share that is done, as step.progress
---@param steps integer
---@param options? { warmup?: number }
---@return number multiplier
function schedules.constant(step, steps, options)
  options = options or {}
  check("constant", step, steps, options, { "warmup" })
  return warm_up(step, steps, options.warmup) or 1
end

--- Warm-up, then a straight line: 1 - (1 - f) u.
---@param step number counted from 0, as step.index; with `steps` 1 a share that is done, as step.progress
---@param steps integer
---@param options? std.ScheduleOptions
---@return number multiplier
function schedules.linear(step, steps, options)
  options = options or {}
  check("linear", step, steps, options, { "warmup", "final" })
  local rising, u = warm_up(step, steps, options.warmup)
  return rising or 1 - (1 - (options.final or 0)) * u
end

--- Warm-up, then half a cosine: f + (1 - f) (1 + cos(pi u)) / 2. Source: arXiv 1608.03983, equation 5, without restarts.
---@param step number counted from 0, as step.index; with `steps` 1 a share that is done, as step.progress
---@param steps integer
---@param options? std.ScheduleOptions
---@return number multiplier
function schedules.cosine(step, steps, options)
  options = options or {}
  check("cosine", step, steps, options, { "warmup", "final" })
  local rising, u = warm_up(step, steps, options.warmup)
  local final = options.final or 0
  return rising or final + (1 - final) * (1 + math.cos(math.pi * u)) / 2
end

--- Warm-up, then 1, then over the last `decay` steps (D) a straight line to f: 1 - (1 - f) (t - (T - D)) / D.
--- Source: MiniCPM, arXiv 2404.06395, section 4, with the straight line of arXiv 2405.18392.
---@param step number counted from 0, as step.index; with `steps` 1 a share that is done, as step.progress
---@param steps integer
---@param options? { warmup?: number, decay?: number, final?: number } decay: steps, or a share below 1; default 0.1
---@return number multiplier
function schedules.warmup_stable_decay(step, steps, options)
  options = options or {}
  check("warmup_stable_decay", step, steps, options, { "warmup", "decay", "final" })
  local rising = warm_up(step, steps, options.warmup)
  if rising then return rising end
  local decay = in_unit(options.decay or 0.1, step, steps)
  local fallen = step - (steps - decay)
  if fallen <= 0 then return 1 end
  return 1 - (1 - (options.final or 0)) * math.min(fallen / decay, 1)
end

return schedules
