--- JSON in plain Lua: text to values and back. Source: RFC 8259.
---
--- Objects become tables by name, arrays lists; `null` becomes `json.null()`, since a table cannot hold nil. An empty table is written
--- as an object, unless it came from an array or from `json.array`.

local json = {}

-- The metatable says that a table is an array, which an empty one does not show.
local ARRAY = { __name = "JSON array" }
local NULL = setmetatable({}, { __name = "JSON null", __tostring = function() return "null" end })
-- Deeper texts are refused: a model can write a million brackets.
local DEPTH_MAX = 100

local ESCAPES = { ['"'] = '"', ["\\"] = "\\", ["/"] = "/", b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }
local WORDS = { ["true"] = true, ["false"] = false, null = NULL }

local function fail(text, at, what)
  local _, lines = text:sub(1, at - 1):gsub("\n", "")
  error({ message = ("line %d, byte %d: %s"):format(lines + 1, at, what) }, 0)
end

local function skip(text, at) return text:find("[^ \t\r\n]", at) or #text + 1 end

--- Four hexadecimal digits at `at`, as a number.
local function hex(text, at)
  local digits = text:match("^%x%x%x%x", at)
  if not digits then fail(text, at, "\\u needs four hexadecimal digits") end
  return tonumber(digits, 16)
end

