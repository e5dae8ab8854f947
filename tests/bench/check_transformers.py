#!/usr/bin/env python3
"""Opens a folder that perilune saved in Hugging Face transformers and compares logits.

    python tests/bench/check_transformers.py FOLDER [--adapter FOLDER] [--expected FILE] [--atol 5e-4] [--rtol 1e-4]

Without --expected it only proves that transformers opens the folder without a missing or unexpected tensor and computes
finite logits. FILE holds what perilune computed for the same folder, either form:
    *.json         {"tokens": [1, 2, 3], "logits": [[...], [...], [...]]}, or with "greedy": [...] the tokens that follow
    *.safetensors  tensors `tokens` [tokens], integers, and `logits` [tokens, vocab], f32; or `greedy`, integers
`perilune generate FOLDER --prompt TEXT --temperature 0 --json` prints the greedy tokens as "tokens"; put them into "greedy"
and the prompt's ids into "tokens". A folder that scores has "logits" of [[score]]. --adapter is a PEFT folder that
`model:save_adapter` wrote for FOLDER. Needs torch, transformers and safetensors, and peft for adapters.
"""
import argparse
import json
import sys


def read_expected(path):
    if path.endswith(".json"):
        with open(path) as file:
            return json.load(file)
    from safetensors.numpy import load_file
    return {name: array.tolist() for name, array in load_file(path).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--adapter", help="a PEFT folder to put on the model")
    parser.add_argument("--expected", help="what perilune computed: .json or .safetensors")
    # Two orders of f32 sums over a few dozen layers; see tests/golden/README.md for how such tolerances were found.
    parser.add_argument("--atol", type=float, default=5e-4)
    parser.add_argument("--rtol", type=float, default=1e-4)
    args = parser.parse_args()
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    architecture = transformers.AutoConfig.from_pretrained(args.folder).architectures[0]
    scores = architecture.endswith("ForSequenceClassification")
    auto = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
    model, loading = auto.from_pretrained(
        args.folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    if args.adapter:
        import peft
        model = peft.PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    # A tied head is made from the embedding, so that its absence is right.
    faults = {key: sorted(names) for key, names in loading.items() if key != "error_msgs" and names}
    if model.config.tie_word_embeddings and "missing_keys" in faults:
        faults["missing_keys"] = [name for name in faults["missing_keys"] if name != "lm_head.weight"]
    faults = {key: names for key, names in faults.items() if names}
    if faults or loading["error_msgs"]:
        sys.exit(f"transformers {transformers.__version__} does not load {args.folder} cleanly: {faults or loading['error_msgs']}")
    expected = read_expected(args.expected) if args.expected else {"tokens": list(range(min(16, model.config.vocab_size)))}
    tokens = torch.tensor([expected["tokens"]])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[:1 if scores else None].reshape(1 if scores else len(tokens[0]), -1)
    if not torch.isfinite(logits).all():
        sys.exit("transformers computes logits that are not finite")
    said = [f"{type(model).__name__}, {sum(p.numel() for p in model.parameters())} parameters, loads cleanly"]
    if "logits" in expected:
        want = torch.tensor(expected["logits"], dtype=torch.float32)
        if want.shape != logits.shape:
            sys.exit(f"logits: perilune has {list(want.shape)}, transformers {list(logits.shape)}")
        difference = (want - logits).abs()
        outside = int((difference > args.atol + args.rtol * logits.abs()).sum())
        said.append(f"largest difference of logits {difference.max():.2e}, {outside} of {logits.numel()} outside the tolerance")
        if outside:
            sys.exit("; ".join(said))
    if "greedy" in expected:
        greedy = expected["greedy"]
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([expected["tokens"] + greedy]), use_cache=False).logits[0]
        # Each token must be the best after those before it, or as good as the best within the tolerance.
        rows = whole[len(expected["tokens"]) - 1:-1]
        behind = rows.max(-1).values - rows.gather(1, torch.tensor(greedy)[:, None])[:, 0]
        said.append(f"{len(greedy)} greedy tokens, at most {behind.max():.2e} behind the best")
        if (behind > args.atol + args.rtol * rows.max(-1).values.abs()).any():
            sys.exit("; ".join(said))
    print("; ".join(said))


if __name__ == "__main__":
    main()
