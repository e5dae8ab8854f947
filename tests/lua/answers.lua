--- std.answers: where an answer stands, and what number it is.
local answers, harness = require "std.answers", require "harness"
local describe, it, expect = harness.describe, harness.it, harness.expect

describe("answers", function()
  it("are looked for in one pass, whatever a text repeats", function()
    local began = os.clock()
    for _, piece in ipairs { "(", "\\boxed{", "word ", "<answer>" } do expect(answers.final(piece:rep(20000))).is(nil) end
    expect((answers.last_number(("1,"):rep(20000) .. " and 5"))).is(5.0)
    -- A pass takes milliseconds; one for each place in the text took a minute.
    assert(os.clock() - began < 5, "slow")
  end)
  it("are found by marks, the most trusted first", function()
    for _, case in ipairs {
      { "", nil }, { "just 5", nil }, { "so 6 * 7 = 42\n#### 42\n", "42", "hashes" }, { "#### 1\n#### 2", "2", "hashes" },
      { "\\boxed{1} no, \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}", "boxed" }, { "\\boxed{unfinished", nil },
      { "\\fbox{3} then \\boxed{4}", "4", "boxed" },
      { "\\boxed{4} then \\fbox{3}", "3", "boxed" }, { "<answer> 7 </answer> \\boxed{8}", "7", "tag" },
      { "<answer>\\boxed{9}</answer>", "9", "tag" },
      { "<answer>1</answer><answer>2", "1", "tag" }, { "<answer>a<answer>b</answer>", "b", "tag" },
      { "The answer is 3.5. Good.", "3.5", "announced" },
      { "**Answer:** Paris", "Paris", "announced" }, { "answer: 1\nAnswer: 2.", "2", "announced" }, { "The answer is", nil },
      { "the answer is $12$.", "$12$", "announced" },
    } do
      local answer, how = answers.final(case[1])
      if answer ~= case[2] or how ~= case[3] then error(("%q gave %s, %s"):format(case[1], tostring(answer), tostring(how))) end
    end
  end)
  it("are normalised", function()
    for _, case in ipairs {
      { "  Paris. ", "paris" }, { "$\\text{Paris}$", "paris" }, { '"Paris"', "paris" }, { "New\n York", "new york" },
      { "\\left(1, 2\\right)", "(1, 2)" },
      { "\u{2212}5", "-5" }, { "\\dfrac12", "\\frac12" }, { "**x**", "x" }, { "", "" }, { "3.14", "3.14" },
      { "\u{201C}yes\u{201D}", "yes" },
    } do
      if answers.normalize(case[1]) ~= case[2] then error(("%q gave %q"):format(case[1], answers.normalize(case[1]))) end
    end
  end)
  it("are numbers in many forms", function()
    for _, case in ipairs {
      { "42", 42 }, { " -3.5 ", -3.5 }, { "+7", 7 }, { "\u{2212}7", -7 }, { ".5", 0.5 }, { "-.5", -0.5 }, { "5.", 5 }, { "007", 7 },
      { "1,234,567.5", 1234567.5 }, { "1 234", 1234 },
      { "1{,}234", 1234 }, { "1\u{202F}234", 1234 }, { "1,23", nil }, { "12,345,6", nil }, { "1e3", 1000 }, { "1.5E-2", 0.015 },
      { "2 \\times 10^{3}", 2000 }, { "2×10^3", 2000 },
      { "2 * 10^-1", 0.2 }, { "10^5", 100000 }, { "10^{-2}", 0.01 }, { "3/4", 0.75 }, { "-3/4", -0.75 }, { "1 1/2", 1.5 },
      { "\\frac{3}{4}", 0.75 }, { "-\\dfrac{1}{2}", -0.5 },
      { "\\frac12", 0.5 }, { "1\\frac{1}{2}", 1.5 }, { "\\frac{1}{0}", nil }, { "1/0", nil }, { "50%", 0.5, "%" },
      { "50\\%", 0.5, "%" }, { "50 percent", 0.5, "%" },
      { "$5", 5, "$" }, { "\\$1,250.50", 1250.5, "$" }, { "-$5", -5, "$" }, { "$-5$", -5 }, { "€3", 3, "€" }, { "5 km", 5, "km" },
      { "12 cm^2", 12, "cm^2" }, { "5\\text{ km}", 5, "km" },
      { "5 apples", 5, "apples" }, { "30^\\circ", 30, "degrees" }, { "30^{\\circ}", 30, "degrees" }, { "-0", 0 }, { "-0.0", 0 }, { "\\(8\\)", 8 }, { "$8$", 8 },
      { "", nil }, { "x", nil }, { "nan", nil }, { "inf", nil }, { "1e999", nil }, { "5 + 3", nil }, { "x = 5", nil },
      { "1.2.3", nil }, { "--5", nil }, { "5 and then 6", nil }, { "-", nil },
    } do
      local value, unit = answers.number(case[1])
      local near = value == case[2] or (value and case[2] and math.abs(value - case[2]) < 1e-12 * math.abs(case[2]))
      if not near or unit ~= case[3] then error(("%q gave %s, %s"):format(case[1], tostring(value), tostring(unit))) end
    end
    expect(1 / answers.number "-0").is(math.huge)
  end)
  it("are the last number of a text", function()
    for _, case in ipairs {
      { "", nil }, { "none here", nil }, { "3 apples and 4 pears make 7 pieces.", 7 }, { "it is -5", -5 }, { "10 - 3", 3 },
      { "(x)-3", 3 }, { "x = \u{2212}3.", -3 }, { "costs $-5", -5 },
      { "about 1,250 of them", 1250 }, { "H2O", nil }, { "at 50% now", 0.5 }, { "so \\frac{1}{4} it is", 0.25 },
      { "2 \\times 10^3 m", 2000 }, { "v2.5 or 3.5!", 3.5 }, { "7/8 inch", 0.875 },
      { "1/0", 0 }, { "is .25", 0.25 }, { "in [3, -4]", -4 },
    } do
      local value = answers.last_number(case[1])
      if value ~= case[2] then error(("%q gave %s"):format(case[1], tostring(value))) end
    end
  end)
  it("are letters", function()
    for _, case in ipairs {
      { "B", "B" }, { "b", "B" }, { "(c)", "C" }, { "B. because", "B" }, { "The answer is (b).", "B" }, { "The answer is D", "D" },
      { "\\boxed{\\text{C}}", "C" }, { "\\boxed{\\textbf{(D)}}", "D" }, { "$\\boxed{\\mathrm{(A)}}$", "A" }, { "\\boxed{\\textbf{(B) }7}", "B" }, { "<answer>A</answer>", "A" },
      { "I think A cat is B", "B" }, { "A cat sat.", nil }, { "Option C it is", "C" }, { "E", nil }, { "", nil },
      { "First A, then D, so D.", "D" }, { "The answer is blue", nil },
    } do
      local letter = answers.letter(case[1], 4)
      if letter ~= case[2] then error(("%q gave %s"):format(case[1], tostring(letter))) end
    end
    expect(answers.letter("e", 5)).is "E"
  end)
  it("are programs in fences", function()
    expect(answers.code "return 1").is "return 1"
    expect(answers.code("a\n```lua\nx = 1\n```\nb\n```python\ny\n```", "lua")).is "x = 1"
    expect(answers.code("```py\ny\n```\n```\nz\n```", "python")).is "y"
    expect(answers.code "```\nz\n```\n```\nw\n```").is "w"
    expect(answers.code "```lua\ncut off").is "cut off"
  end)
  it("are calls of tools", function()
    local calls, broken = answers.tool_calls 'x<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><tool_call>{"name": "g", "arguments": {}}</tool_call>'
    expect(#calls).is(2)
    expect(broken).is(0)
    expect(calls[1].name .. calls[1].arguments.a .. calls[2].name).is "f1g"
    for _, text in ipairs { "<tool_call>{}</tool_call>", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "<tool_call>no</tool_call>", "<tool_call>", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>' } do
      calls, broken = answers.tool_calls(text)
      expect(#calls).is(0)
      expect(broken).is(1)
    end
  end)
end)
