"""Calibration files: per-layer, per-head settings of a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Union

from ._config import Config
from ._sparge import SpargeError


@dataclass(frozen=True)
class Calibration:
    """The settings of every attention layer of a model."""

    layers: tuple[Config, ...]

    def layer(self, index: int) -> Config:
        """The settings of layer ``index``, from 0."""
        if not 0 <= index < len(self.layers):
            raise SpargeError(
                f"layer {index} is not in the calibration, which has {len(self.layers)} layers; "
                "calibrate the same model"
            )
        return self.layers[index]


def load_calibration(source: Union[str, "dict[str, Any]"]) -> Calibration:
    """Reads a calibration file (a path) or its parsed JSON."""
    if isinstance(source, dict):
        data = source
    else:
        with open(source, encoding="utf-8") as file:
            data = json.load(file)
    return Calibration(tuple(_layer(i, layer) for i, layer in enumerate(data["layers"])))


def _layer(index: int, layer: "dict[str, Any]") -> Config:
    raise NotImplementedError
