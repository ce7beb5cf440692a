"""How long `sparge.transformers.tune` takes on a Llama of SmolLM2-135M's shape.

    python benchmarks/python/tune.py --out benchmarks/record/DATE-DEVICE-python-tune.jsonl
    python benchmarks/python/tune.py --tiny                       # on a CPU, in seconds

30 layers of 9 query and 3 key/value heads of 64, five samples of 4096 tokens; weights are random, made
from a config, with queries and keys enlarged so that heads have something to skip. `first_s` includes
the compilation of kernels, `tune_s` is a second tuning of the same model, `forward_s` one dense
reading of the samples. --out appends one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from typing import Any, Callable

import sparge
import sparge.transformers
import torch
import transformers


def seconds(call: Callable[[], Any], device: str) -> "tuple[float, Any]":
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return round(time.perf_counter() - start, 3), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--l1", type=float, default=0.05)
    parser.add_argument("--by", default="error", choices=("error", "effect"))
    parser.add_argument("--tiny", action="store_true", help="2 layers, 2 samples of 1024 tokens")
    parser.add_argument("--save", type=Path, help="the calibration file")
    parser.add_argument("--out", type=Path, help="append the result to this file, as a line of JSON")
    args = parser.parse_args()
    layers = 30
    if args.tiny:
        layers, args.samples, args.tokens = 2, 2, 1024
    is_cuda = args.device == "cuda"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data.mul_(4)
    model.to(args.device, torch.bfloat16 if is_cuda else torch.float32)
    samples = [torch.randint(config.vocab_size, (args.tokens,)) for _ in range(args.samples)]

    def tuned() -> sparge.Calibration:
        return sparge.transformers.tune(model, samples, l1=args.l1, by=args.by, name="SmolLM2's shape, random")

    def forward() -> None:
        with torch.no_grad():
            for ids in samples:
                model.base_model(input_ids=ids[None].to(args.device), use_cache=False)

    first_s, calibration = seconds(tuned, args.device)
    tune_s, again = seconds(tuned, args.device)
    seconds(forward, args.device)
    forward_s, _ = seconds(forward, args.device)
    row = {
        "date": str(datetime.date.today()),
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "torch": torch.__version__, "threads": torch.get_num_threads(), "sparge": sparge.__version__,
        "layers": layers, "samples": args.samples, "tokens": args.tokens, "l1": args.l1, "by": args.by,
        "first_s": first_s, "tune_s": tune_s, "forward_s": forward_s,
        "is_repeatable": calibration == again, **calibration.measured,
    }  # fmt: skip
    if is_cuda:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(f"tuned in {tune_s} s (the first time {first_s} s; one dense reading {forward_s} s)\n{calibration!r}")
    if args.save:
        calibration.save(args.save)
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
