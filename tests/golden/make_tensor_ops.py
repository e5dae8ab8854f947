"""Writes tensor_ops.json: inputs, results and gradients of the generic tensor operations, computed by PyTorch.

Run: python tests/golden/make_tensor_ops.py (torch, CPU). The versions and the seed stand in the file.
"""
import json, math, os, torch, numpy
import torch.nn.functional as F

SEED = 20240607
torch.manual_seed(SEED)
DT = {"f32": torch.float32, "bf16": torch.bfloat16, "i32": torch.int32}
cases = []


def enc(values):
    def one(v):
        if isinstance(v, int):
            return v
        if math.isnan(v):
            return "nan"
        if math.isinf(v):
            return "inf" if v > 0 else "-inf"
        return v
    return [one(v) for v in values]


def name_of(t):
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i32", torch.bool: "f32"}[t.dtype]


def pack(t):
    d = name_of(t)
    v = t.detach().reshape(-1)
    v = v.tolist() if d == "i32" else v.to(torch.float32).tolist()
    return {"dtype": d, "shape": list(t.shape), "values": enc(v)}


def case(op, inputs, f, args=None, grad=True, note=None):
    """f(*inputs) -> tensor or tuple; gradients by every float input unless grad is False."""
    xs = [x.detach().clone().requires_grad_(grad and x.is_floating_point()) for x in inputs]
    if op != "to" and any(x.dtype == torch.bfloat16 for x in xs):
        # The engine computes bf16 in f32 and rounds once; torch's own bf16 rounds after each step of a derivative.
        out = f(*[x.float() for x in xs]).to(torch.bfloat16)
    else:
        out = f(*xs)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    entry = {"op": op, "note": note or "", "args": args or {}, "inputs": [pack(x) for x in xs], "outputs": [pack(o) for o in outs]}
    if grad and outs[0].requires_grad:
        w = torch.randn(outs[0].shape).to(outs[0].dtype)
        outs[0].backward(w)
        entry["weight"] = pack(w)
        entry["grads"] = [None if not x.requires_grad else pack(torch.zeros_like(x) if x.grad is None else x.grad) for x in xs]
    cases.append(entry)


def r(*shape, dtype="f32", lo=None):
    x = torch.randn(shape)
    if lo is not None:
        x = x.abs() + lo
    return x.to(DT[dtype])


nan, inf = float("nan"), float("inf")
ODD = torch.tensor([0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 1e-30, 3e38])

unary = {
    "neg": torch.neg, "abs": torch.abs, "exp": torch.exp, "square": torch.square, "recip": torch.reciprocal, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "relu": torch.relu, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus, "sin": torch.sin, "cos": torch.cos,
}
for op, f in unary.items():
    case(op, [r(3, 7)], f)
    case(op, [r(5, dtype="bf16")], f)
for op, f in {"log": torch.log, "sqrt": torch.sqrt}.items():
    case(op, [r(3, 7, lo=0.1)], f)
for op in ["floor", "ceil", "round", "sign"]:
    case(op, [torch.tensor([-2.5, -1.5, -0.2, 0.0, 0.5, 1.5, 2.7, inf])], getattr(torch, op), grad=False)
for op in ["neg", "abs", "exp", "relu", "tanh", "sigmoid", "recip", "square"]:
    # torch differentiates |NaN| to 0, the engine to NaN.
    case(op, [ODD], unary[op], note="not finite", grad=op != "abs")
case("log", [ODD], torch.log, note="not finite", grad=False)
case("sqrt", [ODD], torch.sqrt, note="not finite", grad=False)
for e in [2.0, 3.0, -1.0, 0.5]:
    case("powf", [r(2, 3, lo=0.2)], lambda x: torch.pow(x, e), {"exponent": e})
case("powf", [torch.tensor([-2.0, 0.0, 2.0])], lambda x: torch.pow(x, 3.0), {"exponent": 3.0})
case("powf", [torch.tensor([-2.0, 0.0, 2.0])], lambda x: torch.pow(x, 0.0), {"exponent": 0.0})
C = torch.tensor([-2.0, -1.0, 0.3, 1.0, 2.0, nan, inf])
case("clamp", [C], lambda x: torch.clamp(x, -1.0, 1.0), {"min": -1.0, "max": 1.0})
case("clamp", [C], lambda x: torch.clamp(x, min=0.5), {"min": 0.5})
case("clamp", [C], lambda x: torch.clamp(x, max=0.5), {"max": 0.5})

