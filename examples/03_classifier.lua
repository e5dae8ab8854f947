--- Lesson 3: a neural network of two layers, written with tensor operations alone.
--- Run: perilune run examples/03_classifier.lua --units 4
local engine = require "engine"
local losses = require "std.losses"
local tensor = engine.tensor

--- Points of the plane, and whether each lies in a ring round the middle: a question that no straight line answers.
local function make_points(count)
  local points = tensor.randn { count, 2 }
  local radius = points:square():sum(1):sqrt()
  local in_ring = radius:gt(0.7) * radius:lt(1.5)
  return points, in_ring:to "i32"
end

--- One hidden layer: scores of both classes for each point.
local function classify(weights, points)
  local hidden = (points:matmul(weights.first) + weights.first_bias):tanh()
  return hidden:matmul(weights.second) + weights.second_bias
end

local function accuracy(scores, labels)
  return scores:argmax(1):eq(labels):mean():item()
end

return engine.workflow {
  name = "classifier",
  args = { units = { 32, min = 1 }, steps = { 300, min = 1 }, lr = { 2.0, min = 0 } },
  run = function(run, args)
    local points, labels = make_points(500)
    local test_points, test_labels = make_points(500)

    -- Random weights, small enough that tanh is not saturated at the start; biases of zero.
    local weights = {
      first = tensor.randn { 2, args.units },
      first_bias = tensor.zeros { args.units },
      second = tensor.randn { args.units, 2 } * args.units ^ -0.5,
      second_bias = tensor.zeros { 2 },
    }
    local velocity = {}
    for name, weight in pairs(weights) do
      weights[name] = weight:requires_grad()
      velocity[name] = tensor.zeros(weight.shape)
    end

    for step in run:loop("train", { steps = args.steps }) do
      local loss = losses.cross_entropy(classify(weights, points), labels)
      loss:backward()
      -- Momentum: the step is a running average of gradients, which smooths the way down.
      for name, weight in pairs(weights) do
        velocity[name] = velocity[name] * 0.9 + weight.grad * 0.1
        weights[name] = (weight - velocity[name] * args.lr):detach():requires_grad()
      end
      step:log { loss = loss }
      if step.first or step.last then print(("step %d: loss %.3f"):format(step.count, loss:item())) end
    end

    -- Points that the network has not seen. `no_grad` keeps the graph from being recorded.
    tensor.no_grad(function()
      local most_common = math.max(test_labels:to("f32"):mean():item(), 1 - test_labels:to("f32"):mean():item())
      print(("always the same answer: %.1f%% right"):format(100 * most_common))
      print(("the network: %.1f%% right"):format(100 * accuracy(classify(weights, test_points), test_labels)))
    end)
  end,
}
