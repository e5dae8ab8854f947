#!/usr/bin/env python3
"""Fine-tuning with perilune against Hugging Face TRL, on this machine's CPU or GPU, in one run.

    cargo build --release
    python tests/bench/compare_trl.py --tokenizer FOLDER --configs tiny --dtypes f32 bf16 --json result.json
    python tests/bench/compare_trl.py --tokenizer FOLDER --configs 0.5B --dtypes bf16 --device cuda --kinds grpo --answer 256

Needs torch, transformers, trl and datasets in the Python that runs it, and the folder of a Qwen2 tokenizer with no more
entries than the model has (tiny: 4096). On a GPU the weights of TRL's policy are bf16, its fastest form; perilune keeps f32 masters,
gradients and moments. Both sides begin with the same random weights and read the same records in the same order:

    sft    conversations of several turns about sums, at most 256 tokens, every token learned; 8 a step
    pack   the same, packed to rows of 256 tokens with documents kept apart; 8 rows a step (TRL's "bfd")
    dpo    8 pairs a step, about 136 tokens an answer with its prompt, a reference that is run at each step, beta 0.1
    grpo   16 prompts x 8 answers of at most 64 tokens (--answer) at temperature 1, one update; reward: digits and length

AdamW with clipping at 1 and a constant rate. Contenders take turns, each in a process of its own. Losses of the first 50 steps
of sft and dpo in f32 are compared one by one.
"""
import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time

# Vocabulary, hidden, intermediate, layers, heads, key-value heads.
SHAPES = {"tiny": (4096, 256, 704, 4, 4, 2), "small": (8192, 512, 1408, 8, 8, 2), "0.5B": (151936, 896, 4864, 24, 14, 2)}
LEARNING_RATE = {"sft": 3e-4, "pack": 3e-4, "dpo": 1e-4, "grpo": 1e-5}
# Of TRL: steps to warm up, least and most of them that are measured.
STEPS = {"sft": (2, 48, 48), "pack": (2, 6, 30), "dpo": (2, 48, 48), "grpo": (1, 2, 8)}
SYSTEM = {"role": "system", "content": "You compute."}


def question(draw):
    a, b, sign = draw.randrange(1000), draw.randrange(1000), draw.choice("+-*")
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return f"How much is {a} {sign} {b}?", f"{a} {sign} {b} = {value}"


def conversation(draw, turns):
    messages = [SYSTEM]
    for _ in range(turns):
        asked, answered = question(draw)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def records(kind):
    draw = random.Random(kind)
    if kind in ("sft", "pack"):
        return [{"messages": conversation(draw, draw.randint(1, 7))} for _ in range(1024)]
    if kind == "grpo":
        return [{"prompt": conversation(draw, 1)[:-1]} for _ in range(512)]
    pairs = []
    for _ in range(512):
        messages = conversation(draw, 3)
        wrong = re.sub(r"= -?\d+", f"= {draw.randrange(-999, 9999)}", messages[-1]["content"])
        pairs.append({"prompt": messages[:-1], "chosen": [messages[-1]], "rejected": [{"role": "assistant", "content": wrong}]})
    return pairs


