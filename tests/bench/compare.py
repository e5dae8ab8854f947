#!/usr/bin/env python3
"""Training speed of perilune against PyTorch with Hugging Face transformers, on this machine's CPU, in one run.

    cargo build --release
    python tests/bench/compare.py --configs tiny small --rounds 3 --json result.json

Needs torch and transformers in the Python that runs it. The work is a full training step of Qwen2 with random weights:
forward, cross entropy, backward, AdamW, on 4 sequences of 512 random tokens. The contenders take turns, each in a process of
its own, for several rounds, so that other work on a shared machine meets all of them alike; the ratio of a round compares
figures taken minutes apart at most, and the median over the rounds is reported.

What is compared with what:
    f32    perilune f32    against  f32 eager, f32 compiled
    bf16   perilune bf16   against  bf16 autocast eager and compiled (f32 weights), bf16 pure (no f32 weights at all)
perilune's bf16 keeps f32 master weights and moments, so autocast is its like; pure bf16 rounds every update to 8 bits. With
`--moments bf16` its moments are bf16, as those of the pure form are, and its master weights f32 as before.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

# As `perilune bench` has them: vocab, hidden, intermediate, layers, heads, kv heads; tied embeddings.
SHAPES = {
    "tiny": (4096, 256, 704, 4, 4, 2),
    "small": (8192, 512, 1408, 8, 8, 2),
    "q05x4": (151936, 896, 4864, 4, 14, 2),
}
SEQUENCES, TOKENS = 4, 512
PEERS = {
    "f32": ["f32-eager", "f32-compiled"],
    "bf16": ["autocast-eager", "autocast-compiled", "pure-eager"],
}


def peak_memory_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def run_peer(config, peer, seconds):
    """One torch contender, in this process; prints its figures as JSON."""
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
    precision, mode = peer.split("-")
    model = transformers.Qwen2ForCausalLM(shape).to(torch.bfloat16 if precision == "pure" else torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, vocab, (SEQUENCES, TOKENS))
    forward = torch.compile(model) if mode == "compiled" else model

    def step():
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    step(), step()  # Compilation, allocation, optimizer state.
    times, start = [], time.perf_counter()
    while len(times) < 3 or (len(times) < 200 and time.perf_counter() - start < seconds):
        times.append(step())
    print(json.dumps({
        "median_ms": statistics.median(times) * 1e3, "best_ms": min(times) * 1e3, "runs": len(times),
        "tokens_per_s": SEQUENCES * TOKENS / statistics.median(times), "peak_memory_bytes": peak_memory_bytes(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}))


def last_json(command, env, timeout):
    """The JSON that a command prints last, or what went wrong."""
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"took over {timeout} s"}
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout[done.stdout.index("{"):])


def run_perilune(binary, config, dtype, moments, seconds, env, timeout):
    command = [binary, "bench", "train", "--config", config, "--dtype", dtype, "--moments", moments, "--seconds", str(seconds), "--json"]
    result = last_json(command, env, timeout)
    return result if "error" in result else {**result, **result["step"]}


def median_of(figures, key):
    values = [figure[key] for figure in figures if "error" not in figure]
    return statistics.median(values) if values else None


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default=os.path.join(here, "..", "..", "target", "release", "perilune"))
    parser.add_argument("--configs", nargs="+", choices=SHAPES, default=["tiny", "small"])
    parser.add_argument("--dtypes", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--moments", choices=("f32", "bf16"), default="f32", help="of perilune's optimizer")
    parser.add_argument("--peers", nargs="+", help="only these, for example f32-eager")
    parser.add_argument("--seconds", type=float, default=15, help="of measurement, for each contender and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one process")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return run_peer(*args.peer, args.seconds)
    if not os.path.exists(args.binary):
        sys.exit(f"{args.binary} does not exist: run `cargo build --release`, or name the program with --binary")
    env = dict(os.environ, OMP_NUM_THREADS=str(args.threads), PERILUNE_THREADS=str(args.threads), CUDA_VISIBLE_DEVICES="")
    report = {"date": time.strftime("%Y-%m-%d"), "threads": args.threads, "load_before": os.getloadavg()[0], "figures": []}
    print(f"load {os.getloadavg()[0]:.2f} before the first figure (above 0.5 the machine is not idle)")
    print(f"{'work':<13}{'contender':<20}{'tokens/s':>10}{'peak MB':>9}{'perilune is':>14}{'memory':>9}")
    for config in args.configs:
        for dtype in args.dtypes:
            peers = [peer for peer in PEERS[dtype] if not args.peers or peer in args.peers]
            figures = {name: [] for name in ["perilune", *peers]}
            for turn in range(args.rounds):
                for name in (list(figures) if turn % 2 == 0 else reversed(list(figures))):
                    if name == "perilune":
                        figure = run_perilune(args.binary, config, dtype, args.moments, args.seconds, env, args.timeout)
                    else:
                        command = [sys.executable, __file__, "--peer", config, name, "--seconds", str(args.seconds)]
                        figure = last_json(command, env, args.timeout)
                    figures[name].append(figure)
                    said = figure.get("error") or f"{figure['tokens_per_s']:.0f} tokens/s"
                    print(f"  round {turn + 1}: {config} {dtype} {name}: {said}", file=sys.stderr, flush=True)
            ours = figures["perilune"]
            for name, all_rounds in figures.items():
                speed, memory = median_of(all_rounds, "tokens_per_s"), median_of(all_rounds, "peak_memory_bytes")
                if speed is None:
                    print(f"{config + ' ' + dtype:<13}{name:<20}failed: {all_rounds[-1]['error']}")
                    continue
                line = f"{config + ' ' + dtype:<13}{name:<20}{speed:>10.0f}{memory / 1e6:>9.0f}"
                rounds = [(a, b) for a, b in zip(ours, all_rounds) if "error" not in a and "error" not in b]
                if name != "perilune" and rounds:
                    ratio = statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in rounds)
                    line += f"{ratio:>12.2f} x{median_of(ours, 'peak_memory_bytes') / memory:>7.2f} x"
                print(line, flush=True)
            report["figures"].append({"config": config, "dtype": dtype, "rounds": figures})
            report["load_after"] = os.getloadavg()[0]
            if args.json:  # After each part: the whole may take an hour.
                with open(args.json, "w") as file:
                    json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
