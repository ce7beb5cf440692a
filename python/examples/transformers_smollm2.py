"""SmolLM2-135M reads a novel through transformers, dense and sparse.

    pip install "sparge[transformers]" gguf
    python examples/transformers_smollm2.py ~/.cache/sparge/models/smollm2-135m.gguf emma.txt

The model's GGUF file and the text are what `sparge run` (the command) fetches into its cache; any
Llama-like GGUF file and any long text will do.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import sparge.transformers
import torch
import transformers

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparge"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", nargs="?", type=Path, default=CACHE / "models/smollm2-135m.gguf")
    parser.add_argument("text", nargs="?", type=Path, default=CACHE / "texts/emma.txt")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--cdf", type=float, help="share of the predicted mass to keep")
    arguments = parser.parse_args()

    folder, name = arguments.gguf.parent, arguments.gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    ).eval()
    text = arguments.text.read_text(encoding="utf-8")[: 8 * arguments.tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : arguments.tokens]

    sparge.transformers.register()
    sparge.transformers.configure(model, cdf=arguments.cdf)
    for implementation in ("sdpa", "sparge"):
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            begin = time.perf_counter()
            logits = model(ids).logits[0]
            seconds = time.perf_counter() - begin
            loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=arguments.new_tokens,
            )  # fmt: skip
        print(
            f"{implementation:7} {ids.shape[1]} tokens in {seconds:.1f} s, "
            f"perplexity {math.exp(loss):.2f}"
        )
        print("        …" + tokenizer.decode(out[0, ids.shape[1] :]).replace("\n", " "))


if __name__ == "__main__":
    main()