binary = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "maximum": torch.maximum, "minimum": torch.minimum}
for op, f in binary.items():
    case(op, [r(2, 3, 5), r(3, 1)], f, note="broadcast")
    case(op, [r(1, 7), r(3, 1)], f, note="both broadcast")
    case(op, [r(3, 3), r()], f, note="scalar")
    case(op, [r(3, 5, dtype="bf16"), r(5, dtype="bf16")], f)
    case(op, [r(0, 3), r(3)], f, note="empty")
for op in ["maximum", "minimum"]:
    case(op, [torch.tensor([1.0, 2.0, nan, 1.0, inf]), torch.tensor([1.0, 3.0, 1.0, nan, inf])], binary[op], note="ties and NaN")
case("pow", [r(2, 3, lo=0.2), r(3)], torch.pow)
case("pow", [torch.tensor([0.0, 0.0, 2.0, -2.0]), torch.tensor([0.0, 2.0, 0.0, 3.0])], torch.pow, note="edges")
I, J = torch.tensor([[7, -7, 6], [0, 5, -1]], dtype=torch.int32), torch.tensor([3, 2, -4], dtype=torch.int32)
for op, f in {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum, "minimum": torch.minimum,
              "floor_div": torch.floor_divide, "modulo": torch.remainder}.items():
    case(op, [I, J], f, grad=False)
for op in ["neg", "abs", "sign"]:
    case(op, [I], getattr(torch, op), grad=False)
X, Y = torch.tensor([[1.0, 2.0, nan], [inf, -inf, 0.0]]), torch.tensor([1.0, 3.0, nan])
for op in ["eq", "ne", "lt", "le", "gt", "ge"]:
    case(op, [X, Y], getattr(torch, op), grad=False)
    case(op, [I, J], getattr(torch, op), grad=False)
M = torch.tensor([[1, 0, 2], [0, 0, -1]], dtype=torch.int32)
case("where", [M, r(2, 3), r(3)], lambda c, a, b: torch.where(c != 0, a, b))
case("where", [M, I, J], lambda c, a, b: torch.where(c != 0, a, b), grad=False)

for op in ["sum", "mean"]:
    f = getattr(torch, op)
    case(op, [r(2, 3, 5)], f)
    for axes in [[0], [1], [-1], [0, 2], [0, 1], [1, 2]]:
        for keepdim in [False, True]:
            case(op, [r(2, 3, 5)], lambda x: f(x, dim=axes, keepdim=keepdim), {"axes": axes, "keepdim": keepdim})
    case(op, [r(3, 7, dtype="bf16")], lambda x: f(x, dim=1), {"axes": [1]})
    case(op, [r(3, 0)], lambda x: f(x, dim=1), {"axes": [1]}, note="empty axis")
    case(op, [r(0, 3)], lambda x: f(x, dim=1), {"axes": [1]}, note="no rows")
    case(op, [r()], f)
    case(op, [torch.tensor([1.0, inf, 2.0])], f, note="not finite")
case("sum", [r(3, 1200)], lambda x: torch.sum(x, dim=1), {"axes": [1]}, note="several blocks")
case("sum", [I], lambda x: torch.sum(x, dim=0), {"axes": [0]}, grad=False)
for op in ["var", "std"]:
    f = getattr(torch, op)
    case(op, [r(3, 7)], lambda x: f(x, correction=1), {"correction": 1})
    case(op, [r(3, 7)], lambda x: f(x, dim=1, correction=0), {"axes": [1], "correction": 0})
    case(op, [r(3, 7)], lambda x: f(x, dim=0, correction=1, keepdim=True), {"axes": [0], "correction": 1, "keepdim": True})
    case(op, [r(3, 7, dtype="bf16")], lambda x: f(x, dim=1, correction=1), {"axes": [1], "correction": 1})
    case(op, [torch.tensor([[2.0, 2.0, 2.0]])], lambda x: f(x, dim=1, correction=1), {"axes": [1], "correction": 1}, note="all equal")
    case(op, [torch.tensor([[2.0]])], lambda x: f(x, dim=1, correction=1), {"axes": [1], "correction": 1}, note="one element", grad=False)
