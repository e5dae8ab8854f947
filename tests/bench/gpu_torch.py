"""The figures of gpu_ops.rs for PyTorch (cuBLAS and its flash attention) on the same card: run both in one session."""
import torch

PEAK = 989.4
RUNS = 12


def median_ms(work):
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    times = []
    for _ in range(RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[RUNS // 2]


def report(what, ms, flops):
    rate = flops / ms / 1e9
    print(f"torch {what:<52} {ms:9.3f} ms {rate:8.1f} TFLOP/s {100 * rate / PEAK:5.1f} % of peak", flush=True)


def random(*shape):
    return torch.rand(*shape, device="cuda", dtype=torch.bfloat16) * 2 - 1


print("torch", torch.__version__, torch.cuda.get_device_name())
tokens = 8192
for name, n, k in [("0.5B qkv", 1152, 896), ("0.5B gate_up", 9728, 896), ("0.5B down", 896, 4864), ("7B qkv", 4608, 3584),
                   ("7B gate_up", 37888, 3584), ("7B down", 3584, 18944), ("square", 8192, 8192)]:
    x, w, dy = random(tokens, k), random(n, k), random(tokens, n)
    flops = 2.0 * tokens * n * k
    report(f"product {name}", median_ms(lambda: x @ w.T), flops)
    report(f"product {name} input gradient", median_ms(lambda: dy @ w), flops)
    report(f"product {name} weight gradient, bf16", median_ms(lambda: dy.T @ x), flops)
for name, heads, kv_heads, dim, documents, length in [("0.5B 8 x 1024", 14, 2, 64, 8, 1024), ("7B 8 x 1024", 28, 4, 128, 8, 1024),
                                                       ("7B 1 x 16384", 28, 4, 128, 1, 16384)]:
    # Keys of all heads: torch's flash attention is given no groups, which only helps it.
    q, k, v = (random(documents, heads, length, dim).requires_grad_() for _ in range(3))
    flops = documents * 2.0 * length * length * heads * dim
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        run = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        report(f"attention {name}", median_ms(run), flops)
        out = run()
        grad = torch.ones_like(out)
        report(f"attention {name} backward", median_ms(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)), 2.5 * flops)
for name, n, k in [("0.5B gate_up", 9728, 896), ("7B gate_up", 37888, 3584), ("7B down", 3584, 18944)]:
    weights = [random(n, k) for _ in range(max(1, 400_000_000 // (2 * n * k)))]
    x = random(1, k)
    ms = median_ms(lambda: [x @ w.T for w in weights]) / len(weights)
    print(f"torch product {name}, 1 row: {ms:.4f} ms, {2 * n * k / ms / 1e6:.0f} GB/s", flush=True)
