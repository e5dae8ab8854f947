--- Rewards that can be computed: functions of what a model wrote and of the record that it was asked with.
---
---     local reward = rewards.combine {
---       { rewards.numeric(), name = "correct" },
---       { rewards.format { tags = { "think", "answer" } }, weight = 0.2, name = "format" },
---     }
---     local scores, parts = rewards.score(rollouts, reward)   -- [rollouts], f32, and the means for step:log
---
--- A reward is a function (text, record, rollout) that returns a number. `record` is what the prompt's record holds, the right answer
--- in `answer` above all; `rollout` tells what the text itself does not: `index`, `length` in tokens, `finish`. Your own functions
--- are rewards like these. What comes out of a text, an answer, a number, a call, is found by `std.answers`.

local engine, check = require "engine", require("std.options").check
local answers, json, schema = require "std.answers", require "std.json", require "std.schema"

local rewards = {}

---@alias std.Reward fun(text: string, record: table, rollout: { index: integer, length?: integer, finish?: string }): number

-- Rewards that do better with all texts at once, by function: (texts, records, rollouts) to a list of numbers.
local together = setmetatable({}, { __mode = "k" })
-- Combined rewards, by function: their parts.
local combined = setmetatable({}, { __mode = "k" })

local function wrong(name, argument, expected, got)
  error(("std.rewards.%s: `%s` should be %s, got %s"):format(name, argument, expected, tostring(got)), 3)
end

--- The right answers of a record, as a list.
local function wanted(name, record, field)
  local answer = type(record) == "table" and record[field] or nil
  if answer == nil then
    local fields = {}
    for key in pairs(type(record) == "table" and record or {}) do fields[#fields + 1] = tostring(key) end
    table.sort(fields)
    local has = #fields > 0 and "only " .. table.concat(fields, ", ") or "nothing"
    error(("std.rewards.%s: the record has no `%s` to compare with, %s (the option `field` takes another)"):format(name, field, has), 0)
  end
  if type(answer) ~= "table" then return { answer } end
  if #answer == 0 then
    error(("std.rewards.%s: the record's `%s` should be an answer, or a list with at least one, got an empty one"):format(name, field), 0)
  end
  return answer
end

--- What `exact` compares: a normalised text, without the spaces beside its marks, as in (1, 2).
local function letters(text) return (answers.normalize(text):gsub("%s*(%p)%s*", "%1")) end

--- 1 if the answer in the text is the record's, letter by letter once what does not matter is taken away (std.answers.normalize, and
--- spaces beside marks). A text that marks no answer is the answer as a whole. A list of right answers means any of them.
---
--- Example: local reward = rewards.exact { field = "capital" }
---@param options? { field?: string, marked?: boolean } field: default answer; marked: an answer must be marked, default false
---@return std.Reward reward
function rewards.exact(options)
  options = options or {}
  check("std.rewards.exact", options, { "field", "marked" })
  local field = options.field or "answer"
  return function(text, record)
    local found = answers.final(text)
    if not found and options.marked then return 0 end
    found = letters(found or text)
    for _, answer in ipairs(wanted("exact", record, field)) do
      if found ~= "" and found == letters(tostring(answer)) then return 1 end
    end
    return 0
  end
end

--- Whether a box, which holds the answer alone, has one number in it and nothing that is computed with it: not `(1, 2)`, `1/0`, `\sqrt{4}`.
local function is_one_number(text)
  text = text:gsub("{,}", ",")
  for _ = 1, 2 do text = text:gsub("(%d),(%d%d%d)%f[%D]", "%1%2") end
  if text:find "%d[^%d.]+%d" then return false end
  for _, mark in ipairs { "^", "\\sqrt", "\\pi", "\u{221A}", "\u{3C0}" } do
    if text:find(mark, 1, true) then return false end
  end
  return true
end

