--- std.eval on models whose answers are known: chances of letters that can be added up by hand.
local engine = require "engine"
local eval, rewards, harness = require "std.eval", require "std.rewards", require "harness"
local describe, it, expect = harness.describe, harness.it, harness.expect
local tokenizer = engine.tokenizer.bytes()

--- The log-probability of a byte: that of the letters of "ab" is -1 and -2, of others -4. Batches are counted.
local function letters()
  local model = { tokenizer = tokenizer, batches = 0 }
  function model:logprobs(batch)
    self.batches = self.batches + 1
    local values = {}
    for index, label in ipairs(batch.labels:to_table()) do
      values[index] = label < 0 and 0 or ({ [97] = -1, [98] = -2 })[label] or -4
    end
    return engine.tensor.new(values, { dtype = "f32" })
  end
  return model
end

describe("perplexity", function()
  it("is that of each text, and of all tokens", function()
    local model = letters()
    local result = eval.perplexity(model, { "aab", "bb", "x", "" })
    -- The first byte of a text is not predicted: a, b; b; nothing; nothing.
    expect(result.tokens).is(3)
    expect(result.count).is(4)
    expect(result.loss).near(5 / 3, 1e-12)
    expect(result.perplexity).near(math.exp(5 / 3), 1e-9)
    expect(result.bits_per_byte).near(5 / math.log(2) / 6, 1e-9)
    expect(result.items[1].loss).is(1.5)
    expect(result.items[1].perplexity).near(math.exp(1.5), 1e-12)
    expect(result.items[3].tokens).is(0)
    expect(result.items[3].loss).is(nil)
    expect(model.batches).is(1)
  end)
  it("does not depend on how texts are batched", function()
    local texts = { "ab", "ba", "abab", "bbbbbbbbbb", "a", "aab" }
    local whole, model = eval.perplexity(letters(), texts), letters()
    local cut = eval.perplexity(model, texts, { tokens = 5 })
    expect(cut.loss).is(whole.loss)
    for index in ipairs(texts) do expect(cut.items[index].loss).is(whole.items[index].loss) end
    expect(model.batches).is(4)
  end)
  it("equals the loss of a real model", function()
    local model = engine.model.new({ preset = "tiny", vocab = tokenizer.vocab_size, layers = 1 }, { tokenizer = tokenizer })
    local texts = { "One morning", "the fox went home." }
    local batch = engine.data.batch { tokenizer:encode(texts[1]), tokenizer:encode(texts[2]) }
    local wanted = -model:logprobs(batch):sum():item() / batch.supervised
    expect(eval.perplexity(model, texts).loss).near(wanted, 1e-5)
  end)
  it("refuses what cannot be measured", function()
    expect(function() eval.perplexity(letters(), {}) end).fails "a list with at least one entry, got an empty one"
    expect(function() eval.perplexity(letters(), { "a" }) end).fails "no text has a second token"
    expect(function() eval.perplexity({}, { "ab" }) end).fails "no tokenizer"
    expect(function() eval.perplexity(letters(), { "ab" }, { token = 1 }) end).fails "`token`"
  end)
end)

