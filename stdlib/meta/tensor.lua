---@meta
--- Tensors. Elements are f32 on the CPU unless `dtype` and `device` say else. Axes count from 0, negative ones from the end; so do indices.
--- Operators: + - * / ^ % // and unary - between tensors, or a tensor and a number; shapes broadcast as numpy's do.

---@class engine.tensor
local tensor = {}

---@class engine.Tensor
---@field count integer elements
---@field device string "cpu", or "cuda:0" and on; results of operations lie where their operands do, which must lie together
---@field dtype "f32"|"bf16"|"i32"|"i8"
---@field grad engine.Tensor? what backward left here
---@field rank integer axes
---@field shape integer[]
---@operator add(engine.Tensor|number): engine.Tensor
---@operator sub(engine.Tensor|number): engine.Tensor
---@operator mul(engine.Tensor|number): engine.Tensor
---@operator div(engine.Tensor|number): engine.Tensor
---@operator mod(engine.Tensor|number): engine.Tensor
---@operator idiv(engine.Tensor|number): engine.Tensor
---@operator pow(engine.Tensor|number): engine.Tensor
---@operator unm: engine.Tensor
local Tensor = {}

---@class engine.TensorOptions
---@field dtype? "f32"|"bf16"|"i32"|"i8" default "f32"
---@field device? string "cpu" (default), "cuda", "cuda:1" or "auto"

--- Numbers from `start` to below `stop`.
---
--- Example: engine.tensor.arange(0, 10, { dtype = "i32" })
---@param start number
---@param stop number
---@param options? { step?: number, dtype?: string, device?: string } step: default 1
---@return engine.Tensor values [count]
function tensor.arange(start, stop, options) end

--- Joins tensors along an axis that they have.
---
--- Example: engine.tensor.concat({ a, b }, 0)
---@param parts engine.Tensor[]
---@param axis? integer default 0
---@return engine.Tensor joined
function tensor.concat(parts, axis) end

--- The identity matrix.
---
--- Example: engine.tensor.eye(3)
---@param size integer
---@param options? engine.TensorOptions
---@return engine.Tensor matrix [size, size]
function tensor.eye(size, options) end

--- One value everywhere.
---
--- Example: engine.tensor.full({ 2, 3 }, 0.5)
---@param shape integer[]
---@param value number
---@param options? engine.TensorOptions
---@return engine.Tensor filled
function tensor.full(shape, value, options) end

--- `count` numbers from `start` to `stop`, both included.
---
--- Example: engine.tensor.linspace(0, 1, 11)
---@param start number
---@param stop number
---@param count integer
---@param options? engine.TensorOptions
---@return engine.Tensor values [count]
function tensor.linspace(start, stop, count, options) end

--- A tensor of the numbers in nested tables, or of one number.
---
--- Example: engine.tensor.new { { 1, 2 }, { 3, 4 } }
---@param values number|table
---@param options? engine.TensorOptions
---@return engine.Tensor tensor
function tensor.new(values, options) end

--- Calls `body` without recording it for a backward pass; gives what it returns.
---
--- Example: local guess = engine.tensor.no_grad(function() return model:logprobs(batch) end)
---@param body fun(): ...
---@return any ...
function tensor.no_grad(body) end

--- Ones.
---
--- Example: engine.tensor.ones({ 2, 3 })
---@param shape integer[]
---@param options? engine.TensorOptions
---@return engine.Tensor ones
function tensor.ones(shape, options) end

--- Uniform in [0, 1), from the run's seed.
---
--- Example: engine.tensor.rand({ 4 })
---@param shape integer[]
---@param options? { dtype?: "f32"|"bf16", device?: string }
---@return engine.Tensor values
function tensor.rand(shape, options) end

--- Whole numbers from `low` to below `high`, from the run's seed.
---
--- Example: engine.tensor.randint(0, 6, { 10 })
---@param low integer
---@param high integer
---@param shape integer[]
---@param options? { device?: string }
---@return engine.Tensor values i32
function tensor.randint(low, high, shape, options) end

--- Normal with mean 0 and variance 1, from the run's seed.
---
--- Example: engine.tensor.randn({ 4, 4 }) * 0.02
---@param shape integer[]
---@param options? { dtype?: "f32"|"bf16", device?: string }
---@return engine.Tensor values
function tensor.randn(shape, options) end

