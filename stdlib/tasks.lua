--- Problems made from a seed, which a model of a million parameters learns within minutes: sums in digits and in words, sorting, and
--- products that take a calculator. With them everything that the stages of training read: plain text, conversations, preference
--- pairs, prompts with right answers.
---
---     tasks.write("sft.jsonl", tasks.conversations { count = 4000, seed = 1 })
---     local held_out = tasks.problems { count = 200, seed = 2, split = "test" }
---
--- Whether a problem is held out depends on the problem alone: no training text, whatever its seed, holds one of the test split, nor the
--- same numbers the other way round. The same options give the same records.
---
--- An answer is given at once (`Answer: 132`) or worked out first, digit by digit. A small model gets far more of the second kind right,
--- so a model that was taught both, `steps` being the share of the second, has something to find out by itself.

local json, tales = require "std.json", require "std.tales"

local tasks = {}

---@class std.TaskOptions
---@field count integer
---@field seed? integer default 1
---@field split? "train"|"test" default train; problems of the test split are all different
---@field kinds? string[] of sum, words, sort, tool; default all
---@field digits? integer of the numbers in sums, default 2; products have one more
---@field operations? string[] of + and -, default both
---@field items? integer[] fewest and most numbers to sort, default { 3, 5 }
---@field system? string the system turn, default empty: the tokenizer's own is longer than most problems
---@field tools? boolean put the calculator's description into records, default false: it is longer still

---@class std.Problem
---@field kind "sum"|"words"|"sort"|"tool"
---@field prompt string what the user asks
---@field messages { role: string, content: string }[] the same as a conversation
---@field answer string
---@field tool_calls? { name: string, arguments: table }[] what the assistant should call
---@field tools? table[] descriptions of tools, as the chat template takes them

local KINDS = { "sum", "words", "sort", "tool" }
-- One problem of ten is held out.
local HELD_OUT = 10
-- Draws without a problem of the split that was not there before.
local DRAWS_MAX = 20000

local COMMON = { "count", "seed", "split", "kinds", "digits", "operations", "items", "system", "tools" }

local function fail(name, argument, expected, got)
  error(("std.tasks.%s: `%s` should be %s, got %s"):format(name, argument, expected, tostring(got)), 4)
end

local function integer_in(name, options, key, default, low, high)
  local value = options[key] == nil and default or options[key]
  if math.type(value) ~= "integer" or value < low or value > high then
    error(("std.tasks.%s: `%s` should be an integer from %d to %d, got %s"):format(name, key, low, high, tostring(value)), 4)
  end
  return value
end

local function share(name, options, key, default)
  local value = options[key] == nil and default or options[key]
  if type(value) ~= "number" or not (value >= 0 and value <= 1) then fail(name, key, "a share from 0 to 1", value) end
  return value
end

local function choices(name, options, key, known)
  local list = options[key] or known
  if type(list) ~= "table" or #list == 0 then fail(name, key, "a list of " .. table.concat(known, ", "), list) end
  for _, entry in ipairs(list) do
    local found = false
    for _, name_known in ipairs(known) do found = found or name_known == entry end
    if not found then fail(name, key, "a list of " .. table.concat(known, ", "), entry) end
  end
  return list
end

