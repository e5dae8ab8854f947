--- std.tasks: right answers are right, splits share nothing, and a seed fixes everything.
local engine = require "engine"
local tasks, json, answers, harness = require "std.tasks", require "std.json", require "std.answers", require "harness"
local describe, it, expect = harness.describe, harness.it, harness.expect

--- What a problem is about, so that the same one with other words or the other way round is found.
local function essence(problem)
  local numbers = {}
  local text = problem.kind == "words" and problem.prompt:gsub("^What is ", ""):gsub("^How much is ", "") or problem.prompt
  if problem.kind == "words" then
    local a, operation, b = text:match "^(.-) (%l+us) (.-)%?"
    numbers, text = { a, b }, operation
  else
    for digits in text:gmatch "%d+" do numbers[#numbers + 1] = digits end
    text = text:match "%d ([+*-]) %d" or ""
  end
  if text ~= "-" and text ~= "minus" then table.sort(numbers) end
  return problem.kind .. text .. table.concat(numbers, " ")
end

describe("problems", function()
  local train, test = tasks.problems { count = 3000, seed = 1 }, tasks.problems { count = 300, seed = 9, split = "test" }
  it("have right answers", function()
    local in_words = {}
    for number = 0, 999 do in_words[tasks.in_words(number)] = number end
    local counts = {}
    for _, problem in ipairs(train) do
      counts[problem.kind] = (counts[problem.kind] or 0) + 1
      if problem.kind == "sum" or problem.kind == "tool" then
        local expression = problem.prompt:match "%d+ [+*-] %d+"
        expect(tasks.calculator(expression)).is(problem.answer)
        if problem.kind == "tool" then expect(problem.tool_calls[1].arguments.expression).is(expression) end
      elseif problem.kind == "words" then
        local a, operation, b = problem.prompt:gsub("^How much is ", "What is "):match "^What is (.-) (%l+us) (.-)%?"
        local value = operation == "plus" and in_words[a] + in_words[b] or in_words[a] - in_words[b]
        expect(in_words[problem.answer]).is(value)
      else
        local numbers = {}
        for digits in problem.prompt:gmatch "%d+" do numbers[#numbers + 1] = math.tointeger(digits) end
        table.sort(numbers)
        expect(table.concat(numbers, ", ")).is(problem.answer)
        assert(#numbers >= 3 and #numbers <= 5)
      end
    end
    for _, kind in ipairs { "sum", "words", "sort", "tool" } do assert(counts[kind] > 500, kind) end
  end)
  it("of two splits are different ones", function()
    local seen = {}
    for _, problem in ipairs(train) do seen[essence(problem)] = true end
    local different = {}
    for _, problem in ipairs(test) do
      if seen[essence(problem)] then error("in both: " .. problem.prompt) end
      different[essence(problem)] = true
    end
    local count = 0
    for _ in pairs(different) do count = count + 1 end
    expect(count).is(300)
  end)
  it("depend on their options alone", function()
    math.random(9)
    expect(json.encode(tasks.problems { count = 50, seed = 3 }) == json.encode(tasks.problems { count = 50, seed = 3 })).is(true)
    expect(json.encode(tasks.problems { count = 50, seed = 3 }) == json.encode(tasks.problems { count = 50, seed = 4 })).is(false)
    -- More begin with the fewer.
    expect(tasks.problems({ count = 50, seed = 3 })[7].prompt).is(tasks.problems({ count = 7, seed = 3 })[7].prompt)
  end)
  it("are as hard as asked for", function()
    for _, problem in ipairs(tasks.problems { count = 200, kinds = { "sum" }, digits = 1, operations = { "+" } }) do
      assert(problem.prompt:find "%f[%d]%d %+ %d%f[%D]", problem.prompt)
    end
    for _, problem in ipairs(tasks.problems { count = 50, kinds = { "sort" }, items = { 6, 6 } }) do
      expect(select(2, problem.answer:gsub(",", ""))).is(5)
    end
    -- There are 55 unordered pairs of digits; one of ten is held out.
    expect(function() tasks.problems { count = 60, kinds = { "sum" }, digits = 1, operations = { "+" }, split = "test" } end).fails "problems of the test split at this difficulty"
    expect(#tasks.problems { count = 500, kinds = { "sum" }, digits = 1 }).is(500)
  end)
  it("are rewarded by their answer", function()
    local reward = tasks.reward()
    for _, problem in ipairs(test) do
      if problem.kind == "tool" then
        expect(reward("Answer: " .. problem.answer, problem, {})).is(0)
      else
        expect(reward("Answer: " .. problem.answer, problem, {})).is(1)
        expect(reward(problem.answer, problem, {})).is(0)
      end
    end
  end)
  it("refuse what cannot be meant", function()
    for part, options in pairs {
      ["`count`"] = {}, ["`seeds`"] = { count = 1, seeds = 1 }, ["train or test"] = { count = 1, split = "dev" }, ["got music"] = { count = 1, kinds = { "music" } },
      ["from 1 to 8"] = { count = 1, digits = 9 }, ["as { 3, 5 }"] = { count = 1, items = { 5, 3 } }, ["`steps`"] = { count = 1, steps = 1 },
    } do
      expect(function() tasks.problems(options) end).fails(part)
    end
  end)
end)

describe("conversations", function()
  it("end with the right answer, worked out or not", function()
    local worked = 0
    local list = tasks.conversations { count = 600, seed = 5, steps = 0.5 }
    for _, record in ipairs(list) do
      local last = record.messages[#record.messages]
      expect(last.role).is "assistant"
      if record.kind == "tool" then
        expect(#record.messages).is(5)
        expect(record.messages[4].content).is(tasks.calculator(record.messages[3].tool_calls[1].arguments.expression))
        expect(answers.final(last.content)).is(record.messages[4].content)
      elseif last.content:find "\n" then
        worked = worked + 1
      end
    end
    assert(worked > 150 and worked < 300, worked)
  end)
  it("have steps that are right", function()
    for _, record in ipairs(tasks.conversations { count = 500, kinds = { "sum", "sort" }, digits = 3, steps = 1 }) do
      local work, answer = record.messages[3].content:match "^(.-)\nAnswer: (.*)$"
      if record.kind == "sum" then
        local digits = {}
        for left, value in work:gmatch "([%d+-]+)=(%d+)" do
          expect(tasks.calculator(left)).is(value)
          digits[#digits + 1] = value
        end
        -- The last digits, from the right; the last column keeps its carry.
        local joined = digits[#digits]
        for index = #digits - 1, 1, -1 do joined = joined .. digits[index]:sub(-1) end
        expect(math.tointeger(joined)).is(math.tointeger(answer))
      else
        for left, least in work:gmatch "([%d ]+): (%d+)" do
          local numbers = {}
          for number in left:gmatch "%d+" do numbers[#numbers + 1] = math.tointeger(number) end
          expect(math.min(table.unpack(numbers))).is(math.tointeger(least))
        end
      end
    end
  end)
  it("are wrong as often as asked for", function()
    local reward, right = tasks.reward(), 0
    local list = tasks.conversations { count = 1000, kinds = { "sum", "words", "sort" }, errors = 0.3, seed = 8 }
    for _, record in ipairs(list) do
      local prompt, text = record.messages[2].content, record.messages[3].content
      local expression = prompt:match "%d+ [+-] %d+"
      if record.kind == "sum" then right = right + reward(text, { kind = "sum", answer = tasks.calculator(expression) }, {}) end
    end
    local sums = 0
    for _, record in ipairs(list) do sums = sums + (record.kind == "sum" and 1 or 0) end
    assert(math.abs(right / sums - 0.7) < 0.08, right / sums)
  end)
  it("are rendered by the chat template, and a rendered call is the text that is rewarded", function()
    local tokenizer = engine.tokenizer.bytes()
    for _, record in ipairs(tasks.conversations { count = 20, kinds = { "tool" } }) do
      local text = tokenizer:chat(record.messages)
      expect(#answers.tool_calls(text)).is(1)
      expect(text:find("<|im_start|>system\n<|im_end|>", 1, true)).is(1)
    end
    local pair, problem = tasks.pairs({ count = 1, kinds = { "tool" } })[1], tasks.conversations({ count = 1, kinds = { "tool" } })[1]
    assert(tokenizer:chat(problem.messages):find("assistant\n" .. pair.chosen .. "<|im_end|>", 1, true), pair.chosen)
  end)
end)

describe("pairs", function()
  it("have a right and a wrong answer in one form", function()
    local reward = tasks.reward()
    for _, pair in ipairs(tasks.pairs { count = 1500, seed = 2 }) do
      local record = { kind = pair.kind, answer = pair.answer }
      if pair.kind == "tool" then record.tool_calls = { { name = "calculator", arguments = { expression = pair.prompt:match "%d+ %* %d+" } } } end
      expect(reward(pair.chosen, record, {})).is(1)
      expect(reward(pair.rejected, record, {})).is(0)
      if pair.kind ~= "tool" then expect(pair.chosen:find "\n" ~= nil).is(pair.rejected:find "\n" ~= nil) end
    end
  end)
end)

describe("texts", function()
  it("hold tales and facts of the training split alone", function()
    local text = tasks.text { count = 400, seed = 6 }
    expect(select(2, text:gsub("\n\n", ""))).is(400)
    expect(text).is(tasks.text { count = 400, seed = 6 })
    local held_out, sums = {}, 0
    for _, problem in ipairs(tasks.problems { count = 400, seed = 1, split = "test", kinds = { "sum" } }) do held_out[problem.prompt:match "%d+ [+-] %d+"] = true end
    for question, value, work in text:gmatch "(%d+ [+-] %d+) = (%d+): ([^\n]+)" do
      expect(tasks.calculator(question)).is(value)
      if held_out[question] then error("held out: " .. question) end
      sums = sums + 1
    end
    assert(sums > 80, sums)
    assert(tasks.text({ count = 20, tales = 1 }):find "went to")
    expect(tasks.text({ count = 20, tales = 0 }):find "went to").is(nil)
    expect(function() tasks.text { count = 1, split = "test" } end).fails "not for training"
  end)
end)

describe("the calculator", function()
  it("computes expressions and nothing else", function()
    for expression, wanted in pairs {
      ["348 * 27"] = "9396", ["2+3*4"] = "14", ["(2+3)*4"] = "20", ["7/2"] = "3.5", ["8/2"] = "4", ["-3 - -4"] = "1", ["1.5*2"] = "3", ["10-2-3"] = "5", ["2*(3+(4-1))"] = "12", ["1/3"] = "0.3333333333",
    } do
      expect(tasks.calculator(expression)).is(wanted)
    end
    for expression, part in pairs {
      [""] = "a number is missing", ["1 +"] = "missing", ["1/0"] = "division by zero", ["(1"] = "`)`", ["1 2"] = "nothing is known", ["os.exit()"] = "missing", ["1)"] = "nothing is known",
      [("("):rep(999)] = "brackets", [("-"):rep(999) .. "1"] = "brackets",
    } do
      local result, message = tasks.calculator(expression)
      expect(result).is(nil)
      assert(message:find(part, 1, true), message)
    end
  end)
end)

describe("files", function()
  it("are read back by the engine's data sets", function()
    local path = os.tmpname()
    expect(tasks.write(path, tasks.conversations { count = 12 })).is(12)
    local records = engine.data.jsonl(path):take(12)
    expect(#records).is(12)
    expect(records[12].messages[2].role).is "user"
    os.remove(path)
    expect(function() tasks.write("/nowhere/x", {}) end).fails "cannot write /nowhere/x"
  end)
end)
