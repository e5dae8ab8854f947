---@meta
--- A run and its steps: what `run` and `step` are in a workflow's function.

---@class engine.Run
---@field folder string where the run keeps its files
---@field id string sorts by time
---@field seed integer start of all random numbers
local Run = {}

---@class engine.StepContext
---@field attempt integer from 1
---@field key string names this execution of the step; a token for whatever outside must not happen twice
local StepContext = {}

---@class engine.Step
---@field count integer steps with this one, from 1
---@field first boolean
---@field index integer from 0
---@field last boolean whether it is the last of `steps`
---@field progress number share of the loop that is done, from 0: of its steps, or of its data if that ends sooner
---@field steps integer? as given to run:loop
local Step = {}

--- The data set called `name`. Asked again for a name, it gives the same one, at the same position.
---
--- Example: local train = run:data("train", engine.data.text("notes.txt"):tokenizer(tokenizer):pack { seq_len = 256 })
---@param name string
---@param data engine.Data
---@return engine.Data data
function Run:data(name, data) end

--- Writes values to the run's metrics, outside of a loop.
---
--- Example: run:log { validation_loss = 2.31 }
---@param values table<string, number|string|boolean|engine.Tensor> tensors of one element
function Run:log(values) end

--- The long part of a run, for Lua's `for`. The engine counts; at the end of each step it writes metrics, shows progress, takes
--- Ctrl-C, `perilune pause` and its like, and edits of the script. It ends after `steps`, or when `over` has been read `epochs` times (1), whatever comes first.
---
--- An outermost loop takes checkpoints at the ends of its steps, from which `perilune resume` goes on to the bit: every
--- `checkpoint_every` steps (every ten minutes if not given; false for none), when it ends, and on Ctrl-C. They hold what
--- run:model, run:optimizer, run:data and run:state made; other locals are made anew by the code above the loop. The newest
--- `keep` (2) stay, every `keep_every`th step, and the one where the logged value `keep_best` was lowest (highest with a `-` in
--- front).
---
--- Example: for step in run:loop("train", { steps = 100, checkpoint_every = 20 }) do step:log { loss = train_step() } end
---@param name string
---@param options { steps?: integer, epochs?: integer, over?: engine.Data, checkpoint_every?: integer|false, keep?: integer, keep_every?: integer, keep_best?: string }
---@return fun(): engine.Step? steps
function Run:loop(name, options) end

--- The model called `name`: of a checkpoint's folder, or a new one from a table of fields (see engine.model.new). Asked
--- again for a name, it gives the same model.
---
--- Example: local reference = run:model("reference", "checkpoints/sft", { frozen = true })
---@param name string
---@param source string|table
---@param options? engine.ModelOptions
---@return engine.Model model
function Run:model(name, source, options) end

--- Seconds since 1970. Outside of loops the time is recorded: a resumed run gets the same.
---
--- Example: print(run:now())
---@return number seconds
function Run:now() end

--- The optimizer of `model`: "adamw" as engine.optim.adamw, "muon" as engine.optim.muon. Asked again for the same model, it gives the
--- same optimizer with the options applied.
---
--- Example: local optim = run:optimizer("adamw", policy, { lr = 1e-5, clip_norm = 1.0 })
---@param kind "adamw"|"muon"
---@param model engine.Model
---@param options? { lr?: number, betas?: number[], eps?: number, weight_decay?: number, decay_vectors?: boolean, clip_norm?: number|false, moments?: "f32"|"bf16", merge?: engine.OnlineMerge, momentum?: number } `merge` of adamw, `momentum` of muon
---@return engine.Optimizer optimizer
function Run:optimizer(kind, model, options) end

--- Writes a model, with its tokenizer, as a Hugging Face folder inside the run's folder. `stop_tokens`: as of `Model:save`.
---
--- Example: run:save("model", policy)
---@param name string
---@param model engine.Model
---@param options? { dtype?: "f32"|"bf16", stop_tokens?: string[] }
---@return string folder
function Run:save(name, model, options) end

--- A table of plain data (numbers, strings, booleans, tensors, tables of these) that belongs to the run: checkpoints hold it,
--- and a resumed run finds it as it was. `initial` is what it is at first, and again for code above the loop in which the run is
--- resumed: what such code makes of state or models belongs into run:step.
---
--- Example: local best = run:state("best", { loss = math.huge, step = 0 })
---@param name string
---@param initial table
---@return table state
function Run:state(name, initial) end

--- Does `body` once and records its results, which must be plain data. Whenever the script comes here again, after a crash or a
--- resume, it gets the recorded results and `body` does not run. Other `inputs` at a recorded step are an error. Random numbers
--- in the body are a stream of its own. A body that changes models, optimizers, data sets or state of the run, or logs, ends with
--- a checkpoint; inside a loop it is done again with its iteration. One that failed fails again where a resume repeats the way to
--- its checkpoint.
---
--- It is tried `attempts` times (1), `backoff` seconds (1, doubling) apart, each for `timeout` seconds at most; wrong arguments and
--- errors that contain a text of `final` are not tried again.
---
--- Example: local scores = run:step("score", { model = "sft", n = 100 }, function(step) return score_all(step.key) end)
---@param name string
---@param inputs any plain data that the result depends on
---@param body fun(step: engine.StepContext): any
---@param options? { attempts?: integer, backoff?: number, timeout?: number, final?: string[] }
---@return any results
function Run:step(name, inputs, body, options) end

--- Adds values to the step's line in the run's metrics; the progress shows them.
---
--- Example: step:log { loss = loss, grad_norm = optim:step() }
---@param values table<string, number|string|boolean|engine.Tensor> tensors of one element
function Step:log(values) end
