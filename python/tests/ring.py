"""One of the two processes of `test_ring.py`: small transformers under diffusers' context parallelism, each
process with half of the tokens, on the CPU. The first one prints the relative L1 to one process alone."""

from __future__ import annotations

import json
import math
from typing import Any

import diffusers
import sparge.diffusers
import test_diffusers as models
import torch
import torch.distributed
from common import relative_l1

KEEP_ALL: dict[str, Any] = {"topk": 1.0, "pv_gap": math.inf}
RUNS: "dict[str, tuple[Any, dict[str, int], dict[str, Any]]]" = {
    "flux ring": (models.flux, {"ring_degree": 2}, KEEP_ALL),
    "flux ulysses": (models.flux, {"ulysses_degree": 2}, KEEP_ALL),
    "wan ring": (models.wan, {"ring_degree": 2}, KEEP_ALL),
    "wan ring dense": (models.wan, {"ring_degree": 2}, {"topk": 0.5, "dense_steps": 1}),
    "wan ring sparse": (models.wan, {"ring_degree": 2}, {"topk": 0.5, "keep_first": 0}),
}


def main() -> None:
    torch.distributed.init_process_group("gloo")
    # diffusers divides the rank by the number of accelerators, which is 0 here.
    torch.accelerator.device_count = lambda: 1
    found = {}
    for name, (case, degrees, knobs) in RUNS.items():
        torch.manual_seed(0)
        model, inputs = models.made(case, "cpu")
        models._sharpen(model)
        alone = models.run(model, inputs)
        with sparge.diffusers.enable(model, **knobs):
            model.enable_parallelism(config=diffusers.ContextParallelConfig(**degrees))
            found[name] = relative_l1(models.run(model, inputs), alone)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with torch.no_grad():
        main()
