"""Would stage 2 skip more if a query block visited its key blocks in another order?

    pip install "sparge[transformers]" gguf
    python benchmarks/quality/visit_order.py [GGUF] [TEXT] --tokens 4096

P·V of a 16-row group and a key block is skipped where no row has a score within λ of its running
maximum, so it depends on which blocks came before. On the kept blocks of a model's layers (default
prediction) this counts, for the kernel's order, for others, and for a maximum that is known from the
start, which no order can beat: the share of products skipped, and how often a row's maximum grows
(each time its sums are rescaled). Writes records/visit-order.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

import sparge
import torch
import transformers

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparge"
RECORD = Path(__file__).parent / "records" / "visit-order.json"
LAMBDAS = (4.0, 5.0, 6.0, 8.0)
BLOCK_Q, BLOCK_KV, GROUP = 128, 64, 16

Tensor = torch.Tensor


def capture(arguments: argparse.Namespace) -> "dict[int, tuple[Tensor, Tensor]]":
    """q and k of some layers, keys repeated for their query heads."""
    folder, name = arguments.gguf.parent, arguments.gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    found: dict[int, tuple[Tensor, Tensor]] = {}
    count = model.config.num_hidden_layers
    wanted = {round(i * (count - 1) / (arguments.layers - 1)) for i in range(arguments.layers)}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if module.layer_idx in wanted:
            group = query.shape[1] // key.shape[1]
            found[module.layer_idx] = (query.clone(), key.repeat_interleave(group, 1))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    transformers.AttentionInterface.register("capture", attend)
    model.set_attn_implementation("capture")
    text = arguments.text.read_text(encoding="utf-8")[: 8 * arguments.tokens]
    with torch.inference_mode():
        model(tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens])
    return found


def counts(q: Tensor, k: Tensor, kept: Tensor) -> "dict[str, Any]":
    """Of one head: products skipped by λ and growths of the maximum, by order; and the products."""
    length, blocks = len(q), kept.shape[1]
    skipped = {name: [0] * len(LAMBDAS) for name in ("ascending", "descending", "by mass", "known maximum")}
    grown = dict.fromkeys(list(skipped)[:3], 0)
    products = 0
    for block, row in enumerate(kept):
        first = block * BLOCK_Q
        rows = torch.arange(first, min(first + BLOCK_Q, length))
        s = q[rows] @ k.T * q.shape[1] ** -0.5
        s[torch.arange(length)[None] > rows[:, None]] = -torch.inf
        s = torch.nn.functional.pad(s, (0, blocks * BLOCK_KV - length), value=-torch.inf).unflatten(1, (blocks, BLOCK_KV))
        mass = (s - s.amax((1, 2), keepdim=True)).exp().sum(2)
        mass = (mass / mass.sum(1, keepdim=True)).mean(0)
        tops = s.amax(2)[:, row]  # [rows, kept blocks]
        places = torch.arange(tops.shape[1])
        orders = {"ascending": places, "descending": places.flip(0), "by mass": mass[row].argsort(descending=True)}
        reaches = (tops > -torch.inf).unflatten(0, (-1, GROUP)).any(1) if len(rows) % GROUP == 0 else None
        if reaches is None:
            continue  # a ragged last block
        products += int(reaches.sum())

        def far(tops: Tensor, maxima: Tensor, gap: float) -> Tensor:
            return (tops < maxima - gap).unflatten(0, (-1, GROUP)).all(1)

        for name, order in orders.items():
            there = tops[:, order]
            running = there.cummax(1).values
            grown[name] += int((running[:, 1:] > running[:, :-1]).sum())
            for i, gap in enumerate(LAMBDAS):
                skipped[name][i] += int((far(there, running, gap) & reaches[:, order]).sum())
        for i, gap in enumerate(LAMBDAS):
            skipped["known maximum"][i] += int((far(tops, tops.amax(1, keepdim=True), gap) & reaches).sum())
    return {"skipped": skipped, "grown": grown, "products": products}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", nargs="?", type=Path, default=CACHE / "models/smollm2-135m.gguf")
    parser.add_argument("text", nargs="?", type=Path, default=CACHE / "texts/emma.txt")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=6)
    arguments = parser.parse_args()
    total: dict[str, Any] = {"skipped": {}, "grown": {}, "products": 0}
    with torch.inference_mode():
        for q, k in capture(arguments).values():
            masks = sparge.predict(q, k, is_causal=True, cdf=0.98).tensor
            for head in range(q.shape[1]):
                one = counts(q[0, head], k[0, head], masks[0, head])
                total["products"] += one["products"]
                for name, values in one["skipped"].items():
                    before = total["skipped"].get(name, [0] * len(LAMBDAS))
                    total["skipped"][name] = [a + b for a, b in zip(before, values)]
                for name, value in one["grown"].items():
                    total["grown"][name] = total["grown"].get(name, 0) + value
    rows = total["products"] * GROUP
    record = {
        "date": datetime.date.today().isoformat(), "model": arguments.gguf.name, "tokens": arguments.tokens,
        "layers": arguments.layers, "lambda": LAMBDAS,
        "skipped": {name: [n / total["products"] for n in x] for name, x in total["skipped"].items()},
        "growths": {name: n / rows for name, n in total["grown"].items()},
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print("order           " + "".join(f"λ = {gap:g}".rjust(9) for gap in LAMBDAS) + "   growths")
    for name, shares in record["skipped"].items():
        growths = f"{100 * record['growths'][name]:9.1f}%" if name in record["growths"] else ""
        print(f"{name:16}" + "".join(f"{100 * x:8.1f}%" for x in shares) + growths)


if __name__ == "__main__":
    main()