--- The number that a text comes to: of its final answer, or else the last one. Number, unit.
local function number_in(text, marked)
  local final, how = answers.final(text)
  if final then
    local value, unit = answers.number(final)
    -- x = 5, or 5 with words around it.
    if not value then value = answers.number(final:match "=%s*([^=]*)$" or "") end
    if not value and (how ~= "boxed" or is_one_number(final)) then value = answers.last_number(final) end
    return value, unit
  end
  if marked then return nil end
  local value, unit = answers.number(text)
  if value then return value, unit end
  return (answers.last_number(text))
end

--- 1 if the number in the text is the record's: `1,250`, `1250.0`, `\frac{2500}{2}` and `1.25e3` are one number. The last number of a
--- text counts if no answer is marked.
---
--- A percent sign is a unit where only one side has it: 50% is 50, and 0.5. Other units must be equal where both have one, if `units`
--- is true; else they are passed over.
---
--- Example: local reward = rewards.numeric { relative = 0.01 }
---@param options? { field?: string, marked?: boolean, tolerance?: number, relative?: number, units?: boolean } tolerance: difference allowed (0); relative: share of the right number allowed (1e-9)
---@return std.Reward reward
function rewards.numeric(options)
  options = options or {}
  check("std.rewards.numeric", options, { "field", "marked", "tolerance", "relative", "units" })
  local field, tolerance, relative = options.field or "answer", options.tolerance or 0, options.relative or 1e-9
  local function near(value, right) return math.abs(value - right) <= math.max(tolerance, relative * math.abs(right)) end
  return function(text, record)
    local value, unit = number_in(text, options.marked)
    for _, answer in ipairs(wanted("numeric", record, field)) do
      local right, right_unit = answer, nil
      if type(answer) ~= "number" then
        right, right_unit = number_in(tostring(answer), false)
        if not right then error(("std.rewards.numeric: the record's `%s` is no number: %s"):format(field, tostring(answer)), 0) end
      end
      if value then
        local percent = (unit == "%") ~= (right_unit == "%")
        local fits = near(value, right) or (percent and near(unit == "%" and value * 100 or value / 100, right))
        local same_unit = not options.units or percent or not unit or not right_unit or unit == right_unit
        if fits and same_unit then return 1 end
      end
    end
    return 0
  end
end

--- 1 if the letter in the text is the record's: `B`, `(b)`, `The answer is B.`. The record's answer is a letter, or a number from 1.
---
--- Example: local reward = rewards.choice { count = 5 }
---@param options? { field?: string, count?: integer } count: how many choices there are, default 4
---@return std.Reward reward
function rewards.choice(options)
  options = options or {}
  check("std.rewards.choice", options, { "field", "count" })
  local count = options.count or 4
  if math.type(count) ~= "integer" or count < 2 or count > 26 then wrong("choice", "count", "an integer from 2 to 26", count) end
  return function(text, record)
    local letter = answers.letter(text, count)
    for _, answer in ipairs(wanted("choice", record, options.field or "answer")) do
      local right = math.type(answer) == "integer" and string.char(64 + answer) or tostring(answer):match "%a"
      if letter and right and letter == right:upper() then return 1 end
    end
    return 0
  end
end

