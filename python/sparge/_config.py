"""The knobs, and their text form that travels through operators and graphs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

from . import _sparge
from ._sparge import SpargeError

PerHead = Union[float, Sequence[float], None]

# What "auto" selects by, where it selects (`sparge::Selection::AUTO_CDF`).
AUTO_CDF = 0.98

QK = ("f32", "int8", "half")
POOLINGS = {
    "block": "128x64",
    "sub_block": "16x16",
    "second_order": "16x16+var",
    "mixed": "16x16+2rows",
}


@dataclass(frozen=True)
class Config:
    """What may be skipped. ``None`` is the default everywhere.

    * ``topk``: share of the reachable key blocks each query block attends, in (0, 1].
    * ``cdf``: the paper's τ: blocks of descending predicted mass until it is reached, in (0, 1].
      With ``topk`` as well, their union. With neither: 0.98 where prediction pays (arrays: from 1024 keys
      on; torch: 2048; on a GPU where rows see 7168 on average, 8192 at dimensions up to 64), exact below; 0.98 at any length where ``theta``, ``pv_gap`` or ``policy="paper"`` is given.
    * ``target_l1``: instead of both, blocks until the attention that is estimated to be lost falls below this
      (in (0, 1)): ``cdf`` of one minus it. A target, not a bound: `sparge::Selection::target_l1` says how
      far the error lies from it.
    * ``theta``: the judge θ in [0, 1): blocks that are not self-similar are kept. 0: off.
    * ``pv_gap``: λ of stage 2, natural-log units, above 0 (``inf``: off). Default 6.
    * ``pooling``: how blocks are scored: ``"mixed"`` (default: 16×16 means and two sampled
      queries), ``"second_order"``, ``"sub_block"``, ``"block"`` (the paper's), or as the command
      writes it, ``"QxK+var+Nrows"``.
    * ``keep_first``: key blocks at the start that are always kept. Default 1.
    * ``keep_local``: key blocks before the diagonal that are always kept where it is causal.
      Default 2.
    * ``qk``: the arithmetic of Q·Kᵀ. CPU: ``"f32"`` (default) or ``"int8"``. CUDA: ``"int8"``
      (default; P·V in fp8 where the GPU has it) or ``"half"``, both products in 16 bits.
    * ``isa``: ``"scalar"``, ``"avx2"``, ``"avx512"``; default the best there is. CPU only.
    * ``policy``: ``"auto"``; ``"dense"``: exact, nothing is skipped; ``"paper"``: the paper's block
      pooling and no stage 2 (the masks of the authors' code, their bugs aside); and the methods of
      `sparge::policy`, for comparison: ``"window:1024"``, ``"random:0.5"``, ``"minference"``,
      ``"flexprefill:0.95"``, ``"xattention:0.9,stride=8"``, … On CUDA tensors torch operations choose
      their blocks, the CPU's but for near-ties (``"random"`` is drawn on the host, which waits). Under
      ``torch.use_deterministic_algorithms(True)`` some versions of torch refuse the sums of
      ``"flexprefill"`` and ``"xattention"`` on CUDA.

    * ``min_kv_len``: calls with fewer keys run dense. Default: never, for knobs that are set.

    ``topk``, ``cdf``, ``theta`` and ``pv_gap`` take one value, or one per query head (a sequence, an
    array or a tensor; kept as a tuple).
    """

    topk: PerHead = None
    cdf: PerHead = None
    theta: PerHead = None
    pv_gap: PerHead = None
    pooling: Optional[str] = None
    keep_first: Optional[int] = None
    keep_local: Optional[int] = None
    qk: Optional[str] = None
    isa: Optional[str] = None
    policy: Optional[str] = None
    min_kv_len: Optional[int] = None
    target_l1: Optional[float] = None

    def __post_init__(self) -> None:
        for name in _PER_HEAD:
            object.__setattr__(self, name, per_head(name, getattr(self, name)))
        if self.qk is not None and self.qk not in QK:
            raise SpargeError(f"qk is {self.qk!r}, expected one of {', '.join(QK)}")
        if self.policy == "":
            raise SpargeError("policy is '', expected a name or None")
        if self.target_l1 is not None:
            self._check_target()
        # Made once: compiled graphs then read a constant, whatever they think of floats.
        object.__setattr__(self, "_text", self._build())
        is_default = (
            self.topk is None and self.cdf is None and self.target_l1 is None
            and self.theta is None and self.pv_gap is None
            and self.pooling is None and self.keep_first is None and self.keep_local is None
            and self.qk is None and self.isa is None and self.min_kv_len is None
            and self.policy in (None, "auto")
        )  # fmt: skip
        object.__setattr__(self, "_is_default", is_default)

    def _check_target(self) -> None:
        try:
            target = float(self.target_l1)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            kind = type(self.target_l1).__name__
            raise TypeError(f"target_l1 is {kind}, expected a number") from None
        object.__setattr__(self, "target_l1", target)
        if not 0 < target < 1:
            raise SpargeError(f"target_l1 is {self.target_l1!r}, expected above 0 and below 1")
        asked = [name for name in ("topk", "cdf") if getattr(self, name) is not None]
        if asked:
            raise SpargeError(f"target_l1 is given beside {' and '.join(asked)}: drop one of them")

    def override(self, **knobs: Any) -> "Config":
        """A copy with those of ``knobs`` that are not None.

        What chooses blocks is replaced as a whole: a given ``topk``, ``cdf`` or ``target_l1`` drops this
        level's and its other method; a given ``policy`` also what it cannot be combined with.
        """
        given = {name: value for name, value in knobs.items() if value is not None}
        if not given:
            return self
        dropped: set[str] = set()
        if given.keys() & {"topk", "cdf", "target_l1", "policy"}:
            dropped |= {"topk", "cdf", "target_l1"}
            if self.policy not in _OWN_POLICIES:
                dropped.add("policy")
        policy = given.get("policy")
        if policy is not None and policy not in _OWN_POLICIES:
            dropped.add("theta")
        if policy in ("dense", "paper"):
            dropped |= {"pv_gap", "pooling"}
        # Not `dataclasses.replace`, which torch 2.6 does not trace.
        values = {name: None if name in dropped else getattr(self, name) for name in _FIELDS}
        return Config(**{**values, **given})

    def given(self) -> "dict[str, Any]":
        """The fields that are not None."""
        return {name: x for name in _FIELDS if (x := getattr(self, name)) is not None}

    def is_default(self) -> bool:
        """Whether nothing was asked for, so that short sequences may run dense elsewhere."""
        is_default: bool = self._is_default  # type: ignore[attr-defined]
        return is_default

    def at(self, kv_len: int) -> "Config":
        """These settings for a call with ``kv_len`` keys."""
        return DENSE if self.min_kv_len is not None and kv_len < self.min_kv_len else self

    def text(self) -> str:
        """The words of ``sparge._sparge.Settings``."""
        text: str = self._text  # type: ignore[attr-defined]
        return text

    def _build(self) -> str:
        policy = self.policy or "auto"
        words = []
        if policy not in ("auto", "paper"):
            others = ("topk", "cdf", "target_l1", "theta") + (("pv_gap",) if policy == "dense" else ())
            asked = [name for name in others if getattr(self, name) is not None]
            if asked:
                raise SpargeError(
                    f"policy={policy!r} cannot be combined with {', '.join(asked)}: drop one of them"
                )
            words += ["select=all", "pv_gap=inf"] if policy == "dense" else [f"policy={policy}"]
        words += [
            f"{name}={_values(getattr(self, name))}"
            for name in _PER_HEAD
            if getattr(self, name) is not None
        ]
        # A knob that is given counts at any length; the automatic selection would leave it out of
        # short calls.
        is_given = self.pv_gap is not None or self.theta is not None or policy == "paper"
        if self.target_l1 is not None:
            words.append(f"cdf={1 - float(self.target_l1)!r}")
        elif is_given and policy in _OWN_POLICIES and self.topk is None and self.cdf is None:
            words.append(f"cdf={AUTO_CDF}")
        pooling = self.pooling
        if policy == "paper":
            pooling = pooling or "block"
            if self.pv_gap is None:
                words.append("pv_gap=inf")
        if pooling is not None:
            words.append(f"pooling={POOLINGS.get(pooling, pooling)}")
        if self.keep_first is not None:
            words.append(f"keep_first={int(self.keep_first)}")
        keep_local = self.keep_local
        # The paper, and the methods it compares with, keep none.
        if keep_local is None and (policy == "paper" or policy not in _OWN_POLICIES):
            keep_local = 0
        if keep_local is not None:
            words.append(f"keep_local={int(keep_local)}")
        if self.qk is not None:
            words.append(f"qk={self.qk}")
        if self.isa is not None:
            words.append(f"isa={self.isa}")
        return " ".join(words)


_FIELDS = tuple(Config.__dataclass_fields__)
_PER_HEAD = ("topk", "cdf", "theta", "pv_gap")
# Policies that choose blocks by this package's own prediction.
_OWN_POLICIES = (None, "auto", "paper")


def per_head(name: str, value: Any) -> PerHead:
    """A knob as one float or a tuple of floats, which can be hashed and never change."""
    if value is None or type(value) is float:
        return value
    if isinstance(value, (int, float)):
        return float(value)
    if hasattr(value, "tolist"):  # numpy, torch
        value = value.tolist()
        if isinstance(value, (int, float)):
            return float(value)
    try:
        values = tuple(float(x) for x in value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} is {type(value).__name__}, expected a float or one float per query head"
        ) from None
    if not values:
        raise SpargeError(f"{name} is empty, expected a float or one float per query head")
    return values


def _values(value: Any) -> str:
    """One float, or one per head, exactly (repr round-trips)."""
    return ",".join(map(repr, value)) if isinstance(value, tuple) else repr(value)


DENSE = Config(policy="dense")


def settings_text(
    config: Config,
    *,
    layout: str = "HND",
    scale: Optional[float] = None,
    causal: Optional[str] = None,
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    sink_blocks: int = 0,
    keep_keys: Optional[Sequence[tuple[int, int]]] = None,
    keep_queries: Optional[Sequence[tuple[int, int]]] = None,
) -> str:
    """All settings of a call. The layout comes first: operators look for it."""
    words = ["layout=" + layout]
    if causal is not None:
        words.append("causal=" + causal)
    if scale is not None:
        scale = float(scale)
        if not math.isfinite(scale):
            raise SpargeError(f"scale is {scale}, expected a finite number")
        words.append(f"scale={scale!r}")
    if window is not None:
        try:
            left, right = window
        except (TypeError, ValueError):
            raise SpargeError(
                f"window is {window!r}, expected (left, right) with None for unbounded"
            ) from None
        words.append(f"window={_side(left)},{_side(right)}")
    if sink_blocks:
        words.append(f"sink_blocks={int(sink_blocks)}")
    for name, kept in (("keep_keys", keep_keys), ("keep_queries", keep_queries)):
        if kept:
            try:
                pairs = [(int(start), int(end)) for start, end in kept]
            except (TypeError, ValueError):
                raise SpargeError(
                    f"{name} is {kept!r}, expected token ranges ((from, to), …)"
                ) from None
            if any(not 0 <= start < end for start, end in pairs):
                raise SpargeError(f"{name} is {kept!r}, expected token ranges with from below to")
            words.append(name + "=" + ",".join(f"{start}:{end}" for start, end in pairs))
    text = config.text()
    return " ".join(words) + (" " + text if text else "")


def _side(value: Optional[int]) -> str:
    return "-" if value is None or value < 0 else str(int(value))


_parsed: dict[str, "_sparge.Settings"] = {}


def parsed(text: str) -> "_sparge.Settings":
    """The parsed settings, kept: a model uses a handful of texts, thousands of times each."""
    settings = _parsed.get(text)
    if settings is None:
        if len(_parsed) > 4096:
            _parsed.clear()
        settings = _parsed[text] = _sparge.Settings(text)
    return settings
