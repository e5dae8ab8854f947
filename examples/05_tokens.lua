--- Lesson 5: from text to batches: bytes, byte-pair encoding, documents, packing.
--- Run: perilune run examples/05_tokens.lua --vocab_size 400
local engine = require "engine"

return engine.workflow {
  name = "tokens",
  args = {
    text = { "examples/data/rhymes.txt", help = "trains the tokenizer" },
    records = { "examples/data/facts.jsonl", help = "one JSON object a line, with a field `text`" },
    vocab_size = { 512, min = 300 },
  },
  run = function(_, args)
    -- The simplest tokenizer: a token is a byte, so every text has one, and a letter such as é has two.
    local bytes = engine.tokenizer.bytes()
    print("bytes", table.concat(bytes:encode "Blé", " "))

    -- Byte-pair encoding joins the two neighbours that are most often side by side, again and again, until the vocabulary
    -- is full or no pair comes twice. Texts get shorter, words of the training text most of all.
    local bpe = engine.tokenizer.train(engine.data.text(args.text), { vocab_size = args.vocab_size })
    local line = "The kettle hums, the window weeps,"
    local ids = bpe:encode(line)
    local pieces = {}
    for index, id in ipairs(ids) do pieces[index] = bpe:decode { id } end
    print(table.concat(pieces, "|"))
    print(("%d bytes, %d tokens of %d"):format(#line, #ids, bpe.vocab_size))
    assert(bpe:decode(ids) == line, "decoding gives the text back")

    -- A data set is a description; each method returns another one, and reading begins with `take`. A document of a JSON
    -- lines file is a line, of a text file the file, a line or a paragraph.
    local facts = engine.data.jsonl(args.records)
    local paragraphs = engine.data.text(args.text, { document = "paragraph" })
    print(("%d facts, %d rhymes"):format(facts:documents(), paragraphs:documents()))
    print("a record: " .. facts:take(1)[1].text)

    -- A model trains on rows of one length, but documents have many. Packing fills rows with several documents. Each one
    -- ends with the end-of-text token, begins again at position 0, and cannot see its neighbours: `cu_seqlens` says
    -- where documents begin.
    local packed = facts:tokenizer(bpe):pack { seq_len = 64, how = "best_fit" }
    local batch = packed:take(2)
    print(("%d rows of at most 64: %d tokens"):format(batch.rows, batch.count))
    print("documents begin at", batch.cu_seqlens)
    print("positions", batch.position_ids:slice(0, 0, 40))
    print("the first row reads: " .. bpe:decode(batch.tokens:slice(0, 0, 40)))

    -- Three ways to pack the same records; what is left over at the end is a shorter row.
    for _, how in ipairs { "concat", "best_fit", "windows" } do
      local rows, tokens = 0, 0
      local data = facts:tokenizer(bpe):pack { seq_len = 64, how = how }
      for one in function() return data:take(1) end do rows, tokens = rows + 1, tokens + one.count end
      print(("%-8s %d rows, %.0f%% full"):format(how, rows, 100 * tokens / (rows * 64)))
    end
  end,
}
