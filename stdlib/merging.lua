--- Merging of checkpoints in the space of their weights, one parameter at a time, into a model of the same shape:
---
---     local into = engine.model.load("checkpoints/base")
---     merging.ties(into, base, { math_model, code_model }, { reserve = 0.2 })
---     into:save("checkpoints/merged")
---
--- A task vector is `model - base`. `into` may be one of the models: each parameter is read before it is written.

local tensor = require("engine").tensor

local merging = {}

---@class std.MergingOptions
---@field weights? number[] of the models, or of their task vectors; default 1 each, for `linear` shares that sum to 1
---@field reserve? number share of each task vector's elements that stay, for `ties` (default 0.2) and `dare` (0.1)
---@field rescale? boolean for `dare`: divide what stays by `reserve` (default true)

local function read(name, models, options, known)
  if type(models) ~= "table" or #models == 0 then error(("std.merging.%s: `models` should be a list of models"):format(name), 3) end
  options = options or {}
  for key in pairs(options) do
    if not known[key] then error(("std.merging.%s: option `%s` is not known"):format(name, tostring(key)), 3) end
  end
  local weights = options.weights
  if weights and #weights ~= #models then
    error(("std.merging.%s: `weights` should be %d numbers, got %d"):format(name, #models, #weights), 3)
  end
  for _, weight in ipairs(weights or {}) do
    if type(weight) ~= "number" or weight ~= weight or math.abs(weight) == math.huge then
      error(("std.merging.%s: `weights` should be finite numbers, got %s"):format(name, tostring(weight)), 3)
    end
  end
  local reserve = options.reserve or known.reserve
  if reserve and not (type(reserve) == "number" and reserve > 0 and reserve <= 1) then
    error(("std.merging.%s: `reserve` should be a number above 0 to 1, got %s"):format(name, tostring(reserve)), 3)
  end
  local rescale = options.rescale
  if rescale == nil then rescale = true end
  return weights, reserve, rescale
end

--- Sets every parameter of `into` to `merge(values of it in the models, its value in the base)`. `method` is for messages.
local function each(method, into, base, models, merge)
  local function value_of(model, name, shape)
    local value = model:parameter(name)
    local expected, got = table.concat(shape, ", "), table.concat(value.shape, ", ")
    if got ~= expected then
      error(("std.merging.%s: models should have one shape, got %s of [%s] and of [%s]"):format(method, name, expected, got), 0)
    end
    return value
  end
  tensor.no_grad(function()
    for _, name in ipairs(into:parameter_names()) do
      local shape, values = into:parameter(name).shape, {}
      for i, model in ipairs(models) do values[i] = value_of(model, name, shape) end
      into:set_parameter(name, merge(values, base and value_of(base, name, shape)))
    end
  end)
  return into
end

--- Sum over models of weight * value: a "model soup", arXiv 2203.05482.
---
--- Example: merging.linear(into, { first, second }, { weights = { 0.7, 0.3 } })
---@param into engine.Model
---@param models engine.Model[]
---@param options? std.MergingOptions
---@return engine.Model into
function merging.linear(into, models, options)
  local weights = read("linear", models, options, { weights = true })
  return each("linear", into, nil, models, function(values)
    local sum
    for i, value in ipairs(values) do
      local part = value * (weights and weights[i] or 1 / #models)
      sum = sum and sum + part or part
    end
    return sum
  end)
end

--- base + sum over models of weight * (value - base): task arithmetic, arXiv 2212.04089.
---
--- Example: merging.task_arithmetic(into, base, { chat }, { weights = { 0.8 } })
---@param into engine.Model
---@param base engine.Model
---@param models engine.Model[]
---@param options? std.MergingOptions
---@return engine.Model into
function merging.task_arithmetic(into, base, models, options)
  local weights = read("task_arithmetic", models, options, { weights = true })
  return each("task_arithmetic", into, base, models, function(values, start)
    local result = start
    for i, value in ipairs(values) do result = result + (value - start) * (weights and weights[i] or 1) end
    return result
  end)
end

--- Zeros in place of all but the `share` of elements that are largest by magnitude, at least one.
local function trim(vector, share)
  local size = vector:abs():reshape { vector.count }
  local least = size:topk(math.max(1, math.floor(share * vector.count))):min()
  return vector * vector:abs():ge(least)
end

--- TIES, arXiv 2306.01708, algorithm 1: each task vector keeps its largest elements; the sign of the sum of them all is elected;
--- the mean over those of each element that have this sign is added to the base.
---
--- Example: merging.ties(into, base, { first, second }, { reserve = 0.2 })
---@param into engine.Model
---@param base engine.Model
---@param models engine.Model[]
---@param options? std.MergingOptions
---@return engine.Model into
function merging.ties(into, base, models, options)
  local weights, reserve = read("ties", models, options, { weights = true, reserve = 0.2 })
  return each("ties", into, base, models, function(values, start)
    local trimmed, sum = {}, nil
    for i, value in ipairs(values) do
      trimmed[i] = trim(value - start, reserve) * (weights and weights[i] or 1)
      sum = sum and sum + trimmed[i] or trimmed[i]
    end
    local sign, total, count = sum:sign(), tensor.zeros(start.shape), tensor.zeros(start.shape)
    for _, vector in ipairs(trimmed) do
      local agrees = (vector * sign):gt(0)
      total, count = total + vector * agrees, count + agrees
    end
    return start + total / count:maximum(1)
  end)
end

--- DARE, arXiv 2311.03099: each task vector keeps random elements, scaled so that its expectation stays, and is added to the
--- base. The elements are drawn from the script's random numbers.
---
--- Example: merging.dare(into, base, { first, second }, { reserve = 0.1, weights = { 0.5, 0.5 } })
---@param into engine.Model
---@param base engine.Model
---@param models engine.Model[]
---@param options? std.MergingOptions
---@return engine.Model into
function merging.dare(into, base, models, options)
  local weights, reserve, rescale = read("dare", models, options, { weights = true, reserve = 0.1, rescale = true })
  return each("dare", into, base, models, function(values, start)
    local result = start
    for i, value in ipairs(values) do
      local kept = (value - start) * tensor.rand(start.shape):lt(reserve)
      result = result + kept * ((weights and weights[i] or 1) / (rescale and reserve or 1))
    end
    return result
  end)
end

return merging
