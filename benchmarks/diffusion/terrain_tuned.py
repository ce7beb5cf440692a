"""Settings of `sparge tune` for the terrain U-Net, one bound for all layers or each layer's own.

The paper bounds the relative L1 error of every head alike. What an error in a layer does to the map
differs by layers, though, so the second way measures that first: each layer alone runs with its
settings, and the change of the map says how much error the layer can be allowed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Optional

import sparge
import terrain_methods as methods
from sparge import Config
from terrain_methods import Method, Recorded, Sparse, skipped
from terrain_metrics import compare
from terrain_net import TerrainNet, dense
from torch import Tensor

# As terrain_tune has it: the default prediction.
POOLING = "16x16+2rows"
BOUNDS = ("0.01", "0.02", "0.05", "0.1", "0.2", "0.4")
# The bound at which the effect of a layer is measured.
PROBED = "0.05"
DENSE = Config(topk=1.0, pv_gap=math.inf)
# By layer; None where it is dense.
Bounds = dict[int, Optional[str]]


class Tuned:
    """The files `FOLDER/SIDE-TOKENS-ORDER-POOLING-BOUND.json`: every layer at every bound."""

    def __init__(self, folder: Path, side: int, order: str, layers: Recorded) -> None:
        of_length: dict[int, list[int]] = {}
        for layer, (q, _, _) in layers.items():
            of_length.setdefault(q.shape[2], []).append(layer)
        # By layer and bound: the settings, and the relative L1 error that was measured with them.
        self.configs: dict[tuple[int, str], Config] = {}
        self.errors: dict[tuple[int, str], float] = {}
        for tokens, same in of_length.items():
            for bound in BOUNDS:
                path = folder / f"{side}-{tokens}-{order}-{POOLING}-{bound}.json"
                data = json.loads(path.read_text())
                calibration = sparge.load_calibration(data)
                for i, layer in enumerate(same):
                    heads = data["layers"][i]["heads"]
                    self.configs[layer, bound] = calibration.layer(i)
                    self.errors[layer, bound] = sum(x["rel_l1"] for x in heads) / len(heads)

    def at(self, bound: str) -> Method:
        return methods.own(lambda layer: self.configs[layer, bound])

    def effects(
        self, net: TerrainNet, samples: list[tuple[Tensor, Tensor]], order: str
    ) -> dict[int, float]:
        """PSNR of the map where one layer alone runs as tuned to `PROBED`: of each, the worst."""
        found = {layer: math.inf for layer, bound in self.configs if bound == PROBED}
        sparse = Sparse(self.at(PROBED), order)
        for sample in samples:
            exact = net(*sample)
            for one in found:

                def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                    return (sparse if layer == one else dense)(layer, q, k, v)

                found[one] = min(found[one], compare(net(*sample, attend), exact)[0])
        return found

    def by_effect(self, effects: dict[int, float], sparsity: float, layers: Recorded) -> Bounds:
        """Each layer's bound: the same effect of each, and `sparsity` of them all.

        An error's effect is taken as proportional to it.
        """
        counts = {
            (layer, bound): methods.own(lambda _, config=config: config)(layer, *layers[layer])[1]
            for (layer, bound), config in self.configs.items()
        }

        def bounds(psnr: float) -> Bounds:
            chosen: Bounds = {}
            for layer, effect in effects.items():
                fit = [
                    bound
                    for bound in BOUNDS
                    if effect - 20 * math.log10(self.error_ratio(layer, bound)) >= psnr
                ]
                chosen[layer] = fit[-1] if fit else None
            return chosen

        def reached(chosen: Bounds) -> float:
            every = [counts[layer, bound or PROBED].clone() for layer, bound in chosen.items()]
            for x, bound in zip(every, chosen.values()):
                if bound is None:
                    x[..., 1] = x[..., 0]
            return skipped(every)

        # From the strictest on: the first that reaches it.
        levels = (bounds(psnr) for psnr in range(120, 0, -1))
        return next((x for x in levels if reached(x) >= sparsity), bounds(0))

    def error_ratio(self, layer: int, bound: str) -> float:
        """The layer's error at `bound` over that at `PROBED`; a layer that stayed dense has none."""
        return max(self.errors[layer, bound], 1e-6) / max(self.errors[layer, PROBED], 1e-6)

    def of_each(self, bounds: Bounds) -> Method:
        configs = {
            layer: DENSE if bound is None else self.configs[layer, bound]
            for layer, bound in bounds.items()
        }
        return methods.own(configs.__getitem__)
