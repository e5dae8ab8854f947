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
  it("sft is nll over the batch's labels", function()
    local loss = losses.sft(tensor.new { -1, -2, 0 }, { mask = tensor.new { 1, 1, 0 } })
    expect(loss:item()).is(1.5)
  end)
  it("kl", function()
    local p, q = tensor.new { { 0.5, 0.5 } }, tensor.new { { 0.25, 0.75 } }
    expect(losses.kl(p:log(), q:log()):item()).near(0.5 * math.log(2) + 0.5 * math.log(2 / 3), 1e-6)
  end)
  it("refuse shapes that would broadcast, naming the caller's line", function()
    local column, labels = tensor.zeros { 3, 1 }, tensor.zeros({ 2 }, { dtype = "i32" })
    for _, name in ipairs { "mse", "huber", "bce", "kl", "distill", "nll" } do
      expect(function() losses[name](a, column) end).fails "should be of shape [3], got [3, 1]"
      expect(function() losses[name](a, column) end).fails "tests/lua/losses.lua"
    end
    expect(function() losses.mse(a, b, { mask = column }) end).fails "`mask` should be of shape [3], got [3, 1]"
    expect(function() losses.sft(a, { mask = column }) end).fails "tests/lua/losses.lua"
    expect(function() losses.cross_entropy(column, labels) end).fails "`labels` [rows]"
    expect(losses.mse(a, 1):item()).near(5 / 3, 1e-6)
  end)
  it("refuse unknown options, naming the caller's line", function()
    expect(function() losses.mse(a, b, { reducton = "sum" }) end).fails "losses.lua"
    expect(function() losses.mse(a, b, { reducton = "sum" }) end).fails "`reducton`"
    expect(function() losses.mse(a, b, { reduction = "most" }) end).fails "mean, sum or none"
  end)
end)

describe("losses over pairs", function()
  local h, zeros, ones = tensor.new { 0.5, -0.3 }, tensor.zeros { 2 }, tensor.ones { 2 }
  local function dpo(options) return losses.dpo(h, zeros, options) end
  local function sigmoid(x) return 1 / (1 + math.exp(-x)) end
  it("give the worked numbers for h_w 0.5, h_l -0.3 and beta 0.1", function()
    expect(dpo():item()).near(0.6539470, 1e-6)
    expect(dpo({ kind = "hinge" }):item()).near(0.92, 1e-6)
    expect(dpo({ kind = "ipo", lengths = ones }):item()).near(17.64, 1e-5)
    expect(dpo({ label_smoothing = 0.1 }):item()).near(0.6619470, 1e-6)
    expect(dpo({ kind = "robust", label_smoothing = 0.1 }):item()).near(0.6439470, 1e-6)
    expect(dpo({ kind = "bco_pair" }):item()).near(-math.log(sigmoid(0.05)) - math.log(sigmoid(0.03)), 1e-6)
    expect(dpo({ kind = "sppo_hard" }):item()).near(4.5 ^ 2 + 4.7 ^ 2, 1e-4)
    local nca = -math.log(sigmoid(0.05)) - 0.5 * math.log(sigmoid(-0.05)) - 0.5 * math.log(sigmoid(0.03))
    expect(dpo({ kind = "nca_pair" }):item()).near(nca, 1e-6)
  end)
  it("take means over tokens where they say so", function()
    local lengths = tensor.new { 5, 3 }
    -- 0.5 / 5 + 0.3 / 3 = 0.2
    expect(dpo({ kind = "ipo", lengths = lengths }):item()).near(4.8 ^ 2, 1e-4)
    expect(dpo({ kind = "sigmoid_norm", lengths = lengths }):item()).near(-math.log(sigmoid(0.02)), 1e-6)
    expect(dpo({ nll = 2, lengths = lengths }):item()).near(0.6539470 - 2 * 0.5 / 5, 1e-6)
  end)
  it("do without a reference", function()
    expect(losses.dpo(h, nil):item()).near(0.6539470, 1e-6)
    expect(losses.dpo(h, h, { reference_free = true }):item()).near(0.6539470, 1e-6)
    expect(losses.dpo(h, h):item()).near(math.log(2), 1e-6)
  end)
  it("add up over micro-batches", function()
    local four = tensor.new { 0.5, -0.3, 1, 2 }
    local parts = losses.dpo(four:slice(0, 0, 2), nil, { normalizer = 2 }) + losses.dpo(four:slice(0, 2), nil, { normalizer = 2 })
    expect(parts:item()).near(losses.dpo(four, nil):item(), 1e-6)
  end)
  it("count wins", function()
    local _, stats = losses.dpo(tensor.new { 1, 0, 0, 3 }, tensor.zeros { 4 }, { beta = 0.5 })
    expect(stats.accuracy).is(0.5)
    expect(stats.margin).near((0.5 - 1.5) / 2)
    expect(stats.chosen_reward).near(0.25)
    expect(stats.rejected_reward).near(0.75)
  end)
  it("refuse what cannot be meant", function()
    expect(function() dpo { kind = "ipo" } end).fails "losses.sequence_lengths(batch)"
    expect(function() dpo { kind = "dop" } end).fails "got dop"
    expect(function() dpo { beta = 0 } end).fails "above 0"
    expect(function() dpo { kind = "hinge", label_smoothing = 0.1 } end).fails "sigmoid or robust"
    expect(function() losses.dpo(tensor.ones { 3 }, nil) end).fails "[2n]"
    expect(function() losses.dpo(tensor.ones { 2 }, tensor.ones { 1 }) end).fails "should be of shape [2], got [1]"
  end)
  it("compare every good answer with every bad one", function()
    local function ls(x) return math.log(sigmoid(x)) end
    local want = -(ls(1) + ls(0.5) + ls(2) + ls(1.5)) / 4
    expect(losses.bradley_terry_list(tensor.new { 1, 2 }, tensor.new { 0, 0.5 }):item()).near(want, 1e-6)
  end)
end)

