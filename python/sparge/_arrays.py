"""numpy and DLPack arrays on the CPU: the same calls without torch."""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from . import _sparge
from ._config import Config, parsed, settings_text
from ._mask import BLOCK_KV, BLOCK_Q, BlockMask
from ._sparge import SpargeError
from ._types import Quantized, Stats

_NUMPY = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "bool": "bool",
    "int8": "i8",
    "int64": "i64",
    "float64": "f64",
}


@dataclass(frozen=True)
class Options:
    """A call's arguments, sparsity aside."""

    dropout_p: float = 0.0
    causal: Optional[str] = None
    scale: Optional[float] = None
    enable_gqa: bool = False
    layout: str = "HND"
    window: Optional[tuple[Optional[int], Optional[int]]] = None
    key_lengths: Any = None
    keep_keys: Optional[Sequence[tuple[int, int]]] = None
    keep_queries: Optional[Sequence[tuple[int, int]]] = None
    return_lse: bool = False
    return_stats: bool = False


class _View:
    """An array's address, sizes and strides in elements, and what keeps them valid."""

    def __init__(self, array: Any, name: str) -> None:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(array, numpy.ndarray):
            if "numpy.ma" in sys.modules and isinstance(array, numpy.ma.MaskedArray):
                raise SpargeError(
                    f"{name} is a numpy MaskedArray, whose mask would be ignored; pass plain arrays "
                    "and attn_mask"
                )
            dtype = _NUMPY.get(array.dtype.name)
            if dtype is None:
                raise SpargeError(
                    f"{name} is {array.dtype.name}, expected float32, float16 or bfloat16"
                )
            size = array.itemsize
            rows_apart = array.ndim > 0 and array.shape[-1] > 1 and array.strides[-1] != size
            if rows_apart or any(s % size or s < 0 for s in array.strides):
                array = numpy.ascontiguousarray(array)
            interface = array.__array_interface__
            self.held: Any = array
            self.address: int = interface["data"][0]
            self.dtype = dtype
            self.shape: tuple[int, ...] = array.shape
            self.strides: tuple[int, ...] = tuple(s // size for s in array.strides)
            if self.address % size or not array.dtype.isnative:
                raise SpargeError(f"{name} is not aligned native memory; copy it first")
        elif hasattr(array, "__dlpack__"):
            taken = _sparge.Array.take(array)
            rows_apart = len(taken.shape) > 0 and taken.shape[-1] > 1 and taken.strides[-1] != 1
            if rows_apart or any(s < 0 for s in taken.strides):
                taken = taken.copied()
            self._hold(taken)
        else:
            raise TypeError(
                f"{name} is {type(array).__name__}, expected a torch tensor, a numpy array or "
                "an array with __dlpack__"
            )

    def _hold(self, array: "_sparge.Array") -> None:
        self.held = array
        self.address, self.dtype = array.address, array.dtype
        self.shape, self.strides = array.shape, array.strides

    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order, one after the other."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides)):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    def copy(self, columns: Optional[int] = None) -> None:
        """Goes over to a copy in C order, the last size of 1 repeated to ``columns``."""
        if isinstance(self.held, _sparge.Array):
            self._hold(self.held.copied(columns))
            return
        import numpy

        array = self.held
        if columns is not None:
            array = numpy.broadcast_to(array, (*array.shape[:-1], columns))
        array = numpy.array(array, order="C")
        self.held, self.address = array, array.__array_interface__["data"][0]
        self.shape = array.shape
        self.strides = tuple(s // array.itemsize for s in array.strides)

    def raw(self, name: str) -> Any:
        if len(self.shape) != 4:
            raise SpargeError(f"{name} has {len(self.shape)} dimensions, expected 4")
        return self.address, self.shape, self.strides

    def broadcast(self, name: str, q_len: int, kv_len: int) -> Any:
        """A mask as 4-d, its last two sizes full (stride 0 where it was 1)."""
        if len(self.shape) > 4:
            raise SpargeError(f"{name} has {len(self.shape)} dimensions, expected at most 4")
        if self.shape and self.shape[-1] == 1 and kv_len > 1:
            self.copy(columns=kv_len)
        more = 4 - len(self.shape)
        shape = [1] * more + list(self.shape)
        strides = [0] * more + list(self.strides)
        for at, full in ((2, q_len), (3, kv_len)):
            if shape[at] != full:
                if shape[at] != 1:
                    raise SpargeError(
                        f"{name} is {shape[2]}×{shape[3]}, expected {q_len}×{kv_len}"
                    )
                if at == 3:
                    raise SpargeError(f"{name} has no dimensions, expected at least 1")
                shape[at], strides[at] = full, 0
        return self.address, tuple(shape), tuple(strides)


class _Maker:
    """Makes results of the inputs' kind."""

    def __init__(self, like: Any) -> None:
        numpy = sys.modules.get("numpy")
        self._is_numpy = numpy is not None and isinstance(like, numpy.ndarray)
        self._like = like
        # Asked before anything is computed.
        self._from_dlpack: Any = None if self._is_numpy else _from_dlpack(like)

    def new(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        """A new array and its address."""
        if self._is_numpy:
            import numpy

            names = {ours: theirs for theirs, ours in _NUMPY.items()}
            kind = self._like.dtype if dtype == "bf16" else names[dtype]
            array = numpy.zeros(shape, kind)
            return array, array.__array_interface__["data"][0]
        ours = _sparge.Array.zeros(list(shape), dtype)
        return ours, ours.address

    def finish(self, array: Any) -> Any:
        """The array as the caller's framework knows it."""
        if self._is_numpy:
            return array
        return self._from_dlpack(array)


def _from_dlpack(like: Any) -> Any:
    """How an array's framework takes a result."""
    space = getattr(like, "__array_namespace__", None)
    module = space() if space else sys.modules.get(type(like).__module__.split(".")[0])
    from_dlpack = getattr(module, "from_dlpack", None)
    if from_dlpack is None:
        raise TypeError(
            f"{type(like).__name__} has no __array_namespace__ with from_dlpack, so the result cannot "
            "be of its kind; pass numpy arrays or torch tensors"
        )
    return from_dlpack


def _threads() -> int:
    """As many as this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _extra() -> "_sparge._Extra":
    return {
        "bool_mask": None,
        "bias": None,
        "block_mask": None,
        "kv_lens": None,
        "lse": 0,
        "mask_out": 0,
        "counts": 0,
    }


class _Call:
    """Views of a call's arrays, checked against each other."""

    def __init__(self, q: Any, k: Any, v: Any, config: Config, options: Options) -> None:
        if options.dropout_p:
            raise SpargeError(f"dropout_p is {options.dropout_p}, expected 0: this is inference")
        if options.layout not in ("HND", "NHD"):
            raise SpargeError(f"layout is {options.layout!r}, expected 'HND' or 'NHD'")
        self.q, self.k = _View(q, "query"), _View(k, "key")
        self.v = self.k if v is None else _View(v, "value")
        if self.k.dtype != self.q.dtype or self.v.dtype != self.q.dtype:
            raise SpargeError(
                f"query is {self.q.dtype}, key {self.k.dtype}, value {self.v.dtype}; "
                "they must be the same"
            )
        self.raw = (self.q.raw("query"), self.k.raw("key"), self.v.raw("value"))
        token, head = (2, 1) if options.layout == "HND" else (1, 2)
        self.heads = self.q.shape[head]
        if v is not None and not options.enable_gqa and self.heads != self.k.shape[head]:
            raise SpargeError(
                f"query has {self.heads} heads and key {self.k.shape[head]}; "
                "pass enable_gqa=True for grouped-query attention"
            )
        self.batch, self.q_len, self.kv_len = self.q.shape[0], self.q.shape[token], self.k.shape[token]
        self.extra = _extra()
        self.held: list[Any] = []
        if options.key_lengths is not None:
            try:
                lengths = [operator.index(n) for n in options.key_lengths]
            except TypeError as error:
                raise SpargeError(
                    f"key_lengths is {options.key_lengths!r}, expected integers, one per batch entry"
                ) from error
            if any(n < 0 for n in lengths):
                raise SpargeError(f"key_lengths has the negative length {min(lengths)}")
            self.extra["kv_lens"] = lengths
        self.settings = parsed(
            settings_text(
                config.at(self.kv_len),
                layout=options.layout,
                scale=options.scale,
                causal=options.causal,
                window=options.window,
                keep_keys=options.keep_keys,
                keep_queries=options.keep_queries,
            )
        )

    def mask(self, mask: Any) -> None:
        view = _View(mask, "attn_mask")
        if view.dtype in ("f16", "f64") and hasattr(mask, "astype"):
            view = _View(mask.astype("float32"), "attn_mask")
        if view.dtype not in ("bool", "f32"):
            raise SpargeError(f"attn_mask is {view.dtype}, expected bool or float32")
        self.held.append(view)
        raw = view.broadcast("attn_mask", self.q_len, self.kv_len)
        self.extra["bool_mask" if view.dtype == "bool" else "bias"] = raw

    def blocks(self, mask: Any) -> None:
        view = _View(mask, "block_mask")
        if view.dtype != "bool" or len(view.shape) != 4:
            raise SpargeError(
                f"block_mask is {view.dtype} with {len(view.shape)} dimensions, expected bool with 4"
            )
        if not view.is_contiguous():
            view.copy()
        self.held.append(view)
        self.extra["block_mask"] = view.raw("block_mask")

    def mask_shape(self) -> tuple[int, int, int, int]:
        q_blocks = (self.q_len + BLOCK_Q - 1) // BLOCK_Q
        return self.batch, self.heads, q_blocks, (self.kv_len + BLOCK_KV - 1) // BLOCK_KV


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    config: Config,
    options: Options,
    block_mask: Any,
) -> Any:
    """`sparge.attention` on numpy and DLPack arrays."""
    if options.causal and attn_mask is not None:
        raise SpargeError(
            "is_causal cannot be combined with attn_mask: put the diagonal into the mask"
        )
    call = _Call(query, key, value, config, options)
    if attn_mask is not None:
        call.mask(attn_mask)
    if block_mask is not None:
        call.blocks(block_mask)
    make = _Maker(query)
    out, address = make.new((*call.q.shape[:3], call.v.shape[3]), call.q.dtype)
    lse = counts = None
    if options.return_lse:
        lse, call.extra["lse"] = make.new((call.batch, call.heads, call.q_len), "f32")
    if options.return_stats:
        import numpy

        counts = numpy.zeros((call.batch, call.heads, 4), "int64")
        call.extra["counts"] = counts.__array_interface__["data"][0]
    _sparge.attend(call.settings, call.q.dtype, _threads(), *call.raw, address, call.extra)
    results = [make.finish(out)]
    if lse is not None:
        results.append(make.finish(lse))
    if counts is not None:
        results.append(Stats(counts))
    return tuple(results) if len(results) > 1 else results[0]


def predict(
    query: Any, key: Any, attn_mask: Any, config: Config, options: Options
) -> BlockMask:
    """`sparge.predict` on numpy and DLPack arrays."""
    call = _Call(query, key, None, config, options)
    if attn_mask is not None:
        call.mask(attn_mask)
    make = _Maker(query)
    mask, call.extra["mask_out"] = make.new(call.mask_shape(), "bool")
    q, k, _ = call.raw
    _sparge.predict(call.settings, call.q.dtype, _threads(), q, k, call.extra)
    return BlockMask(make.finish(mask), call.q_len, call.kv_len)


def quantize(key: Any, layout: str) -> Quantized:
    """`sparge.quantize` on numpy and DLPack arrays."""
    view = _View(key, "key")
    raw = view.raw("key")
    batch, heads, length, dim = view.shape
    if layout == "NHD":
        heads, length = length, heads
    make = _Maker(key)
    values, at_values = make.new((batch, heads, length, dim), "i8")
    scales, at_scales = make.new((batch, heads, length), "f32")
    blocks = (length + BLOCK_KV - 1) // BLOCK_KV
    means, at_means = make.new((batch, heads, blocks, dim), "f32")
    _sparge.quantize(view.dtype, layout, _threads(), raw, (at_values, at_scales, at_means))
    return Quantized(make.finish(values), make.finish(scales), make.finish(means))
