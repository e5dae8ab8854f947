--- Tensors from a script's side: construction, operators, gradients, and what is refused.
local engine, harness = require "engine", require "harness"
local tensor, describe, it, expect = engine.tensor, harness.describe, harness.it, harness.expect

describe("construction", function()
  it("takes its shape from nested tables", function()
    local x = tensor.new { { 1, 2, 3 }, { 4, 5, 6 } }
    expect(x.shape).is { 2, 3 }
    expect(x.dtype).is "f32"
    expect({ x.rank, x.count }).is { 2, 6 }
    expect(x).is { { 1, 2, 3 }, { 4, 5, 6 } }
    expect(tensor.new(2.5).shape).is {}
    expect(tensor.new({}).shape).is { 0 }
  end)
  it("keeps integers and rounds bf16", function()
    expect(math.type(tensor.new({ 7 }, { dtype = "i32" }):select(0, 0):item())).is "integer"
    expect(tensor.new({ 1.00390625 }, { dtype = "bf16" })).is { 1.0 } -- Half way between two bf16: to the even one.
  end)
  it("refuses ragged tables and values that do not fit", function()
    expect(function() tensor.new { { 1, 2 }, { 3 } } end).fails "a list of 1 beside one of 2, at depth 1"
    expect(function() tensor.new { 1, { 2 } } end).fails "a list among numbers"
    expect(function() tensor.new { { 1 }, 2 } end).fails "a number among lists"
    expect(function() tensor.new({ 1.5 }, { dtype = "i32" }) end).fails "whole numbers"
    expect(function() tensor.new { "a" } end).fails 'string "a"'
  end)
  it("makes sequences and constants", function()
    expect(tensor.arange(0, 5, { step = 2 })).is { 0, 2, 4 }
    expect(tensor.linspace(0, 1, 3)).is { 0, 0.5, 1 }
    expect(tensor.eye(2)).is { { 1, 0 }, { 0, 1 } }
    expect(tensor.full({ 2 }, 3)).is { 3, 3 }
    expect(tensor.zeros({ 0, 3 }).shape).is { 0, 3 }
  end)
  it("draws from the run's seed, never twice the same", function()
    local a, b = tensor.randn { 1000 }, tensor.randn { 1000 }
    expect(a:eq(b):sum():item()).is(0.0)
    expect(a:mean():item()).near(0, 0.15) -- Four and a half deviations of the mean of 1000.
  end)
end)

