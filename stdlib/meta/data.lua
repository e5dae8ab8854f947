---@meta
--- Data sets, the batches they give, and tokenizers.

---@class engine.data
local data = {}

---@class engine.tokenizer
local tokenizer = {}

---@class engine.Data
local Data = {}

---@class engine.Batch
---@field count integer tokens, those that documents share counted once
---@field cu_seqlens engine.Tensor [documents + 1], i32: where each document begins, and the end
---@field documents integer
---@field labels engine.Tensor [tokens], i32: what each position should predict, or -100
---@field logprobs engine.Tensor? [tokens], f32: of rollouts, what each label was sampled with, or 0
---@field mask engine.Tensor [tokens], f32: 1 where there is a label
---@field position_ids engine.Tensor [tokens], i32: from 0 in each document; where it shares the beginning of another, from behind it
---@field rollouts integer? of rollouts: how many they are in all, this batch being a part
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

--- A batch of documents given as token ids, one row each; labels are the ids shifted by one. With a `mask` only tokens where
--- it is 1 are labels: it stands at the token itself, not at the one that predicts it.
---
--- Example: local batch = engine.data.batch { { 5, 6, 7 }, { tokens = { 8, 9 }, mask = { 0, 1 } } }
---@param documents (integer[]|engine.Tensor|{ tokens: integer[]|engine.Tensor, mask?: integer[]|boolean[]|engine.Tensor })[]
---@return engine.Batch batch
function data.batch(documents) end

--- A batch of conversations, one row each, through the tokenizer's chat template, for scoring what a script made. Only what
--- the assistant says has labels. A conversation is a list of messages, or a record as `Data:chat` reads it.
---
--- Example: local batch = engine.data.chat_batch(tokenizer, { { { role = "user", content = "2+2?" }, { role = "assistant", content = "4" } } })
---@param tokenizer engine.Tokenizer
---@param conversations table[]
---@param options? { learn?: "all"|"last", max_tokens?: integer, long?: "cut"|"skip"|"error" } as of `Data:chat`
---@return engine.Batch batch
function data.chat_batch(tokenizer, conversations, options) end

--- JSON-lines files, one record a line. Its texts are in the field `text` unless `field` names another.
---
--- Example: engine.data.jsonl("pairs.jsonl", { field = "prompt" }):shuffle()
---@param paths string|string[]
---@param options? { field?: string, skip_bad?: boolean } skip_bad: leave bad lines out instead of failing
---@return engine.Data data
function data.jsonl(paths, options) end

--- Draws each record from one of several data sets, with a probability in proportion to its weight. Order, split and epochs
--- are those of each part; tokenizer, chat, pairs, prompts and packing are the mixture's, and alike where parts have them.
---
--- Example: engine.data.mix { { books, 0.7 }, { code, 0.3 } }
---@param parts { [1]: engine.Data, [2]: number }[]
---@param options? { seed?: integer } default: the run's seed
---@return engine.Data data
function data.mix(parts, options) end

--- Parquet files, one record a row: text, numbers, lists and structs. Nulls are fields that are not there. Shuffled, rows
--- come in any order if 256 MiB hold them all decoded, else row group after row group, each in a random order.
---
--- Example: engine.data.parquet("ultrafeedback.parquet"):pairs(policy.tokenizer)
---@param paths string|string[]
---@param options? { field?: string, skip_bad?: boolean } as of `jsonl`
---@return engine.Data data
function data.parquet(paths, options) end

--- Records that a script made, as a data set. It is the same data set where its content is the same.
---
--- Example: local pairs = engine.data.records({ { prompt = "Hi", chosen = "Hello!", rejected = "No." } }):pairs(policy.tokenizer)
---@param records table[] each with names and plain values
---@param options? { field?: string, skip_bad?: boolean } as of `jsonl`
---@return engine.Data data
function data.records(records, options) end

--- Text files. A document is a whole file, a line, or a paragraph (blank lines lie between).
---
--- Example: engine.data.text("poems.txt", { document = "paragraph" })
---@param paths string|string[]
---@param options? { document?: "file"|"line"|"paragraph" }
---@return engine.Data data
function data.text(paths, options) end

