--- Where the answer stands in a text that a model wrote, and what number it is.
---
---     answers.final "so x = 3. The answer is \\boxed{3/4}."  --> "3/4", "boxed"
---     answers.number "1,250.50 km"                           --> 1250.5, "km"
---
--- Nothing here is a reward: `std.rewards` compares what is found.

local answers = {}

-- UTF-8 that means the same as ASCII: minus signs and dashes, quotes, spaces, times.
local PLAIN = {
  ["\u{2212}"] = "-", ["\u{2010}"] = "-", ["\u{2011}"] = "-", ["\u{2012}"] = "-", ["\u{2013}"] = "-", ["\u{FE63}"] = "-",
  ["\u{FF0D}"] = "-",
  ["\u{2018}"] = "'", ["\u{2019}"] = "'", ["\u{201C}"] = '"', ["\u{201D}"] = '"',
  ["\u{A0}"] = " ", ["\u{2009}"] = " ", ["\u{202F}"] = " ", ["\u{3000}"] = " ", ["\u{D7}"] = "\\times ", ["\u{22C5}"] = "\\times ",
}

--- The text in round or curly brackets without them.
local function inside(group) return group:sub(2, -2) end

local function plain(text) return (text:gsub("[\xC2-\xF4][\x80-\xBF]+", PLAIN)) end

local function trim(text) return (text:gsub("^%s+", ""):gsub("%s+$", "")) end

--- LaTeX without the commands that only say in what letters something is set.
local function without_fonts(text)
  for _, command in ipairs { "text", "textbf", "textit", "mathrm", "mathbf", "mbox" } do text = text:gsub("\\" .. command .. "%s*(%b{})", inside) end
  return text
end

--- A text without the differences that do not matter: case, space, dollar signs and other marks of LaTeX, quotes around it, a full
--- stop at its end. Minus signs of all kinds are one.
---
--- Example: assert(answers.normalize " $\\text{Paris}$. " == "paris")
---@param text string
---@return string text
function answers.normalize(text)
  text = without_fonts(plain(text)):gsub("\\left%s*([%(%[|{.])", "%1"):gsub("\\right%s*([%)%]|}.])", "%1")
  text = text:gsub("\\[dt]frac", "\\frac"):gsub("\\[,!;: ]", ""):gsub("\\%$", ""):gsub("%$", ""):gsub("%*%*", "")
  text = trim(text:lower():gsub("%s+", " "))
  text = text:gsub("[%.,;:!]+$", "")
  text = text:gsub('^"(.*)"$', "%1"):gsub("^'(.*)'$", "%1")
  return trim(text)
end