describe("choices", function()
  it("are ranked by sum and by length", function()
    local result = eval.choices(letters(), {
      -- Sums -3 and -2: the short one wins by sum, the long one by character.
      { prompt = "x", choices = { "aaa", "b" }, answer = 1 },
      { prompt = "x ", choices = { "a", "b" }, answer = 1 },
      { prompt = "x", choices = { "ab", "ba", "é" }, answer = 2 },
    })
    expect(result.count).is(3)
    expect(result.acc).near(1 / 3, 1e-12)
    expect(result.acc_norm).near(2 / 3, 1e-12)
    expect(result.acc_stderr).near(math.sqrt((1 / 3) * (2 / 3) / 2), 1e-12)
    local first, second, third = table.unpack(result.items)
    expect(first.logprobs).is { -3, -2 }
    expect({ first.prediction, first.prediction_norm }).is { 2, 1 }
    expect(first.correct).is(false)
    expect(first.correct_norm).is(true)
    -- The space at the end of the prompt counts with the choice.
    expect(second.logprobs).is { -5, -6 }
    expect(second.tokens).is { 2, 2 }
    -- Equal ones: the first. é is two bytes and one character.
    expect(third.logprobs).is { -3, -3, -8 }
    expect(third.prediction).is(1)
    expect(third.tokens).is { 2, 2, 2 }
  end)
  it("follow conversations too, and batches change nothing", function()
    local items = {}
    for index = 1, 5 do items[index] = { messages = { { role = "user", content = "ab?" } }, choices = { "a", "bb" }, answer = 1 } end
    local model = letters()
    local result = eval.choices(model, items, { tokens = 1 })
    expect(result.acc).is(1.0)
    expect(result.acc_stderr).is(0.0)
    expect(result.items[5].logprobs).is { -1, -4 }
    expect(model.batches).is(10)
  end)
  it("refuse items that are none", function()
    local function fails(item, part) expect(function() eval.choices(letters(), { item }) end).fails(part) end
    fails({ choices = { "a" }, answer = 1 }, "item 1 without")
    fails({ prompt = "x", choices = { "a" }, answer = 2 }, "one of the item's 1 choices, counted from 1, got 2 in item 1")
    fails({ prompt = "x", answer = 1 }, "`choices` should be a list of strings in every item, got nil in item 1")
    fails({ prompt = "x", choices = { "a", "" }, answer = 1 }, "something in it")
    fails({ prompt = "", choices = { "a", "b" }, answer = 1 }, "something before")
  end)
end)

describe("pass@k", function()
  it("is the estimator without bias", function()
    expect(eval.pass_at_k(10, 0, 1)).is(0.0)
    expect(eval.pass_at_k(10, 10, 1)).is(1.0)
    expect(eval.pass_at_k(10, 3, 1)).near(0.3, 1e-12)
    expect(eval.pass_at_k(10, 1, 5)).near(0.5, 1e-12)
    -- 1 - C(8, 3) / C(10, 3) = 1 - 56 / 120
    expect(eval.pass_at_k(10, 2, 3)).near(1 - 56 / 120, 1e-12)
    expect(eval.pass_at_k(5, 3, 3)).is(1.0)
    expect(eval.pass_at_k(2000, 1, 1000)).near(0.5, 1e-9)
  end)
  it("equals the share over all subsets", function()
    local n, c, k, hits, count = 7, 3, 2, 0, 0
    for a = 1, n do
      for b = a + 1, n do
        count = count + 1
        if a <= c or b <= c then hits = hits + 1 end
      end
    end
    expect(eval.pass_at_k(n, c, k)).near(hits / count, 1e-12)
  end)
  it("refuses what cannot be", function()
    expect(function() eval.pass_at_k(4, 2, 5) end).fails "`k` should be from 1 to n, got 5"
    expect(function() eval.pass_at_k(4, 5, 1) end).fails "`c` should be at most n"
    expect(function() eval.pass_at_k(4, -1, 1) end).fails "at least 0"
  end)
end)