describe("operators", function()
  local x = tensor.new { 1, -2, 3 }
  it("take numbers on either side", function()
    expect(x + 1).is { 2, -1, 4 }
    expect(1 - x).is { 0, 3, -2 }
    expect(2 * x).is { 2, -4, 6 }
    expect(6 / x).is { 6, -3, 2 }
    expect(x ^ 2).is { 1, 4, 9 }
    expect(-x).is { -1, 2, -3 }
    local i = tensor.new({ 7, -7 }, { dtype = "i32" })
    expect(i // 2).is { 3, -4 }
    expect(i % 3).is { 1, 2 }
  end)
  it("meet themselves", function()
    expect(x - x).is { 0, 0, 0 }
    expect(x * x).is { 1, 4, 9 }
  end)
  it("broadcast", function() expect(tensor.new { { 1 }, { 2 } } + tensor.new { 10, 20 }).is { { 11, 21 }, { 12, 22 } } end)
  it("name shapes that do not fit", function()
    expect(function() return x + tensor.ones { 2 } end).fails "[2]"
    expect(function() return x + tensor.ones({ 3 }, { dtype = "bf16" }) end).fails "bf16"
    expect(function() return x + {} end).fails "a tensor or a number"
    expect(function() return #x end).fails "no single length"
  end)
end)

describe("operations", function()
  local x = tensor.new { { 3, 1, 2 }, { 6, 5, 4 } }
  it("reduce", function()
    expect(x:sum():item()).is(21.0)
    expect(x:mean(1)).is { 2, 5 }
    expect(x:max(0, { keepdim = true })).is { { 6, 5, 4 } }
    expect(x:argmax(-1)).is { 0, 0 }
    expect(x:var(1)).is { 1, 1 }
    expect(x:logsumexp({ 0, 1 }):item()).near(6.456193, 1e-5) -- log of the sum of e^1 to e^6.
  end)
  it("index", function()
    expect(x:slice(1, 1)).is { { 1, 2 }, { 5, 4 } }
    expect(x:slice(1, 0, 3, { step = 2 })).is { { 3, 2 }, { 6, 4 } }
    expect(x:select(0, 1)).is { 6, 5, 4 }
    expect(x:gather(1, tensor.new({ { 2 }, { 0 } }, { dtype = "i32" }))).is { { 2 }, { 6 } }
    expect(x:index_select(0, tensor.new({ 1, 1 }, { dtype = "i32" })).shape).is { 2, 3 }
    expect(x:transpose(0, 1):reshape { -1 }).is { 3, 6, 1, 5, 2, 4 }
    expect(x:permute { 1, 0 }).is(x:transpose(0, 1):to_table())
    expect(x:flip(1)).is { { 2, 1, 3 }, { 4, 5, 6 } }
    expect(tensor.concat({ x, x }, 1).shape).is { 2, 6 }
    expect(tensor.stack({ x, x }).shape).is { 2, 2, 3 }
    expect(x:unsqueeze(0):squeeze().shape).is { 2, 3 }
  end)
  it("order", function()
    local sorted, from = x:sort(1, { descending = true })
    expect(sorted).is { { 3, 2, 1 }, { 6, 5, 4 } }
    expect(from).is { { 0, 2, 1 }, { 0, 1, 2 } }
    local best, at = x:topk(1)
    expect(best).is { { 3 }, { 6 } }
    expect(at).is { { 0 }, { 0 } }
    expect(x:cumsum(1)).is { { 3, 4, 6 }, { 6, 11, 15 } }
  end)
  it("choose and clamp", function()
    expect(tensor.where(x:gt(3), x, 0)).is { { 0, 0, 0 }, { 6, 5, 4 } }
    expect(x:clamp { min = 2, max = 5 }).is { { 3, 2, 2 }, { 5, 5, 4 } }
    expect(x:softmax(1):sum(1)).near({ 1, 1 }, 1e-6)
    expect(x:to("i32").dtype).is "i32"
    expect(x.device).is "cpu"
    expect(x:to("cpu"):to("bf16").device).is "cpu"
  end)
end)

describe("gradients", function()
  it("arrive at leaves and add up", function()
    local w = tensor.new({ 2, -1 }):requires_grad()
    local x = tensor.new { 3, 4 };
    (w * x):sum():backward()
    expect(w.grad).is { 3, 4 };
    (w * w):sum():backward()
    expect(w.grad).is { 7, 2 }
    w:zero_grad()
    expect(w.grad).is(nil)
  end)
  it("stop at detach and inside no_grad", function()
    local w = tensor.new({ 2 }):requires_grad()
    local y, kind = tensor.no_grad(function() return w * 3, "two values" end)
    expect(kind).is "two values"
    expect(function() y:backward() end).fails "no_grad"
    expect(function() (w:detach() * 2):backward() end).fails "a constant"
    expect(function() tensor.no_grad(function() error "inside" end) end).fails "inside"
  end)
  it("are refused for integers and for more than one element", function()
    expect(function() tensor.new({ 1 }, { dtype = "i32" }):requires_grad() end).fails "i32"
    expect(function() (tensor.ones({ 2 }):requires_grad() * 2):backward() end).fails "one element"
  end)
  it("fit a line by gradient descent", function()
    local x = tensor.linspace(-1, 1, 33)
    local y = x * 3 + 0.5
    local w, b = tensor.new(0):requires_grad(), tensor.new(0):requires_grad()
    for _ = 1, 200 do
      (x * w + b - y):square():mean():backward()
      w, b = (w - w.grad * 0.5):detach():requires_grad(), (b - b.grad * 0.5):detach():requires_grad()
    end
    expect({ w:item(), b:item() }).near({ 3, 0.5 }, 1e-4)
  end)
end)

describe("memory", function()
  it("of tensors that Lua dropped comes back", function()
    -- 100 tensors of 16 MiB: far more than may pile up.
    for _ = 1, 100 do local _ = tensor.zeros { 4 * 1024 * 1024 } end
  end)
end)
