--- Lesson 2: tensors, derivatives, and a straight line fitted by gradient descent.
--- Run: perilune run examples/02_tensors.lua
local engine = require "engine"
local losses = require "std.losses"
local tensor = engine.tensor

return engine.workflow {
  name = "tensors",
  args = { steps = { 100, min = 1 }, lr = { 0.3, min = 0 } },
  run = function(run, args)
    -- A tensor is a block of numbers with a shape. Operators work element by element, and shapes broadcast: here a row of
    -- three is added to each of two rows. Axes and indices count from 0.
    local table_of_six = tensor.new { { 1, 2, 3 }, { 4, 5, 6 } }
    print("shape", table.concat(table_of_six.shape, " x "))
    print("plus a row", table_of_six + tensor.new { 10, 20, 30 })
    print("sum over axis 0", table_of_six:sum(0))

    -- A leaf made by `requires_grad` remembers what is computed from it. `backward` leaves the derivative in `grad`.
    local x = tensor.new({ 3 }):requires_grad()
    local y = (x:square() + x * 2):sum()
    y:backward()
    print(("d(x^2 + 2x)/dx at 3 is %g"):format(x.grad:item()))

    -- Points near y = 2x - 1, with some noise.
    local inputs = tensor.linspace(-1, 1, 50)
    local targets = inputs * 2 - 1 + tensor.randn { 50 } * 0.1

    -- Gradient descent: measure the error, ask for its slope, step against it. Each step makes new leaves, because a
    -- tensor never changes.
    local slope = tensor.zeros({ 1 }):requires_grad()
    local offset = tensor.zeros({ 1 }):requires_grad()
    for step in run:loop("fit", { steps = args.steps }) do
      local loss = losses.mse(inputs * slope + offset, targets)
      loss:backward()
      slope = (slope - slope.grad * args.lr):detach():requires_grad()
      offset = (offset - offset.grad * args.lr):detach():requires_grad()
      step:log { loss = loss }
      if step.last then
        print(("y = slope x + offset: slope %.2f, offset %.2f"):format(slope:item(), offset:item()))
        print(("mean squared error %.4f"):format(loss:item()))
      end
    end
  end,
}
