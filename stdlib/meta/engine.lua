---@meta engine
--- Perilune's engine, as scripts see it. Indices and axes of tensors count from 0, as token ids do; negative axes count
--- from the end. Options go in one trailing table; an unknown key is an error.

---@class engine
---@field data engine.data
---@field model engine.model
---@field optim engine.optim
---@field sandbox engine.sandbox
---@field tensor engine.tensor
---@field tokenizer engine.tokenizer
local engine = {}

--- Declares what a script does. The script returns it; `perilune run` gives its arguments and runs it.
---
--- An entry of `args` is a default, which gives the type; a list of values; or a table that describes: its first entry is
--- the default (a list in its own table), and `help`, `choices`, `min`, `max`, `type` are named.
---
--- Example: return engine.workflow { name = "hello", args = { steps = { 10, min = 1 } }, run = function(run, args) print(args.steps) end }
---@param declaration { name: string, args?: table, run: fun(run: engine.Run, args: table) }
---@return engine.Workflow workflow
function engine.workflow(declaration) end

--- An argument without a default, which must be given on the command line.
---
--- Example: args = { model = engine.required("string", { help = "folder of a checkpoint" }) }
---@param type "string"|"integer"|"number"|"boolean"|"strings"|"integers"|"numbers"|"booleans" with an s for a list
---@param options? { help?: string, choices?: any[], min?: number, max?: number }
---@return engine.Argument argument
function engine.required(type, options) end

--- An argument that is nil unless it is given.
---
--- Example: args = { adapter = engine.optional("string") }
---@param type "string"|"integer"|"number"|"boolean"|"strings"|"integers"|"numbers"|"booleans" with an s for a list
---@param options? { help?: string, choices?: any[], min?: number, max?: number }
---@return engine.Argument argument
function engine.optional(type, options) end

---@class engine.Workflow
---@class engine.Argument

return engine