local function read_string(text, at)
  local pieces, from = {}, at + 1
  while true do
    local stop = text:find('["\\%c]', from)
    if not stop then fail(text, at, "a string without an end") end
    pieces[#pieces + 1] = text:sub(from, stop - 1)
    local c = text:sub(stop, stop)
    if c == '"' then
      local all = table.concat(pieces)
      if not utf8.len(all) then fail(text, at, "a string that is not UTF-8") end
      return all, stop + 1
    elseif c ~= "\\" then
      if c:byte() == 127 then
        pieces[#pieces + 1], from = c, stop + 1
      else
        fail(text, stop, "a control character in a string")
      end
    else
      local mark = text:sub(stop + 1, stop + 1)
      from = stop + 2
      if ESCAPES[mark] then
        pieces[#pieces + 1] = ESCAPES[mark]
      elseif mark == "u" then
        local code = hex(text, from)
        from = from + 4
        if code >= 0xD800 and code < 0xDC00 and text:sub(from, from + 1) == "\\u" then
          local low = hex(text, from + 2)
          if low >= 0xDC00 and low < 0xE000 then
            code, from = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00), from + 6
          end
        end
        -- Half of a pair stands for nothing.
        if code >= 0xD800 and code < 0xE000 then code = 0xFFFD end
        pieces[#pieces + 1] = utf8.char(code)
      else
        fail(text, stop, "an unknown escape")
      end
    end
  end
end

local read_value

local function read_array(text, at, depth)
  local list, count = setmetatable({}, ARRAY), 0
  at = skip(text, at + 1)
  if text:sub(at, at) == "]" then return list, at + 1 end
  while true do
    count = count + 1
    list[count], at = read_value(text, at, depth)
    at = skip(text, at)
    local c = text:sub(at, at)
    if c == "]" then return list, at + 1 end
    if c ~= "," then fail(text, at, "an array goes on with `,` or `]`") end
    at = skip(text, at + 1)
  end
end

local function read_object(text, at, depth)
  local object = {}
  at = skip(text, at + 1)
  if text:sub(at, at) == "}" then return object, at + 1 end
  while true do
    if text:sub(at, at) ~= '"' then fail(text, at, "a name in quotes is missing") end
    local name
    name, at = read_string(text, at)
    at = skip(text, at)
    if text:sub(at, at) ~= ":" then fail(text, at, "`:` is missing") end
    if object[name] ~= nil then fail(text, at, ("the name %q stands twice"):format(name)) end
    object[name], at = read_value(text, skip(text, at + 1), depth)
    at = skip(text, at)
    local c = text:sub(at, at)
    if c == "}" then return object, at + 1 end
    if c ~= "," then fail(text, at, "an object goes on with `,` or `}`") end
    at = skip(text, at + 1)
  end
end

local function read_number(text, at)
  local whole = text:match("^-?%d+", at)
  if not whole or whole:find "^%-?0%d" then fail(text, at, "no value begins here") end
  local digits = text:match("^%-?%d+%.%d+[eE][-+]?%d+", at) or text:match("^%-?%d+[eE][-+]?%d+", at)
  digits = digits or text:match("^%-?%d+%.%d+", at) or whole
  return math.tointeger(digits) or tonumber(digits), at + #digits
end

read_value = function(text, at, depth)
  if depth > DEPTH_MAX then fail(text, at, ("more than %d brackets in each other"):format(DEPTH_MAX)) end
  local c = text:sub(at, at)
  if c == "{" then return read_object(text, at, depth + 1) end
  if c == "[" then return read_array(text, at, depth + 1) end
  if c == '"' then return read_string(text, at) end
  local word = text:match("^%a+", at)
  if word and WORDS[word] ~= nil then return WORDS[word], at + #word end
  return read_number(text, at)
end

--- The value that a text of JSON holds; nil and what is wrong if it is none.
---
--- Example: local call = json.decode '{"name": "add", "arguments": [1, 2]}'
---@param text string
---@return any value
---@return string? message
function json.decode(text)
  local ok, value, stop = pcall(read_value, text, skip(text, 1), 0)
  if not ok then
    if type(value) == "table" then return nil, value.message end
    error(value, 0)
  end
  local rest = skip(text, stop)
  if rest <= #text then return nil, ("byte %d: something follows the value"):format(rest) end
  return value
end

--- What stands for JSON's null.
---
--- Example: assert(json.decode "null" == json.null())
---@return table null
function json.null() return NULL end

--- Marks a list as an array, which matters for an empty one.
---
--- Example: json.encode { required = json.array {} }
---@param list any[]
---@return any[] list
function json.array(list) return setmetatable(list, ARRAY) end

--- Whether a value is an array of JSON: marked as one, or a table of entries 1 to n.
---
--- Example: assert(json.is_array { 1, 2 } and not json.is_array { a = 1 })
---@param value any
---@return boolean is_array
function json.is_array(value)
  if type(value) ~= "table" or value == NULL then return false end
  if getmetatable(value) == ARRAY then return true end
  return #value > 0
end

local QUOTED = { ['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t" }

local function quote(text)
  local escaped = text:gsub('[%c"\\]', function(c) return QUOTED[c] or ("\\u%04x"):format(c:byte()) end)
  return '"' .. escaped .. '"'
end

local function write(value, depth)
  if depth > DEPTH_MAX then error("std.json.encode: a table that contains itself, or more than 100 tables in each other", 3) end
  local kind = type(value)
  if value == NULL or value == nil then return "null" end
  if kind == "boolean" then return tostring(value) end
  if kind == "string" then return quote(value) end
  if kind == "number" then
    if value ~= value or value == math.huge or value == -math.huge then error("std.json.encode: JSON has no nan and no infinities", 3) end
    return math.type(value) == "integer" and tostring(value) or ("%.17g"):format(value)
  end
  if kind ~= "table" then error("std.json.encode: JSON has no " .. kind, 3) end
  local parts = {}
  if json.is_array(value) then
    for index = 1, #value do parts[index] = write(value[index], depth + 1) end
    return "[" .. table.concat(parts, ", ") .. "]"
  end
  for name, entry in pairs(value) do
    if type(name) ~= "string" then error("std.json.encode: names of an object should be strings, got " .. tostring(name), 3) end
    parts[#parts + 1] = quote(name) .. ": " .. write(entry, depth + 1)
  end
  return "{" .. table.concat(parts, ", ") .. "}"
end

--- A value as one line of JSON; names are sorted, so the same value gives the same text.
---
--- Example: print(json.encode { name = "add", arguments = { 1, 2 } })
---@param value any nil, booleans, numbers, strings, and tables of these
---@return string text
function json.encode(value) return write(value, 0) end

return json
