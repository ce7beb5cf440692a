"""Calibration by trying: per layer and head the sparsest setting whose error stays within a bound.

The samples are read twice, and attention calls are measured as they come by: what stays is a table of
errors per layer, never a tensor. The first reading tries every τ without stage 2, the second every λ at
the τ that was chosen. Heads do not touch each other, so the second reading has run each head's final
setting: its error and sparsity are those of the file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Optional, Union

import torch

from ._build import build_info
from ._calibration import FORMAT, VERSION, Calibration, load_calibration, shared_entry
from ._config import Config, parsed
from ._sparge import SpargeError
from ._types import Stats

Tensor = torch.Tensor
#: Runs one attention call with a setting: the output ``[batch, heads, tokens, dim]`` and what it skipped.
Attend = Callable[[Config], "tuple[Tensor, Stats]"]
Progress = Union[bool, Callable[[str], None]]

#: τ and λ from sparse to dense, those of `sparge tune`.
CDF = (
    0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.975, 0.98, 0.985,
    0.99, 0.9925, 0.995, 0.9975, 0.999, 0.9999,
)  # fmt: skip
GAPS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, math.inf)
#: A head that skips less is dense: prediction costs about as much as it would save.
MIN_SPARSITY = 0.03
#: What "auto" predicts from (`Selection::AUTO_MIN_LEN`); calibrated models run dense below it.
MIN_KV_LEN = 1024
# How far a layer's own bound may be from the given one.
_MOST_RATIO = 8.0
_LARGEST_BOUND = 0.9


@dataclass
class _Tried:
    """What one candidate did to a layer's heads, ``[heads]`` each; on the tensors' device, so that
    nothing waits for it."""

    worst: Tensor  # relative L1, of the samples
    l1: Tensor  # Σ|O − O′|
    counts: Tensor  # [heads, 4], as in `Stats`


@dataclass
class _Table:
    """The candidates of one layer, and Σ|O| of its heads."""

    configs: "list[Config]"
    tried: "list[_Tried]" = field(default_factory=list)
    norm: "Optional[Tensor]" = None
    samples: int = 0

    def add(self, attend: Attend, want: Tensor) -> None:
        """Runs every candidate. A batch entry is a sample."""
        want = want.float()
        norm = _l1(want)
        for at, config in enumerate(self.configs):
            out, stats = attend(config)
            l1 = _l1(out.float() - want)
            # A head whose output is zero has an error only where it should not be.
            relative = torch.where(l1 == 0, l1, l1 / norm).nan_to_num(nan=math.inf, posinf=math.inf)
            now = _Tried(relative.amax(0), l1.sum(0), stats.counts.to(l1.device).sum(0))
            if at == len(self.tried):
                self.tried.append(now)
                continue
            before = self.tried[at]
            before.worst = torch.maximum(before.worst, now.worst)
            before.l1 = before.l1 + now.l1
            before.counts = before.counts + now.counts
        self.norm = norm.sum(0) if self.norm is None else self.norm + norm.sum(0)
        self.samples += want.shape[0]

    def worst(self) -> Tensor:
        """``[candidates, heads]``"""
        return torch.stack([x.worst for x in self.tried]).cpu()

    def l1(self) -> Tensor:
        """``[candidates, heads]``"""
        return torch.stack([x.l1 for x in self.tried]).cpu()

    def counts(self) -> Tensor:
        """``[candidates, heads, 4]``"""
        return torch.stack([x.counts for x in self.tried]).cpu()

    def norms(self) -> Tensor:
        """``[heads]``"""
        assert self.norm is not None
        return self.norm.cpu()


def _l1(x: Tensor) -> Tensor:
    """Σ|x| ``[batch, heads]`` of ``[batch, heads, tokens, dim]``."""
    return x.abs().sum((2, 3), dtype=torch.float64)


def _share(done: Tensor, of: Tensor) -> Tensor:
    """The part that was not done, 0 where there was nothing to do."""
    return torch.where(of > 0, 1 - done.double() / of.clamp(min=1), 0.0)


class Study:
    """The tables of a model, fed with attention calls while its samples are read."""

    def __init__(
        self,
        l1: float,
        l2: Optional[float],
        by: str,
        config: Optional[Config],
        knobs: "dict[str, Any]",
        progress: Progress,
    ) -> None:
        l2 = min(1.2 * l1, 0.999) if l2 is None else l2
        if not (0 < l1 < 1 and l1 <= l2 < 1):
            raise SpargeError(
                f"l1 is {l1} and l2 {l2}, expected 0 < l1 <= l2 < 1: relative errors without and with "
                "stage 2, such as 0.05 and 0.06"
            )
        if by not in ("error", "effect"):
            raise SpargeError(f"by is {by!r}, expected 'error' or 'effect'")
        base = (config or Config()).override(**knobs)
        found = [name for name in ("topk", "cdf", "target_l1", "pv_gap", "policy") if name in base.given()]
        if found:
            raise SpargeError(
                f"{' and '.join(found)} cannot be given: tuning looks for cdf and pv_gap with this "
                "package's own prediction; give what it keeps fixed (pooling, keep_first, keep_local, "
                "theta, qk)"
            )
        parsed(base.text())
        shared_entry(base, 0)  # refuses here what the file could not hold
        self.bounds = (float(l1), float(l2))
        self.min_kv_len = base.min_kv_len
        self._by = by
        self._base = replace(base, min_kv_len=None)
        self._say = _line if progress is True else progress or None
        self._has_line = progress is True
        self._uniform = [self._with(x, math.inf) for x in CDF]
        self._trying: Optional[Callable[[int], list[Config]]] = None
        self._alone: Optional[int] = None
        self._tables: dict[int, _Table] = {}
        self._cdf: dict[int, tuple[float, ...]] = {}
        #: Of layers that have their own.
        self._ratios: dict[int, float] = {}
        self._shape: Optional[tuple[int, int, int]] = None
        self._lens = (sys.maxsize, 0)
        self._stage, self._calls, self._expected = "", 0, 0

    def _with(self, cdf: Any, pv_gap: float) -> Config:
        return self._base.override(cdf=cdf, pv_gap=pv_gap)

    def call(self, layer: int, query: Tensor, key: Tensor, attend: Attend, want: Tensor) -> Tensor:
        """Measures one call of a layer on ``query`` and ``key`` ``[batch, heads, tokens, dim]``, whose
        exact output is ``want``; returns the output that the model shall go on with."""
        if self._alone is not None:
            if layer != self._alone:
                return want
            return attend(self._with(self._cdf[layer], math.inf))[0]
        if self._trying is None:
            return want
        self._check(layer, query, key)
        table = self._tables.get(layer)
        if table is None:
            table = self._tables[layer] = _Table(self._trying(layer))
        table.add(attend, want)
        self._calls += 1
        self._report(f"{self._calls}" + (f" of {self._expected} calls" if self._expected else " calls"))
        return want

    def _check(self, layer: int, query: Tensor, key: Tensor) -> None:
        shape = (query.shape[1], key.shape[1], query.shape[3])
        if self._shape is None:
            self._shape = shape
        if shape != self._shape:
            raise SpargeError(
                f"layer {layer} has {shape[0]} query heads, {shape[1]} key/value heads of {shape[2]} "
                f"elements and an earlier call {self._shape[0]}, {self._shape[1]} of {self._shape[2]}; a "
                "calibration holds layers of one shape: tune the others apart"
            )
        shortest, longest = self._lens
        self._lens = (min(shortest, key.shape[2]), max(longest, key.shape[2]))

    def _report(self, what: str) -> None:
        if self._say is not None:
            self._say(f"{self._stage}, {what}")

    def run(self, read: "Callable[[bool], Any]") -> None:
        """Both readings. ``read(False)`` reads all samples and returns the model's output (tensors,
        anyhow nested) of the first, ``read(True)`` the first alone; every call goes to :meth:`call`."""
        try:
            self._run(read)
        finally:
            if self._has_line:
                sys.stderr.write("\n")

    def _run(self, read: "Callable[[bool], Any]") -> None:
        self._begin("τ", lambda _: self._uniform)
        exact = read(False)
        if not self._tables:
            raise SpargeError("no attention call was seen: the samples run none that could be sparse")
        surveyed = self._tables
        self._cdf = {layer: self._choose_cdf(layer, table) for layer, table in surveyed.items()}
        if self._by == "effect":
            self._ratios = self._measure_effects(surveyed, exact, read)
            self._cdf = {layer: self._choose_cdf(layer, table) for layer, table in surveyed.items()}
        self._expected = self._calls
        self._begin("λ", self._gaps)
        read(False)
        self._trying = None
        missing = sorted(surveyed.keys() - self._tables.keys())
        if missing:
            raise SpargeError(
                f"the second reading had no call of layers {missing}; the same samples must be read "
                "each time"
            )

    def _begin(self, stage: str, trying: "Callable[[int], list[Config]]") -> None:
        self._stage, self._trying, self._tables, self._calls = stage, trying, {}, 0

    def _gaps(self, layer: int) -> "list[Config]":
        cdf = self._cdf.get(layer)
        if cdf is None:
            raise SpargeError(
                f"the second reading calls layer {layer}, the first did not; the same samples must be "
                "read each time"
            )
        return [self._with(cdf, x) for x in GAPS]

    def _bound(self, layer: int) -> "tuple[float, float]":
        ratio = self._ratios.get(layer, 1.0)
        l1, l2 = (min(x * ratio, max(x, _LARGEST_BOUND)) for x in self.bounds)
        return l1, max(l1, l2)

    def _choose_cdf(self, layer: int, table: _Table) -> "tuple[float, ...]":
        """Per head the first τ that fits, 1 (dense) where none does."""
        counts = table.counts()
        sparsity = _share(counts[..., 1], counts[..., 0])
        fits = (table.worst() <= self._bound(layer)[0]) & (sparsity >= MIN_SPARSITY)
        return tuple(CDF[head.int().argmax()] if head.any() else 1.0 for head in fits.T)

    def _measure_effects(
        self, tables: "dict[int, _Table]", exact: Any, read: "Callable[[bool], Any]"
    ) -> "dict[int, float]":
        """Each layer alone runs sparse on the first sample: how far that moves the model's output, per
        error of the layer, says how much of the bound it gets. An error's effect is taken as
        proportional to it; the bounds' geometric mean is the given one."""
        effects: dict[int, float] = {}
        try:
            for layer, table in sorted(tables.items()):
                error = self._error_at(table, self._cdf[layer])
                if error == 0:
                    continue  # dense: nothing is known, it keeps the bound of all
                self._stage, self._alone = "effect", layer
                self._report(f"layer {layer}")
                effects[layer] = _distance(read(True), exact) / error
        finally:
            self._alone = None
        effects = {layer: x for layer, x in effects.items() if 0 < x < math.inf}
        if not effects:
            return {}
        mean = sum(map(math.log, effects.values())) / len(effects)
        most = math.log(_MOST_RATIO)
        return {
            layer: math.exp(min(most, max(-most, mean - math.log(x))))
            for layer, x in effects.items()
        }

    def _error_at(self, table: _Table, cdf: "tuple[float, ...]") -> float:
        """A layer's relative L1 with its heads at ``cdf``; dense heads have none."""
        l1 = table.l1()
        found = [l1[CDF.index(x), head] for head, x in enumerate(cdf) if x < 1]
        norm = float(table.norms().sum())
        return float(sum(found)) / norm if found and norm else 0.0

    def calibration(self, name: str, source: str, num_layers: int, causal: bool) -> Calibration:
        """The file. Layers without a call are dense."""
        assert self._shape is not None
        heads, kv_heads, head_dim = self._shape
        dense = {"cdf": None, "top_k": None, "theta": 0.0, "lambda": None, **_measured(0, 0, [0] * 4)}
        layers = [
            self._entry(layer, self._tables[layer])
            if layer in self._tables
            else {"heads": [dict(dense) for _ in range(heads)]}
            for layer in range(num_layers)
        ]
        least = min(MIN_KV_LEN, self._lens[0]) if self.min_kv_len is None else self.min_kv_len
        l1, norm, counts = self._total
        return load_calibration(
            {
                "format": FORMAT,
                "version": VERSION,
                "made_by": f"sparge {build_info()['version']} for Python",
                "model": {
                    "id": name,
                    "sha256": None,
                    "num_layers": num_layers,
                    "num_qo_heads": heads,
                    "num_kv_heads": kv_heads,
                    "head_dim": head_dim,
                },
                "data": {
                    "source": source,
                    "samples": max(table.samples for table in self._tables.values()),
                    "tokens": self._lens[1],
                    "causal": causal,
                },
                "bounds": dict(zip(("l1", "l2"), self.bounds)),
                "settings": shared_entry(self._base, least),
                "measured": _measured(l1, norm, counts),
                "layers": layers,
            }
        )

    @property
    def _total(self) -> "tuple[float, float, list[int]]":
        """Σ|O − O′|, Σ|O| and the counts of all heads with what was chosen."""
        l1, norm, counts = 0.0, 0.0, [0] * 4
        for layer, table in self._tables.items():
            chosen = self._choose_gaps(layer, table)
            heads = range(len(chosen))
            l1 += float(table.l1()[chosen, heads].sum())
            norm += float(table.norms().sum())
            added = table.counts()[chosen, heads].sum(0).tolist()
            counts = [a + b for a, b in zip(counts, added)]
        return l1, norm, counts

    def _choose_gaps(self, layer: int, table: _Table) -> "list[int]":
        """Per head the place of the smallest λ that fits, the last (off) where none does or where it
        changes nothing: kernels without a second stage say nothing about it."""
        fits, l1 = table.worst() <= self._bound(layer)[1], table.l1()
        fits &= l1 != l1[-1]
        fits[-1] = True
        found: list[int] = fits.int().argmax(0).tolist()
        return found

    def _entry(self, layer: int, table: _Table) -> "dict[str, Any]":
        worst, l1, norms, counts = table.worst(), table.l1(), table.norms(), table.counts()
        theta = self._base.theta or 0.0
        heads = []
        for head, gap in enumerate(self._choose_gaps(layer, table)):
            cdf = self._cdf[layer][head]
            heads.append(
                {
                    "cdf": None if cdf == 1 else cdf,
                    "top_k": None,
                    "theta": theta[head] if isinstance(theta, tuple) else theta,
                    "lambda": None if GAPS[gap] == math.inf else GAPS[gap],
                    **_measured(l1[gap, head], norms[head], counts[gap, head].tolist()),
                    "worst_l1": _rounded(float(worst[gap, head])),
                }
            )
        entry: dict[str, Any] = {"heads": heads}
        if layer in self._ratios:
            entry["bounds"] = dict(zip(("l1", "l2"), map(_rounded, self._bound(layer))))
        return entry


