---@meta
--- Data sets, the batches they give, and tokenizers.

---@class engine.data
local data = {}

---@class engine.tokenizer
local tokenizer = {}

---@class engine.Data
local Data = {}

---@class engine.Batch
---@field count integer tokens
---@field cu_seqlens engine.Tensor [documents + 1], i32: where each document begins, and the end
---@field documents integer
---@field labels engine.Tensor [tokens], i32: what each position should predict, or -100
---@field logprobs engine.Tensor? [tokens], f32: of rollouts, what each label was sampled with, or 0
---@field mask engine.Tensor [tokens], f32: 1 where there is a label
---@field position_ids engine.Tensor [tokens], i32: from 0 in each document
---@field rows integer
---@field sequence engine.Tensor [tokens], i32: which document of the batch each token belongs to, from 0
---@field supervised integer tokens with a label
---@field tokens engine.Tensor [tokens], i32
local Batch = {}

---@class engine.Tokenizer
---@field eos integer? id that ends a text
---@field pad integer?
---@field vocab_size integer
local Tokenizer = {}

--- A batch of documents given as token ids, one row each; labels are the ids shifted by one.
---
--- Example: local batch = engine.data.batch { { 5, 6, 7 }, { 8, 9 } }
---@param documents (integer[]|engine.Tensor)[]
---@return engine.Batch batch
function data.batch(documents) end

--- JSON-lines files, one record a line. Its texts are in the field `text` unless `field` names another.
---
--- Example: engine.data.jsonl("pairs.jsonl", { field = "prompt" }):shuffle()
---@param paths string|string[]
---@param options? { field?: string, skip_bad?: boolean } skip_bad: leave bad lines out instead of failing
---@return engine.Data data
function data.jsonl(paths, options) end

--- Draws each record from one of several data sets, with a probability in proportion to its weight.
---
--- Example: engine.data.mix { { books, 0.7 }, { code, 0.3 } }
---@param parts { [1]: engine.Data, [2]: number }[]
---@param options? { seed?: integer } default: the run's seed
---@return engine.Data data
function data.mix(parts, options) end

--- Text files. A document is a whole file, a line, or a paragraph (blank lines lie between).
---
--- Example: engine.data.text("poems.txt", { document = "paragraph" })
---@param paths string|string[]
---@param options? { document?: "file"|"line"|"paragraph" }
---@return engine.Data data
function data.text(paths, options) end

--- Records are conversations (field `messages`), rendered by the tokenizer's chat template; only what the assistant says
--- is learned.
---
--- Example: engine.data.jsonl("chats.jsonl"):chat(policy.tokenizer):pack { seq_len = 2048, how = "best_fit" }
---@param tokenizer engine.Tokenizer
---@return engine.Data data
function Data:chat(tokenizer) end

--- Documents of one epoch.
---
--- Example: print(data:documents())
---@return integer count
function Data:documents() end

--- Reads everything `count` times. The default is once.
---
--- Example: data:epochs(3)
---@param count integer
---@return engine.Data data
function Data:epochs(count) end

--- Reads everything again and again.
---
--- Example: data:shuffle():forever()
---@return engine.Data data
function Data:forever() end

--- Packs documents into rows of at most `seq_len` tokens: cut where a row is full ("concat"), whole documents into the
--- fullest row with room ("best_fit", among `pool` documents), or windows of one long text ("windows").
---
--- Example: data:tokenizer(tokenizer):pack { seq_len = 1024 }
---@param options { seq_len: integer, how?: "concat"|"best_fit"|"windows", pool?: integer }
---@return engine.Data data
function Data:pack(options) end

--- Documents come in random order, another one each epoch.
---
--- Example: data:shuffle { seed = 7 }
---@param options? { seed?: integer } default: the run's seed
---@return engine.Data data
function Data:shuffle(options) end

--- Keeps one part. `fraction` is the share of the validation part.
---
--- Example: local held_out = data:split("validation", 0.1)
---@param part "train"|"validation"
---@param fraction number from 0 to 1
---@return engine.Data data
function Data:split(part, fraction) end

--- The next `count` packed rows as one batch, or, without `pack`, the next records as tables; nil at the end.
---
--- Example: local batch = train:take(8)
---@param count integer
---@return engine.Batch|table[]|nil batch
function Data:take(count) end

--- Texts become tokens by `tokenizer`.
---
--- Example: data:tokenizer(engine.tokenizer.bytes())
---@param tokenizer engine.Tokenizer
---@return engine.Data data
function Data:tokenizer(tokenizer) end

--- The tokenizer whose tokens are the 256 bytes, and the chat tokens.
---
--- Example: local tokenizer = engine.tokenizer.bytes()
---@return engine.Tokenizer tokenizer
function tokenizer.bytes() end

--- The tokenizer of a model's folder, or of a tokenizer.json.
---
--- Example: local tokenizer = engine.tokenizer.load("checkpoints/Qwen2.5-0.5B")
---@param path string
---@return engine.Tokenizer tokenizer
function tokenizer.load(path) end

--- Trains a byte-level BPE on the texts of a data set.
---
--- Example: local tokenizer = engine.tokenizer.train(engine.data.text("book.txt"), { vocab_size = 4096 })
---@param data engine.Data
---@param options { vocab_size: integer }
---@return engine.Tokenizer tokenizer
function tokenizer.train(data, options) end

--- A conversation as the chat template writes it.
---
--- Example: tokenizer:chat({ { role = "user", content = "Hi" } }, { generation_prompt = true })
---@param messages { role: string, content: string }[]
---@param options? { generation_prompt?: boolean } end with the beginning of the assistant's turn
---@return string text
function Tokenizer:chat(messages, options) end

--- The text of token ids.
---
--- Example: print(tokenizer:decode(batch.tokens))
---@param ids integer[]|engine.Tensor
---@param options? { skip_special?: boolean }
---@return string text
function Tokenizer:decode(ids, options) end

--- The token ids of a text. Control tokens written in it stay plain text unless `specials` is true.
---
--- Example: local ids = tokenizer:encode("The Moon")
---@param text string
---@param options? { specials?: boolean }
---@return integer[] ids
function Tokenizer:encode(text, options) end

--- Writes tokenizer.json and tokenizer_config.json into a folder.
---
--- Example: tokenizer:save("checkpoints/mine")
---@param folder string
function Tokenizer:save(folder) end
