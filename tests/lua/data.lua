--- Data sets that scripts make of their own records, and the batches they give.
local engine, harness = require "engine", require "harness"
local data, describe, it, expect = engine.data, harness.describe, harness.it, harness.expect
local tokenizer = engine.tokenizer.bytes()

describe("batches of ids", function()
  it("have labels where the mask says", function()
    local batch = data.batch { { tokens = { 5, 6, 7 }, mask = { 0, 1, 0 } }, { tokens = { 8, 9 }, mask = { true, true } }, { 1, 2 } }
    expect(batch.labels).is { 6, -100, -100, 9, -100, 2, -100 }
    expect(batch.sequence).is { 0, 0, 0, 1, 1, 2, 2 }
    expect({ batch.documents, batch.supervised }).is { 3, 3 }
    expect(data.batch({ { tokens = { 5, 6 } } }).labels).is { 6, -100 }
    local mask = engine.tensor.new({ 0, 0 }, { dtype = "i32" })
    expect(data.batch({ { tokens = engine.tensor.new({ 5, 6 }, { dtype = "i32" }), mask = mask } }).labels).is { -100, -100 }
  end)
  it("refuse masks that do not fit", function()
    expect(function() data.batch { { tokens = { 5, 6 }, mask = { 1 } } } end).fails "should be 2 of 0 and 1"
    expect(function() data.batch { { tokens = { 5 }, mask = { 2 } } } end).fails "an entry that is 2"
    expect(function() data.batch { { tokens = { 5 }, maks = { 1 } } } end).fails "`maks`"
  end)
  it("add up by document", function()
    local batch = data.batch { { 5, 6, 7 }, { 8 }, { 9, 9 } }
    expect(engine.tensor.arange(0, 6):segment_sum(batch.sequence, batch.documents)).is { 3, 3, 9 }
  end)
end)

