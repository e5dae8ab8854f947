--- JSON Schema, the part that answers of models and arguments of tools are described with. Source: json-schema.org, draft 2020-12.
---
--- Known: type, enum, const, properties, required, additionalProperties, minProperties, maxProperties, items, minItems, maxItems,
--- uniqueItems, minimum, maximum, exclusiveMinimum, exclusiveMaximum, multipleOf, minLength, maxLength, pattern, allOf, anyOf, oneOf,
--- not, and $ref to a place in the schema itself. Other keywords are errors, since a schema that is half checked says yes too often;
--- title, description, default, examples, format, $schema, $id and $comment say nothing about values by that standard and are passed over.

local json = require "std.json"

local schema = {}

local NOTES = { title = true, description = true, default = true, examples = true, format = true, ["$schema"] = true, ["$id"] = true, ["$comment"] = true }
-- Where schemas stand that `$ref` refers to.
NOTES["$defs"], NOTES.definitions = true, true

local function kind_of(value)
  if value == json.null() then return "null" end
  local kind = type(value)
  if kind == "table" then return json.is_array(value) and "array" or "object" end
  if kind == "number" then return value % 1 == 0 and "integer" or "number" end
  return kind
end

local function has_type(value, wanted)
  local kind = kind_of(value)
  return kind == wanted or (wanted == "number" and kind == "integer")
end

--- Whether two values of JSON are the same: 1 and 1.0 are, lists by order, objects by name.
---
--- Example: assert(schema.equal({ a = { 1 } }, { a = { 1.0 } }))
---@param a any
---@param b any
---@return boolean equal
function schema.equal(a, b)
  if type(a) ~= "table" or type(b) ~= "table" then return a == b end
  if a == b then return true end
  if a == json.null() or b == json.null() or json.is_array(a) ~= json.is_array(b) then
    -- An empty table that a script wrote is both.
    if not (next(a) == nil and next(b) == nil and a ~= json.null() and b ~= json.null()) then return false end
  end
  for key, value in pairs(a) do
    if not schema.equal(value, b[key]) then return false end
  end
  for key in pairs(b) do
    if a[key] == nil then return false end
  end
  return true
end

-- Schemas at one place; more are a circle.
local DEPTH_MAX = 100

local CLASSES = { d = "%d", D = "%D", w = "[%w_]", W = "[^%w_]", s = "%s", S = "%S", t = "\t", n = "\n", r = "\r" }
local INNER = { d = "%d", w = "%w_", s = "%s", t = "\t", n = "\n", r = "\r" }

