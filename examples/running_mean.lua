--- A mean that forgets: each new value counts `1 - keep`, all earlier ones share `keep`. A module of lesson 10.
local running_mean = {}

--- A function that takes the next value and gives the mean so far, corrected for having started at nothing.
---@param keep number from 0 to below 1
---@return fun(value: number): number
function running_mean.new(keep)
  if type(keep) ~= "number" or keep < 0 or keep >= 1 then
    -- Level 2 puts the caller's line into the message.
    error(("running_mean.new: `keep` should be from 0 to below 1, got %s"):format(tostring(keep)), 2)
  end
  local sum, weight = 0, 0
  return function(value)
    sum = keep * sum + (1 - keep) * value
    weight = keep * weight + (1 - keep)
    return sum / weight
  end
end

return running_mean