--- Says what each record's `says` lists, sample by sample.
local function speaker()
  local model = { calls = {} }
  function model:generate(prompts, options)
    self.calls[#self.calls + 1] = options
    local rollouts = { count = #prompts * options.n, texts = {}, records = {}, lengths = {}, finish = {} }
    for _, prompt in ipairs(prompts) do
      for sample = 1, options.n do
        local index = #rollouts.texts + 1
        rollouts.texts[index] = type(prompt) == "table" and prompt.says[sample] or "echo " .. prompt
        rollouts.records[index], rollouts.lengths[index] = prompt, #rollouts.texts[index]
        rollouts.finish[index] = rollouts.texts[index] == "long" and "length" or "stop_token"
      end
    end
    return rollouts
  end
  return model
end

describe("generated answers", function()
  local problems = {
    { prompt = "1", says = { "1", "2", "1", "long" }, answer = "1", kind = "x" },
    { prompt = "2", says = { "0", "0", "0", "0" }, answer = "2", kind = "x" },
    { prompt = "3", says = { "3", "3", "3", "3" }, answer = "3", kind = "y" },
  }
  it("are counted over samples and prompts", function()
    local model = speaker()
    local result = eval.generate(model, problems, rewards.exact(), { n = 4, temperature = 1, k = { 1, 2, 4 }, by = "kind", seed = 5, max_tokens = 9 })
    expect(result.accuracy).is(0.5)
    expect(result.accuracy_stderr).near(math.sqrt(((0.5 - 0.5) ^ 2 + 0.25 + 0.25) / 2 / 3), 1e-12)
    expect(result.pass_at[1]).is(0.5)
    expect(result.pass_at[2]).near((5 / 6 + 0 + 1) / 3, 1e-12)
    expect(result.pass_at[4]).near(2 / 3, 1e-12)
    expect(result.groups.x.accuracy).is(0.25)
    expect(result.groups.y.count).is(1)
    expect(result.truncated).near(1 / 12, 1e-12)
    expect(result.length).near(15 / 12, 1e-12)
    local first = result.items[1]
    expect(first.texts).is { "1", "2", "1", "long" }
    expect(first.scores).is { 1, 0, 1, 0 }
    expect(first.passes).is(2)
    expect(first.record == problems[1]).is(true)
    expect(result.items[3].finish[1]).is "stop_token"
    -- One call, with nothing of ours in its options.
    expect(#model.calls).is(1)
    expect(model.calls[1].max_tokens).is(9)
    expect(model.calls[1].seed).is(5)
    expect(model.calls[1].by).is(nil)
  end)
  it("are greedy and single by default, of strings too", function()
    local model = speaker()
    local result = eval.generate(model, { "a", "b" }, function(text, record) return text == "echo " .. record.prompt and 0.5 or 0 end, { pass = 0.5 })
    expect(result.accuracy).is(1.0)
    expect(result.score).is(0.5)
    expect(model.calls[1].temperature).is(0)
    expect(result.pass_at[1]).is(1.0)
  end)
  it("come from a real model too", function()
    local model = engine.model.new({ preset = "tiny", vocab = tokenizer.vocab_size, layers = 1 }, { tokenizer = tokenizer })
    local prompts = { "One", { messages = { { role = "user", content = "Hi" } }, answer = "x" } }
    local function checker(text, record, rollout)
      assert(record.answer == "x" or record.prompt == "One")
      return rollout.length == 5 and rollout.finish == "length" and type(text) == "string" and 1 or 0
    end
    local result = eval.generate(model, prompts, checker, { n = 3, max_tokens = 5, temperature = 1, seed = 1 })
    expect(#result.items).is(2)
    expect(result.items[2].lengths).is { 5, 5, 5 }
    expect(result.accuracy).is(result.truncated)
    local again = eval.generate(model, prompts, checker, { n = 3, max_tokens = 5, temperature = 1, seed = 1 })
    expect(again.items[2].texts).is(result.items[2].texts)
    local scores, means = rewards.score(model:generate({ "One", "Two" },
    { n = 2, max_tokens = 4 }), function(_, record) return record == "Two" and 1 or 0 end)
    expect(scores).is { 0, 0, 1, 1 }
    expect(means.reward).is(0.5)
  end)
  it("come down to numbers by name", function()
    local numbers = eval.summary(eval.generate(speaker(), problems, rewards.exact(), { n = 4, by = "kind" }), "test_")
    expect(numbers.test_accuracy).is(0.5)
    expect(numbers["test_pass@4"]).near(2 / 3, 1e-12)
    expect(numbers.test_accuracy_x).is(0.25)
    expect(numbers.test_items).is(nil)
  end)
  it("refuse what cannot be meant", function()
    expect(function() eval.generate(speaker(), {}, rewards.exact()) end).fails "at least one entry"
    expect(function() eval.generate(speaker(), problems, 1) end).fails "a reward"
    expect(function() eval.generate(speaker(), problems, rewards.exact(), { n = 2, k = { 3 } }) end).fails "from 1 to n (2), got 3"
    local short = { generate = function() return { texts = { "one" } } end }
    expect(function() eval.generate(short, problems, rewards.exact()) end).fails "should give 3 texts, got 1"
  end)
end)
