"""The ways of computing attention that latency.py compares, each a context around forward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

sdpa = F.scaled_dot_product_attention
# Shorter attention (text refiners, cross-attention) stays what it is under every method.
MIN_TOKENS = 512


class Attention:
    """Stands in for SDPA where a model calls it for self-attention over its tokens."""

    def __init__(self, calls: dict[str, Any]) -> None:
        self.calls = calls

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                 enable_gqa=False):  # fmt: skip
        if query.shape[2] != key.shape[2] or query.shape[2] < MIN_TOKENS:
            return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return self.attend(query, key, value, attn_mask, is_causal, scale, enable_gqa)

    def attend(self, query, key, value, mask, is_causal, scale, enable_gqa):
        raise NotImplementedError


class Nothing(Attention):
    """The query itself: what is left of the time is not attention's. Notes what SDPA would do."""

    def attend(self, query, key, value, mask, is_causal, scale, enable_gqa):
        shape = (*query.shape[:3], query.shape[3], key.shape[1])
        found = self.calls.setdefault("attention", {}).setdefault(str(list(shape)), {"calls": 0})
        found["calls"] += 1
        if "default" not in found and query.is_cuda:
            found["default"] = default_backend(query, key, value, mask, is_causal, scale, enable_gqa)
        return query


def default_backend(query, key, value, mask, is_causal, scale, enable_gqa) -> str:
    """What SDPA would choose for these tensors."""
    try:
        choice = torch._fused_sdp_choice(
            query, key, value, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        members = torch.nn.attention.SDPBackend.__members__
        return next((name for name, x in members.items() if int(x) == choice), str(choice))
    except Exception as error:  # a private function: without it the record lacks a name, no time
        return f"failed: {type(error).__name__}"


class CuDNN(Attention):
    """cuDNN or an error; it may refuse some strides, then it gets copies and the record says so."""

    is_copying = False

    def attend(self, query, key, value, mask, is_causal, scale, enable_gqa):
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            if not self.is_copying:
                try:
                    return sdpa(query, key, value, mask, **options)
                except RuntimeError as error:
                    self.calls["cudnn"] = f"without copies: {error}".splitlines()[0][:200]
            query, key, value = (x.contiguous() for x in (query, key, value))
            out = sdpa(query, key, value, mask, **options)
            if not self.is_copying:
                self.is_copying = True
                self.calls["cudnn"] += "; inputs copied to be contiguous"
            return out


class FlashAttention3(Attention):
    def __init__(self, calls: dict[str, Any]) -> None:
        import fa3_fwd_interface

        super().__init__(calls)
        self.run = fa3_fwd_interface.flash_attn_func

    def attend(self, query, key, value, mask, is_causal, scale, enable_gqa):
        if mask is not None:
            raise RuntimeError("FlashAttention-3 takes no mask, and this model passes one")
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = self.run(q, k, v, softmax_scale=scale, causal=is_causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@contextlib.contextmanager
def replaced(attention: Any) -> Iterator[None]:
    F.scaled_dot_product_attention = attention
    try:
        yield None
    finally:
        F.scaled_dot_product_attention = sdpa


@contextlib.contextmanager
def sparge_diffusers(model: Any, knobs: dict[str, Any]) -> Iterator[Any]:
    import sparge.diffusers

    handle = sparge.diffusers.enable(model, **knobs)
    try:
        yield handle
    finally:
        handle.disable()


@contextlib.contextmanager
def sparge_transformers(model: Any, knobs: dict[str, Any]) -> Iterator[None]:
    import sparge.transformers

    sparge.transformers.register()
    sparge.transformers.configure(model, **knobs)
    model.set_attn_implementation("sparge")
    try:
        yield None
    finally:
        model.set_attn_implementation("sdpa")


REUSE = 4
SPARGE = {
    "sparge 1.0": {"topk": 1.0},
    "sparge 0.5": {"topk": 0.5},
    "sparge 0.3": {"topk": 0.3},
    "sparge 0.5, block pooling": {"topk": 0.5, "pooling": "block"},
    "sparge 0.5, hilbert": {"topk": 0.5, "order": "hilbert"},
    "sparge 0.5, reuse 4": {"topk": 0.5, "reuse_mask": REUSE},
    "sparge 0.5, hilbert, reuse 4": {"topk": 0.5, "order": "hilbert", "reuse_mask": REUSE},
    "sparge 0.3, hilbert, reuse 4": {"topk": 0.3, "order": "hilbert", "reuse_mask": REUSE},
}


def methods(model: Any, is_language: bool, calls: dict[str, Any]) -> dict[str, Any]:
    """Name to a function that makes the context; made anew in every round."""
    cudnn = CuDNN(calls)
    found: dict[str, Any] = {
        "native": contextlib.nullcontext,
        "no attention": lambda: replaced(Nothing(calls)),
        "sparge 0.5": None,  # early, so that a budget that ends early leaves the main ratio
        "cudnn": lambda: replaced(cudnn),
        "fa3": lambda: replaced(FlashAttention3(calls)),
    }
    for name, knobs in SPARGE.items():
        if is_language and {"order", "reuse_mask"} & knobs.keys():
            continue
        enter = sparge_transformers if is_language else sparge_diffusers
        found[name] = lambda enter=enter, knobs=knobs: enter(model, dict(knobs))
    return found
