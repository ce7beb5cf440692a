"""The backend ``"sparge"`` of diffusers' attention dispatcher."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Optional

import torch
from diffusers.models import attention_dispatch as dispatch

from .._api import attention
from .._config import Config
from .._sparge import SpargeError
from ._attend import Text, dense, sparse

if TYPE_CHECKING:
    from ._handle import Layer

Tensor = torch.Tensor


class _Running(threading.local):
    """The attention module whose forward pass this thread is in."""

    layer: "Optional[Layer]" = None


_running = _Running()


def enter(layer: "Layer") -> None:
    """Announces the module that is about to run."""
    _running.layer = layer


def leave() -> None:
    """Ends what `enter` began."""
    _running.layer = None


def _member() -> dispatch.AttentionBackendName:
    """The enumeration is closed; a member is added as its own constructor would make it."""
    names = dispatch.AttentionBackendName
    if "SPARGE" in names._member_map_:
        return names("sparge")
    member = str.__new__(names, "sparge")
    member._name_, member._value_ = "SPARGE", "sparge"
    names._member_map_["SPARGE"] = member
    names._value2member_map_["sparge"] = member
    names._member_names_.append("SPARGE")
    return member


NAME = _member()


@dispatch._AttentionBackendRegistry.register(  # type: ignore[untyped-decorator]
    NAME,
    constraints=[dispatch._check_device, dispatch._check_shape],
    supports_context_parallel=True,
)
def sparge_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Any:
    """Attention on ``[batch, tokens, heads, dim]``; the log-sum-exp is ``[batch, tokens, heads]``.

    Called outside `sparge.diffusers.enable` (``attention_backend("sparge")``) it runs the defaults
    and knows of no text tokens.
    """
    if dropout_p:
        raise SpargeError(f"dropout_p is {dropout_p}, expected 0: this is inference")
    if _parallel_config is not None:
        return dispatch._templated_context_parallel_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse,
            forward_op=_ring_step, backward_op=_no_backward, _parallel_config=_parallel_config,
        )  # fmt: skip
    return _whole(query, key, value, attn_mask, is_causal, scale, enable_gqa, return_lse)


def _whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    is_causal: bool,
    scale: Optional[float],
    enable_gqa: bool,
    return_lse: bool,
) -> Any:
    """All tokens of (some of) the heads."""
    layer = _running.layer
    config = Config() if layer is None else layer.config()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attn_mask is not None and attn_mask.ndim == 2:
        attn_mask = attn_mask[:, None, None, :]
    if return_lse:
        out, lse = _with_lse(q, k, v, attn_mask, is_causal, scale, enable_gqa, config)
        return out.transpose(1, 2), lse.transpose(1, 2)
    is_joint = q.shape[2] == k.shape[2] and not is_causal and not enable_gqa
    is_key_mask = attn_mask is None or (attn_mask.dtype == torch.bool and attn_mask.shape[1:3] == (1, 1))
    if config is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    elif is_joint and is_key_mask:
        place, text_len = (None, 0) if layer is None else (layer.model.text, layer.text_len())
        text = Text.at(place, text_len, q.shape[2])
        attend = None if layer is None else layer.attend
        out = sparse(q, k, v, text, config, scale, attn_mask, attend)
    else:
        out = attention(
            q, k, v, attn_mask, 0.0, is_causal, scale, enable_gqa, config=config, fallback="dense"
        )
    return out.transpose(1, 2)


def _with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional[Tensor],
    is_causal: bool,
    scale: Optional[float],
    enable_gqa: bool,
    config: Optional[Config],
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, heads before tokens. A dense step computes every block."""
    result: tuple[Tensor, Tensor] = attention(
        q, k, v, mask, 0.0, is_causal, scale, enable_gqa,
        config=config or Config(policy="dense"), return_lse=True,
    )  # fmt: skip
    return result


def _ring_step(
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Any:
    """One shard of keys under ring parallelism; under Ulysses alone every token of some heads, which
    is an ordinary call. Where text stands in a shard is not known: its tokens compete like all
    others, so give them room (a higher ``topk`` or ``cdf``) under context parallelism."""
    if _parallel_config is not None and _parallel_config.context_parallel_config.ring_degree == 1:
        result = _whole(query, key, value, attn_mask, is_causal, scale, enable_gqa, return_lse)
        parts = result if return_lse else (result,)
        parts = tuple(x.contiguous() for x in parts)
        return parts if return_lse else parts[0]
    if attn_mask is not None:
        # It is the local shard's, and the keys are those of every rank in turn.
        raise SpargeError(
            "attn_mask under ring context parallelism would hide the wrong keys of other ranks; pass "
            "no mask, or ring_degree=1 (ulysses_degree alone)"
        )
    layer = _running.layer
    config = Config() if layer is None else layer.config()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = _with_lse(q, k, v, attn_mask, is_causal, scale, enable_gqa, config)
    out = out.transpose(1, 2).contiguous()
    return (out, lse.transpose(1, 2).contiguous()) if return_lse else out


def _no_backward(*args: Any, **kwargs: Any) -> Any:
    raise SpargeError("there is no backward pass; run under torch.no_grad()")


__all__ = ["NAME", "dense", "enter", "leave", "sparge_attention"]
