---@meta
--- Texts that a model generates.

---@class engine.Rollouts
---@field count integer texts
---@field finish string[] why each text ended: "stop_token", "stop_text" or "length"
---@field group integer? texts of each prompt, which stand side by side; nil where `select` left prompts unequally many
---@field lengths integer[] tokens of each text
---@field records any[] the prompt of each text, as it was given
---@field texts string[] without stop strings and special tokens
---@field total_tokens integer of all texts
---@field truncated integer texts that ended by their length
local Rollouts = {}

--- Batches of whole rollouts, in order: prompt and text of each as one document, labels on the text alone. `batch.sequence`
--- numbers the rollouts from 0 over all batches, and `batch.logprobs` holds what each label was sampled with. Answers to one
--- prompt that come into one batch share the prompt's rows: all documents but the first begin with its last token.
---
--- Example: for batch in rollouts:batches { tokens = 4096 } do losses.nll(policy:logprobs(batch), batch.mask):backward() end
---@param options? { tokens?: integer } most tokens of a batch, default 8192, a shared prompt counted once; one rollout may be longer
---@return fun(): engine.Batch? next
function Rollouts:batches(options) end

--- The log-probability of each token of a text under the model that generated it, over the whole vocabulary: bit for bit
--- what `model:logprobs` gives at the temperature of sampling (1 where choices are greedy).
---
--- Example: print(rollouts:logprobs(1):sum())
---@param index integer from 1
---@return engine.Tensor logprobs [tokens], f32
function Rollouts:logprobs(index) end

--- The token ids of the prompt of a text.
---
--- Example: print(#rollouts:prompt(1))
---@param index integer from 1
---@return integer[] ids
function Rollouts:prompt(index) end

--- Some of the rollouts, numbered anew.
---
--- Example: local best = rollouts:select { 3, 7 }
---@param indices integer[] from 1
---@return engine.Rollouts rollouts
function Rollouts:select(indices) end

--- The token ids of a text, the one that ended it too.
---
--- Example: print(tokenizer:decode(rollouts:tokens(1)))
---@param index integer from 1
---@return integer[] ids
function Rollouts:tokens(index) end

--- For each token of a text the most likely tokens in its place, the best first.
---
--- Example: print(policy:generate({ "The" }, { top_logprobs = 2 }):top_logprobs(1)[1][1].logprob)
---@param index integer from 1
---@return { id: integer, logprob: number }[][] tokens
function Rollouts:top_logprobs(index) end
