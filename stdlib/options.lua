--- Options of functions of the standard library: unknown ones are errors that name the caller's line.

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
      error(("%s: option should be one of %s, got `%s`"):format(name, table.concat(known, ", "), tostring(key)), level)
    end
  end
  return given
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
