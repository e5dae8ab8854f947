--- How good a model is, measured on what it was not trained on: the loss of a data set, perplexity of texts, multiple choice by
--- log-likelihood, and answers that it generates and something checks.
---
---     local loss, count = eval.loss(model, held_out:epochs(1))
---     local result = eval.generate(model, problems, rewards.numeric(), { max_tokens = 64 })
---     print(result.accuracy, result.items[1].texts[1])
---
--- All but `loss` return one table: numbers about all items, and in `items` a record for each, so that what a number hides can be read.
--- `eval.summary` keeps the numbers alone, for step:log and std.report. They are the same functions for a base model, an SFT model and
--- one after RL. Nothing is recorded for a backward pass, and no weights change.
---
--- `loss` reads a data set to its end from where it stands: give `data:epochs(1)`, which begins anew, to look at the same text each time.

local engine, check = require "engine", require("std.options").check
local data, tensor = engine.data, engine.tensor

local eval = {}

local function wrong(name, argument, expected, got)
  error(("std.eval.%s: `%s` should be %s, got %s"):format(name, argument, expected, tostring(got)), 3)
end

local function count_of(name, options, key, default)
  local value = options[key] or default
  if math.type(value) ~= "integer" or value < 1 then
    error(("std.eval.%s: `%s` should be an integer of at least 1, got %s"):format(name, key, tostring(value)), 3)
  end
  return value
end

local function list_of(name, argument, value)
  if type(value) ~= "table" or #value == 0 then
    local got = type(value) == "table" and "an empty one" or type(value)
    error(("std.eval.%s: `%s` should be a list with at least one entry, got %s"):format(name, argument, got), 3)
  end
  return value
end

local function tokenizer_of(name, model)
  if not model.tokenizer then error(("std.eval.%s: the model has no tokenizer; give one where it is made or loaded"):format(name), 3) end
  return model.tokenizer
end