T = torch.tensor([[1.0, 3.0, 3.0], [3.0, -1.0, 3.0]])
for op, f in {"max": torch.amax, "min": torch.amin}.items():
    case(op, [r(2, 3, 5)], lambda x: f(x, dim=(0, 1, 2)))
    case(op, [r(2, 3, 5)], lambda x: f(x, dim=1), {"axes": [1]})
    case(op, [r(2, 3, 5)], lambda x: f(x, dim=(0, 2), keepdim=True), {"axes": [0, 2], "keepdim": True})
    case(op, [T], lambda x: f(x, dim=1), {"axes": [1]}, note="ties")
    case(op, [torch.tensor([[1.0, nan, 2.0], [-inf, inf, 0.0]])], lambda x: f(x, dim=1), {"axes": [1]}, grad=False, note="NaN")
    case(op, [I], lambda x: f(x, dim=1), {"axes": [1]}, grad=False)
for op in ["argmax", "argmin"]:
    f = getattr(torch, op)
    case(op, [r(3, 7)], lambda x: f(x), grad=False)
    case(op, [r(3, 7)], lambda x: f(x, dim=0), {"axis": 0}, grad=False)
    case(op, [r(3, 7)], lambda x: f(x, dim=-1, keepdim=True), {"axis": -1, "keepdim": True}, grad=False)
    case(op, [torch.tensor([1.0, nan, 2.0, nan])], lambda x: f(x), grad=False, note="NaN")
L = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [inf, 0.0, 1.0]])
case("logsumexp", [r(2, 3, 5) * 30], lambda x: torch.logsumexp(x, dim=1), {"axes": [1]})
case("logsumexp", [r(2, 3, 5)], lambda x: torch.logsumexp(x, dim=(0, 2), keepdim=True), {"axes": [0, 2], "keepdim": True})
case("logsumexp", [L], lambda x: torch.logsumexp(x, dim=1), {"axes": [1]}, grad=False, note="not finite")
case("logsumexp", [L[:1]], lambda x: torch.logsumexp(x, dim=1), {"axes": [1]}, note="one -inf")
case("logsumexp", [r(3, 0)], lambda x: torch.logsumexp(x, dim=1), {"axes": [1]}, grad=False, note="empty axis")
for op in ["softmax", "log_softmax"]:
    f = getattr(F, op)
    for axis in [0, 1, -1]:
        case(op, [r(2, 3, 5) * 4], lambda x: f(x, dim=axis), {"axis": axis})
    case(op, [r(3, 7, dtype="bf16")], lambda x: f(x, dim=1), {"axis": 1})
    case(op, [r(0, 3)], lambda x: f(x, dim=1), {"axis": 1}, note="no rows")
    case(op, [L], lambda x: f(x, dim=1), {"axis": 1}, grad=False, note="not finite")
    case(op, [L[:1]], lambda x: f(x, dim=1), {"axis": 1}, note="one -inf")
    case(op, [torch.tensor([[1e4, -1e4, 0.0]])], lambda x: f(x, dim=1), {"axis": 1}, note="large")

for a, b in [((7,), (7,)), ((3, 7), (7,)), ((7,), (7, 5)), ((3, 7), (7, 5)), ((2, 3, 7), (2, 7, 5)), ((2, 3, 7), (7, 5)),
             ((3, 7), (2, 7, 5)), ((1, 3, 7), (4, 7, 2)), ((2, 1, 3, 2), (3, 2, 4)), ((2, 3, 7), (7,)), ((7,), (2, 7, 3)),
             ((3, 0), (0, 2)), ((0, 3), (3, 2)), ((2, 0, 3), (2, 3, 2))]:
    case("matmul", [r(*a), r(*b)], torch.matmul, note=f"{a} {b}")
case("matmul", [r(3, 7, dtype="bf16"), r(7, 5, dtype="bf16")], torch.matmul)

