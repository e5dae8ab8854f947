--- Calls every function of the engine with random arguments, most of them wrong. Each must return, or raise an error
--- that begins with a line of this file. Run by tests/lua_fuzz.rs, which also writes targets.lua.
local engine = require "engine"
local targets = require "targets"

local huge = { math.mininteger, math.maxinteger, 1 << 31, 1 << 40, -(1 << 40), 1e300, -1e300, 0 / 0, 1 / 0, -1 / 0, 1e-300 }
local small = { 0, 1, 2, 3, 4, 5, 7, 33, -1, -2, -3, 0.5, 2.5, -0.5, 1.0 }
local strings = {
  "", "a", "f32", "bf16", "i32", "i8", "f64", "train", "validation", "adamw", "muon", "windows", "concat", "best_fit", "line", "tiny",
  "0.5B", "72B", "sub/x", "../up", "no/such/folder", "saved", "some.txt", "some.jsonl", "bad.jsonl", ".", "\xff\xfe", "nul\0byte", "a\nb",
  "<|im_start|>", "é中🌙", ("long"):rep(300), "model.norm.weight", "lm_head.weight", "paragraph", "user", "integer", "text",
}
local option_names = {
  "dtype", "frozen", "recompute", "tokenizer", "keepdim", "correction", "step", "seed", "seq_len", "how", "pool", "lr", "betas",
  "eps", "weight_decay", "decay_vectors", "clip_norm", "moments", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop",
  "max_tokens", "normalizer", "router_aux_loss_coef", "min", "max", "descending", "largest", "skip_special", "specials",
  "generation_prompt", "vocab_size", "document", "field", "skip_bad", "steps", "epochs", "over", "name", "args", "run", "help",
  "choices", "vocab", "hidden", "layers", "heads", "kv_heads", "intermediate", "experts", "head_dim", "preset", "role", "content",
  "rope_theta", "rms_norm_eps", "max_positions", "loss", "type", "default", "eos", "tied", "sliding_window", "rope_scaling",
}