--- Options as checked settings; `more` are names of options that only this function knows.
local function settings_of(name, options, more)
  if type(options) ~= "table" then fail(name, "options", "a table with a count", type(options)) end
  for key in pairs(options) do
    local found = false
    for _, list in ipairs { COMMON, more or {} } do
      for _, known in ipairs(list) do found = found or known == key end
    end
    if not found then
      local list = table.concat(COMMON, ", ") .. (more and ", " .. table.concat(more, ", ") or "")
      error(("std.tasks.%s: option should be one of %s, got `%s`"):format(name, list, tostring(key)), 3)
    end
  end
  if options.split ~= nil and options.split ~= "train" and options.split ~= "test" then
    fail(name, "split", "train or test", options.split)
  end
  local items = options.items or { 3, 5 }
  local fewest, most = 0, 0
  if type(items) == "table" and math.type(items[1]) == "integer" and math.type(items[2]) == "integer" then fewest, most = items[1], items[2] end
  if fewest < 2 or most < fewest or most > 20 then
    fail(name, "items", "fewest and most numbers, from 2 to 20, as { 3, 5 }", type(items) == "table" and json.encode(items) or items)
  end
  return {
    name = name,
    count = integer_in(name, options, "count", nil, 1, 10000000),
    seed = integer_in(name, options, "seed", 1, math.mininteger, math.maxinteger),
    split = options.split or "train",
    kinds = choices(name, options, "kinds", KINDS),
    digits = integer_in(name, options, "digits", 2, 1, 8),
    operations = choices(name, options, "operations", { "+", "-" }),
    items = items,
    system = options.system or "",
    tools = options.tools or false,
  }
end