def _measured(l1: Any, norm: Any, counts: "list[int]") -> "dict[str, float]":
    reachable, computed, groups, done = counts
    shares = {
        "rel_l1": float(l1) / float(norm) if float(l1) else 0.0,
        "qk_sparsity": 1 - computed / reachable if reachable else 0.0,
        "pv_sparsity": 1 - done / groups if groups else 0.0,
    }
    return {name: _rounded(x) for name, x in shares.items()}


def _rounded(x: float) -> float:
    """Digits that mean something. JSON knows no infinity and no NaN: an error that is none is too large."""
    return round(x, 5) if math.isfinite(x) else 1e9


def _line(text: str) -> None:
    sys.stderr.write(f"\rsparge: {text}\033[K")
    sys.stderr.flush()


def _distance(got: Any, want: Any) -> float:
    """Relative L1 of two outputs of a model, whatever holds their tensors."""
    pairs = list(zip(tensors_in(got), tensors_in(want)))
    if not pairs or any(a.shape != b.shape for a, b in pairs):
        raise SpargeError(
            "by='effect' compares what the model returns, and that is not tensors of one shape each "
            "time; return them (output_type='latent' or 'pt' of a pipeline), or leave by at 'error'"
        )
    moved = sum(float((a.float() - b.float()).abs().sum(dtype=torch.float64)) for a, b in pairs)
    size = sum(float(b.float().abs().sum(dtype=torch.float64)) for _, b in pairs)
    return moved / size if size else 0.0


def tensors_in(x: Any) -> "list[Tensor]":
    """The floating-point tensors in a model's output."""
    if isinstance(x, Tensor):
        return [x] if x.dtype.is_floating_point else []
    if isinstance(x, Mapping):
        return [tensor for y in x.values() for tensor in tensors_in(y)]
    return [t for y in x for t in tensors_in(y)] if isinstance(x, (list, tuple)) else []
