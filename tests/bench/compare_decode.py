#!/usr/bin/env python3
"""Decoding and prefill of perilune against Hugging Face transformers and llama.cpp, on this machine's CPU, in one run.

    cargo build --release
    python tests/bench/compare_decode.py --configs small q05 --llama-bench LLAMA_BENCH --gguf FOLDER --json result.json

Needs torch and transformers in the Python that runs it. llama.cpp takes part in the figures of q05 if its llama-bench is named;
FOLDER then holds q05-f32.gguf, q05-bf16.gguf and q05-q8_0.gguf, which `--write` makes there first (needs the gguf and tokenizers
packages; 3.4 GB). Weights are random: no speed depends on them. The contenders take turns, each in a process of its own, for
several rounds; the ratio of a round compares figures taken minutes apart at most, and the median over the rounds is reported.

What is compared with what, in tokens a second:
    decode, batch 1 or 8    64 tokens after prompts of 64, greedy; transformers: a bare loop over its cache
    prefill, N tokens       one prompt into an empty cache, logits of its last position
    f32 against f32, bf16 against bf16; int8 against llama.cpp's q8_0
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from compare import SHAPES as TRAINED_SHAPES
from compare import last_json

SHAPES = {"small": TRAINED_SHAPES["small"], "q05": (151936, 896, 4864, 24, 14, 2)}
GGUF_KINDS = {"f32": "f32", "bf16": "bf16", "int8": "q8_0"}
PROMPT_TOKENS, DECODED_TOKENS = 64, 64


def run_transformers(config, dtype, what, number, seconds):
    """One figure, in this process; printed as JSON."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    vocab, hidden, intermediate, layers, heads, kv_heads = SHAPES[config]
    shape = transformers.Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192, tie_word_embeddings=True)
    shape._attn_implementation = "sdpa"
    model = transformers.Qwen2ForCausalLM(shape).to(torch.bfloat16 if dtype == "bf16" else torch.float32).eval()

    def decode():
        out = model(input_ids=torch.randint(0, vocab, (number, PROMPT_TOKENS)), use_cache=True, logits_to_keep=1)
        cache, token, start = out.past_key_values, out.logits[:, -1:].argmax(-1), time.perf_counter()
        for _ in range(DECODED_TOKENS):
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return number * DECODED_TOKENS / (time.perf_counter() - start)

    def prefill():
        start = time.perf_counter()
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        return number / (time.perf_counter() - start)

    tokens = torch.randint(0, vocab, (1, number))
    figure = decode if what == "decode" else prefill
    with torch.inference_mode():
        figure()
        rates, start = [], time.perf_counter()
        while len(rates) < 2 or (len(rates) < 50 and time.perf_counter() - start < seconds):
            rates.append(figure())
    print(json.dumps({"tokens_per_s": statistics.median(rates), "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}))


def run_llama(args, dtype, what, number, env):
    """One figure of llama-bench; it has no batch of several texts."""
    if what == "decode" and number != 1:
        return {"error": "one text at a time"}
    work = ["-p", "0", "-n", str(DECODED_TOKENS), "-r", "5"] if what == "decode" else ["-p", str(number), "-n", "0", "-r", "2"]
    model = os.path.join(args.gguf, f"q05-{GGUF_KINDS[dtype]}.gguf")
    command = [args.llama_bench, "-m", model, "-t", str(args.threads), "-o", "json", *work]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=args.timeout)
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    result = json.loads(done.stdout)[0]
    return {"tokens_per_s": result["avg_ts"], "spread": result["stddev_ts"]}


def write_gguf(folder):
    """The q05 shape with random weights, in each kind."""
    import gguf
    import numpy
    from gguf.quants import quantize
    from tokenizers.pre_tokenizers import ByteLevel

    vocab, hidden, intermediate, layers, heads, kv_heads = SHAPES["q05"]
    head_dim = hidden // heads
    os.makedirs(folder, exist_ok=True)
    types = {"f32": ("F32", "ALL_F32"), "bf16": ("BF16", "MOSTLY_BF16"), "q8_0": ("Q8_0", "MOSTLY_Q8_0")}
    for kind, (matrix_type, file_type) in types.items():
        matrix_type, random = gguf.GGMLQuantizationType[matrix_type], numpy.random.default_rng(0)
        writer = gguf.GGUFWriter(os.path.join(folder, f"q05-{kind}.gguf"), "qwen2")
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_context_length(32768)
        writer.add_embedding_length(hidden)
        writer.add_block_count(layers)
        writer.add_feed_forward_length(intermediate)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_rope_freq_base(1e6)
        writer.add_layer_norm_rms_eps(1e-6)
        # No text is tokenised: any vocabulary of the right size will do.
        bytes_ = sorted(ByteLevel.alphabet())
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(bytes_ + [f"token{i}" for i in range(vocab - len(bytes_))])
        writer.add_token_types([1] * vocab)
        writer.add_token_merges([f"{bytes_[70]} {bytes_[71]}"])
        writer.add_eos_token_id(vocab - 1)

        def matrix(name, outputs, inputs):
            values = random.standard_normal((outputs, inputs), dtype=numpy.float32) * 0.02
            writer.add_tensor(f"{name}.weight", quantize(values, matrix_type), raw_dtype=matrix_type)

        def vector(name, values):
            writer.add_tensor(name, values.astype(numpy.float32))

        matrix("token_embd", vocab, hidden)
        for layer in range(layers):
            block = f"blk.{layer}."
            for norm in ("attn_norm", "ffn_norm"):
                vector(f"{block}{norm}.weight", numpy.ones(hidden))
            for name, outputs in (("attn_q", heads * head_dim), ("attn_k", kv_heads * head_dim), ("attn_v", kv_heads * head_dim)):
                matrix(block + name, outputs, hidden)
                vector(f"{block}{name}.bias", random.standard_normal(outputs) * 0.02)
            matrix(f"{block}attn_output", hidden, heads * head_dim)
            matrix(f"{block}ffn_gate", intermediate, hidden)
            matrix(f"{block}ffn_up", intermediate, hidden)
            matrix(f"{block}ffn_down", hidden, intermediate)
        vector("output_norm.weight", numpy.ones(hidden))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=os.path.join(here, "..", "..", "target", "release", "perilune"))
    parser.add_argument("--llama-bench", help="llama.cpp's program")
    parser.add_argument("--gguf", default="gguf", help="folder of llama.cpp's models")
    parser.add_argument("--write", action="store_true", help="write them first")
    parser.add_argument("--configs", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=GGUF_KINDS, default=list(GGUF_KINDS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--prefills", nargs="*", type=int, default=[512, 4096])
    parser.add_argument("--seconds", type=float, default=8, help="of measurement, for each figure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one process")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--peer", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        config, dtype, what, number = args.peer
        return run_transformers(config, dtype, what, int(number), args.seconds)
    if not os.path.exists(args.binary):
        sys.exit(f"{args.binary} does not exist: run `cargo build --release`, or name the program with --binary")
    if args.write:
        write_gguf(args.gguf)
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PERILUNE_THREADS": str(args.threads)}
    work = [("decode", batch) for batch in args.batches] + [("prefill", tokens) for tokens in args.prefills]
    figures = {}
    for round_ in range(args.rounds):
        for config in args.configs:
            for dtype in args.dtypes:
                command = [args.binary, "bench", "decode", "--config", config, "--dtype", dtype, "--json", "--seconds", str(5 * args.seconds)]
                for option, numbers in (("--batch", args.batches), ("--prefill", args.prefills)):
                    command += [option, ",".join(map(str, numbers))] if numbers else []
                ours = last_json(command, env, args.timeout)
                for what, number in work:
                    contenders = {"perilune": ours if "error" in ours else {"tokens_per_s": ours[f"{what}_{number}"]["tokens_per_s"]}}
                    if dtype != "int8":
                        peer = [sys.executable, os.path.abspath(__file__), "--seconds", str(args.seconds), "--peer", config, dtype, what, str(number)]
                        contenders["transformers"] = last_json(peer, env, args.timeout)
                    if args.llama_bench and config == "q05":
                        contenders["llama.cpp"] = run_llama(args, dtype, what, number, env)
                    for name, figure in contenders.items():
                        figures.setdefault((config, dtype, what, number), {}).setdefault(name, []).append(figure)
                    shown = [f"{name} {figure.get('error') or format(figure['tokens_per_s'], '.1f')}" for name, figure in contenders.items()]
                    print(f"round {round_ + 1}  {config} {dtype} {what} {number}: " + ", ".join(shown), flush=True)
    report(figures, args)


def rates(contenders, name):
    """A rate a round, None where there is none."""
    return [figure.get("tokens_per_s") for figure in contenders.get(name, [])]


def median_ratio(ours, theirs):
    ratios = [our / their for our, their in zip(ours, theirs) if our and their]
    return statistics.median(ratios) if ratios else None


def report(figures, args):
    print("\nmedian tokens/s, and the median of the rounds' ratios")
    for (config, dtype, what, number), contenders in figures.items():
        ours = rates(contenders, "perilune")
        line = f"{config:<6}{dtype:<5}{what:<8}{number:<5}"
        for name in contenders:
            known = [rate for rate in rates(contenders, name) if rate]
            ratio = median_ratio(ours, rates(contenders, name))
            line += f"  {name} {statistics.median(known):.1f}" if known else ""
            line += f" ({ratio:.2f})" if ratio and name != "perilune" else ""
        one = figures.get((config, dtype, what, 1))
        times = median_ratio(ours, rates(one, "perilune")) if what == "decode" and number != 1 and one else None
        line += f"  {times:.2f} times one text" if times else ""
        print(line)
    if args.json:
        with open(args.json, "w") as out:
            json.dump({" ".join(map(str, key)): contenders for key, contenders in figures.items()}, out, indent=1)


if __name__ == "__main__":
    main()
