"""Time ``sparge`` and PyTorch's CPU ``scaled_dot_product_attention`` in turns.

Every round times PyTorch once and then the command once per policy, so that whatever else the
machine does meets both; a row reports the median of the rounds' own ratios. Inputs are each
program's own structured ones (dense time does not depend on the values). One JSON line per shape
and policy on stdout.

Usage::

    python paired.py --sparge target/release/sparge --shape 9x8192x64:causal --shape 8x4096x128
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from torch_sdpa import Shape, inputs


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparge", required=True, help="the command")
    parser.add_argument("--shape", type=Shape.parse, action="append", required=True,
                        metavar="HxLxD[:causal]", help="may be repeated")
    parser.add_argument("--policy", default="dense,topk:0.5,topk:0.15", help="as of `sparge bench`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    for shape in args.shape:
        q, k, v = inputs(shape, 0)
        command = [args.sparge, "bench", "--json", "--threads", str(args.threads), "--reps", "1",
                   "--shape", str(shape), "--policy", args.policy]
        theirs: list[float] = []
        ours: dict[str, list[dict]] = {}
        with torch.inference_mode():
            scaled_dot_product_attention(q, k, v, is_causal=shape.causal)
            for _ in range(args.rounds):
                start = time.perf_counter()
                scaled_dot_product_attention(q, k, v, is_causal=shape.causal)
                theirs.append(time.perf_counter() - start)
                out = subprocess.run(command, check=True, capture_output=True).stdout
                for result in json.loads(out)["results"]:
                    ours.setdefault(result["policy"], []).append(result)
        for policy, results in ours.items():
            seconds = [result["median_s"] for result in results]
            print(json.dumps({
                "shape": str(shape),
                "policy": policy,
                "threads": args.threads,
                "rounds": args.rounds,
                "torch": torch.__version__,
                "torch_median_s": round(statistics.median(theirs), 5),
                "sparge_median_s": round(statistics.median(seconds), 5),
                "ratio": round(statistics.median(t / s for t, s in zip(theirs, seconds)), 3),
                "ratios": [round(t / s, 3) for t, s in zip(theirs, seconds)],
                "predict_share_of_dense": results[0]["predict_of_dense"],
            }), flush=True)


if __name__ == "__main__":
    main()