--- A regular expression as a Lua pattern: literals, `.`, `[...]`, `\d \w \s` and their opposites, `* + ?`, `{n}`, `{n,m}`, `^` and `$`.
--- Groups and `|` have no counterpart and are errors.
---
--- Example: assert(("A-12"):find(schema.pattern "^[A-Z]-\\d{2}$"))
---@param regex string
---@return string pattern
function schema.pattern(regex)
  local out, at = {}, 1
  local function refuse(what) error(("std.schema.pattern: %s in %q is not supported"):format(what, regex), 3) end
  while at <= #regex do
    local c, item = regex:sub(at, at), nil
    if c == "^" and at == 1 then
      out[#out + 1], at = "^", at + 1
    elseif c == "$" and at == #regex then
      out[#out + 1], at = "$", at + 1
    else
      if c == "(" or c == ")" or c == "|" or c == "^" or c == "$" then refuse("`" .. c .. "`") end
      if c == "*" or c == "+" or c == "?" or c == "{" then refuse(("`%s` without something to repeat"):format(c)) end
      if c == "\\" then
        local mark = regex:sub(at + 1, at + 1)
        item = CLASSES[mark] or (mark:find "%p" and "%" .. mark)
        if not item then refuse("`\\" .. mark .. "`") end
        at = at + 2
      elseif c == "[" then
        local parts = { "[" }
        at = at + 1
        if regex:sub(at, at) == "^" then parts[2], at = "^", at + 1 end
        while regex:sub(at, at) ~= "]" do
          local inner = regex:sub(at, at)
          if inner == "" then refuse "a class without `]`" end
          if inner == "\\" then
            local mark = regex:sub(at + 1, at + 1)
            parts[#parts + 1] = INNER[mark] or (mark:find "%p" and "%" .. mark) or refuse("`\\" .. mark .. "` in a class")
            at = at + 2
          else
            -- A minus between two characters is a range in both; Lua's own marks are not.
            parts[#parts + 1] = (inner == "%" or inner == "[" or inner == "^") and "%" .. inner or inner
            at = at + 1
          end
        end
        item, at = table.concat(parts) .. "]", at + 1
      else
        item = c == "." and "." or (c:find "%p" and "%" .. c or c)
        at = at + 1
      end
      local low, comma, high = regex:match("^{(%d+)(,?)(%d*)}", at)
      if low then
        at = regex:find("}", at, true) + 1
        low = math.tointeger(low)
        high = high ~= "" and math.tointeger(high) or (comma == "" and low or nil)
        if low > 100 or (high and (high > 100 or high < low)) then refuse "a count above 100 or the wrong way round" end
        out[#out + 1] = item:rep(low) .. (high and (item .. "?"):rep(high - low) or item .. "*")
      else
        local repeated = regex:match("^[*+?]", at)
        at = at + (repeated and 1 or 0)
        if regex:find("^[?+]", at) and repeated then refuse "a lazy or possessive repeat" end
        out[#out + 1] = item .. (repeated or "")
      end
    end
  end
  return table.concat(out)
end

--- A keyword about values of one kind: `complain` gives the words for a bound that does not hold.
local function about(kind, complain)
  return function(value, bound)
    local words = has_type(value, kind) and complain(value, bound)
    return words and words:format(bound) or nil
  end
end

local function names_in(object)
  local count = 0
  for _ in pairs(object) do count = count + 1 end
  return count
end

--- Each keyword: what is wrong with `value`, if anything. Keywords about one kind of value pass over others, as the standard says.
local CHECKS = {
  type = function(value, wanted)
    local list = type(wanted) == "table" and wanted or { wanted }
    for _, name in ipairs(list) do
      if has_type(value, name) then return nil end
    end
    return ("should be %s, is %s"):format(table.concat(list, " or "), kind_of(value))
  end,
  enum = function(value, choices)
    for _, choice in ipairs(choices) do
      if schema.equal(value, choice) then return nil end
    end
    return "is none of the values that it may be"
  end,
  const = function(value, wanted) return not schema.equal(value, wanted) and "is another value" or nil end,
  minimum = about("number", function(value, bound) return value < bound and "is below %g" end),
  maximum = about("number", function(value, bound) return value > bound and "is above %g" end),
  exclusiveMinimum = about("number", function(value, bound) return value <= bound and "is not above %g" end),
  exclusiveMaximum = about("number", function(value, bound) return value >= bound and "is not below %g" end),
  minLength = about("string", function(value, bound) return utf8.len(value) < bound and "is shorter than %g" end),
  maxLength = about("string", function(value, bound) return utf8.len(value) > bound and "is longer than %g" end),
  minItems = about("array", function(value, bound) return #value < bound and "has fewer than %g entries" end),
  maxItems = about("array", function(value, bound) return #value > bound and "has more than %g entries" end),
  multipleOf = about("number", function(value, step)
    local count = value / step
    -- 0.3 is three times 0.1, which no binary number is.
    return math.abs(count - math.floor(count + 0.5)) > 1e-9 * math.max(math.abs(count), 1) and "is no multiple of %g"
  end),
  uniqueItems = function(value, wanted)
    if not wanted or kind_of(value) ~= "array" then return nil end
    for index = 2, #value do
      for other = 1, index - 1 do
        if schema.equal(value[index], value[other]) then return "has an entry twice" end
      end
    end
  end,
  minProperties = function(value, bound) return kind_of(value) == "object" and names_in(value) < bound and ("has fewer than %g names"):format(bound) or nil end,
  maxProperties = function(value, bound) return kind_of(value) == "object" and names_in(value) > bound and ("has more than %g names"):format(bound) or nil end,
  pattern = function(value, regex)
    return type(value) == "string" and not value:find(schema.pattern(regex)) and ("does not fit %s"):format(regex) or nil
  end,
  required = function(value, names)
    if kind_of(value) ~= "object" then return nil end
    for _, name in ipairs(names) do
      if value[name] == nil then return ("has no %s"):format(name) end
    end
  end,
}
--- These look inside, and need the place.
local INSIDE = { properties = true, additionalProperties = true, items = true }

--- Keywords that try several schemas on a value: `fails` gives what is wrong by one of them. Each gives what is wrong, without the place.
local SEVERAL = {
  anyOf = function(fails, list)
    for _, rules in ipairs(list) do
      if not fails(rules) then return nil end
    end
    return "fits none of anyOf"
  end,
  oneOf = function(fails, list)
    local fits = 0
    for _, rules in ipairs(list) do fits = fits + (fails(rules) and 0 or 1) end
    return fits ~= 1 and ("fits %d of oneOf"):format(fits) or nil
  end,
  ["not"] = function(fails, rules) return not fails(rules) and "fits what it must not" or nil end,
}

--- The schema that `$ref` names, a JSON pointer from the root.
local function referred(root, reference)
  local found = reference:find "^#" and root or nil
  for name in reference:sub(2):gmatch "/([^/]*)" do
    name = name:gsub("~1", "/"):gsub("~0", "~")
    if type(found) == "table" then found = found[json.is_array(found) and (tonumber(name) or -1) + 1 or name] end
  end
  if type(found) ~= "table" and type(found) ~= "boolean" then
    error(("std.schema.validate: $ref should be a place in the schema, such as #/$defs/point, got %s"):format(reference), 0)
  end
  return found
end

local validate

local function inside(value, rules, place, root)
  if kind_of(value) == "array" and rules.items ~= nil then
    for index = 1, #value do
      local message = validate(value[index], rules.items, ("%s[%d]"):format(place, index - 1), root, 0)
      if message then return message end
    end
  end
  -- The empty table of a script may be an object too.
  if type(value) ~= "table" or value == json.null() or kind_of(value) == "array" then return nil end
  for name, entry in pairs(value) do
    local own = (rules.properties or {})[name]
    if own == nil then own = rules.additionalProperties end
    if own == false then return ("%s has %s, which is not foreseen"):format(place, name) end
    if own ~= nil and own ~= true then
      local message = validate(entry, own, place .. "." .. name, root, 0)
      if message then return message end
    end
  end
end

--- What is wrong with `value`, which stands at `place`; `depth` schemas lead to this one at the same place.
validate = function(value, rules, place, root, depth)
  if depth > DEPTH_MAX then error("std.schema.validate: the schema refers to itself without end at " .. place, 0) end
  local function fails(other) return validate(value, other, place, root, depth + 1) end
  if rules == true then return nil end
  if rules == false then return place .. " may not be there" end
  for keyword, setting in pairs(rules) do
    if CHECKS[keyword] then
      local message = CHECKS[keyword](value, setting)
      if message then return place .. " " .. message end
    elseif SEVERAL[keyword] then
      local message = SEVERAL[keyword](fails, setting)
      if message then return place .. " " .. message end
    elseif keyword == "allOf" or keyword == "$ref" then
      for _, other in ipairs(keyword == "allOf" and setting or { referred(root, setting) }) do
        local message = fails(other)
        if message then return message end
      end
    elseif not INSIDE[keyword] and not NOTES[keyword] then
      error(("std.schema.validate: the keyword %s is not supported"):format(tostring(keyword)), 3)
    end
  end
  return inside(value, rules, place, root)
end

--- Whether a value is what a schema describes, and what is wrong if not.
---
--- Example: local ok, message = schema.validate({ n = 3 }, { type = "object", properties = { n = { type = "integer" } } })
---@param value any as std.json.decode gives it
---@param rules table|boolean a schema
---@return boolean ok
---@return string? message with the place, the value itself being `$`
function schema.validate(value, rules)
  if type(rules) ~= "table" and type(rules) ~= "boolean" then
    error(("std.schema.validate: `rules` should be a schema, got %s"):format(type(rules)), 2)
  end
  local message = validate(value, rules, "$", rules, 0)
  return message == nil, message
end

return schema
