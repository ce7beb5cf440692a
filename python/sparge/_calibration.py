"""Calibration files: per-layer, per-head settings of a model, as `sparge tune` and this package write them."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, Union

from ._config import POOLINGS, Config
from ._sparge import SpargeError

FORMAT, VERSION = "sparge-calibration", 1

# A share that adds nothing: every row keeps at least one block anyway.
_NOTHING = 1e-9
# What `Config` leaves out, as the file says it (`SpargeConfig::default`).
_POOLING, _KEEP_FIRST, _KEEP_LOCAL = "mixed", 1, 2


@dataclass(frozen=True, repr=False)
class Calibration:
    """The settings of every attention layer of a model.

    ``model`` and ``measured`` are the file's own entries: the model's id and shape, and what the
    settings were measured to do on the calibration data. ``contents`` is the whole file.
    """

    layers: tuple[Config, ...]
    model: "dict[str, Any]" = field(default_factory=dict)
    measured: "dict[str, Any]" = field(default_factory=dict)
    contents: "dict[str, Any]" = field(default_factory=dict)

    def layer(self, index: int) -> Config:
        """The settings of layer ``index``, from 0."""
        if not 0 <= index < len(self.layers):
            raise SpargeError(
                f"layer {index} is not in the calibration, which has {len(self.layers)} layers; "
                "calibrate the same model"
            )
        return self.layers[index]

    def save(self, path: "Union[str, os.PathLike[str]]") -> None:
        """Writes the file that :func:`load_calibration` and the command read (``docs/calibration.md``):
        JSON, one line per head. A file that is there is replaced at once, never half."""
        if "layers" not in self.contents:
            raise SpargeError(
                "this calibration was put together by hand; save those that tune or load_calibration made"
            )
        text, draft = _text(self.contents), f"{os.fspath(path)}.part"
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, path)

    def __repr__(self) -> str:
        said, did = self.model, self.measured
        name = f"{said.get('id')}: {said.get('num_layers')} layers of {said.get('num_qo_heads')} heads"
        if not did:
            return f"<Calibration of {name}>"
        return (
            f"<Calibration of {name}; {did['qk_sparsity']:.1%} of Q·Kᵀ and {did['pv_sparsity']:.1%} of "
            f"P·V skipped at relative L1 {did['rel_l1']:.4f}>"
        )


def _text(contents: "dict[str, Any]") -> str:
    """One line per entry and per head, for people to read and compare."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    lines = [f"  {line(name)}: {line(value)}," for name, value in contents.items() if name != "layers"]
    layers = []
    for layer in contents["layers"]:
        more = "".join(f", {line(name)}: {line(x)}" for name, x in layer.items() if name != "heads")
        heads = ",\n".join(f"      {line(head)}" for head in layer["heads"])
        layers.append(f'    {{ "heads": [\n{heads}\n    ]{more} }}')
    return "\n".join(["{", *lines, '  "layers": [', ",\n".join(layers), "  ]", "}", ""])


def load_calibration(
    source: "Union[str, os.PathLike[str], dict[str, Any], Calibration]",
) -> Calibration:
    """Reads a calibration file (a path), or takes its parsed JSON."""
    if isinstance(source, Calibration):
        return source
    if isinstance(source, dict):
        data = source
    else:
        with open(source, encoding="utf-8") as file:
            data = json.load(file)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise SpargeError(f"the file's format is {got!r}, expected {FORMAT!r}")
    if data.get("version") != VERSION:
        raise SpargeError(
            f"the calibration has version {data.get('version')!r}, and this package reads "
            f"{VERSION}; calibrate again with this version"
        )
    try:
        shared, layers = _shared(data["settings"]), data["layers"]
        read = tuple(_layer(layer["heads"], shared) for layer in layers)
        heads, count = data["model"]["num_qo_heads"], data["model"]["num_layers"]
        counts = [len(layer["heads"]) for layer in layers]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpargeError(f"the calibration file is damaged: {error!r}") from error
    if counts != [heads] * count:
        raise SpargeError(
            f"the calibration says {count} layers of {heads} heads and holds heads {counts}"
        )
    return Calibration(read, data["model"], data.get("measured", {}), data)


def _shared(settings: "dict[str, Any]") -> Config:
    pooling = settings["pooling"]
    more = "+var" if pooling["second_order"] else ""
    rows = int(pooling.get("sampled_rows", 0))
    more += f"+{rows}rows" if rows else ""
    return Config(
        pooling=f"{int(pooling['q_rows'])}x{int(pooling['kv_rows'])}{more}",
        keep_first=int(settings["keep_first"]),
        keep_local=int(settings.get("keep_local", 0)),
        min_kv_len=int(settings["min_kv_len"]),
    )


def shared_entry(config: Config, min_kv_len: int) -> "dict[str, Any]":
    """The file's ``settings``: what all heads share."""
    words = POOLINGS.get(config.pooling or _POOLING, config.pooling or _POOLING)
    found = re.fullmatch(r"(\d+)x(\d+)(\+var)?(?:\+(\d+)rows?)?", words)
    if found is None:
        raise SpargeError(
            f"pooling is {words!r}, expected {', '.join(POOLINGS)}, or QxK+var+Nrows as the command has it"
        )
    q_rows, kv_rows, more, rows = found.groups()
    pooling = {
        "q_rows": int(q_rows),
        "kv_rows": int(kv_rows),
        "second_order": more is not None,
        "sampled_rows": int(rows or 0),
    }
    return {
        "pooling": pooling,
        "keep_first": _KEEP_FIRST if config.keep_first is None else config.keep_first,
        "keep_local": _KEEP_LOCAL if config.keep_local is None else config.keep_local,
        "min_kv_len": min_kv_len,
    }


def _layer(heads: "list[dict[str, Any]]", shared: Config) -> Config:
    """A head with neither τ nor a share is dense, which is τ = 1."""

    def of(name: str, head: "dict[str, Any]", absent: float) -> float:
        value = head.get(name)
        return absent if value is None else float(value)

    cdf, topk = [], []
    for head in heads:
        is_dense = head.get("cdf") is None and head.get("top_k") is None
        cdf.append(of("cdf", head, 1.0 if is_dense else _NOTHING))
        topk.append(of("top_k", head, _NOTHING))
    return shared.override(
        cdf=tuple(cdf),
        topk=tuple(topk) if any(x != _NOTHING for x in topk) else None,
        theta=tuple(of("theta", head, 0.0) for head in heads),
        pv_gap=tuple(of("lambda", head, math.inf) for head in heads),
    )