G = torch.tensor([[0, 2, 2], [1, 0, 1]], dtype=torch.int32)
case("gather", [r(2, 3), G], lambda x, i: torch.gather(x, 1, i.long()), {"axis": 1})
case("gather", [r(3, 3), torch.tensor([[0, 2, 2]], dtype=torch.int32)], lambda x, i: torch.gather(x, 0, i.long()), {"axis": 0})
case("gather", [I, G], lambda x, i: torch.gather(x, 1, i.long()), {"axis": 1}, grad=False)
case("index_select", [r(2, 4, 3), torch.tensor([3, 0, 3], dtype=torch.int32)], lambda x, i: torch.index_select(x, 1, i.long()), {"axis": 1})
for axis, start, stop, step in [(0, 1, None, 1), (1, -3, -1, 1), (1, 0, 7, 3), (2, 5, 2, 1), (-1, 1, 99, 2)]:
    def sl(x, axis=axis, start=start, stop=stop, step=step):
        index = [slice(None)] * x.dim()
        index[axis] = slice(start, stop, step)
        return x[tuple(index)]
    case("slice", [r(2, 7, 4)], sl, {"axis": axis, "start": start, "stop": stop, "step": step})
case("select", [r(2, 3, 4)], lambda x: x.select(1, -1), {"axis": 1, "index": -1})
case("permute", [r(2, 3, 4)], lambda x: x.permute(2, 0, 1), {"axes": [2, 0, 1]})
case("transpose", [r(2, 3, 4)], lambda x: x.transpose(0, -1), {"first": 0, "second": -1})
case("reshape", [r(2, 3, 4)], lambda x: x.reshape(4, -1), {"shape": [4, -1]})
case("squeeze", [r(1, 3, 1)], lambda x: x.squeeze())
case("squeeze", [r(1, 3, 1)], lambda x: x.squeeze(-1), {"axis": -1})
case("unsqueeze", [r(2, 3)], lambda x: x.unsqueeze(-1), {"axis": -1})
case("flip", [r(2, 3, 4)], lambda x: x.flip(0, 2), {"axes": [0, 2]})
case("broadcast_to", [r(3, 1)], lambda x: x.broadcast_to(2, 3, 4), {"shape": [2, 3, 4]})
case("concat", [r(2, 3), r(2, 1), r(2, 0)], lambda *x: torch.cat(x, dim=1), {"axis": 1})
case("stack", [r(2, 3), r(2, 3)], lambda *x: torch.stack(x, dim=-1), {"axis": -1})
case("cumsum", [r(2, 3, 4)], lambda x: x.cumsum(1), {"axis": 1})
case("cumsum", [I], lambda x: x.cumsum(1), {"axis": 1}, grad=False)
case("sort", [r(3, 5)], lambda x: torch.sort(x, dim=1, stable=True), {"axis": 1})
case("sort", [torch.tensor([2.0, nan, -inf, 2.0, 1.0])], lambda x: torch.sort(x, descending=True, stable=True), {"axis": 0, "descending": True}, grad=False)
case("topk", [r(3, 7)], lambda x: torch.topk(x, 3, dim=1), {"axis": 1, "k": 3})
case("topk", [r(7, 2)], lambda x: torch.topk(x, 2, dim=0, largest=False), {"axis": 0, "k": 2, "largest": False})
case("to", [r(7)], lambda x: x.to(torch.bfloat16), {"dtype": "bf16"})
case("to", [r(7, dtype="bf16")], lambda x: x.to(torch.float32), {"dtype": "f32"})
case("to", [torch.tensor([1.7, -1.7, 0.2])], lambda x: x.to(torch.int32), {"dtype": "i32"}, grad=False)

def segments(x, i):
    return torch.zeros(4, *x.shape[1:]).index_add(0, i.long(), x)
for shape in [(5,), (5, 3)]:
    case("segment_sum", [r(*shape), torch.tensor([3, 0, 3, 1, 3], dtype=torch.int32)], segments, {"count": 4})

path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tensor_ops.json")
with open(path, "w") as file:
    head = {"torch": torch.__version__.split("+")[0], "numpy": numpy.__version__, "seed": SEED}
    file.write('{"made_with": ' + json.dumps(head) + ',\n"cases": [\n')
    file.write(",\n".join(json.dumps(c) for c in cases))
    file.write("\n]}\n")
print(len(cases), "cases")
