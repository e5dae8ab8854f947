--- A tiny test harness: `describe(name, body)`, `it(name, body)`, `expect(value)`. A failure stops the spec with the line
--- of the expectation, below the names it stands under.

local harness = {}
local names = {}

local function within(name, body)
  names[#names + 1] = name
  local ok, message = pcall(body)
  if not ok then
    -- The innermost names it; outer ones pass it on.
    if not tostring(message):find("^FAILED") then
      message = ("FAILED %s: %s"):format(table.concat(names, " > "), tostring(message))
    end
    error(message, 0)
  end
  names[#names] = nil
end

harness.describe = within
harness.it = within

local function show(value)
  if type(value) ~= "table" then return tostring(value) end
  local parts = {}
  for _, entry in ipairs(value) do parts[#parts + 1] = show(entry) end
  return "{" .. table.concat(parts, ", ") .. "}"
end

local function near(a, b, tolerance)
  if type(a) ~= type(b) then return false end
  if type(a) == "number" then return a == b or math.abs(a - b) <= tolerance end
  if type(a) ~= "table" then return a == b end
  if #a ~= #b then return false end
  for index = 1, #a do
    if not near(a[index], b[index], tolerance) then return false end
  end
  return true
end

--- `expect(x).is(y)`, `.near(y, tolerance)`, `.fails(part of the message)`; tensors are compared as tables.
function harness.expect(value)
  local plain = value
  if type(value) == "userdata" and pcall(function() return value.to_table end) then plain = value:to_table() end
  return {
    is = function(wanted)
      if not near(plain, wanted, 0) then error(("expected %s, got %s"):format(show(wanted), show(plain)), 2) end
    end,
    near = function(wanted, tolerance)
      if not near(plain, wanted, tolerance or 1e-6) then error(("expected about %s, got %s"):format(show(wanted), show(plain)), 2) end
    end,
    fails = function(part)
      local ok, message = pcall(value)
      if ok then error("expected an error", 2) end
      if not tostring(message):find(part, 1, true) then
        error(("expected an error with %q, got %q"):format(part, tostring(message)), 2)
      end
    end,
  }
end

return harness
