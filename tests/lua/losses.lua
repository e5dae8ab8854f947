--- std.losses and std.schedules against numbers worked out by hand.
local engine, losses, schedules, harness = require "engine", require "std.losses", require "std.schedules", require "harness"
local tensor, describe, it, expect = engine.tensor, harness.describe, harness.it, harness.expect

describe("losses", function()
  local a, b = tensor.new { 1, 2, 3 }, tensor.new { 1, 4, 0 }
  it("mse", function()
    expect(losses.mse(a, b):item()).near(13 / 3, 1e-6)
    expect(losses.mse(a, b, { reduction = "none" })).is { 0, 4, 9 }
    expect(losses.mse(a, b, { mask = tensor.new { 1, 1, 0 } }):item()).is(2.0)
    expect(losses.mse(a, b, { mask = tensor.zeros { 3 } }):item()).is(0.0)
  end)
  it("huber", function() expect(losses.huber(a, b, { reduction = "none" })).is { 0, 1.5, 2.5 } end)
  it("bce", function()
    -- log 2 at 0; softplus(2) - 2 = 0.126928; softplus(-100) = 0.
    local loss = losses.bce(tensor.new { 0, 2, -100 }, tensor.new { 1, 1, 0 }, { reduction = "none" })
    expect(loss).near({ math.log(2), 0.126928, 0 }, 1e-6)
  end)
  it("cross entropy", function()
    local logits = tensor.new({ { 0, 0 }, { 2, 0 }, { 1, 1 } }):requires_grad()
    local labels = tensor.new({ 0, 1, -100 }, { dtype = "i32" })
    local loss = losses.cross_entropy(logits, labels)
    expect(loss:item()).near((math.log(2) + 2.126928) / 2, 1e-6)
    loss:backward()
    expect(logits.grad:select(0, 0)).near({ -0.25, 0.25 }, 1e-6)
    expect(logits.grad:select(0, 2)).is { 0, 0 }
    local smooth = losses.cross_entropy(tensor.zeros { 1, 4 }, tensor.zeros({ 1 }, { dtype = "i32" }), { label_smoothing = 0.1 })
    expect(smooth:item()).near(math.log(4), 1e-6)
  end)
  it("nll counts what the mask counts, over a normalizer if there is one", function()
    local logprobs, mask = tensor.new({ -1, -2, -4 }):requires_grad(), tensor.new { 1, 0, 1 }
    expect(losses.nll(logprobs, mask):item()).is(2.5)
    expect(losses.nll(logprobs, mask, { normalizer = 10 }):item()).near(0.5, 1e-6)
    expect(losses.nll(logprobs, tensor.zeros { 3 }):item()).near(0, 0)
    losses.nll(logprobs, mask, { normalizer = 4 }):backward()
    expect(logprobs.grad).near({ -0.25, 0, -0.25 }, 1e-6)
    expect(function() losses.nll(logprobs, mask, { mask = mask }) end).fails "`mask`"
  end)
  it("kl", function()
    local p, q = tensor.new { { 0.5, 0.5 } }, tensor.new { { 0.25, 0.75 } }
    expect(losses.kl(p:log(), q:log()):item()).near(0.5 * math.log(2) + 0.5 * math.log(2 / 3), 1e-6)
  end)
  it("refuse unknown options, naming the caller's line", function()
    expect(function() losses.mse(a, b, { reducton = "sum" }) end).fails "losses.lua"
    expect(function() losses.mse(a, b, { reducton = "sum" }) end).fails "`reducton`"
    expect(function() losses.mse(a, b, { reduction = "most" }) end).fails "mean, sum or none"
  end)
end)

describe("schedules", function()
  it("warm up", function()
    expect(schedules.constant(0, 10, { warmup = 4 })).is(0.25)
    expect(schedules.constant(3, 10, { warmup = 4 })).is(1.0)
    expect(schedules.constant(9, 10, { warmup = 4 })).is(1)
    expect(schedules.linear(0, 100, { warmup = 0.1 })).is(0.1)
  end)
  it("decay", function()
    expect(schedules.linear(5, 10)).is(0.5)
    expect(schedules.linear(10, 10, { final = 0.25 })).is(0.25)
    expect(schedules.cosine(0, 10)).is(1.0)
    expect(schedules.cosine(5, 10)).near(0.5, 1e-12)
    expect(schedules.cosine(99, 10, { final = 0.1 })).near(0.1, 1e-12)
    expect(schedules.warmup_stable_decay(50, 100, { decay = 20 })).is(1)
    expect(schedules.warmup_stable_decay(90, 100, { decay = 20 })).is(0.5)
    expect(schedules.warmup_stable_decay(95, 100, { decay = 0.1, final = 0.5 })).is(0.75)
  end)
  it("rise to the peak and never above it, and fall from there", function()
    for _, name in ipairs { "linear", "cosine", "warmup_stable_decay" } do
      local before = 0
      for step = 0, 99 do
        local now = schedules[name](step, 100, { warmup = 10, final = 0.2 })
        assert(now <= 1 and now > 0, name)
        if step < 10 then assert(now > before, name) elseif step > 10 then assert(now <= before, name) end
        before = now
      end
      expect(schedules[name](9, 100, { warmup = 10 })).is(1.0)
      expect(schedules[name](100, 100, { warmup = 10, final = 0.2 })).near(0.2, 1e-12)
    end
  end)
  it("warm up all along if there are no more steps", function()
    expect(schedules.cosine(3, 4, { warmup = 8 })).is(0.5)
    expect(schedules.linear(8, 8, { warmup = 8, final = 0.5 })).is(0.5)
  end)
  it("refuse what cannot be meant", function()
    expect(function() schedules.cosine(0, 0) end).fails "`steps` should be"
    expect(function() schedules.cosine(1.5, 10) end).fails "`step` should be"
    expect(function() schedules.cosine(0, 10, { warm = 1 }) end).fails "`warm`"
  end)
end)