--- The log-probability of each token but the first, for lists of token ids: computed in batches of about `budget` tokens.
local function token_logprobs(model, documents, budget)
  local results, from = {}, 1
  while from <= #documents do
    local batch, places, tokens, to = {}, {}, 0, from
    while to <= #documents and (to == from or tokens + #documents[to] <= budget) do
      -- One token alone has nothing that it could be predicted from.
      if #documents[to] > 1 then
        batch[#batch + 1], places[#places + 1] = documents[to], { to = to, offset = tokens }
        tokens = tokens + #documents[to]
      else
        results[to] = {}
      end
      to = to + 1
    end
    if #batch > 0 then
      local values = tensor.no_grad(function() return model:logprobs(data.batch(batch)):to_table() end)
      for index, place in ipairs(places) do
        -- Position t holds the log-probability of token t + 1; the last of a document holds none.
        results[place.to] = table.move(values, place.offset + 1, place.offset + #batch[index] - 1, 1, {})
      end
    end
    from = to
  end
  return results
end

local function sum_of(values)
  local sum = 0.0
  for _, value in ipairs(values) do sum = sum + value end
  return sum
end

--- The mean of numbers, and its standard error: of the sample, n - 1 below.
local function mean_of(values)
  local count = #values
  local mean = sum_of(values) / count
  local squares = 0.0
  for _, value in ipairs(values) do squares = squares + (value - mean) ^ 2 end
  return mean, count > 1 and math.sqrt(squares / (count - 1) / count) or 0.0
end

--- Mean negative log-likelihood of the rest of `data`, in nats a token: -1/N sum log p(token | those before it), in which every
--- supervised token counts once, whatever the sizes of batches. Its exponential is the perplexity.
---@param model engine.Model
---@param data engine.Data packed; read to its end
---@param options? { rows?: integer } rows of a batch, default 16
---@return number? loss nil if nothing in the data is supervised
---@return integer count tokens that were counted
function eval.loss(model, data, options)
  local rows = count_of("loss", check("std.eval.loss", options, { "rows" }), "rows", 16)
  return tensor.no_grad(function()
    local sum, count = 0.0, 0
    for batch in function() return data:take(rows) end do
      sum = sum - model:logprobs(batch):sum():item()
      count = count + batch.supervised
    end
    return count > 0 and sum / count or nil, count
  end)
end

--- The perplexity of texts: exp of the mean negative log-likelihood of their tokens, each text by itself. The first token of a text has
--- nothing in front and does not count. Bits per byte, which do not depend on the tokenizer, count the bytes of whole texts.
---
--- Each item: `text`, `tokens` (that count), `loss`, `perplexity`.
---
--- Example: print(eval.perplexity(model, { "One morning the fox went to the mill." }).perplexity)
---@param model engine.Model
---@param texts string[]
---@param options? { tokens?: integer } tokens of a batch, default 4096; a longer text is a batch of its own
---@return { perplexity: number, loss: number, bits_per_byte: number, tokens: integer, count: integer, items: table[] } result
function eval.perplexity(model, texts, options)
  options = options or {}
  check("std.eval.perplexity", options, { "tokens" })
  list_of("perplexity", "texts", texts)
  local tokenizer, documents, bytes = tokenizer_of("perplexity", model), {}, 0
  for index, text in ipairs(texts) do
    documents[index] = tokenizer:encode(text)
    bytes = bytes + #text
  end
  local logprobs = token_logprobs(model, documents, count_of("perplexity", options, "tokens", 4096))
  local items, sum, tokens = {}, 0.0, 0
  for index, text in ipairs(texts) do
    local own, count = -sum_of(logprobs[index]), #logprobs[index]
    local loss = count > 0 and own / count or nil
    items[index] = { text = text, tokens = count, loss = loss, perplexity = loss and math.exp(loss) }
    sum, tokens = sum + own, tokens + count
  end
  if tokens == 0 then error("std.eval.perplexity: no text has a second token", 2) end
  return {
    perplexity = math.exp(sum / tokens), loss = sum / tokens, bits_per_byte = sum / math.log(2) / bytes,
    tokens = tokens, count = #texts, items = items,
  }
end

--- Ids of an item's prompt followed by a choice, and how many of them are the choice's.
local function choice_ids(tokenizer, item, choice)
  if item.messages then
    local prompt = tokenizer:encode(tokenizer:chat(item.messages, { generation_prompt = true }), { specials = true })
    local ids = tokenizer:encode(choice)
    return table.move(ids, 1, #ids, #prompt + 1, prompt), #ids
  end
  -- Space at the end of a prompt belongs to the word that follows, as tokenizers see it.
  local prompt, space = item.prompt:match "^(.-)(%s*)$"
  local whole, before = tokenizer:encode(prompt .. space .. choice), #tokenizer:encode(prompt)
  return whole, #whole - before
end

--- The index of the largest value; the first of equals.
local function best(values)
  local index = 1
  for candidate = 2, #values do
    if values[candidate] > values[index] then index = candidate end
  end
  return index
end

--- Multiple choice by log-likelihood: each choice is read behind the prompt, and the likeliest is the model's answer. `acc` takes the
--- sum of the log-probabilities of a choice, `acc_norm` that sum divided by the characters of the choice, so that long ones stand a
--- chance. Both as lm-evaluation-harness defines them, its moving of spaces from the prompt to the choice too.
---
--- An item of `items` has `prompt` (a string) or `messages`, `choices`, and in `answer` the number of the right one, from 1. In the
--- result each has `logprobs` (a sum for each choice), `tokens`, `prediction`, `prediction_norm`, `correct`, `correct_norm`.
---
--- Example: eval.choices(model, { { prompt = "The sky is", choices = { " blue", " square" }, answer = 1 } }).acc
---@param model engine.Model
---@param items { prompt?: string, messages?: table[], choices: string[], answer: integer }[]
---@param options? { tokens?: integer } tokens of a batch, default 4096
---@return { acc: number, acc_stderr: number, acc_norm: number, acc_norm_stderr: number, count: integer, items: table[] } result
function eval.choices(model, items, options)
  options = options or {}
  check("std.eval.choices", options, { "tokens" })
  list_of("choices", "items", items)
  local tokenizer, documents, lengths = tokenizer_of("choices", model), {}, {}
  for index, item in ipairs(items) do
    if type(item.prompt) ~= "string" and type(item.messages) ~= "table" then
      wrong("choices", "items", "items with a prompt or messages", ("item %d without"):format(index))
    end
    if type(item.choices) ~= "table" then
      wrong("choices", "choices", "a list of strings in every item", ("%s in item %d"):format(type(item.choices), index))
    elseif not item.choices[item.answer] then
      local expected = ("the number of one of the item's %d choices, counted from 1"):format(#item.choices)
      wrong("choices", "answer", expected, ("%s in item %d"):format(tostring(item.answer), index))
    end
    for _, choice in ipairs(item.choices) do
      local ids, count = choice_ids(tokenizer, item, choice)
      if count < 1 or count >= #ids then
        local got = ("%q after %q in item %d"):format(choice, item.prompt or "the messages", index)
        wrong("choices", "items", "items with something before each choice and something in it", got)
      end
      documents[#documents + 1], lengths[#lengths + 1] = ids, count
    end
  end
  local logprobs = token_logprobs(model, documents, count_of("choices", options, "tokens", 4096))
  local results, hits, hits_norm, at = {}, {}, {}, 0
  for index, item in ipairs(items) do
    local sums, norms, tokens = {}, {}, {}
    for number, choice in ipairs(item.choices) do
      at = at + 1
      local values, count = logprobs[at], lengths[at]
      sums[number] = sum_of(table.move(values, #values - count + 1, #values, 1, {}))
      norms[number], tokens[number] = sums[number] / math.max(utf8.len(choice) or #choice, 1), count
    end
    local record = {
      prompt = item.prompt, messages = item.messages, choices = item.choices, answer = item.answer, logprobs = sums, tokens = tokens,
      prediction = best(sums), prediction_norm = best(norms),
    }
    record.correct, record.correct_norm = record.prediction == item.answer, record.prediction_norm == item.answer
    results[index], hits[index], hits_norm[index] = record, record.correct and 1 or 0, record.correct_norm and 1 or 0
  end
  local acc, acc_stderr = mean_of(hits)
  local acc_norm, acc_norm_stderr = mean_of(hits_norm)
  return { acc = acc, acc_stderr = acc_stderr, acc_norm = acc_norm, acc_norm_stderr = acc_norm_stderr, count = #items, items = results }
end

--- The chance that at least one of k samples passes, estimated without bias from c passes among n: 1 - C(n - c, k) / C(n, k).
--- Source: Chen et al., arXiv 2107.03374, section 2.1.
---
--- Example: assert(eval.pass_at_k(10, 1, 5) == 0.5)
---@param n integer samples
---@param c integer of them that pass
---@param k integer at most n
---@return number chance
function eval.pass_at_k(n, c, k)
  for name, value in pairs { n = n, c = c, k = k } do
    if math.type(value) ~= "integer" or value < 0 then wrong("pass_at_k", name, "an integer of at least 0", value) end
  end
  if k < 1 or k > n then wrong("pass_at_k", "k", "from 1 to n", k) end
  if c > n then wrong("pass_at_k", "c", "at most n", c) end
  if n - c < k then return 1.0 end
  -- As a product: the binomials of hundreds of samples overflow.
  local fails = 1.0
  for i = n - c + 1, n do fails = fails * (1 - k / i) end
  return 1 - fails
end

--- Options of eval.generate itself; all others are model:generate's.
local OWN = { k = true, pass = true, by = true }

--- The options that go on to model:generate.
local function generation_options(options)
  local passed_on = { n = 1, temperature = 0 }
  for key, value in pairs(options) do
    if not OWN[key] then passed_on[key] = value end
  end
  return passed_on
end

--- Accuracies of the items that share a value of `field` in their record.
local function groups_of(items, field)
  local lists, groups = {}, {}
  for _, item in ipairs(items) do
    local value = type(item.record) == "table" and item.record[field] or nil
    if value ~= nil then
      lists[tostring(value)] = lists[tostring(value)] or {}
      table.insert(lists[tostring(value)], item.passes / #item.texts)
    end
  end
  for name, list in pairs(lists) do groups[name] = { accuracy = (mean_of(list)), count = #list } end
  return groups
end

--- Lets the model answer each prompt `n` times and checks the answers. A prompt is a string, a list of messages, or a record with
--- `prompt` or `messages` and what the checker compares with. An answer passes if the checker, a reward, gives at least `pass` (1).
--- Greedy unless options say else; `n`, `max_tokens`, `temperature`, `seed`, `stop` and others go to model:generate.
---
--- `accuracy` is the share of all samples that pass, with its standard error over prompts; `pass_at` holds pass@k for each of `k` ({ 1 }
--- and n). `groups` are accuracies by the record's field `by`. Each item has `record`, `texts`, `scores`, `passes`, `lengths`, `finish`.
---
--- Example: eval.generate(model, problems, rewards.numeric(), { n = 8, temperature = 1, max_tokens = 64, k = { 1, 8 }, by = "kind" })
---@param model engine.Model
---@param prompts (string|table)[]
---@param checker std.Reward
---@param options? { k?: integer[], pass?: number, by?: string, n?: integer, max_tokens?: integer, temperature?: number, [string]: any }
---@return { accuracy: number, accuracy_stderr: number, score: number, length: number?, truncated: number?, pass_at: table<integer, number>, count: integer, groups: table?, items: table[] } result
function eval.generate(model, prompts, checker, options)
  options = options or {}
  list_of("generate", "prompts", prompts)
  if type(checker) ~= "function" then wrong("generate", "checker", "a reward: a function of text and record", type(checker)) end
  local rewards, pass, n = require "std.rewards", options.pass or 1, count_of("generate", options, "n", 1)
  local ks = options.k or (n > 1 and { 1, n } or { 1 })
  for _, k in ipairs(ks) do
    if math.type(k) ~= "integer" or k < 1 or k > n then wrong("generate", "k", ("a list of integers from 1 to n (%d)"):format(n), k) end
  end
  if #prompts > 0 then rewards.probe({ prompts[1] }, checker) end
  local rollouts = model:generate(prompts, generation_options(options))
  local texts, lengths, finish, records = rollouts.texts, rollouts.lengths, rollouts.finish, {}
  if #texts ~= #prompts * n then
    error(("std.eval.generate: %d prompts of %d samples should give %d texts, got %d"):format(#prompts, n, #prompts * n, #texts), 2)
  end
  for index = 1, #texts do
    -- Samples of a prompt stand side by side.
    local prompt = prompts[(index - 1) // n + 1]
    records[index] = type(prompt) == "table" and prompt or { prompt = prompt }
  end
  local scores = rewards.score({ texts = texts, records = records, lengths = lengths, finish = finish }, checker):to_table()
  local items = {}
  for index = 1, #prompts do
    local first = (index - 1) * n + 1
    local function own(list) return list and table.move(list, first, first + n - 1, 1, {}) end
    local item = { record = records[first], texts = own(texts), scores = own(scores), lengths = own(lengths), finish = own(finish) }
    item.passes = 0
    for _, score in ipairs(item.scores) do
      if score >= pass then item.passes = item.passes + 1 end
    end
    items[index] = item
  end
  return eval.totals(items, n, ks, options.by)
end

--- The numbers about items that eval.generate makes: for items that were collected otherwise.
---
--- Example: local result = eval.totals(items, 8, { 1, 8 })
---@param items { record: table, texts: string[], scores: number[], passes: integer, lengths?: integer[], finish?: string[] }[]
---@param n integer samples of each item
---@param ks integer[]
---@param by? string a field of records
---@return table result as of eval.generate
function eval.totals(items, n, ks, by)
  local shares, scores, lengths, cut = {}, {}, {}, {}
  for index, item in ipairs(items) do
    shares[index] = item.passes / n
    for sample = 1, n do
      scores[#scores + 1] = item.scores[sample]
      if item.lengths then lengths[#lengths + 1] = item.lengths[sample] end
      if item.finish then cut[#cut + 1] = item.finish[sample] == "length" and 1 or 0 end
    end
  end
  local accuracy, accuracy_stderr = mean_of(shares)
  local result = { accuracy = accuracy, accuracy_stderr = accuracy_stderr, score = (mean_of(scores)), count = #items, items = items }
  result.pass_at = {}
  if #lengths > 0 then result.length = (mean_of(lengths)) end
  if #cut > 0 then result.truncated = (mean_of(cut)) end
  for _, k in ipairs(ks) do
    local chances = {}
    for index, item in ipairs(items) do chances[index] = eval.pass_at_k(n, item.passes, k) end
    result.pass_at[k] = (mean_of(chances))
  end
  if by then result.groups = groups_of(items, by) end
  return result
end

--- The numbers of a result by name, flat, without its items: `pass@8`, `accuracy_sum` for a group.
---
--- Example: step:log(eval.summary(result))
---@param result table of one of these functions
---@param prefix? string put in front of each name
---@return table<string, number> numbers
function eval.summary(result, prefix)
  local numbers = {}
  prefix = prefix or ""
  for name, value in pairs(result) do
    if type(value) == "number" then numbers[prefix .. name] = value end
  end
  for k, value in pairs(result.pass_at or {}) do numbers[("%spass@%d"):format(prefix, k)] = value end
  for name, group in pairs(result.groups or {}) do numbers[prefix .. "accuracy_" .. name] = group.accuracy end
  return numbers
end

return eval
