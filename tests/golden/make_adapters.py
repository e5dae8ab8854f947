"""Writes the fixtures lora_dora, lora_dora_moe, lora_dora_head, lora_embedding and lora_embedding_tied: adapters of PEFT on other
fixtures' checkpoints, with logits, merged weights, the loss, every gradient, and five steps of AdamW.

Run: python tests/golden/make_adapters.py [NAME...] (torch, transformers and peft, CPU). Versions and seeds stand in each meta.json.
"""
import hashlib, json, os, platform, sys, torch, tokenizers, transformers, peft, safetensors, trl
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
STEPS, LR, WEIGHT_DECAY = 5, 5e-3, 0.1
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora_dora": ("dense_tied", 2101, dict(r=4, lora_alpha=16, use_dora=True, target_modules=DENSE)),
    "lora_dora_moe": (
        "moe_norm_true", 2102, dict(r=2, lora_alpha=4, use_dora=True, use_rslora=True, target_modules=["q_proj", "gate_proj", "down_proj"])
    ),
    "lora_dora_head": ("dense_untied", 2103, dict(r=3, lora_alpha=6, use_dora=True, target_modules=["lm_head", "v_proj"])),
    "lora_embedding": ("dense_untied", 2104, dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "o_proj"])),
    "lora_embedding_tied": ("dense_tied", 2105, dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "q_proj"])),
}
VERSIONS = {
    "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
    "tokenizers": tokenizers.__version__, "safetensors": safetensors.__version__, "peft": peft.__version__, "trl": trl.__version__,
}


def base(checkpoint, dtype):
    return AutoModelForCausalLM.from_pretrained(os.path.join(HERE, checkpoint), attn_implementation="eager", dtype=dtype).eval()


def plain(name):
    """A parameter's name as files have it."""
    name = name.removeprefix("base_model.model.").replace(".default", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


def adapted(checkpoint, settings, seed, dtype):
    model = base(checkpoint, dtype)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings), autocast_adapter_dtype=False).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(dtype)
            if "magnitude" in name:
                parameter.mul_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return model


def loss_of(model, ids, labels):
    logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)


def numbers(checkpoint, settings, seed, dtype, ids, labels, tied):
    arrays = {}
    with torch.no_grad():
        arrays["logits_base"] = base(checkpoint, dtype)(input_ids=ids).logits
    model = adapted(checkpoint, settings, seed, dtype)
    with torch.no_grad():
        arrays["logits_adapter"] = model(input_ids=ids).logits
    loss = loss_of(model, ids, labels)
    loss.backward()
    arrays["loss"] = loss.detach().reshape(1)
    trained = {plain(name): p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        # An expert without tokens has no gradient.
        arrays[f"grad.{name}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, ids, labels)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
    arrays["losses"] = torch.stack(losses)
    for name, p in trained.items():
        arrays[f"final.{name}"] = p.detach().clone()
    if not tied:
        # Where embedding and head are one matrix, PEFT merges what belongs to one of them into both: other logits.
        merged = adapted(checkpoint, settings, seed, dtype).merge_and_unload()
        with torch.no_grad():
            arrays["logits_merged"] = merged(input_ids=ids).logits
        modules = {name.rsplit(".lora_", 1)[0] for name in trained}
        for name in sorted(modules)[:: max(1, len(modules) // 3)]:
            arrays[f"merged.{name}.weight"] = merged.get_parameter(f"{name}.weight").detach()
    return arrays


ABOUT = {
    "logits_base": "base model alone", "logits_adapter": "adapter applied at run time", "logits_merged": "adapter merged into the weights",
    "loss": "next-token loss with the adapter", "losses": "before each of the steps of AdamW, all on the same batch",
    "grad": "gradient w.r.t. this adapter weight; all base weights frozen", "final": "after the steps", "merged": "merged weight",
}


def write(name):
    checkpoint, seed, settings = CASES[name]
    folder = os.path.join(HERE, name)
    os.makedirs(folder, exist_ok=True)
    config = json.load(open(os.path.join(HERE, checkpoint, "config.json")))
    tied = config.get("tie_word_embeddings", False) and "embed_tokens" in settings["target_modules"]
    generator = torch.Generator().manual_seed(seed + 50)
    ids = torch.randint(3, config["vocab_size"], (2, 13), generator=generator)
    labels = ids.clone()
    labels[:, :6] = -100
    wide = numbers(checkpoint, settings, seed, torch.float64, ids, labels, tied)
    got = numbers(checkpoint, settings, seed, torch.float32, ids, labels, tied)
    meta = {
        "name": name, "about": "PEFT adapter on a base checkpoint, with steps of AdamW", "checkpoint": f"../{checkpoint}",
        "params": {
            "lora": settings, "seed": seed,
            "optimizer": {"lr": LR, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": WEIGHT_DECAY, "decays": "matrices", "steps": STEPS},
        },
        "versions": VERSIONS,
        "sensitivity": {"adapter_ignored": {
            "array": "logits_adapter", "max_abs_diff": float((got["logits_base"] - got["logits_adapter"]).abs().max())
        }},
        "arrays": {key: {"dtype": "int64", "shape": list(ids.shape), "about": about, "tolerance": "exact"} for key, about in
                   [("input_ids", "[batch, seq]"), ("labels", "not shifted; -100 on the first 6")]},
    }
    for key, value in got.items():
        noise = float((value.double() - wide[key]).abs().max())
        floor = {"loss": 2e-5, "losses": 2e-5, "final": 2e-5}.get(key.split(".")[0], 1e-6)
        rtol = 1e-3 if key.startswith("grad.") else 1e-4
        meta["arrays"][key] = {
            "dtype": "float32", "shape": list(value.shape), "about": ABOUT[key.split(".")[0]], "noise": float(f"{noise:.3g}"),
            "tolerance": {"atol": float(f"{max(10 * noise, floor):.3g}"), "rtol": rtol},
        }
    with open(os.path.join(folder, "meta.json"), "w") as file:
        json.dump(meta, file, indent=1)
        file.write("\n")
    tensors = {"input_ids": ids, "labels": labels, **{key: value.float().contiguous() for key, value in got.items()}}
    save_file(tensors, os.path.join(folder, "expected.safetensors"))
    model = adapted(checkpoint, settings, seed, torch.float32)
    model.peft_config["default"].base_model_name_or_path = f"../{checkpoint}"
    model.peft_config["default"].target_modules = sorted(settings["target_modules"])
    model.save_pretrained(folder)
    os.remove(os.path.join(folder, "README.md"))


def list_files(names):
    path = os.path.join(HERE, "index.json")
    index = json.load(open(path))
    for name in names:
        files = {}
        for file in sorted(os.listdir(os.path.join(HERE, name))):
            content = open(os.path.join(HERE, name, file), "rb").read()
            files[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        index["fixtures"][name] = {"about": json.load(open(os.path.join(HERE, name, "meta.json")))["about"], "files": files}
    index["total_bytes"] = sum(file["bytes"] for fixture in index["fixtures"].values() for file in fixture["files"].values())
    with open(path, "w") as file:
        json.dump(index, file, indent=1, ensure_ascii=False)
        file.write("\n")


names = sys.argv[1:] or list(CASES)
for name in names:
    write(name)
list_files(names)