--- Random numbers of their own, SplitMix64: records must not depend on what else a script draws.
local function generator(seed)
  local state = seed
  local function bits()
    state = state + 0x9E3779B97F4A7C15
    local z = state
    z = (z ~ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ~ (z >> 27)) * 0x94D049BB133111EB
    return z ~ (z >> 31)
  end
  local draw = {}
  function draw.integer(low, high) return low + (bits() >> 33) % (high - low + 1) end
  function draw.pick(list) return list[draw.integer(1, #list)] end
  function draw.chance(probability) return draw.integer(0, 999999) < probability * 1000000 end
  return draw
end

--- Whether the problem that `id` names is held out. FNV-1a, whose last bits are mixed once more.
local function is_held_out(id)
  local hash = 0xCBF29CE484222325
  for index = 1, #id do hash = (hash ~ id:byte(index)) * 0x100000001B3 end
  hash = (hash ~ (hash >> 32)) * 0x9E3779B97F4A7C15
  return ((hash >> 40) % HELD_OUT) == 0
end

local ONES = {
  [0] = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
  "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
}
local TENS = {
  [2] = "twenty", [3] = "thirty", [4] = "forty", [5] = "fifty", [6] = "sixty", [7] = "seventy", [8] = "eighty", [9] = "ninety",
}

--- A whole number from 0 to 999 in words.
---
--- Example: assert(tasks.in_words(142) == "one hundred forty-two")
---@param number integer
---@return string words
function tasks.in_words(number)
  if math.type(number) ~= "integer" or number < 0 or number > 999 then
    error(("std.tasks.in_words: `number` should be an integer from 0 to 999, got %s"):format(tostring(number)), 2)
  end
  if number < 20 then return ONES[number] end
  if number < 100 then return TENS[number // 10] .. (number % 10 > 0 and "-" .. ONES[number % 10] or "") end
  return ONES[number // 100] .. " hundred" .. (number % 100 > 0 and " " .. tasks.in_words(number % 100) or "")
end

--- Digit by digit from the right, as in school: `47 + 85` is `7+5=12, 4+8+1=13`. `carries` false forgets them, a mistake of beginners.
--- The steps, and what they come to.
local function columns(a, b, operation, carries)
  local parts, carry, sum, place = {}, 0, 0, 1
  local x, y = a, b
  repeat
    local top, bottom = x % 10, y % 10
    local value
    if operation == "+" then
      value = top + bottom + carry
      parts[#parts + 1] = ("%d+%d%s=%d"):format(top, bottom, carry > 0 and "+1" or "", value)
      sum, carry = sum + value % 10 * place, carries and value // 10 or 0
    else
      -- A one is taken from the next column where the difference would be negative.
      local borrow = top - bottom - carry < 0 and 1 or 0
      value = top + 10 * borrow - bottom - carry
      parts[#parts + 1] = ("%d-%d%s=%d"):format(top + 10 * borrow, bottom, carry > 0 and "-1" or "", value)
      sum, carry = sum + value * place, carries and borrow or 0
    end
    x, y, place = x // 10, y // 10, place * 10
  until x == 0 and y == 0
  return table.concat(parts, ", "), sum + (operation == "+" and carry * place or 0)
end

--- Two numbers and a sign; differences are not negative.
local function operands(draw, digits, operations)
  local high = 10 ^ digits // 1 | 0
  local a, b, operation = draw.integer(0, high - 1), draw.integer(0, high - 1), draw.pick(operations)
  if operation == "-" and a < b then a, b = b, a end
  return a, b, operation
end

--- What names a pair: sums and products are the same either way round.
local function id_of(kind, a, b, operation)
  if operation ~= "-" and a > b then a, b = b, a end
  return ("%s %d %s %d"):format(kind, a, operation, b)
end

local SIGN_WORDS = { ["+"] = "plus", ["-"] = "minus", ["*"] = "times" }

--- A wrong number near the right one: carries forgotten, one or ten off, two digits exchanged.
local function wrong_number(draw, right, forgotten)
  local text = tostring(right)
  local candidates = { right + 1, right - 1, right + 10, right - 10 }
  if forgotten and forgotten ~= right then
    candidates[5], candidates[6] = forgotten, forgotten
  end
  if #text > 1 then candidates[#candidates + 1] = math.tointeger(text:sub(1, -3) .. text:sub(-1) .. text:sub(-2, -2)) end
  local value
  repeat value = draw.pick(candidates) until value ~= right and value >= 0
  return value
end

-- By kind: a problem with `id`, `prompt`, `answer`, `work` (the steps), `fact` (for plain text) and `mistake`, a function that gives a
-- wrong answer and the steps to it.
local MAKERS = {}

MAKERS.sum = function(draw, settings)
  local a, b, operation = operands(draw, settings.digits, settings.operations)
  local work, right = columns(a, b, operation, true)
  local question = ("%d %s %d"):format(a, operation, b)
  return {
    id = id_of("sum", a, b, operation), prompt = draw.pick { "What is %s?", "Compute %s.", "%s = ?" }:format(question),
    answer = tostring(right), work = work, fact = ("%s = %d: %s."):format(question, right, work),
    mistake = function(draw_mistake)
      local work_forgotten, forgotten = columns(a, b, operation, false)
      local value = wrong_number(draw_mistake, right, forgotten)
      return tostring(value), value == forgotten and work_forgotten or work
    end,
  }
end

MAKERS.words = function(draw, settings)
  local a, b, operation = operands(draw, math.min(settings.digits, 2), settings.operations)
  local steps, right = columns(a, b, operation, true)
  local question = ("%s %s %s"):format(tasks.in_words(a), SIGN_WORDS[operation], tasks.in_words(b))
  local work = ("%d %s %d: %s = %d"):format(a, operation, b, steps, right)
  return {
    id = id_of("words", a, b, operation), prompt = draw.pick { "What is %s?", "How much is %s?" }:format(question),
    answer = tasks.in_words(right), work = work, fact = ("%s is %s: %s."):format(question, tasks.in_words(right), work),
    mistake = function(draw_mistake)
      local steps_forgotten, forgotten = columns(a, b, operation, false)
      local value = wrong_number(draw_mistake, right, forgotten)
      return tasks.in_words(value), ("%d %s %d: %s = %d"):format(a, operation, b, value == forgotten and steps_forgotten or steps, value)
    end,
  }
end

--- The least of what is left, again and again.
local function selection(numbers)
  local left, parts = table.move(numbers, 1, #numbers, 1, {}), {}
  while #left > 1 do
    local least = 1
    for index = 2, #left do
      if left[index] < left[least] then least = index end
    end
    parts[#parts + 1] = ("%s: %d"):format(table.concat(left, " "), left[least])
    table.remove(left, least)
  end
  return table.concat(parts, "; ")
end

MAKERS.sort = function(draw, settings)
  local numbers, taken = {}, {}
  local count, high = draw.integer(settings.items[1], settings.items[2]), math.max(10 ^ math.min(settings.digits, 3) // 1 | 0, 25)
  while #numbers < count do
    local value = draw.integer(0, high - 1)
    if not taken[value] then taken[value], numbers[#numbers + 1] = true, value end
  end
  local sorted = table.move(numbers, 1, count, 1, {})
  table.sort(sorted)
  local listed, answer, work = table.concat(numbers, ", "), table.concat(sorted, ", "), selection(numbers)
  return {
    id = "sort " .. table.concat(sorted, " "), prompt = draw.pick { "Sort %s.", "Put in order: %s." }:format(listed), answer = answer,
    work = work, fact = ("%s in order: %s."):format(listed, answer),
    mistake = function(draw_mistake)
      local list, at = table.move(sorted, 1, count, 1, {}), draw_mistake.integer(1, count - 1)
      list[at], list[at + 1] = list[at + 1], list[at]
      return table.concat(list, ", "), work
    end,
  }
end

MAKERS.tool = function(draw, settings)
  local digits = settings.digits
  local low, high = 10 ^ digits // 1 | 0, (10 ^ (digits + 1) // 1 | 0) - 1
  local a, b = draw.integer(low, high), draw.integer(2, 99)
  local function call(left, operation, right)
    return { { name = "calculator", arguments = { expression = ("%d %s %d"):format(left, operation, right) } } }
  end
  return {
    id = id_of("tool", a, b, "*"),
    prompt = draw.pick { "What is %d * %d? Use the calculator.", "Use the calculator: %d * %d." }:format(a, b),
    answer = tostring(a * b), tool_calls = call(a, "*", b), fact = ("%d * %d takes a calculator, which says %d."):format(a, b, a * b),
    mistake = function(draw_mistake)
      local swap = draw_mistake.integer(1, 3)
      if swap == 1 then return tostring(wrong_number(draw_mistake, a * b)) end
      if swap == 2 then return nil, nil, call(a, "+", b) end
      return nil, nil, call(wrong_number(draw_mistake, a), "*", b)
    end,
  }
end

--- The description of the calculator, as chat templates take tools.
---
--- Example: local text = policy.tokenizer:chat(messages)
---@return table tool
function tasks.calculator_tool()
  return {
    type = "function",
    ["function"] = {
      name = "calculator", description = "Computes an expression.",
      parameters = { type = "object", properties = { expression = { type = "string" } }, required = { "expression" } },
    },
  }
end

--- What the calculator answers: + - * / and brackets over integers and decimals; whole results without a point. Nil and what is wrong
--- if it is no expression.
---
--- Example: assert(tasks.calculator "348 * 27" == "9396")
---@param expression string
---@return string? result
---@return string? message
function tasks.calculator(expression)
  local at, depth = 1, 0
  local sum
  local function token()
    at = expression:find("%S", at) or #expression + 1
    return expression:sub(at, at)
  end
  local function atom()
    local c = token()
    if c == "-" then
      at, depth = at + 1, depth + 1
      if depth > 50 then error("too many signs and brackets", 0) end
      local value = -atom()
      depth = depth - 1
      return value
    elseif c == "(" then
      at, depth = at + 1, depth + 1
      if depth > 50 then error("too many signs and brackets", 0) end
      local value = sum()
      if token() ~= ")" then error("`)` is missing", 0) end
      at, depth = at + 1, depth - 1
      return value
    end
    local digits = expression:match("^%d+%.?%d*", at)
    if not digits then error(("a number is missing at %d"):format(at), 0) end
    at = at + #digits
    return math.tointeger(digits) or tonumber(digits) + 0.0
  end
  local function product()
    local value = atom()
    while true do
      local c = token()
      if c ~= "*" and c ~= "/" then return value end
      at = at + 1
      local right = atom()
      if c == "*" then
        value = value * right
      elseif right == 0 then
        error("division by zero", 0)
      else
        value = math.type(value) == "integer" and math.type(right) == "integer" and value % right == 0 and value // right or value / right
      end
    end
  end
  function sum()
    local value = product()
    while true do
      local c = token()
      if c ~= "+" and c ~= "-" then return value end
      at = at + 1
      local right = product()
      value = c == "+" and value + right or value - right
    end
  end
  local ok, value = pcall(sum)
  if not ok then return nil, tostring(value) end
  if token() ~= "" then return nil, ("nothing is known of %q"):format(expression:sub(at)) end
  if value ~= value or value == math.huge or value == -math.huge then return nil, "no finite number" end
  return math.tointeger(value) and ("%d"):format(value) or ("%.10g"):format(value)
end

--- Draws problems until `settings.count` of the split are there; each goes to `use`, with the generator.
local function each_problem(settings, use)
  local draw, wants_test, seen, made = generator(settings.seed), settings.split == "test", {}, {}
  local misses = 0
  while #made < settings.count do
    local kind = draw.pick(settings.kinds)
    local problem = MAKERS[kind](draw, settings)
    problem.kind = kind
    local fits = is_held_out(problem.id) == wants_test and not (wants_test and seen[problem.id])
    if fits then
      seen[problem.id], misses = true, 0
      made[#made + 1] = use(problem, draw)
    else
      misses = misses + 1
      if misses > DRAWS_MAX then
        error(("std.tasks.%s: there are only %d problems of the %s split at this difficulty, and `count` asks for %d"):format(
          settings.name, #made, settings.split, settings.count), 3)
      end
    end
  end
  return made
end

--- What all records about a problem share.
local function base_record(problem, settings)
  return {
    kind = problem.kind, prompt = problem.prompt, answer = problem.answer, tool_calls = problem.tool_calls,
    tools = settings.tools and problem.tool_calls and { tasks.calculator_tool() } or nil,
    messages = { { role = "system", content = settings.system }, { role = "user", content = problem.prompt } },
  }
end

--- An answer as the assistant writes it, with the steps in front if there are any.
local function reply(answer, work) return (work and work .. "\n" or "") .. "Answer: " .. answer end

--- A call as the assistant writes it, byte for byte as chat templates render one.
local function call_text(calls)
  local call = calls[1]
  return ('<tool_call>\n{"name": %s, "arguments": %s}\n</tool_call>'):format(json.encode(call.name), json.encode(call.arguments))
end

--- Problems with their right answers: prompts for reinforcement learning, and for evaluation in the test split.
---
--- Example: local prompts = tasks.problems { count = 512, kinds = { "sum" }, digits = 2 }
---@param options std.TaskOptions
---@return std.Problem[] problems
function tasks.problems(options)
  local settings = settings_of("problems", options)
  return each_problem(settings, function(problem) return base_record(problem, settings) end)
end

--- Conversations that show right answers, for supervised fine-tuning: records with `messages`. With a tool, the assistant calls it,
--- gets its result and answers.
---
--- Example: tasks.write("sft.jsonl", tasks.conversations { count = 2000, steps = 0.5 })
---@param options std.TaskOptions also steps: the share of answers that are worked out, default 0.5; errors: the share that is wrong, default 0
---@return { messages: table[], kind: string, tools?: table[] }[] conversations
function tasks.conversations(options)
  local settings = settings_of("conversations", options, { "steps", "errors" })
  local steps, errors = share("conversations", options, "steps", 0.5), share("conversations", options, "errors", 0)
  return each_problem(settings, function(problem, draw)
    local record = base_record(problem, settings)
    local messages, worked, wrong = record.messages, draw.chance(steps), draw.chance(errors)
    if problem.tool_calls then
      local answer = wrong and tostring(wrong_number(draw, math.tointeger(problem.answer))) or problem.answer
      messages[3] = { role = "assistant", content = "", tool_calls = problem.tool_calls }
      messages[4] = { role = "tool", content = problem.answer }
      messages[5] = { role = "assistant", content = reply(answer) }
    else
      local answer, work = problem.answer, problem.work
      if wrong then answer, work = problem.mistake(draw) end
      messages[3] = { role = "assistant", content = reply(answer, worked and work or nil) }
    end
    return { messages = messages, kind = record.kind, tools = record.tools }
  end)
end

--- Preference pairs: a right answer and one that is wrong as beginners are, in the same form: carries forgotten, one off, two numbers
--- exchanged, the wrong call or none. Records with `messages`, `chosen` and `rejected`.
---
--- Example: tasks.write("pairs.jsonl", tasks.pairs { count = 1000, steps = 1 })
---@param options std.TaskOptions also steps: the share of answers that are worked out, default 0.5
---@return { messages: table[], prompt: string, chosen: string, rejected: string, kind: string, answer: string, tools?: table[] }[] pairs
function tasks.pairs(options)
  local settings = settings_of("pairs", options, { "steps" })
  local steps = share("pairs", options, "steps", 0.5)
  return each_problem(settings, function(problem, draw)
    local record = base_record(problem, settings)
    local answer, work, calls = problem.mistake(draw)
    if problem.tool_calls then
      record.chosen, record.rejected = call_text(problem.tool_calls), calls and call_text(calls) or reply(answer)
    else
      local worked = draw.chance(steps)
      record.chosen, record.rejected = reply(problem.answer, worked and problem.work or nil), reply(answer, worked and work or nil)
    end
    record.tool_calls = nil
    return record
  end)
end

--- Plain text for pretraining: documents with an empty line behind each, a share of them tales (std.tales), the others three facts from
--- problems of the training split.
---
--- Example: local text = tasks.text { count = 5000, seed = 1 }
---@param options std.TaskOptions also tales: their share, default 0.5
---@return string text
function tasks.text(options)
  local settings = settings_of("text", options, { "tales" })
  local of_tales = share("text", options, "tales", 0.5)
  if settings.split ~= "train" then fail("text", "split", "train: what is held out is not for training", settings.split) end
  local draw, told, documents = generator(settings.seed ~ 0x5DEECE66D), {}, {}
  for index = 1, settings.count do told[index] = draw.chance(of_tales) end
  local tellings, facts = 0, 0
  for index = 1, settings.count do
    if told[index] then tellings = tellings + 1 else facts = facts + 3 end
  end
  local stories = {}
  if tellings > 0 then
    for story in tales.write({ count = tellings, seed = settings.seed }):gmatch "([^\n]+)\n\n" do stories[#stories + 1] = story end
  end
  settings.count = facts
  local lines = facts > 0 and each_problem(settings, function(problem) return problem.fact end) or {}
  local story, line = 0, 0
  for index = 1, #told do
    if told[index] then
      story = story + 1
      documents[index] = stories[story]
    else
      documents[index] = table.concat(lines, "\n", line + 1, line + 3)
      line = line + 3
    end
  end
  return table.concat(documents, "\n\n") .. "\n\n"
end

--- The reward of a problem: for one that takes a tool, the right call; for others the right answer behind `Answer:`.
---
--- Example: local scores = rewards.score(rollouts, tasks.reward())
---@return std.Reward reward
function tasks.reward()
  local rewards = require "std.rewards"
  local call, answer = rewards.tool_calls(), rewards.exact { marked = true }
  return function(text, record, rollout)
    if record.kind == "tool" then return call(text, record, rollout) end
    return answer(text, record, rollout)
  end
end

--- Writes records as JSON lines, which engine.data.jsonl reads.
---
--- Example: tasks.write(run.folder .. "/prompts.jsonl", tasks.problems { count = 100 })
---@param path string
---@param records table[]
---@return integer count
function tasks.write(path, records)
  local file, message = io.open(path, "w")
  if not file then error(("std.tasks.write: cannot write %s"):format(message), 2) end
  for _, record in ipairs(records) do
    local ok, why = file:write(json.encode(record), "\n")
    if not ok then
      file:close()
      error(("std.tasks.write: cannot write %s: %s"):format(path, why), 2)
    end
  end
  local ok, why = file:close()
  if not ok then error(("std.tasks.write: cannot write %s: %s"):format(path, why), 2) end
  return #records
end

return tasks
