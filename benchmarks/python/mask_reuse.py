"""What `sparge.diffusers.enable(..., reuse_mask=s)` saves and costs on a CPU.

    python benchmarks/python/mask_reuse.py > benchmarks/record/DATE-python-DEVICE-mask-reuse.jsonl

One JSON object a line. `share`: times of stage 1, of a call, and of the drift check, by length, on
queries and keys that follow a slow random walk. `steps`: the discs of `python/examples` drawn with one
mask for so many steps, against dense drawing from the same noise. `age`: how far masks of a dense run
(Hilbert order) are from those of earlier steps, in blocks and in the output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable

import sparge
import sparge.diffusers
import torch
from sparge.diffusers import Reuse, _attend, _reuse

sys.path.insert(0, str(Path(__file__).parents[2] / "python" / "examples"))
sys.path.insert(0, str(Path(__file__).parents[2] / "python" / "tests"))
import common  # noqa: E402
import diffusers_discs  # noqa: E402

Tensor = torch.Tensor


def medians(calls: "dict[str, Callable[[], Any]]") -> "dict[str, float]":
    """Seconds of the first; of the others the share of the first right before: the machine drifts."""
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < 8 or time.perf_counter() - begin < 4:
        times = []
        for call in calls.values():
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        rounds.append([times[0], *(x / times[0] for x in times[1:])])
    rounds = rounds[1:]
    return {name: sorted(column)[len(rounds) // 2] for name, column in zip(calls, zip(*rounds))}


def shares(length: int, topk: float) -> "dict[str, Any]":
    """Times of one call's parts."""
    q, k, v = common.qkv(4, 4, q_len=length)
    config = sparge.Config(topk=topk)
    text = _reuse.settings_text(config)
    mask = sparge.predict(q, k, config=config)
    found = medians({
        "call_s": lambda: sparge.attention(q, k, v, config=config),
        "predict_share": lambda: sparge.predict(q, k, config=config),
        "attend_share": lambda: sparge.block_sparse_attention(q, k, v, mask),
        "check_share": lambda: _reuse._missing(mask.tensor, q, k, text, 0).read(),
    })  # fmt: skip
    return {
        "kind": "share", "tokens": length, "heads": 4, "dim": 64, "topk": topk,
        "threads": torch.get_num_threads(), **{name: round(x, 4) for name, x in found.items()},
    }  # fmt: skip


def psnr(got: Tensor, want: Tensor) -> float:
    """Of pictures in −1..1."""
    return round(10 * math.log10(4 / float((got - want).square().mean())), 2)


def drawn(model: Any, noise: Tensor, steps: int, **options: Any) -> "tuple[Tensor, Any]":
    """Pictures from noise under `options`, the handle's step kept up."""
    with sparge.diffusers.enable(model.net, **options) as handle:
        forward = model.net.register_forward_hook(lambda *_: setattr(handle, "step", handle.step + 1))
        pictures = model.draw(noise, steps)
        forward.remove()
    return pictures, handle.masks


def ages(model: Any, noise: Tensor, steps: int, config: sparge.Config) -> "list[dict[str, Any]]":
    """Queries, keys and values of a dense run, under each other's masks."""
    calls: list[tuple[Tensor, Tensor, Tensor, Any]] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q.clone(), k.clone(), v.clone(), options["keep_keys"]))
        return sparge.attention(q, k, v, **options)  # type: ignore[no-any-return]

    before, _attend.attention = _attend.attention, noted
    with sparge.diffusers.enable(model.net, policy="dense", order="hilbert"):
        model.draw(noise, steps)
    _attend.attention = before
    layers = len(calls) // steps
    text = _reuse.settings_text(config, keep_keys=calls[0][3])
    masks = [_reuse._ops.predict(q, k, None, None, None, text) for q, k, *_ in calls]
    rows = []
    for age in (0, 1, 2, 3, 5):
        missing, error = [], []
        for at in range(age * layers, len(calls)):
            mask, fresh = masks[at - age * layers], masks[at]
            q, k, v, _ = calls[at]
            exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            got = sparge.block_sparse_attention(q, k, v, mask)
            missing.append(float((fresh & ~mask).sum() / fresh.sum()))
            error.append(common.relative_l1(got, exact))
        mean = lambda x: round(sum(x) / len(x), 4)  # noqa: E731
        rows.append({"kind": "age", "steps": steps, "age": age, "missing": mean(missing),
                     "missing_max": round(max(missing), 4), "relative_l1": mean(error)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--topk", type=float, default=0.4)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    def write(row: "dict[str, Any]") -> None:
        print(json.dumps(row), flush=True)

    for length in (2048, 4096, 8192, 16384):
        for topk in (0.3, 0.5):
            with torch.inference_mode():
                write(shares(length, topk))
    model = diffusers_discs.Model()
    with contextlib.redirect_stdout(sys.stderr):
        model.train(arguments.train_steps)
    model.net.eval()
    noise = torch.randn(2, diffusers_discs.SIDE**2, 3)
    config = sparge.Config(topk=arguments.topk)
    with torch.no_grad():
        for row in ages(model, noise, arguments.steps, config):
            write(row)
        dense = model.draw(noise, arguments.steps)
        for order in ("row", "hilbert"):
            for reuse in (1, 2, 4, 8, Reuse(8, drift=1.0)):
                options = {"config": config, "order": order, "reuse_mask": reuse}
                pictures, counts = drawn(model, noise, arguments.steps, **options)
                write({
                    "kind": "steps", "order": order, "topk": arguments.topk,
                    "reuse": reuse if isinstance(reuse, int) else vars(reuse),
                    "psnr_db": psnr(pictures, dense), **vars(counts),
                })  # fmt: skip


if __name__ == "__main__":
    main()
