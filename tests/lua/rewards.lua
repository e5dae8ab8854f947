--- std.rewards: each reward on right, wrong and odd texts, and how they are put together. Rewards by programs are in tests/sandbox.rs.
local rewards, harness = require "std.rewards", require "harness"
local describe, it, expect = harness.describe, harness.it, harness.expect

local function scores(reward, cases)
  for _, case in ipairs(cases) do
    local got = reward(case[1], case[2], case[4] or { index = 1 })
    if math.abs(got - case[3]) > 1e-12 then error(("%q gave %s, not %s"):format(case[1], got, case[3])) end
  end
end

describe("rewards", function()
  it("compare answers exactly", function()
    scores(rewards.exact(), {
      { "Paris", { answer = "paris" }, 1 }, { "The answer is Paris.", { answer = "Paris" }, 1 },
      { "It is Paris", { answer = "Paris" }, 0 }, { "", { answer = "x" }, 0 },
      { "", { answer = "" }, 0 }, { "7", { answer = 7 }, 1 }, { "lutetia", { answer = { "Paris", "Lutetia" } }, 1 },
      { "Answer: 7, 23, 41", { answer = "7, 23, 41" }, 1 },
      { "\\boxed{(1,2)}", { answer = "(1, 2)" }, 1 }, { "\\boxed{x \\in [0, 1]}", { answer = "x\\in[0,1]" }, 1 }, { "a b", { answer = "ab" }, 0 },
      { "<think>2</think><answer>no</answer>", { answer = "2" }, 0 },
    })
    scores(rewards.exact { marked = true, field = "gold" }, { { "7", { gold = "7" }, 0 }, { "Answer: 7", { gold = "7" }, 1 } })
    expect(function() rewards.exact()("x", {}) end).fails "the record has no `answer`"
    expect(function() rewards.exact()("x", { prompt = "p", gold = 1 }) end).fails "only gold, prompt (the option `field`"
    expect(function() rewards.exact { feild = 1 } end).fails "`feild`"
  end)
  it("compare numbers", function()
    scores(rewards.numeric(), {
      { "so it is 1,250", { answer = "1250.0" }, 1 }, { "#### 42", { answer = "6*7\n#### 42" }, 1 },
      { "\\boxed{\\frac{1}{2}}", { answer = 0.5 }, 1 }, { "\\boxed{1} \\boxed{2}", { answer = 2 }, 1 },
      { "\\boxed{2} \\boxed{1}", { answer = 2 }, 0 }, { "", { answer = 0 }, 0 }, { "-0", { answer = 0 }, 1 },
      { "nan", { answer = 0 }, 0 }, { "x = \u{2212}3", { answer = -3 }, 1 },
      { "50%", { answer = "50" }, 1 }, { "50%", { answer = "0.5" }, 1 }, { "0.5", { answer = "50%" }, 1 },
      { "5%", { answer = "50%" }, 0 }, { "The answer is x = 5 m.", { answer = 5 }, 1 },
      { "5 km", { answer = "5 m" }, 1 }, { "12", { answer = { 11, 12 } }, 1 }, { "1e999", { answer = 1 }, 0 },
      { "\\boxed{2 \\cdot 10^{2}}", { answer = 200 }, 1 }, { "so 2 \\cdot 10^2", { answer = 200 }, 1 },
      -- A box of several numbers, or of one that something is done to, is not the last of them.
      { "\\boxed{5, 6}", { answer = 6 }, 0 }, { "\\boxed{(1,2)}", { answer = 2 }, 0 }, { "\\boxed{1/0}", { answer = 0 }, 0 },
      { "\\boxed{2^{10}}", { answer = 10 }, 0 }, { "\\boxed{\\sqrt{4}}", { answer = 4 }, 0 }, { "\\boxed{5\\pi}", { answer = 5 }, 0 },
      { "\\boxed{\\approx 3.14}", { answer = 3.14 }, 1 }, { "\\boxed{about 1{,}234 in all}", { answer = 1234 }, 1 },
    })
    scores(rewards.numeric { tolerance = 0.1 }, { { "3.1", { answer = 3.14 }, 1 }, { "3.3", { answer = 3.14 }, 0 } })
    scores(rewards.numeric { units = true },
    { { "5 km", { answer = "5 m" }, 0 }, { "5", { answer = "5 m" }, 1 }, { "5 KM", { answer = "5 km" }, 1 } })
    scores(rewards.numeric { marked = true }, { { "5", { answer = 5 }, 0 } })
    expect(function() rewards.numeric()("5", { answer = "five" }) end).fails "is no number: five"
    expect(function() rewards.numeric()("5", { answer = {} }) end).fails "a list with at least one, got an empty one"
  end)
  it("compare letters", function()
    scores(rewards.choice(), { { "(b)", { answer = "B" }, 1 }, { "B", { answer = 2 }, 1 }, { "C", { answer = "(c)" }, 1 }, { "", { answer = "A" }, 0 }, { "A dog", { answer = "A" }, 0 } })
    expect(function() rewards.choice { count = 1 } end).fails "from 2 to 26"
  end)
  it("look at form", function()
    local tags = rewards.format { tags = { "think", "answer" } }
    scores(tags, {
      { "<think>a</think>\n<answer>b</answer>\n", nil, 1 }, { "x<think>a</think><answer>b</answer>", nil, 0 },
      { "<think>a</think><answer>b</answer>x", nil, 0 }, { "", nil, 0 },
      { "<answer>b</answer><think>a</think>", nil, 0 }, { "<think>a<answer>b</answer>", nil, 0 },
      { "<think>a</think><think>a</think><answer>b</answer>", nil, 0 },
      { "<think>a</think><answer>b</answer><answer>c</answer>", nil, 0 },
    })
    scores(rewards.format { pattern = "^%d+$" }, { { "12", nil, 1 }, { "x12", nil, 0 } })
    expect(function() rewards.format {} end).fails "tags, or a pattern"
    expect(function() rewards.format { pattern = "[a" } end).fails "pattern"
  end)
  it("look at length", function()
    scores(rewards.length { target = 10, tolerance = 5 },
    { { ("é"):rep(10), nil, 1 }, { "abcdef", nil, 0.2 }, { "", nil, 0 }, { "x", nil, 0.8, { length = 11 } } })
    local overlong = rewards.overlong { max = 10, margin = 4 }
    for length, wanted in pairs { [1] = 0, [6] = 0, [7] = -0.25, [9] = -0.75, [10] = -1, [11] = -1 } do scores(overlong, { { "", nil, wanted, { length = length } } }) end
    expect(function() rewards.overlong { max = 4, margin = 5 } end).fails "`margin` should be at most max"
  end)
  it("read JSON by a schema", function()
    local reward = rewards.json { schema = { type = "object", required = { "a" } } }
    scores(reward, { { '{"a": 1}', {}, 1 }, { 'Here:\n```json\n{"a": 1}\n```\n', {}, 1 }, { '{"b": 1}', {}, 0 }, { "{a: 1}", {}, 0 }, { "", {}, 0 }, { "null", {}, 0 } })
    scores(rewards.json(), { { "[1]", { schema = { type = "array" } }, 1 }, { "[1]", { schema = '{"type": "object"}' }, 0 } })
    expect(function() rewards.json()("1", { schema = "{" }) end).fails "the record's `schema` should be a schema, or its JSON"
    expect(function() rewards.json()("1", {}) end).fails "`schema`"
  end)
  it("compare calls of tools", function()
    local function call(name, arguments) return ('<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'):format(name, arguments) end
    local record = { tool_calls = { { name = "f", arguments = { a = 1, b = "x" } } } }
    scores(rewards.tool_calls(), {
      { call("f", '{"b": "x", "a": 1.0}'), record, 1 }, { call("f", '{"a": 1}'), record, 0 },
      { call("f", '{"a": 1, "b": "x"}') .. call("f", "{}"), record, 0 }, { "", record, 0 },
      { "no call", { tool_calls = {} }, 1 }, { "no call", {}, 1 }, { call("f", "{}"), {}, 0 }, { "<tool_call>", {}, 0 },
      { call("now", "{}"), { tool_calls = { { name = "now", arguments = {} } } }, 1 },
      { call("f", "{}"), { tool_calls = { { type = "function", ["function"] = { name = "f", arguments = {} } } } }, 1 },
      { call("f", '{"a": 1}'), { tool_calls = { { type = "function", ["function"] = { name = "f", arguments = '{"a": 1}' } } } }, 1 },
      { call("f", '{"a": 1}'), { tool_calls = '[{"name": "f", "arguments": {"a": 2}}]' }, 0 }, { "none", { tool_calls = "[]" }, 1 },
      { call("now", "{}"), { tool_calls = { { name = "now" } } }, 1 },
    })
    for _, bad in ipairs { "f()", { name = "f", arguments = {} }, { "f" }, { { name = "f", arguments = "x" } } } do
      expect(function() rewards.tool_calls()("", { tool_calls = bad }) end).fails "the record's `tool_calls` should be a list of calls"
    end
    scores(rewards.tool_calls { partial = true }, {
      { call("f", '{"a": 1}'), record, 0.75 }, { call("g", '{"a": 1}'), record, 0 },
      { call("f", '{"a": 1, "b": "x", "c": 2}'), record, 0.5 + 0.5 * 2 / 3 },
      { call("f", '{"a": 1, "b": "x"}') .. call("f", "{}"), record, 0.5 },
      { call("f", '{"a": 1, "b": "x"}') .. "<tool_call>x</tool_call>", record, 0.5 },
    })
  end)
  it("count repetitions", function()
    scores(rewards.repetition { n = 2 },
    { { "a b c d", nil, 0 }, { "a a a a a", nil, -0.75 }, { "", nil, 0 }, { "one", nil, 0 }, { "A b a B", nil, -1 / 3 } })
  end)
  it("are combined by weights and gates, and each is logged", function()
    local function value(name) return function(_, record) return record[name] end end
    local reward = rewards.combine { { value "a", weight = 2, name = "a" }, { value "b", name = "b" }, { value "c", gate = 1, name = "c" } }
    local rollouts = { texts = { "", "", "" }, records = { { a = 1, b = 0.5, c = 1 }, { a = 1, b = 1, c = 0 }, { a = 0, b = -1, c = 1 } } }
    local tensor, means = rewards.score(rollouts, reward)
    expect(tensor).is { 2.5, 0, -1 }
    expect(tensor.dtype).is "f32"
    expect(means.reward).near(0.5, 1e-12)
    expect(means.a).near(2 / 3, 1e-12)
    expect(means.b).near(0.5 / 3, 1e-12)
    expect(means.c).near(2 / 3, 1e-12)
    expect(reward("", rollouts.records[1])).is(2.5)
    -- Combined rewards are rewards.
    expect(rewards.combine({ { reward, weight = 2, name = "all" } })("", rollouts.records[1])).is(5.0)
    for part, bad in pairs {
      ["a list of { reward"] = { 1 }, ["a name of its own"] = { { print, name = "reward" } }, ["got `wieght`"] = { { print, name = "x", wieght = 1 } },
      ["`weight` should be a number"] = { { print, name = "x", weight = "1" } }, ["at least one part"] = {}, ["the least value"] = { { print, name = "x", gate = true } },
    } do
      expect(function() rewards.combine(bad) end).fails(part)
    end
    expect(function() rewards.combine { { print, name = "x" }, { print, name = "x" } } end).fails "got x"
  end)
  it("are scored over rollouts, with what is known of each", function()
    local rollouts = { texts = { "a", "b" }, records = { {}, {} }, lengths = { 3, 4 }, finish = { "length", "stop_token" } }
    local tensor, means = rewards.score(rollouts, function(text, _, rollout) return rollout.length * 10 + rollout.index + (rollout.finish == "length" and 0 or 100) + #text end)
    expect(tensor).is { 32, 143 }
    expect(means).is { reward = 87.5 }
    expect(means.reward).is(87.5)
    expect(rewards.score({ texts = { "5" } }, function() return 1 end)).is { 1 }
    for _, bad in ipairs { 0 / 0, math.huge, "1", true } do
      expect(function() rewards.score(rollouts, function() return bad end) end).fails "for rollout 1; a reward is a finite number"
    end
    expect(function() rewards.score(rollouts, 1) end).fails "a function of text and record"
    expect(function() rewards.score({}, print) end).fails "rollouts with texts"
  end)
end)