describe("records", function()
  local records = { { prompt = "a", chosen = "b", rejected = "cc", n = 1 }, { prompt = "d", chosen = "e", rejected = "ff", n = 2 } }
  it("come back as they were, and again each epoch", function()
    local set = data.records(records):epochs(2)
    expect(set:documents()).is(2)
    local taken = set:take(9)
    expect(#taken).is(4)
    expect({ taken[1].chosen, taken[4].n }).is { "b", 2 }
    expect(set:take(1)).is(nil)
  end)
  it("are pairs", function()
    local set = data.records(records):pairs(tokenizer)
    local batch = set:take(2)
    expect({ batch.documents, batch.rows, batch.supervised }).is { 4, 2, 2 + 3 + 2 + 3 }
    expect(set:take(1)).is(nil)
    expect(function() data.records(records):pairs(tokenizer):pack({ seq_len = 9 }):take(1) end).fails "two documents a pair"
  end)
  it("are prompts, by length", function()
    local long = { prompt = ("x"):rep(500), n = 3 }
    local set = data.records({ long, records[1] }):prompts(tokenizer, { max_tokens = 200 })
    local taken = set:take(5)
    expect({ #taken, taken[1].n, set:counts().long }).is { 1, 1, 1 }
    expect(function() data.records({ long }):prompts(tokenizer, { max_tokens = 200, long = "error" }):take(1) end).fails "record 1, max_tokens"
  end)
  it("are conversations, counted where they are cut", function()
    local chats = { { messages = { { role = "user", content = "a" }, { role = "assistant", content = ("b"):rep(300) } } } }
    local set = data.records(chats):chat(tokenizer, { max_tokens = 150 }):pack { how = "whole" }
    expect(set:take(1).count).is(150)
    local counts = set:counts()
    expect({ counts.bad, counts.cut, counts.long }).is { 0, 1, 0 }
  end)
  it("are written whole and read back", function()
    local path = os.tmpname()
    data.write_jsonl(path, records)
    local taken = data.jsonl(path):take(9)
    expect({ #taken, taken[2].rejected, taken[1].n }).is { 2, "ff", 1 }
    data.write_jsonl(path, { { scores = { 1, nil, 3 } } })
    expect(data.jsonl(path):take(1)[1].scores[3]).is(3)
    os.remove(path)
  end)
  it("are written to a bare name, which lies in the working folder", function()
    local name = "write-jsonl-test.tmp"
    local ok, message = pcall(data.write_jsonl, name, records)
    os.remove(name)
    expect(message).is(nil)
    expect(ok).is(true)
  end)
  it("make a tokenizer, whose room is what they fill and not what is asked for", function()
    local texts = data.records { { text = "abab" } }
    expect(engine.tokenizer.train(texts, { vocab_size = 1 << 40 }).vocab_size).is(260)
  end)
  it("are mixed where they become batches in one way", function()
    local one, two = data.records(records), data.records(records)
    local batch = data.mix({ { one:pairs(tokenizer), 1 }, { two:pairs(tokenizer), 1 } }):take(2)
    expect(batch.documents).is(4)
    local mixed = function() return data.mix { { one:pairs(tokenizer), 1 }, { two, 1 } } end
    expect(mixed).fails "the same tokenizer, chat, pairs, prompts and packing"
    expect(function() one:split("train", 0.5):split("train", 0.5) end).fails "not split yet"
  end)
  it("must be plain and named", function()
    expect(function() data.records { { n = 1 }, { 1, 2 } } end).fails "records[2]` should be a table with names"
    expect(function() data.records { { f = "h\xC3" } } end).fails "plain data, got text that is not UTF-8"
    expect(function() data.records { { f = print } } end).fails "records[1]` should be plain data"
    expect(function() data.records { { f = { 0 / 0 } } } end).fails "which JSON does not have, at [1], at `f`"
    expect(function() data.records { { f = { 1, a = 2 } } } end).fails "a list with the name `a` beside its entries, at `f`"
    expect(function() data.records { { f = { [2 ^ 40 // 1 | 0] = 1 } } } end).fails "a list of 1 entries up to [1099511627776]"
    expect(function() data.records { { f = "\xff" } } end).fails "text that is not UTF-8, at `f`"
    expect(function() data.records { n = 1 } end).fails "a list of tables"
    expect(function() data.write_jsonl("x.jsonl", { {} }) end).fails "a table with names"
    expect(function() data.records({}):take(1) end).fails "none in a list of records"
  end)
end)

describe("conversations", function()
  local chat = { { role = "user", content = "a" }, { role = "assistant", content = "b" } }
  it("become a batch", function()
    local batch = data.chat_batch(tokenizer, { chat, { messages = chat }, { prompt = "a", completion = "b" } })
    expect({ batch.documents, batch.supervised }).is { 3, 6 }
  end)
  it("say which one is wrong", function()
    expect(function() data.chat_batch(tokenizer, { chat, { { role = "user", content = "a" } } }) end).fails "conversations[2].messages"
    expect(function() data.chat_batch(tokenizer, { "a" }) end).fails "conversations[1]` should be a list of messages"
    expect(function() data.chat_batch(tokenizer, { chat }, { max_tokens = 5 }) end).fails "fits 5 tokens"
    expect(function() data.chat_batch(tokenizer, { chat }, { lern = "all" }) end).fails "`lern`"
    expect(function() data.records({ { messages = chat } }):chat(tokenizer, { learn = "first" }) end).fails "\"all\" or \"last\""
    expect(function() data.records({ { messages = chat } }):chat(tokenizer, { long = "fold" }) end).fails "\"cut\", \"skip\" or \"error\""
    expect(function() data.jsonl("x"):pack { seq_len = 5, how = "whole" } end).fails "left out"
  end)
  it("show their tools, in one order", function()
    local tools = { { type = "function", ["function"] = { name = "f", parameters = { b = 1, a = 2 } } } }
    local text = tokenizer:chat(chat, { tools = tools })
    local shown = '{"type": "function", "function": {"name": "f", "parameters": {"a": 2, "b": 1}}}'
    expect(text:find(shown, 1, true) ~= nil).is(true)
    expect(tokenizer:chat(chat, { tools = "[" .. shown .. "]" })).is(text)
    local model = engine.model.new({ vocab = 259, hidden = 8, layers = 1, heads = 1, kv_heads = 1, intermediate = 8 }, { tokenizer = tokenizer })
    for _, record in ipairs { { messages = { chat[1] }, tools = tools }, { prompt = { chat[1] }, tools = "[" .. shown .. "]" } } do
      local prompt = tokenizer:decode(model:generate({ record }, { max_tokens = 1 }):prompt(1))
      expect(prompt).is(tokenizer:chat({ chat[1] }, { tools = tools, generation_prompt = true }))
    end
    expect(function() model:generate({ { question = "1+1", answer = "2" } }) end).fails "got a record with only answer, question"
    expect(function() model:generate({ { messages = { chat[1] }, tools = 3 } }) end).fails "a list of tools, or its JSON"
    expect(tokenizer:chat(chat, { tools = {} })).is(tokenizer:chat(chat))
    expect(function() tokenizer:chat(chat, { tools = "f" }) end).fails "a list of tools, or its JSON"
  end)
end)