--- Writes records as JSON lines: the whole file or nothing. Keys are sorted, those of records that were read
--- from JSON as they were there. What JSON would lose is an error: numbers that
--- are not finite, bytes that are not UTF-8, tables that are a list and more.
---
--- Example: engine.data.write_jsonl("kept.jsonl", { { prompt = "2+2", completion = "4" } })
---@param path string
---@param records table[]
function data.write_jsonl(path, records) end

--- Records are conversations, rendered by the tokenizer's chat template; only what the assistant says is learned, up to
--- and with the token that ends its turn. A record has `messages` (each a role and a content, or tool_calls), or
--- `conversations` (from and value), or `prompt` and `completion`, texts or lists of messages; and `tools`, if any.
--- Control tokens written in a message stay plain text.
--- `learn` "last" learns the last answer alone. A conversation of more than `max_tokens` is cut there ("cut"), left out
--- ("skip") or an error; one cut before anything learned is left out. `Data:counts` says how many.
---
--- Example: engine.data.jsonl("chats.jsonl"):chat(policy.tokenizer):pack { seq_len = 2048, how = "best_fit" }
---@param tokenizer engine.Tokenizer
---@param options? { learn?: "all"|"last", max_tokens?: integer, long?: "cut"|"skip"|"error" } defaults: "all", none, "cut"
---@return engine.Data data
function Data:chat(tokenizer, options) end

--- What became of the records taken so far that were not used whole: `bad` ones left out, those left out because they are
--- too long, documents that were cut.
---
--- Example: print(data:counts().long)
---@return { bad: integer, long: integer, cut: integer } counts
function Data:counts() end

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
--- fullest row with room ("best_fit", among `pool` documents), windows of one long text ("windows"), or each document a row
--- of its own, uncut ("whole", without seq_len).
---
--- Example: data:tokenizer(tokenizer):pack { seq_len = 1024 }
---@param options { seq_len?: integer, how?: "concat"|"best_fit"|"windows"|"whole", pool?: integer }
---@return engine.Data data
function Data:pack(options) end

--- Records are pairs of answers. `take(n)` gives a batch of 2n documents: the chosen answer of pair i is document 2i, the
--- rejected one 2i + 1, counted from 0, each behind its prompt; only the answers have labels. A record has `chosen` and
--- `rejected`, and `prompt`, texts or lists of messages; without `prompt`, both are whole conversations that begin alike.
--- Options are those of `Data:chat`; a pair of which one is left out goes with it.
---
--- Example: local pairs = engine.data.jsonl("pairs.jsonl"):pairs(policy.tokenizer, { max_tokens = 1024 })
---@param tokenizer engine.Tokenizer
---@param options? { learn?: "all"|"last", max_tokens?: integer, long?: "cut"|"skip"|"error" }
---@return engine.Data data
function Data:pairs(tokenizer, options) end

--- Records with a prompt: `take` gives them as tables, without those whose prompt, up to where the answer begins, has more
--- than `max_tokens`. A prompt is in `prompt`, a text or a list of messages, or in `messages`.
---
--- Example: local prompts = engine.data.jsonl("sums.jsonl"):prompts(policy.tokenizer, { max_tokens = 256 })
---@param tokenizer engine.Tokenizer
---@param options? { max_tokens?: integer, long?: "skip"|"error" } default "skip"
---@return engine.Data data
function Data:prompts(tokenizer, options) end

--- Documents come in random order, another one each epoch; windows too, and each epoch cuts them from the text at other places.
---
--- Example: data:shuffle { seed = 7 }
---@param options? { seed?: integer } default: the run's seed
---@return engine.Data data
function Data:shuffle(options) end

--- Keeps one part of a data set that is not split yet. `fraction` is the share of the validation part.
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
---@param options? { generation_prompt?: boolean, tools?: table[]|string } generation_prompt: end with the beginning of the assistant's turn
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