--- Whether a text is `<a>..</a>` for each tag, in this order, each once, with nothing but space outside.
local function has_structure(text, tags)
  local at = 1
  for _, tag in ipairs(tags) do
    local open, close = "<" .. tag .. ">", "</" .. tag .. ">"
    at = text:find("%S", at) or #text + 1
    if text:sub(at, at + #open - 1) ~= open then return false end
    local ending = text:find(close, at, true)
    local again = text:find(open, at + 1, true)
    if not ending or again then return false end
    at = ending + #close
  end
  return not text:find("%S", at)
end

--- 1 if a text has the form that was asked for, else 0: either `tags`, which follow each other (`<think>..</think><answer>..</answer>`)
--- with nothing outside, or `pattern`, a Lua pattern.
---
--- Example: local reward = rewards.format { tags = { "think", "answer" } }
---@param options { tags?: string[], pattern?: string }
---@return std.Reward reward
function rewards.format(options)
  check("std.rewards.format", options, { "tags", "pattern" })
  if (options.tags == nil) == (options.pattern == nil) then
    wrong("format", "options", "tags, or a pattern", options.tags and "both" or "neither")
  end
  if options.pattern then
    -- A pattern that is none is an error here, not in the middle of a run.
    string.find("", options.pattern)
    return function(text) return text:find(options.pattern) and 1 or 0 end
  end
  return function(text) return has_structure(text, options.tags) and 1 or 0 end
end

--- Tokens of a text, or its characters where nobody counted tokens.
local function length_of(text, rollout) return rollout and rollout.length or utf8.len(text) or #text end

--- How near the length of a text is to `target`: 1 there, falling in a straight line to 0 at a distance of `tolerance` and beyond.
--- Lengths are tokens if the rollouts know them, else characters.
---
--- Example: local reward = rewards.length { target = 200, tolerance = 100 }
---@param options { target: integer, tolerance?: integer } tolerance: default the target
---@return std.Reward reward
function rewards.length(options)
  check("std.rewards.length", options, { "target", "tolerance" })
  local tolerance = options.tolerance or options.target
  if type(options.target) ~= "number" or options.target <= 0 then wrong("length", "target", "a number above 0", options.target) end
  if type(tolerance) ~= "number" or tolerance <= 0 then wrong("length", "tolerance", "a number above 0", tolerance) end
  return function(text, _, rollout) return math.max(1 - math.abs(length_of(text, rollout) - options.target) / tolerance, 0) end
end

--- The soft penalty for texts that grow too long: with n the length, M = `max`, C = `margin`,
--- 0 for n <= M - C, (M - C - n) / C up to M, -1 beyond. Source: DAPO, arXiv 2503.14476, equation 13.
---
--- Example: local reward = rewards.overlong { max = 512, margin = 128 }
---@param options { max: integer, margin: integer }
---@return std.Reward reward
function rewards.overlong(options)
  check("std.rewards.overlong", options, { "max", "margin" })
  for _, name in ipairs { "max", "margin" } do
    local value = options[name]
    if type(value) ~= "number" or value <= 0 then wrong("overlong", name, "a number above 0", value) end
  end
  if options.margin > options.max then wrong("overlong", "margin", "at most max", options.margin) end
  local free = options.max - options.margin
  return function(text, _, rollout)
    local length = length_of(text, rollout)
    if length <= free then return 0 end
    if length > options.max then return -1 end
    return (free - length) / options.margin
  end
end

--- A field of a record that may be JSON text, as in tables without nested values: its value. `what` says what it should be.
local function from_json(name, field, value, what)
  if type(value) ~= "string" then return value end
  local read, message = json.decode(value)
  if read == nil then error(("std.rewards.%s: the record's `%s` should be %s, or its JSON: %s"):format(name, field, what, message), 0) end
  return read
end

--- 1 if the text is JSON that fits a schema (std.schema), else 0. The JSON is the whole text, or its last fenced block. The schema is
--- `schema`, or the record's field `schema`, which may be JSON text.
---
--- Example: local reward = rewards.json { schema = { type = "object", required = { "name" } } }
---@param options? { schema?: table }
---@return std.Reward reward
function rewards.json(options)
  options = options or {}
  check("std.rewards.json", options, { "schema" })
  return function(text, record)
    local rules = options.schema or (type(record) == "table" and record.schema)
    if not rules then error("std.rewards.json: neither the options nor the record have a `schema`", 0) end
    rules = from_json("json", "schema", rules, "a schema")
    local value, message = json.decode(answers.code(text, "json"))
    if value == nil and message then return 0 end
    return schema.validate(value, rules) and 1 or 0
  end
end

--- The calls that a record wants, names with arguments. Arguments may be JSON text, as in OpenAI's form, and so may the whole list.
local function wanted_calls(record, field)
  local calls, list = from_json("tool_calls", field, type(record) == "table" and record[field] or {}, "a list of calls"), {}
  local is_list = type(calls) == "table" and (#calls > 0 or next(calls) == nil)
  for index, call in ipairs(is_list and calls or {}) do
    call = type(call) == "table" and (call["function"] or call) or {}
    local arguments = from_json("tool_calls", field, call.arguments or {}, "a list of calls with their arguments")
    is_list = is_list and type(call.name) == "string" and type(arguments) == "table"
    list[index] = { name = call.name, arguments = arguments }
  end
  if not is_list then error(("std.rewards.tool_calls: the record's `%s` should be a list of calls, each a name and arguments"):format(field), 0) end
  return list
end

--- What two calls have in common: 0 for another tool; for the right one a half, and the other half by arguments that are equal.
local function call_likeness(call, right)
  if call.name ~= right.name then return 0 end
  local equal, all = 0, 0
  for name, value in pairs(right.arguments) do
    all = all + 1
    if schema.equal(call.arguments[name], value) then equal = equal + 1 end
  end
  for name in pairs(call.arguments) do
    if right.arguments[name] == nil then all = all + 1 end
  end
  return all == 0 and 1 or 0.5 + 0.5 * equal / all
end

--- How right the calls of tools in a text are: the record's `tool_calls`, { { name, arguments } ... } or as OpenAI writes them, in their order. 1 if all are equal
--- to these and nothing else is called. With `partial`, the mean over calls of a half for the name and a half for the share of arguments
--- that are equal, over the larger number of calls. A broken call counts as a wrong one. A record without calls wants none.
---
--- Example: local reward = rewards.tool_calls { partial = true }
---@param options? { field?: string, partial?: boolean } field: default tool_calls
---@return std.Reward reward
function rewards.tool_calls(options)
  options = options or {}
  check("std.rewards.tool_calls", options, { "field", "partial" })
  return function(text, record)
    local right = wanted_calls(record, options.field or "tool_calls")
    local calls, broken = answers.tool_calls(text)
    local count = math.max(#calls + broken, #right)
    if count == 0 then return 1 end
    local sum = 0
    for index = 1, math.min(#calls, #right) do sum = sum + call_likeness(calls[index], right[index]) end
    if not options.partial then return sum == count and 1 or 0 end
    return sum / count
  end
end

--- The jobs of one text: its program with each of the record's tests.
local function jobs_of(text, record, options)
  local tests = type(record) == "table" and record.tests or nil
  if type(tests) ~= "table" or #tests == 0 then error("std.rewards.programs: the record has no `tests`", 0) end
  local program, jobs = answers.code(text, options.language), {}
  for index, test in ipairs(tests) do
    local code = type(test) == "string" and test or type(test) == "table" and test.code or nil
    if not code and not (type(test) == "table" and test.stdout) then
      error(("std.rewards.programs: the record's `tests` should each be code, or have `code` or `stdout` to check; test %d has neither"):format(index), 0)
    end
    jobs[index] = {
      program = code and program .. "\n" .. code .. "\n" or program,
      language = options.language,
      stdin = type(test) == "table" and test.stdin or nil,
      seconds = options.seconds,
      memory_mb = options.memory_mb,
      allow_weaker = options.allow_weaker,
    }
  end
  return jobs
end

--- Whether a program passed a test: it came to its end, and printed what it should.
local function passed(result, test)
  if result.status == "refused" then error("std.rewards.programs: " .. result.reason, 0) end
  if result.status ~= "ok" then return false end
  local stdout = type(test) == "table" and test.stdout or nil
  -- Space at the ends of lines and of the text does not count.
  local function lines(text) return (text:gsub("[ \t\r]+\n", "\n"):gsub("%s+$", "")) end
  return not stdout or lines(result.stdout) == lines(stdout)
end

--- The share of the record's `tests` that the program in a text passes, run in the sandbox; with `all`, 1 if it passes all, else 0.
--- A test is code that goes below the program and fails by an error (`assert(add(1, 2) == 3)`), or `{ stdin, stdout }`, or
--- `{ code, stdout }`. `rewards.score` runs the programs of all texts side by side, as many as there are cores.
---
--- Example: local reward = rewards.programs { language = "python", seconds = 2 }
---@param options? { language?: "lua"|"python", all?: boolean, seconds?: number, memory_mb?: integer, allow_weaker?: boolean } as in engine.sandbox.run
---@return std.Reward reward
function rewards.programs(options)
  options = options or {}
  check("std.rewards.programs", options, { "language", "all", "seconds", "memory_mb", "allow_weaker" })
  options.language = options.language or "lua"
  local function many(texts, records)
    local jobs, first = {}, {}
    for index, text in ipairs(texts) do
      first[index] = #jobs
      for _, job in ipairs(jobs_of(text, records[index], options)) do jobs[#jobs + 1] = job end
    end
    local results, values = engine.sandbox.run_all(jobs), {}
    for index in ipairs(texts) do
      local tests, count = records[index].tests, 0
      for number, test in ipairs(tests) do
        if passed(results[first[index] + number], test) then count = count + 1 end
      end
      values[index] = options.all and (count == #tests and 1 or 0) or count / #tests
    end
    return values
  end
  local function reward(text, record) return many({ text }, { record })[1] end
  together[reward] = many
  return reward
end

--- Minus the share of n-grams of words that were there before: 0 for a text that never repeats `n` words, near -1 for one that does
--- nothing else. Source: Yeo et al., arXiv 2502.03373, section 4.3, as a share.
---
--- Example: local reward = rewards.repetition { n = 4 }
---@param options? { n?: integer } default 3
---@return std.Reward reward
function rewards.repetition(options)
  options = options or {}
  check("std.rewards.repetition", options, { "n" })
  local n = options.n or 3
  if math.type(n) ~= "integer" or n < 1 then wrong("repetition", "n", "an integer of at least 1", n) end
  return function(text)
    local words = {}
    for word in text:lower():gmatch "%S+" do words[#words + 1] = word end
    local seen, count, repeated = {}, 0, 0
    for start = 1, #words - n + 1 do
      local gram = table.concat(words, " ", start, start + n - 1)
      count = count + 1
      if seen[gram] then repeated = repeated + 1 end
      seen[gram] = true
    end
    return count == 0 and 0 or -repeated / count
  end
end

local function check_part(part)
  if type(part) ~= "table" or type(part[1]) ~= "function" then
    wrong("combine", "parts", "a list of { reward, weight = 1, name = \"...\" }", type(part))
  end
  for key in pairs(part) do
    if key ~= 1 and key ~= "weight" and key ~= "name" and key ~= "gate" then
      error(("std.rewards.combine: a part has a reward, weight, name and gate, got `%s`"):format(tostring(key)), 3)
    end
  end
  if type(part.name) ~= "string" or part.name == "" or part.name == "reward" then
    wrong("combine", "name", "a name of its own for each part, and not `reward`", part.name)
  end
  if part.weight ~= nil and (type(part.weight) ~= "number" or part.weight ~= part.weight) then
    wrong("combine", "weight", "a number", part.weight)
  end
  if part.gate ~= nil and type(part.gate) ~= "number" then
    wrong("combine", "gate", "the least value that lets the others count", part.gate)
  end
end

--- The weighted sum of rewards. A part with a `gate` must reach that value, or the whole reward is 0, whatever the others say: a gate
--- of 1 on the format makes a right answer in the wrong form worth nothing. The weight of a part is 1 if not given, and 0 if it is only
--- a gate. `rewards.score` returns the mean of each part under its name.
---
--- Example: rewards.combine { { rewards.numeric(), name = "correct" }, { rewards.overlong { max = 64, margin = 16 }, weight = 0.5, name = "overlong" } }
---@param parts { [1]: std.Reward, name: string, weight?: number, gate?: number }[]
---@return std.Reward reward
function rewards.combine(parts)
  local kept, names = {}, {}
  for index, part in ipairs(parts) do
    check_part(part)
    if names[part.name] then wrong("combine", "name", "a name of its own for each part", part.name) end
    names[part.name] = true
    kept[index] = { call = part[1], name = part.name, weight = part.weight or (part.gate and 0 or 1), gate = part.gate }
  end
  if #kept == 0 then wrong("combine", "parts", "a list with at least one part", "none") end
  local function reward(text, record, rollout)
    local values = {}
    for index, part in ipairs(kept) do values[index] = part.call(text, record, rollout) end
    return rewards.weigh(kept, values)
  end
  combined[reward] = kept
  return reward
end

--- The sum that rewards.combine takes: weights times values, or 0 if a gate is not reached.
---
--- Example: assert(rewards.weigh({ { weight = 2 }, { weight = 0, gate = 1 } }, { 0.5, 1 }) == 1)
---@param parts { weight: number, gate?: number }[]
---@param values number[]
---@return number reward
function rewards.weigh(parts, values)
  local sum = 0
  for index, part in ipairs(parts) do
    if part.gate and values[index] < part.gate then return 0 end
    sum = sum + part.weight * values[index]
  end
  return sum
end

--- The values of one reward for all texts, each checked: a reward that is no number would spoil every advantage of its group.
local function values_of(reward, name, texts, records, rollouts)
  local values
  if together[reward] then
    values = together[reward](texts, records, rollouts)
  else
    values = {}
    for index, text in ipairs(texts) do values[index] = reward(text, records[index], rollouts[index]) end
  end
  for index in ipairs(texts) do
    local value = values[index]
    if type(value) ~= "number" or value ~= value or value == math.huge or value == -math.huge then
      error(("std.rewards.score: %s gave %s for rollout %d; a reward is a finite number"):format(name, tostring(value), index), 3)
    end
  end
  return values
end

local function mean(values)
  local sum = 0
  for _, value in ipairs(values) do sum = sum + value end
  return #values > 0 and sum / #values or 0
end

--- Scores rollouts by a reward.
---
--- `rollouts` is what model:generate gives, or any table with `texts` and `records`, of one length; `lengths` and `finish` are handed
--- on to the reward where they are there.
---
--- Example: local scores, parts = rewards.score(rollouts, rewards.numeric()) step:log(parts)
---@param rollouts { texts: string[], records?: table[], lengths?: integer[], finish?: string[] }
---@param reward std.Reward
---@return engine.Tensor scores [rollouts], f32
---@return table<string, number> means the mean as `reward`, and of each part of a combined reward under its name
function rewards.score(rollouts, reward)
  if type(reward) ~= "function" then wrong("score", "reward", "a function of text and record", type(reward)) end
  local texts, records = rollouts.texts, rollouts.records
  if type(texts) ~= "table" then wrong("score", "rollouts", "rollouts with texts", type(texts)) end
  records = records or {}
  local lengths, finish = rollouts.lengths, rollouts.finish
  local known = {}
  for index in ipairs(texts) do
    known[index] = { index = index, length = lengths and lengths[index], finish = finish and finish[index] }
  end
  local parts, means, totals = combined[reward], {}, {}
  if parts then
    local by_part = {}
    for number, part in ipairs(parts) do
      by_part[number] = values_of(part.call, part.name, texts, records, known)
      means[part.name] = mean(by_part[number])
    end
    for index in ipairs(texts) do
      local values = {}
      for number in ipairs(parts) do values[number] = by_part[number][index] end
      totals[index] = rewards.weigh(parts, values)
    end
  else
    totals = values_of(reward, "the reward", texts, records, known)
  end
  means.reward = mean(totals)
  return engine.tensor.new(totals, { dtype = "f32" }), means
end

--- Scores an empty answer to each record, so that what a reward cannot judge is an error before anything is generated.
---
--- Example: rewards.probe(prompts, rewards.numeric())
---@param records (string|table)[] prompts, as model:generate takes them
---@param reward std.Reward
---@return engine.Tensor scores [records], f32
function rewards.probe(records, reward)
  local texts, known, lengths, finish = {}, {}, {}, {}
  for index, record in ipairs(records) do
    texts[index], known[index], lengths[index], finish[index] = "", type(record) == "table" and record or { prompt = record }, 0, "stop"
  end
  return (rewards.score({ texts = texts, records = known, lengths = lengths, finish = finish }, reward))
end

return rewards