--- Joins tensors of one shape along a new axis.
---
--- Example: engine.tensor.stack({ a, b })
---@param parts engine.Tensor[]
---@param axis? integer default 0
---@return engine.Tensor stacked
function tensor.stack(parts, axis) end

--- `a` where the mask is not 0, else `b`. One of them may be a number.
---
--- Example: engine.tensor.where(x:gt(0), x, 0)
---@param mask engine.Tensor
---@param a engine.Tensor|number
---@param b engine.Tensor|number
---@return engine.Tensor chosen
function tensor.where(mask, a, b) end

--- Zeros.
---
--- Example: engine.tensor.zeros({ 2, 3 }, { dtype = "bf16" })
---@param shape integer[]
---@param options? engine.TensorOptions
---@return engine.Tensor zeros
function tensor.zeros(shape, options) end

--- Absolute values.
---
--- Example: local y = x:abs()
---@return engine.Tensor result
function Tensor:abs() end

--- x + other.
---
--- Example: local y = x:add(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:add(other) end

--- Indices of the largest along an axis, or in all.
---
--- Example: local best = logits:argmax(-1)
---@param axis? integer default: all, flattened
---@param options? { keepdim?: boolean }
---@return engine.Tensor indices i32
function Tensor:argmax(axis, options) end

--- Indices of the smallest along an axis, or in all.
---
--- Example: local best = logits:argmin(-1)
---@param axis? integer default: all, flattened
---@param options? { keepdim?: boolean }
---@return engine.Tensor indices i32
function Tensor:argmin(axis, options) end

--- Runs the graph behind this one-element tensor backwards; leaves gradients at leaves and parameters.
---
--- Example: loss:backward()
function Tensor:backward() end

--- The same elements, repeated to a larger shape.
---
--- Example: x:broadcast_to { 4, 3 }
---@param shape integer[]
---@return engine.Tensor result
function Tensor:broadcast_to(shape) end

--- The smallest whole numbers not below. A constant of the graph.
---
--- Example: local y = x:ceil()
---@return engine.Tensor result
function Tensor:ceil() end

--- Elements kept between `min` and `max`.
---
--- Example: x:clamp { min = 0, max = 1 }
---@param options { min?: number, max?: number }
---@return engine.Tensor result
function Tensor:clamp(options) end

--- Cosines, of radians.
---
--- Example: local y = x:cos()
---@return engine.Tensor result
function Tensor:cos() end

--- Running sums along an axis.
---
--- Example: x:cumsum(-1)
---@param axis integer
---@return engine.Tensor result
function Tensor:cumsum(axis) end

--- The same elements as a constant of the graph.
---
--- Example: local target = x:detach()
---@return engine.Tensor result
function Tensor:detach() end

--- x / other, of floats.
---
--- Example: local y = x:div(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:div(other) end

--- 1 where x = other, else 0 (f32).
---
--- Example: local y = x:eq(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:eq(other) end

--- e to the power of each element.
---
--- Example: local y = x:exp()
---@return engine.Tensor result
function Tensor:exp() end

--- The order turned round along axes.
---
--- Example: x:flip(0)
---@param axis? integer|integer[] default: all
---@return engine.Tensor result
function Tensor:flip(axis) end

--- The largest whole numbers not above. A constant of the graph.
---
--- Example: local y = x:floor()
---@return engine.Tensor result
function Tensor:floor() end

--- The quotient of i32, rounded down.
---
--- Example: local y = x:floor_div(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:floor_div(other) end

--- Elements picked along an axis by an index tensor of the same rank.
---
--- Example: logp:gather(1, labels:unsqueeze(1))
---@param axis integer
---@param index engine.Tensor i32
---@return engine.Tensor result
function Tensor:gather(axis, index) end

--- 1 where x >= other, else 0 (f32).
---
--- Example: local y = x:ge(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:ge(other) end

--- x times the normal distribution's cumulative function.
---
--- Example: local y = x:gelu()
---@return engine.Tensor result
function Tensor:gelu() end

--- The tanh approximation of gelu.
---
--- Example: local y = x:gelu_tanh()
---@return engine.Tensor result
function Tensor:gelu_tanh() end

--- 1 where x > other, else 0 (f32).
---
--- Example: local y = x:gt(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:gt(other) end

--- Slices picked along an axis, in the order of the indices.
---
--- Example: table:index_select(0, ids)
---@param axis integer
---@param index engine.Tensor [count], i32
---@return engine.Tensor result
function Tensor:index_select(axis, index) end

--- 1 where an element is neither infinite nor NaN, else 0.
---
--- Example: local y = x:is_finite()
---@return engine.Tensor result
function Tensor:is_finite() end

--- 1 where an element is NaN, else 0.
---
--- Example: local y = x:is_nan()
---@return engine.Tensor result
function Tensor:is_nan() end

--- The only element as a number.
---
--- Example: print(loss:item())
---@return number value
function Tensor:item() end

--- 1 where x <= other, else 0 (f32).
---
--- Example: local y = x:le(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:le(other) end

--- Natural logarithms.
---
--- Example: local y = x:log()
---@return engine.Tensor result
function Tensor:log() end

--- log(softmax(x)) along an axis.
---
--- Example: logits:log_softmax(-1)
---@param axis? integer default -1
---@return engine.Tensor result
function Tensor:log_softmax(axis) end

--- log(sum(exp(x))) over axes, without overflow.
---
--- Example: local y = x:logsumexp(1, { keepdim = true })
---@param axis? integer|integer[] default: all
---@param options? { keepdim?: boolean }
---@return engine.Tensor result
function Tensor:logsumexp(axis, options) end

--- 1 where x < other, else 0 (f32).
---
--- Example: local y = x:lt(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:lt(other) end

--- The matrix product; leading axes broadcast.
---
--- Example: x:matmul(w)
---@param other engine.Tensor [..., k, n]
---@return engine.Tensor product [..., m, n]
function Tensor:matmul(other) end

--- The largest over axes.
---
--- Example: local y = x:max(1, { keepdim = true })
---@param axis? integer|integer[] default: all
---@param options? { keepdim?: boolean }
---@return engine.Tensor result
function Tensor:max(axis, options) end

--- The larger of the two, element by element.
---
--- Example: local y = x:maximum(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:maximum(other) end

--- Means over axes.
---
--- Example: local y = x:mean(1, { keepdim = true })
---@param axis? integer|integer[] default: all
---@param options? { keepdim?: boolean }
---@return engine.Tensor result
function Tensor:mean(axis, options) end

--- The smallest over axes.
---
--- Example: local y = x:min(1, { keepdim = true })
---@param axis? integer|integer[] default: all
---@param options? { keepdim?: boolean }
---@return engine.Tensor result
function Tensor:min(axis, options) end

--- The smaller of the two, element by element.
---
--- Example: local y = x:minimum(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:minimum(other) end

--- The rest of floor_div.
---
--- Example: local y = x:modulo(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:modulo(other) end

--- x * other.
---
--- Example: local y = x:mul(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:mul(other) end

--- 1 where x differs from other, else 0 (f32).
---
--- Example: local y = x:ne(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:ne(other) end

--- -x; the same as the operator.
---
--- Example: local y = x:neg()
---@return engine.Tensor result
function Tensor:neg() end

--- The axes in another order.
---
--- Example: x:permute { 1, 0, 2 }
---@param axes integer[]
---@return engine.Tensor result
function Tensor:permute(axes) end

--- x to the power of other, of floats.
---
--- Example: local y = x:pow(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:pow(other) end

--- 1 / x.
---
--- Example: local y = x:recip()
---@return engine.Tensor result
function Tensor:recip() end

--- The larger of x and 0.
---
--- Example: local y = x:relu()
---@return engine.Tensor result
function Tensor:relu() end

--- The same elements as a leaf of the graph: backward leaves a gradient in `grad`.
---
--- Example: local w = engine.tensor.zeros({ 3 }):requires_grad()
---@return engine.Tensor leaf
function Tensor:requires_grad() end

--- The same elements in another shape; one size may be -1.
---
--- Example: x:reshape { -1, 4 }
---@param shape integer[]
---@return engine.Tensor result
function Tensor:reshape(shape) end

--- The nearest whole numbers, halves to even. A constant of the graph.
---
--- Example: local y = x:round()
---@return engine.Tensor result
function Tensor:round() end

--- Rows added up by number: row s of the result is the sum of the rows whose id is s, zeros where there is none.
---
--- Example: local per_document = policy:logprobs(batch):segment_sum(batch.sequence, batch.documents)
---@param ids engine.Tensor [rows], i32, from 0
---@param count integer rows of the result
---@return engine.Tensor result [count, ...]
function Tensor:segment_sum(ids, count) end

--- One slice along an axis, which is gone.
---
--- Example: x:select(0, 2)
---@param axis integer
---@param index integer
---@return engine.Tensor result
function Tensor:select(axis, index) end

--- 1 / (1 + e^-x).
---
--- Example: local y = x:sigmoid()
---@return engine.Tensor result
function Tensor:sigmoid() end

--- -1, 0 or 1. A constant of the graph.
---
--- Example: local y = x:sign()
---@return engine.Tensor result
function Tensor:sign() end

--- x sigmoid(x).
---
--- Example: local y = x:silu()
---@return engine.Tensor result
function Tensor:silu() end

--- Sines, of radians.
---
--- Example: local y = x:sin()
---@return engine.Tensor result
function Tensor:sin() end

--- The slices from `start` to below `stop` along an axis.
---
--- Example: x:slice(0, 1, 3)
---@param axis integer
---@param start integer
---@param stop? integer default: the end
---@param options? { step?: integer }
---@return engine.Tensor result
function Tensor:slice(axis, start, stop, options) end

--- e^x scaled to sum to 1 along an axis.
---
--- Example: logits:softmax(-1)
---@param axis? integer default -1
---@return engine.Tensor result
function Tensor:softmax(axis) end

--- log(1 + e^x), without overflow.
---
--- Example: local y = x:softplus()
---@return engine.Tensor result
function Tensor:softplus() end

--- Sorted along an axis, and where each element was.
---
--- Example: local sorted, from = x:sort(-1, { descending = true })
---@param axis? integer default -1
---@param options? { descending?: boolean }
---@return engine.Tensor sorted
---@return engine.Tensor indices i32
function Tensor:sort(axis, options) end

--- Square roots.
---
--- Example: local y = x:sqrt()
---@return engine.Tensor result
function Tensor:sqrt() end

--- x^2.
---
--- Example: local y = x:square()
---@return engine.Tensor result
function Tensor:square() end

--- Without an axis of size 1, or without all of them.
---
--- Example: x:squeeze(1)
---@param axis? integer default: all of size 1
---@return engine.Tensor result
function Tensor:squeeze(axis) end

--- Standard deviations over axes.
---
--- Example: local y = x:std(0)
---@param axis? integer|integer[] default: all
---@param options? { keepdim?: boolean, correction?: integer } correction: default 1 (Bessel's)
---@return engine.Tensor result
function Tensor:std(axis, options) end

--- x - other.
---
--- Example: local y = x:sub(2)
---@param other engine.Tensor|number of a shape that broadcasts
---@return engine.Tensor result
function Tensor:sub(other) end

--- Sums over axes.
---
--- Example: local y = x:sum(1, { keepdim = true })
---@param axis? integer|integer[] default: all
---@param options? { keepdim?: boolean }
---@return engine.Tensor result
function Tensor:sum(axis, options) end

--- Hyperbolic tangents.
---
--- Example: local y = x:tanh()
---@return engine.Tensor result
function Tensor:tanh() end

--- The same values in another element type, or on another device; still in the graph.
---
--- Example: x:to("bf16"); y:to("cuda")
---@param dtype_or_device "f32"|"bf16"|"i32"|"i8"|"cpu"|"cuda"|string
---@return engine.Tensor result
function Tensor:to(dtype_or_device) end

--- The elements as nested tables of numbers.
---
--- Example: local rows = x:to_table()
---@return table|number values
function Tensor:to_table() end

--- The k largest (or smallest) along an axis, and where they were.
---
--- Example: local best, at = scores:topk(3)
---@param k integer
---@param axis? integer default -1
---@param options? { largest?: boolean } default true
---@return engine.Tensor values
---@return engine.Tensor indices i32
function Tensor:topk(k, axis, options) end

--- Two axes exchanged.
---
--- Example: x:transpose(0, 1)
---@param first integer
---@param second integer
---@return engine.Tensor result
function Tensor:transpose(first, second) end

--- A new axis of size 1.
---
--- Example: x:unsqueeze(0)
---@param axis integer
---@return engine.Tensor result
function Tensor:unsqueeze(axis) end

--- Variances over axes.
---
--- Example: local y = x:var(0)
---@param axis? integer|integer[] default: all
---@param options? { keepdim?: boolean, correction?: integer } correction: default 1 (Bessel's)
---@return engine.Tensor result
function Tensor:var(axis, options) end

--- Forgets the gradient of this leaf.
---
--- Example: w:zero_grad()
function Tensor:zero_grad() end
