"""The figures of `perilune bench train|decode --device cuda` for PyTorch with Hugging Face transformers on the same card: run both
in one session. Weights and AdamW in bf16 (no f32 masters, which perilune keeps), flash attention by scaled_dot_product_attention.

    python tests/bench/gpu_train_torch.py --sizes 0.5B 1.5B --sequences 8 4
"""
import argparse
import time

import torch
import transformers

# hidden, intermediate, layers, heads, key-value heads, tied
SIZES = {"0.5B": (896, 4864, 24, 14, 2, True), "1.5B": (1536, 8960, 28, 12, 2, True), "3B": (2048, 11008, 36, 16, 2, True)}
TOKENS = 1024


def model_of(size):
    hidden, intermediate, layers, heads, kv_heads, tied = SIZES[size]
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, tie_word_embeddings=tied, attn_implementation="sdpa")
    with torch.device("cuda"):
        return transformers.Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)


def median_s(step, seconds):
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def train(size, sequences, compiled, seconds):
    model = model_of(size)
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    ids = torch.randint(0, 151936, (sequences, TOKENS), device="cuda")

    def step():
        forward(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    took = median_s(step, seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"torch train {size} {sequences} x {TOKENS} {'compiled' if compiled else 'eager':<8} {took * 1e3:8.1f} ms"
          f" {sequences * TOKENS / took:9.0f} tokens/s {peak:6.1f} GiB", flush=True)


def decode(size, batch, seconds):
    model = model_of(size).eval()
    ids = torch.randint(0, 151936, (batch, 64), device="cuda")
    settings = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        took = median_s(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **settings), seconds)
    print(f"torch decode {size} batch {batch} {batch * 64 / took:9.1f} tokens/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.5B"])
    parser.add_argument("--sequences", nargs="+", type=int, default=[8])
    parser.add_argument("--compiled", action="store_true", help="also with torch.compile, which takes about a minute")
    parser.add_argument("--seconds", type=float, default=4)
    args = parser.parse_args()
    print("torch", torch.__version__, "transformers", transformers.__version__, torch.cuda.get_device_name())
    for size, sequences in zip(args.sizes, args.sequences, strict=True):
        for compiled in [False, True][:1 + args.compiled]:
            train(size, sequences, compiled, args.seconds)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    for batch in (1, 8):
        decode(args.sizes[0], batch, args.seconds)


if __name__ == "__main__":
    main()