def prepare(config, tokenizer, folder):
    """A random model and the records, in `folder`."""
    import torch
    import transformers

    vocab, hidden, intermediate, layers, heads, kv_heads = SHAPES[config]
    entries = transformers.AutoTokenizer.from_pretrained(tokenizer)
    shape = transformers.Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=entries.eos_token_id,
        pad_token_id=entries.pad_token_id)
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(shape)
    model.generation_config.eos_token_id = entries.eos_token_id
    model.save_pretrained(folder)
    entries.save_pretrained(folder)
    for kind in STEPS:
        with open(os.path.join(folder, f"{kind}.jsonl"), "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records(kind))


def peak_memory_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def run_trl(kind, dtype, folder, seconds, device, answer):
    """One TRL trainer, in this process; prints its figures as JSON."""
    import datasets
    import torch
    import transformers
    import trl

    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    on_gpu = device != "cpu"
    if not on_gpu:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    warm, least, most = STEPS[kind]
    ends, tokens = [], []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            ends.append(time.perf_counter())

        def on_step_end(self, args, state, control, **_):
            ends.append(time.perf_counter())
            measured = len(ends) - 1 - warm
            if measured >= most or measured >= least and ends[-1] - ends[warm] > seconds:
                control.should_training_stop = True
            return control

    # On a GPU the logits of 128 answers would not fit: four micro-batches.
    micro = 4 if on_gpu and kind == "grpo" else 1
    settings = dict(
        output_dir=tempfile.mkdtemp(), use_cpu=not on_gpu, bf16=dtype == "bf16", max_steps=warm + most + 1, seed=0, gradient_checkpointing=False,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1, learning_rate=LEARNING_RATE[kind],
        lr_scheduler_type="constant", per_device_train_batch_size=128 // micro if kind == "grpo" else 8,
        gradient_accumulation_steps=micro,
        model_init_kwargs={"dtype": "bfloat16" if on_gpu and dtype == "bf16" else "float32", "attn_implementation": "sdpa"})
    entries = transformers.AutoTokenizer.from_pretrained(folder)
    data = datasets.load_dataset("json", data_files=os.path.join(folder, f"{kind}.jsonl"), split="train", cache_dir=tempfile.mkdtemp())

    def in_order(trainer):
        class Ordered(trainer):
            def _get_train_sampler(self, dataset=None):
                return torch.utils.data.SequentialSampler(dataset if dataset is not None else self.train_dataset)
        return Ordered

    common = dict(train_dataset=data, processing_class=entries, callbacks=[Clock()])
    if kind in ("sft", "pack"):
        packing = dict(packing=True, packing_strategy="bfd") if kind == "pack" else {}
        trainer = in_order(trl.SFTTrainer)(folder, args=trl.SFTConfig(max_length=256, **packing, **settings), **common)
    elif kind == "dpo":
        config = trl.DPOConfig(max_length=256, max_prompt_length=256, beta=0.1, ref_model_init_kwargs=dict(settings["model_init_kwargs"]), **settings)
        trainer = in_order(trl.DPOTrainer)(folder, ref_model=folder, args=config, **common)
    else:
        def reward(completions, **_):
            texts = [completion[0]["content"] for completion in completions]
            return [sum(char.isdigit() for char in text) + 0.01 * len(text) for text in texts]
        config = trl.GRPOConfig(num_generations=8, max_completion_length=answer, temperature=1.0, beta=0.0, **settings)
        trainer = trl.GRPOTrainer(folder, reward_funcs=reward, args=config, **common)
    inner = trainer.training_step

    def step(model, inputs, *args, **kwargs):
        if kind in ("sft", "pack"):
            mask = inputs.get("attention_mask")
            tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        elif kind == "dpo":
            counts = {name: int(inputs[f"{name}_attention_mask"].sum()) for name in ("prompt", "chosen", "rejected")}
            tokens.append(2 * counts["prompt"] + counts["chosen"] + counts["rejected"])
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = step
    trainer.train()
    times = [later - earlier for earlier, later in zip(ends, ends[1:])][warm:]
    history = trainer.state.log_history
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory_bytes()
    report = {"step_s": statistics.median(times), "steps": len(times), "peak_memory_bytes": peak,
              "loss": [entry["loss"] for entry in history if "loss" in entry],
              "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)}}
    if tokens:
        report["tokens_per_s"] = statistics.mean(tokens[warm:warm + len(times)]) / report["step_s"]
    lengths = [entry["completions/mean_length"] for entry in history if "completions/mean_length" in entry]
    if lengths:
        report["mean_length"] = statistics.mean(lengths)
    print("RESULT " + json.dumps(report))


def run_perilune(binary, kind, dtype, folder, seconds, device, answer):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "compare_trl.lua")
    steps = {"sft": 50, "pack": 60, "dpo": 50, "grpo": 20}[kind]
    with tempfile.TemporaryDirectory() as runs:
        done = subprocess.run(
            [binary, "run", "--quiet", "--runs", runs, script, "--kind", kind, "--dtype", dtype, "--model", folder, "--steps", str(steps),
             "--seconds", str(seconds), "--lr", str(LEARNING_RATE[kind]), "--device", device, "--answer", str(answer)], capture_output=True, text=True)
    found = re.search(r"^RESULT (.*)$", done.stdout, re.M)
    if not found:
        raise SystemExit(f"perilune {kind} {dtype}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    report = json.loads(found[1])
    times, warm = report.pop("times"), STEPS[kind][0]
    report["step_s"], report["steps"] = statistics.median(times[warm:]), len(times) - warm
    if report["tokens"]:
        report["tokens_per_s"] = statistics.mean(report["tokens"][warm:]) / report["step_s"]
    del report["tokens"]
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default="target/release/perilune")
    parser.add_argument("--tokenizer")
    parser.add_argument("--configs", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--kinds", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--dtypes", nargs="+", choices=("f32", "bf16"), default=["f32"])
    parser.add_argument("--seconds", type=float, default=45, help="about how long a contender is measured")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer of grpo")
    parser.add_argument("--json")
    parser.add_argument("--trl", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trl:
        return run_trl(args.trl[0], args.trl[1], args.trl[2], float(args.trl[3]), args.device, args.answer)
    results = {}
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if args.device == "cpu":
        environment |= dict(OMP_NUM_THREADS=args.threads, MKL_NUM_THREADS=args.threads, PERILUNE_THREADS=args.threads, CUDA_VISIBLE_DEVICES="")
    os.environ.update(environment)
    for config in args.configs:
        with tempfile.TemporaryDirectory() as folder:
            prepare(config, args.tokenizer, folder)
            for kind in args.kinds:
                for dtype in args.dtypes:
                    rest = ["--device", args.device, "--answer", str(args.answer)]
                    done = subprocess.run([sys.executable, os.path.abspath(__file__), "--trl", kind, dtype, folder, str(args.seconds), *rest],
                                          env=environment, capture_output=True, text=True)
                    found = re.search(r"^RESULT (.*)$", done.stdout, re.M)
                    if not found:
                        raise SystemExit(f"TRL {kind} {dtype}: {done.stderr[-1500:]}")
                    peer = json.loads(found[1])
                    ours = run_perilune(args.binary, kind, dtype, folder, args.seconds, args.device, args.answer)
                    faster = peer["step_s"] / ours["step_s"] if kind == "grpo" else ours["tokens_per_s"] / peer["tokens_per_s"]
                    line = f"{config} {kind:<5}{dtype:<5}"
                    if kind == "grpo":
                        line += f"{60 / ours['step_s']:8.1f} steps/min against {60 / peer['step_s']:.1f}"
                        line += f" (answers of {ours['mean_length']:.0f} and {peer['mean_length']:.0f} tokens,"
                        line += f" made in {ours['generation_s'] / ours['step_s']:.2f} of ours)"
                    else:
                        line += f"{ours['tokens_per_s']:8.0f} tokens/s against {peer['tokens_per_s']:.0f}"
                    line += f": {faster:.2f}x"
                    # A process's own memory says nothing about a GPU's.
                    memory = ours["peak_memory_bytes"] / peer["peak_memory_bytes"] if args.device == "cpu" else None
                    if memory:
                        line += f"; memory {ours['peak_memory_bytes'] / 1e6:.0f} MB, {memory:.2f} of {peer['peak_memory_bytes'] / 1e6:.0f}"
                    if kind in ("sft", "dpo") and dtype == "f32":
                        far = max(abs(a - b) for a, b in zip(ours["loss"][:50], peer["loss"][:50]))
                        line += f"; losses of {min(50, len(peer['loss']))} steps within {far:.1e}"
                    print(line, flush=True)
                    results[f"{config}/{kind}/{dtype}"] = {"perilune": ours, "trl": peer, "faster": faster, "memory": memory}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
