--- Supervised fine-tuning on conversations: the model learns what the assistant says, all weights or a low-rank adapter.
--- Run: perilune run scripts/sft.lua --model checkpoints/Qwen2.5-0.5B --data chats.jsonl
--- Source: Qwen2.5 technical report, arXiv 2412.15115, section 4.1 (two epochs, decay to a tenth, weight decay 0.1, clipping at 1).
local engine = require "engine"
local eval, schedules = require "std.eval", require "std.schedules"

return engine.workflow {
  name = "sft",
  args = {
    model = engine.required("string", { help = "folder of a Hugging Face checkpoint" }),
    data = engine.required("strings", { help = "conversations, .jsonl or .parquet: messages, or prompt and completion" }),
    learn = { "all", choices = { "all", "last" }, help = "which of the assistant's turns are learned" },
    device = { "cpu", help = "cpu, cuda (the first GPU), cuda:1 ..., or auto: a GPU if there is one" },
    dtype = engine.optional("string", { choices = { "f32", "bf16" }, help = "default: the checkpoint's own" }),
    seq_len = { 1024, min = 2, help = "tokens of a packed row; longer conversations are cut" },
    rows = { 4, min = 1, help = "rows of a micro-batch" },
    accumulate = { 1, min = 1, help = "micro-batches of an update" },
    epochs = { 2, min = 1 },
    lr = { 7e-6, min = 0 }, warmup = { 20, min = 0, help = "updates until lr is reached" }, final = { 0.1, min = 0, help = "share of lr at the end" },
    weight_decay = 0.1, clip_norm = { 1.0, min = 0 },
    lora = { 0, min = 0, help = "rank of an adapter; 0 trains all weights" },
    targets = engine.optional("strings", { help = "modules of the adapter: q_proj,v_proj ...; default all of the layers" }),
    dora = { false, help = "the adapter learns the lengths of rows too" },
    validation = { 0.02, min = 0, max = 0.5, help = "share of the conversations that is held out" },
    evaluate_every = { 200, min = 1, help = "updates between two looks at them" },
    recompute = { false, help = "compute layers again in the backward pass: less memory, more time" },
  },
  run = function(run, args)
    assert(args.lora > 0 or not (args.targets or args.dora), "sft: --targets and --dora go with --lora RANK")
    local lora = args.lora > 0 and { rank = args.lora, targets = args.targets, dora = args.dora } or nil
    local model = run:model("model", args.model, { device = args.device, dtype = args.dtype, recompute = args.recompute, lora = lora })
    local read = args.data[1]:match "%.parquet$" and engine.data.parquet or engine.data.jsonl
    local packed = { seq_len = args.seq_len, how = "best_fit" }
    local function part(name)
      local data = read(args.data):split(name, args.validation)
      return data:chat(model.tokenizer, { learn = args.learn, max_tokens = args.seq_len }):pack(packed)
    end
    local train = run:data("train", part "train":shuffle())
    local held_out = args.validation > 0 and part "validation"
    -- Of few conversations chance may hold none out.
    if held_out and train:documents() > 0 and not pcall(held_out.documents, held_out) then held_out = nil end
    local optim = run:optimizer("adamw", model, { lr = args.lr, weight_decay = args.weight_decay, clip_norm = args.clip_norm })

    for step in run:loop("sft", { over = train, epochs = args.epochs }) do
      -- The length of the loop is not known beforehand, as rows are packed: the schedule follows the share that is read.
      optim:set { lr = args.lr * math.min(1, step.count / args.warmup) * schedules.cosine(step.progress, 1, { final = args.final }) }
      local batches, supervised = {}, 0
      for index = 1, args.accumulate do
        batches[index] = train:take(args.rows)
        supervised = supervised + (batches[index] and batches[index].supervised or 0)
      end
      assert(step.index > 0 or supervised > 0, "sft: nothing is learned of these conversations: are they longer than --seq_len?")
      local loss = 0.0
      for _, batch in ipairs(batches) do
        local part_loss = model:cross_entropy(batch, { normalizer = math.max(supervised, 1) })
        part_loss:backward()
        loss = loss + part_loss:item()
      end
      step:log { loss = loss, lr = optim.lr, grad_norm = optim:step(), supervised = supervised }
      if held_out and step.count % args.evaluate_every == 0 then
        step:log { validation_loss = (eval.loss(model, held_out:epochs(1))) }
      end
    end
    local validation_loss = held_out and eval.loss(model, held_out:epochs(1))
    if validation_loss then
      run:log { validation_loss = validation_loss }
      print(("loss of what was held out: %.4f"):format(validation_loss))
    end
    local counts = train:counts()
    print(("conversations cut at %d tokens: %d; left out as too long: %d"):format(args.seq_len, counts.cut, counts.long))
    if lora then model:save_adapter(run.folder .. "/adapter") end
    run:save("model", model, { stop_tokens = { "<|im_end|>", "<|endoftext|>" } })
  end,
}
