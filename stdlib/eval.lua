--- How good a model is, measured on text that it was not trained on.
---
---     local loss, count = eval.loss(model, held_out:epochs(1))
---
--- Measures read a data set to its end from where it stands: give `data:epochs(1)`, which begins anew, to look at the same
--- text each time. They record nothing for a backward pass and change no weights.

local tensor = require("engine").tensor

local eval = {}

--- Mean negative log-likelihood of the rest of `data`, in nats a token: -1/N sum log p(token | those before it), in which every
--- supervised token counts once, whatever the sizes of batches. Its exponential is the perplexity.
---@param model engine.Model
---@param data engine.Data packed; read to its end
---@param options? { rows?: integer } rows of a batch, default 16
---@return number? loss nil if nothing in the data is supervised
---@return integer count tokens that were counted
function eval.loss(model, data, options)
  local rows = 16
  for name, value in pairs(options or {}) do
    if name ~= "rows" then error(("std.eval.loss: option should be rows, got `%s`"):format(tostring(name)), 2) end
    if math.type(value) ~= "integer" or value < 1 then
      error(("std.eval.loss: `rows` should be an integer of at least 1, got %s"):format(tostring(value)), 2)
    end
    rows = value
  end
  return tensor.no_grad(function()
    local sum, count = 0.0, 0
    for batch in function() return data:take(rows) end do
      sum = sum - model:logprobs(batch):sum():item()
      count = count + batch.supervised
    end
    return count > 0 and sum / count or nil, count
  end)
end

return eval
