--- Lesson 17: rewards: what makes an answer good, as functions of a text.
--- Run: perilune run examples/17_rewards.lua
local rewards, tasks = require "std.rewards", require "std.tasks"

-- A reward is a function of what a model wrote and of the record that it was asked with. Those of std.rewards are made by functions
-- that take options; your own are as good.
local numeric = rewards.numeric()
for _, text in ipairs { "\\boxed{\\frac{1}{2}}", "so the answer is 50%.", "0.25 or 0.5", "I do not know" } do
  print(("%-24s %g"):format(text, numeric(text, { answer = "1/2" })))
end

local function is_polite(text) return text:lower():find "please" and 1 or 0 end

-- Several of them as one: a weighted sum. A part with a gate must reach that value, or the whole is worth nothing.
local reward = rewards.combine {
  { rewards.exact { marked = true }, name = "correct" },
  { rewards.format { pattern = "Answer: [^\n]+$" }, gate = 1, name = "format" },
  { rewards.overlong { max = 60, margin = 20 }, weight = 0.5, name = "overlong" },
  { is_polite, weight = 0.1, name = "polite" },
}

-- model:generate gives rollouts; here they are written by hand. std.tasks makes problems from a seed: those of the test split are in
-- no training text.
local problem = tasks.problems({ count = 1, seed = 4, kinds = { "sum" }, split = "test" })[1]
print("\n" .. problem.prompt)
local rollouts = {
  texts = {
    "Answer: " .. problem.answer, problem.answer, "Please note.\nAnswer: " .. problem.answer,
    ("so "):rep(17) .. "\nAnswer: " .. problem.answer, "Answer: 0",
  },
  records = { problem, problem, problem, problem, problem },
}

-- A tensor with a reward for each rollout, as advantages are made from, and the means of all parts for step:log.
local scores, means = rewards.score(rollouts, reward)
for index, score in ipairs(scores:to_table()) do print(("%6.3f  %s"):format(score, (rollouts.texts[index]:gsub("\n", " | ")))) end
for name, mean in pairs(means) do print(("mean %s: %.3f"):format(name, mean)) end