--- What stands in the last `\boxed{...}` (or `\fbox{...}`) of a text, its braces matched; nil if there is none that ends.
---
--- Example: assert(answers.boxed "\\boxed{1} or rather \\boxed{\\frac{1}{2}}" == "\\frac{1}{2}")
---@param text string
---@return string? content
function answers.boxed(text)
  -- Braces are matched in one pass: a text may open thousands and close none.
  local closes, open = {}, {}
  for at in text:gmatch "()[{}]" do
    if text:sub(at, at) == "{" then
      open[#open + 1] = at
    elseif #open > 0 then
      closes[table.remove(open)] = at
    end
  end
  local last, content = 0, nil
  for _, pattern in ipairs { "\\boxed%s*(){", "\\fbox%s*(){" } do
    for at in text:gmatch(pattern) do
      if closes[at] and at > last then last, content = at, trim(text:sub(at + 1, closes[at] - 1)) end
    end
  end
  return content
end

--- What stands in the last `<name>...</name>`; nil if there is none that ends.
---
--- Example: assert(answers.tagged("<answer>7</answer>", "answer") == "7")
---@param text string
---@param name string
---@return string? content
function answers.tagged(text, name)
  local open, close, found = "<" .. name .. ">", "</" .. name .. ">", nil
  local from = 1
  while true do
    local start, stop = text:find(open, from, true)
    if not start then return found and trim(found) end
    local ending = text:find(close, stop + 1, true)
    if not ending then return found and trim(found) end
    -- An opening inside is the one that counts.
    local content = text:sub(stop + 1, ending - 1)
    found = content:match("^.*" .. open:gsub("%p", "%%%0") .. "(.*)") or content
    from = ending + #close
  end
end

local MARKS = { "answer%s+is", "answer%s*%*-%s*:", "answer%s*%*-%s*=" }

--- What follows the last "answer is" or "Answer:", to the end of its line or sentence.
local function announced(text)
  local lower, last = text:lower(), nil
  for _, mark in ipairs(MARKS) do
    local from = 1
    while true do
      local start, stop = lower:find(mark, from)
      if not start then break end
      if not last or stop > last then last = stop end
      from = stop + 1
    end
  end
  if not last then return nil end
  local rest = text:sub(last + 1):match "^[%s:*]*([^\n]*)"
  -- A full stop ends it, the point of a number does not.
  return trim((rest:gsub("%.%s.*$", ""):gsub("%*+", ""):gsub("%.$", "")))
end

--- The answer that a text comes to: in order of trust, the last `<answer>`, the last box, what follows the last `####`, what follows
--- the last "answer is" or "Answer:". Nil if nothing of these stands there.
---
--- Example: local answer, how = answers.final "6 * 7 = 42\n#### 42"
---@param text string
---@return string? answer
---@return "tag"|"boxed"|"hashes"|"announced"|nil how
function answers.final(text)
  local tag = answers.tagged(text, "answer")
  if tag then return answers.boxed(tag) or tag, "tag" end
  local box = answers.boxed(text)
  if box then return box, "boxed" end
  local hashes = text:match "^.*####[ \t]*([^\n]*)"
  if hashes then return trim(hashes), "hashes" end
  local rest = announced(text)
  if rest and rest ~= "" then return rest, "announced" end
  return nil, nil
end

local SIGN = "^([-+]?)%s*"
-- Currencies may stand in front.
local CURRENCIES = { "%$", "\u{20AC}", "\u{A3}", "\u{A5}" }

--- An unsigned decimal at the beginning of a text, thousands separated by commas or spaces or not at all: number, rest.
local function decimal(text)
  local digits, rest
  for _, separator in ipairs { ",", " " } do
    local grouped = text:match("^%d%d?%d?" .. separator .. "%d%d%d")
    if grouped then
      local stop = #grouped
      while text:find("^" .. separator .. "%d%d%d", stop + 1) do stop = stop + 4 end
      -- "1,2345" has no thousands.
      if not text:find("^%d", stop + 1) then
        digits, rest = text:sub(1, stop):gsub(separator, ""), text:sub(stop + 1)
        break
      end
    end
  end
  if not digits then
    digits, rest = text:match "^(%d+)(.*)$"
    if not digits then digits, rest = "0", text:match "^(%.%d.*)$" end
    if not rest then return nil end
  end
  local fraction = rest:match "^%.%d+"
  if fraction then digits, rest = digits .. fraction, rest:sub(#fraction + 1) end
  local exponent = rest:match "^[eE][-+]?%d+"
  if exponent then digits, rest = digits .. exponent, rest:sub(#exponent + 1) end
  return tonumber(digits) + 0.0, rest
end

--- `\frac{a}{b}` and its short forms at the beginning: number, rest.
local function latex_fraction(text)
  local rest = text:match "^\\[dt]?frac%s*(.*)$"
  if not rest then return nil end
  local parts = {}
  for index = 1, 2 do
    local group = rest:match "^%b{}"
    local part = group and group:sub(2, -2) or rest:match "^%d"
    if not part then return nil end
    rest = trim(rest:sub((group and #group or 1) + 1))
    parts[index] = answers.number(part)
    if not parts[index] then return nil end
  end
  if parts[2] == 0 then return nil end
  return parts[1] / parts[2], rest
end

--- Powers of ten behind a number, or alone: `\times 10^{3}`, `* 10^3`, `10^3`; factor, rest.
local function power(text)
  local rest = text:match "^%s*\\times%s*10%s*%^(.*)$" or text:match "^%s*\\cdot%s*10%s*%^(.*)$" or text:match "^%s*%*%s*10%s*%^(.*)$" or text:match "^%s*x%s*10%s*%^(.*)$"
  if not rest then return 1, text end
  local group = rest:match "^%b{}" or rest:match "^[-+]?%d+"
  local exponent = group and math.tointeger(tonumber((group:gsub("[{}%s]", ""))))
  if not exponent then return 1, text end
  return 10.0 ^ exponent, rest:sub(#group + 1)
end

--- A number at the beginning of a text, without its sign: number, rest.
local function unsigned(text)
  local value, rest = latex_fraction(text)
  if value then return value, rest end
  local exponent = text:match "^10%s*%^(.*)$"
  if exponent then
    local factor, behind = power("*" .. text)
    if behind ~= "*" .. text then return factor, behind end
  end
  value, rest = decimal(text)
  if not value then return nil end
  -- A mixed number: 1 1/2, 1\frac{1}{2}.
  local mixed = rest:match "^%s*\\[dt]?frac" and latex_fraction(trim(rest))
  if mixed then
    local _, behind = latex_fraction(trim(rest))
    return value + mixed, behind
  end
  local top, bottom, behind = rest:match "^%s+(%d+)%s*/%s*(%d+)(.*)$"
  if top and tonumber(bottom) ~= 0 then return value + tonumber(top) / tonumber(bottom), behind end
  local below = rest:match "^%s*/%s*(%d.*)$"
  if below then
    local divisor, after = decimal(below)
    if divisor and divisor ~= 0 then return value / divisor, after end
    return nil
  end
  local factor, after = power(rest)
  return value * factor, after
end

--- The number that all of a text is, but for a currency in front and a unit behind: integers and decimals with thousands separated,
--- scientific notation, fractions, mixed numbers, percents, LaTeX. Nil if it is none, or none that is finite.
---
--- `50%` is 0.5 with the unit `%`. Zero is 0, whatever its sign.
---
--- Example: assert(answers.number "\\frac{3}{4}" == 0.75)
---@param text string
---@return number? value
---@return string? unit what stands behind it, or the currency; nil if nothing does
function answers.number(text)
  text = plain(text):gsub("\\text%s*(%b{})", function(group) return " " .. group:sub(2, -2) end)
  text = text:gsub("\\mathrm%s*(%b{})", function(group) return " " .. group:sub(2, -2) end)
  text = text:gsub("\\[%(%)%[%]]", ""):gsub("\\[,;: ]", " "):gsub("\\!", ""):gsub("{,}", ","):gsub("\\%%", "%%"):gsub("\\%$", "$")
  text = trim(text:gsub("^%s*%$(.*)%$%s*$", "%1"):gsub("\\left", ""):gsub("\\right", ""):gsub("%^{%s*\\circ%s*}", " degrees"):gsub("%^?\\circ", " degrees"):gsub("%^{}", ""))
  text = text:gsub("%.$", "")
  local unit
  local sign, rest = text:match(SIGN .. "(.*)$")
  for _, mark in ipairs(CURRENCIES) do
    local behind = rest:match("^" .. mark .. "%s*(.*)$")
    if behind then
      unit = rest:sub(1, #rest - #behind):gsub("%s", "")
      -- The sign may stand on either side.
      local inner, after = behind:match(SIGN .. "(.*)$")
      sign, rest = sign .. inner, after
      break
    end
  end
  if #sign > 1 then return nil end
  local value, behind = unsigned(rest)
  if not value or value ~= value or value == math.huge then return nil end
  behind = trim(behind)
  if behind:find "^%%" or behind:lower():find "^percent" then
    value, unit = value / 100, "%"
    behind = trim((behind:gsub("^%%", ""):gsub("^[Pp]er[Cc]ent", "")))
    if behind ~= "" then return nil end
  elseif behind ~= "" then
    -- A unit is a word or a few, with powers and slashes; anything that counts, or a sentence, is none.
    local word = behind:gsub("%^{?%d}?", "")
    if word:find "[%d=<>+*\\{}]" or select(2, word:gsub("%s", "")) > 3 or not word:find "^[%a\xC2-\xF4(/\"'%-]" then return nil end
    unit = unit or trim(behind):lower():gsub("%s+", " ")
  end
  if value == 0 then return 0.0, unit end
  return sign == "-" and -value or value, unit
end

--- The last number that stands in a text: value, where it begins. Signs count where they cannot be the minus of a subtraction.
---
--- Example: assert(answers.last_number "3 apples and 4 pears make 7 pieces." == 7)
---@param text string
---@return number? value
---@return integer? at in the text with its minus signs made plain
function answers.last_number(text)
  text = plain(text):gsub("\\[%(%)%[%]]", " "):gsub("{,}", ","):gsub("\\%%", "%%"):gsub("\\times%s*10", "*10"):gsub("\\cdot%s*10", "*10")
  local from, value, at = 1, nil, nil
  while true do
    local start = text:find("[%d\\]", from)
    if not start then return value, at end
    if text:sub(start, start) == "\\" and not text:find("^\\[dt]?frac", start) then
      from = start + 1
    elseif text:sub(start - 1, start - 1):find "[%a_]" and start > 1 then
      -- A digit inside a word: x2, H2O.
      from = text:find("[^%w_.]", start) or #text + 1
    else
      if text:sub(start - 1, start - 1) == "." and not text:sub(start - 2, start - 2):find "%d" and start > 1 then start = start - 1 end
      local found, rest = unsigned(text:sub(start))
      if found then
        -- What a sign is told by stands near: to look further back for each number would take a long text's time squared.
        local first = math.max(start - 32, 1)
        local before = text:sub(first, start - 1)
        -- Right before the number and behind nothing that could be subtracted from, or where a value must begin.
        local negative = (before:find "%-%$?$" and not before:find "[%w%)%]}]%-%$?$") or before:find "[=(,:]%s*%-%s+$" or (first == 1 and before:find "^%s*%-%s+$")
        if rest:find "^%s?%%" then found = found / 100 end
        if found == found and found ~= math.huge then value, at = (negative and found ~= 0) and -found or found, start end
        from = #text - #rest + 1
        if from <= start then from = start + 1 end
      else
        from = start + 1
      end
    end
  end
end

--- The letter of the choice that a text comes to, upper case: in its final answer, or else the last that stands alone.
---
--- Example: assert(answers.letter("The answer is (b).", 4) == "B")
---@param text string
---@param count integer how many choices there are: A, B, C ...
---@return string? letter
function answers.letter(text, count)
  local last = string.char(64 + count)
  local upper, any = "[A-" .. last .. "]", "[A-" .. last .. "a-" .. last:lower() .. "]"
  local function leading(piece)
    piece = trim((without_fonts(piece):gsub("[%*%$]", "")))
    -- The article is no choice.
    if piece:find "^[AI]%s+%l" then return nil end
    local letter = piece:match("^%((" .. any .. ")%)") or piece:match("^(" .. any .. ")$") or piece:match("^(" .. any .. ")[%.%):]")
    letter = letter or piece:match("^(" .. upper .. ")%f[%W]")
    letter = letter or piece:match("^[Oo]ption%s+%(?(" .. any .. ")%f[%W]") or piece:match("^[Cc]hoice%s+%(?(" .. any .. ")%f[%W]")
    return letter and letter:upper()
  end
  local final = answers.final(text)
  local letter = leading(final or text)
  if letter or final then return letter end
  local found
  for before, candidate, after in text:gmatch("()%f[%w](" .. upper .. ")%f[%W]()") do
    -- "A cat", "I think": words, no choices; "Vitamin A" at the end of a sentence is one, which only a mark would prevent.
    local follows = text:sub(after)
    local is_word = (candidate == "A" or candidate == "I") and follows:find "^%s+%l" and text:sub(before - 1, before - 1) ~= "("
    if not is_word then found = candidate end
  end
  return found
end

--- The program in a text: the last block fenced by ``` (in `language`, if blocks name theirs), or the whole text if there is none.
---
--- Example: local program = answers.code("```lua\nreturn 1\n```", "lua")
---@param text string
---@param language? string
---@return string program
function answers.code(text, language)
  local any, named
  for name, body in ("\n" .. text .. "\n"):gmatch "\n```([%w_+-]*)[^\n]*\n(.-)\n?```" do
    any = body
    if name:lower() == language or (language == "python" and name:lower() == "py") then named = body end
  end
  if named or any then return named or any end
  -- A block that the end of the text cut off.
  return text:match "^%s*```[%w_+-]*[^\n]*\n(.*)$" or text
end

--- The calls of tools in a text: the JSON of each `<tool_call>...</tool_call>`. A call that is no JSON of a name and arguments is
--- counted as broken.
---
--- Example: local calls = answers.tool_calls '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
---@param text string
---@return { name: string, arguments: table }[] calls
---@return integer broken
function answers.tool_calls(text)
  local json = require "std.json"
  local calls, broken, opened = {}, 0, select(2, text:gsub("<tool_call>", ""))
  for body in text:gmatch "<tool_call>(.-)</tool_call>" do
    opened = opened - 1
    local call = json.decode(body)
    local is_call = type(call) == "table" and type(call.name) == "string" and type(call.arguments) == "table"
    if is_call and not json.is_array(call.arguments) then
      calls[#calls + 1] = { name = call.name, arguments = call.arguments }
    else
      broken = broken + 1
    end
  end
  return calls, broken + math.max(opened, 0)
end

return answers
