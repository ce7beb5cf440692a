"""One bound for all layers, or each layer's by its effect: what a tuned model loses and skips.

    python benchmarks/python/tune_effect.py > benchmarks/record/DATE-DEVICE-python-tune-effect.jsonl

The discs of `python/examples` (a small diffusion transformer, trained here in minutes), tuned on two
pictures at several bounds by either rule; `psnr_db` is of four other pictures against dense drawing from
the same noise. One JSON object a line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path

import sparge.diffusers
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "python" / "examples"))
import diffusers_discs  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-steps", type=int, default=150)
    parser.add_argument("--l1", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = diffusers_discs.Model()
    with contextlib.redirect_stdout(sys.stderr):
        model.train(args.train_steps)
    model.net.eval()
    tokens = diffusers_discs.SIDE**2
    tuning, noise = torch.randn(2, tokens, 3), torch.randn(4, tokens, 3)
    with torch.no_grad():
        dense = model.draw(noise, 12)
        for l1 in args.l1:
            for by in ("error", "effect"):
                tuned = sparge.diffusers.tune(
                    model.net, lambda: model.draw(tuning, 6), l1=l1, by=by, every=2, order="hilbert",
                    keep_first=0,
                )  # fmt: skip
                with sparge.diffusers.enable(model.net, calibration=tuned, order="hilbert"):
                    error = float((model.draw(noise, 12) - dense).square().mean())
                layers = tuned.contents["layers"]
                print(json.dumps({
                    "l1": l1, "by": by, "psnr_db": round(10 * math.log10(4 / error), 2), **tuned.measured,
                    "layer_l1": [layer.get("bounds", {}).get("l1", l1) for layer in layers],
                    "train_steps": args.train_steps,
                }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