describe("losses over samples", function()
  --- Two rollouts, of two tokens behind a prompt of one, and of two.
  local function batch()
    return {
      mask = tensor.new { 0, 1, 1, 1, 1 }, sequence = tensor.new({ 0, 0, 0, 1, 1 }, { dtype = "i32" }),
      logprobs = tensor.new { 0, -1.5, -2, -0.5, -0.5 },
    }
  end
  local logprobs, advantage = { 0, -1, -2, -0.5, -1 }, { 1, -1 }
  it("give the worked advantages", function()
    local reward = tensor.new { 1, 0, 0, 1, 0, 0, 0, 0 }
    expect(losses.group_advantage(reward, 8):slice(0, 0, 2)).near({ 1.6198353, -0.5399451 }, 1e-5)
    -- And with the plain deviation.
    expect(losses.group_advantage(reward, 8, { ddof = 0 }):slice(0, 0, 2)).near({ 1.7316509, -0.5772170 }, 1e-5)
    expect(losses.group_advantage(reward, 8, { std = false }):slice(0, 0, 2)).near { 0.75, -0.25 }
    expect(losses.group_advantage(reward, 2):slice(0, 4)).is { 0, 0, 0, 0 }
    expect(losses.group_signal(reward, 2)).is { 1, 1, 0, 0 }
    expect(function() losses.group_advantage(reward, 1) end).fails "above 1"
    expect(function() losses.group_advantage(reward, 3) end).fails "divides 8"
  end)
  it("penalise long answers", function()
    local lengths = tensor.new({ 1, 8, 10, 12, 13 }, { dtype = "i32" })
    expect(losses.overlong_penalty(lengths, 12, 4)).is { 0, 0, -0.5, -1, -1 }
  end)
  it("are on policy where nothing was recorded", function()
    local now, on_policy = tensor.new(logprobs):requires_grad(), batch()
    on_policy.logprobs = nil
    local loss, stats = losses.grpo(now, on_policy, tensor.new(advantage))
    loss:backward()
    expect(stats.ratio).is(1.0)
    expect(loss:item()).is(0.0)
    -- -A / (2 rollouts x 2 tokens), and the prompt's token takes none.
    expect(now.grad).near { 0, -0.25, -0.25, 0.25, 0.25 }
  end)
  it("take a batch of documents as on policy", function()
    local documents = engine.data.batch { { 1, 2, 3 }, { 4, 5 } }
    local now = tensor.new({ -1, -2, 0, -3, 0 }):requires_grad()
    losses.dapo(now, documents, tensor.new(advantage)):backward()
    expect(now.grad).near { -1 / 3, -1 / 3, 0, 1 / 3, 0 }
    expect(losses.sequence_sums(now, documents)).is { -3, -3 }
    expect(losses.sequence_lengths(documents)).is { 2, 1 }
  end)
  it("add up over micro-batches that say the totals", function()
    local options = {
      { normalize = "sequence" }, { normalize = "token", normalizer = 4 }, { normalize = "length", max_length = 7 },
      { level = "sequence", clip = 0.01 }, { beta = 0.1, reference = tensor.new { 9, -1, -1, -1, -1 } },
    }
    for _, settings in ipairs(options) do
      local whole, parts = tensor.new(logprobs):requires_grad(), tensor.new(logprobs):requires_grad()
      losses.grpo(whole, batch(), tensor.new(advantage), settings):backward()
      for _, range in ipairs { { 0, 3 }, { 3, 5 } } do
        local part, given = {}, {}
        for name, values in pairs(batch()) do part[name] = values:slice(0, range[1], range[2]) end
        for name, value in pairs(settings) do given[name] = value end
        given.reference = settings.reference and settings.reference:slice(0, range[1], range[2])
        losses.grpo(parts:slice(0, range[1], range[2]), part, tensor.new(advantage), given):backward()
      end
      expect(parts.grad).near(whole.grad:to_table(), 1e-7)
    end
  end)
  it("clip as their names say", function()
    -- Ratios: e^0.5 = 1.649 with A 1, 1, 1 with A -1, e^-0.5 = 0.607 with A -1.
    local now = tensor.new(logprobs):requires_grad()
    local _, stats = losses.dapo(now, batch(), tensor.new(advantage))
    expect({ stats.clip_high, stats.clip_low }).is { 0.25, 0.25 }
    expect(stats.ratio).near((math.exp(0.5) + 1 + 1 + math.exp(-0.5)) / 4)
    local loss, cut = losses.cispo(now, batch(), tensor.new(advantage), { cap = 1.2 })
    loss:backward()
    expect(now.grad).near({ 0, -1.2 / 4, -0.25, 0.25, math.exp(-0.5) / 4 }, 1e-6)
    expect(cut.clip_high).is(0.25)
    local dr = losses.dr_grpo(now, batch(), tensor.new(advantage), { max_length = 8 })
    expect(dr:item()).near((-1.2 - 1 + 1 + 0.8) / 16, 1e-6)
    local one = tensor.new { 0, -2, -2, -0.5, -1 }
    -- Geometric means e^-0.25 and e^-0.25, clipped below for A -1 only.
    local gspo = losses.gspo(one, batch(), tensor.new(advantage))
    expect(gspo:item()).near((-math.exp(-0.25) + (1 - 3e-4)) / 2, 1e-6)
  end)
  it("estimate KL", function()
    local p, q = tensor.new { math.log(0.5), math.log(0.25) }, tensor.new { math.log(0.25), math.log(0.5) }
    expect(losses.kl_estimate(p, q, "k1")).near { math.log(2), -math.log(2) }
    expect(losses.kl_estimate(p, q, "k2")).near { math.log(2) ^ 2 / 2, math.log(2) ^ 2 / 2 }
    expect(losses.kl_estimate(p, q)).near { 0.5 + math.log(2) - 1, 2 - math.log(2) - 1 }
    expect(function() losses.kl_estimate(p, q, "k4") end).fails "got k4"
  end)
  it("distil by samples and by logits", function()
    local student = tensor.new(logprobs):requires_grad()
    local loss, stats = losses.distill_samples(student, batch(), tensor.new { 9, -2, -1, -0.5, -0.5 })
    loss:backward()
    -- Differences teacher - student: -1, 1, 0, 0.5, weighted by the ratios.
    expect(student.grad).near({ 0, math.exp(0.5) / 4, -0.25, 0, -0.5 * math.exp(-0.5) / 4 }, 1e-6)
    expect(stats.kl).near(-0.125)
    -- torch.nn.functional.kl_div of the two at temperature 2, times 4.
    local s, t = tensor.new { { 1, 2, 3 } }, tensor.new { { 3, 2, 0 } }
    for divergence, want in pairs { forward = 1.7590, reverse = 1.9890, jsd = 0.4387 } do
      expect(losses.distill(s, t, { divergence = divergence, temperature = 2 }):item()).near(want, 1e-4)
    end
    expect(losses.distill(s, s, { divergence = "jsd", beta = 0.3 }):item()).near(0, 1e-6)
    expect(function() losses.distill(s, t, { divergence = "jsd", beta = 1 }) end).fails "beta between 0 and 1"
    expect(losses.entropy(s):item()).near(0.8324, 1e-4)
    expect(losses.entropy_bonus(tensor.new { 1, 2 }, tensor.new { 1, 0 }):item()).near(-0.01)
  end)
  it("refuse what cannot be meant, naming the caller's line", function()
    local now = tensor.new(logprobs)
    for part, options in pairs {
      ["`cap`"] = { cap = 2 }, ["where beta is not 0"] = { beta = 1 }, ["got most"] = { normalize = "most" },
      ["length with max_length"] = { normalize = "length" }, ["token or sequence"] = { level = "word" },
    } do
      expect(function() losses.grpo(now, batch(), tensor.new(advantage), options) end).fails(part)
      expect(function() losses.grpo(now, batch(), tensor.new(advantage), options) end).fails "losses.lua:"
    end
    for part, options in pairs {
      ["`clip` should be a number of at least 0"] = { clip = { 0.2 } }, ["`rollouts` should be a number above 0, got 0"] = { rollouts = 0 },
      ["`normalizer` goes with normalize = \"token\", got sequence"] = { normalizer = 4 },
      ["`max_length` goes with normalize = \"length\", got token"] = { normalize = "token", max_length = 4 },
      ["`reference` should be of shape [5], got [1]"] = { beta = 0.1, reference = tensor.new { -1 } },
      ["`kl` should be k1, k2 or k3, got k4"] = { beta = 0.1, reference = now, kl = "k4" },
      ["`beta` should be a number of at least 0, got -1"] = { beta = -1 }, ["`delta` should be a number above 0, got 0"] = { delta = 0 },
    } do
      expect(function() losses.grpo(now, batch(), tensor.new(advantage), options) end).fails(part)
      expect(function() losses.grpo(now, batch(), tensor.new(advantage), options) end).fails "losses.lua:"
    end
    expect(function() losses.cispo(now, batch(), tensor.new(advantage), { clip = 0.2 }) end).fails "`clip` should be left out"
    expect(function() losses.dapo(now, batch(), tensor.new(advantage), { normalizer = 0 / 0 }) end).fails "`normalizer` should be a number above 0"
  end)
  it("refuse shapes that would broadcast", function()
    local now, column = tensor.new(logprobs), tensor.new(logprobs):unsqueeze(1)
    local cases = {
      { "`advantage` should be of shape [2], got [2, 1]", function() losses.grpo(now, batch(), tensor.new(advantage):unsqueeze(1)) end },
      { "`logprobs` should be of shape [5], got [5, 1]", function() losses.grpo(column, batch(), tensor.new(advantage)) end },
      { "`advantage` should be of shape [2], got [5]", function()
        local sampled = batch()
        sampled.rollouts = 2
        losses.grpo(now, sampled, tensor.ones { 5 })
      end },
      { "`logprobs` should be of shape [5], got [1]", function() losses.sequence_sums(tensor.new { 1 }, engine.data.batch { { 1, 2, 3 }, { 4, 5 } }) end },
      { "`reference` should be of shape [5], got [5, 1]", function() losses.kl_estimate(now, column) end },
      { "`teacher` should be of shape [5], got [5, 1]", function() losses.distill_samples(now, batch(), column) end },
      { "`mask` should be of shape [5], got [5, 1]", function() losses.entropy_bonus(now, column) end },
      { "`reward` should be of shape [4], got [2, 2]", function() losses.group_advantage(tensor.ones { 2, 2 }, 2) end },
      { "`reference_sums` should be of shape [2], got [2, 1]", function() losses.implicit_rewards(tensor.ones { 2 }, tensor.ones { 2, 1 }, 1) end },
      { "`lengths` should be of shape [2], got 3", function() losses.dpo(tensor.ones { 2 }, nil, { kind = "ipo", lengths = 3 }) end },
      { "`margin` should be of shape [2], got [2, 1]", function() losses.bradley_terry(tensor.ones { 4 }, { margin = tensor.ones { 2, 1 } }) end },
      { "`good` should be [n] with at least one reward, got [0]", function() losses.bradley_terry_list(tensor.ones { 0 }, tensor.ones { 1 }) end },
      { "`mask` should be of shape [2], got true", function() losses.mse(tensor.ones { 2 }, 1, { mask = true }) end },
    }
    for _, case in ipairs(cases) do
      expect(case[2]).fails(case[1])
      expect(case[2]).fails "losses.lua:"
    end
  end)
  it("refuse numbers that cannot be meant", function()
    local two, labels = tensor.ones { 2 }, tensor.zeros({ 2 }, { dtype = "i32" })
    local cases = {
      { "`beta` should be a number above 0, got x", function() losses.dpo(two, nil, { beta = "x" }) end },
      { "`beta` should be a number above 0", function() losses.dpo(two, nil, { beta = 0 / 0 }) end },
      { "`normalizer` should be a number above 0, got 0", function() losses.dpo(two, nil, { normalizer = 0 }) end },
      { "`reduction` should be mean or none, got sum", function() losses.dpo(two, nil, { reduction = "sum" }) end },
      { "`normalizer` should be a number above 0, got 0", function() losses.nll(two, two, { normalizer = 0 }) end },
      { "`temperature` should be a number above 0, got 0", function() losses.distill(two, two, { temperature = 0 }) end },
      { "`delta` should be a number above 0, got -1", function() losses.huber(two, two, { delta = -1 }) end },
      { "`label_smoothing` should be a number of at least 0 and at most 1, got 2", function()
        losses.cross_entropy(tensor.ones { 2, 3 }, labels, { label_smoothing = 2 })
      end },
      { "`std` should be true, false or \"batch\", got Batch", function() losses.group_advantage(two, 2, { std = "Batch" }) end },
      { "`group` should be an integer that divides 2 rewards, got 0", function() losses.group_signal(two, 0) end },
    }
    for _, case in ipairs(cases) do
      expect(case[2]).fails(case[1])
      expect(case[2]).fails "losses.lua:"
    end
    -- An answer without a token that is learned has no mean.
    expect(losses.dpo(tensor.new { -1, 0 }, nil, { kind = "ipo", beta = 0.5, lengths = tensor.new { 2, 0 } }):item()).is(2.25)
    expect(losses.overlong_penalty({ 8, 10, 12 }, 12, 4)).is { 0, -0.5, -1 }
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
  it("take a share of one step that is done", function()
    expect(schedules.cosine(0.5, 1, { final = 0.1 })).near(0.55, 1e-12)
    expect(schedules.cosine(1.0, 1, { final = 0.1 })).near(0.1, 1e-12)
    expect(schedules.linear(0.05, 1, { warmup = 0.1 })).is(0.5)
    expect(schedules.linear(0.55, 1, { warmup = 0.1 })).near(0.5, 1e-12)
    expect(schedules.warmup_stable_decay(0.75, 1, { decay = 0.5 })).is(0.5)
    expect(schedules.warmup_stable_decay(0.95, 1)).near(0.5, 1e-12)
    expect(schedules.cosine(0, 1, { warmup = 0.5 })).is(1.0)
    expect(function() schedules.cosine(0.5, 1, { warmup = 20 }) end).fails "`warmup` should be a share below 1"
  end)
  it("refuse what cannot be meant", function()
    expect(function() schedules.cosine(0, 0) end).fails "`steps` should be"
    expect(function() schedules.cosine(0, 1, { final = 0 / 0 }) end).fails "`final` should be a number of at least 0"
    expect(function() schedules.cosine(-0.5, 10) end).fails "`step` should be"
    expect(function() schedules.cosine(0 / 0, 10) end).fails "`step` should be"
    expect(function() schedules.cosine(0, 10, { warm = 1 }) end).fails "`warm`"
  end)
end)
