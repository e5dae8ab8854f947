--- Arguments and options of functions of the standard library: what cannot be meant is an error that names the caller's line.

local options = {}

--- `given`, or an empty table, after every key was found in `known`.
---
--- Example: local given = options.check("std.losses.mse", given, { "reduction", "mask" })
---@param name string the function, as messages call it
---@param given? table
---@param known string[]
---@param level? integer whose line is named, counted from the function that checks: default 2, its caller
---@return table given
function options.check(name, given, known, level)
  if given == nil then return {} end
  level = (level or 2) + 1
  if type(given) ~= "table" then error(("%s: `options` should be a table, got %s"):format(name, tostring(given)), level) end
  for key in pairs(given) do
    local found = false
    for _, name_known in ipairs(known) do found = found or name_known == key end
    if not found then
      local expected = #known == 1 and known[1] or "one of " .. table.concat(known, ", ")
      error(("%s: option should be %s, got `%s`"):format(name, expected, tostring(key)), level)
    end
  end
  return given
end

--- An error unless `given` is a tensor of the shape of `like`. Broadcasting would pair elements that do not belong together:
--- [n] and [n, 1] become [n, n].
---
--- Example: options.check_shape("std.losses.mse", "target", target, prediction)
---@param name string the function, as messages call it
---@param argument string
---@param given any
---@param like engine.Tensor|integer[] a tensor, or a shape
---@param level? integer as of `check`
---@return engine.Tensor given
function options.check_shape(name, argument, given, like, level)
  local expected = table.concat(type(like) == "table" and like or like.shape, ", ")
  local got = type(given) == "userdata" and ("[%s]"):format(table.concat(given.shape, ", ")) or tostring(given)
  if got ~= ("[%s]"):format(expected) then
    error(("%s: `%s` should be of shape [%s], got %s"):format(name, argument, expected, got), (level or 2) + 1)
  end
  return given
end

--- An error unless `value` is nil or a finite number of at least `least`, or above it.
---
--- Example: options.check_number("std.losses.nll", "normalizer", given.normalizer, 0, { above = true })
---@param name string the function, as messages call it
---@param argument string
---@param value any
---@param least number
---@param limits? { above?: boolean, most?: number } above: `least` itself is too small
---@param level? integer as of `check`
---@return number? value
function options.check_number(name, argument, value, least, limits, level)
  local above, most = limits and limits.above, limits and limits.most
  local fits = type(value) == "number" and (value > least or value == least and not above) and value <= (most or math.huge)
  if value == nil or fits and value < math.huge then return value end
  local expected = (above and "a number above %g" or "a number of at least %g"):format(least)
  if most then expected = ("%s and at most %g"):format(expected, most) end
  error(("%s: `%s` should be %s, got %s"):format(name, argument, expected, tostring(value)), (level or 2) + 1)
end

--- `defaults` with what `given` sets instead.
---
--- Example: local settings = options.with({ clip = 0.2 }, given)
---@param defaults table
---@param given? table
---@return table merged
function options.with(defaults, given)
  local merged = {}
  for key, value in pairs(defaults) do merged[key] = value end
  for key, value in pairs(given or {}) do merged[key] = value end
  return merged
end

return options