local function pick(list) return list[math.random(#list)] end

local function file(name, text)
  local out <close> = assert(io.open(name, "w"))
  out:write(text)
end

--- Objects of every class by name of the class, small, so that each call is quick.
local function objects(run, step)
  file("some.txt", ("the moon is near\n\n"):rep(40))
  file("some.jsonl", ('{"text": "near", "n": 1}\n'):rep(9))
  file("bad.jsonl", '{"text": "near"}\n{"text": }\n\xff\n{"messages": 3}\n')
  local bytes = engine.tokenizer.bytes()
  local shape = {
    vocab = bytes.vocab_size, hidden = 16, layers = 1, heads = 2, kv_heads = 1, intermediate = 8, max_positions = 24,
  }
  local model = engine.model.new(shape, { tokenizer = bytes })
  local tensor = engine.tensor
  local text = engine.data.text("some.txt", { document = "line" })
  local packed = text:tokenizer(bytes):pack { seq_len = 8 }
  return {
    Declaration = { engine.required "string", engine.optional "integer" },
    Batch = { engine.data.batch { { 1, 2, 3 }, { 4 } }, engine.data.batch {}, engine.data.batch { { 1 << 20 } }, packed:take(2) },
    Data = {
      text, packed, engine.data.jsonl "some.jsonl", engine.data.jsonl "bad.jsonl", engine.data.jsonl("bad.jsonl", { skip_bad = true }),
      packed:forever(), text:shuffle(), engine.data.text "missing.txt", engine.data.text {}, text:split("train", 0.5),
    },
    Step = { step },
    Model = { model, engine.model.new(shape, { frozen = true }), engine.model.new(shape, { dtype = "bf16" }) },
    Optimizer = { engine.optim.adamw(model, { lr = 1e-3 }), engine.optim.muon(model, { lr = 1e-3 }) },
    Rollouts = {
      model:generate({ "near", "the" }, { n = 2, max_tokens = 3, top_logprobs = 2 }), model:generate({}, { n = 1 }),
      model:generate({ "a" }, { max_tokens = 1 }):select {},
    },
    Run = { run },
    Tensor = {
      tensor.ones {}, tensor.zeros { 0 }, tensor.zeros { 2, 0, 3 }, tensor.randn { 7 }, tensor.randn { 2, 3 },
      tensor.randn({ 3, 2 }, { dtype = "bf16" }), tensor.new({ 0, 1, 2 }, { dtype = "i32" }),
      tensor.new({ -1, 5, 1 << 30 }, { dtype = "i32" }), tensor.new({ 1, -128 }, { dtype = "i8" }),
      tensor.randn({ 2, 3 }):requires_grad(), tensor.randn({ 2, 3 }):requires_grad() * 2, tensor.full({ 3 }, 0 / 0),
      tensor.full({ 2, 2 }, 1 / 0), tensor.randn { 1, 2, 3, 4 },
    },
    Tokenizer = { bytes, engine.tokenizer.train(text, { vocab_size = 270 }) },
    Workflow = { engine.workflow { name = "inner", run = print } },
  }
end

return engine.workflow {
  name = "calls",
  args = { calls = { 1000, min = 1 } },
  run = function(run, args)
    local last = assert(io.open("last_call.txt", "w"))
    for step in run:loop("calls", { steps = 1 }) do
      local known = objects(run, step)
      local classes = {}
      for class in pairs(known) do classes[#classes + 1] = class end
      table.sort(classes)
      local cyclic = {}
      cyclic[1], cyclic.self = cyclic, cyclic

      local value
      local function list(depth)
        local items = {}
        for index = 1, math.random(0, 4) do items[index] = value(depth + 1) end
        return items
      end
      local function options(depth)
        local items = {}
        for _ = 1, math.random(0, 3) do items[pick(option_names)] = value(depth + 1) end
        return items
      end
      local makers = {
        function() return pick(small) end, function() return pick(small) end, function() return pick(huge) end,
        function() return pick(strings) end, function() return pick(strings) end,
        function() return pick(known[pick(classes)]) end, function() return pick(known.Tensor) end,
        list, list, options, options,
        function() return { pick(small), pick(small) } end, function() return { pick(huge), pick(small) } end,
        function() return math.random() < 0.5 end, function() return nil end, function() return cyclic end,
        function() return pick { print, error, function() error("mine") end, function() return 1, 2 end, coroutine.create(print) } end,
        function() return setmetatable({}, { __index = function() error("from the index") end }) end,
      }
      function value(depth) return depth > 3 and pick(small) or pick(makers)(depth) end

      local function text_of(given)
        if type(given) == "string" then return ("%q"):format(given:sub(1, 60)) end
        if type(given) ~= "table" or given == cyclic then return tostring(given):sub(1, 60) end
        local parts = {}
        for key, inner in next, given do parts[#parts + 1] = tostring(key) .. " = " .. text_of(inner) end
        return "{ " .. table.concat(parts, ", ") .. " }"
      end
      local function note(name, given, count)
        local parts = {}
        for index = 1, count do parts[index] = text_of(given[index]) end
        last:seek("set")
        last:write(name, "(", table.concat(parts, ", "), ")", (" "):rep(400), "\n")
        last:flush()
      end
      local returned, raised, called, wrong = 0, 0, {}, {}
      local function try(name, given, count, body)
        note(name, given, count)
        local results = table.pack(pcall(body, table.unpack(given, 1, count)))
        if results[1] then
          returned = returned + 1
          local made = results[2]
          -- What comes out goes in again, as long as it is small.
          if name == "Run:loop" then local _ <close> = results[5] end
          local ok, size = pcall(function() return made.rank and made.count end)
          if ok and size and size <= 512 then known.Tensor[math.random(15, 40)] = made end
          for index = 15, 40 do known.Tensor[index] = known.Tensor[index] or known.Tensor[1] end
        else
          raised = raised + 1
          local message = results[2]
          local is_fine = message == "nil" or type(message) == "string" and message:find("^calls%.lua:%d+: ") and #message < 1500 and not message:find "%[C%]"
          -- `error` as a callback raises what it is given.
          if not is_fine and not (message == nil or type(message) ~= "string") then wrong[#wrong + 1] = name .. " says: " .. message:sub(1, 600) end
        end
      end
      local operators = {
        function(a, b) return a + b end, function(a, b) return a - b end, function(a, b) return a * b end,
        function(a, b) return a / b end, function(a, b) return a // b end, function(a, b) return a % b end,
        function(a, b) return a ^ b end, function(a, b) return a .. b end, function(a, b) return a == b end,
        function(a, b) return a < b end, function(a) return -a end, function(a) return #a end, function(a) return tostring(a) end,
        function(a, b) return a[b] end, function(a, b) a[b] = 1 end, function(a) return a() end,
      }
      for index = 1, args.calls do
        -- First every function once, then any.
        local target = targets[index] or pick(targets)
        local given, count = {}, math.max(0, target.params + math.random(-1, 1))
        if math.random() < 0.6 then count = target.params end
        for at = 1, count do given[at] = value(1) end
        local name = (target.class or target.space) .. (target.class and ":" or ".") .. target.name
        called[name] = true
        if target.class then
          local object = math.random() < 0.95 and pick(known[target.class]) or value(1)
          local method = pick(known[target.class])[target.name]
          try(name, given, count, function(...) return method(object, ...) end)
        else
          local space = target.space == "" and engine or engine[target.space]
          try(name, given, count, space[target.name])
        end
        if index % 4 == 0 then
          local which = math.random(#operators)
          try("operator " .. which, { pick(known[pick(classes)]), value(1) }, 2, operators[which])
        end
        if index % 64 == 0 then collectgarbage() end
      end
      if #wrong > 0 then error(("%d messages without a line, such as\n%s"):format(#wrong, table.concat(wrong, "\n", 1, math.min(#wrong, 12)))) end
      local count = 0
      for _ in pairs(called) do count = count + 1 end
      if args.calls >= #targets then assert(count == #targets, "a name is listed twice") end
      print(("%d returned, %d raised; every function was called"):format(returned, raised))
    end
  end,
}
