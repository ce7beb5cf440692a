"""Any PyTorch model: `sparge.attention` in the place of `F.scaled_dot_product_attention`.

    pip install "sparge[transformers]" gguf
    python examples/sdpa_drop_in.py ~/.cache/sparge/models/smollm2-135m.gguf

A real model (SmolLM2-135M, loaded by transformers) runs its stock SDPA code; the function it calls
is exchanged, and for one layer the picture of what was computed is written.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import sparge
import torch
import torch.nn.functional as F
import transformers

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sparge"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", nargs="?", type=Path, default=CACHE / "models/smollm2-135m.gguf")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--picture", default="mask.png")
    arguments = parser.parse_args()
    folder, name = arguments.gguf.parent, arguments.gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    source = Path(transformers.__file__).with_name("modeling_utils.py").read_text()
    ids = tokenizer(source, return_tensors="pt").input_ids[:, : arguments.tokens]

    stock = F.scaled_dot_product_attention
    skipped: list[float] = []

    def sparse(*args: Any, **kwargs: Any) -> torch.Tensor:
        out, stats = sparge.attention(*args, **kwargs, return_stats=True)
        skipped.append(stats.qk_sparsity())
        if len(skipped) == 12:
            options = {"is_causal": kwargs.get("is_causal", False)}
            sparge.predict(args[0], args[1], **options).plot(arguments.picture, head=3)
        return out  # type: ignore[no-any-return]

    logits = {}
    with torch.inference_mode():
        for name, function in (("torch", stock), ("sparge", sparse)):
            F.scaled_dot_product_attention = function
            begin = time.perf_counter()
            logits[name] = model(ids).logits
            print(f"{name:6} {time.perf_counter() - begin:.1f} s for {ids.shape[1]} tokens")
    F.scaled_dot_product_attention = stock
    same = (logits["torch"].argmax(-1) == logits["sparge"].argmax(-1)).float().mean()
    print(f"same next token at {same:.1%} of the places; skipped per layer:")
    print(" ".join(f"{x:.0%}" for x in skipped))
    print(f"wrote {arguments.picture}: layer 12, head 3")


if __name__ == "__main__":
    main()
